"""What is wrong with a file is said in one line that names it; nothing is written, and nothing runs."""

import json
import os
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save, save_file
from test_convert_program import CONFIG, put, weights

from convert.__main__ import main
from fvdm_jax.program import Refusal


def packed(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of a header, given as JSON or as text, and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: object, stop: object, shape=(1,), dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


A = entry(0, 4)
FILES = {
    "empty": b"",
    "seven bytes": b"1234567",
    "a header of 2^63 bytes": packed(A, length=2**63),
    "a header of 2^64 - 1 bytes": packed(A, length=2**64 - 1),
    "a header longer than the file": packed({"a": A}, b"1234", length=4000),
    "a header cut short": packed({"a": A})[:20],
    "no JSON": packed(b"{not json}"),
    "a list": packed(b"[]"),
    "blanks before the header": packed(b"  " + json.dumps({"a": A}).encode(), b"1234"),
    "200,000 brackets": packed(b'{"a":' + b"[" * 200_000),
    "not UTF-8": packed(b'{"\xff\xfe": 1}'),
    "a key twice": packed(
        b'{"a":' + json.dumps(A).encode() + b',"a":' + json.dumps(A).encode() + b"}", b"1234"
    ),
    "a field twice": packed(b'{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}', b"1234"),
    "negative offsets": packed({"a": entry(-4, 0)}, b"1234"),
    "offsets that are no numbers": packed({"a": entry("0", "4")}, b"1234"),
    "fractional offsets": packed({"a": entry(0.0, 4.0)}, b"1234"),
    "true as an offset": packed({"a": entry(False, 4)}, b"1234"),
    "offsets beyond the end": packed({"a": entry(0, 4000, (1000,))}, b"1234"),
    "offsets of 2^64": packed({"a": entry(2**64, 2**64 + 4)}, b"1234"),
    "offsets turned round": packed({"a": entry(4, 0)}, b"1234"),
    "overlap": packed({"a": A, "b": entry(2, 6)}, b"123456"),
    "20,000 tensors that overlap": packed({f"a{i}": entry(i, i + 4) for i in range(20_000)}, bytes(20_003)),
    "the same bytes twice": packed({"a": A, "b": A}, b"1234"),
    "a hole": packed({"a": A, "b": entry(8, 12)}, b"123456789012"),
    "bytes after the end": packed({"a": A}, b"12345"),
    "data cut short": packed({"a": A}, b"12"),
    "a shape of another size": packed({"a": entry(0, 4, (2,))}, b"1234"),
    "a shape whose product overflows": packed({"a": entry(0, 0, (2**32, 2**32, 2**62))}),
    "a negative shape": packed({"a": entry(0, 4, (-1, -1))}, b"1234"),
    "nine axes": packed({"a": entry(0, 4, (1,) * 9)}, b"1234"),
    "an unknown type": packed({"a": entry(0, 4, dtype="F31")}, b"1234"),
    "a type that is no text": packed({"a": entry(0, 4, dtype=[1])}, b"1234"),
    "a missing field": packed({"a": {"dtype": "F32", "shape": [1]}}, b"1234"),
    "a field too many": packed({"a": A | {"code": "x"}}, b"1234"),
    "no entry": packed({"a": 7}, b"1234"),
    "metadata that is no text": packed({"__metadata__": {"a": 1}, "a": A}, b"1234"),
    "half a pair of surrogates in metadata": packed(
        b'{"__metadata__":{"a":"\\ud800"},"b":%s}' % json.dumps(A).encode(), b"1234"
    ),
    "a terminal's escapes in a key": packed({"\x1b[2Ja": A}, b"1234"),
    "a key of a megabyte": packed({"a" * 2**20: A}, b"1234"),
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "web page": b"<!DOCTYPE html><html><body>404</body></html>",
    "bare pickle": b"\x80\x02}q\x00.",
    "GGUF": b"GGUF" + bytes(40),
    "a zip that is none": b"PK\x03\x04" + bytes(60),
    "no tensors": packed({}),
}


def refused(tmp_path: Path, *arguments) -> str:
    """The one line with which the program refuses; it leaves what was there before."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(Refusal) as caught:
        main([str(argument) for argument in (*arguments, tmp_path / "out")])
    said = str(caught.value)
    assert said.startswith("error: ") and len(said) <= 1500 and said.isprintable()
    assert sorted(tmp_path.rglob("*")) == before
    return said


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_whole_is_refused(tmp_path, name):
    path = tmp_path / "model.safetensors"
    path.write_bytes(FILES[name])
    assert "model.safetensors" in refused(tmp_path, path)


def test_a_header_is_never_longer_than_a_hundred_million_bytes(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001) + b"{")
    # Long enough for it, and takes no room.
    os.truncate(path, 200_000_000)
    assert "its header would be 100000001 bytes long" in refused(tmp_path, path)


def test_what_is_recognisable_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    for name, word in (("Git LFS pointer", "Git LFS"), ("web page", "web page"), ("bare pickle", "pickle")):
        path.write_bytes(FILES[name])
        assert word in refused(tmp_path, path)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "absent", tmp_path, Path("/dev/zero"), Path("a\0b")):
        refused(tmp_path, path)


def changed(**changes) -> dict:
    return {key: array for key, array in (weights("dit_t2v") | changes).items() if array is not None}


Q = "blocks.1.self_attn.q.weight"
TENSORS = {
    "a missing tensor": ({Q: None}, Q.replace("1", "*")),
    "a missing bias": ({"head.head.bias": None}, "head.head.bias"),
    "an unknown tensor": ({"blocks.0.odd.weight": np.zeros(3, np.float32)}, "blocks.0.odd.weight"),
    "10,000 unknown tensors": ({f"odd.{i}": np.zeros(1, np.float32) for i in range(10_000)}, "odd.0"),
    "a traversal for a name": ({"../../etc/passwd": np.zeros(1, np.float32)}, "../../etc/passwd"),
    "a transposed kernel": ({Q: np.zeros((64, 65), np.float32)}, Q),
    "another width everywhere": (
        {f"blocks.{i}.ffn.2.weight": np.zeros((64, 161), np.float32) for i in range(2)},
        "blocks/ffn/down/kernel",
    ),
    "a kernel of one axis": ({Q: np.zeros(4096, np.float32)}, Q),
    "integers": (
        {f"blocks.{i}.modulation": np.zeros((1, 6, 64), np.int32) for i in range(2)},
        "blocks/modulation",
    ),
    "a layer of another type": ({Q: np.zeros((64, 64), np.float16)}, Q),
    "a layer too many": ({"blocks.2.modulation": np.zeros((1, 6, 64), np.float32)}, "3 layers"),
    "an image branch in part": ({"img_emb.proj.0.bias": np.zeros(40, np.float32)}, "img_emb"),
    "a scale of nothing": ({"blocks.0.odd.scale_weight": np.ones(1, np.float32)}, "blocks.0.odd"),
    "fp8 whose scale is missing": (
        {Q: np.zeros((64, 64), ml_dtypes.float8_e4m3fn), "scaled_fp8": np.zeros(0, ml_dtypes.float8_e4m3fn)},
        Q,
    ),
    "a scale of another shape": (
        {
            Q: np.zeros((64, 64), ml_dtypes.float8_e4m3fn),
            Q.replace("weight", "scale_weight"): np.ones(7, np.float32),
        },
        Q,
    ),
    "quantised in another way": (
        {Q.replace(".weight", ".comfy_quant"): np.zeros(9, np.uint8)},
        "comfy_quant",
    ),
    "a LoRA's half beside weights": (
        {"blocks.0.ffn.0.lora_A.weight": np.zeros((4, 64), np.float32)},
        "adapter",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, name):
    changes, word = TENSORS[name]
    assert word in refused(tmp_path, put(tmp_path, changed(**changes)))


@pytest.mark.parametrize("flags", [[], ["--dtype", "bfloat16"]], ids=str)
def test_bfloat16_bytes_labelled_float16_are_refused(tmp_path, flags):
    kernel = np.random.default_rng(0).normal(0, 0.02, (64, 64)).astype(ml_dtypes.bfloat16).view(np.float16)
    tensors = {key: array.astype(np.float16) for key, array in weights("dit_t2v").items()}
    tensors |= {f"blocks.{i}.self_attn.k.weight": kernel for i in range(2)}
    assert "labelled float16" in refused(tmp_path, put(tmp_path, tensors), *flags)


def test_another_network_is_refused_by_as_and_by_its_config(tmp_path):
    path = put(tmp_path, weights("dit_t2v"))
    refused(tmp_path, path, "--as", "wan_1_3b")
    refused(tmp_path, path, "--as", "vae_2_1")
    assert "--as" in refused(tmp_path, path, "--as", "wan_7b")
    assert "--config" in refused(tmp_path, path, "--config", tmp_path / "none.json")
    for wrong in ("[]", "{", '{"num_layers": 3}'):
        (tmp_path / "c.json").write_text(wrong)
        refused(tmp_path, path, "--config", tmp_path / "c.json")
    (tmp_path / "config.json").unlink()
    assert "heads" in refused(tmp_path, path)


MAPS = {
    "a missing shard": {"a": "one.safetensors", "b": "two.safetensors"},
    "a path upwards": {"a": "../one.safetensors"},
    "an absolute path": {"a": "/etc/one.safetensors"},
    "a backslash": {"a": "..\\one.safetensors"},
    "an address": {"a": "https://example.org/one.safetensors"},
    "a NUL": {"a": "one\0.safetensors"},
    "a number": {"a": 7},
    "a pickle": {"a": "one.pth"},
    "a dot": {"a": ".."},
    "a tensor that no shard has": {"a": "one.safetensors", "z": "one.safetensors"},
    "a tensor of a shard that is not listed": {"b": "one.safetensors"},
    "nothing": {},
}


@pytest.mark.parametrize("name", MAPS)
def test_an_index_that_is_not_true_is_refused(tmp_path, name):
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "one.safetensors")
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": MAPS[name]}))
    refused(tmp_path, index)


def test_shards_that_disagree_are_refused(tmp_path):
    a, b = {"a": np.zeros(1, np.float32)}, {"b": np.zeros(1, np.float32)}
    save_file(a, tmp_path / "one.safetensors")
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    for second in (save(a | b), save(b)[:-1], b"version https://git-lfs.github.com/spec/v1\n"):
        (tmp_path / "two.safetensors").write_bytes(second)
        refused(tmp_path, index)
    index.write_text('{"weight_map": {"a": "one.safetensors", "a": "one.safetensors"}}')
    assert "twice" in refused(tmp_path, index)


def test_a_source_that_shrinks_while_it_is_read_is_refused(tmp_path, monkeypatch):
    from convert import write

    path, tree = put(tmp_path, weights("dit_t2v")), write.tree

    def shrinking(*arguments):
        os.truncate(path, 200_000)
        return tree(*arguments)

    monkeypatch.setattr(write, "tree", shrinking)
    assert "ends at byte" in refused(tmp_path, path)


def test_two_of_one_kind_and_no_room_are_refused(tmp_path, monkeypatch):
    first, second = put(tmp_path / "a", weights("dit_t2v")), put(tmp_path / "b", weights("dit_t2v"))
    assert "second dit" in refused(tmp_path, first, second)
    from convert import __main__ as program

    usage = program.shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(program.shutil, "disk_usage", lambda path: usage)
    assert "free" in refused(tmp_path, first)
    assert json.loads((tmp_path / "a/config.json").read_text()) == CONFIG
