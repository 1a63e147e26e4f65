"""What chips can do at most, and how they are joined: one table, with its sources.

TPUs: Google Cloud's page of each (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x); its interconnect
"bidirectional, a chip" is halved here and divided among the links; v4's links are those of Jouppi et al. 2023
(arXiv 2304.01433). GPUs: NVIDIA's data sheets of the SXM boards, without sparsity; DGX B200 for the B200.
"""

import math
import re
from typing import NamedTuple


class Chip(NamedTuple):
    """One kind of chip.

    `peak`: operations a second, dense bfloat16 · `memory`: bytes for programs · `bandwidth`: of that memory,
    bytes a second · `link`: bytes a second that one of its links sends one way · `axes`: of the torus of
    chips, two links on each; 0 where a switch joins all · `most`: chips of a slice · `closes`: chips along an
    axis, or a multiple of them, that make a ring · `unit`: width of its matrix unit, 0 where that costs
    attention nothing · `devices`: how many jax shows for it · `kinds`: what jax calls them.
    """

    peak: float
    memory: float
    bandwidth: float
    link: float
    axes: int
    most: int
    closes: int
    unit: int
    devices: int
    kinds: tuple[str, ...]


GIB = 2**30
HOST = 8
"""GPUs that a switch joins."""

NETWORK = 50e9
"""Bytes a second that a GPU sends to another host: a network card of 400 Gbit/s each."""


def _gpu(peak: float, memory: float, bandwidth: float, link: float, *kinds: str) -> Chip:
    return Chip(peak, memory, bandwidth, link, 0, 10**5, 0, 0, 1, kinds)


CHIPS = {
    "v4": Chip(275e12, 30.5 * GIB, 1200e9, 50e9, 3, 4096, 4, 128, 1, ("TPU v4",)),
    "v5e": Chip(197e12, 15.75 * GIB, 819e9, 50e9, 2, 256, 16, 128, 1, ("TPU v5 lite", "TPU v5e")),
    "v5p": Chip(459e12, 95.74 * GIB, 2765e9, 100e9, 3, 8960, 4, 128, 1, ("TPU v5", "TPU v5p")),
    "v6e": Chip(918e12, 31.25 * GIB, 1638e9, 100e9, 2, 256, 16, 256, 1, ("TPU v6 lite", "TPU v6e")),
    "v7x": Chip(2307e12, 189.5 * GIB, 7380e9, 100e9, 3, 9216, 4, 256, 2, ("TPU7x", "TPU v7", "TPU v7x")),
    "a100": _gpu(312e12, 80e9, 2039e9, 300e9, "A100"),
    "h100": _gpu(989e12, 80e9, 3350e9, 450e9, "H100"),
    "h200": _gpu(989e12, 141e9, 4800e9, 450e9, "H200"),
    "h20": _gpu(148e12, 96e9, 4000e9, 450e9, "H20"),
    "b200": _gpu(2250e12, 180e9, 8000e9, 900e9, "B200"),
    "gb200": _gpu(2500e12, 186e9, 8000e9, 900e9, "GB200"),
    "gb300": _gpu(2500e12, 288e9, 8000e9, 900e9, "GB300"),
    "4090": _gpu(165e12, 24e9, 1008e9, 32e9, "4090"),
    "5090": _gpu(209.5e12, 32e9, 1792e9, 64e9, "5090"),
}
"""By the name that a topology has. Of a TPU's memory (32, 16, 95, 32 and 192 GiB by Google's pages) libtpu
0.0.42 says how much a program can use."""


def named(kind: str) -> Chip | None:
    """The chip that a device is of, or is a part of, whose kind jax gives so; None where it is not known."""
    fitting = [
        (name, chip)
        for chip in CHIPS.values()
        for name in chip.kinds
        if re.search(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![0-9])", kind)
    ]
    return max(fitting, key=lambda found: len(found[0]))[1] if fitting else None


class Slice(NamedTuple):
    """Chips of one kind that are joined: `shape` is that of their torus, of GPUs their number."""

    name: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.name]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """How many jax shows."""
        return self.chips * self.chip.devices

    @property
    def gpu(self) -> bool:
        return self.chip.axes == 0

    def __str__(self) -> str:
        return (
            f"gpu:{self.name}x{self.chips}" if self.gpu else f"{self.name}:{'x'.join(map(str, self.shape))}"
        )


FORMS = "give v5p:4x4x4, v5e:4x4, v6e:16x16, v7x:2x2x1 or gpu:h100x8"


def parse(text: str) -> Slice:
    """The slice of a text as FORMS has them. Raises ValueError, which says what is wrong."""
    kind, _, rest = text.strip().lower().partition(":")
    if kind == "gpu":
        name, _, count = rest.rpartition("x")
        if name not in CHIPS or CHIPS[name].axes or not re.fullmatch(r"[1-9][0-9]{0,4}", count):
            names = ", ".join(name for name, chip in CHIPS.items() if not chip.axes)
            raise ValueError(f"{text!r} is no number of GPUs; give gpu:h100x8; known are {names}")
        return Slice(name, (int(count),))
    kind = {"tpu7x": "v7x", "v7": "v7x"}.get(kind, kind)
    if kind not in CHIPS or not CHIPS[kind].axes:
        names = ", ".join(name for name, chip in CHIPS.items() if chip.axes)
        raise ValueError(f"{text!r} names no TPU; {FORMS}; known are {names}")
    axes = CHIPS[kind].axes
    if not re.fullmatch(r"[1-9][0-9]{0,2}" + r"x[1-9][0-9]{0,2}" * (axes - 1), rest):
        raise ValueError(f"{text!r} has not the {axes} sides of a slice of {kind}; {FORMS}")
    found = Slice(kind, tuple(map(int, rest.split("x"))))
    if found.chips > CHIPS[kind].most:
        raise ValueError(
            f"{text!r} has {found.chips} chips, and a slice of {kind} at most {CHIPS[kind].most}"
        )
    return found
