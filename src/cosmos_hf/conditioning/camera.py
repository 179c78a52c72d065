"""Cameras as a condition (arXiv 2501.03575, section 6.1): poses, intrinsics and the Plücker rays that the network is given.

One convention, into which every input is brought (docs/camera.md has the picture):
    extrinsics [4, 4]  world to camera: X_camera = E X_world. The camera's axes are x right, y down, z forward (OpenCV).
    intrinsics [3, 3]  in pixels, from the picture's edge: the first pixel's centre is at (0.5, 0.5).
    a pixel            (u, v, 1) z = K X_camera, z > 0 in front of the camera.

Axes: T frames, T' latent frames, H and W the picture's, H' and W' the latents' height and width.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

ROTATION_TOLERANCE = 1e-3  # of R R^T against the identity: text files carry few digits


@dataclass(frozen=True)
class CameraPath:
    """The camera of every frame of a clip.

    Attributes:
        intrinsics: [T, 3, 3]; [3, 3] is repeated.
        extrinsics: [T, 4, 4]; [T, 3, 4] gets its last row.
        height, width: of the pictures that the intrinsics are for.
        names: of the frames, where they came from files.

    Tensors are float64 on the processor. Raises ValueError for shapes, rotations or focal lengths that cannot be a camera's.
    """

    intrinsics: torch.Tensor
    extrinsics: torch.Tensor
    height: int
    width: int
    names: tuple[str, ...] = ()

    def __post_init__(self):
        extrinsics = check_extrinsics(self.extrinsics)
        if extrinsics.ndim != 3:
            raise ValueError(f"extrinsics must be [T, 4, 4], one per frame, got {tuple(extrinsics.shape)}")
        frames = len(extrinsics)
        intrinsics = check_intrinsics(self.intrinsics)
        if intrinsics.shape not in ((3, 3), (frames, 3, 3)):
            raise ValueError(
                f"intrinsics must be [3, 3] or one per frame [{frames}, 3, 3], got {tuple(intrinsics.shape)}"
            )
        if self.height < 1 or self.width < 1:
            raise ValueError(f"height and width must be positive, got {self.height} and {self.width}")
        if self.names and len(self.names) != frames:
            raise ValueError(f"{len(self.names)} names for {frames} frames")
        object.__setattr__(self, "extrinsics", extrinsics)
        object.__setattr__(self, "intrinsics", intrinsics.expand(frames, 3, 3).clone())

    def __len__(self) -> int:
        return len(self.extrinsics)

    @property
    def centres(self) -> torch.Tensor:
        """Where the cameras stand, in the world [T, 3]."""
        return camera_centres(self.extrinsics)

    def fit(self, height: int, width: int) -> "CameraPath":
        """The cameras of pictures that were resized to cover height x width and cut in the centre, as `data.video` does."""
        intrinsics = fit_intrinsics(self.intrinsics, (self.height, self.width), (height, width))
        return replace(self, intrinsics=intrinsics, height=height, width=width)

    def crop(self, top: int, left: int, height: int, width: int) -> "CameraPath":
        """The cameras of pictures cut to rows top... and columns left..."""
        return replace(self, intrinsics=crop_intrinsics(self.intrinsics, top, left), height=height, width=width)

    def window(self, start: int, num_frames: int, step: int = 1) -> "CameraPath":
        """Every `step`-th frame from `start` on. Raises ValueError where there are too few."""
        index = range(start, start + num_frames * step, step)
        if start < 0 or num_frames < 1 or step < 1 or index[-1] >= len(self):
            raise ValueError(f"frames {start} to {index[-1] if index else start} are wanted of {len(self)} cameras")
        names = tuple(self.names[i] for i in index) if self.names else ()
        chosen = torch.tensor(index)
        return replace(self, intrinsics=self.intrinsics[chosen], extrinsics=self.extrinsics[chosen], names=names)

    def relative(self) -> "CameraPath":
        """The same path in the coordinates of its first camera."""
        return replace(self, extrinsics=relative_extrinsics(self.extrinsics))

    def scaled(self, factor: float) -> "CameraPath":
        """The same path in a world that is `factor` times as large: reconstructions from pictures have no metres."""
        if not factor > 0:
            raise ValueError(f"a world's scale must be positive, got {factor}")
        extrinsics = self.extrinsics.clone()
        extrinsics[:, :3, 3] *= factor
        return replace(self, extrinsics=extrinsics)

    def extent(self) -> float:
        """The largest distance of a camera from the first; `path.scaled(1 / path.extent())` makes it 1."""
        return float((self.centres - self.centres[0]).norm(dim=-1).max())

    def project(self, points) -> tuple[torch.Tensor, torch.Tensor]:
        """World points [N, 3] -> pixels [T, N, 2] and depths [T, N]; a depth <= 0 is behind the camera."""
        points = _as_tensor(points, "points")
        seen = points @ self.extrinsics[:, :3, :3].mT + self.extrinsics[:, None, :3, 3]
        pixels = seen @ self.intrinsics.mT
        return pixels[..., :2] / pixels[..., 2:], seen[..., 2]


def check_extrinsics(extrinsics) -> torch.Tensor:
    """[..., 4, 4] or [..., 3, 4] -> float64 [..., 4, 4], or ValueError for what is no rigid motion."""
    value = _as_tensor(extrinsics, "extrinsics")
    if value.shape[-2:] == (3, 4):
        last = torch.tensor([0.0, 0, 0, 1], dtype=torch.float64).expand(*value.shape[:-2], 1, 4)
        value = torch.cat([value, last], dim=-2)
    if value.shape[-2:] != (4, 4):
        raise ValueError(f"extrinsics must be [..., 4, 4] or [..., 3, 4], got {tuple(value.shape)}")
    rotation = value[..., :3, :3]
    off = (rotation @ rotation.mT - torch.eye(3, dtype=torch.float64)).abs().amax()
    if off > ROTATION_TOLERANCE:
        transposed = value[..., 3, :3].abs().max() > 0 and value[..., :3, 3].abs().max() == 0
        hint = "; they look transposed" if transposed else "; a scale within the matrix must be taken out"
        raise ValueError(f"extrinsics hold no rotation: R R^T is off the identity by {off:.2g}{hint}")
    if (torch.linalg.det(rotation) < 0).any():
        raise ValueError("extrinsics hold a mirror, not a rotation (determinant -1): an axis was flipped alone")
    if (value[..., 3, :] != torch.tensor([0.0, 0, 0, 1], dtype=torch.float64)).any():
        raise ValueError("the last row of extrinsics must be 0 0 0 1; are they transposed?")
    return value


def check_intrinsics(intrinsics) -> torch.Tensor:
    """[..., 3, 3] -> float64, or ValueError for what is no pinhole camera in pixels."""
    value = _as_tensor(intrinsics, "intrinsics")
    if value.shape[-2:] != (3, 3):
        raise ValueError(f"intrinsics must be [..., 3, 3], got {tuple(value.shape)}")
    focal = torch.stack([value[..., 0, 0], value[..., 1, 1]])
    if (focal <= 0).any():
        raise ValueError(f"focal lengths must be positive, got {focal.min():g}: OpenGL's signs are not used here")
    if (focal < 4).any():
        raise ValueError(
            f"a focal length of {focal.min():g} pixels: intrinsics relative to the picture's size must be multiplied by "
            "its width and height"
        )
    if (value[..., 1, 0] != 0).any() or (value[..., 2, :] != torch.tensor([0.0, 0, 1], dtype=torch.float64)).any():
        raise ValueError("intrinsics must be [[fx, s, cx], [0, fy, cy], [0, 0, 1]]; are they transposed?")
    return value


def camera_centres(extrinsics: torch.Tensor) -> torch.Tensor:
    """World to camera [..., 4, 4] -> the cameras' places in the world [..., 3]."""
    return -(extrinsics[..., :3, :3].mT @ extrinsics[..., :3, 3:])[..., 0]


def invert_pose(pose: torch.Tensor) -> torch.Tensor:
    """World to camera <-> camera to world [..., 4, 4], without the rounding of a general inverse."""
    result = torch.zeros_like(pose)
    result[..., :3, :3] = pose[..., :3, :3].mT
    result[..., :3, 3] = camera_centres(pose)
    result[..., 3, 3] = 1
    return result


def relative_extrinsics(extrinsics: torch.Tensor, reference: torch.Tensor | None = None) -> torch.Tensor:
    """[..., T, 4, 4] with the world replaced by the frame of the first camera, or of the camera `reference` [..., 4, 4]."""
    reference = extrinsics[..., 0, :, :] if reference is None else reference
    return extrinsics @ invert_pose(reference)[..., None, :, :]


def fit_intrinsics(intrinsics: torch.Tensor, size: tuple[int, int], new_size: tuple[int, int]) -> torch.Tensor:
    """Intrinsics [..., 3, 3] of pictures of `size` (height, width) after resizing to cover `new_size` and a central cut."""
    scale = max(new_size[0] / size[0], new_size[1] / size[1])
    top, left = (scale * old - new for old, new in zip(size, new_size, strict=True))
    return crop_intrinsics(intrinsics, top / 2, left / 2, scale)


def crop_intrinsics(intrinsics: torch.Tensor, top: float, left: float, scale: float = 1.0) -> torch.Tensor:
    """Intrinsics [..., 3, 3] of a picture that was enlarged by `scale` and then cut at (top, left)."""
    intrinsics = intrinsics.clone()
    intrinsics[..., :2, :] *= scale
    intrinsics[..., 0, 2] -= left
    intrinsics[..., 1, 2] -= top
    return intrinsics


def representative_frames(num_frames: int, temporal_compression: int) -> list[int]:
    """The pixel frame whose camera stands for each latent frame: the first, then the middle one of each group.

    At a compression of 8 that is the 4th of each group of 8 (section 6.1), at 4 the 2nd of 4, at 1 each frame itself.
    """
    if num_frames < 1 or (num_frames - 1) % temporal_compression:
        raise ValueError(f"num_frames must be 1 + k * {temporal_compression}, got {num_frames}")
    middle = (temporal_compression + 1) // 2
    return [0, *range(middle, num_frames, temporal_compression)]


def plucker_rays(
    intrinsics: torch.Tensor,
    extrinsics: torch.Tensor,
    height: int,
    width: int,
    spatial_compression: int = 8,
    temporal_compression: int = 8,
    reference: torch.Tensor | None = None,
) -> torch.Tensor:
    """The rays through the centres of all latent pixels, (o x d, d), in the coordinates of the first frame's camera.

    Args:
        intrinsics: [..., 3, 3] or per frame [..., T, 3, 3], for pictures of height x width.
        extrinsics: [..., T, 4, 4]; leading axes are batch or views.
        height, width: of the pictures, multiples of `spatial_compression`.
        reference: camera [..., 4, 4] to be relative to in place of the first; one for all views keeps them in one world.

    Returns float32 [..., 6, T', H', W']: the moment o x d, with o the camera's centre, then the unit direction d.
    """
    intrinsics, extrinsics = check_intrinsics(intrinsics), check_extrinsics(extrinsics)
    if height % spatial_compression or width % spatial_compression:
        raise ValueError(f"height and width must be multiples of {spatial_compression}, got {height} and {width}")
    if extrinsics.ndim < 3:
        raise ValueError(f"extrinsics must be [..., T, 4, 4], got {tuple(extrinsics.shape)}")
    frames = representative_frames(extrinsics.shape[-3], temporal_compression)
    if intrinsics.ndim == extrinsics.ndim - 1:
        intrinsics = intrinsics[..., None, :, :]
    if intrinsics.shape[-3] not in (1, extrinsics.shape[-3]) or intrinsics.ndim != extrinsics.ndim:
        raise ValueError(f"intrinsics {tuple(intrinsics.shape)} do not fit extrinsics {tuple(extrinsics.shape)}")
    intrinsics = intrinsics if intrinsics.shape[-3] == 1 else intrinsics[..., frames, :, :]
    reference = None if reference is None else check_extrinsics(reference)
    to_world = invert_pose(relative_extrinsics(extrinsics, reference)[..., frames, :, :])  # [..., T', 4, 4]

    y, x = (
        (torch.arange(n // spatial_compression, dtype=torch.float64) + 0.5) * spatial_compression
        for n in (height, width)
    )
    pixels = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)  # [H' W', 2]
    pixels = torch.cat([pixels, torch.ones(len(pixels), 1, dtype=torch.float64)], dim=1)
    directions = to_world[..., :3, :3] @ torch.linalg.inv(intrinsics) @ pixels.mT  # [..., T', 3, H' W']
    directions = directions / directions.norm(dim=-2, keepdim=True)
    moments = torch.linalg.cross(to_world[..., :3, 3:].expand_as(directions), directions, dim=-2)
    rays = torch.cat([moments, directions], dim=-2).transpose(-3, -2)  # [..., 6, T', H' W']
    return rays.unflatten(-1, (len(y), len(x))).float()


def move_rays(rays: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Rays [B, 6, ...] as the camera `reference` [B, 4, 4] has them, whose pose is told in the coordinates that they are in."""
    turn = reference[:, :3, :3].to(rays)
    offset = reference[:, :3, 3].to(rays).view(-1, 3, *[1] * (rays.ndim - 2)).expand_as(rays[:, :3])
    moments, directions = (torch.einsum("bij,bj...->bi...", turn, part) for part in rays.chunk(2, dim=1))
    return torch.cat([moments + torch.linalg.cross(offset, directions, dim=1), directions], dim=1)


def _as_tensor(value, name: str) -> torch.Tensor:
    tensor = torch.as_tensor(np.asarray(value) if not isinstance(value, torch.Tensor) else value).to(
        "cpu", torch.float64
    )
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} hold NaN or infinity")
    return tensor
