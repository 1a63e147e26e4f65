"""Batches of encoded clips: batch s follows from the folder, the seed and s alone, whoever reads it.

All clips of a batch have one size (a bucket). In each epoch of a bucket every clip of it is seen once; the
buckets take turns in proportion to their clips. Of what is used here only grain imports jax, when batches
are made.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from fvdm_jax.data.records import AGAIN, Entry, Header, Reader, Record, load
from fvdm_jax.program import Refusal, plain

Bucket = tuple[int, int, int]


class Batch(NamedTuple):
    """Rows of a batch: latents [b f h w c] and states [b l e], float32, the states padded with zeros.

    `names`: of each row's record. `bad`: records that could not be read, with the reason; each row of such
    a one holds the next good record of its bucket.
    """

    latents: np.ndarray
    states: np.ndarray
    names: tuple[str, ...]
    bad: dict[str, str]


class Batches:
    """The batches of a folder of records, by number: `batches[s]` has this process's rows of batch s.

    `batch`: rows over all processes; `process`: (index, count), of which each takes a block of rows in order.
    `held_out`: clips that are never trained on, the same for every seed. `bad`: all records found so far
    that cannot be read, with the reason. Raises Refusal where the folder has nothing to train on, was made
    with a header that is not the one expected, or the processes cannot share a batch.
    """

    def __init__(
        self,
        folder: str,
        batch: int,
        seed: int,
        held_out: int = 0,
        process: tuple[int, int] = (0, 1),
        expected: Header | None = None,
    ):
        self.manifest = load(folder, expected)
        self.bad: dict[str, str] = {}
        self._folder, self._batch, self._process = folder, batch, process
        if batch < 1 or batch % process[1]:
            right = f"give a multiple of {process[1]}, the number of processes"
            raise Refusal("--batch", f"{batch} clips cannot be shared", right)
        # By a hash of what they are, so that a clip stays on its side when others join the folder.
        apart = sorted(self.manifest.entries, key=lambda entry: hashlib.sha256(entry.key.encode()).digest())
        if held_out >= len(apart):
            what = f"{held_out} clips are held out of {len(apart)}"
            raise Refusal("--held-out", what, "leave some to train on")
        self._held_out = _buckets(apart[:held_out])
        kept = {entry.key for entry in apart[held_out:]}
        self.buckets = _buckets([entry for entry in self.manifest.entries if entry.key in kept])
        self._reader = Reader(self.manifest)
        self._batches = self._dataset(seed)

    def _dataset(self, seed: int):
        """All batches from now to eternity, as grain's MapDataset."""
        import grain

        index, count = self._process
        rows = slice(index * self._batch // count, (index + 1) * self._batch // count)
        sets = []
        for number, entries in enumerate(self.buckets.values()):
            load_rows = _Rows(self._reader, entries, rows)
            # Buckets of equal size would otherwise be shuffled alike.
            order = grain.MapDataset.range(len(entries)).seed((seed + number) % 2**32).shuffle().repeat()
            # What has no end has no remainder; but without this, grain overflows where a batch is one clip.
            sets.append(order.batch(self._batch, drop_remainder=True).map(load_rows))
        return grain.MapDataset.mix(sets, [len(entries) for entries in self.buckets.values()])

    def __getitem__(self, step: int) -> Batch:
        return self._received(self._batches[step])

    def _received(self, batch: Batch) -> Batch:
        """The batch, its bad records noted. Raises Refusal where a bucket has no others."""
        self.bad |= batch.bad
        if not len(batch.names):
            name, reason = next(iter(batch.bad.items()))
            what = f"no clip of a bucket of {len(batch.bad)} can be read; {plain(name)} {reason}"
            raise Refusal(self._folder, what, AGAIN)
        return batch

    def stream(self, start: int = 0, threads: int = 4, ahead: int = 4, workers: int = 0) -> "Stream":
        """Batches start, start + 1, …, up to `ahead` of them read in advance by threads.

        `workers`: processes that read instead, for machines where one process cannot keep up; each has
        `threads` and reads `ahead` by itself, and imports the main program, which needs its
        `if __name__ == "__main__"`.
        """
        return Stream(self, start, (threads, ahead, workers))

    def held_out(self) -> dict[Bucket, list[Record]]:
        """The clips that are not trained on, by bucket; those that cannot be read are noted in `bad`."""
        found: dict[Bucket, list[Record]] = {}
        for bucket, entries in self._held_out.items():
            for entry in entries:
                try:
                    found.setdefault(bucket, []).append(_read(self._reader, entry))
                except ValueError as broken:
                    self.bad[entry.name] = str(broken)
        return found

    def describe(self) -> str:
        """The buckets as a table: their size in latent frames and pixels, and their clips."""
        total = sum(map(len, self.buckets.values()))
        lines = ["  f ×   h ×   w    clips   share   held out"]
        for f, h, w in sorted(self.buckets.keys() | self._held_out.keys()):
            clips, apart = (len(each.get((f, h, w), [])) for each in (self.buckets, self._held_out))
            lines.append(f"{f:3} × {h:3} × {w:3} {clips:8,} {clips / total:7.1%} {apart:10,}")
        return "\n".join(lines)


class Stream:
    """Batches one after the other without end; all of its state is the number of the next."""

    def __init__(self, batches: Batches, start: int, reading: tuple[int, int, int]):
        self._batches, self._reading = batches, reading
        self._iterator = None
        self.set_state({"step": start})

    def get_state(self) -> dict[str, int]:
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on from a state that `get_state` gave, of a stream with any number of threads or workers."""
        self.close()
        self._step = state["step"]

    def _started(self):
        import grain

        threads, ahead, workers = self._reading
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        # Cut at the front, since the state of grain's own iterator is one for each worker.
        batches = self._batches._batches[self._step :].to_iter_dataset(options)
        if workers:
            _settle_flags()
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(workers, ahead))
        return iter(batches)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._started()
        batch = self._batches._received(next(self._iterator))
        self._step += 1
        # What workers send lies in shared memory, which must not outlive the stream.
        if self._reading[2]:
            batch = batch._replace(latents=np.array(batch.latents), states=np.array(batch.states))
        return batch

    def close(self) -> None:
        """Ends the threads and workers; the stream starts others when it is asked for more."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


class _Rows:
    """Reads the rows of this process, given the places of a whole batch among a bucket's entries."""

    def __init__(self, reader: Reader, entries: list[Entry], rows: slice):
        self.reader, self.entries, self.rows = reader, entries, rows

    def __call__(self, places: np.ndarray) -> Batch:
        bad: dict[str, str] = {}
        records = [self._good(int(place), bad) for place in places[self.rows]]
        if None in records:
            nothing = np.zeros((0,), np.float32)
            return Batch(nothing, nothing, (), bad)
        header = self.reader.manifest.header
        latents = np.empty((len(records), *records[0].latents.shape), np.float32)
        states = np.zeros((len(records), header.text_length, header.text_width), np.float32)
        for row, record in enumerate(records):
            latents[row], states[row, : len(record.states)] = record.latents, record.states
        return Batch(latents, states, tuple(record.name for record in records), bad)

    def _good(self, place: int, bad: dict[str, str]) -> Record | None:
        """The record at a place, or the first after it that can be read."""
        for step in range(len(self.entries)):
            entry = self.entries[(place + step) % len(self.entries)]
            try:
                return _read(self.reader, entry)
            except ValueError as broken:
                bad[entry.name] = str(broken)


def _read(reader: Reader, entry: Entry) -> Record:
    """The record of an entry. Raises ValueError where it is not as the folder's header says."""
    record, header = reader.read(entry), reader.manifest.header
    shapes = (record.latents.shape[-1], record.states.shape[-1])
    if shapes != (header.channels, header.text_width) or len(record.states) > header.text_length:
        raise ValueError(f"has {shapes[0]} channels and states {record.states.shape}; the header differs")
    return record


def _buckets(entries: list[Entry]) -> dict[Bucket, list[Entry]]:
    """The entries by bucket, in an order that does not depend on who encoded what when."""
    found: dict[Bucket, list[Entry]] = {}
    for entry in sorted(entries, key=lambda entry: (entry.bucket, entry.key)):
        found.setdefault(entry.bucket, []).append(entry)
    return found


def _settle_flags() -> None:
    """Lets grain 0.2.18 start workers from a program that is not of absl (google/grain issue 1361)."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
