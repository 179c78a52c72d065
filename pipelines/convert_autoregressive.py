"""Published weights of an autoregressive model to a folder that `CosmosARForCausalLM.from_pretrained` reads.

    python pipelines/convert_autoregressive.py --checkpoint Cosmos-Predict1-4B/model.pt --preset 4b --output cosmos-4b

Give the shards of a tensor-parallel checkpoint in the order of their ranks.
"""

import argparse

from cosmos_hf.convert.autoregressive import load_files
from cosmos_hf.models.ar_cosmos import PRESETS
from cosmos_hf.pipelines.scripting import report


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, nargs="+", help="model.pt, or its shards by rank")
    parser.add_argument("--preset", required=True, choices=sorted(PRESETS), help="which model it is")
    parser.add_argument("--output", required=True)
    args = parser.parse_args(argv)
    with report(parser):
        model = load_files(args.checkpoint, args.preset)
        model.save_pretrained(args.output)
    print(f"{args.output}: {sum(p.numel() for p in model.parameters()) / 1e9:.2f} B parameters, {model.dtype}")


if __name__ == "__main__":
    main()
