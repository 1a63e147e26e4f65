"""Programs that are compiled once and kept; what will be compiled is told before, with how long it took.

jax keeps the programs itself, in the folder of `machine.keep_compiled_programs`. Tracing and lowering are
done at every run: layers are scanned, so that they take less than half a second whatever the depth, of
which jax.export would save a half.
"""

import contextlib
import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

import jax

from fvdm_jax import machine
from fvdm_jax.program import Refusal, outputs

LONG = 2.0
"""Seconds of compilation from which on it is announced, if it is known how many there will be."""

REMEMBERED = 1000
"""How many programs `Times` knows; the oldest are forgotten."""


class Times:
    """How many seconds programs took to compile, and which are kept, in a file; without one it knows nothing.

    A file that is not whole counts as none and is written anew. Where two processes write at once, what one
    of them adds may be lost, and nothing else.
    """

    def __init__(self, path: Path | None):
        self._path = path

    def line(self, what: str, key: str) -> str | None:
        """What to say before `what` is compiled; None where it is kept, or took less than LONG."""
        seconds, kept = self._read()
        if key in kept or seconds.get(what, LONG) < LONG:
            return None
        before = f"took {seconds[what]:.0f} s last time" if what in seconds else "for the first time here"
        return f"compiling {what}: {before}"

    def add(self, what: str, key: str, taken: float | None, kept: bool) -> None:
        """Adds that the program with this key is `what`, took so many seconds if it was compiled, is kept."""
        if not self._path:
            return
        seconds, known = self._read()
        if taken is not None:
            seconds = {each: old for each, old in seconds.items() if each != what} | {what: round(taken, 2)}
        known = [each for each in known if each != key] + [key] * kept
        content = {"seconds": dict(list(seconds.items())[-REMEMBERED:]), "kept": known[-REMEMBERED:]}
        # A file that cannot be written costs a line, and nothing else.
        with contextlib.suppress(OSError, Refusal):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with outputs(self._path) as (draft,):
                draft.write_text(json.dumps(content, indent=1) + "\n", "utf-8")

    def _read(self) -> tuple[dict[str, float], list[str]]:
        try:
            content = json.loads(self._path.read_text("utf-8")) if self._path else {}
            seconds = {str(what): float(taken) for what, taken in content["seconds"].items()}
            return seconds, [str(key) for key in content["kept"]]
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}, []


def compiled(
    say: Callable[[str], None], lowered: jax.stages.Lowered, what: str, options: Mapping | None = None
) -> jax.stages.Compiled:
    """The program, from jax's cache if it is there; `say` is told before, unless it will not take long.

    `what` names it to people, as "denoise (21x60x104)"; `options` are the compiler's. A program
    that was damaged where it was kept is compiled anew, and kept again by the next run.
    """
    text, first = lowered.as_text(), jax.process_index() == 0
    what, key = f"{what} for {_devices(text)}", _key(text, options)
    folder = machine.cache("programs") if jax.config.jax_compilation_cache_dir and first else None
    times = Times(folder and folder / "times.json")
    line = times.line(what, key)
    if line and first:
        say(line)
    with _events() as events, _removing() as damaged:
        start = time.perf_counter()
        program = lowered.compile(options)
        taken = time.perf_counter() - start
    loaded = "/jax/compilation_cache/cache_hits" in events
    # "Misses" are only those that jax then writes: very short programs are not.
    kept = not damaged and (loaded or "/jax/compilation_cache/cache_misses" in events)
    if line or not loaded:
        times.add(what, key, None if loaded else taken, kept)
    for name in damaged:
        say(f"note: {name} was damaged where it was kept; the next run keeps it again")
    return program


def _devices(text: str) -> str:
    """For how many devices of which kind a program is, that has this text."""
    parts = re.search(r"mhlo\.num_partitions = (\d+)", text)
    count = int(parts[1]) if parts else 1
    return f"{count} × {jax.devices()[0].device_kind}" if count > 1 else jax.devices()[0].device_kind


def _key(text: str, options: Mapping | None) -> str:
    """A hash of what jax's cache goes by: the lowered program, compilers, devices, flags, and its folder."""
    device = jax.devices()[0]
    flags = {name: os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    versions = (jax.__version__, version("jaxlib"), device.client.platform_version, device.device_kind)
    depends = (sorted((options or {}).items()), flags, versions, jax.config.jax_compilation_cache_dir)
    return hashlib.sha256(json.dumps([text, *depends], default=str).encode()).hexdigest()


@contextlib.contextmanager
def _events() -> Iterator[set[str]]:
    """The names of the events that jax tells of in the block."""
    events: set[str] = set()

    def listen(event: str, **_) -> None:
        events.add(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_listener(listen)


@contextlib.contextmanager
def _removing() -> Iterator[list[str]]:
    """The names of programs that jax finds damaged where they are kept; they are removed when the block ends.

    By itself jax never replaces one, and warns at every run.
    """
    names: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", "Error reading persistent compilation cache entry")
        yield names
    for warning in caught:
        found = re.match(
            r"Error reading persistent compilation cache entry for '(\w+)'", str(warning.message)
        )
        if found and _remove(found[1]):
            names.append(found[1])
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _remove(name: str) -> bool:
    """Whether there were kept programs of this name in the user's cache; there are none afterwards."""
    folder = machine.cache("programs")
    if not folder or jax.config.jax_compilation_cache_dir != str(folder):
        return False
    found = list(folder.glob(f"{name}-*"))
    for path in found:
        with contextlib.suppress(OSError):
            path.unlink()
    return bool(found)
