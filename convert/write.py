"""Arrays into files as they are read, one layer at a time: our checkpoint, and safetensors for others."""

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from flax.traverse_util import unflatten_dict

from fvdm_jax.program import Refusal

from .tensors import DTYPES, Planned, Tensor

CHUNK = 64 << 20
"""Bytes of the largest piece of an array that is stored, and so read, as one."""

SMALL = 1 << 20
"""Bytes of an array up to which it is one piece, stack or not."""

NAMES = {np.dtype(kind): name for name, kind in DTYPES.items()}
Progress = Callable[[int], None]


def chunks(array: Planned) -> list[int]:
    """The shape of the stored pieces of an array: of one layer, and cut along the longest axis to CHUNK."""
    shape = list(array.shape)
    if array.layers and array.bytes > SMALL:
        shape[0] = 1
    size = math.prod(shape) * array.dtype.itemsize
    if size > CHUNK:
        longest = int(np.argmax(shape))
        shape[longest] = -(-shape[longest] // -(-size // CHUNK))
    return [max(n, 1) for n in shape]


def tree(folder: Path, planned: list[Planned], progress: Progress) -> None:
    """Fills a folder that Orbax restores, whole or sharded, with the arrays; `progress` is told of bytes.

    Orbax writes what names the tree, with a placeholder for each array, since it would take all arrays at
    once; tensorstore, by which Orbax reads them, writes the arrays in their places.
    """
    import orbax.checkpoint as ocp

    _hush()
    folder.mkdir(parents=True)
    names = {array.path: np.zeros(1, np.float32) for array in planned}
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    handler.save(folder, args=ocp.args.PyTreeSave(unflatten_dict(names, sep="/")))
    for array in planned:
        store = _store(folder, array, create=True)
        for place, piece in _pieces(array):
            _wait(store[place].write(piece, can_reference_source_data_indefinitely=True))
            progress(piece.nbytes)
            del piece


def _pieces(array: Planned) -> Iterator[tuple[tuple, np.ndarray]]:
    """The array in layers, and what is no stack in the pieces it is stored in, each with its place."""
    if array.layers and array.bytes > SMALL:
        for i in range(array.layers):
            yield (i,), array.piece(i)
        return
    whole, steps = array.whole(), chunks(array)
    axis = next((i for i, (step, n) in enumerate(zip(steps, array.shape, strict=True)) if step < n), None)
    if axis is None:
        yield (...,), whole
        return
    for start in range(0, array.shape[axis], steps[axis]):
        place = (slice(None),) * axis + (slice(start, min(start + steps[axis], array.shape[axis])),)
        yield place, whole[place]


def _hush() -> None:
    """Orbax warns of what is missing from checkpoints of a kind that this is not."""
    import logging

    logging.getLogger("absl").setLevel(logging.ERROR)


def _store(folder: Path, array: Planned, create: bool):
    """The array in the folder, as tensorstore has it: uncompressed, since weights hardly shrink."""
    import tensorstore

    kind = array.dtype.name if array.dtype.name == "bfloat16" else array.dtype.str
    path = folder / array.path.replace("/", ".")
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{path}/"}}
    if create:
        spec["metadata"] = {
            "zarr_format": 2, "shape": list(array.shape), "chunks": chunks(array), "dtype": kind,
            "compressor": None, "filters": None, "fill_value": None, "order": "C", "dimension_separator": ".",
        }  # fmt: skip
        return _wait(tensorstore.open(spec, create=True, delete_existing=True))
    return _opened(folder, spec)


def _opened(folder: Path, spec: dict):
    """An array that is there whole. Raises Refusal, named for the folder, where it is not."""
    import tensorstore

    try:
        # What is missing is damage, not zeros.
        return _wait(tensorstore.open(spec | {"fill_missing_data_reads": False}, open=True))
    except ValueError as failure:
        raise Refusal(folder, f"is damaged: {str(failure)[:300]}", "convert it again") from failure


def _read(folder: Path, store, place: tuple) -> np.ndarray:
    try:
        return _wait(store[place].read())
    except ValueError as failure:
        raise Refusal(folder, f"is damaged: {str(failure)[:300]}", "convert it again") from failure


def _wait(future):
    """The result of tensorstore's future, with its failures as those of the operating system."""
    try:
        return future.result()
    except (ValueError, RuntimeError) as failure:
        if code := re.search(r"os_error_code='(\d+)'", str(failure)):
            raise OSError(int(code[1]), str(failure)) from failure
        raise


def different(folder: Path, planned: list[Planned], progress: Progress) -> str | None:
    """The first array of a folder that is not what is planned, to the bit; None where all are."""
    for array in planned:
        store = _store(folder, array, create=False)
        if (tuple(store.shape), store.dtype.numpy_dtype) != (array.shape, array.dtype):
            return array.path
        for place, wanted in _pieces(array):
            if not _same(_read(folder, store, place), wanted):
                return array.path
            progress(wanted.nbytes)
    return None


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are equal to the bit, NaNs too."""
    first, second = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    steps = range(0, max(first.size, second.size), CHUNK)
    return all(np.array_equal(first[i : i + CHUNK], second[i : i + CHUNK]) for i in steps)


def stored(folder: Path) -> dict[str, Planned]:
    """The arrays of a folder that `tree` wrote, by path, to be read layer by layer."""
    found = {}
    for place in sorted(folder.iterdir()):
        if not place.is_dir():
            continue
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{place}/"}}
        store = _opened(folder, spec)
        path, shape = place.name.replace(".", "/"), tuple(store.shape)
        layers = shape[0] if path.startswith(STACKS) else None

        def piece(i: int, store=store, layers=layers) -> np.ndarray:
            return _read(folder, store, (i,) if layers else (...,))

        found[path] = Planned(path, store.dtype.numpy_dtype, shape, layers, piece)
    return found


STACKS = ("blocks/", "layers/")
"""How the paths of arrays that are stacks of layers begin."""


def safetensors(path: Path, tensors: dict[str, Tensor], progress: Progress) -> None:
    """One file with the tensors, each read when it is written.

    Metadata and order are those of the reference writer, which made the published files: by type, then name.
    """
    order = [np.dtype(kind) for kind in DTYPES.values()]
    tensors = dict(sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0])))
    with open(path, "wb") as file:
        file.write(header(tensors))
        for tensor in tensors.values():
            # A strided array's bytes would be those of its elements in another order: read() gives none.
            file.write(np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8).data)
            progress(tensor.bytes)


def header(tensors: dict[str, Tensor]) -> bytes:
    """What stands before the data of a file with these tensors, in this order."""
    said, end = {"__metadata__": {"format": "pt"}}, 0
    for key, tensor in tensors.items():
        offsets = [end, end := end + tensor.bytes]
        said[key] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def split(tensors: dict[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """The tensors in files of at most `limit` bytes, filled in this order.

    Source: huggingface_hub's split of a state dict, whose layout the published repositories have.
    """
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for key, tensor in tensors.items():
        if shards[-1] and filled + tensor.bytes > limit:
            shards.append({})
            filled = 0
        shards[-1][key] = tensor
        filled += tensor.bytes
    return shards


def sharded(folder: Path, stem: str, shards: list[dict[str, Tensor]], progress: Progress) -> None:
    """The tensors in one file each; where there are several, with an index."""
    if len(shards) == 1:
        safetensors(folder / f"{stem}.safetensors", shards[0], progress)
        return
    names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        safetensors(folder / name, shard, progress)
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    total = sum(tensor.bytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
