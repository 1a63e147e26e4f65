"""A torch zip file (.pth, .pt) as tensors that are not read yet, without torch and without pickle.

The pickle in such a file is a program. A machine of our own runs the few instructions that a dict of tensors
needs, over an allow list of names that stay names: nothing is imported or called. All else is refused, and
there is no other reader to fall back to. Sources: torch/serialization.py and torch/_utils.py of torch 2.13,
pickletools of Python for the instructions. The zip around it is torch_zip's.
"""

import math
import struct
from functools import partial
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from fvdm_jax.program import Refusal, plain

from . import files
from .tensors import Tensor
from .torch_zip import Record, demand, members

LONGEST_PROGRAM, LONGEST_TEXT = 64 << 20, 512
MOST_OPERATIONS, MOST_NESTED, MOST_REMEMBERED = 4_000_000, 64, 1 << 20
MOST_STACKED = 8192  # a dict's items come in batches of 1,000, so that genuine files need some 2,010
MOST_TENSORS, MOST_AXES, MOST_ELEMENTS = 32_768, 8, 1 << 48

WRAPPERS = ("model_state", "state_dict", "module", "model")
ORDERED = "collections.OrderedDict"
TENSOR = "torch._utils._rebuild_tensor_v2"
PARAMETER = "torch._utils._rebuild_parameter"
STORAGES = {
    "torch.FloatStorage": np.float32, "torch.DoubleStorage": np.float64, "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": ml_dtypes.bfloat16, "torch.LongStorage": np.int64, "torch.IntStorage": np.int32,
    "torch.ShortStorage": np.int16, "torch.CharStorage": np.int8, "torch.ByteStorage": np.uint8,
    "torch.BoolStorage": np.bool_,
}  # fmt: skip

_SAFER = "save its tensors as safetensors"


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by their keys; a dict of them may lie in another, under one of WRAPPERS.

    Raises Refusal, naming file and tensor, for anything but such a dict in a zip file that is whole.
    """
    return _tensors(path, _state(path, _found(path)))


def read_grouped(path: Path) -> dict[str, Tensor]:
    """As `read`, but the dict may hold dicts of tensors, whose keys are joined to its own by "/"."""
    found = _found(path)
    demand(type(found) is dict, path, "holds no dict of tensors", _SAFER)
    groups = {key: value if type(value) is dict else {"": value} for key, value in found.items()}
    flat = {f"{key}/{name}".rstrip("/"): v for key, group in groups.items() for name, v in group.items()}
    demand(len(flat) == sum(map(len, groups.values())), path, "has a key twice", _SAFER)
    return _tensors(path, _state(path, flat))


def _tensors(path: Path, views: dict[str, "_View"]) -> dict[str, Tensor]:
    return {key: Tensor(path, v.record.dtype, v.shape, partial(v.elements, key)) for key, v in views.items()}


def _found(path: Path) -> object:
    """What the program of a file gives. Raises Refusal as `read` does."""
    size, head = files.size_of(path), files.look(path)
    demand(head[257:262] != b"ustar", path, "is a tar file, which is not read", _SAFER)
    named = head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8
    demand(not named, path, "is a safetensors file by its content", "name it .safetensors")
    demand(head.startswith(b"PK\3\4"), path, "is no zip file, as torch writes since version 1.6", _SAFER)
    records = members(path, size)
    demand("data.pkl" in records, path, "is a zip file without a data.pkl, so torch did not save it")
    for name in [name for name in records if not name.startswith("data/")]:
        length = records[name].length
        most = LONGEST_PROGRAM if name == "data.pkl" else 512
        demand(length <= most, path, f"has {length} bytes of {name}, where at most {most} are wanted")
        records[name].content = bytes(records[name].piece(0, length, name))
        if name == "byteorder":
            order = plain(records[name].content, 40)
            demand(records[name].content == b"little", path, f"has byte order {order}, not little", _SAFER)
    return _Machine(path, records).run()


def _state(path: Path, found: object) -> dict[str, "_View"]:
    """The dict of tensors in what the program gave. Raises Refusal where it holds anything else."""
    demand(type(found) is dict, path, "holds no dict of tensors", _SAFER)
    wrapped = [name for name in WRAPPERS if type(found.get(name)) is dict]
    if wrapped:
        beside = [key for key, value in found.items() if type(value) is _View] + wrapped[1:]
        what = f"has {plain(beside[:1], 200)} beside {wrapped[0]}, and it is not clear which is wanted"
        demand(not beside, path, what, "save the one dict of tensors")
        found = found[wrapped[0]]
    for key, value in found.items():
        demand(
            key.isprintable() and key, path, f"{plain(key, 200)!r} is no possible name of a tensor", _SAFER
        )
        demand(
            type(value) is _View, path, f"{plain(key, 200)} is no tensor", "save the tensors alone, in a dict"
        )
    demand(found, path, "holds no tensors", "give a file with weights")
    return found


class _Name(str):
    """A name of the allow list, which type(name) is str tells from a text."""


class _View(NamedTuple):
    """A tensor: elements of a record from `offset`, by `strides`, both counted in elements."""

    record: Record
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements from the first to the last in the record."""
        steps = sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        return 0 if 0 in self.shape else 1 + steps

    def elements(self, key: str) -> np.ndarray:
        """The tensor in memory, C-contiguous. Raises Refusal, naming `key`, as `Record.piece` does."""
        dtype = self.record.dtype
        raw = self.record.piece(self.offset * dtype.itemsize, self.span * dtype.itemsize, key)
        if not raw.size:
            return np.empty(self.shape, dtype)
        steps = [step * dtype.itemsize for step in self.strides]
        return np.asarray(np.ndarray(self.shape, dtype, raw, strides=steps), order="C")


class _Machine:
    """Runs the pickle in `records`; it knows dicts, tuples, texts, numbers, records, views and names."""

    def __init__(self, path: Path, records: dict[str, Record]):
        self.path, self.records, self.code, self.at = path, records, records["data.pkl"].content, 0
        self.stack, self.marks, self.memo, self.views = [], [], {}, 0

    def run(self) -> object:
        """The value that the program leaves. Raises Refusal for all that a dict of tensors does not need."""
        self.demand(self.take(2) == b"\x80\2", "is not of protocol 2, which torch writes")
        for _ in range(MOST_OPERATIONS):
            if (code := self.take(1)) == b".":
                self.demand(self.at == len(self.code), "goes on after its end")
                self.demand(len(self.stack) == 1 and not self.marks, "leaves more or less than one value")
                return self.stack[0]
            self.demand(code in _STEPS, f"has instruction 0x{code.hex()}, which dicts of tensors do not need")
            _STEPS[code](self)
        raise Refusal(self.path, f"has a data.pkl of more than {MOST_OPERATIONS} instructions", _SAFER)

    def demand(self, good: object, what: str) -> None:
        if not good:
            key = next((item for item in reversed(self.stack) if type(item) is str), "its first name")
            what = f"has a data.pkl that {what}; byte {self.at}, at {plain(key, 200)}"
            raise Refusal(self.path, what, _SAFER)

    def take(self, count: int) -> bytes:
        self.at += count
        self.demand(self.at <= len(self.code), "ends too early")
        return self.code[self.at - count : self.at]

    def number(self, form: str) -> int | float:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def push(self, value: object) -> None:
        self.demand(len(self.stack) < MOST_STACKED, "piles up too much")
        self.stack.append(value)

    def pop(self, count: int = 1) -> list:
        self.demand(count <= len(self.stack) - self.floor, "takes more than it has given")
        return self.pop_from(len(self.stack) - count)

    def pop_from(self, begin: int) -> list:
        items = self.stack[begin:]
        del self.stack[begin:]
        return items

    def top(self) -> object:
        self.demand(len(self.stack) > self.floor, "takes more than it has given")
        return self.stack[-1]

    @property
    def floor(self) -> int:
        """Values on the stack that lie below the last mark, and out of reach."""
        return self.marks[-1] if self.marks else 0

    def mark(self) -> None:
        self.demand(len(self.marks) < MOST_NESTED, "is nested too deeply")
        self.marks.append(len(self.stack))

    def pop_to_mark(self) -> list:
        self.demand(self.marks, "takes up to a mark that it has not set")
        return self.pop_from(self.marks.pop())

    def group(self, items: list) -> None:
        deep = any(type(part) is tuple for item in items if type(item) is tuple for part in item)
        self.demand(len(items) <= MOST_AXES and not deep, "has a tuple larger or deeper than a tensor's")
        self.push(tuple(items))

    def remember(self, index: int) -> None:
        self.demand(index <= min(len(self.code), MOST_REMEMBERED), "remembers too much")
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        self.demand(index in self.memo, f"recalls number {index}, which it has not remembered")
        self.push(self.memo[index])

    def text(self) -> None:
        self.demand((length := self.number("<I")) <= LONGEST_TEXT, f"has a text of {length} bytes")
        self.push(self.take(length).decode("utf-8", "replace"))
        self.demand("\ufffd" not in self.stack[-1], "has a text that is not UTF-8")

    def long(self) -> None:
        self.demand((length := self.number("B")) <= 9, f"has a number of {length} bytes")
        self.push(int.from_bytes(self.take(length), "little", signed=True))

    def name(self) -> None:
        lines = self.code[self.at : self.at + 2 * LONGEST_TEXT].split(b"\n", 2)
        name = _Name(b".".join(lines[:2]).decode("ascii", "replace"))
        good = len(lines) == 3 and (name in STORAGES or name in (ORDERED, TENSOR, PARAMETER))
        self.demand(good, f"needs {plain(name, 200)}, which is not allowed")
        self.at += len(name) + 1
        self.push(name)

    def put(self, items: list) -> None:
        self.demand(type(self.top()) is dict and not len(items) % 2, "puts items into what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.demand(type(key) is str, f"has a key that is no text but {type(key).__name__}")
            self.demand(key not in self.stack[-1], f"has the key {plain(key, 200)} twice")
            self.stack[-1][key] = value

    def build(self) -> None:
        (state,) = self.pop()
        good = type(self.top()) is dict and type(state) is dict and len(state) == 1 and "_metadata" in state
        self.demand(good, "changes an object")

    def call(self) -> None:
        name, given = self.pop(2)
        self.demand(type(name) is _Name and type(given) is tuple, "calls what is no function")
        if name == ORDERED and not given:
            self.push({})
        elif name == TENSOR and len(given) == 6:
            self.push(self.view(*given))
        else:
            whole = name == PARAMETER and [type(value) for value in given] == [_View, bool, dict]
            self.demand(whole and not given[2], f"calls {name} otherwise than for a plain tensor")
            self.push(given[0])

    def record(self) -> None:
        (given,) = self.pop()
        kinds = [type(value) for value in given] if type(given) is tuple else []
        self.demand(kinds == [str, _Name, str, str, int] and given[0] == "storage", "names no storage")
        _, kind, key, _, count = given
        known = kind in STORAGES and f"data/{key}" in self.records
        self.demand(known, f"names no storage with {plain(key, 40)}")
        record, dtype = self.records[f"data/{key}"], np.dtype(STORAGES[kind])
        what = f"wants {count} elements of {dtype} in data/{key}, which has {record.length} bytes"
        self.demand(count * dtype.itemsize == record.length, what)
        self.demand(record.dtype in (None, dtype), f"reads data/{key} as {record.dtype} and as {dtype}")
        record.dtype = dtype
        self.push(record)

    def view(self, record, offset, shape, strides, grad, hooks) -> _View:
        kinds = [type(value) for value in (record, shape, strides, grad, hooks)]
        self.demand(kinds == [Record, tuple, tuple, bool, dict] and not hooks, "makes no plain tensor")
        numbers = [offset, *shape, *strides]
        whole = all(type(n) is int for n in numbers)
        self.demand(whole, "has an offset, shape or stride that is no whole number")
        good = all(0 <= n < MOST_ELEMENTS for n in numbers) and len(shape) == len(strides)
        self.demand(good, f"has offset, shape and strides {plain(numbers, 120)}")
        view, room = _View(record, offset, shape, strides), record.length // record.dtype.itemsize
        fits = offset + view.span <= room and math.prod(shape) <= room
        fits = fits and math.prod(n or 1 for n in shape) < MOST_ELEMENTS
        self.demand(fits, f"has a tensor of shape {plain(shape, 80)} beyond its {room} elements")
        self.views += 1
        self.demand(self.views <= MOST_TENSORS, f"has more than {MOST_TENSORS} tensors")
        return view


_STEPS = {
    b"c": _Machine.name, b"R": _Machine.call, b"Q": _Machine.record, b"b": _Machine.build,
    b"(": _Machine.mark, b"X": _Machine.text, b"\x8a": _Machine.long, b"}": lambda m: m.push({}),
    b")": lambda m: m.push(()), b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True), b"\x89": lambda m: m.push(False),
    b"J": lambda m: m.push(m.number("<i")), b"K": lambda m: m.push(m.number("B")),
    b"M": lambda m: m.push(m.number("<H")), b"G": lambda m: m.push(m.number(">d")),
    b"t": lambda m: m.group(m.pop_to_mark()), b"\x85": lambda m: m.group(m.pop()),
    b"\x86": lambda m: m.group(m.pop(2)), b"\x87": lambda m: m.group(m.pop(3)),
    b"s": lambda m: m.put(m.pop(2)), b"u": lambda m: m.put(m.pop_to_mark()),
    b"q": lambda m: m.remember(m.number("B")), b"r": lambda m: m.remember(m.number("<I")),
    b"h": lambda m: m.recall(m.number("B")), b"j": lambda m: m.recall(m.number("<I")),
}  # fmt: skip
"""Opcode → what it does; PROTO and STOP are in `run`. Any other is refused."""
