"""Files read piece by piece.

Never mapped: mapped pages count as resident memory, and a file that shrinks under a map kills the process.
"""

import math
import os
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fvdm_jax.program import Refusal, plain

CHUNK = 16 << 20

_KINDS = (
    (b"\x89PNG", "is a picture, not weights", "give a .safetensors or .pth file"),
    (b"\xff\xd8\xff", "is a picture, not weights", "give a .safetensors or .pth file"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself", "fetch it with git lfs pull"),
    (b"<!doctype", "is a web page", "download the file itself"),
    (b"<html", "is a web page", "download the file itself"),
    (b"GGUF", "is a GGUF file, whose quantised blocks are not read", "give the safetensors it was made from"),
)


def size_of(path: Path) -> int:
    """Bytes of an ordinary file. Raises Refusal, named `path`, for anything else."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as failure:
        reason = getattr(failure, "strerror", None) or str(failure)
        raise Refusal(path, f"cannot be read: {reason}", "give a file that exists") from failure
    if not stat.S_ISREG(found.st_mode):
        raise Refusal(path, "is no ordinary file", "give a .safetensors or .pth file")
    return found.st_size


def read_bytes(path: Path, start: int, length: int) -> bytearray:
    """That many bytes from `start`. Raises Refusal where the file ends before or cannot be read."""
    data = bytearray(length)
    fill(path, start, memoryview(data))
    return data


def fill(path: Path, start: int, into: memoryview) -> None:
    """Fills a buffer from `start` of the file. Raises Refusal where the file ends before."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            done = 0
            while done < len(into):
                got = os.preadv(handle, [into[done : done + CHUNK]], start + done)
                if not got:
                    what = f"ends at byte {start + done}, inside of what its header promises"
                    raise Refusal(path, what, "copy it again")
                done += got
        finally:
            os.close(handle)
    except OSError as failure:
        raise Refusal(path, f"cannot be read: {failure.strerror}", "make it readable") from failure


def array(path: Path, start: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The array whose elements lie at `start`, row by row. Raises Refusal as `fill` does."""
    # Not np.empty(…, dtype): a memoryview does not know bfloat16.
    raw = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
    fill(path, start, memoryview(raw))
    return raw.view(dtype).reshape(shape)


def once(path: Path) -> Callable[[list[tuple[str, object]]], dict]:
    """The dict of a JSON object's pairs, for `json.loads`; it raises Refusal where a key is there twice."""

    def hook(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise Refusal(path, f"has the key {plain(twice, 80)} twice", "save it again")
        return found

    return hook


def look(path: Path) -> bytes:
    """The first bytes of an ordinary file. Raises Refusal where it is known to be something else."""
    head = bytes(read_bytes(path, 0, min(size_of(path), 512)))
    if not head:
        raise Refusal(path, "is empty", "copy it again")
    if head[4:8] == b"ftyp":
        raise Refusal(path, "is a video, not weights", "give a .safetensors or .pth file")
    # A safetensors file may begin with the same bytes: the length of its header.
    if head[0] == 0x80 and head[1:2] in b"\2\3\4\5" and head[8:9] != b"{":
        raise Refusal(path, "is a bare pickle, which can run code and is not read", "save it as safetensors")
    for magic, what, right in _KINDS:
        if head.lower().startswith(magic.lower()):
            raise Refusal(path, what, right)
    return head
