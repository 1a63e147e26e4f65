"""A converter is a table of rules; applying it either accounts for every tensor and every rule, or raises."""

import re
from collections import Counter
from typing import NamedTuple

import numpy as np
from einops import rearrange


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
    """The tensors as a nested tree, each moved by its rule.

    `sizes` are lengths that the einops patterns need. KeyError names every tensor without a rule, every
    rule without a tensor and every layer missing inside a stack, and tells of stacks of unequal depth and of
    anything used or set twice. That all stacks lack their last layers cannot be told from the tensors alone.
    """
    passed_over = tuple(rule.source for rule in rules if rule.target is None)
    keys = [key for key in tensors if not key.startswith(passed_over)]
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
    if twice or len(depths) > 1:
        raise KeyError(f"tensors that two rules claim: {twice}; stacks of unequal depth: {sorted(depths)}")
    tree: dict = {}
    for rule, layers in found.items():
        arrays = [_move(tensors[layers[i]], rule.pattern, sizes) for i in sorted(layers)]
        _put(tree, rule.target, np.stack(arrays) if "*" in rule.source else arrays[0])
    return tree


def _layers(rule: Rule, keys: list[str]) -> dict[int, str]:
    """The keys that the rule matches, by number of layer; 0 for a rule without layers."""
    pattern = re.compile(re.escape(rule.source).replace(r"\*", r"(\d+)"))
    matches = [m for m in map(pattern.fullmatch, keys) if m]
    return {int(m[1]) if m.groups() else 0: m[0] for m in matches}


def _move(tensor: np.ndarray, pattern: str, sizes: dict) -> np.ndarray:
    needed = {name: n for name, n in sizes.items() if re.search(rf"\b{name}\b", pattern)}
    return np.ascontiguousarray(rearrange(tensor, pattern, **needed))


def _put(tree: dict, path: str, array: np.ndarray) -> None:
    *parents, leaf = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    if leaf in tree:
        raise KeyError(f"two rules put a tensor at {path}")
    tree[leaf] = array
