"""Settings of diffusers' `EDMEulerScheduler`, which the published folders name, and ours: there and back."""

DIFFUSERS_CLASS = "EDMEulerScheduler"
_SAME = ("sigma_max", "sigma_min", "sigma_data", "rho", "final_sigmas_type")
# Settings that must have this value, since our scheduler knows no other; None stands for "without effect on samples".
_FIXED = {"sigma_schedule": "karras", "prediction_type": "epsilon", "num_train_timesteps": None}


def from_diffusers_config(config):
    """A config of diffusers' class -> ours, which walks the same grid with the same steps; any other config as it is.

    Raises ValueError for settings that are not understood.
    """
    if config.get("_class_name") != DIFFUSERS_CLASS:
        return config
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    ours = {key: given.pop(key) for key in _SAME if key in given}
    for key, value in given.items():
        if key not in _FIXED or _FIXED[key] not in (None, value):
            raise ValueError(f"{DIFFUSERS_CLASS} setting {key}={value!r} is not supported, only {_FIXED.get(key)!r}")
    return ours | {"solver": "euler"}


def to_diffusers_config(config) -> dict:
    """Arguments of diffusers' class for our config; its only solver is Euler's, whatever ours is set to."""
    return {key: config[key] for key in _SAME} | {key: value for key, value in _FIXED.items() if value is not None}
