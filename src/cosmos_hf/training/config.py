"""Settings of a run: flat dataclasses, read from a YAML file and from flags.

    parse(TokenizerConfig, ["--config", "training/configs/nano_tokenizer.yaml", "--learning_rate", "1e-3"])

The file sets defaults, flags override, an unknown key in either is an error.
"""

import argparse
import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser


@dataclass
class RunConfig:
    """What every run has, whatever it trains."""

    output_dir: str = field(default="", metadata={"help": "folder of checkpoints, log and export"})
    data: list[str] = field(default_factory=list, metadata={"help": "folders of shards or videos to train on"})
    val_data: list[str] = field(default_factory=list, metadata={"help": "folders to validate on; none: no validation"})
    camera: str = field(default="", metadata={"help": "which camera to read of clips that have several"})
    preset: str = field(default="tiny", metadata={"help": "size of the model: a name in its PRESETS table"})
    init_from: str = field(
        default="", metadata={"help": "folder of a saved model to start from; empty: random weights"}
    )
    seed: int = 0
    max_steps: int = field(default=1000, metadata={"help": "optimizer steps of the whole run; the schedule's length"})
    max_minutes: float = field(default=0, metadata={"help": "stop (with a checkpoint) after this long; 0: no limit"})
    batch_size: int = field(default=1, metadata={"help": "clips per process and micro-step"})
    gradient_accumulation: int = 1
    learning_rate: float = 1e-4
    lr_schedule: str = field(default="constant", metadata={"help": "after the warm-up: constant or cosine"})
    cooldown_steps: int = field(
        default=0, metadata={"help": "constant only: fall linearly over the last so many steps"}
    )
    min_lr_ratio: float = field(default=0.0, metadata={"help": "end of cosine or cool-down, a share of learning_rate"})
    warmup_steps: int = 100
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-8
    clip_norm: float = field(default=1.0, metadata={"help": "gradient norm to clip to"})
    max_grad_norm_before_stop: float = field(default=1e4, metadata={"help": "a norm above this stops the run"})
    ema_width: float = field(default=0.1, metadata={"help": "s of the power-function EMA; 0: none"})
    mixed_precision: str = field(default="no", metadata={"help": "no, fp16 or bf16"})
    gradient_checkpointing: bool = False
    compile_backend: str = field(
        default="",
        metadata={"help": "compile the network's blocks (torch.compile) by this, as inductor; empty: do not"},
    )
    num_workers: int = field(default=0, metadata={"help": "processes that decode; 0: in the training process"})
    keep_decoded: bool = field(
        default=False, metadata={"help": "keep decoded clips in memory (num_workers must be 0)"}
    )
    on_broken: str = field(default="error", metadata={"help": "broken samples: error or skip"})
    log_every: int = 20
    validate_every: int = field(default=0, metadata={"help": "steps between validations; 0: at the end only"})
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    resume: bool = field(default=True, metadata={"help": "go on from the newest checkpoint in output_dir"})
    report_to: str = field(
        default="", metadata={"help": "tracker of accelerate (tensorboard, trackio, wandb); empty: none"}
    )
    progress: bool = True

    def __post_init__(self):
        for name in ("batch_size", "gradient_accumulation", "max_steps", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}: the run would learn nothing")
        for name, legal in (
            ("lr_schedule", ("constant", "cosine")),
            ("mixed_precision", ("no", "fp16", "bf16")),
            ("on_broken", ("error", "skip")),
        ):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name} must be one of {', '.join(legal)}, got {getattr(self, name)!r}")
        if self.cooldown_steps and self.lr_schedule != "constant":
            raise ValueError("cooldown_steps belongs to lr_schedule: constant; a cosine falls by itself")
        if self.keep_decoded and self.num_workers:
            raise ValueError("keep_decoded needs num_workers=0: every worker process would keep its own copy")


@dataclass
class WindowSettings(RunConfig):
    """How the world models of both families read clips, and what they keep of them (`cache`)."""

    cache_dir: str = field(
        default="", metadata={"help": "where latents (or codes) and text are kept; empty: output_dir/cache"}
    )
    window_starts: list[int] = field(
        default_factory=list,
        metadata={"help": "first frames of the windows; none: so many that they cover every clip"},
    )
    height: int = field(default=0, metadata={"help": "resize to this; 0: as stored"})
    width: int = 0
    fps: float = field(default=0, metadata={"help": "resample to this; 0: as stored"})
    val_clips: int = field(default=32, metadata={"help": "clips of each validation set to measure on"})

    def __post_init__(self):
        super().__post_init__()
        if bool(self.height) != bool(self.width):
            raise ValueError("give height and width together")
        if any(start < 0 for start in self.window_starts):
            raise ValueError(f"window_starts must be frames >= 0, got {self.window_starts}")
        self.cache_dir = self.cache_dir or str(Path(self.output_dir) / "cache")


@dataclass
class TokenizerConfig(RunConfig):
    """A run of `training/train_tokenizer.py`. The weights are those of the terms in `losses`; 0 leaves a term out."""

    kind: str = field(default="", metadata={"help": "video or image; empty: the kind whose presets have `preset`"})
    num_frames: int = field(default=17, metadata={"help": "length of the windows"})
    crop_height: int = field(default=0, metadata={"help": "random crop; 0: the whole frame"})
    crop_width: int = 0
    image_share: float = field(default=0.0, metadata={"help": "share of steps on single frames instead of clips"})
    images_per_clip: int = field(default=4, metadata={"help": "how many images such a step takes for each clip"})
    image_data: list[str] = field(
        default_factory=list, metadata={"help": "folders of pictures for such steps; none: frames of the clips"}
    )
    l1_weight: float = 1.0
    l2_weight: float = 0.0
    perceptual_weight: float = 0.0
    perceptual_frames: int = field(default=2, metadata={"help": "random frames of a clip for perceptual and Gram"})
    perceptual_backbone: str = field(default="efficientnet-lite0", metadata={"help": "or vgg16, with vgg_weights"})
    vgg_weights: str = field(default="", metadata={"help": "torchvision's vgg16-397923af.pth"})
    lpips_weights: str = field(default="", metadata={"help": "LPIPS's weights/v0.1/vgg.pth, to make it LPIPS itself"})
    gram_weight: float = 0.0
    temporal_weight: float = field(default=0.0, metadata={"help": "of the error of frame differences"})
    flow_weight: float = field(default=0.0, metadata={"help": "of the error's change along the optical flow"})
    flow_frames: int = field(default=5, metadata={"help": "length of the stretch of a clip that the flow term sees"})
    flow_estimator: str = field(default="dis", metadata={"help": "dis, or module:name of an estimator of your own"})
    adversarial_weight: float = field(default=0.0, metadata={"help": "above 0: the adversarial stage"})
    discriminator_channels: int = 64
    discriminator_learning_rate: float = 1e-4
    discriminator_warmup: int = field(default=1000, metadata={"help": "steps in which only the discriminator learns"})
    freeze_encoder: bool = field(
        default=False, metadata={"help": "train the decoder only: the latents stay as they are"}
    )
    fsq_levels: list[int] = field(
        default_factory=list,
        metadata={"help": "make a continuous init_from discrete, with so many values per code channel"},
    )
    latent_noise: float = field(
        default=0.0, metadata={"help": "noise on the latents, up to so many of their standard deviations"}
    )
    val_clips: int = field(default=16, metadata={"help": "clips of each validation set to measure on"})

    def __post_init__(self):
        super().__post_init__()
        if self.latent_noise < 0 or (self.latent_noise and not self.freeze_encoder):
            raise ValueError(
                f"latent_noise must be >= 0 and belongs to freeze_encoder, got {self.latent_noise}: an encoder that learns "
                f"would only make its latents larger than the noise"
            )
        if self.fsq_levels and not self.init_from:
            raise ValueError(
                "fsq_levels needs init_from, a continuous tokenizer to start from; or take a discrete preset"
            )
        if bool(self.crop_height) != bool(self.crop_width):
            raise ValueError("give crop_height and crop_width together")
        if not 0 <= self.image_share <= 1:
            raise ValueError(f"image_share must be in [0, 1], got {self.image_share}")
        if self.kind not in ("", "video", "image"):
            raise ValueError(f"kind must be video, image or empty, got {self.kind!r}")
        weights = {name: value for name, value in vars(self).items() if name.endswith("_weight")}
        adversarial = weights.pop("adversarial_weight")
        if min(*weights.values(), adversarial) < 0 or not any(weights.values()):
            raise ValueError(f"{', '.join(weights)} must be >= 0, and one of them above 0; adversarial_weight >= 0")
        if self.flow_weight and self.flow_frames < 2:
            raise ValueError(f"flow_frames must be at least 2, got {self.flow_frames}")
        if self.adversarial_weight and not self.init_from:
            raise ValueError("the adversarial stage starts from a trained tokenizer: give init_from")
        if self.adversarial_weight and self.gradient_accumulation > 1:
            raise ValueError("the adversarial stage has no gradient_accumulation: raise batch_size")
        if self.adversarial_weight and self.mixed_precision == "fp16":
            raise ValueError("the adversarial stage compares gradients, which fp16 would round to 0: take bf16 or no")
        if self.freeze_encoder and not self.init_from:
            raise ValueError("freeze_encoder keeps the encoder of a trained tokenizer: give init_from")


def parse(cls: type[RunConfig], argv: list[str] | None = None) -> RunConfig:
    """Flags, over the file named by `--config`, over the dataclass's defaults. Raises ValueError for an unknown key."""
    parser = HfArgumentParser(cls, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file with defaults for the flags below")
    path = parser.parse_known_args(argv)[0].config
    if path:
        parser.set_defaults(**read_yaml(cls, path))
    arguments = vars(parser.parse_args(argv))
    arguments.pop("config")
    config = cls(**arguments)
    if not config.output_dir or not config.data:
        raise ValueError("output_dir and data must be given, in the file or as flags")
    return config


def family_of(argv: list[str] | None, families: tuple[str, ...]) -> str:
    """The kind of world model that flags or `--config` name; the first of `families` where neither does."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--family")
    known = parser.parse_known_args(argv)[0]
    family = known.family
    if family is None and known.config:
        family = (yaml.safe_load(Path(known.config).read_text()) or {}).get("family")
    if family not in (None, *families):
        raise ValueError(f"family must be {' or '.join(families)}, got {family!r}")
    return family or families[0]


def read_yaml(cls: type, path: str | Path) -> dict:
    """The settings in a YAML file. Raises ValueError naming a key that `cls` does not have, and the nearest one it has."""
    values = yaml.safe_load(Path(path).read_text()) or {}
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"{path}: unknown key {key!r}{f', did you mean {near[0]!r}?' if near else ''}")
        values[key] = _checked(path, known[key], value)
    return values


def _checked(path, setting: dataclasses.Field, value):
    """The value of a setting; YAML reads 1e-4 as a string. Raises ValueError for one of another type."""
    wanted = getattr(setting.type, "__origin__", setting.type)
    if wanted is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    if type(value) is not wanted:
        raise ValueError(f"{path}: {setting.name} must be of type {wanted.__name__}, got {value!r}")
    return value
