"""Which clips there are in what a user gives: files, folders of them, and tables; and what each shows."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fvdm_jax.data.captions import RIGHT, TABLES, beside, table
from fvdm_jax.program import Refusal, plain

CLIPS = frozenset(".mp4 .m4v .mov .webm .mkv .avi .gif .flv .wmv .mpg .mpeg .ts .mts .3gp .ogv".split())
IMAGES = frozenset(".png .jpg .jpeg .webp .bmp .tif .tiff .heic .heif .avif".split())
"""Suffixes of clips and pictures in folders, those too that cannot be read, which are to be listed."""


class Source(NamedTuple):
    """A file as found, or a folder whose numbered `pictures` are one clip.

    `asked`: the user named it itself.
    """

    path: Path
    caption: str | None = None
    pictures: tuple[Path, ...] = ()
    asked: bool = False


def find(given: Sequence[Path], caption: str | None = None, sequences: bool = True) -> list[Source]:
    """All clips of the files, folders and tables given, each once, in order.

    `caption` is that of all that have none of their own. `sequences`: whether numbered pictures of a folder
    are frames of one clip; never if the folder holds something else, or one of them has its own caption.
    Raises Refusal for what is not there, a table that cannot be used, and where nothing is found.
    """
    files, tables, asked = {}, {}, set()
    for path in given:
        if path.is_dir():
            inside = list(_walk(path))
            tables |= {file: False for file in inside if file.suffix.lower() in TABLES}
            files |= {_same(file): file for file in inside if file.suffix.lower() in CLIPS | IMAGES}
        elif not path.is_file():
            raise Refusal(plain(path), "is no file and no folder", "give clips, folders of them, or tables")
        elif path.suffix.lower() in TABLES:
            tables[path] = True
        else:
            files[_same(path)] = path
            asked.add(_same(path))
    captions = _captions(tables)
    # What only a table names may not be there, or have a strange suffix; it is listed all the same.
    files = {same: path for same, (path, _) in captions.items() if not path.is_dir()} | files
    own = {same: _own(path, captions) for same, path in files.items()}
    found = [Source(path, own[same], (), same in asked) for same, path in files.items()]
    found = _joined(found, captions) if sequences else found
    taken = {_same(source.path) for source in found}
    found += [Source(path, caption) for same, (path, caption) in captions.items() if same not in taken]
    if not found:
        raise Refusal(plain(given[0]), "holds no clips", f"they end in {', '.join(sorted(CLIPS | IMAGES))}")
    every = (s if s.caption is not None else s._replace(caption=caption) for s in found)
    return sorted(every, key=lambda source: str(source.path))


def _same(path: Path) -> str:
    return os.path.abspath(path)


def _walk(folder: Path) -> Iterator[Path]:
    """All files below a folder but hidden ones, through links, each folder once."""
    seen = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        if (same := os.path.realpath(here)) in seen:
            folders.clear()
            continue
        seen.add(same)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(here, name) for name in sorted(names) if not name.startswith("."))


def _captions(tables: dict[Path, bool]) -> dict[str, tuple[Path, str]]:
    """Path and caption of all that the tables name; of each whether it must be a table of clips."""
    found: dict[str, tuple[Path, str]] = {}
    for path, must in tables.items():
        named = table(path)
        if must and not named:
            raise Refusal(plain(path), "names no clips", RIGHT)
        for file, caption in named.items():
            _, before = found.setdefault(_same(file), (file, caption))
            if before != caption:
                what = f"gives {plain(file)} another caption than another table"
                raise Refusal(plain(path), what, "give each file one caption")
    return found


def _own(path: Path, captions: dict[str, tuple[Path, str]]) -> str | None:
    """The caption of a file or folder by a table or, if there is none, by the text beside it."""
    _, caption = captions.get(_same(path), (path, None))
    return caption or beside(path) or None


def _joined(found: list[Source], captions: dict[str, tuple[Path, str]]) -> list[Source]:
    """The sources, with folders in place of the numbered pictures that are frames of one clip."""
    by_folder: dict[Path, list[Source]] = {}
    for source in found:
        by_folder.setdefault(source.path.parent, []).append(source)
    joined = []
    for folder, sources in by_folder.items():
        lone = not any(source.caption or source.asked for source in sources)
        frames = _numbered([source.path for source in sources]) if lone else ()
        if frames:
            joined.append(Source(folder, _own(folder, captions), frames))
        else:
            joined += sources
    return joined


def _numbered(paths: list[Path]) -> tuple[Path, ...]:
    """The pictures in the order of their numbers, if that is what all of them are, else none."""
    parts = [re.fullmatch(r"(.*?)([0-9]+)", path.stem) for path in paths]
    alike = {(part and part[1], path.suffix) for part, path in zip(parts, paths, strict=True)}
    if len(paths) < 2 or len(alike) > 1 or None in parts or paths[0].suffix.lower() not in IMAGES:
        return ()
    return tuple(
        path for _, path in sorted((int(part[2]), path) for part, path in zip(parts, paths, strict=True))
    )
