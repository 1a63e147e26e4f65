"""What a compiled program does, by its text: how often each instruction runs, its products, its traffic.

XLA's own cost analysis counts the body of a loop once; a network's layers and a sampler's steps are loops.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

Shape = tuple[str, tuple[int, ...]]
"""Element type, and the sizes of the axes."""


class Instruction(NamedTuple):
    """One line: the type of its result and its attributes are kept as text, operands by name."""

    name: str
    kind: str
    result: str
    operands: tuple[str, ...]
    rest: str
    root: bool


class Run(NamedTuple):
    """An instruction, how often it runs, the computation that it is in, whether that is part of a fusion."""

    instruction: Instruction
    times: int
    within: str
    fused: bool


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of a module by name, which of them is entered, and over how many devices it runs."""

    computations: dict[str, dict[str, Instruction]]
    entry: str
    devices: int

    def runs(self) -> Iterator[Run]:
        """Every instruction that runs: all branches of a conditional; of a loop of unknown turns, one."""
        yield from self._runs(self.entry, 1, False)

    def _runs(self, name: str, times: int, fused: bool) -> Iterator[Run]:
        for instruction in self.computations[name].values():
            yield Run(instruction, times, name, fused)
            turns = self.turns(instruction, name) if instruction.kind == "while" else 1
            turns = 1 if turns is None else turns
            for called in _called(instruction):
                yield from self._runs(called, times * turns, fused or instruction.kind == "fusion")

    def turns(self, loop: Instruction, within: str) -> int | None:
        """How often a loop turns: as XLA notes it, else from where its counter starts to its bound."""
        if noted := re.search(r'known_trip_count"?[:=]\s*\{"?n"?:"?(\d+)', loop.rest):
            return int(noted[1])
        condition = self.computations[re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]]
        last = next((each for each in condition.values() if each.root), None)
        if last is None or last.kind != "compare" or "direction=LT" not in last.rest:
            return None
        counter, bound = (condition[name] for name in last.operands)
        place = re.search(r"index=(\d+)", counter.rest)
        given = self.computations[within].get(loop.operands[0])
        if not place or given is None or given.kind != "tuple":
            return None
        start, stop = self._number(within, given.operands[int(place[1])]), _number(bound)
        return None if start is None or stop is None else stop - start

    def _number(self, within: str, name: str) -> int | None:
        """The number that an instruction gives, if it is a constant or a copy of one."""
        instruction = self.computations[within][name]
        if instruction.kind in ("copy", "bitcast"):
            return self._number(within, instruction.operands[0])
        return _number(instruction)

    def uncounted(self) -> int:
        """How many of the loops that run have a number of turns that cannot be told."""
        loops = (run for run in self.runs() if run.instruction.kind == "while")
        return sum(self.turns(run.instruction, run.within) is None for run in loops)

    def shapes(self, within: str, name: str) -> list[Shape]:
        """The shapes of the result of an instruction, several of a tuple."""
        return shapes(self.computations[within][name].result)


def parse(text: str) -> Program:
    """The program of the text that `compiled.as_text()` gives."""
    computations, entry, current = {}, None, {}
    for line in text.splitlines():
        if line.endswith("{") and (header := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif " = " in line and (found := _instruction(line)):
            current[found.name] = found
    counts = (re.search(rf"\b{name}=(\d+)", text) for name in ("replica_count", "num_partitions"))
    return Program(computations, entry, math.prod(int(found[1]) for found in counts if found))


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    at = head.end()
    end = _closing(line, at) if line[at] == "(" else line.index(" ", at)
    called = re.match(r" ([\w\-]+)\(", line[end:])
    if not called:
        return None
    opening = end + called.end() - 1
    closing = _closing(line, opening)
    operands = re.findall(r"%([\w.\-]+)", line[opening:closing])
    # Of a constant the operands are its value.
    rest = line[opening:] if called[1] in ("constant", "parameter") else line[closing:]
    return Instruction(head[2], called[1], line[at:end], tuple(operands), rest, bool(head[1]))


def _number(instruction: Instruction) -> int | None:
    """The whole number that a constant is."""
    found = re.match(r"\((\d+)\)", instruction.rest) if instruction.kind == "constant" else None
    return int(found[1]) if found else None


def _closing(line: str, at: int) -> int:
    """The place after the parenthesis that closes the one at `at`."""
    depth = 0
    for match in re.finditer(r"[()]", line[at:]):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return at + match.end()
    raise ValueError(f"a parenthesis is not closed in {line[:200]!r}")


_CALLS = {
    "while": r"body=%?([\w.\-]+)",
    "fusion": r"calls=%?([\w.\-]+)",
    "call": r"to_apply=%?([\w.\-]+)",
    "call-start": r"to_apply=%?([\w.\-]+)",
    "async-start": r"calls=%?([\w.\-]+)",
    "conditional": r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))",
}


def _called(instruction: Instruction) -> list[str]:
    pattern = _CALLS.get(instruction.kind)
    if pattern is None:
        return []
    found = re.findall(pattern, instruction.rest)
    joined = " ".join(" ".join(each) if isinstance(each, tuple) else each for each in found)
    return re.findall(r"[\w.\-]+", joined)


def shapes(result: str) -> list[Shape]:
    """The shapes that a type as text has."""
    return [
        (kind, tuple(int(size) for size in sizes.replace("<=", "").split(",") if size))
        for kind, sizes in re.findall(r"\b([a-z][a-z0-9]*)\[([0-9,<=]*)\]", result)
    ]


def width(kind: str) -> float:
    """Bytes of an element."""
    if kind in ("token", "opaque"):
        return 0.0
    bits = re.search(r"\d+", kind)
    return int(bits[0]) / 8 if bits else 1.0


def size(shape: Shape) -> float:
    """Bytes of an array."""
    return width(shape[0]) * math.prod(shape[1])


class Products(NamedTuple):
    """Operations in products of matrices on a device: in all, and counted by how often the matrix unit goes
    through them: a TPU takes six passes for a product of float32 at the highest precision, three at high."""

    operations: float
    passes: float


def products(program: Program) -> Products:
    """The operations of every dot and convolution that runs; those of kernels are not seen."""
    total = passes = 0.0
    for instruction, times, within, _ in program.runs():
        if instruction.kind in ("dot", "convolution"):
            one = times * _operations(program, instruction, within)
            wide = "f32" in {program.shapes(within, name)[0][0] for name in instruction.operands}
            precision = re.search(r"operand_precision=\{(\w+)", instruction.rest)
            factor = {"highest": 6, "high": 3}.get(precision[1], 1) if precision and wide else 1
            total, passes = total + one, passes + one * factor
    return Products(total, passes)


def _operations(program: Program, instruction: Instruction, within: str) -> float:
    left, right = (program.shapes(within, name)[0][1] for name in instruction.operands[:2])
    out = shapes(instruction.result)[0][1]
    if instruction.kind == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        summed = [left[int(axis)] for axis in axes[1].split(",") if axis] if axes else []
        return 2.0 * math.prod(out) * math.prod(summed)
    return _convolved(instruction.rest, left, right, out)


def _convolved(rest: str, left, right, out) -> float:
    """Of a convolution, as TPUs have every product: only what meets no padding and no hole is counted."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest).groups()
    at_left, at_right, at_out = ({label: place for place, label in enumerate(side)} for side in labels)
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", rest) or [""])[0]))
    groups = re.search(r"batch_group_count=(\d+)", rest)
    total = 2.0 * out[at_out["f"]] * left[at_left["b"]] * right[at_right["i"]]
    for place, label in enumerate(sorted(at_right.keys() - {"i", "o"})):

        def of(name: str, otherwise: str, place: int = place) -> list[int]:
            every = window.get(name)
            return [int(n) for n in (every.split("x")[place] if every else otherwise).split("_")]

        (stride,), (hole,), (spread,) = of("stride", "1"), of("lhs_dilate", "1"), of("rhs_dilate", "1")
        low, length = of("pad", "0_0")[0], (left[at_left[label]] - 1) * hole + 1
        taps, steps = right[at_right[label]], out[at_out[label]]
        total *= _meeting(taps, steps, (stride, spread, low, length, hole))
    return total / (int(groups[1]) if groups else 1)


def _meeting(taps: int, steps: int, sizes: tuple[int, int, int, int, int]) -> int:
    """How many pairs of a tap and a step fall on an element of the input."""
    stride, spread, low, length, hole = sizes
    places = (step * stride + tap * spread - low for tap in range(taps) for step in range(steps))
    return sum(0 <= place < length and place % hole == 0 for place in places)


_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
    "after-all", "partition-id", "replica-id", "iota", "broadcast", "opt-barrier",
}  # fmt: skip


def moved(program: Program) -> float:
    """Bytes that instructions read from a device's memory and write to it, an estimate.

    Of a fusion what goes in and out of it, of a slice the slice; what stays in a TPU's fast memory is free.
    """
    total = 0.0
    for instruction, times, within, fused in program.runs():
        if fused or instruction.kind in _FREE or instruction.kind.endswith(("-done", "-update")):
            continue
        total += times * _traffic(program, instruction, within)
    return total


def _traffic(program: Program, instruction: Instruction, within: str) -> float:
    there = program.computations[within]
    read = [there[name].result for name in instruction.operands if name in there]
    if instruction.kind in ("dynamic-slice", "slice", "gather"):
        return 2 * _far(instruction.result)
    if instruction.kind == "dynamic-update-slice":
        return 2 * _far(read[1])
    if instruction.kind != "fusion":
        return _far(instruction.result) + sum(map(_far, read))
    inside = program.computations[_called(instruction)[0]]
    taken = {
        int(re.match(r"\((\d+)", each.rest)[1]): each for each in inside.values() if each.kind == "parameter"
    }
    total = 0.0
    for place, type_ in enumerate(read):
        users = [each for each in inside.values() if taken[place].name in each.operands]
        if users and all(each.kind in ("dynamic-slice", "slice") for each in users):
            total += min(_far(type_), sum(_far(each.result) for each in users))
        elif not any(
            each.kind == "dynamic-update-slice" and each.operands[0] == taken[place].name for each in users
        ):
            total += _far(type_)
    updates = [each for each in inside.values() if each.kind == "dynamic-update-slice"]
    if updates:
        return total + sum(_far(inside[each.operands[1]].result) for each in updates)
    return total + _far(instruction.result)


def _far(result: str) -> float:
    """Bytes of a type but for what its layout puts into a space of memory of its own."""
    found = re.findall(r"\b([a-z][a-z0-9]*\[[0-9,<=]*\])(\{[^}]*\})?", result)
    return sum(size(shapes(array)[0]) for array, layout in found if not re.search(r"S\([1-9]", layout))
