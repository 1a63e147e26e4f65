"""What a user names as a source: a file, a folder of one model or of several, an index of shards, hf:REPO."""

import json
from pathlib import Path
from typing import NamedTuple

from fvdm_jax.program import Refusal, plain

from . import files, safetensors_file, torch_file
from .tensors import Tensor

INDEX = ".index.json"
WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
TOKENIZERS = ("tokenizer.json", "spiece.model")
DIFFUSERS = ("transformer", "transformer_2", "vae", "text_encoder")
DEEPSPEED = "mp_rank_00_model_states.pt"
"""Where a trainer's folder of DeepSpeed has the tensors; Pusa's is NAME.ckpt/checkpoint/ and this."""

ENCODED = ".tensors.pth"
"""How Pusa's program names the clips that it has encoded, in the folder train of a dataset."""

EXPERTS = {"high_noise_model": "high", "low_noise_model": "low", "transformer_2": "low"}


class Part(NamedTuple):
    """The tensors of one network, where they came from, and the config beside them, {} where there is none.

    `expert` is "high" or "low" where the place says which of Wan2.2's two experts it is.
    """

    path: Path
    tensors: dict[str, Tensor]
    files: tuple[Path, ...]
    config: dict
    metadata: dict
    expert: str = ""


class Source(NamedTuple):
    """The parts of what a user names, and the tokenizer's file that lies with them."""

    parts: list[Part]
    tokenizer: Path | None = None


def expert_of(text: str) -> tuple[str, str]:
    """ "high", "low" or "" for neither, and the rest of `[high=|low=]REST`."""
    expert, equals, rest = text.partition("=")
    return (expert, rest) if equals and expert in ("high", "low") else ("", text)


def find(path: Path, expert: str = "") -> Source:
    """What lies at `path`; only headers are read. Raises Refusal, named for the file.

    With an `expert`, "high" or "low", all of it is of that one of Wan2.2's two.
    """
    if expert:
        source = find(path)
        return source._replace(parts=[part._replace(expert=expert) for part in source.parts])
    if not path.is_dir():
        return Source([_part(path)])
    if (path / "manifest.json").is_file() and (path / "config.json").is_file():
        raise Refusal(path, "is a checkpoint of ours already", "give what it was made of, or --to a layout")
    inside = [path / name for name in dict.fromkeys((*DIFFUSERS, *EXPERTS))]
    folders = [path, *(folder for folder in inside if folder.is_dir())]
    if (path / "checkpoint" / DEEPSPEED).is_file():
        return Source([_part(path / "checkpoint" / DEEPSPEED)])
    parts = [_part(file) for folder in folders for file in _weights(folder)]
    if (path / "image_encoder").is_dir():
        print(
            f"note: {path / 'image_encoder'} is left out; convert the models_clip_*.pth of Wan's repository"
        )
    if not parts:
        raise Refusal(path, "has no weights", f"give a folder with {', '.join(WEIGHTS[:3])} files")
    paired = any(part.expert for part in parts)
    if paired:
        parts = [p._replace(expert="high") if p.path.parent.name == "transformer" else p for p in parts]
    words = [path / place / name for place in ("google/umt5-xxl", "tokenizer", ".") for name in TOKENIZERS]
    return Source(parts, next((word for word in words if word.is_file()), None))


def has_clips(folder: Path) -> bool:
    """Whether a folder is a dataset with encoded clips."""
    return any(True for _ in (folder / "train").rglob(f"*{ENCODED}"))


def _weights(folder: Path) -> list[Path]:
    """The indices of a folder and its weights files that no index lists, by name."""
    every = sorted(folder.iterdir())
    indices = [file for file in every if file.name.endswith(INDEX)]
    shards = {shard for index in indices for shard in weight_map(index).values()}
    return indices + [
        file for file in every if file.suffix in WEIGHTS and file.name not in shards and not file.is_dir()
    ]


def _part(path: Path) -> Part:
    expert, config = EXPERTS.get(path.parent.name, ""), settings(path.parent / "config.json")
    if path.name.endswith(INDEX):
        tensors, shards = _sharded(path)
        return Part(path, tensors, (path, *shards), config, {}, expert)
    tensors, metadata = _tensors(path)
    return Part(path, tensors, (path,), config, metadata, expert)


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and metadata of a file, whose content says what it is."""
    head = files.look(path)
    if head.startswith(b"PK\3\4"):
        return torch_file.read(path), {}
    return safetensors_file.read(path)


def settings(path: Path) -> dict:
    """The JSON object of a config file; {} where there is no file. Raises Refusal where it is none."""
    if not path.is_file():
        return {}
    return _object(path)


def _object(path: Path) -> dict:
    if files.size_of(path) > 64 << 20:
        raise Refusal(path, "is too large for a list of settings", "give the file that came with the weights")
    try:
        found = json.loads(files.read_bytes(path, 0, files.size_of(path)), object_pairs_hook=files.once(path))
    except (ValueError, RecursionError) as broken:
        raise Refusal(path, "is not JSON", "give the file that came with the weights") from broken
    if not isinstance(found, dict):
        raise Refusal(path, "holds no object", "give the file that came with the weights")
    return found


def weight_map(index: Path) -> dict[str, str]:
    """Key → name of the shard in the index's folder. Raises Refusal for names that lead elsewhere."""
    found = _object(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise Refusal(index, "has no weight_map", "give the index that came with the weights")
    for key, name in found.items():
        odd = (
            not isinstance(name, str)
            or not name.isprintable()
            or set(name) & set("/\\:")
            or name in ("", "..")
        )
        if odd or not name.endswith(".safetensors"):
            what = (
                f"says that {plain(key, 120)} lies in {plain(name, 120)}, which is no safetensors file's name"
            )
            raise Refusal(index, what, "shards lie beside their index")
    return found


def _sharded(index: Path) -> tuple[dict[str, Tensor], list[Path]]:
    """All tensors that an index lists, and the shards; exactly these must be in the shards."""
    listed = weight_map(index)
    shards = [index.parent / name for name in sorted(set(listed.values()))]
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        files.look(shard)
        found, _ = safetensors_file.read(shard)
        for key, tensor in found.items():
            if listed.get(key) != shard.name:
                where = f"in {plain(listed[key], 120)}" if key in listed else "nowhere"
                raise Refusal(
                    shard, f"holds {plain(key, 200)}, which by {index.name} is {where}", "copy both again"
                )
            tensors[key] = tensor
    if absent := sorted(set(listed) - set(tensors)):
        what = f"lists {plain(absent[0], 200)} in {listed[absent[0]]}, where it is not"
        raise Refusal(index, what, "copy both again")
    return tensors, shards
