"""What users say of their clips: tables of captions (csv, jsonl), and texts that lie beside the files."""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path

from fvdm_jax.program import Refusal, plain

TABLES = (".csv", ".jsonl")
FILE = ("file_name", "file", "filename", "path", "video")
TEXT = ("text", "caption", "prompt")
RIGHT = (
    f"it needs a column {', '.join(FILE[:-1])} or {FILE[-1]}, and one {', '.join(TEXT[:-1])} or {TEXT[-1]}"
)


def table(path: Path) -> dict[Path, str]:
    """The caption of each file that a table names; a path is taken from the table's folder, or its `train`.

    Empty where the table has no such columns: in a folder of clips it may be about something else. Raises
    Refusal, named `path`, where it cannot be read, lacks a file's name, or gives a file two captions.
    """
    try:
        rows = list(_csv(path) if path.suffix.lower() == ".csv" else _jsonl(path))
    except OSError as failure:
        raise Refusal(path, f"cannot be read: {failure.strerror}", "make it readable") from failure
    except UnicodeDecodeError as broken:
        raise Refusal(path, f"is not UTF-8 ({broken.reason})", "save it as UTF-8") from broken
    except csv.Error as broken:
        raise Refusal(path, f"is no csv table ({broken})", RIGHT) from broken
    if not any({*FILE} & row.keys() and {*TEXT} & row.keys() for _, row in rows):
        return {}
    found: dict[Path, str] = {}
    for line, row in rows:
        named, text = (next((row[name] for name in names if name in row), "") for names in (FILE, TEXT))
        if not isinstance(named, str) or not named.strip() or "\0" in named:
            raise Refusal(path, f"line {line} names no file", RIGHT)
        if not isinstance(text, str | None):
            raise Refusal(path, f"line {line} has a caption that is no text", RIGHT)
        file, caption = _placed(path.parent, named.strip()), (text or "").strip()
        if found.setdefault(file, caption) != caption:
            what = f"line {line} gives {plain(named)} another caption than a line before it"
            raise Refusal(path, what, "give each file one caption")
    return found


def _csv(path: Path) -> Iterator[tuple[int, dict]]:
    # Spreadsheets begin their files with a byte order mark.
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file)
        names = [name.strip().lower() for name in next(rows, [])]
        for row in rows:
            if any(row):
                yield rows.line_num, dict.fromkeys(names, "") | dict(zip(names, row, strict=False))


def _jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as broken:
                raise Refusal(path, f"line {number} is not JSON", "give an object on each line") from broken
            if not isinstance(row, dict):
                raise Refusal(path, f"line {number} is no JSON object", "give an object on each line")
            yield number, {name.lower(): value for name, value in row.items()}


def _placed(folder: Path, named: str) -> Path:
    """The path of a file that a table in `folder` names; Pusa's tables mean files in `train`."""
    here, there = folder / named, folder / "train" / named
    return there if not os.path.lexists(here) and os.path.lexists(there) else here


def beside(path: Path) -> str | None:
    """The text of NAME.txt beside a file or folder NAME, if there is one. Raises Refusal as `table` does."""
    text = path.with_name(f"{path.name if path.is_dir() else path.stem}.txt")
    try:
        return text.read_text("utf-8-sig").strip()
    except FileNotFoundError:
        return None
    except OSError as failure:
        raise Refusal(text, f"cannot be read: {failure.strerror}", "make it readable") from failure
    except UnicodeDecodeError as broken:
        raise Refusal(text, "is not UTF-8", "save it as UTF-8") from broken
