"""The zip file that torch writes, as records whose bytes are read when they are wanted, and checked.

Stricter than the zipfile of Python: what two readers could see differently is refused. Source: APPNOTE 6.3.10
of PKWARE, and what torch 2.13 writes.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fvdm_jax.program import Refusal, plain

from . import files

LONGEST_DIRECTORY, LONGEST_NAME, MOST_MEMBERS = 32 << 20, 512, 32_768 + 16
CHUNK = 1 << 20

_END, _END64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q4sLQL")
_CENTRAL, _LOCAL = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")
_FULL = 0xFFFFFFFF  # stands in a field of 32 bits for a value that is in the zip64 field
_MEMBER = re.compile(
    r"(?!\.\.?/)([^/\\]+)/"
    r"(data\.pkl|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id|data/[0-9]{1,20})"
)
_AGAIN, _SAFER = "copy it again", "save its tensors as safetensors"


def demand(good: object, path: Path, what: str, right: str = _AGAIN) -> None:
    """Raises Refusal of `path` unless `good`."""
    if not good:
        raise Refusal(path, what, right)


@dataclass
class Record:
    """A member of the zip file: `length` bytes from `start` of a file that has `size` bytes."""

    path: Path
    size: int
    start: int
    length: int
    crc: int
    dtype: np.dtype | None = None
    content: bytes | None = None
    checked: bool = False

    def piece(self, first: int, length: int, name: str) -> np.ndarray:
        """Bytes from `first`, uint8 [length]; the whole record's CRC-32 is checked the first time.

        Raises Refusal, for the tensor `name`, where the file has changed or is damaged.
        """
        now, name, crc = files.size_of(self.path), plain(name, 200), 0
        what = f"had {self.size} bytes, and now has {now}"
        demand(now == self.size, self.path, what, "leave it be meanwhile")
        try:
            wanted = np.empty(length, np.uint8)
        except MemoryError as failure:
            raise Refusal(self.path, f"{name} needs {length} bytes, more memory than is free") from failure
        if self.checked:
            files.fill(self.path, self.start + first, memoryview(wanted))
            return wanted
        for at, into in self._through(first, memoryview(wanted)):
            files.fill(self.path, self.start + at, into)
            crc = zlib.crc32(into, crc)
        what = f"{name} is damaged: CRC-32 {crc:08x}, where the file promises {self.crc:08x}"
        demand(crc == self.crc, self.path, what)
        self.checked = True
        return wanted

    def _through(self, first: int, wanted: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Positions and buffers that together are the whole record; only `wanted` is kept."""
        scratch, end = memoryview(bytearray(min(CHUNK, self.length))), first + len(wanted)
        yield from ((at, scratch[: first - at]) for at in range(0, first, CHUNK))
        yield from ((first + at, wanted[at : at + CHUNK]) for at in range(0, len(wanted), CHUNK))
        yield from ((at, scratch[: self.length - at]) for at in range(end, self.length, CHUNK))


class _Entry(NamedTuple):
    name: bytes
    flags: int
    method: int
    crc: int
    length: int
    packed: int
    header: int


def members(path: Path, size: int) -> dict[str, Record]:
    """The members of torch's zip file by their names below its one folder.

    Raises Refusal unless all is as torch writes it: stored, each name once, both headers alike, no overlaps.
    """
    count, begin, end = _directory(path, size)
    raw, at, entries, names = bytes(files.read_bytes(path, begin, end - begin)), 0, [], []
    for _ in range(count):
        entry, at = _entry(path, raw, at)
        entries.append(entry)
    demand(at == len(raw), path, f"lists {count} members, and its zip directory goes on")
    code = any(re.search(rb"/(constants\.pkl$|code/)", entry.name) for entry in entries)
    demand(not code, path, "is a TorchScript archive, which holds code", "save the state_dict alone")
    for name in [entry.name.decode("utf-8", "replace") for entry in entries]:
        match = _MEMBER.fullmatch(name)
        good = match and len(name) <= LONGEST_NAME and name.isprintable()
        demand(good, path, f"has the member {plain(name, 200)}, which torch does not write", _SAFER)
        names.append(match.groups())
    demand(len({top for top, _ in names}) == 1, path, "has members in more than one folder, or none")
    demand(len(set(names)) == count, path, "has two members of one name")
    records, last = {}, 0
    for entry, (_, name) in sorted(zip(entries, names, strict=True), key=lambda pair: pair[0].header):
        fits = entry.header >= last if last else entry.header == 0
        demand(fits, path, f"has {name} where it cannot be: over another member, or behind foreign bytes")
        start = _start(path, entry, name, begin)
        records[name] = Record(path, size, start, entry.length, entry.crc)
        last = start + entry.length
    return records


def _directory(path: Path, size: int) -> tuple[int, int, int]:
    """Number of members, and begin and end of the zip's directory, of the end record that ends the file."""
    end = max(size - _END.size, 0)
    magic, *said, comment = _END.unpack(files.read_bytes(path, end, _END.size))
    demand(magic == b"PK\5\6" and not comment, path, "does not end with a zip end record: cut, or lengthened")
    if (begin := end - _END64.size) >= 0:
        raw = files.read_bytes(path, begin, _END64.size)
        magic, long, _, _, *wide, mark, disk, where, disks = _END64.unpack(raw)
        if mark == b"PK\6\7":
            pairs = zip(said, wide, (0xFFFF,) * 4 + (_FULL,) * 2, strict=True)
            agree = all(few in (many, most) for few, many, most in pairs)
            agree = agree and (magic, long, disk, where, disks) == (b"PK\6\6", 44, 0, begin, 1)
            demand(agree, path, "has two zip end records that do not agree")
            said, end = wide, begin
    disk, first, here, count, length, begin = said
    fits = not disk and not first and here == count and begin + length == end
    demand(fits, path, "has a zip end record that does not fit the file")
    few = length <= LONGEST_DIRECTORY and count <= MOST_MEMBERS
    demand(few, path, f"lists {count} members in {length} bytes, too many for a network")
    return count, begin, end


def _entry(path: Path, raw: bytes, at: int) -> tuple[_Entry, int]:
    """The member described at `at` of the directory, and where the next is."""
    begin = at + _CENTRAL.size
    fields = _CENTRAL.unpack_from(raw, at) if begin <= len(raw) else (b"",) + (0,) * 16
    magic, _, _, flags, method, _, _, crc, packed, length, name, extra, comment, disk, _, _, header = fields
    end, extras, values = begin + name + extra, {}, [length, packed, header]
    whole = magic == b"PK\1\2" and end <= len(raw) and not comment and not disk
    at = begin + name
    while whole and at + 4 <= end:
        kind, long = struct.unpack_from("<2H", raw, at)
        whole, at = kind not in extras, at + 4 + long
        extras[kind] = raw[at - long : at]
    wide = extras.get(1, b"")
    whole = whole and at == end and len(wide) == 8 * values.count(_FULL)
    demand(whole, path, f"has a zip directory that is damaged before its byte {end}")
    widened = iter(struct.unpack(f"<{len(wide) // 8}Q", wide))
    length, packed, header = (next(widened) if value == _FULL else value for value in values)
    return _Entry(raw[begin : begin + name], flags, method, crc, length, packed, header), end


def _start(path: Path, entry: _Entry, name: str, end: int) -> int:
    """Where the content of a member begins, whose header and content must lie before `end`."""
    stored = not entry.method and entry.packed == entry.length and not entry.flags & ~0x808
    demand(stored, path, f"has {name} compressed or encrypted, which torch does not do", _SAFER)
    begin = entry.header + _LOCAL.size + len(entry.name)
    demand(begin <= end, path, f"has {name} beyond its end")
    raw = files.read_bytes(path, entry.header, begin - entry.header)
    magic, _, flags, method, _, _, crc, packed, length, named, extra = _LOCAL.unpack_from(raw)
    # With flag 8 what was not known beforehand stands behind the content, and zeros here.
    later = {0} if flags & 8 else set()
    agree = crc in later | {entry.crc} and {packed, length} <= later | {_FULL, entry.length}
    ours = (magic, flags, method, named, bytes(raw[_LOCAL.size :]))
    agree = agree and ours == (b"PK\3\4", entry.flags, 0, len(entry.name), entry.name)
    demand(agree, path, f"has a header of {name} that does not agree with the zip's directory")
    demand(begin + extra + entry.length <= end, path, f"has {name} go beyond its end")
    return begin + extra
