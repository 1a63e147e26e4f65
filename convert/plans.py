"""What a conversion will do, known from headers alone: the networks found and the arrays they become."""

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict

from fvdm_jax import checkpoint, presets
from fvdm_jax.program import Refusal, plain

from . import dialects, families, sources, write
from .quantised import WIDE
from .sources import Part, Source
from .table import plan
from .tensors import Planned

BLOCK = 1 << 22
FLOATS = ("float16", "bfloat16", "float32", "float64")


class Network(NamedTuple):
    """One part of our checkpoint: its name there, its family, its arrays, and the source that has them."""

    name: str
    family: families.Family
    arrays: list[Planned]
    source: Part

    def __str__(self) -> str:
        count = sum(math.prod(array.shape) for array in self.arrays)
        kinds = Counter(str(array.dtype) for array in self.arrays)
        size, known = self.family.config, self.family.name or "of no published size"
        what = f"{self.name}: {known}, {self.family.names} names, {len(self.source.tensors)} tensors"
        layers = f", {size.layers} layers" if hasattr(size, "layers") else ""
        return f"{what}{layers}, {count:,} parameters, {' and '.join(kinds)}"


class Options(NamedTuple):
    """What a user says of networks: --as, --config, and what eight-bit weights are to be when read."""

    said: str | None = None
    config: dict | None = None
    wide: np.dtype = WIDE


def networks(found_in: list[Source], options: Options) -> list[Network]:
    """The networks of the sources, each by its name in our checkpoint, checked against our networks' shapes.

    Raises Refusal, named for the file, for a tensor without a rule, a rule without a tensor, a shape that is
    not our network's, or two networks of one name.
    """
    found: dict[str, Network] = {}
    for part in (part for source in found_in for part in source.parts):
        network = _network(part, options)
        if network.name in found:
            other = found[network.name].source.path
            raise Refusal(part.path, f"is a second {network.name}, beside {other}", "give one of them")
        found[network.name] = network
    if "dit" in found and "dit_low" in found and found["dit"].source.path.parent.name == "transformer":
        found["dit_high"] = found.pop("dit")._replace(name="dit_high")
    if "dit" in found and {"dit_high", "dit_low"} & found.keys():
        what = "is a transformer beside one that is an expert"
        raise Refusal(found["dit"].source.path, what, "say which is which: high=FILE low=FILE")
    return list(found.values())


def _network(part: Part, options: Options) -> Network:
    if dialects.recognised(part.tensors):
        raise Refusal(
            part.path, "is a LoRA among the networks of a model", "convert it alone, or give it as --lora"
        )
    if options.config:
        part = part._replace(config=options.config)
    family = families.recognise(part, options.said, options.wide)
    try:
        arrays = plan(family.rules, family.tensors, **family.sizes)
    except KeyError as misfit:
        what = f"as {family.name or family.part}: {plain(misfit.args[0], 500)}"
        raise Refusal(part.path, what, "a file of this family is wanted; --as says which it is") from misfit
    _check_shapes(part.path, family, arrays)
    if odd := [array for array in arrays if array.dtype.name not in FLOATS]:
        what = f"has {odd[0].dtype} for {odd[0].path}, which are no weights"
        raise Refusal(part.path, what, "give weights of 8, 16 or 32 bits")
    name = f"dit_{part.expert}" if part.expert and family.part == "dit" else family.part
    return Network(name, family, [inspected(part.path, array) for array in arrays], part)


def _check_shapes(path: Path, family: families.Family, arrays: list[Planned]) -> None:
    """Raises Refusal unless the arrays are those of our network with the family's config."""
    abstract = nn.meta.unbox(checkpoint.KINDS[family.part][1](family.config))
    wanted = {key: leaf.shape for key, leaf in flatten_dict(abstract, sep="/").items()}
    found = {array.path: array.shape for array in arrays}
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            what = f"{key} is {found.get(key, 'absent')}, and of this size {wanted.get(key, 'no part')}"
            raise Refusal(path, what, "copy it again, or say with --as or --config which network it is")


def cast(array: Planned, dtype: str) -> Planned:
    """The array with elements of another type, rounded once; when it is read overflow is refused."""
    kind = np.dtype(dtype)
    if array.dtype == kind:
        return array

    def piece(i: int) -> np.ndarray:
        values = array.piece(i)
        with np.errstate(over="ignore"):
            rounded = values.astype(kind)
        if finite(values) and not finite(rounded):
            raise Refusal("--dtype", f"{dtype} cannot hold the numbers of {array.path}", "give bfloat16")
        return rounded

    return array._replace(dtype=kind, piece=piece)


def inspected(path: Path | str, array: Planned, blank: bool = True) -> Planned:
    """The array, which refuses when it is read what is not finite, and mislabelled bytes.

    With `blank` it warns of kernels that are all 0.
    """
    said = set()

    def piece(i: int) -> np.ndarray:
        values = array.piece(i)
        where = f"{array.path}{f' of layer {i}' if array.layers else ''}"
        if _mislabelled(values):
            what = f"has bfloat16 bytes labelled float16: {where} is around 1 everywhere"
            raise Refusal(path, what, "save it again with its true type")
        if not finite(values):
            raise Refusal(path, f"{where} holds NaN or infinity", "copy it again, or from before it diverged")
        if blank and where not in said and _blank(values):
            said.add(where)
            print(f"note: {plain(path)}: {where} is all 0", flush=True)
        return values

    return array._replace(piece=piece)


def finite(values: np.ndarray) -> bool:
    """Whether no element is NaN or infinite; bfloat16 by its bits, for which numpy is slow."""
    flat = values.reshape(-1)
    # Piece by piece: of the largest embedding the comparison by itself would be a gigabyte.
    for some in (flat[i : i + BLOCK] for i in range(0, flat.size, BLOCK)):
        if values.dtype.name == "bfloat16":
            if np.any((some.view(np.uint16) & 0x7F80) == 0x7F80):
                return False
        elif not np.isfinite(some).all():
            return False
    return True


def _blank(values: np.ndarray) -> bool:
    return values.ndim > 1 and values.size > 64 and not values.reshape(-1).view(np.uint8).any()


def _mislabelled(values: np.ndarray) -> bool:
    """Whether float16 values are kernels only if their bytes are read as bfloat16.

    The bytes of a bfloat16 kernel, numbers far below 1, are as float16 nearly all between 0.25 and 2.
    """
    if values.dtype != np.float16 or values.ndim < 2 or values.size < 4096:
        return False
    some = np.abs(values.reshape(-1)[:: max(1, values.size // 65536)].astype(np.float32))
    return bool(np.mean((some >= 0.25) & (some < 2)) > 0.95)


CLIP = {"prompt": "", "frames": 81, "size": [480, 832]}
OWN = {
    "wan_1_3b": ("wan-t2v", {"shift": 8.0, "guidance": 6.0}),
    "wan_5b": ("ti2v-5b", {"frames": 121, "size": [704, 1280]}),
    "wan_14b_i2v": ("wan-i2v", {"shift": 3.0}),
    "wan_14b_flf2v": ("wan-flf2v", {}),
    "wan_a14b_i2v": ("wan22-i2v", {}),
}
"""How the published models are sampled by their authors: a preset, and what is theirs beside it at CLIP."""


def config(networks: list[Network]) -> dict:
    """What `config.json` says: the config of each network, and how the model is sampled by default."""
    said = {n.name: dataclasses.asdict(n.family.config) for n in networks}
    family = next((n.family.name for n in networks if n.family.part == "dit"), "")
    usual = "wan22-t2v" if {"dit_high", "dit_low"} & said.keys() else "wan-t2v"
    preset, own = OWN.get(family, (usual, {}))
    sampling = CLIP | presets.PRESETS[preset] | own
    # Which frames go first is nothing that a model was trained for.
    return said | {"sampling": {name: value for name, value in sampling.items() if name != "schedule"}}


def _size(part: str, fields: dict):
    """The config of a part of ours, of its fields in config.json."""
    return checkpoint.config_of(checkpoint.KINDS[part][0], fields)


def opened(folder: Path) -> list[Network]:
    """The networks of one of our own checkpoints, as `networks` has those of others.

    Raises Refusal where it is none, or not whole.
    """
    said, manifest = (sources.settings(folder / name) for name in ("config.json", "manifest.json"))
    result = []
    try:
        kinds = {name: str(kind["family"]) for name, kind in manifest["networks"].items()}
        sizes = {name: _size(name.split("_")[0], said[name]) for name in kinds}
    except (KeyError, TypeError, AttributeError) as broken:
        right = "give a folder that convert has made; the bundled model is of no published shape"
        raise Refusal(folder, "is no checkpoint that convert has made", right) from broken
    for name, kind in kinds.items():
        part, size = name.split("_")[0], sizes[name]
        if not (folder / name).is_dir():
            raise Refusal(folder, f"lacks {name}, which its manifest.json lists", "convert it again")
        arrays = write.stored(folder / name)
        family = families.Family(part, kind, size, "our", arrays)
        _check_shapes(folder / name, family, list(arrays.values()))
        source = Part(folder / name, arrays, (), {}, {}, name.partition("_")[2])
        result.append(Network(name, family, list(arrays.values()), source))
    return result
