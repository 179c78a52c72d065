"""Render a split of a simulated world into WebDataset shards.

    python training/render_world.py --out datasets/tabletop --split train --num_clips 3000
    python training/render_world.py --world rooms --out datasets/rooms --split val_trajectory --num_clips 50

Worlds: tabletop (a robot arm, with actions), tabletop_instructions (the same, which does in every clip what it is told),
tabletop_objects (it stands still, and the thing that a caption names moves by itself), tabletop_hand (the same, with its hand
at that thing), rooms (a moving camera, with poses), driving (six cameras on a car, with actions and poses) and driving_front (its
front camera alone).
Needs `pip install 'cosmos-hf[worlds]'`. A run that was cut short goes on where it stopped; equal arguments give equal clips.
"""

import argparse
import logging

from cosmos_hf.worlds.shards import WORLDS, render_split


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=WORLDS, default="tabletop")
    parser.add_argument("--out", required=True, help="folder of the data set")
    parser.add_argument(
        "--split", default="train", help="train, val_iid, ...: an unknown one is answered with the list"
    )
    parser.add_argument("--num_clips", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clips_per_shard", type=int, default=100)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--renderer", choices=("filament", "classic"), help="default: the best one that runs here")
    parser.add_argument("--no_progress", action="store_true")
    args = vars(parser.parse_args(argv))
    logging.basicConfig(level=logging.INFO)
    folder = render_split(args.pop("out"), progress=not args.pop("no_progress"), **args)
    logging.getLogger(__name__).info("rendered into %s", folder)


if __name__ == "__main__":
    main()
