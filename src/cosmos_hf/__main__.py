"""`python -m cosmos_hf doctor`: what is installed, what a model needs, and what is missing."""

import argparse
import sys


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cosmos_hf", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="check this installation, and a model folder")
    doctor.add_argument("model", nargs="?", help="folder of a pipeline; default: the bundled nano model")
    args = parser.parse_args(argv)
    from .doctor import examine  # not before the arguments are known to be right

    findings = examine(args.model)
    for finding in findings:
        print(finding)
    problems = sum(finding.problem for finding in findings)
    print(f"\n{problems} problem{'s' * (problems != 1)} found" if problems else "\nnothing is missing")
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(main())
