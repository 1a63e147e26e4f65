"""A converter is a table of rules; applying it either accounts for every tensor and every rule, or raises."""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from einops import EinopsError, rearrange

from .tensors import Planned, Tensor, known


class Rule(NamedTuple):
    """`source` key, `target` path and the einops pattern between them.

    `*` in the source stands for a layer's number; the layers are stacked on a new first axis. Without a
    target it is one of `left_out`.
    """

    source: str
    target: str | None
    pattern: str


def left_out(prefix: str) -> Rule:
    """The rule of tensors that our tree has no place for: keys that begin so are passed over, if any do.

    It goes before all rules that move a tensor, so that it can leave out one layer of a stack.
    """
    return Rule(prefix, None, "")


def dense(source: str, target: str, names: str = "o i -> i o") -> tuple[Rule, Rule]:
    """The rules of a linear layer or a convolution with a bias."""
    return Rule(f"{source}.weight", f"{target}/kernel", names), Rule(
        f"{source}.bias", f"{target}/bias", "o -> o"
    )


def affine(source: str, target: str) -> tuple[Rule, Rule]:
    """The rules of a norm with scale and bias."""
    return Rule(f"{source}.weight", f"{target}/scale", "d -> d"), Rule(
        f"{source}.bias", f"{target}/bias", "d -> d"
    )


def convert(rules: list[Rule], tensors: dict[str, np.ndarray], **sizes: int) -> dict:
    """The tensors as a nested tree, each moved by its rule. Raises KeyError as `plan` does."""
    # Here, since what only reads flags imports this module too.
    from flax.traverse_util import unflatten_dict

    read = {key: known(array) for key, array in tensors.items()}
    return unflatten_dict({array.path: array.whole() for array in plan(rules, read, **sizes)}, sep="/")


def plan(rules: list[Rule], tensors: dict[str, Tensor], **sizes: int) -> list[Planned]:
    """The arrays of our tree, to be read from the tensors piece by piece.

    `sizes` are lengths that the einops patterns need. KeyError names every tensor without a rule, every
    rule without a tensor and every layer missing inside a stack, and tells of stacks of unequal depth, of
    layers that are not alike, and of anything used or set twice. That all stacks lack their last layers
    cannot be told from the tensors alone.
    """
    found = _matched(rules, list(tensors))
    planned = [_planned(rule, tensors, found[rule], sizes) for rule in found]
    paths = Counter(array.path for array in planned)
    if twice := sorted(path for path, count in paths.items() if count > 1):
        raise KeyError(f"two rules put a tensor at {twice[0]}")
    return planned


def _matched(rules: list[Rule], every: list[str]) -> dict[Rule, dict[int, str]]:
    """The keys of each rule that moves any, by number of layer; raises KeyError as `plan` says."""
    passed_over = tuple(rule.source for rule in rules if rule.target is None)
    keys = [key for key in every if not key.startswith(passed_over)]
    found = {rule: _layers(rule, keys) for rule in rules if rule.target is not None}
    used = [key for layers in found.values() for key in layers.values()]
    twice = sorted(key for key, count in Counter(used).items() if count > 1)
    depths = {len(layers) for rule, layers in found.items() if "*" in rule.source and layers}
    absent = [
        rule.source for rule, layers in found.items() if sorted(layers) != list(range(max(len(layers), 1)))
    ]
    unknown = sorted(set(keys) - set(used))
    if absent or unknown:
        raise KeyError(f"rules without their tensors: {absent}; tensors without a rule: {unknown}")
    if twice:
        raise KeyError(f"tensors that two rules claim: {twice}")
    if len(depths) > 1:
        stacks = {rule.source: len(layers) for rule, layers in found.items() if "*" in rule.source}
        shallow = [source for source, depth in stacks.items() if depth < max(depths)]
        raise KeyError(f"stacks of unequal depth: {sorted(depths)}; lacking the last layers: {shallow}")
    return found


def _planned(rule: Rule, tensors: dict[str, Tensor], layers: dict[int, str], sizes: dict) -> Planned:
    keys = [layers[i] for i in sorted(layers)]
    first = tensors[keys[0]]
    for key in keys:
        if (tensors[key].shape, tensors[key].dtype) != (first.shape, first.dtype):
            what = f"{key} is {tensors[key].dtype} {tensors[key].shape}"
            raise KeyError(f"{what}, and {keys[0]} is {first.dtype} {first.shape}")
    shape = moved_shape(rule.pattern, first.shape, sizes, keys[0])
    stack = len(keys) if "*" in rule.source else None

    def piece(i: int) -> np.ndarray:
        return _move(tensors[keys[i]].read(), rule.pattern, sizes)

    return Planned(rule.target, first.dtype, (stack, *shape) if stack else shape, stack, piece)


def unplan(rules: list[Rule], arrays: dict[str, Planned], **sizes: int) -> dict[str, Tensor]:
    """The tensors that `plan` would make these arrays of: the rules read from right to left.

    In the rules' order, layer by layer. What a rule leaves out does not come back. Raises KeyError for
    an array without a rule, or the reverse.
    """
    moving = [rule for rule in rules if rule.target is not None]
    if odd := sorted({rule.target for rule in moving} ^ arrays.keys()):
        raise KeyError(f"arrays without a rule, or rules without an array: {odd}")
    tensors = {}
    stacked = [n for n, rule in enumerate(moving) if "*" in rule.source]
    for n, rule in enumerate(moving):
        array, pattern = arrays[rule.target], " -> ".join(reversed(rule.pattern.split(" -> ")))
        shape = moved_shape(pattern, array.shape[1:] if array.layers else array.shape, sizes, rule.target)
        for i in range(array.layers or 1):

            def read(i=i, array=array, pattern=pattern):
                return _move(array.piece(i), pattern, sizes)

            place = (stacked[0], i, n) if n in stacked else (n, 0, n)
            key = rule.source.replace("*", str(i))
            tensors[key] = place, Tensor(Path(rule.target), array.dtype, shape, read)
    return {key: tensor for key, (_, tensor) in sorted(tensors.items(), key=lambda item: item[1][0])}


def _layers(rule: Rule, keys: list[str]) -> dict[int, str]:
    """The keys that the rule matches, by number of layer; 0 for a rule without layers."""
    pattern = re.compile(re.escape(rule.source).replace(r"\*", r"(\d+)"))
    matches = [m for m in map(pattern.fullmatch, keys) if m]
    return {int(m[1]) if m.groups() else 0: m[0] for m in matches}


def _needed(pattern: str, sizes: dict) -> dict:
    return {name: n for name, n in sizes.items() if re.search(rf"\b{name}\b", pattern)}


def moved_shape(pattern: str, shape: tuple[int, ...], sizes: dict, key: str) -> tuple[int, ...]:
    """The shape that the pattern makes of a shape. Raises KeyError, naming the key, where it does not fit."""
    try:
        # Of no bytes: one element, repeated by strides of 0.
        return rearrange(np.broadcast_to(np.int8(0), shape), pattern, **_needed(pattern, sizes)).shape
    except EinopsError as misfit:
        raise KeyError(f"{key} is {shape}, which is not of the form {pattern}") from misfit


def _move(tensor: np.ndarray, pattern: str, sizes: dict) -> np.ndarray:
    return np.ascontiguousarray(rearrange(tensor, pattern, **_needed(pattern, sizes)))
