"""Published weights of an autoregressive model to a folder that `CosmosAutoregressivePipeline.from_pretrained` reads.

    python pipelines/convert_autoregressive.py --checkpoint 4B/model.pt --preset 4b --vae dv8x16x16 --output cosmos-4b

Give the shards of a tensor-parallel checkpoint in the order of their ranks. `--vae` is the discrete tokenizer's folder
(`pipelines/convert_tokenizer.py`), `--text_encoder` one that has T5 in `text_encoder/` and `tokenizer/`, as those of the published
diffusion pipelines do, and `--diffusion_decoder` what `pipelines/convert_diffusion.py` makes of the published one. Without `--vae`
only the model is written, for `CosmosARForCausalLM.from_pretrained`. The result is loaded and run once on a small input.
"""

import argparse

from cosmos_hf import preflight
from cosmos_hf.convert.autoregressive import load_files
from cosmos_hf.models.ar_cosmos import PRESETS
from cosmos_hf.pipelines.published_layout import save_autoregressive
from cosmos_hf.pipelines.scripting import report


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, nargs="+", help="model.pt, or its shards by rank")
    parser.add_argument("--preset", required=True, choices=sorted(PRESETS), help="which model it is")
    parser.add_argument("--output", required=True)
    parser.add_argument("--vae", help="folder of the discrete tokenizer; without it only the model is written")
    parser.add_argument("--text_encoder", help="folder with text_encoder/ and tokenizer/, for models that take text")
    parser.add_argument("--diffusion_decoder", help="folder of the diffusion decoder's pipeline")
    parser.add_argument("--no_preflight", action="store_true", help="do not load and run the result")
    args = parser.parse_args(argv)
    with report(parser):
        if not args.vae and (args.text_encoder or args.diffusion_decoder):
            raise ValueError("--text_encoder and --diffusion_decoder are parts of a pipeline: give --vae, too")
        model = load_files(args.checkpoint, args.preset)
        if args.vae:
            save_autoregressive(model, args.output, args.vae, args.text_encoder, args.diffusion_decoder)
        else:
            model.save_pretrained(args.output)
        if not args.no_preflight:
            print(preflight(args.output, record=True, torch_dtype=model.dtype))
    print(f"{args.output}: {sum(p.numel() for p in model.parameters()) / 1e9:.2f} B parameters, {model.dtype}")


if __name__ == "__main__":
    main()
