"""`python -m cosmos_hf doctor`: what is installed, what a model needs, and what is missing.
`python -m cosmos_hf lint <data set>`: what is wrong with a data set, before anyone trains on it.

Both say what they found in words; the exit code is 1 where there are problems, 2 where the arguments were wrong.
"""

import argparse
import sys


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cosmos_hf", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="check this installation, and a model folder")
    doctor.add_argument("model", nargs="?", help="folder of a pipeline; default: the bundled nano model")
    lint = commands.add_parser("lint", help="check a data set")
    lint.add_argument(
        "data", help="folder of shards or videos, LeRobot or Bridge-style data set, or hf://<user>/<name>"
    )
    lint.add_argument("--num_frames", type=int, help="the training window: shorter clips are found")
    lint.add_argument("--temporal_compression", type=int, help="the tokenizer's: lengths that do not fit are found")
    lint.add_argument("--action_spec", help="folder of a checkpoint: its action_spec.json is what actions must fit")
    lint.add_argument("--no_captions", action="store_true", help="clips need no caption")
    lint.add_argument("--max_clips", type=int, default=200, help="clips to decode, evenly chosen")
    args = parser.parse_args(argv)
    return run_doctor(args) if args.command == "doctor" else run_lint(args, parser)


def run_doctor(args) -> int:
    from .doctor import examine  # not before the arguments are known to be right

    findings = examine(args.model)
    for finding in findings:
        print(finding)
    problems = sum(finding.problem for finding in findings)
    print(f"\n{problems} problem{'s' * (problems != 1)} found" if problems else "\nnothing is missing")
    return int(problems > 0)


def run_lint(args, parser) -> int:
    from .conditioning.action import ActionSpec
    from .data.lint import lint

    try:
        spec = ActionSpec.load(args.action_spec) if args.action_spec else None
        findings = lint(
            args.data, args.num_frames, args.temporal_compression, spec, not args.no_captions, args.max_clips
        )
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    for finding in findings:
        print(finding)
    errors = sum(finding.level == "error" for finding in findings)
    warnings = len(findings) - errors
    print(f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}")
    return int(errors > 0)


if __name__ == "__main__":
    sys.exit(main())
