"""Make a video again from the settings stored inside it, and say whether it is the same.

    python pipelines/reproduce.py outputs/future.mp4

The exit status is 0 for the same frames and 1 for others; then the versions and files that are not the same are listed.
"""

import argparse
import runpy
import sys
from pathlib import Path

from cosmos_hf.pipelines.reproduction import command_line, compare, recipe
from cosmos_hf.pipelines.scripting import report


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video")
    parser.add_argument("--output", default="outputs/reproduced.mp4")
    parser.add_argument("--model", help="where the model is now, if it moved")
    parser.add_argument("--input", help="where the input is now, if it moved")
    parser.add_argument("--device", help="default: the script's own choice")
    args = parser.parse_args(argv)
    with report(parser):
        if Path(args.output).resolve() == Path(args.video).resolve():
            raise ValueError("--output must be another file than the video")
        script, settings = recipe(args.video)
        settings |= {name: value for name, value in vars(args).items() if value and name != "video"}
        arguments = command_line(settings)
        print(f"pipelines/{script}.py {' '.join(arguments)}")
        runpy.run_path(str(Path(__file__).with_name(f"{script}.py")))["main"](arguments)
        verdict = compare(args.video, args.output)
    if verdict["equal"]:
        print(f"{args.output} has the same frames as {args.video}")
    else:
        print(f"{args.output} differs from {args.video}: {verdict['psnr']} dB between the files")
    for line in verdict["differences"]:
        print(f"- {line}")
    if not verdict["equal"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
