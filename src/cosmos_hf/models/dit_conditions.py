"""Conditions of the diffusion transformer besides text (arXiv 2501.03575, sections 5.1.3, 6.1 to 6.3, and 5.2 for tokens).

They enter by three doors: as channels beside the latents (given frames, camera rays, tokens, views), through the noise level's
embedding (actions), or as a time axis that holds several views. Text, which every model reads, may be read more closely
(`TextRefiner`). All are off in a plain config.

Axes: B batch, V views, C channels, T latent frames (of all views, view slowest), H and W latent height and width,
M text tokens of a view, D width.
"""

import copy
import inspect
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

CAMERA_CHANNELS = 6  # a Plücker ray: moment and direction
ACTION_FORMS = ("intended", "as_written")


class ViewEmbedding(nn.Module):
    """One learned vector per view, as constant channels; where the model has it, plus a linear map of how often a frame repeats."""

    def __init__(self, num_views: int, channels: int, frame_repeat: bool):
        super().__init__()
        self.views = nn.Embedding(num_views, channels)
        self.frame_repeat = nn.Linear(1, channels) if frame_repeat else None

    def forward(self, views: tuple[int, ...], frame_repeat: torch.Tensor | None) -> torch.Tensor:
        """These views, [1, V, C]; with `frame_repeat` [B, V] it is [B, V, C]."""
        vectors = self.views.weight[None, list(views)]
        if self.frame_repeat is not None:
            if frame_repeat is None:
                frame_repeat = vectors.new_zeros(1, len(views))
            vectors = vectors + self.frame_repeat(frame_repeat.to(vectors)[..., None])
        return vectors


class _AddedPart(nn.Module):
    """Adds to what a model has; its last layer starts at zero, so that the model which gets it is the model it was."""

    last_layer: str

    def start_at_zero(self):
        for parameter in getattr(self, self.last_layer).parameters():
            nn.init.zeros_(parameter)


class _ActionMLP(_AddedPart):
    last_layer = "linear_2"

    def __init__(self, action_dim: int, inner_size: int, out_size: int):
        super().__init__()
        self.linear_1 = nn.Linear(action_dim, inner_size)
        self.linear_2 = nn.Linear(inner_size, out_size)
        self.start_at_zero()

    def forward(self, actions: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.gelu(self.linear_1(actions), approximate="tanh"))


class ActionEmbedding(nn.Module):
    """Actions [B, F, action_dim] -> what is added to the noise level's sinusoid [B, F, D] and to the blocks' offsets [B, F, 3D].

    In the published training code the first of the two is computed but never used; the form "as_written" does the same, which
    a checkpoint of that code needs, and "intended" adds it.
    """

    def __init__(self, action_dim: int, hidden_size: int, form: str, inner_size: int | None = None):
        super().__init__()
        self.form = form
        inner_size = inner_size or 4 * hidden_size
        self.sinusoid = _ActionMLP(action_dim, inner_size, hidden_size)
        self.offsets = _ActionMLP(action_dim, inner_size, 3 * hidden_size)

    def forward(self, actions: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        return self.sinusoid(actions) if self.form == "intended" else None, self.offsets(actions)


class TextRefiner(_AddedPart):
    """Reads what the frozen text encoder wrote once more and adds what it finds: [B, M, D] -> [B, M, D], D the text's width.

    Not of the paper, whose encoder is T5-11B: it learns with the world model what a small encoder does not tell, such as which of
    the named things is to be moved. Vectors that are zero, past a text's end, stay zero and are not attended.
    """

    HEAD_DIM = 32
    last_layer = "proj_out"

    def __init__(self, width: int, num_layers: int):
        super().__init__()
        heads = max(1, width // self.HEAD_DIM)
        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(width, heads, self.HEAD_DIM, activation_fn="gelu-approximate", attention_bias=True)
            for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(width)
        self.proj_out = nn.Linear(width, width)
        self.start_at_zero()

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        told = text.any(dim=-1, keepdim=True)  # [B, M, 1]
        # finite, so that a text without words has a softmax too
        bias = torch.zeros_like(text[..., 0]).masked_fill(~told[..., 0], -1e4)[:, None]  # [B, 1, M]
        places = torch.arange(text.shape[1], device=text.device)
        x = self.norm_in(text) + get_timestep_embedding(places, text.shape[-1]).to(text)
        for block in self.blocks:
            x = block(x, attention_mask=bias)
        return text + self.proj_out(self.norm_out(x)).to(text) * told


def check_condition_config(config):
    """Refuse a config whose conditions contradict each other or the channels of the input."""
    extra = config.in_channels - config.out_channels - config.camera_channels - config.condition_channels
    if extra not in (0, 1) or min(config.camera_channels, config.condition_channels) < 0:
        raise ValueError(
            f"in_channels must be out_channels + camera_channels + condition_channels, or one more for the condition mask; "
            f"got in_channels={config.in_channels}, out_channels={config.out_channels}, "
            f"camera_channels={config.camera_channels}, condition_channels={config.condition_channels}"
        )
    if config.condition_vocab_size is not None and not config.condition_channels:
        raise ValueError("condition_vocab_size needs condition_channels, the width of a token's embedding")
    if config.num_views < 1:
        raise ValueError(f"num_views must be at least 1, got {config.num_views}")
    if config.frame_repeat_embed and not config.view_embed_dim:
        raise ValueError("frame_repeat_embed needs view_embed_dim: it is added to the views' vectors")
    if config.action_dim is not None and config.action_dim < 1:
        raise ValueError(f"action_dim must be None (no actions) or at least 1, got {config.action_dim}")
    if config.action_hidden_dim is not None and config.action_hidden_dim < 1:
        raise ValueError(
            f"action_hidden_dim must be None (4 times the width) or at least 1, got {config.action_hidden_dim}"
        )
    if config.text_refiner_layers < 0:
        raise ValueError(f"text_refiner_layers must be 0 (none) or more, got {config.text_refiner_layers}")
    if config.action_form not in ACTION_FORMS:
        raise ValueError(f"action_form must be one of {', '.join(ACTION_FORMS)}, got {config.action_form!r}")


# ---- channels beside the latents -----------------------------------------------------------------------------------


def with_condition_channels(
    model,
    latents: torch.Tensor,
    views: tuple[int, ...],
    condition_mask,
    camera,
    condition,
    padding_mask,
    frame_repeat,
) -> torch.Tensor:
    """Latents with the channels of the model's conditions behind them, in the order of the parameters.

    Raises ValueError for a condition that the model lacks, cannot use, or that has a wrong shape.
    """
    config, (batch, _, frames, height, width) = model.config, latents.shape
    batches, grid = (batch, 1), ((frames,), (height,), (width,))
    channels = [latents]
    if wanted("condition_mask", condition_mask, model.takes_condition_mask, MASK_HELP):
        check_shape("condition_mask", condition_mask, (batches, (1,), *grid))
        channels.append(condition_mask)
    if wanted("camera", camera, config.camera_channels > 0, "camera_channels: the rays [B, 6, T, H, W]"):
        check_shape("camera", camera, (batches, (config.camera_channels,), *grid))
        channels.append(camera)
    if wanted("condition", condition, config.condition_channels > 0, CONDITION_HELP):
        channels.append(_condition_channels(model, condition, batches, grid))
    if config.concat_padding_mask:
        if padding_mask is None:
            padding_mask = latents.new_zeros(1, 1, height, width)
        check_shape("padding_mask", padding_mask, (batches, (1,), None, None))
        # nearest takes source index floor(i * height_in / height)
        padding_mask = F.interpolate(padding_mask.to(latents), size=(height, width), mode="nearest")
        channels.append(padding_mask.unsqueeze(2).expand(-1, -1, frames, -1, -1))
    elif padding_mask is not None:
        raise ValueError("this model takes no padding_mask: concat_padding_mask is off in its config")
    if frame_repeat is not None:
        wanted("frame_repeat", frame_repeat, config.frame_repeat_embed, "")
        check_shape("frame_repeat", frame_repeat, (batches, (len(views),)))
    if model.view_embed is not None:
        vectors = model.view_embed(views, frame_repeat).to(latents)  # [1 or B, V, C]
        vectors = vectors.repeat_interleave(frames // len(views), dim=1).transpose(1, 2)  # [1 or B, C, T]
        channels.append(vectors[..., None, None].expand(-1, -1, -1, height, width))
    if len(channels) == 1:
        return latents
    return torch.cat([channel.to(latents).expand(batch, -1, -1, -1, -1) for channel in channels], dim=1)


MASK_HELP = (
    "in_channels (video-to-world): [B, 1, T, H, W], 1 on the conditioning frames, all 0 for none; "
    "a text-to-world model has no such channel"
)
CONDITION_HELP = (
    "condition_channels: [B, condition_channels, T, H, W], or with condition_vocab_size token ids [B, 1, T, H', W'] "
    "(all ids 0: unconditional)"
)


def _condition_channels(model, condition: torch.Tensor, batches, grid) -> torch.Tensor:
    """Real channels as they are, or token ids [B, 1, T, H', W'] embedded and resized bilinearly, frame by frame."""
    config = model.config
    if config.condition_vocab_size is None:
        check_shape("condition", condition, (batches, (config.condition_channels,), *grid))
        return condition
    check_shape("condition", condition, (batches, (1,), grid[0], None, None))
    if condition.is_floating_point():
        raise ValueError(f"condition must be integer token ids, got {condition.dtype}")
    # values cannot be looked at while compiling, or where a memory estimate has none
    known = not torch.compiler.is_compiling() and not isinstance(condition, FakeTensor)
    if known and not 0 <= condition.min() <= condition.max() < config.condition_vocab_size:
        raise ValueError(
            f"condition has token ids {condition.min().item()}..{condition.max().item()}, "
            f"the model knows 0..{config.condition_vocab_size - 1} (condition_vocab_size)"
        )
    embedded = model.condition_embed(condition[:, 0].long())  # [B, T, H', W', C]
    frames = embedded.flatten(0, 1).permute(0, 3, 1, 2)  # [B * T, C, H', W']
    frames = F.interpolate(frames, size=(grid[1][0], grid[2][0]), mode="bilinear", align_corners=False)
    return frames.unflatten(0, embedded.shape[:2]).transpose(1, 2)  # [B, C, T, H, W]


# ---- checks --------------------------------------------------------------------------------------------------------


def wanted(name: str, given, needed: bool, description: str) -> bool:
    """Whether the model has a use for a condition; ValueError where it is missing, or given without a use for it."""
    if needed and given is None:
        raise ValueError(f"{name} is missing: this model was made for it by {description}")
    if not needed and given is not None:
        raise ValueError(f"this model takes no {name}: its config has no place for it")
    return needed


def check_actions(config, actions: torch.Tensor | None, batch: int, frames: int):
    """Actions are [B, 1, action_dim] (one for the clip) or [B, T, action_dim] (one per latent frame)."""
    if wanted("actions", actions, config.action_dim is not None, "action_dim: [B, 1 or T, action_dim]"):
        one = (1,) if config.action_form == "as_written" or config.patch_size[0] > 1 else (1, frames)
        check_shape("actions", actions, ((batch, 1), one, (config.action_dim,)))


def check_shape(name: str, tensor: torch.Tensor, allowed: tuple):
    """`allowed` has, per axis, the legal sizes or None for any."""
    fits = tensor.ndim == len(allowed) and all(
        sizes is None or size in sizes for size, sizes in zip(tensor.shape, allowed, strict=True)
    )
    if not fits:
        wanted_sizes = ["any" if s is None else " or ".join(map(str, dict.fromkeys(s))) for s in allowed]
        raise ValueError(f"{name} must be [{', '.join(wanted_sizes)}], got {tuple(tensor.shape)}")


# ---- a base model with further conditions --------------------------------------------------------------------------

HOW_ACTIONS_ENTER = ("action_form", "action_hidden_dim")  # of no effect without action_dim
ADDABLE = (
    "camera_channels",
    "condition_channels",
    "condition_vocab_size",
    "num_views",
    "view_embed_dim",
    "frame_repeat_embed",
    "action_dim",
    "text_refiner_layers",
    *HOW_ACTIONS_ENTER,
)
PARTS = ("condition_embed", "view_embed", "action_embed", "text_refiner")


def condition_parts(config, hidden_size: int) -> dict[str, nn.Module | None]:
    """The modules that a config's conditions need, by their names in the transformer; None for those that it does not."""
    parts = dict.fromkeys(PARTS)
    if config.condition_vocab_size is not None:
        parts["condition_embed"] = nn.Embedding(config.condition_vocab_size, config.condition_channels)
    if config.view_embed_dim:
        parts["view_embed"] = ViewEmbedding(config.num_views, config.view_embed_dim, config.frame_repeat_embed)
    if config.action_dim is not None:
        how = config.action_form, config.action_hidden_dim
        parts["action_embed"] = ActionEmbedding(config.action_dim, hidden_size, *how)
    if config.text_refiner_layers:
        parts["text_refiner"] = TextRefiner(config.text_embed_dim, config.text_refiner_layers)
    return parts


def add_conditions(base, **changes):
    """A model with the weights of `base` and the conditions that `changes` adds to its config; at first it computes the same.

    `in_channels` follows from the channels that are added, and `condition_mask=True` adds the channel of given frames. The new
    columns of the first layer and the last layers of new MLPs are zero, so the output equals the base's for whatever the new
    conditions are: to the bit where the layers' matrix products have the same rows as before, and within rounding where actions
    differ from frame to frame. Several views are the base's output only for one view (`num_views=1` in the call).

    Raises ValueError for a change that is no condition, or that would take one away.
    """
    model = copy.deepcopy(base)
    extend_conditions(model, **changes)
    return model


def extend_conditions(model, **changes):
    """`add_conditions` in place: the model's other weights stay the tensors that they are."""
    add_mask = changes.pop("condition_mask", False)
    if unknown := sorted(changes.keys() - set(ADDABLE)):
        raise ValueError(
            f"{', '.join(unknown)} cannot be added to a model; conditions are condition_mask, {', '.join(ADDABLE)}"
        )
    if add_mask and model.takes_condition_mask:
        raise ValueError("this model takes a condition_mask already")
    for name, value in changes.items():
        old = model.config[name]
        if name not in HOW_ACTIONS_ENTER and old not in (None, 0, 1, False) and value != old:
            raise ValueError(f"{name} is {old} in this model and cannot become {value}")
    _change_conditions(model, changes, int(add_mask))


def withdraw_conditions(model, **changes):
    """Undo `extend_conditions` with these changes, in place: the new columns and modules go, all else stays as it is."""
    fields = inspect.signature(type(model).__init__).parameters
    _change_conditions(model, {name: fields[name].default for name in changes}, 0)


def _change_conditions(model, values: dict, added_mask: int):
    """Give the config's condition fields new values, and the first layer and the parts of conditions what follows."""
    old, new = model.config, {**model.config, **values}
    added = sum(new[name] - old[name] for name in ("camera_channels", "condition_channels"))
    values = {**values, "in_channels": old["in_channels"] + added + added_mask}
    check_condition_config(SimpleNamespace(**{**old, **values}))
    before = _channel_groups(old)
    model.register_to_config(**values)
    first = model.patch_embed.proj
    weight = _spread_columns(first.weight.detach(), before, _channel_groups(model.config))
    proj = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    proj.weight = nn.Parameter(weight, requires_grad=first.weight.requires_grad)
    model.patch_embed.proj = proj
    for name, part in condition_parts(model.config, len(weight)).items():
        present = getattr(model, name)
        if (part is None) != (present is None):
            setattr(model, name, part if part is None else _started(part).to(weight.device, weight.dtype))
    model.train(model.training)


@torch.no_grad()
def _started(part: nn.Module) -> nn.Module:
    """First weights as a new model has them."""
    for module in part.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    start_at_zero(part)
    return part


def start_at_zero(module: nn.Module):
    """Of all parts within that add to what a model has: they add nothing yet."""
    for part in module.modules():
        if isinstance(part, _AddedPart):
            part.start_at_zero()


def channel_columns(config, patch_size: tuple[int, int, int]) -> dict[str, slice]:
    """The first layer's columns by what they read."""
    volume, start, columns = math.prod(patch_size), 0, {}
    for name, count in _channel_groups(config).items():
        columns[name] = slice(start, start + count * volume)
        start += count * volume
    return columns


def _channel_groups(config) -> dict[str, int]:
    """Channels of the first layer by what they hold, in order."""
    mask = config.in_channels - config.out_channels - config.camera_channels - config.condition_channels
    return dict(
        latents=config.out_channels,
        condition_mask=mask,
        camera=config.camera_channels,
        condition=config.condition_channels,
        padding_mask=int(config.concat_padding_mask),
        views=config.view_embed_dim,
    )


def _spread_columns(weight: torch.Tensor, old: dict[str, int], new: dict[str, int]) -> torch.Tensor:
    """The first layer's weight [D, channels * patch volume] with zero columns where `new` has channels that `old` lacks, and
    without the columns of channels that `new` lacks."""
    volume = weight.shape[1] // sum(old.values())
    parts = weight.split([count * volume for count in old.values()], dim=1)
    columns = [
        part if old[name] == new[name] else weight.new_zeros(len(weight), new[name] * volume)
        for name, part in zip(old, parts, strict=True)
    ]
    return torch.cat(columns, dim=1)
