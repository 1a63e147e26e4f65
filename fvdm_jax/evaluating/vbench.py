"""VBench's image-to-video suite: videos under the names that it looks for, and its results read back.

VBench takes a folder of videos PROMPT-INDEX.mp4, index 0 to 4, and nothing else in it: it takes the ending of
whatever file the folder lists first. It shortens no name and replaces no character, so that prompts that can
be no file's name are refused. Source: `build_full_info_json` of VBench, and the README of vbench2_beta_i2v.
"""

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fvdm_jax.program import Refusal, legible, outputs, plain

IMAGES = (".jpg", ".jpeg", ".png", ".webp")
IMAGE, PROMPT = ("image_name", "file_name", "image", "custom_image_path"), ("prompt_en", "caption", "prompt")
"""What lists call the image and its prompt: first VBench's full_info.json, then its i2v-bench-info.json."""
LONGEST = 255
"""Bytes of the name of a file, on all usual file systems."""
RESULTS = "*_eval_results.json"


class Pair(NamedTuple):
    """An image and what is to be made of it."""

    image: Path
    prompt: str

    def name(self, index: int) -> str:
        """The name that VBench looks for."""
        return f"{self.prompt}-{index}.mp4"


def pairs(images: Path | None, listed: Path | None) -> list[Pair]:
    """The images of a folder, named by their prompts, or those of a list (JSON or TSV), in the folder.

    Raises Refusal where an image is not there, a prompt is given twice or can be no file's name.
    """
    found = list(_listed(listed, images or listed.parent) if listed else _named(images))
    where = listed or images
    if not found:
        raise Refusal(where, "has no images", f"give names that end in {', '.join(IMAGES)}")
    seen: dict[str, Path] = {}
    for pair in found:
        if not pair.image.is_file():
            raise Refusal(where, f"there is no {pair.image}", "give the folder of the images with --images")
        if seen.setdefault(pair.prompt, pair.image) != pair.image:
            raise Refusal(
                where, f"two images have the prompt {plain(pair.prompt)}", "VBench tells them by it"
            )
        _check_name(where, pair)
    return list(dict.fromkeys(found))


def _check_name(where: Path, pair: Pair) -> None:
    name = pair.name(0)
    if "/" in name or "\0" in name or not pair.prompt.strip():
        raise Refusal(
            where, f"no file can be named {plain(name)!r}", "VBench changes no character; leave it out"
        )
    if (length := len(os.fsencode(name))) > LONGEST:
        what = f"{plain(name)!r} has {length} bytes, and a file's name at most {LONGEST}"
        raise Refusal(where, what, "VBench shortens no prompt; leave it out")


def _named(images: Path) -> Iterator[Pair]:
    for path in _files(images):
        if path.suffix.lower() in IMAGES:
            yield Pair(path, path.stem)


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as failure:
        raise Refusal(folder, f"cannot be read: {failure.strerror}", "give a folder") from failure


def _listed(path: Path, images: Path) -> Iterator[Pair]:
    right = (
        f"give a list of objects with {IMAGE[0]} and {PROMPT[0]}, an object image: prompt, or a TSV of both"
    )
    try:
        text = path.read_text("utf-8-sig")
        if path.suffix.lower() == ".json":
            rows = json.loads(text)
            told = rows.items() if isinstance(rows, dict) else [(_of(r, IMAGE), _of(r, PROMPT)) for r in rows]
        else:
            told = [tuple(row) for row in csv.reader(text.splitlines(), delimiter="\t") if row]
        for image, prompt in told:
            yield Pair(images / image, str(prompt))
    except OSError as failure:
        raise Refusal(path, f"cannot be read: {failure.strerror}", right) from failure
    except (ValueError, TypeError, KeyError) as wrong:
        raise Refusal(path, "is no list of images and prompts", right) from wrong


def _of(row: dict, names: Sequence[str]) -> str:
    # Where it has none of them, the first is the one that is missed.
    return row[next((name for name in names if name in row), names[0])]


class Export:
    """A folder being filled: videos/ for VBench, samples/ with the settings of each, and manifest.json.

    The manifest names a video only once it is whole; one that it does not name is made again.
    """

    def __init__(self, folder: Path, settings: dict):
        """Goes on with what is in the folder. Raises Refusal where that was made with other settings."""
        self.videos, self.samples = folder / "videos", folder / "samples"
        self._path, self._settings = folder / "manifest.json", json.loads(json.dumps(settings, default=str))
        try:
            for each in (self.videos, self.samples):
                each.mkdir(parents=True, exist_ok=True)
        except OSError as failure:
            raise Refusal(folder, f"cannot be filled: {failure.strerror}", "give another folder") from failure
        stored = _read(self._path) if self._path.is_file() else {"settings": self._settings, "videos": {}}
        for name, value in self._settings.items():
            # A folder of before a setting was there was made without it.
            if stored["settings"].get(name, value) != value:
                what = f"was made with {name} {plain(stored['settings'].get(name))}, not {plain(value)}"
                raise Refusal(folder, what, "give another folder, or the same settings")
        self.done: dict[str, dict] = {n: v for n, v in stored["videos"].items() if self._whole(n, v)}

    def _whole(self, name: str, told: dict) -> bool:
        path = self.videos / name
        return path.is_file() and path.stat().st_size == told["bytes"]

    def seed(self, name: str) -> int:
        """The seed of a video: by its name and --seed alone, so that it is the same in any order."""
        said = f"{self._settings['seed']} {name}".encode("utf-8", "surrogateescape")
        return int.from_bytes(hashlib.sha256(said).digest()[:8], "big")

    def missing(self, several: Sequence[Pair], samples: int) -> list[tuple[Pair, str]]:
        """The videos that are still to be made, by pair and name."""
        names = [(pair, pair.name(index)) for pair in several for index in range(samples)]
        return [(pair, name) for pair, name in names if name not in self.done]

    def fill(
        self, several: Sequence[Pair], samples: int, make: Callable[[Pair, int, Path], None]
    ) -> Iterator[str]:
        """Makes the videos that are missing by `make(pair, seed, path)`; gives the name of each when it is
        whole and in the manifest."""
        for pair, name in self.missing(several, samples):
            seed = self.seed(name)
            # Names of prompts may leave no room for endings, so samples have short ones.
            draft = self.samples / f"{seed:016x}.mp4"
            make(pair, seed, draft)
            size = draft.stat().st_size
            os.replace(draft, self.videos / name)
            self._add(name, {"seed": seed, "bytes": size, "image": str(pair.image), "sample": draft.stem})
            yield name

    def _add(self, name: str, told: dict) -> None:
        self.done[name] = told
        with outputs(self._path) as (draft,):
            draft.write_text(legible({"settings": self._settings, "videos": self.done}) + "\n", "utf-8")


def _read(path: Path) -> dict:
    try:
        found = json.loads(path.read_text("utf-8"))
        if all(isinstance(found[name], dict) for name in ("settings", "videos")):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise Refusal(path, "is no manifest of an export", "give another folder")


def collected(folder: Path) -> dict[str, dict]:
    """VBench's scores by dimension, of all its results (NAME_eval_results.json) in a folder and below it.

    Each has its `score`, how many `videos` it is of, and the `file`. Raises Refusal where there are none, a
    file is none of VBench's, or a dimension is in two.
    """
    found: dict[str, dict] = {}
    paths = sorted(folder.rglob(RESULTS))
    if not paths:
        raise Refusal(folder, f"holds no {RESULTS}", "give the folder that VBench wrote to")
    for path in paths:
        try:
            results = json.loads(path.read_text("utf-8"))
            rows = {n: (float(score), len(videos)) for n, (score, videos, *_) in results.items()}
        except (OSError, ValueError, TypeError, AttributeError) as wrong:
            what = "is no dimension: [score, videos] as VBench writes"
            raise Refusal(path, what, "evaluate again") from wrong
        for name, (score, videos) in rows.items():
            if name in found:
                raise Refusal(path, f"{name} is also in {found[name]['file']}", "give the results of one run")
            found[name] = {"score": score, "videos": videos, "file": str(path)}
    return found
