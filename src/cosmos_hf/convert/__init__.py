"""Published checkpoints of the reference implementation to our classes."""

_TOKENIZERS = (
    "CausalContinuousVideoTokenizer",
    "CausalDiscreteVideoTokenizer",
    "ContinuousImageTokenizer",
    "DiscreteImageTokenizer",
)
_TRANSFORMERS = ("GeneralDIT", "VideoExtendGeneralDIT")


def load_original(class_name: str, config: dict, state_dict: dict, *, training_type: str | None = None):
    """A model of the reference implementation -> ours, float32, in eval mode.

    Args:
        class_name: the reference's class, for example "GeneralDIT" or "CausalContinuousVideoTokenizer".
        config: its constructor's keyword arguments.
        state_dict: its state dict under the reference's own keys; `net.` and `logvar.` may stand in front.
        training_type: kind of an autoregressive checkpoint; no class that is supported so far has one.

    Raises:
        ValueError: an unknown class, an argument or key that is not understood, a missing key, a wrong shape.
    """
    if class_name in _TOKENIZERS:
        from .tokenizer import load_original_tokenizer as load
    elif class_name in _TRANSFORMERS:
        from .diffusion import load_original_transformer as load
    else:
        raise ValueError(
            f"no converter for the class {class_name!r}; there is one for {', '.join(_TOKENIZERS + _TRANSFORMERS)}"
        )
    if training_type is not None:
        raise ValueError(f"training_type={training_type!r} does not apply to {class_name}: leave it out")
    return load(class_name, config, state_dict)
