"""Which published file a source is: those of `weights.lock.json`, by size and sha256."""

import json
from pathlib import Path
from typing import NamedTuple

from fvdm_jax.program import Refusal

LOCK = Path(__file__).with_name("weights.lock.json")
COMMON = ("diffusion_pytorch_model", "spiece.model", "tokenizer.json")
"""How names begin that tell nothing of what is inside: whoever trains a Wan further gives its file the same
name, and it has the same size."""


class Known(NamedTuple):
    """A file that somebody has published; `revision` is one that has it, "" where none was stated."""

    repository: str
    path: str
    size: int
    sha256: str
    revision: str = ""

    @property
    def name(self) -> str:
        return Path(self.path).name

    def __str__(self) -> str:
        return f"{self.repository} {self.path}"


def files() -> list[Known]:
    """All known files, by repository and path."""
    return [Known(**entry) for entry in json.loads(LOCK.read_text("utf-8"))["files"]]


def identify(file: Path, size: int, sha256: str) -> Known | None:
    """The known file that this is, byte for byte; None where it is none.

    Raises Refusal where it says to be one, and is another of the same size.
    """
    every = files()
    if same := [known for known in every if (known.size, known.sha256) == (size, sha256)]:
        return next((known for known in same if known.name == file.name), same[0])
    for known in _alike(file, size, every):
        if _says_to_be(file, known):
            what = f"has the name and size of {known}, and is not it: sha256 {sha256}, not {known.sha256}"
            right = "download it again, or give it and its folder names of their own if it is meant so"
            raise Refusal(file, what, right)
    return None


def told(file: Path, size: int, known: Known | None) -> str:
    """What a user is told of a file that has been identified."""
    if known:
        return f"= {known}"
    alike = _alike(file, size, files())
    other = f"; {alike[0]} has this name and size, and other contents" if alike else ""
    return f"not in the list of known files{other}"


def _alike(file: Path, size: int, every: list[Known]) -> list[Known]:
    return [known for known in every if (known.name, known.size) == (file.name, size)]


def _says_to_be(file: Path, known: Known) -> bool:
    """By a name that only this one has, or by lying where it lies in a folder that is named for its
    repository, as downloads are."""
    if not file.name.startswith(COMMON):
        return True
    inside, whole = Path(known.path).parts, file.absolute().parts
    owner, name = known.repository.split("/")
    folders = {name, f"models--{owner}--{name}"} & set(whole[: -len(inside)])
    return whole[-len(inside) :] == inside and bool(folders)
