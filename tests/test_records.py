"""Records come back as they were written, and what is damaged, cut or of another make is found."""

import json
import os
import signal
import subprocess
import sys
import time

import fsspec
import ml_dtypes
import numpy as np
import pytest

from fvdm_jax.data import records
from fvdm_jax.data.records import Header, Reader, Record, Writer, load, pack, unpack, verify
from fvdm_jax.program import Refusal

HEADER = Header(4, 6, 5, 16.0, "tiny", {"multiples": (1, 2)}, {"width": 6})


SOUND = {"version": 1, "name": "a", "caption": "b"}


def clip(number: int, frames: int = 2, dtype=np.float32) -> Record:
    rng = np.random.default_rng(number)
    latents = rng.standard_normal((frames, 3, 4, 4)).astype(dtype)
    return Record(
        f"{number}.mp4", f"clip {number}", latents, rng.standard_normal((number % 5, 6)).astype(dtype)
    )


def fill(folder, numbers, process=0, limit=2000) -> None:
    with Writer(folder, HEADER, process, limit) as writer:
        for number in numbers:
            writer.add(clip(number), f"key {number}")


def same(a: Record, b: Record) -> bool:
    arrays = zip(a[2:], b[2:], strict=True)
    return a[:2] == b[:2] and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in arrays)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_record_comes_back_as_it_was(dtype):
    record = clip(3, dtype=dtype)
    strided = record._replace(latents=np.asfortranarray(record.latents), caption="Köln, 東京 🎬")
    assert same(unpack(pack(strided)), strided)


def test_a_file_name_that_is_no_text_does_not_stop_a_run(tmp_path):
    with Writer(tmp_path, HEADER) as writer:
        writer.add(clip(0)._replace(name=os.fsdecode(b"caf\xe9.mp4")), "key")
    manifest = load(tmp_path)
    assert manifest.entries[0].name == Reader(manifest).read(manifest.entries[0]).name == "caf?.mp4"


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"latents": np.full((1, 1, 1, 4), np.nan, np.float32)}, "latents that are not finite"),
        ({"states": np.full((1, 6), np.inf, ml_dtypes.bfloat16)}, "states that are not finite"),
        ({"latents": np.zeros((1, 1, 4), np.float32)}, "4 dimensions"),
        ({"states": np.zeros((1, 6))}, "float64"),
    ],
)
def test_an_unsound_record_is_not_packed(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        pack(clip(0)._replace(**change))


def test_a_payload_that_is_no_record_is_said_to_be_none(monkeypatch):
    from safetensors.numpy import save

    whole = pack(clip(1))
    words, short = ({"record": json.dumps(each)} for each in (SOUND, {"version": 1}))
    latents, states = clip(1)[2:]
    for payload, complaint in (
        (whole[:-1], "cut"),
        (b"", "cut"),
        (b"\xff" * 100, "cut"),
        (save({"latents": latents}, words), "lacks states"),
        (save({"latents": latents, "states": states}, short), "lacks caption, name"),
        (save({"latents": latents, "states": states}), "no record"),
        (save({"latents": latents, "states": states}, {"record": "{"}), "no record"),
        (save({"latents": latents.astype(np.int32), "states": states}, words), "I32"),
        (save({"latents": latents * np.inf, "states": states}, words), "not finite"),
    ):
        with pytest.raises(ValueError, match=complaint):
            unpack(payload)
    monkeypatch.setattr(records, "VERSION", 2)
    with pytest.raises(ValueError, match="version 1"):
        unpack(whole)


def test_a_folder_gives_back_what_was_written(tmp_path):
    fill(tmp_path / "new" / "folder", range(9))
    manifest = verify(tmp_path / "new" / "folder")
    assert manifest.header.check(HEADER, "") is None
    assert len(manifest.shards) > 2
    reader = Reader(manifest)
    for number, entry in enumerate(manifest.entries):
        assert entry[2:] == (f"{number}.mp4", f"key {number}", (2, 3, 4))
        assert same(reader.read(entry), clip(number))


def test_the_same_clips_make_the_same_bytes(tmp_path):
    for name in "ab":
        fill(tmp_path / name, range(7))
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_processes_write_beside_each_other_and_a_clip_counts_once(tmp_path):
    first, second = Writer(tmp_path, HEADER, 0), Writer(tmp_path, HEADER, 1)
    for number in range(4):
        first.add(clip(number), f"key {number}")
        second.add(clip(number + 3), f"key {number + 3}")
    first.commit()
    second.commit()
    assert [entry.key for entry in load(tmp_path).entries] == [f"key {n}" for n in range(7)]
    assert Writer(tmp_path, HEADER, 2).done == {f"key {n}" for n in range(7)}


def test_a_writer_goes_on_where_another_ended(tmp_path):
    fill(tmp_path, range(5))
    shards = {file: (tmp_path / file).stat().st_mtime_ns for file in load(tmp_path).shards}
    writer = Writer(tmp_path, HEADER)
    with pytest.raises(ValueError, match="key 3 is there"):
        writer.add(clip(3), "key 3")
    fill(tmp_path, range(5, 8))
    assert [entry.key for entry in verify(tmp_path).entries] == [f"key {n}" for n in range(8)]
    assert all((tmp_path / file).stat().st_mtime_ns == when for file, when in shards.items())


def test_what_was_added_before_a_failure_is_kept(tmp_path):
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path, HEADER) as writer:
        writer.add(clip(0), "key 0")
        raise KeyboardInterrupt
    assert len(verify(tmp_path).entries) == 1


KILLED = """
import sys
sys.path.insert(0, "tests")
from test_records import HEADER, Writer, clip
writer, number = Writer(sys.argv[1], HEADER, limit=2000), 0
while True:
    if f"key {number}" not in writer.done:
        writer.add(clip(number), f"key {number}")
    number += 1
"""


def test_a_killed_run_leaves_whole_shards_and_repeats_none(tmp_path):
    counts = []
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path])
        began, before = time.monotonic(), len(list(tmp_path.glob("clips*")))
        while len(list(tmp_path.glob("clips*"))) < before + 5 and time.monotonic() - began < 60:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        entries = verify(tmp_path).entries
        assert [entry.key for entry in entries] == [f"key {n}" for n in range(len(entries))]
        counts.append(len(entries))
    assert counts[1] > counts[0] > 0
    fill(tmp_path, range(counts[1], counts[1] + 1))
    assert not list(tmp_path.glob(".fvdm*"))


def test_a_record_that_is_not_of_the_header_is_not_added(tmp_path):
    writer = Writer(tmp_path, HEADER)
    for change in ({"latents": np.zeros((1, 2, 2, 3), np.float32)}, {"states": np.zeros((6, 6), np.float32)}):
        with pytest.raises(ValueError, match="4 and at most"):
            writer.add(clip(0)._replace(**change), "key")


@pytest.mark.parametrize("field, value", [("fps", 24.0), ("vae", {"multiples": (1, 4)}), ("model", "other")])
def test_records_of_another_make_are_refused_with_the_difference(tmp_path, field, value):
    import dataclasses

    fill(tmp_path, range(2))
    other = dataclasses.replace(HEADER, **{field: value})
    for use in (lambda: load(tmp_path, other), lambda: Writer(tmp_path, other)):
        with pytest.raises(Refusal, match=f"{field} is .*not") as refusal:
            use()
        assert "channels" not in str(refusal.value)


@pytest.mark.fault("T8")
def test_a_shard_that_is_missing_cut_or_damaged_is_named(tmp_path):
    fill(tmp_path, range(9))
    manifest = load(tmp_path)
    file = tmp_path / list(manifest.shards)[1]
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(Refusal, match=f"{file.name}: is damaged"):
        verify(tmp_path)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Refusal, match=f"{file.name}: has {len(whole) // 2} bytes of {len(whole)}"):
        load(tmp_path)
    cut = [entry for entry in manifest.entries if entry.shard == file.name]
    with pytest.raises(ValueError, match=f"0 records of {len(cut)}"):
        Reader(manifest).read(cut[0])
    file.unlink()
    with pytest.raises(Refusal, match=f"{file.name}: is missing"):
        load(tmp_path)
    # The next run encodes its clips again, and only those.
    assert Writer(tmp_path, HEADER).done == {entry.key for entry in manifest.entries} - {e.key for e in cut}
    fill(tmp_path, [int(entry.key.split()[1]) for entry in cut])
    assert {entry.key for entry in verify(tmp_path).entries} == {f"key {n}" for n in range(9)}


def test_no_flipped_bit_is_read_as_a_clip(tmp_path):
    fill(tmp_path, range(1, 3), limit=10**6)
    manifest = load(tmp_path)
    file, rng = tmp_path / manifest.entries[0].shard, np.random.default_rng(0)
    whole, found = bytearray(file.read_bytes()), 0
    for place in rng.integers(0, 1500, 100):
        damaged = whole.copy()
        damaged[place] ^= 1 << rng.integers(8)
        file.write_bytes(damaged)
        reader = Reader(manifest)
        try:
            assert all(same(reader.read(e), clip(n)) for n, e in enumerate(manifest.entries, 1))
        except ValueError:
            found += 1
    assert found > 80


@pytest.mark.parametrize("content", ["", "[]", '{"header": {}}', '{"header": {"version": 9}}'])
def test_a_manifest_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "manifest-00000.json").write_text(content)
    with pytest.raises(Refusal, match="manifest-00000.json is (no manifest|of version 9)"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["absent", "file", "nothing://a/b"])
def test_a_folder_that_is_none_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("")
    where = name if "://" in name else tmp_path / name
    with pytest.raises(Refusal, match="holds no records|cannot be opened"):
        load(where)
    if name != "absent":
        with pytest.raises(Refusal, match="cannot be"):
            Writer(where, HEADER)


FULL = """
import resource, signal, sys
sys.path.insert(0, "tests")
from test_records import HEADER, Writer, clip, fill, records
import numpy as np
fill(sys.argv[1], range(3))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
with Writer(sys.argv[1], HEADER) as writer:
    writer.add(clip(3)._replace(latents=np.ones((9, 99, 99, 4), np.float32)), "large")
"""


def test_a_full_disk_is_a_refusal_and_leaves_what_was_whole(tmp_path):
    run = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True)
    assert "Refusal: error:" in run.stderr and "cannot be written" in run.stderr
    assert len(verify(tmp_path).entries) == 3
    assert not list(tmp_path.glob(".fvdm*"))


@pytest.fixture
def remote(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield "memory://bucket/records"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_a_remote_folder_is_written_read_and_kept_in_the_cache(remote, tmp_path):
    fill(remote, range(5))
    fill(remote, range(5, 7))
    manifest = verify(remote)
    reader = Reader(manifest)
    assert not list(tmp_path.rglob("*.arrayrecord"))
    for number, entry in enumerate(manifest.entries):
        assert same(reader.read(entry), clip(number))
    assert len(list(tmp_path.rglob("*.arrayrecord"))) == len(manifest.shards)
    fsspec.filesystem("memory").rm(f"/bucket/records/{manifest.entries[0].shard}")
    assert same(Reader(manifest).read(manifest.entries[0]), clip(0))


def test_a_remote_shard_that_is_damaged_is_not_taken(remote, tmp_path):
    fill(remote, range(2))
    manifest = load(remote)
    path = f"/bucket/records/{manifest.entries[0].shard}"
    files = fsspec.filesystem("memory")
    files.pipe_file(path, files.cat_file(path)[:-1] + b"x")
    with pytest.raises(ValueError, match="is not what was written"):
        Reader(manifest).read(manifest.entries[0])
    assert not list(tmp_path.rglob("*.arrayrecord"))


def test_the_manifest_is_plain_json(tmp_path):
    fill(tmp_path, range(1))
    stored = json.loads((tmp_path / "manifest-00000.json").read_text())
    assert stored["header"]["version"] == 1
    assert stored["entries"] == [
        ["clips-00000-00000.arrayrecord", 0, "0.mp4", "key 0", [2, 3, 4]],
    ]
