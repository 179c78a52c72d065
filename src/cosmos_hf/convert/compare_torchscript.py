"""Does a converted tokenizer compute what the TorchScript module computes that it came from? This runs the file's program.

Equal names and shapes do not prove an equal network: a published file is known whose weights load without complaint into a
network that reconstructs differently.
"""

from pathlib import Path

import torch

from .published_tokenizer import Tokenizer
from .torchscript import is_torchscript

# Relative error (root mean square of the difference over the standard deviation of ours) that float32 arithmetic may make.
FLOAT32_TOLERANCE = 1e-3
# Where codes are rounded, rare values on an edge fall to the other side.
CODES_TOLERANCE = 0.05
# Theirs in a lower precision may be this many times as far from ours in float32 as ours in that precision is.
ROUNDING_FACTOR = 4


@torch.no_grad()
def compare_with_torchscript(model: Tokenizer, files: dict[str, Path], seed: int = 0) -> dict:
    """Encode and decode a random clip with both; relative errors by role, and the precision in which the file ran.

    Args:
        files: role ("encoder", "decoder", "autoencoder") -> TorchScript file. `torch.jit.load` runs the program in it: compare only
            files whose origin you trust.

    Raises ValueError where an output differs by more than rounding.
    """
    own = model.dtype
    model.float()
    try:
        return {role: _compare(model, role, path, seed) for role, path in files.items()}
    finally:
        if own != torch.float32:
            model.to(own)


def _compare(model: Tokenizer, role: str, path: Path, seed: int) -> dict:
    pixels = _random_pixels(model, seed)
    if role == "encoder":
        x, expected = pixels, model.encode(pixels).latents
    elif role == "autoencoder":
        x, expected = pixels, model(pixels).sample
    else:
        encoded = model.encode(pixels)
        x = encoded.latents if model.fsq is None else encoded.indices.int()
        expected = model.decode(encoded.latents).sample
    theirs, precision = _run(path, x, expected.shape, model if role == "encoder" else None)
    error, tolerance = _relative_error(theirs, expected), _tolerance(model, role, precision, x, expected)
    if not error <= tolerance:
        raise ValueError(
            f"{path} computes something else than the converted tokenizer: relative error {error:.3g} of the {role}'s output on "
            f"a random clip, rounding explains at most {tolerance:.3g}. The weights fit, the network does not: check the preset"
        )
    return dict(error=error, tolerance=tolerance, precision=str(precision).removeprefix("torch."))


def _random_pixels(model: Tokenizer, seed: int) -> torch.Tensor:
    side = 4 * model.config.spatial_compression
    frames = [1 + 2 * model.config.temporal_compression] if len(model.pixel_axes) == 3 else []
    shape = (1, model.config.in_channels, *frames, side, side)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def _run(
    path: Path, x: torch.Tensor, shape: torch.Size, encoder_of: Tokenizer | None
) -> tuple[torch.Tensor, torch.dtype]:
    """(the output of a TorchScript file in float32, the precision it was computed in): float32 if its program can."""
    if not is_torchscript(path):
        raise ValueError(f"{path} is no TorchScript file: there is no program in it to compare with")
    module = torch.jit.load(str(path), map_location="cpu").eval()
    own = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    try:
        try:
            output, precision = module.float()(x), torch.float32
        except RuntimeError:  # types may have been written into the program when it was traced
            if own == torch.float32:
                raise
            module = torch.jit.load(str(path), map_location="cpu").eval()
            output, precision = module(x.to(own) if x.is_floating_point() else x), own
    except RuntimeError as error:
        raise ValueError(f"{path} does not run on an input of {tuple(x.shape)}: {error}") from error
    return _pick(output, shape, encoder_of, path).float(), precision


def _pick(output, shape: torch.Size, encoder_of: Tokenizer | None, path: Path) -> torch.Tensor:
    """The tensor in question among all that the module returns; indices of a discrete encoder as codes."""
    tensors = list(_tensors(output))
    if encoder_of is not None and encoder_of.fsq is not None:
        for tensor in tensors:
            if not tensor.is_floating_point() and tensor.shape == (shape[0], *shape[2:]):
                return encoder_of.fsq.decode(tensor).movedim(-1, 1)
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.shape == shape:
            return tensor
    raise ValueError(f"{path} returns tensors of {[tuple(t.shape) for t in tensors]}, expected one of {tuple(shape)}")


def _tensors(output):
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from _tensors(item)


def _relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result - expected).square().mean().sqrt() / expected.std()).item()


def _tolerance(model: Tokenizer, role: str, precision: torch.dtype, x: torch.Tensor, expected: torch.Tensor) -> float:
    """What rounding explains: measured on our own network where the file ran in a lower precision."""
    tolerance = CODES_TOLERANCE if model.fsq is not None and role != "decoder" else FLOAT32_TOLERANCE
    if precision != torch.float32:
        model.to(precision)
        x = x.to(precision) if x.is_floating_point() else x
        if role == "encoder":
            rounded = model.encode(x).latents
        elif role == "decoder":
            rounded = (model.decode if x.is_floating_point() else model.decode_indices)(x).sample
        else:
            rounded = model(x).sample
        model.float()
        tolerance += ROUNDING_FACTOR * _relative_error(rounded.float(), expected)
    return tolerance
