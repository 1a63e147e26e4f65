"""What a compiled program sends between devices, read from its text."""

import math
import re
from typing import NamedTuple

import numpy as np

from fvdm_jax.planning import hlo

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One collective of a program: of which kind and element type, between which devices, how often.

    `sent`: bytes that one device sends in one run, on a ring · `groups`: devices that take part together, as
    places in the program's order; of a permutation pairs of who sends and who receives.
    """

    kind: str
    dtype: str
    sent: float
    times: int
    groups: tuple[tuple[int, ...], ...]

    @property
    def group(self) -> int:
        """How many devices take part together."""
        return len(self.groups[0])

    @property
    def wire(self) -> float:
        """Bytes that one device sends while the program runs."""
        return self.sent * self.times


def found(program: hlo.Program) -> list[Collective]:
    """Every collective that runs with more than one device."""
    scattering = _scattering(program)
    every = []
    for instruction, times, within, fused in program.runs():
        kind = instruction.kind.removesuffix("-start")
        if kind not in KINDS or fused and _goes_on(program, instruction, within):
            continue
        groups = _groups(instruction.rest, program.devices)
        if len(groups[0]) < 2 or kind == "collective-permute" and all(a == b for a, b in groups):
            continue
        given = [shape for name in instruction.operands for shape in program.shapes(within, name)]
        kind = "reduce-scatter" if within in scattering and kind == "all-reduce" else kind
        sent = _share(kind, len(groups[0])) * sum(map(hlo.size, given))
        every.append(Collective(kind, given[0][0], sent, times, groups))
    return every


def _goes_on(program: hlo.Program, instruction: hlo.Instruction, within: str) -> bool:
    """Whether this is the middle or the end of a collective: TPUs spread one over a chain of fusions."""
    begins = any("AsyncCollectiveStart" in each.rest for each in program.computations[within].values())
    return "chain_id=" in instruction.rest and not begins


def _share(kind: str, group: int) -> float:
    """Of what a device puts in, how much of it it sends, when a ring does it."""
    once = (group - 1) / group
    return {"all-gather": group - 1, "all-reduce": 2 * once, "collective-permute": 1}.get(kind, once)


def _scattering(program: hlo.Program) -> set[str]:
    """Computations of fusions in which an all-reduce is cut at once: TPUs' form of a reduce-scatter."""
    return {
        name
        for name, body in program.computations.items()
        if {"all-reduce", "dynamic-slice"} <= {each.kind for each in body.values()}
        and name.startswith("all-reduce-scatter")
    }


def _groups(rest: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Who takes part together, from one of the forms in which XLA writes it."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})?\}", rest)
    if listed:
        every = re.findall(r"\{([\d, ]+)\}", listed[1] or "")
        return tuple(tuple(map(int, group.split(","))) for group in every) or (tuple(range(devices)),)
    if iota := re.search(r"replica_groups=\[([\d,]+)\](<=\[[\d,]+\](?:T\([\d,]+\))?)", rest):
        return _rows(_order(iota[2]).reshape(_sizes(iota[1])))
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", rest)
    if not named:
        raise ValueError(f"groups of a collective are written in an unknown form: {rest[:300]}")
    return _along(dict(re.findall(r"'(\w+)'=(\d+)", named[1])), named[2], named[3])


def _along(axes: dict[str, str], order: str | None, taken: str) -> tuple[tuple[int, ...], ...]:
    """The groups along `taken` of the axes of a mesh; of an axis a part may be taken, written 'axis':(2)4."""
    shape, inner = [], []
    parts = {
        name: (int(before), int(size)) for name, before, size in re.findall(r"'(\w+)':\((\d+)\)(\d+)", taken)
    }
    for name, text in axes.items():
        before, size = parts.get(name, (1, int(text)))
        shape += [before, size, int(text) // (before * size)]
        inner += [False, f"'{name}'" in taken, False]
    devices = (_order(order) if order else np.arange(math.prod(shape))).reshape(shape)
    within = [axis for axis, one in enumerate(inner) if one]
    across = [axis for axis, one in enumerate(inner) if not one]
    group = math.prod(shape[axis] for axis in within)
    return _rows(devices.transpose(across + within).reshape(-1, group))


def _order(text: str) -> np.ndarray:
    """Devices as [2,4]T(1,0) has them, counted up and turned, or as a list."""
    counted = re.match(r"(?:<=)?\[([\d,]+)\](?:T\(([\d,]+)\)?)?", text)
    if not counted:
        return np.array(_sizes(text))
    order = np.arange(math.prod(_sizes(counted[1]))).reshape(_sizes(counted[1]))
    return order.transpose(_sizes(counted[2])) if counted[2] else order


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(each) for each in text.split(",") if each.strip())


def _rows(groups: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(int, group)) for group in groups)
