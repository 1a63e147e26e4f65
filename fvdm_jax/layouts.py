"""How devices are laid out as data × fsdp × context × tensor: what is possible, and a table of what is best.

A clip's tokens are cut over context, each frame alike; clips over data and fsdp; parameters over fsdp,
context and tensor.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from fvdm_jax.costs import tokens
from fvdm_jax.models.dit import DiTConfig
from fvdm_jax.sharding import AXES


class Work(NamedTuple):
    """What has to be laid out: the network's heads and the tokens of one frame; clips of a step and the parts
    in which they are worked through."""

    heads: int
    tokens: int
    batch: int
    parts: int = 1


TABLE = {
    ("train", 5120, 4): {"context": 4},
    ("train", 5120, 8): {"context": 8},
    ("train", 5120, 16): {"fsdp": 2, "context": 8},
    ("train", 5120, 64): {"fsdp": 16, "context": 4},
    ("train", 5120, 256): {"fsdp": 32, "context": 8},
    ("sample", 5120, 4): {"fsdp": 2, "context": 2},
    ("sample", 5120, 8): {"fsdp": 2, "context": 4},
    ("sample", 5120, 16): {"fsdp": 2, "context": 8},
}
"""The recommended layout by task, width of the network and devices; axes that are not named are 1."""


def work(config: DiTConfig, clip: tuple[int, int, int], batch: int, parts: int = 1) -> Work:
    """That of a network and clips of (f, h, w) in latents."""
    return Work(config.heads, tokens(clip) // clip[0], batch, parts)


def problem(sizes: dict[str, int], work: Work) -> str:
    """Why this layout is not possible, in a few words; empty where it is."""
    clips, context, tensor = sizes["data"] * sizes["fsdp"], sizes["context"], sizes["tensor"]
    if work.batch % (clips * work.parts):
        return f"{work.batch} clips in {work.parts} parts do not divide among {clips} devices"
    if work.tokens % context:
        return f"the {work.tokens} tokens of a frame do not divide among {context} devices"
    if work.heads % tensor:
        return f"{work.heads} heads do not divide among {tensor} devices"
    return ""


def candidates(devices: int, work: Work) -> list[dict[str, int]]:
    """The layouts worth a try, the likeliest first.

    Attention by heads before a ring, which sends more; then as few devices to a clip as it may be, for
    parameters are best cut along two axes of the mesh; tensor only where nothing else is possible.
    """
    every = [sizes for sizes in _all(devices) if not problem(sizes, work)]
    plain = [sizes for sizes in every if sizes["tensor"] == 1] or every

    def order(sizes: dict[str, int]) -> tuple:
        ring = work.heads % (sizes["tensor"] * sizes["context"])
        return ring > 0, sizes["tensor"], sizes["data"], abs(math.log2(sizes["context"]) - 2)

    return sorted(plain, key=order)


def _all(devices: int) -> Iterator[dict[str, int]]:
    for context in _divisors(devices):
        for tensor in _divisors(devices // context):
            for fsdp in _divisors(devices // (context * tensor)):
                data = devices // (context * tensor * fsdp)
                yield {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def recommended(task: str, config: DiTConfig, clip: tuple[int, int, int], devices: int, batch: int) -> str:
    """The layout, as --mesh takes it, of TABLE, or else the likeliest of those that are possible.

    `task` is "train" or "sample"; the clip is (f, h, w) in latents, `batch` what the network sees at once.
    Where nothing divides all devices lie along data.
    """
    asked = work(config, clip, batch)
    row = whole(TABLE.get((task, config.width, devices), {}))
    if math.prod(row.values()) == devices and not problem(row, asked):
        return text(row)
    found = candidates(devices, asked)
    return text(found[0]) if found else f"data={devices}"


def whole(sizes: dict[str, int]) -> dict[str, int]:
    """The sizes along all axes, 1 where none is named."""
    return {name: sizes.get(name, 1) for name in AXES}


def text(sizes: dict[str, int]) -> str:
    """The layout as --mesh takes it."""
    return ",".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "data=1"
