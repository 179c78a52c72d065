"""Make a bundled model of a run's export: bfloat16 weights, no paths of this machine, and a held-out example clip.

    python training/bundle_model.py --export runs/nano_video2world/export --clips datasets/tabletop/val_iid --clip 3 \\
        --target src/cosmos_hf/nano/nano-video2world-tabletop
"""

import argparse
import json
import shutil
from pathlib import Path

import torch

from cosmos_hf import CosmosVideo2WorldPipeline, preflight
from cosmos_hf.data.clips import ClipDataset
from cosmos_hf.data.video import write_video


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", required=True)
    parser.add_argument("--clips", required=True, help="held-out set that the example comes from")
    parser.add_argument("--clip", type=int, default=0, help="its index there")
    parser.add_argument("--target", required=True)
    args = parser.parse_args(argv)
    target = Path(args.target)
    shutil.rmtree(target, ignore_errors=True)
    pipe = CosmosVideo2WorldPipeline.from_pretrained(args.export)
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
        part.to(torch.bfloat16)
    pipe.save_pretrained(target)
    for file in (*target.rglob("*config.json"), target / "model_index.json"):
        values = json.loads(file.read_text())
        values.pop("_name_or_path", None)
        file.write_text(json.dumps(values, indent=2) + "\n")
    # transformers 5 writes a class name that transformers 4 does not have; this one exists in both.
    for file in (target / "model_index.json", target / "tokenizer" / "tokenizer_config.json"):
        file.write_text(file.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    preflight(target, record=True)
    sample = ClipDataset(args.clips, num_frames=pipe.config.num_frames, random=False)[args.clip]
    metadata = {"caption": sample["caption"], "clip": sample["key"]}
    write_video(target / "example.mp4", sample["video"], sample["fps"], metadata, crf=12)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    print(f"{target}: {size / 2**20:.1f} MiB; example: {sample['caption']}")


if __name__ == "__main__":
    main()
