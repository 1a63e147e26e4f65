"""Weights of eight bits with their scales, as wider tensors; what else is quantised is refused."""

from pathlib import Path

import ml_dtypes
import numpy as np

from fvdm_jax.program import Refusal, plain

from .tensors import Tensor

WIDE = np.dtype(ml_dtypes.bfloat16)
"""What eight bits become: it has every number of theirs, and a scaled one is rounded to it once."""

_SCALE, MARKER = ".scale_weight", "scaled_fp8"
_UNREAD = (".comfy_quant", ".weight_scale", ".weight_scale_2", ".input_scale", ".qweight", ".qzeros")


def widened(path: Path, tensors: dict[str, Tensor], wide: np.dtype = WIDE) -> dict[str, Tensor]:
    """The tensors, those of eight bits multiplied by their scales and as `wide`.

    Raises Refusal, named `path`, where scales are missing, belong to nothing, or follow another scheme.
    Source: ComfyUI's scaled_fp8 (W = fp8 · scale_weight) and musubi-tuner's scales per row and per block.
    """
    if odd := sorted(key for key in tensors if key.endswith(_UNREAD)):
        what = f"is quantised in a way that is not read: it has {plain(odd[0], 200)}"
        raise Refusal(path, what, "give the fp16, bf16 or fp8_scaled file of this model")
    scaled = MARKER in tensors
    scales = {key.removesuffix(_SCALE): tensor for key, tensor in tensors.items() if key.endswith(_SCALE)}
    dropped = {MARKER, *(key for key in tensors if key.endswith((_SCALE, ".scale_input")))}
    kept = {key: tensor for key, tensor in tensors.items() if key not in dropped}
    result = {}
    for key, tensor in kept.items():
        scale = scales.pop(key.removesuffix(".weight"), None) if key.endswith(".weight") else None
        small = tensor.dtype.itemsize == 1 and tensor.dtype.name.startswith("float8")
        if scale is not None and not small:
            raise Refusal(
                path, f"has a scale for {plain(key, 200)}, which is {tensor.dtype}", "copy it again"
            )
        if small and scaled and scale is None:
            raise Refusal(path, f"has no scale for {plain(key, 200)}", "copy it again")
        result[key] = _wider(path, key, tensor._replace(dtype=np.dtype(wide)), scale) if small else tensor
    if scales:
        raise Refusal(path, f"has a scale for {plain(min(scales), 200)}, which is not there", "copy it again")
    return result


def _wider(path: Path, key: str, tensor: Tensor, scale: Tensor | None) -> Tensor:
    """The tensor, whose dtype is what it shall have, from the eight bits that it reads."""
    blocks = scale.shape if scale is not None else ()
    if len(blocks) == 3 and len(tensor.shape) == 2:
        fits = blocks[0] == tensor.shape[0] and blocks[2] == 1 and tensor.shape[1] % blocks[1] == 0
    else:
        fits = blocks in ((), (1,), (tensor.shape[0], 1) if len(tensor.shape) == 2 else ())
    if not fits:
        raise Refusal(path, f"has a scale {blocks} for {plain(key, 200)} {tensor.shape}", "copy it again")

    def read() -> np.ndarray:
        values = tensor.read()
        if scale is None:
            return values.astype(tensor.dtype)
        factor = scale.read().astype(np.float32)
        grouped = values.reshape(*blocks[:2], -1) if len(blocks) == 3 else values
        return (grouped.astype(np.float32) * factor).astype(tensor.dtype).reshape(tensor.shape)

    return tensor._replace(read=read)
