"""LoRAs for a network whose weights are being converted: which, how strong, and what they add."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from fvdm_jax.lora import Adapters, check
from fvdm_jax.models import dit
from fvdm_jax.program import Refusal, numbered, plain

from . import dialects, lora, plans, wan
from .quantised import widened
from .sources import Part, expert_of, find, settings
from .tensors import Planned, bare

EVERY_RULE = wan.dit(image=True, positions=True)
"""A LoRA may adapt what only some of the transformers have; which it is for is seen when it is used."""

TRAINERS = ("pipe.dit.", "module.", "_forward_module.")
"""Prefixes that trainers leave before all keys."""

MOST_LAYERS = 1000


class Merge(NamedTuple):
    """One `--lora`: the transformer it is for, "" for the only one, its tensors and its strength."""

    expert: str
    part: Part
    strength: float

    @property
    def goal(self) -> str:
        """Our name of the network that it changes."""
        return f"dit_{self.expert}" if self.expert else "dit"


def asked(text: str) -> Merge:
    """The Merge of `[high=|low=]FILE[:STRENGTH]`; only the header is read. Raises Refusal."""
    expert, rest = expert_of(text)
    name, strength = numbered(rest, 1.0)
    if not abs(strength) <= 100:
        raise Refusal("--lora", f"the strength of {plain(name)} is not from -100 to 100", "1 is as trained")
    parts = find(Path(name)).parts
    if len(parts) != 1 or not dialects.recognised(parts[0].tensors):
        raise Refusal("--lora", f"{plain(name)} is no LoRA", "give the file of one")
    return Merge(expert, parts[0], strength)


def adapters(part: Part, said: str | None, config: dict | None, expert: str = "", layers: int = 0):
    """The arrays of a LoRA, and the published network that it is for, "" where its width is none's.

    `layers` is the network's depth, 0 where only the LoRA tells of it. Raises Refusal.
    """
    tensors = bare(part.tensors, TRAINERS)
    spoken = dialects.dialect(dialects.chosen(tensors, _expert(tensors, expert)))
    if config and dialects.DIALECTS[spoken].alpha != "config":
        raise Refusal("--config", f"has no use: {part.path} is of a dialect without a config", "leave it out")
    depth = layers or 1 + max(map(_layer, tensors), default=-1)
    if depth > MOST_LAYERS:
        raise Refusal(part.path, f"adapts layer {depth - 1}", f"networks have at most {MOST_LAYERS}")
    widths = {tensor.shape[1] for key, tensor in tensors.items() if _is_down(key, tensor)}
    fitting = {size.width: name for name, size in reversed(dit.SIZES.items()) if size.width in widths}
    family = said or next(iter(fitting.values()), "")
    if family and not layers:
        depth = dit.SIZES[family].layers
        if widths - {dit.SIZES[family].width}:
            what = f"adapts a network {min(widths)} wide, and {family} is {dit.SIZES[family].width}"
            raise Refusal(part.path, what, "leave --as out")
    whose = _expert(tensors, expert)
    peft = config or settings(part.path.parent / "adapter_config.json")
    peft = peft or lora.header_config(part.path, part.metadata, whose or "transformer")
    return lora.planned(widened(part.path, tensors), EVERY_RULE, depth, peft, whose), family


def _expert(tensors: dict, expert: str) -> str | None:
    """diffusers' name of the expert: of all keys where they have one, else of who is asked for."""
    alone = [name for name in dialects.EXPERTS if all(key.startswith(f"{name}.") for key in tensors)]
    return alone[0] if alone else {"high": "transformer", "low": "transformer_2"}.get(expert)


def _is_down(key: str, tensor) -> bool:
    """Whether it is A of a query, whose second axis is the network's width."""
    query = any(word in key for word in ("self_attn.q.", "self_attn_q.", "attn1.to_q."))
    return query and ("lora_A" in key or "lora_down" in key) and len(tensor.shape) == 2


def _layer(key: str) -> int:
    """The number of the block in a key of a LoRA, −1 where it is in none."""
    _, _, rest = key.replace("_", ".").partition("blocks.")
    digits, _, _ = rest.partition(".")
    return int(digits) if digits.isdecimal() else -1


def merged(networks: list[plans.Network], asked_for: list[Merge]) -> list[plans.Network]:
    """The networks with all that is asked for added in float32, to be rounded once when they are cast.

    Raises Refusal for a LoRA that fits none of them.
    """
    every = {network.name: network for network in networks}
    changes: dict[str, list[tuple[dict[str, Planned], float]]] = {}
    for merge in asked_for:
        if merge.goal not in every:
            have = ", ".join(every)
            right = "for experts name one: high=FILE or low=FILE" if "dit_high" in every else "leave it out"
            raise Refusal("--lora", f"there is no {merge.goal} among {have}", right)
        layers = every[merge.goal].family.config.layers
        arrays, _ = adapters(merge.part, None, None, merge.expert, layers)
        found = {array.path: array for array in arrays}
        _check_fit(merge.part.path, every[merge.goal], found)
        changes.setdefault(merge.goal, []).append((found, merge.strength))
    for name, some in changes.items():
        sums = [(array, _sum(array, some)) for array in every[name].arrays]
        # All were finite before: one that is not now is so by the LoRA, or by its strength.
        arrays = [array if total is array else plans.inspected("--lora", total) for array, total in sums]
        every[name] = every[name]._replace(arrays=arrays)
    return list(every.values())


def _check_fit(path: Path, network: plans.Network, found: dict[str, Planned]) -> None:
    """Raises Refusal, named for the LoRA's file, unless its arrays fit the network's."""
    params, changes = (
        unflatten_dict({a.path: jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays}, sep="/")
        for arrays in (network.arrays, found.values())
    )
    try:
        check(params, Adapters(changes.get("low_rank", {}), changes.get("delta", {})))
    except ValueError as misfit:
        right = "give a LoRA of this network"
        raise Refusal(path, f"does not fit {network.name}: {misfit}", right) from misfit


def _sum(array: Planned, changes: list[tuple[dict[str, Planned], float]]) -> Planned:
    """The array and all that is added to it, float32; the array itself where nothing is."""
    module = f"low_rank/{array.path.removesuffix('/kernel')}"
    low = [
        ([found[f"{module}/{part}"] for part in ("a", "b", "scale")], strength)
        for found, strength in changes
        if array.path.endswith("/kernel") and f"{module}/a" in found
    ]
    deltas = [(found[f"delta/{array.path}"], s) for found, s in changes if f"delta/{array.path}" in found]
    if not low and not deltas:
        return array

    def piece(i: int) -> np.ndarray:
        total = array.piece(i).astype(np.float32)
        for parts, strength in low:
            a, b, scale = (part.piece(i).astype(np.float32) for part in parts)
            total += a @ (np.float32(strength) * scale * b)
        for delta, strength in deltas:
            total += np.float32(strength) * delta.piece(i).astype(np.float32)
        return total

    return array._replace(dtype=np.dtype(np.float32), piece=piece)
