"""A safetensors file as tensors that are not read yet, its header checked more strictly than by the library.

The reference reader (safetensors 0.8) takes duplicate keys, and maps the file. Source of the format: the
README of safetensors.
"""

import json
import math
import re
from functools import partial
from pathlib import Path

import numpy as np

from fvdm_jax.program import Refusal, plain

from . import files
from .tensors import DTYPES, Tensor

LONGEST_HEADER = 100_000_000
LONGEST_KEY = 512
MOST_AXES = 8


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by their keys, and its metadata.

    Raises Refusal, naming file and tensor, where the header is not whole, or says what cannot be: overlaps,
    holes, anything beyond the end of the file, an unknown element type, a key twice.
    """
    size, begin = files.size_of(path), 8
    if size < begin:
        raise Refusal(path, f"has {size} bytes, too few for a safetensors file", "copy it again")
    length = int.from_bytes(files.read_bytes(path, 0, 8), "little")
    if length > min(LONGEST_HEADER, size - 8):
        what = f"is no whole safetensors file: its header would be {length} bytes long, the file has {size}"
        raise Refusal(path, what, "copy it again")
    header = _parsed(path, bytes(files.read_bytes(path, 8, length)))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(map(_text, (*metadata, *metadata.values()))):
        raise Refusal(path, "has metadata that is not text", "save it again")
    spans = {key: _span(path, key, entry) for key, entry in header.items()}
    _check_layout(path, spans, size - 8 - length)
    tensors = {}
    for key, (dtype, shape, start, _) in spans.items():
        load = partial(files.array, path, 8 + length + start, dtype, shape)
        tensors[key] = Tensor(path, dtype, shape, load)
    return tensors, metadata


def _text(value: object) -> bool:
    """Whether it is text that can be written again: half a pair of surrogates is JSON, and no Unicode."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _parsed(path: Path, raw: bytes) -> dict:
    if not raw.startswith(b"{"):
        raise Refusal(path, "is no safetensors file: its header does not begin with {", "copy it again")
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=files.once(path), parse_constant=float)
    except (ValueError, RecursionError) as broken:
        raise Refusal(path, "is no safetensors file: its header is not JSON", "copy it again") from broken


def _span(path: Path, key: str, entry: object) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Element type, shape, and first and last byte of a tensor in the data, of its entry in the header."""

    def refuse(what: str):
        return Refusal(path, f"{plain(key, 200)} {what}", "save it again")

    if len(key) > LONGEST_KEY or not key.isprintable():
        raise refuse("is no possible name of a tensor")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise refuse("has no dtype, shape and data_offsets, or more than these")
    name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(name, str) or name not in DTYPES:
        raise refuse(f"has elements of type {plain(name, 40)}, which is not known")
    for values, what in ((shape, "shape"), (offsets, "data_offsets")):
        if not isinstance(values, list) or any(type(n) is not int or not 0 <= n < 2**63 for n in values):
            raise refuse(f"has {what} {plain(values, 80)}, where whole numbers from 0 are wanted")
    if len(shape) > MOST_AXES or len(offsets) != 2:
        raise refuse(f"has {len(shape)} axes and {len(offsets)} offsets, where at most 8 and 2 are wanted")
    dtype = np.dtype(DTYPES[name])
    wanted = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != wanted:
        raise refuse(f"lies in {offsets[1] - offsets[0]} bytes, and its shape and type need {wanted}")
    return dtype, tuple(shape), *offsets


def _check_layout(path: Path, spans: dict, size: int) -> None:
    """Raises Refusal unless the spans cover the data once, without holes."""
    end = 0
    for key, (_, _, start, stop) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if start != end:
            what = "overlaps the tensor before it" if start < end else f"leaves {start - end} bytes before it"
            raise Refusal(path, f"{plain(key, 200)} {what}", "save it again")
        end = stop
    if end != size:
        word = "is cut short" if end > size else "has bytes that belong to no tensor"
        raise Refusal(path, f"{word}: its tensors are {end} bytes, and {size} are there", "copy it again")
