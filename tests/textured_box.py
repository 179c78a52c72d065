"""Pictures of a textured box, by casting rays: what every pixel sees is known."""

from functools import cache

import numpy as np

K = np.array([[220.0, 0, 160], [0, 220, 120], [0, 0, 1]])


@cache
def texture():
    from PIL import Image

    rng = np.random.default_rng(0)
    layers = [
        np.asarray(Image.fromarray(rng.random((n, n)).astype(np.float32)).resize((512, 512), 3)) for n in (24, 60, 128)
    ]
    total = sum(layers)
    return 255 * (total - total.min()) / np.ptp(total)


def picture(pose, height=240, width=320):
    """A box with walls at x = -2, 2, y = -1.5, 1.5 and z = 5, seen from inside, uint8 [H, W, 3]."""
    pose = pose.numpy()
    y, x = np.mgrid[0:height, 0:width] + 0.5
    rays = np.stack([x, y, np.ones_like(x)], -1) @ np.linalg.inv(K).T @ pose[:3, :3]
    eye = -pose[:3, :3].T @ pose[:3, 3]
    nearest, place = np.full((height, width), np.inf), np.zeros((height, width, 2))
    for number, (axis, wall) in enumerate([(0, -2), (0, 2), (1, -1.5), (1, 1.5), (2, 5)]):
        distance = (wall - eye[axis]) / np.where(np.abs(rays[..., axis]) < 1e-9, 1e-9, rays[..., axis])
        points = eye + distance[..., None] * rays
        closer = (distance > 0) & (distance < nearest)
        nearest[closer] = distance[closer]
        place[closer] = (np.delete(points, axis, axis=-1) * 60 + 97 * number)[closer]
    low = np.floor(place).astype(int)
    part = place - low
    value = 0
    for dy in (0, 1):
        for dx in (0, 1):
            weight = np.abs(1 - dy - part[..., 0]) * np.abs(1 - dx - part[..., 1])
            value = value + weight * texture()[(low[..., 0] + dy) % 512, (low[..., 1] + dx) % 512]
    return np.repeat(value[..., None], 3, axis=2).astype(np.uint8)
