"""Neural networks: tokenizers and world models. Needs torch, diffusers and transformers, and nothing else of ours."""
