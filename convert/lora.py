"""Adapters in the files of other programs, of every dialect of `dialects`, into our tree and back.

What is added to a weight is strength·scale·B·A, scale = alpha/rank, or 1 where no alpha is stored.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict

from fvdm_jax.lora import Adapters
from fvdm_jax.models.dit import PATCH
from fvdm_jax.program import Refusal, plain

from . import names
from .dialects import DIALECTS, DIFFERENCES, Dialect, chosen, dialect, refuse
from .table import Rule, moved_shape
from .tensors import DTYPES, Planned, Tensor

FLOATS = {np.dtype(DTYPES[name]) for name in ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")}


class _Place(NamedTuple):
    """A tensor of the network: its rule, and its layer in the stack or 0."""

    rule: Rule
    layer: int


def _places(rules: list[Rule], layers: int) -> dict[str, _Place]:
    """Every official key of the network."""
    moving = [rule for rule in rules if rule.target is not None]
    return {
        rule.source.replace("*", str(i)): _Place(rule, i)
        for rule in moving
        for i in range(layers if "*" in rule.source else 1)
    }


class _Found(NamedTuple):
    """A file's keys by what they change: {rule: {layer: {ending: key}}} for pairs, {rule: {layer: key}}."""

    pairs: dict[Rule, dict[int, dict[str, str]]]
    differences: dict[Rule, dict[int, str]]


def planned(
    tensors: dict[str, Tensor],
    rules: list[Rule],
    layers: int,
    config: dict | None = None,
    expert: str | None = None,
) -> list[Planned]:
    """The arrays of `fvdm_jax.lora.Adapters` that a file holds, to be read piece by piece.

    Paths are `low_rank/…/a`, `b`, `scale`, `rank`, and `delta/…`. `rules` are the network's, of official
    keys, and `layers` its depth. `config` is peft's: adapter_config.json, or what `header_config` finds; the
    dialect peft needs it. `expert`, "transformer" or "transformer_2", chooses where a file adapts both.
    Raises Refusal, naming the key, for what is not understood, not whole, or not of this network.
    """
    tensors = chosen(tensors, expert)
    if not tensors:
        return []
    spoken = dialect(tensors)
    file = next(iter(tensors.values())).file
    if spoken == "peft" and config is None:
        raise Refusal(file, "does not tell its alpha", "put its adapter_config.json beside it")
    found = _found(tensors, DIALECTS[spoken], _places(rules, layers))
    scaled = _Scales(file, (config or {}) if DIALECTS[spoken].alpha == "config" else {})
    plans: list[Planned] = []
    for rule, keys in found.pairs.items():
        pairs = {i: _pair(tensors, each, DIALECTS[spoken], rule, scaled) for i, each in keys.items()}
        plans += _low_rank(rule, pairs, layers)
    for rule, keys in found.differences.items():
        moved = {i: _moved(tensors, key, rule.pattern) for i, key in keys.items()}
        plans.append(_stack(f"delta/{rule.target}", moved, rule, layers))
    return plans


def _found(tensors: dict[str, Tensor], spoken: Dialect, places: dict[str, _Place]) -> _Found:
    found = _Found({}, {})
    flat = {key.removesuffix(".weight").replace(".", "_"): key.removesuffix(".weight") for key in places}
    for key, tensor in tensors.items():
        ending = next(each for each in spoken.endings if key.endswith(each))
        name = key.removeprefix(spoken.prefix).removesuffix(ending)
        module = flat.get(name.replace(".", "_"), "") if spoken.spelling == "flat" else name
        if spoken.spelling == "diffusers" or spoken.spelling == "either" and f"{name}.weight" not in places:
            module = names.official(name, "")
        place = places.get(f"{module}{DIFFERENCES.get(ending, '.weight')}")
        if place is None or ending not in DIFFERENCES and not place.rule.target.endswith("/kernel"):
            refuse(tensors, key, "adapts what the network does not have", "is it of another network?")
        # Integers of unknown scale would be read as if they were the weights.
        if ending != ".alpha" and tensor.dtype not in FLOATS:
            refuse(tensors, key, f"is {tensor.dtype}", "floating point is needed")
        if ending in DIFFERENCES:
            kept, name = found.differences.setdefault(place.rule, {}), place.layer
        else:
            kept, name = found.pairs.setdefault(place.rule, {}).setdefault(place.layer, {}), ending
        if name in kept:
            refuse(tensors, key, f"changes the same as {kept[name]}", "one of them is too many")
        kept[name] = key
    return found


class _Array(NamedTuple):
    """A tensor in our layout, read anew each time."""

    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    key: str
    file: object


def _moved(tensors: dict[str, Tensor], key: str, pattern: str) -> _Array:
    tensor = tensors[key]
    try:
        shape = moved_shape(pattern, tensor.shape, {}, key)
    except KeyError:
        refuse(tensors, key, f"is {tensor.shape}", f"the network has it as {pattern.split(' -> ')[0]}")
    if 0 in shape:
        refuse(tensors, key, f"is {tensor.shape}", "each of its sizes has to be above 0")
    return _Array(tensor.dtype, shape, lambda: rearrange(tensor.read(), pattern), key, tensor.file)


class _Pair(NamedTuple):
    a: _Array
    b: _Array
    scale: Callable[[], float]


def _patterns(rule: Rule) -> tuple[str, str]:
    """Those of A and of B for a layer's rule: of a convolution, B is one by one."""
    ones = " 1" * (len(rule.pattern.split(" -> ")[0].split()) - 2)
    return re.sub(r"\bo\b", "r", rule.pattern), f"o r{ones} -> r o"


def _pair(
    tensors: dict[str, Tensor], keys: dict[str, str], spoken: Dialect, rule: Rule, scaled: "_Scales"
) -> _Pair:
    for ending in spoken.pair:
        if ending not in keys:
            refuse(
                tensors, next(iter(keys.values())), f"has no {ending[1:]} beside it", "the file is not whole"
            )
    a, b = (_moved(tensors, keys[e], p) for e, p in zip(spoken.pair, _patterns(rule), strict=True))
    rank = a.shape[-1]
    if b.shape[0] != rank:
        refuse(tensors, b.key, f"has rank {b.shape[0]}, and {a.key} {rank}", "a pair has one rank")
    if ".alpha" not in keys:
        module = a.key.removeprefix(spoken.prefix).removesuffix(spoken.pair[0])
        scale = scaled.of(module, rank)
        return _Pair(a, b, lambda: scale)
    alpha = tensors[keys[".alpha"]]
    if alpha.shape not in ((), (1,)):
        refuse(tensors, keys[".alpha"], f"is {alpha.shape}", "alpha is one number")

    def read() -> float:
        _check_alpha(value := float(alpha.read().reshape(())), alpha.file, keys[".alpha"])
        return value / rank

    return _Pair(a, b, read)


class _Scales(NamedTuple):
    """The scales that peft's configuration gives to modules; 1 where it says nothing."""

    file: object
    config: dict

    def of(self, module: str, rank: int) -> float:
        if self.config.get("use_dora"):
            raise Refusal(self.file, "is DoRA, which cannot be read", "merge it where it was made")
        patterns = self.config.get("alpha_pattern") or {}
        # peft takes them for regular expressions; what it writes itself are ends of names.
        if not isinstance(patterns, dict) or any(re.search(r"[^\w.^]", name) for name in patterns):
            raise Refusal(self.file, "has an alpha_pattern that cannot be read", "write names of modules")
        fitting = [a for name, a in patterns.items() if f".{module}".endswith(f".{name.lstrip('^')}")]
        alpha = fitting[0] if fitting else self.config.get("lora_alpha", rank if not self.config else None)
        _check_alpha(alpha, self.file, "lora_alpha")
        return alpha / rank**0.5 if self.config.get("use_rslora") else alpha / rank


def _check_alpha(alpha: object, file: object, name: str) -> None:
    if type(alpha) not in (int, float) or not abs(alpha) < 1e30:
        raise Refusal(file, f"{name} is {plain(alpha)}", "alpha is one finite number")


def header_config(file: object, metadata: dict[str, str], expert: str = "transformer") -> dict | None:
    """peft's configuration of an expert where diffusers wrote it into a file's header, else None."""
    try:
        every = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        ours = {k.removeprefix(f"{expert}."): v for k, v in every.items() if k.startswith(f"{expert}.")}
    except (ValueError, AttributeError, RecursionError) as wrong:
        raise Refusal(file, "has a damaged lora_adapter_metadata in its header") from wrong
    return ours or None


def _low_rank(rule: Rule, pairs: dict[int, _Pair], layers: int) -> list[Planned]:
    def numbers(dtype: type, read: Callable[[_Pair], float]) -> dict[int, _Array]:
        return {
            i: pair.a._replace(dtype=np.dtype(dtype), shape=(), read=lambda p=pair: dtype(read(p)))
            for i, pair in pairs.items()
        }

    path = f"low_rank/{rule.target.removesuffix('/kernel')}"
    return [
        _stack(f"{path}/a", {i: pair.a for i, pair in pairs.items()}, rule, layers, ranks=1),
        _stack(f"{path}/b", {i: pair.b for i, pair in pairs.items()}, rule, layers, ranks=0),
        _stack(f"{path}/scale", numbers(np.float32, lambda pair: pair.scale()), rule, layers),
        _stack(f"{path}/rank", numbers(np.int32, lambda pair: pair.a.shape[-1]), rule, layers),
    ]


def _stack(path: str, found: dict[int, _Array], rule: Rule, layers: int, ranks: int | None = None) -> Planned:
    """The layers that were found as one array; `ranks` is the axis along which they may differ."""
    first = next(iter(found.values()))
    for each in found.values():
        sizes = enumerate(zip(each.shape, first.shape, strict=True))
        if any(n != m for axis, (n, m) in sizes if axis != ranks):
            what = f"{each.key} is {each.shape} in our order, and {first.key} {first.shape}"
            raise Refusal(each.file, what, "layers of one stack are alike")
    shape = tuple(map(max, zip(*(each.shape for each in found.values()), strict=True)))
    dtype = first.dtype if len({each.dtype for each in found.values()}) == 1 else np.dtype(np.float32)

    def piece(i: int) -> np.ndarray:
        whole = np.zeros(shape, dtype)
        if i in found:
            whole[tuple(map(slice, found[i].shape))] = found[i].read()
        return whole

    stacked = "*" in rule.source
    return Planned(path, dtype, (layers, *shape) if stacked else shape, layers if stacked else None, piece)


class _Layer(NamedTuple):
    """One adapted layer in the file's layout, under its official name."""

    module: str
    a: np.ndarray
    b: np.ndarray
    scale: np.float32

    @property
    def alpha(self) -> int | float:
        """alpha of which the scale was made, but for rounding where it is no whole number."""
        alpha = float(np.float32(float(self.scale) * len(self.a)))
        return int(alpha) if alpha.is_integer() else alpha


def _layers(adapters: Adapters, rules: list[Rule]) -> Iterator[_Layer]:
    arrays = {path: np.asarray(array) for path, array in flatten_dict(adapters.low_rank, sep="/").items()}
    for rule in rules:
        path = (rule.target or "").removesuffix("/kernel")
        if f"{path}/a" not in arrays:
            continue
        a, b, scale = (arrays[f"{path}/{part}"] for part in ("a", "b", "scale"))
        ranks = arrays.get(f"{path}/rank", np.full(scale.shape, a.shape[-1]))
        for at in np.ndindex(scale.shape):
            rank = int(ranks[at])
            parts = (a[at][:, :rank], b[at][:rank])
            turned = [_back(x, pattern) for x, pattern in zip(parts, _patterns(rule), strict=True)]
            if rank:
                yield _Layer(_name(rule, at).removesuffix(".weight"), *turned, scale[at])


def _check_covered(adapters: Adapters, rules: list[Rule]) -> None:
    targets = {rule.target for rule in rules}
    pairs = {path.rpartition("/")[0] + "/kernel" for path in flatten_dict(adapters.low_rank, sep="/")}
    if odd := sorted((pairs | flatten_dict(adapters.delta, sep="/").keys()) - targets):
        raise KeyError(f"adapters of what has no rule: {odd}")


def _name(rule: Rule, at: tuple[int, ...]) -> str:
    return rule.source.replace("*", str(at[0])) if at else rule.source


def _back(array: np.ndarray, pattern: str) -> np.ndarray:
    left, right = pattern.split(" -> ")
    sizes = {"p": PATCH, "q": PATCH} if "(c p q)" in right else {}
    return np.ascontiguousarray(rearrange(array, f"{right} -> {left}", **sizes))


def exported(adapters: Adapters, rules: list[Rule], name: str) -> dict[str, np.ndarray]:
    """The tensors of a file in the dialect "comfy", "pusa" or "peft", under official names.

    comfy has `.alpha` where the scale is not 1; pusa has no place for it, so that B is multiplied by it and
    rounded to B's dtype; peft's lies in `adapter_config`. Differences that are all zeros are not written.
    Raises Refusal for a difference that the dialect cannot hold, KeyError for an array without a rule.
    """
    if name not in ("comfy", "pusa", "peft"):
        raise Refusal(name, "is no dialect that can be written", "choose comfy, pusa or peft")
    _check_covered(adapters, rules)
    spoken, tensors = DIALECTS[name], {}
    for layer in _layers(adapters, rules):
        key = f"{spoken.prefix}{layer.module}"
        b = layer.b
        if name == "pusa" and layer.scale != 1:
            b = (b.astype(np.float32) * layer.scale).astype(b.dtype)
        tensors |= {f"{key}{spoken.pair[0]}": layer.a, f"{key}{spoken.pair[1]}": b}
        if spoken.alpha == "key" and layer.scale != 1:
            tensors[f"{key}.alpha"] = np.asarray(layer.alpha, np.float32)
    deltas = {path: np.asarray(array) for path, array in flatten_dict(adapters.delta, sep="/").items()}
    for rule in (rule for rule in rules if rule.target in deltas):
        delta, endings = deltas[rule.target], {parameter: e for e, parameter in DIFFERENCES.items()}
        for at in np.ndindex(delta.shape[: "*" in rule.source]):
            module, _, parameter = _name(rule, at).rpartition(".")
            if not np.any(delta[at]):
                continue
            if not spoken.differences or f".{parameter}" not in endings:
                raise Refusal(name, f"cannot hold the difference of {module}.{parameter}", "merge it instead")
            tensors[f"{spoken.prefix}{module}{endings[f'.{parameter}']}"] = _back(delta[at], rule.pattern)
    return tensors


def adapter_config(adapters: Adapters, rules: list[Rule]) -> dict:
    """What belongs into adapter_config.json beside the dialect peft. Raises Refusal where nothing does."""
    ranks = {layer.module: (len(layer.a), layer.alpha) for layer in _layers(adapters, rules)}
    if not ranks:
        raise Refusal("peft", "holds low ranks, of which these adapters have none", "choose comfy")
    (rank, alpha), _ = Counter(ranks.values()).most_common(1)[0]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": {module: r for module, (r, _) in ranks.items() if r != rank},
        "alpha_pattern": {module: a for module, (_, a) in ranks.items() if a != alpha},
        "bias": "none",
    }
