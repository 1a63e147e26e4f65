"""Files of prompts: a line each, of a video, or of a segment of a long one."""

import json
from pathlib import Path
from typing import NamedTuple

from fvdm_jax.program import Refusal, plain
from fvdm_jax.rules import RULES, texts

LONGEST = 10_000
"""Lines that a file may have."""

GRAMMAR = """\
what --prompts takes
  FILE.txt                a prompt a line; empty lines are left out
  FILE.jsonl              an object a line: "prompt", and where they are not the flags' "negative", "seed",
                          and "keep", a list as of --keep
Each line is a video, OUT-1.mp4, OUT-2.mp4 and so on, all by the programs that were compiled for the first.
Those that are there already, made with the same settings, are left. With --length each line tells a window of
one video instead, the last one all that follow.
"""


class Line(NamedTuple):
    """What a line says; None: as the flags do."""

    prompt: str | None = None
    negative: str | None = None
    seed: int | None = None
    keep: tuple[str, ...] | None = None


def read(path: Path) -> list[Line]:
    """The lines of the file. Raises Refusal, named --prompts, where one is none, or there is none."""
    try:
        rows = path.read_text("utf-8-sig").split("\n")
    except OSError as failure:
        raise Refusal("--prompts", f"{path} cannot be read: {failure.strerror}", "give a file") from failure
    except UnicodeDecodeError as wrong:
        raise Refusal("--prompts", f"{path} is not text in UTF-8", "save it as such") from wrong
    objects = path.suffix.lower() == ".jsonl"
    lines = [
        _object(path, number, row) if objects else Line(row.strip())
        for number, row in enumerate(rows, 1)
        if row.strip()
    ]
    if not 1 <= len(lines) <= LONGEST:
        raise Refusal("--prompts", f"{path} has {len(lines)} lines", f"give 1 to {LONGEST}")
    return lines


def _object(path: Path, number: int, row: str) -> Line:
    where = f"--prompts {path} line {number}"
    try:
        said = json.loads(row)
        if not isinstance(said, dict):
            raise ValueError
    except (ValueError, RecursionError) as wrong:
        raise Refusal(where, "is no JSON object", 'give such as {"prompt": "a cat"}') from wrong
    if strange := sorted(said.keys() - set(Line._fields)):
        raise Refusal(where, f"holds {plain(strange[0])}", f"it may hold {', '.join(Line._fields)}")
    if isinstance(said.get("keep"), list):
        said["keep"] = tuple(said["keep"])
    for name, value in said.items():
        if wrong := (RULES | {"keep": texts})[name](value):
            raise Refusal(
                where, f"{name} {plain(value)} {wrong[0]}".strip(), wrong[1] or "give a list of texts"
            )
    return Line(**said)
