"""What is known of an array before it is read: of a file's tensors, and of the arrays of our tree."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {
    "F64": np.float64, "I64": np.int64, "F32": np.float32, "I32": np.int32, "BF16": ml_dtypes.bfloat16,
    "F16": np.float16, "I16": np.int16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
"""Names of element types as safetensors has them, in the order in which its reference writer puts them."""


class Tensor(NamedTuple):
    """One tensor of a file. `read` gives its elements anew each time, C-contiguous.

    `read` raises Refusal where the file has changed or is damaged.
    """

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def known(array: np.ndarray) -> Tensor:
    """An array that is in memory as a tensor."""
    return Tensor(Path(), array.dtype, array.shape, lambda: array)


def bare(tensors: dict[str, Tensor], prefixes: Sequence[str], beside: str = "") -> dict[str, Tensor]:
    """The tensors without the first of `prefixes` that all of them carry, but for one named `beside`."""
    for prefix in prefixes:
        if tensors and all(key.startswith(prefix) or key == beside for key in tensors):
            return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors


class Planned(NamedTuple):
    """One array of our tree. `piece(i)` is layer i of a stack of `layers`, else `piece(0)` the whole."""

    path: str
    dtype: np.dtype
    shape: tuple[int, ...]
    layers: int | None
    piece: Callable[[int], np.ndarray]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def whole(self) -> np.ndarray:
        """The array itself, in memory."""
        if self.layers is None:
            return self.piece(0)
        return np.stack([self.piece(i) for i in range(self.layers)])
