"""Denoised latents in a file: what a decode that fails, or another decode, or a long video, starts from.

Nothing here imports jax, so that a bad file is refused at once.
"""

import contextlib
import json
import math
import os
import stat
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fvdm_jax.program import Refusal, outputs, plain

SUFFIX = ".latents.safetensors"
NAME = "latents"
LONGEST = 2**20
"""Bytes of the longest header that is read; ours have a few thousand."""


class Saved(NamedTuple):
    """What a file of latents says before they are read: their shape [b f h w c], and how they were made."""

    shape: tuple[int, ...]
    settings: dict


def save(path: Path, latents: np.ndarray, settings: dict) -> None:
    """Writes normalised latents [b f h w c], float32, with the settings that they were made with."""
    from safetensors.numpy import save_file

    with outputs(path) as (draft,):
        array = np.ascontiguousarray(latents, np.float32)
        save_file({NAME: array}, draft, {"settings": json.dumps(settings)})


def probe(path: Path) -> Saved:
    """What the file holds, from its header alone. Raises Refusal, named `path`, where it is no such file."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise Refusal(path, "is no ordinary file", f"give one that ends in {SUFFIX}")
        with open(path, "rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 2 <= length <= LONGEST:
                raise Refusal(path, "is no file of latents", f"give one that ends in {SUFFIX}")
            header = json.loads(file.read(length).decode("utf-8"))
            size = path.stat().st_size - 8 - length
        entry, settings = header[NAME], json.loads(header["__metadata__"]["settings"])
        shape = tuple(entry["shape"])
        sound = len(shape) == 5 and all(type(n) is int and n > 0 for n in shape)
        whole = (
            sound
            and isinstance(settings, dict)
            and size == 4 * math.prod(shape)
            and entry["data_offsets"] == [0, size]
        )
        if not whole or entry["dtype"] != "F32":
            raise Refusal(path, "is not a whole file of latents", "sample again, or copy it again")
        return Saved(shape, settings)
    except OSError as failure:
        raise Refusal(path, f"cannot be read: {failure.strerror}", "give a file that exists") from failure
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as broken:
        raise Refusal(path, "is no file of latents", f"give one that ends in {SUFFIX}") from broken


def noise(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The noise of an .npy file, as float32 of this shape [1 f h w c].

    It may be without the first axis, and channels may come before frames, as Wan's own programs have it;
    where both readings fit, ours is taken. Raises Refusal for anything else, and where a number is not
    finite.
    """
    order = (0, 4, 1, 2, 3)
    theirs = tuple(shape[i] for i in order)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is no ordinary file")
        # Mapped, so that a file of another size is refused before it is read.
        with warnings.catch_warnings(action="ignore"):
            found = np.lib.format.open_memmap(path, mode="r")
    except Exception as broken:
        # numpy reads the header as Python's own text, and of one that is none anything may come.
        what = f"is no .npy file of numbers ({plain(str(broken), 200)})"
        raise Refusal(f"--noise-file {path}", what, f"give one of {list(shape)}") from broken
    wide = found.shape if getattr(found, "ndim", 0) == 5 else (1, *getattr(found, "shape", ()))
    if found.dtype.kind != "f" or wide not in (shape, theirs):
        what = f"holds {found.dtype} {list(found.shape)}"
        right = f"give floats of {list(shape)}, or of {list(theirs)}, as Wan has it"
        raise Refusal(f"--noise-file {path}", what, right)
    with np.errstate(over="ignore", invalid="ignore"):
        array = np.asarray(found, np.float32).reshape(wide)
    if not np.isfinite(array).all():
        raise Refusal(f"--noise-file {path}", "holds numbers that are not finite", "draw it again")
    return array if wide == shape else np.ascontiguousarray(array.transpose(np.argsort(order)))


def load(path: Path) -> np.ndarray:
    """The latents [b f h w c], float32. Raises Refusal as `probe` does, and where they are not finite."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    probe(path)
    try:
        latents = load_file(path)[NAME]
    except (SafetensorError, OSError, KeyError) as broken:
        raise Refusal(path, f"cannot be read ({broken})", "sample again, or copy it again") from broken
    if not np.isfinite(latents).all():
        raise Refusal(path, "holds values that are not finite", "sample again")
    return latents


class Reel:
    """A file of latents [1 n h w c] that is written as a long video is made, and gone on with after a stop.

    Until it is whole it has another name, `part`, beside that of the file that it becomes; a queue's state is
    in a third.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], settings: dict, replace: bool = False):
        """Opens what a run with the same shape and settings has left, else begins anew.

        Raises Refusal where what is left is of another video, unless that is to be replaced.
        """
        self._path, self._shape, self.part = path, shape, path.with_name(f"{path.name}.part")
        self._state, self.noted = path.with_name(f"{path.name}.state"), 0
        self._frame = 4 * math.prod(shape[2:])
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, self._frame * shape[1]]}
        header = {"__metadata__": {"settings": json.dumps(settings)}, NAME: entry}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._head = struct.pack("<Q", len(text)) + text
        with _named(self.part):
            self._file = open(self.part, "r+b" if self.part.exists() else "w+b")
            found = self._file.read(len(self._head) + LONGEST)
            if found and self._same(found, json.loads(json.dumps(header))):
                self._head = found[: 8 + struct.unpack("<Q", found[:8])[0]]
                return
            if found and not replace:
                self._file.close()
                right = "give the settings that it was begun with, or --overwrite"
                raise Refusal(self.part, "is of a video of other settings that was stopped", right)
            # Before the frames that it goes with.
            self._state.unlink(missing_ok=True)
            self._file.seek(0)
            self._file.truncate()
            self._file.write(self._head)

    @staticmethod
    def _same(found: bytes, header: dict) -> bool:
        """Whether a file that begins so is of that header, but for how its work was laid out."""
        try:
            other = json.loads(found[8 : 8 + struct.unpack("<Q", found[:8])[0]])
            both = [json.loads(one.pop("__metadata__")["settings"]) for one in (other, header)]
        except (ValueError, KeyError, TypeError, AttributeError, struct.error):
            return False
        for name in ("mesh", "attention"):
            for settings in both:
                settings.pop(name, None)
        return other == header and both[0] == both[1]

    def __enter__(self) -> "Reel":
        return self

    def __exit__(self, *failure) -> None:
        self._file.close()

    @property
    def frames(self) -> int:
        """How many latent frames are there."""
        return (self._file.seek(0, os.SEEK_END) - len(self._head)) // self._frame

    def read(self, first: int, last: int) -> np.ndarray:
        """The latent frames [1 k h w c] from `first` to before `last`."""
        self._file.seek(len(self._head) + first * self._frame)
        content = self._file.read((last - first) * self._frame)
        return np.frombuffer(content, np.float32).reshape(1, last - first, *self._shape[2:])

    def keep(self, frames: int) -> None:
        """Forgets what comes after so many frames."""
        self._file.truncate(len(self._head) + frames * self._frame)

    def add(self, piece: np.ndarray) -> None:
        """Adds latent frames [1 k h w c], of which what is too much is left out; they are on disk then."""
        room = self._shape[1] - self.frames
        with _named(self.part):
            self._file.seek(0, os.SEEK_END)
            self._file.write(np.ascontiguousarray(piece[:, :room], np.float32).tobytes())
            self._file.flush()
            os.fsync(self._file.fileno())

    def store(self, frames: int, arrays: Sequence[np.ndarray]) -> None:
        """Keeps what is needed to go on after so many frames: on disk then, or what was before still is."""
        from safetensors.numpy import save_file

        with outputs(self._state) as (draft,):
            content = {str(i): np.ascontiguousarray(array) for i, array in enumerate(arrays)}
            save_file(content, draft, {"frames": str(frames)})
        self.noted = frames

    def stored(self) -> tuple[int, list[np.ndarray]] | None:
        """What `store` was given last, if the frames that it goes with are there."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._state, "np") as file:
                frames, count = int(file.metadata()["frames"]), len(file.keys())
                arrays = [file.get_tensor(str(i)) for i in range(count)]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        if frames > self.frames:
            return None
        self.noted = frames
        return frames, arrays

    def finish(self) -> None:
        """Gives the file, now whole, its name."""
        self._file.close()
        os.replace(self.part, self._path)
        self._state.unlink(missing_ok=True)


@contextlib.contextmanager
def _named(path: Path):
    try:
        yield
    except OSError as failure:
        what = f"cannot be written: {failure.strerror}"
        raise Refusal(path, what, "make room, or give another --out") from failure
