"""Encoded clips in a folder: ArrayRecord shards, and manifests that say what is in them.

A folder is a path or an address that fsspec opens, such as gs://bucket/folder; shards of such a one are
fetched whole into the user's cache when they are first needed. Nothing here imports jax.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import struct
import threading
from collections.abc import Iterable, Sequence, Set
from typing import NamedTuple

import numpy as np

from fvdm_jax.data.folder import Folder, Shard, digest
from fvdm_jax.program import Refusal

VERSION = 1
LIMIT = 256 * 2**20
"""Bytes of records that a shard holds at most, and so what a killed run loses at most."""

WRITE = "group_size:1,uncompressed"
READ = "readahead_buffer_size:0,max_parallelism:0"
OPEN = 128
"""Shards that a reader keeps open at a time."""

AGAIN = "encode the clips again with python -m fvdm_jax.data.precompute"


class Record(NamedTuple):
    """A clip as training takes it.

    `name`: its file, and of several clips of a file the span. `latents` [f h w c], normalised, and `states`
    [l e], the text states of the caption's true length: float32, bfloat16 or float16, as they are stored.
    """

    name: str
    caption: str
    latents: np.ndarray
    states: np.ndarray


@dataclasses.dataclass(frozen=True)
class Header:
    """What all records of a folder share.

    `text_length`: rows that states are padded to with zeros. `model`: a fingerprint of the networks that
    encoded; `vae` and `text`: their configs as JSON has them.
    """

    channels: int
    text_width: int
    text_length: int
    fps: float
    model: str
    vae: dict
    text: dict
    version: int = VERSION

    def check(self, expected: "Header", where: object) -> None:
        """Raises Refusal, named `where`, that says how this header differs from the one expected."""
        ours, theirs = (json.loads(json.dumps(dataclasses.asdict(each))) for each in (self, expected))
        if different := [f"{k} is {ours[k]}, not {theirs[k]}" for k in ours if ours[k] != theirs[k]]:
            raise Refusal(
                where, f"was made otherwise: {'; '.join(different)}", AGAIN + " into another folder"
            )


class Entry(NamedTuple):
    """Where a record is, and what it is.

    `shard`: the file's name, `index`: its place there. `key`: a hash of all that its content follows from
    (the source file's content, span, settings, caption). `bucket`: (f, h, w).
    """

    shard: str
    index: int
    name: str
    key: str
    bucket: tuple[int, int, int]

    @property
    def place(self) -> tuple[str, int, str]:
        """What tells it from all others, also those that once were or will be at the same place."""
        return self.shard, self.index, self.key


def pack(record: Record) -> bytes:
    """The record as a safetensors file. Raises ValueError where `unpack` would."""
    from safetensors.numpy import save

    _check(record)
    words = {"version": VERSION, "name": _text(record.name), "caption": _text(record.caption)}
    # A strided array is written wrong by some versions of the library, hence contiguous.
    arrays = {part: np.ascontiguousarray(getattr(record, part)) for part in ("latents", "states")}
    # As one entry, since the library writes several in an order that changes from run to run.
    return save(arrays, {"record": json.dumps(words, ensure_ascii=False)})


def unpack(payload: bytes) -> Record:
    """The record that `pack` wrote. Raises ValueError, saying what is wrong, for anything else."""
    from safetensors import SafetensorError, deserialize

    try:
        stored = dict(deserialize(payload))
        (length,) = struct.unpack_from("<Q", payload)
        words = json.loads(json.loads(payload[8 : 8 + length])["__metadata__"]["record"])
        version = words["version"]
    except (SafetensorError, ValueError, KeyError, TypeError) as broken:
        raise ValueError(f"is cut or no record ({broken})") from broken
    if version != VERSION:
        raise ValueError(f"is of version {version}, and this program reads {VERSION}")
    if missing := {"latents", "states"} - stored.keys() | {"name", "caption"} - words.keys():
        raise ValueError(f"lacks {', '.join(sorted(missing))}")
    record = Record(words["name"], words["caption"], array(stored["latents"]), array(stored["states"]))
    _check(record)
    return record


def _text(words: str) -> str:
    """The words as UTF-8 can hold them: of file names, bytes that are no text become question marks."""
    return words.encode("utf-8", "replace").decode()


def _dtypes() -> dict[str, np.dtype]:
    import ml_dtypes

    return {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


def array(stored: dict) -> np.ndarray:
    """An array as safetensors' `deserialize` gives it, which its own numpy side cannot read as bfloat16."""
    if stored["dtype"] not in (known := _dtypes()):
        raise ValueError(f"is stored as {stored['dtype']}, which is none of {', '.join(known)}")
    return np.frombuffer(stored["data"], known[stored["dtype"]]).reshape(stored["shape"])


def _check(record: Record) -> None:
    for part, dimensions in (("latents", 4), ("states", 2)):
        array = getattr(record, part)
        if array.dtype not in _dtypes().values():
            raise ValueError(f"has {part} of {array.dtype}; float32, bfloat16 or float16 is right")
        if array.ndim != dimensions or (part == "latents" and not array.size):
            raise ValueError(f"has {part} of shape {array.shape}; {dimensions} dimensions are right")
        if not np.isfinite(array.astype(np.float32)).all():
            raise ValueError(f"has {part} that are not finite")


class Manifest(NamedTuple):
    """What a folder holds; its entries in the order of processes, and of each as they were written."""

    folder: Folder
    header: Header
    shards: dict[str, Shard]
    entries: list[Entry]
    superseded: frozenset[tuple[str, int, str]] = frozenset()


def _written(folder: Folder, names: Iterable[str]) -> dict[str, Manifest]:
    """What each process wrote, by the manifest's name. Raises Refusal for a manifest that is none."""
    found = {}
    for name in sorted(n for n in names if n.startswith("manifest-") and n.endswith(".json")):
        try:
            stored = json.loads(folder.read(name))
            if (version := stored["header"]["version"]) != VERSION:
                what = f"{name} is of version {version}, and this program reads {VERSION}"
                raise Refusal(folder.where, what, AGAIN)
            shards = {each["file"]: Shard(**each) for each in stored["shards"]}
            entries = [Entry(*where, (f, h, w)) for *where, (f, h, w) in stored["entries"]]
            gone = frozenset((file, index, key) for file, index, key in stored["superseded"])
            found[name] = Manifest(folder, Header(**stored["header"]), shards, entries, gone)
        except (ValueError, KeyError, TypeError) as broken:
            raise Refusal(folder.where, f"{name} is no manifest ({broken})", AGAIN) from broken
    gone = frozenset().union(*(part.superseded for part in found.values()))
    return {name: _without(part, gone) for name, part in found.items()}


def _without(part: Manifest, gone: Set[tuple[str, int, str]]) -> Manifest:
    return part._replace(entries=[each for each in part.entries if each.place not in gone])


def _sound(part: Manifest, sizes: dict[str, int]) -> Manifest:
    """The manifest without shards that are missing or cut."""
    shards = {file: shard for file, shard in part.shards.items() if sizes.get(file) == shard.bytes}
    return part._replace(shards=shards, entries=[each for each in part.entries if each.shard in shards])


def load(folder: str | os.PathLike, expected: Header | None = None) -> Manifest:
    """What the folder holds, of all processes that wrote there; a clip that two encoded counts once.

    Raises Refusal where it holds nothing, a shard is missing or cut, or the header is not the one expected.
    """
    place = Folder(str(folder))
    sizes = place.sizes()
    if not (written := _written(place, sizes)):
        raise Refusal(folder, "holds no records", AGAIN)
    header, shards, entries = expected or next(iter(written.values())).header, {}, {}
    for name, part in written.items():
        part.header.check(header, f"{folder}/{name}")
        shards |= part.shards
        for entry in part.entries:
            entries.setdefault(entry.key, entry)
    for file, shard in shards.items():
        if sizes.get(file) != shard.bytes:
            size = f"has {sizes[file]} bytes of {shard.bytes}" if file in sizes else "is missing"
            raise Refusal(f"{folder}/{file}", size, "copy it again, or " + AGAIN)
    return Manifest(place, header, shards, list(entries.values()))


def verify(folder: str | os.PathLike) -> Manifest:
    """As `load`, having read every byte. Raises Refusal naming a shard that is not what was written."""
    manifest = load(folder)
    for shard in manifest.shards.values():
        if hashlib.sha256(manifest.folder.read(shard.file)).hexdigest() != shard.sha256:
            raise Refusal(f"{folder}/{shard.file}", "is damaged", "copy it again, or " + AGAIN)
    return manifest


class Writer:
    """Adds records to a folder, a shard at a time; a context, which commits what is left when it ends.

    Processes that write to one folder at once differ in `process`. `limit`: bytes of records in a shard.
    `entries`: all that was there, whoever wrote it, but for shards that are missing or cut, which this
    writer forgets if they are of its process. `done`: the keys of those and of all that were added. Raises
    Refusal where the folder has records of another header, or cannot be written.
    """

    def __init__(self, folder: str | os.PathLike, header: Header, process: int = 0, limit: int = LIMIT):
        self.folder, self.header, self.limit = Folder(str(folder)), header, limit
        self._manifest = f"manifest-{process:05d}.json"
        self._shard = f"clips-{process:05d}-{{:05d}}.arrayrecord"
        self._pending: list[tuple[bytes, Entry]] = []
        self._bytes = 0
        self.folder.make()
        sizes = self.folder.sizes()
        written = _written(self.folder, sizes)
        for name, part in written.items():
            part.header.check(header, f"{folder}/{name}")
            written[name] = _sound(part, sizes)
        self.entries = [entry for part in written.values() for entry in part.entries]
        self.done = {entry.key for entry in self.entries}
        self._ours = written.get(self._manifest, Manifest(self.folder, header, {}, []))

    def add(self, record: Record, key: str) -> None:
        """Adds a record. Raises ValueError where it is not of the header, is unsound, or has a key done."""
        if key in self.done:
            raise ValueError(f"{record.name}: a record of key {key} is there already")
        payload = pack(record)
        self._check(record)
        if self._pending and self._bytes + len(payload) > self.limit:
            self.commit()
        names = map(self._shard.format, itertools.count())
        file = next(name for name in names if name not in self._ours.shards)
        where = file, len(self._pending)
        self._pending.append((payload, Entry(*where, _text(record.name), key, record.latents.shape[:3])))
        self._bytes += len(payload)
        self.done.add(key)

    def _check(self, record: Record) -> None:
        channels, (length, width) = record.latents.shape[-1], record.states.shape
        header = self.header
        if (channels, width) != (header.channels, header.text_width) or length > header.text_length:
            came = f"{channels} channels and states [{length} {width}]"
            right = f"{header.channels} and at most [{header.text_length} {header.text_width}]"
            raise ValueError(f"{record.name}: has {came}; {right} is right")

    def commit(self) -> None:
        """Writes what was added as a shard, and then the manifest that names it."""
        if not self._pending:
            return
        payloads, entries = zip(*self._pending, strict=True)
        shard = self._write(entries[0].shard, payloads)
        shards, entries = self._ours.shards | {shard.file: shard}, [*self._ours.entries, *entries]
        self._save(self._ours._replace(shards=shards, entries=entries))
        self._pending, self._bytes = [], 0

    def supersede(self, entries: Iterable[Entry]) -> None:
        """Commits, and takes entries, whoever wrote them, out of what the folder holds, not out of shards."""
        self.commit()
        gone = frozenset(each.place for each in entries)
        self._save(_without(self._ours, gone)._replace(superseded=self._ours.superseded | gone))

    def _save(self, ours: Manifest) -> None:
        with self.folder.write(self._manifest) as draft:
            shards = [each._asdict() for each in ours.shards.values()]
            stored = {"header": dataclasses.asdict(self.header), "shards": shards, "entries": ours.entries}
            stored |= {"superseded": sorted(ours.superseded)}
            draft.write_text(json.dumps(stored, ensure_ascii=False), "utf-8")
        self._ours = ours

    def _write(self, file: str, payloads: Sequence[bytes]) -> Shard:
        from array_record.python.array_record_module import ArrayRecordWriter

        with self.folder.write(file) as draft:
            try:
                writer = ArrayRecordWriter(str(draft), WRITE)
                for payload in payloads:
                    writer.write(payload)
                writer.close()
            except RuntimeError as failure:
                # The library has one kind of error, and says in words what the system said.
                right = "free some space or choose another place; what was written before is whole"
                raise Refusal(self.folder.where, f"cannot be written ({failure})", right) from failure
            return Shard(file, len(payloads), draft.stat().st_size, digest(draft))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *stopped) -> None:
        # Also when the run fails: what was encoded till then is sound.
        self.commit()


class Reader:
    """Reads the records of a manifest, from any number of threads; a worker process opens its own files."""

    def __init__(self, manifest: Manifest):
        self.manifest, self._lock = manifest, threading.Lock()
        self._open = functools.lru_cache(OPEN)(self._opened)

    def __reduce__(self) -> tuple:
        return Reader, (self.manifest,)

    def _opened(self, file: str):
        from array_record.python.array_record_module import ArrayRecordReader

        shard = self.manifest.shards[file]
        with self._lock:
            reader = ArrayRecordReader(str(self.manifest.folder.fetch(shard)), READ)
        # A file that was cut reads as one of no records, without an error.
        if (count := reader.num_records()) != shard.records:
            raise ValueError(f"{file} has {count} records of {shard.records}")
        return reader

    def read(self, entry: Entry) -> Record:
        """The record of an entry. Raises ValueError, saying what is wrong, where it cannot be read."""
        try:
            (payload,) = self._open(entry.shard).read([entry.index])
        except (RuntimeError, IndexError) as failure:
            raise ValueError(f"cannot be read ({failure})") from failure
        record = unpack(payload)
        if record.latents.shape[:3] != entry.bucket:
            raise ValueError(f"has latents of {record.latents.shape[:3]}, and is listed as {entry.bucket}")
        return record
