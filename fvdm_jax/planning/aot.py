"""Programs compiled for chips that are not there, and what their compiler says of them."""

import contextlib
import math
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from fvdm_jax.chips import Slice
from fvdm_jax.planning import collectives, hlo

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}
"""So that libtpu looks for no TPU, may be loaded several times, and does not complain of what it misses."""


def prepare() -> None:
    """Sets ENVIRONMENT; to be called before jax is imported."""
    os.environ.update(ENVIRONMENT)


def devices(of: Slice) -> list:
    """The devices of a slice of TPUs. Raises ValueError, in libtpu's words, where there is no such slice."""
    import jax
    from jax.experimental import topologies

    name = {"v7x": "tpu7x"}.get(of.name, of.name)
    # A host has 2x2 chips, and of less than a host libtpu has to be told.
    part = {"chips_per_host_bounds": (*of.shape, 1)[:3]} if of.chips < 4 else {}
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{name}:{'x'.join(map(str, of.shape))}", **part
        ).devices
    except jax.errors.JaxRuntimeError as wrong:
        raise ValueError(str(wrong)) from wrong
    if len(found) != of.devices:
        raise ValueError(f"libtpu shows {len(found)} devices for {of}, and a real slice has {of.devices}")
    return list(found)


class Bytes(NamedTuple):
    """What a program takes of a device's memory; `host` is what waits in its host's.

    `peak`: the most that is alive at once. The compiler sets more aside: `reserved`, by which it also decides
    whether a program fits, counts gaps between arrays of which the temporaries are full where there is room.
    """

    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    peak: int
    host: int

    @property
    def reserved(self) -> int:
        """All that is set aside: what comes in, what goes out elsewhere, and what is between."""
        return self.arguments + self.outputs - self.aliased + self.temporaries


class Compiled(NamedTuple):
    """A program, by its compiler: of one device, and one run of it.

    `products` and `moved` are counted from its text, `kernels` how often its own kernels run, of which the
    text has no operations; `uncounted` how many loops were taken to turn once.
    """

    bytes: Bytes
    products: hlo.Products
    moved: float
    collectives: list[collectives.Collective]
    kernels: int
    uncounted: int


class TooLarge(Exception):
    """The compiler found no way to fit a program in a device's memory: `needed` and `there`, in bytes."""

    def __init__(self, needed: float, there: float):
        super().__init__(needed, there)
        self.needed, self.there = needed, there


@contextlib.contextmanager
def fitting() -> Iterator[None]:
    """Around what compiles: a compiler that finds too little memory raises TooLarge."""
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as wrong:
        if large := _too_large(str(wrong)):
            raise large from wrong
        raise


def read(program) -> Compiled:
    """What is to be known of a `jax.stages.Compiled`."""
    sizes, parsed = program.memory_analysis(), hlo.parse(program.as_text())
    kernels = sum(
        run.times for run in parsed.runs() if 'custom_call_target="tpu_custom_call"' in run.instruction.rest
    )
    return Compiled(
        Bytes(
            sizes.argument_size_in_bytes,
            sizes.output_size_in_bytes,
            sizes.temp_size_in_bytes,
            sizes.alias_size_in_bytes,
            sizes.peak_memory_in_bytes,
            sizes.host_argument_size_in_bytes + sizes.host_temp_size_in_bytes,
        ),
        hlo.products(parsed),
        hlo.moved(parsed),
        collectives.found(parsed),
        kernels,
        parsed.uncounted(),
    )


def _too_large(said: str) -> TooLarge | None:
    """What the compiler says of memory, if that is what it says."""
    number = r"([\d.]+)([KMGT]?)"
    for pattern in (
        rf"\({number}\) exceeds available HBM \({number}\)",
        rf"[Uu]sed {number} of {number} hbm",
    ):
        if found := re.search(pattern, said):
            needed, unit, there, other = found.groups()
            return TooLarge(float(needed) * _UNITS[unit], float(there) * _UNITS[other])
    return None


_UNITS = {unit: math.pow(2, 10 * power) for power, unit in enumerate(("", "K", "M", "G", "T"))}
