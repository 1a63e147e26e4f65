"""The contract of every program: refuse in one line and early, leave whole files or none, stop when told to.

Exit codes: 0 done, 1 an error of ours (with its traceback) or a check that failed, 2 refused, 130 stopped by
Ctrl-C, 143 by SIGTERM.
Nothing here imports jax, so that a refusal costs no more than the start of Python.
"""

import argparse
import contextlib
import difflib
import errno
import io
import json
import math
import os
import re
import secrets
import shutil
import stat
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from fvdm_jax import claims
from fvdm_jax.stopping import TERMINATED, end, interruptible

UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
_REMEDY = "free some space or choose another place; nothing was left behind"


def plain(text: object, most: int = 120) -> str:
    """`text` as one line that is safe to print: unprintable characters escaped, at most `most` characters."""
    head = str(text)[: most + 1]
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in head)
    return line if len(line) <= most else line[: most - 1] + "…"


def legible(value: object) -> str:
    """The value as JSON that UTF-8 can hold: of file names, bytes that are no text become question marks."""
    return json.dumps(value, indent=1, ensure_ascii=False, default=str).encode("utf-8", "replace").decode()


class Refusal(Exception):
    """What a user gave cannot be used: `where` (a flag or file), `what` came, and what would be `right`.

    As text it is one line of at most 1,500 characters, and ends `run` with exit code 2.
    """

    def __init__(self, where: object, what: str, right: str = ""):
        super().__init__(where, what, right)
        self.where, self.what, self.right = str(where), what, right

    def __str__(self) -> str:
        right = f"; {plain(self.right, 500)}" if self.right else ""
        return f"error: {plain(self.where, 300)}: {plain(self.what, 650)}{right}"


def spoken(text: str) -> str:
    """The text that an argument spells in UTF-8, whatever the locale; for `type=` of an argument."""
    try:
        return os.fsencode(text).decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        # What no command line can have given is left to the rules.
        return text


def whole(text: str) -> int:
    """The whole number that `text` spells; for `type=` of an argument."""
    if not re.fullmatch(r"[+-]?[0-9]{1,40}", text.strip()):
        raise argparse.ArgumentTypeError(f"{plain(text)!r} is not a whole number; give one, such as 5")
    return int(text)


def number(text: str) -> float:
    """The finite number that `text` spells; for `type=` of an argument."""
    with contextlib.suppress(ValueError):
        if "_" not in text and math.isfinite(value := float(text)):
            return value
    raise argparse.ArgumentTypeError(f"{plain(text)!r} is not a finite number; give one, such as 5 or 0.5")


def numbered(text: str, otherwise: float | None) -> tuple[str, float | None]:
    """Name and number of NAME[:NUMBER], cut at the last colon, if a number follows it."""
    name, colon, tail = text.rpartition(":")
    with contextlib.suppress(ValueError):
        return (name, float(tail)) if colon else (text, otherwise)
    return text, otherwise


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations and whose every complaint is a Refusal.

    `flags` are as of `argparse.ArgumentParser`; `--debug` is added, since `run` understands it.
    """

    def __init__(self, **flags):
        flags.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, exit_on_error=False, **flags)
        self.add_argument("--debug", action="store_true", help="show where in the program a refusal arose")

    def parse_args(self, args=None, namespace=None):
        """As of argparse. Raises Refusal, which for an unknown flag names the nearest known one."""
        try:
            parsed, unknown = self.parse_known_args(args, namespace)
        except argparse.ArgumentError as wrong:
            raise Refusal(wrong.argument_name or self.prog, *self._explained(wrong)) from wrong
        if unknown:
            self._refuse(next((given for given in unknown if given.startswith("-")), unknown[0]))
        return parsed

    def error(self, message: str) -> NoReturn:
        raise Refusal(self.prog, message, "--help lists the flags")

    def _explained(self, wrong: argparse.ArgumentError) -> tuple[str, str]:
        if wrong.message.startswith("expected"):
            flag = wrong.argument_name
            return f"{wrong.message} after it", f"a value that begins with a dash is written {flag}=VALUE"
        return wrong.message, ""

    def _refuse(self, given: str) -> NoReturn:
        flag, flags = given.split("=")[0], sorted(self._option_string_actions)
        if not flag.startswith("-"):
            raise Refusal(
                given, "belongs to no flag", "quote a value that has spaces; --help lists the flags"
            )
        near = difflib.get_close_matches(flag, flags, 1, 0.7)
        raise Refusal(flag, "is no flag", f"the nearest is {near[0]}" if near else "--help lists the flags")


class _Deaf(io.FileIO):
    """A file whose reader may leave: what is written then goes nowhere, and the work goes on."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _harden_streams() -> None:
    # A closed descriptor below 3 would otherwise be given to the next file that is opened, and printed into.
    while (free := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(free, True)
    os.close(free)
    for name, errors in (("stdout", "replace"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if stream is None or stream is getattr(sys, f"__{name}__"):
            if stream:
                stream.flush()
            raw = _Deaf(1 if name == "stdout" else 2, "w", closefd=False)
            encoding = stream.encoding if stream else "utf-8"
            buffered = io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=True)
            setattr(sys, name, buffered)


def run(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """The exit code of `main(argv)`, its failures reported as the contract has it; argv: sys.argv's.

    A program ends with `leave(run(main))`.
    """
    _harden_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with interruptible():
            code = main(argv) or 0
    except Refusal as refusal:
        if "--debug" in argv:
            traceback.print_exc()
        print(refusal, file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    except SystemExit as leaving:
        code = leaving.code or 0
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    return code


def leave(code: int) -> NoReturn:
    """Ends the process; when it was stopped at once, without waiting for what the device still computes."""
    if code in (130, TERMINATED):
        sys.stderr.flush()
        end(code)
    sys.exit(code)


def _temporary(path: Path) -> Path:
    """A free name beside `path`, which says whose it is: host, process, and a random part."""
    return path.with_name(f".fvdm-{claims.HOST}-{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")


def alive(process: int) -> bool:
    """Whether a process of this host is still there."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _clear_stale(folder: Path) -> None:
    """Removes what killed processes of this machine left; those of other hosts cannot be judged from here."""
    ours = re.compile(rf"\.fvdm-{claims.HOST}-(\d{{1,10}})-[0-9a-f]{{8}}(\..*)?")
    names = os.listdir(folder)
    claims.sweep(folder, names)
    for name in names:
        if (match := ours.fullmatch(name)) and not alive(int(match[1])):
            with contextlib.suppress(OSError):
                shutil.rmtree(folder / name) if (folder / name).is_dir() else os.unlink(folder / name)


def flush(path: Path) -> None:
    """Returns when a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as failure:
        # Some mounts do not know it of folders.
        if failure.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def outputs(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Names to write in place of `paths`: when the block ends all become `paths`, when it raises none does.

    They are replaced from the last to the first, which marks that all are complete. The names lie beside the
    outputs and keep their extensions; each must be written. What a killed run
    left in those folders is removed first. Raises Refusal where the disk is full or cannot be written.
    """
    targets = [Path(os.path.realpath(path)) for path in paths]
    drafts = tuple(_temporary(target) for target in targets)
    folders = {target.parent for target in targets}
    try:
        for folder in folders:
            _clear_stale(folder)
        yield drafts
        for draft in drafts:
            flush(draft)
        for draft, target in reversed(list(zip(drafts, targets, strict=True))):
            os.replace(draft, target)
        if os.name == "posix":
            for folder in folders:
                flush(folder)
    except OSError as failure:
        if failure.errno not in UNWRITABLE:
            raise
        raise Refusal(paths[0], f"cannot be written: {os.strerror(failure.errno)}", _REMEDY) from failure
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Around the making of `path`. Raises Refusal where another process of this host makes it."""
    with contextlib.ExitStack() as claim:
        try:
            claim.enter_context(claims.claimed(Path(os.path.realpath(path))))
        except BlockingIOError as held:
            what = "is being made by another process"
            raise Refusal(path, what, "wait for it, or give another name") from held
        yield


@contextlib.contextmanager
def folder_output(path: Path) -> Iterator[Path]:
    """A new folder to fill in place of `path`, which it becomes when the block ends and never before.

    When the block raises nothing is left; what a killed run left beside it is removed first. Raises Refusal
    where there is something at `path`, or another process is making it, and where the disk is full or cannot
    be written.
    """
    target = Path(os.path.realpath(path))
    draft = _temporary(target)
    try:
        with alone(path):
            if target.exists() and (not target.is_dir() or any(target.iterdir())):
                raise Refusal(path, "exists", "give a name that is free")
            _clear_stale(target.parent)
            draft.mkdir()
            yield draft
            for folder, _, names in os.walk(draft):
                for name in names:
                    flush(Path(folder, name))
                flush(Path(folder))
            os.rename(draft, target)
            flush(target.parent)
    except OSError as failure:
        if failure.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise Refusal(path, "has been made by another process", "give a name that is free") from failure
        if failure.errno not in UNWRITABLE | {errno.ENOENT, errno.ENOTDIR}:
            raise
        raise Refusal(path, f"cannot be written: {os.strerror(failure.errno)}", _REMEDY) from failure
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_output(path: Path, where: str, overwrite: bool) -> None:
    """Raises Refusal, named `where`, unless a file can be made at `path`; `overwrite` lets it replace one."""
    try:
        with contextlib.suppress(FileNotFoundError):
            kind = os.stat(path).st_mode
            if not stat.S_ISREG(kind):
                raise Refusal(where, f"{path} is no ordinary file", "give the name of a file")
            if not overwrite:
                raise Refusal(where, f"{path} exists", "give another name, or --overwrite to replace it")
        # Permission bits do not tell for root, for /proc or for a read-only disk; trying does.
        trial = _temporary(Path(os.path.realpath(path)))
        os.close(os.open(trial, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.unlink(trial)
    except (OSError, ValueError) as failure:
        reason = getattr(failure, "strerror", None) or str(failure)
        raise Refusal(
            where, f"{path} cannot be written: {reason}", "give a file in a folder that exists"
        ) from failure
