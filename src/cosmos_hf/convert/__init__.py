"""Published checkpoints of the reference implementation to our classes."""

_TOKENIZERS = (
    "CausalContinuousVideoTokenizer",
    "CausalDiscreteVideoTokenizer",
    "ContinuousImageTokenizer",
    "DiscreteImageTokenizer",
)
_TRANSFORMERS = (
    *("GeneralDIT", "VideoExtendGeneralDIT", "ActionConditionalVideoExtendGeneralDIT", "DiffusionDecoderGeneralDIT"),
    *("MultiviewGeneralDIT", "MultiviewVideoExtendGeneralDIT", "VideoExtendMultiviewGeneralDIT"),
)
_AUTOREGRESSIVE = ("Transformer",)


def load_original(class_name: str, config: dict, state_dict: dict, *, training_type: str | None = None):
    """A model of the reference implementation -> ours, float32, in eval mode.

    Args:
        class_name: the reference's class, for example "GeneralDIT" or "CausalContinuousVideoTokenizer".
        config: its constructor's keyword arguments; an action-conditioned model may have `action_form` "intended" or
            "as_written" (the default: what its training code computes) beside them.
        state_dict: its state dict under the reference's own keys; `net.` and `logvar.` may stand in front.
        training_type: kind of an autoregressive checkpoint, "video_to_video" or "text_to_video"; the others have none.

    Raises:
        ValueError: an unknown class, an argument or key that is not understood, a missing key, a wrong shape.
    """
    if class_name in _AUTOREGRESSIVE:
        from .autoregressive import load_original_autoregressive

        return load_original_autoregressive(class_name, config, state_dict, training_type)
    if class_name in _TOKENIZERS:
        from .tokenizer import load_original_tokenizer as load
    elif class_name in _TRANSFORMERS:
        from .diffusion import load_original_transformer as load
    else:
        known = ", ".join(_TOKENIZERS + _TRANSFORMERS + _AUTOREGRESSIVE)
        raise ValueError(f"no converter for the class {class_name!r}; there is one for {known}")
    if training_type is not None:
        raise ValueError(f"training_type={training_type!r} does not apply to {class_name}: leave it out")
    return load(class_name, config, state_dict)
