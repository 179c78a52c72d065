"""Loading weights without silence: diffusers only warns where a folder's weights do not fit the model."""


class StrictLoadingMixin:
    """Put before `ModelMixin`: `from_pretrained` raises ValueError where a weight is missing, unknown or of another shape."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *, output_loading_info: bool = False, **kwargs):
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        kinds = {"missing": "missing_keys", "unknown": "unexpected_keys", "of another shape": "mismatched_keys"}
        if kwargs.get("ignore_mismatched_sizes"):
            kinds.pop("of another shape")
        problems = [f"{len(info[key])} {kind} {sorted(info[key])[:5]}" for kind, key in kinds.items() if info[key]]
        if problems:
            raise ValueError(
                f"the weights in {pretrained_model_name_or_path} are not those of a {cls.__name__} with the config "
                f"beside them: {'; '.join(problems)}"
            )
        return (model, info) if output_loading_info else model
