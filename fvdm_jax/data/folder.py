"""Folders of shards on a disk or at an address that fsspec opens, such as gs://bucket/folder."""

import contextlib
import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fvdm_jax.machine import cache
from fvdm_jax.program import Refusal, outputs


class Shard(NamedTuple):
    """A file of records: its name, how many it holds, and its bytes with their SHA-256."""

    file: str
    records: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder on a disk or wherever fsspec reads: its files by name."""

    where: str

    def _system(self) -> tuple:
        from fsspec.core import url_to_fs

        try:
            return url_to_fs(self.where)
        except (ValueError, ImportError) as wrong:
            right = "give a folder, or an address whose protocol fsspec knows, such as gs://bucket/folder"
            raise Refusal(self.where, f"cannot be opened ({wrong})", right) from wrong

    def _disk(self) -> Path | None:
        from fsspec.implementations.local import LocalFileSystem

        system, root = self._system()
        return Path(root) if isinstance(system, LocalFileSystem) else None

    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by its name; none where there is no such folder."""
        system, root = self._system()
        system.invalidate_cache()
        try:
            files = system.ls(root, detail=True)
        except FileNotFoundError:
            return {}
        except OSError as failure:
            raise Refusal(self.where, f"cannot be read ({failure})", "give a folder of records") from failure
        return {file["name"].rsplit("/", 1)[-1]: file["size"] for file in files if file["type"] == "file"}

    def read(self, name: str) -> bytes:
        system, root = self._system()
        return system.cat_file(f"{root}/{name}")

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator[Path]:
        """A file on the disk to fill; when the block ends the folder has it, whole, as `name`."""
        if disk := self._disk():
            with outputs(disk / name) as (draft,):
                yield draft
            return
        with tempfile.TemporaryDirectory() as scratch:
            yield (draft := Path(scratch, name))
            system, root = self._system()
            system.put_file(str(draft), f"{root}/{name}")

    def make(self) -> None:
        """Makes the folder where it is on a disk; elsewhere there are none without files."""
        if disk := self._disk():
            try:
                disk.mkdir(parents=True, exist_ok=True)
            except OSError as failure:
                what = f"cannot be made: {failure.strerror}"
                raise Refusal(self.where, what, "give a folder that can be written") from failure

    def fetch(self, shard: Shard) -> Path:
        """The shard as a file on the disk. Raises ValueError where what came is not what was written."""
        if disk := self._disk():
            return disk / shard.file
        store = cache("records") or Path(tempfile.gettempdir(), f"fvdm_jax-records-{os.getpid()}")
        target = store / f"{shard.sha256}.arrayrecord"
        if not target.exists() or target.stat().st_size != shard.bytes:
            store.mkdir(parents=True, exist_ok=True)
            system, root = self._system()
            with outputs(target) as (draft,):
                system.get_file(f"{root}/{shard.file}", str(draft))
                if digest(draft) != shard.sha256:
                    raise ValueError(f"{shard.file} is not what was written there")
        return target


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
