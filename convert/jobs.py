"""A conversion from its plan to its files: of networks, of adapters, merged or apart, and back."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fvdm_jax.lora import Adapters
from fvdm_jax.models import dit
from fvdm_jax.program import Refusal, folder_output, numbered

from . import back, dialects, families, lora, plans, wan, write
from .sources import Part, Source, find, settings
from .tensors import Planned

ADAPTERS = "adapters"
EVERY_RULE = wan.dit(image=True, positions=True)
"""A LoRA may adapt what only some of the transformers have; which it is for is seen when it is used."""


class Job(NamedTuple):
    """What is to be written: trees by name, config.json and manifest.json; `lines` tell it."""

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
                raise Refusal(
                    folder, f"differs from its source in {name}/{odd}", "remove it and convert again"
                )


def plan(given, sources: list[Source]) -> Job:
    """The job that the flags ask for, of headers alone. Raises Refusal where they do not fit the sources."""
    if given.said is not None and given.said not in families.SIZES:
        raise Refusal("--as", f"{given.said} is no family", f"give one of {', '.join(families.SIZES)}")
    if given.config and not given.config.is_file():
        raise Refusal("--config", f"{given.config} is no file", "give the config.json of the network")
    config = settings(given.config) if given.config else None
    parts = [part for source in sources for part in source.parts]
    if len(parts) == 1 and dialects.recognised(parts[0].tensors):
        return _adapters(parts[0], given, config)
    networks = plans.networks(sources, plans.Options(given.said, config, given.dtype))
    networks = _merged(networks, given.lora)
    return Job(
        [str(network) for network in networks],
        {network.name: network.arrays for network in networks},
        plans.config(networks),
        {"networks": {n.name: {"family": n.family.name, "names": n.family.names} for n in networks}},
        _tokenizer(sources),
    )


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


def _adapters(part: Part, given, config: dict | None) -> Job:
    if given.lora or given.dtype:
        raise Refusal("--lora or --dtype", "has nothing to work on: the source is a LoRA", "leave it out")
    arrays, family = _lora(part, given.said, config)
    line = f"{ADAPTERS}: of {family or 'a network of no published size'}, {len(part.tensors)} tensors"
    modules = sum(array.path.endswith("/a") for array in arrays)
    changes = sum(array.path.startswith("delta/") for array in arrays)
    lines = [f"{line}, {modules} adapted matrices, {changes} full differences"]
    manifest = {"networks": {ADAPTERS: {"family": family, "names": "lora"}}}
    return Job(lines, {ADAPTERS: arrays}, {ADAPTERS: {"family": family}}, manifest, {})


def _lora(
    part: Part, said: str | None, config: dict | None, layers: int = 0, expert: str = ""
) -> tuple[list[Planned], str]:
    """The arrays of a LoRA, and the published network that it is for, "" where its width is none's."""
    depth = layers or 1 + max(map(_layer, part.tensors), default=-1)
    widths = {tensor.shape[1] for key, tensor in part.tensors.items() if _is_down(key, tensor)}
    fitting = {size.width: name for name, size in reversed(dit.SIZES.items()) if size.width in widths}
    family = said or next(iter(fitting.values()), "")
    if family in dit.SIZES and not layers:
        depth = dit.SIZES[family].layers
    beside = part.path.parent / "adapter_config.json"
    whose = {"high": "transformer", "low": "transformer_2"}.get(expert)
    whose = whose or next((name for name in dialects.EXPERTS if _only(part, name)), None)
    peft = config or settings(beside) or lora.header_config(part.path, part.metadata, whose or "transformer")
    return lora.planned(part.tensors, EVERY_RULE, depth, peft, whose), family


def _only(part: Part, expert: str) -> bool:
    return all(key.startswith(f"{expert}.") for key in part.tensors)


def _is_down(key: str, tensor) -> bool:
    """Whether it is A of a query, whose second axis is the network's width."""
    query = any(word in key for word in ("self_attn.q.", "self_attn_q.", "attn1.to_q."))
    return query and ("lora_A" in key or "lora_down" in key) and len(tensor.shape) == 2


def _layer(key: str) -> int:
    """The number of the block in a key of a LoRA, −1 where it is in none."""
    _, _, rest = key.replace("_", ".").partition("blocks.")
    number_, _, _ = rest.partition(".")
    return int(number_) if number_.isdecimal() else -1


def _merged(networks: list[plans.Network], asked: list[str]) -> list[plans.Network]:
    """The networks with every LoRA of `--lora` merged into the transformer that it names."""
    for text in asked:
        expert, name, strength = _asked(text)
        goal = f"dit_{expert}" if expert else "dit"
        fitting = [i for i, network in enumerate(networks) if network.name == goal]
        if not fitting:
            have = ", ".join(network.name for network in networks)
            raise Refusal(
                "--lora", f"there is no {goal} among {have}", "name the expert: high=FILE or low=FILE"
            )
        parts = find(Path(name)).parts
        if len(parts) != 1 or not dialects.recognised(parts[0].tensors):
            raise Refusal("--lora", f"{name} is no LoRA", "give the file of one")
        network = networks[fitting[0]]
        changes, _ = _lora(parts[0], None, None, network.family.config.layers, expert)
        networks[fitting[0]] = network._replace(arrays=_added(network, changes, strength, name))
    return networks


def _asked(text: str) -> tuple[str, str, float]:
    """Expert, file and strength of `[high=|low=]FILE[:STRENGTH]`."""
    expert, equals, rest = text.partition("=")
    expert, rest = (expert, rest) if equals and expert in ("high", "low") else ("", text)
    return expert, *numbered(rest, 1.0)


def _added(network: plans.Network, changes: list[Planned], strength: float, name: str) -> list[Planned]:
    """The arrays with strength·change added in float32 and rounded once. Raises Refusal for a misfit."""
    found, arrays = {change.path: change for change in changes}, {a.path: a for a in network.arrays}
    for path, change in found.items():
        goal = path.removeprefix("delta/") if path.startswith("delta/") else _kernel(path)
        if goal not in arrays:
            raise Refusal(
                name, f"adapts {goal}, which {network.name} does not have", "is it of another network?"
            )
        _check_fit(name, arrays[goal], path, change)
    result = []
    for array in network.arrays:
        module = f"low_rank/{array.path.removesuffix('/kernel')}"
        pair = [found.get(f"{module}/{part}") for part in ("a", "b", "scale")]
        delta = found.get(f"delta/{array.path}")
        low = pair if array.path.endswith("/kernel") and pair[0] else None
        result.append(_sum(array, low, delta, strength) if low or delta else array)
    return result


def _kernel(path: str) -> str:
    return f"{path.removeprefix('low_rank/').rpartition('/')[0]}/kernel"


def _check_fit(name: str, array: Planned, path: str, change: Planned) -> None:
    last = path.rpartition("/")[2] if path.startswith("low_rank/") else "delta"
    wanted = {"a": array.shape[:-1], "b": (*array.shape[:-2], array.shape[-1]), "delta": array.shape}.get(
        last
    )
    found = {"a": change.shape[:-1], "b": (*change.shape[:-2], change.shape[-1])}.get(last, change.shape)
    if wanted is not None and wanted != found:
        what = f"changes {array.path} {array.shape} by {path} {change.shape}, which does not fit"
        raise Refusal(name, what, "is it of another network?")


def _sum(array: Planned, low: list[Planned] | None, delta: Planned | None, strength: float) -> Planned:
    def piece(i: int) -> np.ndarray:
        total = array.piece(i).astype(np.float32)
        if low:
            a, b, scale = (part.piece(i).astype(np.float32) for part in low)
            total += a @ (np.float32(strength) * scale * b)
        if delta:
            total += np.float32(strength) * delta.piece(i).astype(np.float32)
        return total.astype(array.dtype)

    return array._replace(piece=piece)


def give_back(given) -> None:
    """Writes one of our checkpoints in the layout that `--to` names."""
    known = (*back.LAYOUTS, "comfy", "pusa", "peft")
    if given.to not in known or len(given.source) != 1:
        raise Refusal(
            "--to", f"{given.to} is no layout, or there is more than one source", f"give {', '.join(known)}"
        )
    folder = Path(given.source[0])
    if (folder / ADAPTERS).is_dir():
        _give_adapters(folder, given)
        return
    if given.to not in back.LAYOUTS:
        raise Refusal(
            "--to", f"{given.to} is for adapters, and {folder} is a network", "give official or diffusers"
        )
    networks = plans.opened(folder)
    for network in networks:
        print(network)
    if given.dry_run:
        return
    with folder_output(given.out) as draft:
        for network in networks:
            back.export(draft, network.name, network.family, given.to, lambda count: None)
        for words in (folder / name for name in ("tokenizer.json", "spiece.model")):
            if words.is_file():
                place = draft / ("google/umt5-xxl" if given.to == "official" else "tokenizer")
                place.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(words, place / words.name)
    print(f"wrote {given.out}")


def _give_adapters(folder: Path, given) -> None:
    if given.to in back.LAYOUTS:
        raise Refusal("--to", f"{folder} holds adapters", "give comfy, pusa or peft")
    nested: dict = {"low_rank": {}, "delta": {}}
    for path, array in write.stored(folder / ADAPTERS).items():
        *parents, leaf = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array.whole()
    adapters = Adapters(**nested)
    tensors = lora.exported(adapters, EVERY_RULE, given.to)
    stem = {"comfy": "lora", "pusa": "pusa", "peft": "adapter_model"}[given.to]
    known = {key: write.known(array) for key, array in tensors.items()}
    with folder_output(given.out) as draft:
        write.safetensors(draft / f"{stem}.safetensors", known, lambda count: None)
        if given.to == "peft":
            config = json.dumps(lora.adapter_config(adapters, EVERY_RULE), indent=2)
            (draft / "adapter_config.json").write_text(config + "\n")
    print(f"wrote {given.out}")
