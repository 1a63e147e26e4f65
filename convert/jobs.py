"""A conversion from its plan to its files: of networks, of adapters, and back."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax.traverse_util import unflatten_dict

from fvdm_jax.lora import Adapters
from fvdm_jax.models import dit
from fvdm_jax.program import Refusal

from . import back, dialects, families, lora, plans, write
from .merges import EVERY_RULE, Merge, adapters, merged
from .sources import Part, Source, settings
from .tensors import Planned, known

ADAPTERS = "adapters"
LAYOUTS = {"comfy": "lora", "pusa": "pusa", "peft": "adapter_model"}
"""What adapters are given back as, and the stem of the file."""


class Job(NamedTuple):
    """What is to be written, told by `lines`: trees by name, and what config.json and manifest.json say.

    `copies` are files beside them, by name, each a function that writes it.
    """

    lines: list[str]
    trees: dict[str, list[Planned]]
    config: dict
    manifest: dict
    copies: dict[str, Callable[[Path], object]]

    @property
    def bytes(self) -> int:
        return sum(array.bytes for arrays in self.trees.values() for array in arrays)

    def fill(self, folder: Path, progress: write.Progress) -> None:
        """Fills a folder, all but its manifest."""
        for name, arrays in self.trees.items():
            write.tree(folder / name, arrays, progress)
        for name, copy in self.copies.items():
            copy(folder / name)
        (folder / "config.json").write_text(json.dumps(self.config, indent=1) + "\n", "utf-8")

    def check(self, folder: Path, progress: write.Progress) -> None:
        """Raises Refusal unless every array in the folder is what the sources have."""
        for name, arrays in self.trees.items():
            if odd := write.different(folder / name, arrays, progress):
                what = f"differs from its source in {name}/{odd}"
                raise Refusal(folder, what, "remove it and convert again")


def plan(given, sources: list[Source], merges: list[Merge]) -> Job:
    """The job that the flags ask for, of headers alone. Raises Refusal where they do not fit the sources."""
    if given.said is not None and given.said not in families.SIZES:
        raise Refusal("--as", f"{given.said} is no family", f"give one of {', '.join(families.SIZES)}")
    config = settings(given.config) if given.config else None
    parts = [part for source in sources for part in source.parts]
    if given.said and len(parts) > 1:
        raise Refusal("--as", f"would say of {len(parts)} networks what each is", "convert them one by one")
    if len(parts) == 1 and dialects.recognised(parts[0].tensors):
        return _adapters(parts[0], given, config, merges)
    wide = np.dtype(np.float32) if given.dtype or merges else plans.WIDE
    networks = plans.networks(sources, plans.Options(given.said, config, wide))
    told = [str(network) for network in networks]
    told += [f"merged into {m.goal}: {m.part.path} at strength {m.strength:g}" for m in merges]
    kinds = {(network.name, array.path): array.dtype for network in networks for array in network.arrays}
    networks = [_cast(network, given.dtype, kinds) for network in merged(networks, merges)]
    copies = _tokenizer(sources)
    return Job(
        told + _notes(networks, copies),
        {network.name: network.arrays for network in networks},
        plans.config(networks),
        {"networks": {n.name: {"family": n.family.name, "names": n.family.names} for n in networks}},
        copies,
    )


def _cast(network: plans.Network, dtype: str | None, kinds: dict) -> plans.Network:
    """The network as --dtype says; what was merged otherwise goes back to the type it had."""
    arrays = [plans.cast(a, dtype or str(kinds[network.name, a.path])) for a in network.arrays]
    return network._replace(arrays=arrays)


def _notes(networks: list[plans.Network], copies: dict) -> list[str]:
    """What a user should know of networks that make a model, or do not."""
    found = {network.name: network.family.config for network in networks}
    notes = []
    if "text" in found and not copies:
        notes.append(
            "note: no tokenizer lies there: copy google/umt5-xxl/tokenizer.json of Wan's repository into OUT"
        )
    for name in (name for name in found if name.startswith("dit")):
        if "text" in found and found["text"].width != found[name].text_width:
            widths = f"{found[name].text_width} wide, and text gives {found['text'].width}"
            notes.append(f"note: {name} reads text states {widths}: they are of two models")
        if "vae" in found and found["vae"].latent != found[name].channels_out:
            channels = f"{found[name].channels_out} channels, and vae has {found['vae'].latent}"
            notes.append(f"note: {name} makes latents of {channels}: they are of two models")
    if alone := {"dit_high", "dit_low"} - found.keys():
        if len(alone) == 1:
            notes.append(f"note: {min(alone)} is not there, the other of the two experts")
    return notes


def _tokenizer(sources: list[Source]) -> dict[str, Callable[[Path], object]]:
    """What is to be copied beside the weights, by name: the tokenizer, a file or a tensor that holds one."""
    copies = {}
    for source in sources:
        if source.tokenizer:
            copies[source.tokenizer.name] = lambda to, words=source.tokenizer: shutil.copyfile(words, to)
        for part in source.parts:
            if words := part.tensors.get(families.TOKENIZER):
                copies["spiece.model"] = lambda to, words=words: to.write_bytes(words.read().tobytes())
    return copies


def _adapters(part: Part, given, config: dict | None, merges: list[Merge]) -> Job:
    for flag, value in (("--lora", merges), ("--dtype", given.dtype)):
        if value:
            raise Refusal(flag, "has nothing to work on: the source is a LoRA", "leave it out")
    if given.said and given.said not in dit.SIZES:
        raise Refusal("--as", f"{given.said} takes no LoRA", f"give one of {', '.join(dit.SIZES)}")
    arrays, family = adapters(part, given.said, config, part.expert)
    line = f"{ADAPTERS}: of {family or 'a network of no published size'}, {len(part.tensors)} tensors"
    modules = sum(array.path.endswith("/a") for array in arrays)
    changes = sum(array.path.startswith("delta/") for array in arrays)
    lines = [f"{line}, {modules} adapted matrices, {changes} full differences"]
    manifest = {"networks": {ADAPTERS: {"family": family, "names": "lora"}}}
    arrays = [plans.inspected(part.path, array, blank=False) for array in arrays]
    return Job(lines, {ADAPTERS: arrays}, {ADAPTERS: {"family": family}}, manifest, {})


class Return(NamedTuple):
    """What goes back to others' files, told by `lines`: `fill` writes it into a folder."""

    lines: list[str]
    bytes: int
    fill: Callable[[Path, write.Progress], None]


def give_back(folder: Path, layout: str) -> Return:
    """One of our checkpoints in a layout of others. Raises Refusal where one has no place for the other."""
    if (folder / ADAPTERS).is_dir():
        if layout not in LAYOUTS:
            raise Refusal("--to", f"{folder} holds adapters", f"give {', '.join(LAYOUTS)}")
        arrays = write.stored(folder / ADAPTERS)
        size = sum(array.bytes for array in arrays.values())
        return Return([], size, lambda out, progress: _give_adapters(arrays, layout, out, progress))
    networks = plans.opened(folder)
    if layout not in back.LAYOUTS:
        what = f"{layout} is for adapters, and {folder} holds networks"
        raise Refusal("--to", what, f"give {' or '.join(back.LAYOUTS)}")
    kept = [network for network in networks if network.name != "clip"]
    if not kept:
        what = f"{folder} holds only CLIP's tower, without what Wan never runs of its file"
        raise Refusal("--to", what, "use the original file")
    told = [str(network) for network in kept]
    if len(kept) < len(networks):
        told.append("note: clip is left out: only what Wan runs of its file was kept; use the original")
    size = sum(array.bytes for network in kept for array in network.arrays)

    def fill(out: Path, progress: write.Progress) -> None:
        for network in kept:
            back.export(out, network.name, network.family, layout, progress)
        if layout == "diffusers":
            back.write_model_index(out, {network.name: network.family for network in kept})
        for words in (folder / name for name in ("tokenizer.json", "spiece.model")):
            if words.is_file():
                place = out / ("google/umt5-xxl" if layout == "official" else "tokenizer")
                place.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(words, place / words.name)

    return Return(told, size, fill)


def _give_adapters(arrays: dict[str, Planned], layout: str, out: Path, progress: write.Progress) -> None:
    nested = unflatten_dict({path: array.whole() for path, array in arrays.items()}, sep="/")
    made = Adapters(nested.get("low_rank", {}), nested.get("delta", {}))
    tensors = lora.exported(made, EVERY_RULE, layout)
    given = {key: known(array) for key, array in tensors.items()}
    write.safetensors(out / f"{LAYOUTS[layout]}.safetensors", given, progress)
    if layout == "peft":
        config = json.dumps(lora.adapter_config(made, EVERY_RULE), indent=2)
        (out / "adapter_config.json").write_text(config + "\n")
