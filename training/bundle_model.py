"""Make a bundled model of a run's export: bfloat16 weights, no paths of this machine, and a held-out example clip.

    python training/bundle_model.py --export runs/nano_video2world/export --clips datasets/tabletop/val_iid --clip 3 \\
        --target src/cosmos_hf/nano/nano-video2world

An adapter (the export of `posttrain.py` with LoRA) is stored as it is, in bfloat16. Its example holds what steers it, too: the
clip's actions and cameras are in `example.npz`, and of several views each has its `example.<view>.mp4`.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cosmos_hf import preflight
from cosmos_hf.data.clips import ClipDataset
from cosmos_hf.data.video import write_video
from cosmos_hf.models.condition_adapters import RECORD
from cosmos_hf.pipelines.loading import pipeline_class


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", required=True, help="folder of a pipeline or of an adapter")
    parser.add_argument("--clips", required=True, help="held-out set that the example comes from")
    parser.add_argument("--clip", type=int, default=0, help="its index there")
    parser.add_argument("--target", required=True)
    args = parser.parse_args(argv)
    export, target = Path(args.export), Path(args.target)
    is_pipeline = (export / "model_index.json").exists()
    record = export / ("model_index.json" if is_pipeline else RECORD)
    if not record.exists():
        parser.error(
            f"{export} has neither model_index.json, as a pipeline, nor {RECORD}, as an adapter with conditions"
        )
    told = json.loads(record.read_text())
    views, steers = told.get("views"), told.get("names") or ()
    sample = ClipDataset(args.clips, num_frames=told["num_frames"], random=False, views=views)[args.clip]
    shutil.rmtree(target, ignore_errors=True)  # now that all that is needed could be read
    (bundle_pipeline if is_pipeline else bundle_adapter)(export, target)
    metadata = {"caption": sample["caption"], "clip": sample["key"]}
    names = [f"example.{view}.mp4" for view in views] if views else ["example.mp4"]
    for name, video in zip(names, sample["video"] if views else [sample["video"]], strict=True):
        write_video(target / name, video, sample["fps"], metadata, crf=12)
    arrays = {"actions": sample["actions"].numpy()} if "action" in steers else {}
    if "camera" in sample and {"camera", "trajectory", "views"} & set(steers):
        arrays |= {name: value.numpy() for name, value in sample["camera"].items()}
    if arrays:
        np.savez_compressed(target / "example.npz", **arrays)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    print(f"{target}: {size / 2**20:.1f} MiB")


def bundle_pipeline(export: Path, target: Path):
    pipe = pipeline_class(export).from_pretrained(export)
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
        if part is not None:
            part.to(torch.bfloat16)
    pipe.save_pretrained(target)
    for file in (*target.rglob("*config.json"), target / "model_index.json"):
        values = json.loads(file.read_text())
        values.pop("_name_or_path", None)
        file.write_text(json.dumps(values, indent=2) + "\n")
    # transformers 5 writes a class name that transformers 4 does not have; this one exists in both.
    for file in (target / "model_index.json", target / "tokenizer" / "tokenizer_config.json"):
        if file.exists():
            file.write_text(file.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    preflight(target, record=True)


def bundle_adapter(export: Path, target: Path):
    target.mkdir(parents=True)
    for file in export.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, target)
            continue
        with safe_open(file, "pt") as stored:
            tensors = {key: stored.get_tensor(key).to(torch.bfloat16) for key in stored.keys()}  # noqa: SIM118
            save_file(tensors, target / file.name, stored.metadata())


if __name__ == "__main__":
    main()
