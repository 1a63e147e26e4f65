"""The reader of torch's files against files that torch wrote, files that mean harm, and damage.

golden/torch/*.pth were saved by torch 2.13.0 on a CPU, their elements random bits of seed 0: `plain` a dict
of float16, float32 and bfloat16; `ordered` the state_dict of a small module, with _metadata; `parameters` two
Parameters; `views` a transposed one, two slices, columns and steps of one shared storage, and permuted ones
of another; `wrapped` the module's dict under state_dict, beside numbers; `shapes` a scalar, empty ones, axes
of one element, the end of a larger storage, and a key that is not ASCII; `kinds` all other element types;
`tied` one Parameter under two keys. expected.npz holds their bits as whole numbers under "file|key|dtype".
"""

import os
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch_cases as cases

from convert import torch_file
from fvdm_jax.program import Refusal

GOLDEN = Path(__file__).parent / "golden" / "torch"
CONTROLS = sorted(path.stem for path in GOLDEN.glob("*.pth"))
OPCODES = b"NRQbcXGJKMstuqrhj().}\x85\x86\x87\x88\x89\x8a"


def bits(path: Path) -> dict:
    """Element type, shape and bytes of every tensor of a file, by key."""
    found = {}
    for key, tensor in torch_file.read(path).items():
        values = tensor.read()
        assert values.dtype == tensor.dtype and values.shape == tensor.shape and values.flags.c_contiguous
        assert tensor.file == path and tensor.bytes == values.nbytes
        found[key] = values.dtype.name, values.shape, values.tobytes()
    return found


def refusal(path: Path) -> str:
    """The one line with which a file is refused, by `read` or when its tensors are read."""
    with pytest.raises(Refusal) as refused:
        bits(path)
    line = str(refused.value)
    assert line.startswith(f"error: {path}: ") and line.isprintable() and len(line) <= 1500
    return line


def expected_bits() -> dict:
    """The same of every control, as it should be read."""
    found = {control: {} for control in CONTROLS}
    with np.load(GOLDEN / "expected.npz") as file:
        for entry in file.files:
            control, key, dtype = entry.split("|")
            found[control][key] = dtype, file[entry].shape, file[entry].tobytes()
    return found


@pytest.fixture(scope="module")
def expected() -> dict:
    return expected_bits()


@pytest.mark.parametrize("control", CONTROLS)
def test_what_torch_wrote_is_read_to_the_bit(control, expected):
    assert bits(GOLDEN / f"{control}.pth") == expected[control]


@pytest.mark.parametrize("case", cases.ACCEPTED)
def test_what_other_versions_write_is_read(case, tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(cases.ACCEPTED[case])
    assert [value[2] for value in bits(path).values()] == [cases.DATA]


@pytest.mark.parametrize("case", cases.REFUSED)
def test_what_means_harm_is_refused_and_nothing_runs(case, tmp_path, monkeypatch):
    content, words = cases.REFUSED[case]
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    monkeypatch.chdir(tmp_path)
    tracemalloc.start()
    start = time.monotonic()
    try:
        assert words in refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert time.monotonic() - start < 5
    assert os.listdir() == ["a.pth"]


def test_there_are_many_such_files():
    assert len(cases.REFUSED) >= 60


@pytest.mark.parametrize("code", sorted(set(range(256)) - set(OPCODES)))
def test_any_other_instruction_is_refused(code, tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(cases.saved(b"}" + bytes([code]) + b"\0\0\0\0\n\0\0\0\n"))
    assert f"0x{code:02x}" in refusal(path)


def test_what_is_no_ordinary_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero"), tmp_path / "gone"):
        refusal(path)
    for name in ("a\0b.pth", "n" * 300):
        with pytest.raises(Refusal):
            torch_file.read(Path(name))


def test_the_limits_hold(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    path.write_bytes(cases.saved(b"}" + b"q\0" * 500 + cases.GOOD[1:]))
    bits(path)
    monkeypatch.setattr(torch_file, "MOST_OPERATIONS", 500)
    assert "more than 500 instructions" in refusal(path)
    monkeypatch.setattr(torch_file, "LONGEST_PROGRAM", 1000)
    assert "bytes of data.pkl" in refusal(path)
    monkeypatch.undo()
    monkeypatch.setattr(torch_file, "MOST_TENSORS", 1)
    path.write_bytes(cases.saved(cases.state(w=cases.tensor(), v=cases.tensor())))
    assert "more than 1 tensors" in refusal(path)


def test_a_file_that_changes_after_it_was_looked_at_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(cases.saved(cases.GOOD))
    (tensor,) = torch_file.read(path).values()
    assert (tensor.read() == tensor.read()).all()
    for change in (path.read_bytes()[:-1], path.read_bytes() + b"\0"):
        path.write_bytes(change)
        with pytest.raises(Refusal, match="bytes, and now has"):
            tensor.read()
    path.unlink()
    with pytest.raises(Refusal):
        tensor.read()


def test_a_view_of_a_large_record_takes_no_more_memory_than_itself(tmp_path):
    path, count = tmp_path / "a.pth", 6 << 20
    many = cases.storage(count=count)
    few = cases.tensor(many, offset=count // 2, shape=(1000,), strides=(1,))
    program = cases.program(cases.state(few=few, all=cases.tensor(many, shape=(count,), strides=(1,))))
    data = np.arange(count, dtype=np.float32)
    path.write_bytes(cases.zipped(("x/data.pkl", program), ("x/data/0", data.tobytes())))
    found = torch_file.read(path)
    for key, right in (("few", data[count // 2 :][:1000]), ("all", data)):
        tracemalloc.start()
        got = found[key].read()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (got == right).all() and peak < got.nbytes + (2 << 20)


def test_a_record_is_read_whole_once_and_then_only_where_it_is_wanted(tmp_path, monkeypatch):
    path, spans = tmp_path / "a.pth", []
    fill = torch_file.files.fill
    path.write_bytes(cases.saved(cases.state(w=cases.tensor(offset=2, shape=(3,), strides=(1,)))))
    (tensor,) = torch_file.read(path).values()
    monkeypatch.setattr(torch_file.files, "fill", lambda *a: (spans.append(len(a[2])), fill(*a)))
    assert tensor.read().tobytes() == cases.DATA[8:20] == tensor.read().tobytes()
    assert spans == [8, 12, 4, 12]
