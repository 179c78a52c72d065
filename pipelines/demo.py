"""The bundled nano model continues a clip that it has never seen: `make demo`.

Writes `world.mp4` and `contact_sheet.png`: the input frames, what the model imagined, and what really happened.
"""

import argparse
import time
from pathlib import Path

import torch

from cosmos_hf import CosmosVideo2WorldPipeline, nano_path
from cosmos_hf.data.video import contact_sheet, read_metadata, read_video
from cosmos_hf.pipelines.scripting import call_arguments, report, save_result


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="outputs/demo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_inference_steps", type=int)
    args = parser.parse_args(argv, argparse.Namespace(model=nano_path("video2world")))
    started = time.perf_counter()
    with report(parser):
        pipe = CosmosVideo2WorldPipeline.from_pretrained(args.model)
        example = Path(args.model) / "example.mp4"
        args.prompt = read_metadata(example)["caption"]
        args.output = str(Path(args.output_dir) / "world.mp4")
        truth = read_video(example, num_frames=pipe.config.num_frames).frames
        given = truth[:, :9]
        settings = dict.fromkeys(("negative_prompt", "height", "width", "num_frames", "fps", "guidance_scale"))
        run = call_arguments(argparse.Namespace(**settings, **vars(args)))
        result = pipe(video=given, num_conditioning_frames=given.shape[1], **run)
        save_result(args, pipe, result, input=example.name)

        imagined = (result.frames[0].transpose(0, 1) * 255).round().to(torch.uint8)
        shown = range(0, truth.shape[1], 2)
        rows = {
            "input (9 frames are given)": torch.stack(
                [given[:, min(t, 8)] * (t < 9) + 255 * (t >= 9) for t in shown], 1
            ),
            f"imagined: {args.prompt}": imagined[:, shown],
            "what really happened": truth[:, shown],
        }
        sheet = Path(args.output_dir) / "contact_sheet.png"
        contact_sheet(rows, [f"frame {t}" for t in shown], scale=2).save(sheet)
    print(f"{sheet}: input, imagined and real frames\ntook {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
