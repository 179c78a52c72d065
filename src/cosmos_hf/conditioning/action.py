"""Actions as a condition (arXiv 2501.03575, section 6.2): what the numbers mean, kept with the checkpoint and checked.

An `ActionSpec` says what each number is, in which unit and frame, at what rate, how a gripper counts, and how numbers are
normalised for the network. It is saved as `action_spec.json` beside the weights, so that a checkpoint refuses actions of
another robot, rate or convention instead of following them wrongly.

Axes: T pixel frames, T' latent frames, A width of an action. Action t leads from frame t to frame t + 1.
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from .robot_states import compose_motions

FILE_NAME = "action_spec.json"
KINDS = ("delta", "absolute", "trajectory")
NORMALISATIONS = ("none", "standard", "range", "quantile")
RANGE_MARGIN = 0.5  # of the range that was seen: actions further out are refused
_LEAST_SPREAD = 1e-6  # of a number that varies; a smaller one is left unscaled


@dataclass(frozen=True)
class Gripper:
    """Which number is the gripper, and its value when open and when closed."""

    name: str
    open: float
    closed: float


@dataclass(frozen=True)
class ActionSpec:
    """What the A numbers of an action mean.

    Attributes:
        names, units: of each number.
        frame: that motions are told in, such as "end effector", "robot base", "joints", "vehicle".
        kind: "delta" (relative to the frame before) or "absolute" (a target), of all numbers but the gripper; or
            "trajectory", points of the way that lies ahead, one list of them for a whole clip (`conditioning.trajectory`).
        rate: actions per second, which is the frame rate of the clips; of a trajectory points per second.
        embodiment: the robot or vehicle.
        gripper: None where there is none.
        normalisation: how `offset` and `scale` came about, one of `NORMALISATIONS`.
        offset, scale: normalised = (action - offset) / scale. Empty for none.
        low, high: smallest and largest values of the data. Empty where they are not known; then no range is checked.
        accumulated_scale: empty, or the network is given not only every action but also where all actions so far have led from the
            clip's first frame on, divided by this: sums of the numbers, or the pose where they are motions of an end effector. It
            need not learn to add up then.

    Raises ValueError for lengths that do not fit and values that are not known.
    """

    names: tuple[str, ...]
    units: tuple[str, ...]
    frame: str
    kind: str
    rate: float
    embodiment: str = ""
    gripper: Gripper | None = None
    normalisation: str = "none"
    offset: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    accumulated_scale: tuple[float, ...] = ()

    def __post_init__(self):
        for name in ("names", "units", "offset", "scale", "low", "high", "accumulated_scale"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.names or len(set(self.names)) != len(self.names):
            raise ValueError(f"an action needs names, each once, got {list(self.names)}")
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.normalisation not in NORMALISATIONS:
            raise ValueError(f"normalisation must be one of {', '.join(NORMALISATIONS)}, got {self.normalisation!r}")
        if not self.rate > 0:
            raise ValueError(f"rate must be positive, got {self.rate}")
        needed = {"units", "offset", "scale"} if self.normalisation != "none" else {"units"}
        for name in ("units", "offset", "scale", "low", "high", "accumulated_scale"):
            values = getattr(self, name)
            if len(values) != self.width and (values or name in needed):
                raise ValueError(
                    f"{name} has {len(values)} entries for {self.width} numbers ({', '.join(self.names)})"
                )
        for name in ("scale", "accumulated_scale"):
            if any(not value > 0 for value in getattr(self, name)):
                raise ValueError(f"{name} must be positive, got {list(getattr(self, name))}")
        if self.accumulated_scale and self.kind != "delta":
            raise ValueError(
                f"only deltas add up: accumulated_scale does not belong to actions of the kind {self.kind!r}"
            )
        if self.gripper is not None and self.gripper.name not in self.names:
            raise ValueError(f"the gripper {self.gripper.name!r} is none of the numbers {', '.join(self.names)}")
        if self.gripper is not None and self.gripper.open == self.gripper.closed:
            raise ValueError("a gripper needs different values for open and closed")

    @property
    def width(self) -> int:
        return len(self.names)

    @property
    def num_inputs(self) -> int:
        """How many numbers the network is given for an action."""
        return self.width + len(self.accumulated_scale)

    def check(self, actions, fps: float | None = None) -> torch.Tensor:
        """Actions [..., A] as float32, or ValueError: width, numbers that are none, rate `fps`, range, gripper."""
        actions = torch.as_tensor(actions).float()
        if actions.ndim < 1 or actions.shape[-1] != self.width:
            got = actions.shape[-1] if actions.ndim else "no"
            raise ValueError(
                f"actions have {got} numbers, {self.width} are needed"
                f"{f' for {self.embodiment}' if self.embodiment else ''}: {', '.join(self.names)}"
            )
        if not torch.isfinite(actions).all():
            raise ValueError("actions hold NaN or infinity")
        if fps is not None and self.kind != "trajectory" and abs(fps - self.rate) > 0.01 * self.rate:
            raise ValueError(
                f"actions are given at {fps:g} per second, the model was trained at {self.rate:g}: resample the clip, or "
                "sum up or split its actions"
            )
        if told := self.out_of_range(actions):
            raise ValueError(
                f"{told}: another unit, frame or scale? If it is right, it is too far from what the model knows: leave it out"
            )
        if self.gripper is not None and actions.numel():
            values = actions[..., self.names.index(self.gripper.name)]
            ends = sorted((self.gripper.open, self.gripper.closed))
            slack = 0.1 * (ends[1] - ends[0])
            if values.min() < ends[0] - slack or values.max() > ends[1] + slack:
                raise ValueError(
                    f"the gripper {self.gripper.name!r} goes from {values.min():g} to {values.max():g}; here "
                    f"{self.gripper.open:g} is open and {self.gripper.closed:g} closed"
                )
        return actions

    def out_of_range(self, actions) -> str | None:
        """Which number of the actions [..., A] lies far beyond the data's range, and how far, in words; None where none does."""
        actions = torch.as_tensor(actions).float().reshape(-1, self.width)
        for i, name in enumerate(self.names if self.low and len(actions) else ()):
            low, high = self.low[i], self.high[i]
            margin = RANGE_MARGIN * max(high - low, 1e-3)
            least, most = float(actions[:, i].min()), float(actions[:, i].max())
            if least < low - margin or most > high + margin:
                return (
                    f"the action {name!r} goes from {least:g} to {most:g} {self.units[i]}, the data were within "
                    f"{low:g} to {high:g}"
                )
        return None

    def normalise(self, actions, fps: float | None = None) -> torch.Tensor:
        """Checked actions [..., A] as the network takes them."""
        actions = self.check(actions, fps)
        if self.normalisation == "none":
            return actions
        return (actions - torch.tensor(self.offset)) / torch.tensor(self.scale)

    def inputs(self, actions, fps: float | None = None) -> torch.Tensor:
        """Checked actions [..., T - 1, A] of clips as the network takes them, [..., T - 1, num_inputs]."""
        normalised = self.normalise(actions, fps)
        if not self.accumulated_scale:
            return normalised
        led_to = self.accumulate(actions) / torch.tensor(self.accumulated_scale)
        return torch.cat([normalised, led_to], dim=-1)

    def accumulate(self, actions) -> torch.Tensor:
        """Where the actions [..., T - 1, A] up to each have led from the first frame on, in their units; a gripper's, which are
        absolute, stay.

        Raises ValueError for an end effector whose three moves, or turns, differ in unit, or whose turns are not in "rad" or "rad x
        <number>".
        """
        actions = torch.as_tensor(actions)
        steps = actions.double()
        led_to = steps.cumsum(-2)
        if self.gripper is not None:
            place = self.names.index(self.gripper.name)
            led_to[..., place] = steps[..., place]
        if self.frame == "end effector" and set(_POSE[:6]) <= set(self.names):
            places = [self.names.index(name) for name in _POSE[:6]]
            for three in (places[:3], places[3:]):
                if len(units := {self.units[place] for place in three}) > 1:
                    raise ValueError(
                        f"motions of an end effector add up in one unit, the spec has {', '.join(sorted(units))}"
                    )
            radian = _radian(self.units[places[3]])
            clips = steps[..., places].reshape(-1, steps.shape[-2], 6).numpy()
            moved = [np.concatenate(compose_motions(clip[:, :3], clip[:, 3:] / radian), axis=1) for clip in clips]
            poses = torch.from_numpy(np.stack(moved)) * torch.tensor([1.0] * 3 + [radian] * 3, dtype=torch.float64)
            led_to[..., places] = poses.view(*steps.shape[:-1], 6)
        return led_to.float()

    def denormalise(self, actions: torch.Tensor) -> torch.Tensor:
        """Inverse of `normalise`."""
        if actions.shape[-1] != self.width:
            raise ValueError(f"actions have {actions.shape[-1]} numbers, {self.width} are needed")
        if self.normalisation == "none":
            return actions
        return actions * torch.tensor(self.scale) + torch.tensor(self.offset)

    def with_statistics(self, actions, normalisation: str = "standard") -> "ActionSpec":
        """The same meaning with range and normalisation of data: actions [N, A] or a list of [T - 1, A].

        "standard": mean and deviation; "range": smallest to largest becomes -1 to 1; "quantile": the same from the 1st to
        the 99th percentile, which outliers do not stretch. Numbers that never change are not scaled.
        """
        rows = [np.asarray(part, dtype=np.float64) for part in (actions if isinstance(actions, list) else [actions])]
        for part in rows:
            replace(self, low=(), high=()).check(part)
        table = np.concatenate([part.reshape(-1, self.width) for part in rows])
        if not len(table):
            raise ValueError("no actions to take statistics of")
        if normalisation == "standard":
            offset, scale = table.mean(0), table.std(0)
        else:
            ends = (0.0, 1.0) if normalisation == "range" else (0.01, 0.99)
            low, high = np.quantile(table, ends, axis=0)
            offset, scale = (low + high) / 2, (high - low) / 2
        if normalisation == "none":
            offset, scale = (), ()
        else:
            scale = np.where(scale < _LEAST_SPREAD, 1.0, scale)
        return replace(
            self,
            normalisation=normalisation,
            offset=_floats(offset),
            scale=_floats(scale),
            low=_floats(table.min(0)),
            high=_floats(table.max(0)),
        )

    def with_accumulation(self, clips: list) -> "ActionSpec":
        """The same meaning, and the network is also given where the actions have led, scaled by what that is in the clips'
        actions, a list of [T - 1, A]."""
        square = torch.cat([self.accumulate(clip) for clip in clips]).square().mean(0)
        scale = square.sqrt().clamp(min=_LEAST_SPREAD)
        return replace(self, accumulated_scale=_floats(torch.where(scale > _LEAST_SPREAD, scale, 1.0)))

    def check_same(self, other: "ActionSpec"):
        """ValueError where data or a caller that follow `other` would not mean what this one means, naming each difference.

        Normalisation, range and accumulation may differ: a checkpoint applies its own.
        """
        names = ("embodiment", "names", "units", "frame", "kind", "rate", "gripper")
        different = [name for name in names if getattr(self, name) != getattr(other, name)]
        if different:
            details = "; ".join(f"{name} {_told(other, name)}, needed {_told(self, name)}" for name in different)
            raise ValueError(f"the actions do not mean what the model was trained on: {details}")

    def save(self, folder: str | Path) -> Path:
        """Write `action_spec.json` into a checkpoint's folder."""
        path = Path(folder) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2))
        return path

    @classmethod
    def load(cls, folder: str | Path) -> "ActionSpec":
        """Read what `save` wrote. FileNotFoundError where there is none, ValueError for unknown or missing fields."""
        path = Path(folder) / FILE_NAME
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: without it nobody knows what the model's actions mean")
        try:
            record = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        try:
            return cls.of(record)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def of(cls, record: "ActionSpec | dict | None") -> "ActionSpec | None":
        """A spec from its fields as `dataclasses.asdict` tells them. ValueError for unknown or missing ones."""
        if record is None or isinstance(record, cls):
            return record
        known = {field.name for field in fields(cls)}
        unknown = set(record) - known
        if unknown:
            raise ValueError(f"unknown fields {sorted(unknown)}; known are {sorted(known)}")
        record = dict(record)
        gripper = record.pop("gripper", None)
        try:
            return cls(**record, gripper=Gripper(**gripper) if gripper else None)
        except TypeError as error:
            raise ValueError(str(error)) from error


def group_actions(actions: torch.Tensor, temporal_compression: int) -> torch.Tensor:
    """Actions [..., T - 1, A] of pixel frames -> one vector per latent frame [..., T', temporal_compression * A].

    The vector of a latent frame holds, in their order, the actions that lead to its pixel frames; the first latent frame,
    which is the start, gets zeros. Raises ValueError where the frames do not fill whole groups.
    """
    steps, width = actions.shape[-2:]
    if steps % temporal_compression:
        raise ValueError(
            f"{steps} actions do not fill groups of {temporal_compression}: clips need 1 + k * that frames"
        )
    grouped = actions.unflatten(-2, (-1, temporal_compression)).flatten(-2)
    first = grouped.new_zeros(*grouped.shape[:-2], 1, temporal_compression * width)
    return torch.cat([first, grouped], dim=-2)


def _floats(values) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _radian(unit: str) -> float:
    """How many of a unit of angles a radian is."""
    name, _, factor = unit.partition(" x ")
    if name != "rad" or not (factor or "1").replace(".", "", 1).isdigit():
        raise ValueError(f"turns must be in 'rad' or 'rad x <number>' to be added up, the spec has {unit!r}")
    return float(factor or 1)


def _told(spec: ActionSpec, name: str) -> str:
    value = getattr(spec, name)
    return ", ".join(value) if isinstance(value, tuple) else repr(value)


_POSE = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
# The table-top world, and Bridge as the paper uses it (`robot_states.actions_from_states`).
BRIDGE = ActionSpec(
    names=_POSE,
    units=("m x 20",) * 3 + ("rad x 20",) * 3 + ("share open",),
    frame="end effector",
    kind="delta",
    rate=5.0,
    embodiment="arm with a two-finger gripper",
    gripper=Gripper("gripper", open=1.0, closed=0.0),
)
# The driving world.
DRIVING = ActionSpec(
    names=("steer", "speed"), units=("rad", "m/s"), frame="vehicle", kind="absolute", rate=5.0, embodiment="car"
)
