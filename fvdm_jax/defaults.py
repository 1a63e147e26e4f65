"""What a model's folder says of itself before jax is imported: its parts, sizes, and how it is sampled."""

import dataclasses
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from fvdm_jax.program import Refusal, plain

PATCH = 2
"""Latent pixels to a side of a token of the transformer."""

ALONE, EXPERTS = ("dit",), ("dit_high", "dit_low")
"""The transformers of a model: one, or Wan2.2's two, of which the first takes the high levels."""

SAMPLING = tuple("prompt negative frames size steps solver process spacing shift guidance fps".split())
"""The settings that a model has of its own."""

OPTIONAL = {"schedule": "together", "boundary": 0.875}
"""Those that it may have, and what they are else; `boundary` is Wan2.2's, of use to two experts alone."""


@dataclasses.dataclass(frozen=True)
class Defaults:
    """The settings with which a model samples where the user states none, and the file that says so.

    The sides of its videos are multiples of `multiple` pixels; its latents have so many `channels`.
    `transformers` are ALONE or EXPERTS. Of Wan's own I2V networks `pictures` counts those that it must be
    given: 1, or 2 of FLF2V; else it is 0. `files` are the stamps of its weights.
    """

    config: Path
    sampling: dict
    multiple: int
    channels: int
    transformers: tuple[str, ...] = ALONE
    pictures: int = 0
    files: tuple[tuple[str, int, int], ...] = ()


def stamps(paths: Iterable[Path]) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of each file, or of all in a folder: another one of its name is told by them.

    Of files alone, since a mounted bucket knows no time of a folder. Raises Refusal, named for the one that
    cannot be read.
    """
    found = []
    for path in dict.fromkeys(paths):
        try:
            every = [file.stat() for file in (path.rglob("*") if path.is_dir() else [path])]
        except OSError as failure:
            raise Refusal(path, f"cannot be read: {failure.strerror}", "make it readable") from failure
        told = [one for one in every if stat.S_ISREG(one.st_mode)]
        newest = max((one.st_mtime_ns for one in told), default=0)
        found.append((str(path), sum(one.st_size for one in told), newest))
    return tuple(found)


def _weights(folder: Path, transformers: tuple[str, ...]) -> Iterable[Path]:
    """The files and folders of a model's weights, by whole names: a folder has several."""
    for name in (*transformers, "vae", "text", "clip"):
        for path in (folder / name, folder / f"{name}.safetensors"):
            if path.exists():
                yield Path(os.path.abspath(path))


def defaults(folder: Path) -> Defaults:
    """What the config.json of a model's folder says of sampling. Raises Refusal, named --model."""
    config = folder / "config.json"
    try:
        stored = json.loads(config.read_text("utf-8"))
        if not isinstance(stored, dict):
            raise TypeError("no object")
        transformers = _transformers(folder, stored)
        dit = _whole(folder, stored, transformers)
        sampling, vae = OPTIONAL | dict(stored["sampling"]), stored["vae"]
        multiple = PATCH * int(vae["patch"]) * 2 ** len(vae["temporal"])
        # The only networks with more channels in than out are conditioned by pictures.
        asked = (2 if dit.get("image_tokens") else 1) if dit["channels_in"] > dit["channels_out"] else 0
        channels, files = int(vae["latent"]), stamps(_weights(folder, transformers))
        made = Defaults(config, sampling, multiple, channels, transformers, asked, files)
    except OSError as failure:
        what = f"{config} cannot be read: {failure.strerror}"
    except (KeyError, TypeError):
        what = f"{config} has no settings under 'sampling' or no 'vae'"
    except (ValueError, RecursionError):
        what = f"{config} is not JSON"
    else:
        if strange := sorted(set(sampling) - {*SAMPLING, *OPTIONAL}):
            right = f"it may hold {', '.join((*SAMPLING, *OPTIONAL))}"
            raise Refusal(config, f"'sampling' holds {plain(strange[0])}", right)
        if str(sampling["schedule"]).endswith(".json"):
            raise Refusal(
                f"{config}: sampling.schedule", "is a file's", "name one, and give files as --schedule"
            )
        return made
    raise Refusal("--model", what, "give the folder of a model, or leave the flag out for the bundled one")


def _transformers(folder: Path, stored: dict) -> tuple[str, ...]:
    """The names of the model's transformers. Raises Refusal where one of two experts is not there."""
    if not set(EXPERTS) & stored.keys():
        return ALONE
    if absent := [name for name in EXPERTS if name not in stored]:
        right = "convert the other one into the same folder"
        raise Refusal("--model", f"{folder} has one of two experts, and no {absent[0]}", right)
    return EXPERTS


def _whole(folder: Path, stored: dict, transformers: tuple[str, ...]) -> dict:
    """The config of the model's transformers, if all its parts are there and fit; else raises Refusal."""
    parts = (*transformers, "vae", "text")
    if absent := [name for name in parts if name not in stored]:
        what = f"{folder} has no {' and no '.join(absent)}"
        raise Refusal("--model", what, f"convert {', '.join(parts)} of a model into one folder")
    dit, vae, text = (stored[name] for name in (transformers[-1], "vae", "text"))
    if any(stored[name] != dit for name in transformers):
        raise Refusal("--model", f"{folder} has two experts that are not alike", "convert those of one model")
    if dit.get("image_width"):
        parts = (*parts, "clip")
        if "clip" not in stored:
            what = f"{folder} has no clip, with which its transformer looks at pictures"
            raise Refusal("--model", what, "convert the image encoder of that model into the same folder")
    for what, ours, theirs in (
        ("latent channels", dit["channels_out"], vae["latent"]),
        ("wide text states", dit["text_width"], text["width"]),
    ):
        if ours != theirs:
            what = (
                f"{folder} is of two models: its transformer has {ours} {what}, and the other part {theirs}"
            )
            raise Refusal("--model", what, "convert the parts of one model into one folder")
    for name in parts:
        if not (folder / name).is_dir() and not (folder / f"{name}.safetensors").is_file():
            what = f"{folder} has no {name}.safetensors and no folder {name}"
            raise Refusal("--model", what, "give a folder with all its files")
    return dit
