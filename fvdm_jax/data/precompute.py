"""Encodes clips and captions for training: VAE latents and text states, in shards of records."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, islice
from pathlib import Path
from shutil import disk_usage
from typing import NamedTuple

import numpy as np

from fvdm_jax.data.corpus import find
from fvdm_jax.data.cutting import Clip, Row, file_of, key, named, read, report, rows, summary
from fvdm_jax.data.job import Job, parse
from fvdm_jax.program import Refusal, leave, plain, run
from fvdm_jax.progress import Stages

COMMIT = 120.0
"""Seconds after which what was encoded is written, though the shard could hold more."""


class Todo(NamedTuple):
    """A clip that is to be encoded, and the key of its record."""

    clip: Clip
    key: str


def main(argv: list[str]) -> None:
    """Encodes what `argv` says, or reports what would be."""
    job = parse(argv)
    index, count = _started() if job.distributed else job.process
    job = dataclasses.replace(job, process=(index, count))
    found = find(job.sources, job.caption, job.cut.fps_in is not None or not job.cut.images)[index::count]
    looked = []
    with Stages() as stages:
        stages.expect("look", len(found))
        with stages("look"):
            for row in rows(found, job.cut):
                looked.append(row)
                stages.step()
    if job.report:
        print(report(looked))
    print(summary(looked))
    if job.report:
        return
    _check_drops(job, looked)
    _encode(job, looked)


def _started() -> tuple[int, int]:
    """Which of how many processes this is, as the environment says (a pod of TPUs, Slurm, GKE)."""
    import jax

    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as wrong:
        what = f"the other processes are not found ({wrong})"
        raise Refusal("--distributed", what, "share the files with --process 0/4 and so on") from wrong
    return jax.process_index(), jax.process_count()


def _check_drops(job: Job, looked: Sequence[Row]) -> None:
    none = [row for row in looked if row.reason]
    if none and not job.allow_drop:
        what = f"{len(none):,} of {len(looked):,} files give no clip; the first: {plain(none[0].reason, 400)}"
        right = "--report shows all, --allow-drop goes on without them"
        raise Refusal(plain(none[0].source.path, 250), what, right)
    if looked and len(none) == len(looked):
        raise Refusal(plain(none[0].source.path, 250), f"gives no clip, and no other does: {none[0].reason}")


def _encode(job: Job, looked: Sequence[Row]) -> None:
    """Encodes what the folder does not have yet, and takes out of it what has been replaced."""
    with Stages() as stages:
        with stages("load"):
            import jax

            from fvdm_jax import machine
            from fvdm_jax.data.encoder import Encoder
            from fvdm_jax.data.records import Writer, load

            machine.keep_compiled_programs()
            encoder = Encoder(job.model, job.batch or jax.local_device_count(), job.dtype, stages)
            header = encoder.header(job.cut.fps)
        made = [clip for row in looked for clip in row.clips]
        every = [Todo(clip, key(clip, job.cut, job.dtype, header.model)) for clip in made]
        with Writer(job.out, header, job.process[0], job.shard) as writer:
            todo = [one for one in every if one.key not in writer.done]
            print(f"{len(every) - len(todo):,} of {len(every):,} already encoded")
            _check_room(job, sum(encoder.bytes(one.clip.bucket) for one in todo))
            encoder.save_nothing(writer.folder)
            if todo:
                stages.expect("encode", len(todo))
            damaged = _fill(job, todo, encoder, writer, stages)
        gone = _replaced(looked, every, writer.entries)
        if gone:
            writer.supersede(gone)
            print(f"{len(gone):,} older records of the same files are replaced")
    for refusal in damaged:
        print(f"note: left out: {refusal}".replace("error: ", ""), file=sys.stderr)
    holds = len(load(job.out).entries) if writer.done else 0
    print(f"wrote {len(todo) - len(damaged):,} records; {job.out} holds {holds:,}")


def _fill(job: Job, todo: list[Todo], encoder, writer, stages: Stages) -> list[Refusal]:
    """Encodes and adds the clips, in batches; the damaged ones that were left out."""
    from fvdm_jax.data.records import Record

    written, damaged = time.monotonic(), []
    for batch in _ahead(_batches(_pixels(job, todo, damaged), encoder.batch), stages):
        made = encoder.latents([pixels for _, pixels in batch])
        for (one, _), latents in zip(batch, made, strict=True):
            caption = one.clip.source.caption
            record = Record(one.clip.name, caption, latents, encoder.states(caption))
            with stages("encode"):
                writer.add(record, one.key)
                stages.step()
        if time.monotonic() - written > COMMIT:
            writer.commit()
            written = time.monotonic()
    return damaged


def _pixels(job: Job, todo: list[Todo], damaged: list[Refusal]) -> Iterator[tuple[Todo, np.ndarray]]:
    """Each clip with its pixels [t H W 3], those of a bucket together; the damaged are noted, or refused."""
    order = sorted(todo, key=lambda one: (one.clip.bucket, named(one.clip.source), one.clip.skip))
    for _, group in groupby(order, key=lambda one: (one.clip.bucket, one.clip.source)):
        group = list(group)
        left = iter(group)
        try:
            for pixels in read([one.clip for one in group], job.cut):
                yield next(left), pixels
        except Refusal as refusal:
            if not job.allow_drop:
                right = "mend it, or --allow-drop goes on without it; what is encoded is not encoded again"
                raise Refusal(refusal.where, refusal.what, right) from refusal
            damaged += [Refusal(one.clip.name, refusal.what) for one in left]


def _batches(items: Iterator, most: int) -> Iterator[list]:
    for _, alike in groupby(items, key=lambda item: item[0].clip.bucket):
        while batch := list(islice(alike, most)):
            yield batch


def _ahead(items: Iterator, stages: Stages) -> Iterator:
    """The items, each made in a thread while the one before it is used."""
    with contextlib.closing(items), ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while True:
            with stages("read"):
                item = coming.result()
            if item is None:
                return
            coming = pool.submit(next, items, None)
            yield item


def _replaced(looked: Sequence[Row], every: Sequence[Todo], entries: Sequence) -> list:
    """The entries of files that were looked at which are none of the clips that these give now."""
    files, keys = {named(row.source) for row in looked}, {one.key for one in every}
    return [entry for entry in entries if entry.key not in keys and file_of(entry.name, files)]


def _check_room(job: Job, needed: int) -> None:
    """Raises Refusal unless so many bytes are free where the records are to be, if that is a disk."""
    place = Path(job.out).absolute()
    if "://" in job.out:
        return
    while not place.exists():
        place = place.parent
    if (free := disk_usage(place).free) < needed:
        what = f"the records need {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free in {plain(place)}"
        raise Refusal("--out", what, "free some space, or give a place on another disk")


def cli() -> None:
    """The program, as `python -m fvdm_jax.data.precompute` and as `fvdm-precompute`."""
    leave(run(main))


if __name__ == "__main__":
    cli()
