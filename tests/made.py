"""Clips and pictures that tests write."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from fvdm_jax import video


def moving(frames: int, height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """A clip [t H W 3] of coarse noise that moves to the right."""
    coarse = np.random.default_rng(seed).integers(0, 255, (-(-height // 8), -(-width // 8), 3), np.uint8)
    picture = coarse.repeat(8, 0).repeat(8, 1)[:height, :width]
    return np.stack([np.roll(picture, 2 * i, 1) for i in range(frames)])


def clip(name: str, frames: int = 9, fps: float = 8, caption: str | None = "it moves", **options) -> Path:
    """Writes an mp4 to the folder `clips` and, unless it is None, its caption beside it."""
    path = Path("clips", name)
    video.write_mp4(path, moving(frames, **options), fps)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, "utf-8")
    return path


def pictures(folder: str, numbers) -> list[np.ndarray]:
    """Writes numbered pictures; gives their pixels."""
    os.makedirs(folder, exist_ok=True)
    drawn = moving(len(numbers), 32, 48)
    for number, pixels in zip(numbers, drawn, strict=True):
        Image.fromarray(pixels).save(f"{folder}/f{number}.png")
    return list(drawn)


def damage(path: Path, packet: int) -> None:
    """Writes zeros over a clip from one of its packets on, as far as the pictures go."""
    import av

    with av.open(str(path)) as container:
        places = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    content = bytearray(path.read_bytes())
    begin, end = places[packet][0], sum(places[-1])
    content[begin:end] = bytes(end - begin)
    path.write_bytes(content)
