"""Batch s is the same whoever reads it and however he came there, and no bad record passes for a clip."""

import json
import re
from collections import Counter
from itertools import islice

import fsspec
import numpy as np
import pytest
import small

from fvdm_jax import runs
from fvdm_jax.data import records
from fvdm_jax.data.pipeline import Batches
from fvdm_jax.data.records import Header, Record, Writer, load
from fvdm_jax.models.dit import DiTConfig
from fvdm_jax.program import Refusal
from fvdm_jax.train import main

HEADER = Header(4, 6, 5, 16.0, "tiny", {}, {})
BUCKETS = {(1, 2, 3): 4, (2, 2, 2): 12, (3, 2, 2): 8}


def clip(bucket, number: int) -> Record:
    """A clip whose every value is its number, so that rows can be told from the arrays alone."""
    latents = np.full((*bucket, 4), number, np.float16)
    return Record(f"{bucket[0]}-{number}", "", latents, np.full((number % 5, 6), number, np.float32))


def fill(folder, buckets=BUCKETS, limit=1200) -> None:
    with Writer(folder, HEADER, limit=limit) as writer:
        for bucket, count in buckets.items():
            for number in range(count):
                writer.add(clip(bucket, number), f"{bucket} {number}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    fill(folder := tmp_path_factory.mktemp("records"))
    return folder


def damage(folder, entry) -> None:
    """Turns bits of a record, in the middle of its name."""
    file = folder / entry.shard
    content = bytearray(file.read_bytes())
    content[content.index(f'"{entry.name}\\"'.encode()) + 2] ^= 255
    file.write_bytes(content)


def same(a, b) -> bool:
    return a.names == b.names and all(np.array_equal(x, y) for x, y in zip(a[:2], b[:2], strict=True))


def test_a_batch_is_of_one_size_float32_and_its_rows_are_the_clips(folder):
    batches = Batches(folder, 4, 0)
    for step in range(12):
        batch = batches[step]
        assert batch.latents.dtype == batch.states.dtype == np.float32
        assert batch.states.shape == (4, 5, 6) and not batch.bad
        for row, name in enumerate(batch.names):
            frames, number = map(int, name.split("-"))
            assert batch.latents.shape[1] == frames
            assert (batch.latents[row] == number).all()
            assert (batch.states[row, : number % 5] == number).all()
            assert not batch.states[row, number % 5 :].any()


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_batch_that_one_would_have(folder, count):
    alone = Batches(folder, 4, 3)
    shares = [Batches(folder, 4, 3, process=(index, count)) for index in range(count)]
    for step in (0, 1, 2, 7, 1000):
        parts = [share[step] for share in shares]
        assert all(len(part.names) == 4 // count for part in parts)
        assert sum((part.names for part in parts), ()) == alone[step].names
        assert np.array_equal(np.concatenate([part.latents for part in parts]), alone[step].latents)


def test_every_epoch_has_every_clip_once_in_an_order_of_its_own(folder):
    batches, seen = Batches(folder, 4, 0), {}
    for step in range(3 * sum(BUCKETS.values()) // 4):
        batch = batches[step]
        seen.setdefault(batch.latents.shape[1:4], []).extend(batch.names)
    for bucket, count in BUCKETS.items():
        epochs = [seen[bucket][i : i + count] for i in range(0, 3 * count, count)]
        assert all(len(set(epoch)) == count for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_order_is_the_seeds(folder):
    first, again, other = (Batches(folder, 4, seed) for seed in (0, 0, 1))
    assert all(same(first[step], again[step]) for step in range(6))
    assert not all(same(first[step], other[step]) for step in range(6))


def test_buckets_take_turns_in_proportion_to_their_clips(folder):
    batches = Batches(folder, 4, 0)
    turns = [batches[step].latents.shape[1:4] for step in range(60)]
    assert Counter(turns) == {bucket: 60 * count // 24 for bucket, count in BUCKETS.items()}
    # Not one bucket after the other: in any 12 batches there are all, each close to its share.
    for start in range(48):
        window = Counter(turns[start : start + 12])
        assert all(abs(window[bucket] - count / 2) <= 1 for bucket, count in BUCKETS.items())


def test_a_bucket_smaller_than_a_batch_fills_it(tmp_path):
    fill(tmp_path, {(1, 2, 2): 3})
    batch = Batches(tmp_path, 8, 0)[0]
    counts = Counter(batch.names)
    assert sorted(counts.values()) == [2, 3, 3]


@pytest.mark.parametrize("reading", [{}, {"threads": 1, "ahead": 1}, {"threads": 0, "ahead": 0}])
def test_reading_on_is_reading_by_number_and_resumes_anywhere(folder, reading):
    batches = Batches(folder, 4, 5)
    stream, states = batches.stream(0, **reading), []
    for step in range(10):
        states.append(stream.get_state())
        assert same(next(stream), batches[step])
    for step, state in enumerate(states):
        assert state == {"step": step}
        stream.set_state(state)
        assert stream.get_state() == state
        assert same(next(stream), batches[step]) and same(next(stream), batches[step + 1])
        with_start = batches.stream(step, **reading)
        assert same(next(with_start), batches[step])
        with_start.close()
    stream.close()


def test_a_stream_far_into_training_starts_there(folder):
    batches = Batches(folder, 4, 5)
    stream = batches.stream(1_234_567)
    assert same(next(stream), batches[1_234_567])
    stream.close()


def test_worker_processes_give_the_same_batches_and_bad_records(tmp_path):
    fill(tmp_path)
    damage(tmp_path, load(tmp_path).entries[0])
    batches, alone = Batches(tmp_path, 4, 5), Batches(tmp_path, 4, 5)
    stream = batches.stream(3, workers=2)
    for step, batch in enumerate(islice(stream, 8), 3):
        assert same(batch, alone[step])
        assert type(batch.latents) is np.ndarray
    stream.close()
    assert stream.get_state() == {"step": 11}
    assert same(next(stream), alone[11])
    stream.close()
    assert batches.bad == alone.bad and len(batches.bad) == 1


def test_what_is_held_out_is_never_trained_on_and_does_not_depend_on_the_seed(folder):
    one, other = (Batches(folder, 4, seed, held_out=5) for seed in (0, 9))
    apart = {record.name for clips in one.held_out().values() for record in clips}
    assert len(apart) == 5
    assert apart == {record.name for clips in other.held_out().values() for record in clips}
    trained = {name for step in range(40) for name in one[step].names}
    assert not trained & apart
    assert len(trained | apart) == sum(BUCKETS.values())
    assert apart < {r.name for clips in Batches(folder, 4, 0, 6).held_out().values() for r in clips}
    for (f, h, w), clips in one.held_out().items():
        assert all(record.latents.shape == (f, h, w, 4) for record in clips)


def test_who_wrote_what_and_when_does_not_matter(folder, tmp_path):
    for process in (1, 0):
        with Writer(tmp_path, HEADER, process) as writer:
            for bucket, count in reversed(BUCKETS.items()):
                for number in range(process, count, 2):
                    writer.add(clip(bucket, number), f"{bucket} {number}")
    one, other = Batches(folder, 4, 2, held_out=3), Batches(tmp_path, 4, 2, held_out=3)
    assert all(same(one[step], other[step]) for step in range(12))


@pytest.mark.fault("T8")
def test_a_bad_record_is_named_and_the_next_good_one_takes_its_place(tmp_path, folder):
    fill(tmp_path)
    entry = next(e for e in load(tmp_path).entries if e.name == "2-7")
    damage(tmp_path, entry)
    sound, batches, changed = Batches(folder, 4, 0), Batches(tmp_path, 4, 0), 0
    order = [e.name for e in batches.buckets[2, 2, 2]]
    instead = order[(order.index(entry.name) + 1) % len(order)]
    for step in range(12):
        names = tuple(instead if name == entry.name else name for name in sound[step].names)
        assert batches[step].names == names
        changed += names != sound[step].names
    assert changed == 2
    assert list(batches.bad) == [entry.name] and "cannot be read" in batches.bad[entry.name]


@pytest.mark.thorough
@pytest.mark.fault("T8", "T11")
def test_a_run_on_twelve_clips_of_which_four_are_bad_goes_on_to_the_bit(tmp_path, capfd):
    data, bad = tmp_path / "records", []
    fill(data, {(2, 2, 2): 12})
    for entry in load(data).entries[1::3]:
        damage(data, entry)
        bad.append(entry.name)
    config = small.training(
        tmp_path, data=str(data), dit=DiTConfig(8, 16, 2, 1, 4, 4, text_width=6, dtype="float32"), text=5,
        batch=8, mesh="data=4,fsdp=2", fresh=True, steps=6, save_every=3, held_out=0, evaluate_every=0,
        max_bad=0.4,
    )  # fmt: skip
    ended = {}
    for name, parts in {"whole": [()], "halves": [("--steps", "3"), ()]}.items():
        for flags in parts:
            assert main([str(config), "--out", str(tmp_path / name), *flags]) == 0
        said = re.sub(r"\s+", " ", capfd.readouterr().err)
        assert all(f"{clip} cannot be read" in said for clip in bad), said
        told = json.loads((tmp_path / name / "checkpoints/6/run/metadata").read_text())["digests"]
        ended[name] = told, [line["loss"] for line in runs.metrics(tmp_path / name)]
    assert ended["whole"] == ended["halves"] and len(ended["whole"][1]) == 6
    with pytest.raises(Refusal, match="--max-bad: 4 records of 12 cannot be read"):
        main([str(config), "--out", str(tmp_path / "strict"), "--max-bad", "0.3"])


@pytest.mark.fault("T8")
def test_a_shard_cut_after_the_start_is_named_clip_by_clip(tmp_path):
    fill(tmp_path)
    batches = Batches(tmp_path, 4, 0)
    shard = batches.buckets[2, 2, 2][0].shard
    file = tmp_path / shard
    file.write_bytes(file.read_bytes()[:1000])
    for step in range(12):
        assert len(batches[step].names) == 4
    cut = {entry.name for entry in batches.manifest.entries if entry.shard == shard}
    assert set(batches.bad) == cut
    assert all("0 records of" in reason for reason in batches.bad.values())


@pytest.mark.fault("T8")
def test_a_record_of_another_size_than_listed_is_bad(tmp_path, monkeypatch):
    fill(tmp_path, {(1, 2, 2): 3})
    odd, plain_unpack = clip((1, 2, 3), 0), records.unpack
    monkeypatch.setattr(
        records, "unpack", lambda payload: odd if b"1-0" in payload else plain_unpack(payload)
    )
    batches = Batches(tmp_path, 3, 0)
    assert set(batches[0].names) == {"1-1", "1-2"}
    assert "(1, 2, 3), and is listed as (1, 2, 2)" in batches.bad["1-0"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bucket_without_a_good_record_is_refused(tmp_path, workers):
    fill(tmp_path, {(1, 2, 2): 3}, limit=10**6)
    stream = Batches(tmp_path, 2, 0).stream(workers=workers)
    file = tmp_path / load(tmp_path).entries[0].shard
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(Refusal, match="no clip of a bucket of 3 can be read"):
        next(stream)
    stream.close()


def test_a_held_out_record_that_is_bad_is_named(tmp_path):
    fill(tmp_path, {(1, 2, 2): 4})
    apart = Batches(tmp_path, 1, 0, held_out=2).held_out()[1, 2, 2]
    damage(tmp_path, next(e for e in load(tmp_path).entries if e.name == apart[0].name))
    batches = Batches(tmp_path, 1, 0, held_out=2)
    assert [record.name for record in batches.held_out()[1, 2, 2]] == [apart[1].name]
    assert list(batches.bad) == [apart[0].name]


def test_what_cannot_be_trained_on_is_refused(folder):
    for arguments, complaint in (
        ({"batch": 3, "process": (0, 2)}, "--batch: 3 clips.*multiple of 2"),
        ({"batch": 0}, "--batch: 0"),
        ({"batch": 4, "held_out": 24}, "--held-out: 24 clips are held out of 24"),
        ({"batch": 4, "expected": Header(4, 6, 5, 24.0, "tiny", {}, {})}, "fps is 16.0, not 24.0"),
    ):
        with pytest.raises(Refusal, match=complaint):
            Batches(folder, seed=0, **arguments)


def test_a_remote_folder_gives_the_same_batches(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fill("memory://bucket/clips")
    remote, local = Batches("memory://bucket/clips", 4, 1), Batches(folder, 4, 1)
    stream = remote.stream()
    assert all(same(next(stream), local[step]) for step in range(12))
    stream.close()
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_the_plan_shows_every_bucket(folder):
    lines = Batches(folder, 4, 0, held_out=4).describe().splitlines()
    assert len(lines) == 1 + len(BUCKETS)
    columns = [line.replace("×", " ").split() for line in lines[1:]]
    assert [tuple(map(int, each[:3])) for each in columns] == sorted(BUCKETS)
    assert sum(int(each[3]) for each in columns) == 20
    assert sum(int(each[5]) for each in columns) == 4
