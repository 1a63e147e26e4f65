"""What the page's form holds, as a command line: one that is run, and the same one to be read and copied.

Whatever a browser sends goes through the flags' own parser and `validate`. No text becomes a path: files are
those that were uploaded, and a schedule is one by name.
"""

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fvdm_jax.flags import parser
from fvdm_jax.presets import PRESETS
from fvdm_jax.program import Refusal, plain
from fvdm_jax.request import Request
from fvdm_jax.rules import RULES, obey
from fvdm_jax.steps import calls
from fvdm_jax.zoo import ZOO

SLOTS = 4
"""Files that can be kept of a video."""

MOST = 50 * 81 * 720 * 1280
"""Steps times pixels that one video may take: Wan's largest, at its own number of steps."""

PROMPTS = "prompt", "negative"
"""The fields that are told though they are empty: else they would be the model's."""

BY_PRESET = ("negative", "steps", "solver", "schedule", "options", "guidance", "shift")
"""The fields that say what a preset sets."""


class Slot(NamedTuple):
    """A file that was uploaded, if one was, the latent frame that it is kept at, and how loosely."""

    file: str | None
    frame: float
    strength: float


class Form(NamedTuple):
    """The fields of the page, in their order there, as a browser sends them."""

    prompt: str
    negative: str
    preset: str
    schedule: str
    options: str
    solver: str
    steps: float
    guidance: str
    shift: float
    frames: float
    height: float
    width: float
    seed: str
    slots: tuple[Slot, ...]

    def arguments(self, spelled: Callable[[str], str]) -> list[str]:
        """The flags of `sample` that say the same; `spelled` names a file. Raises Refusal."""
        words = {
            "prompt": self.prompt or "",
            "negative": self.negative or "",
            "preset": self.preset,
            "frames": _number(self.frames),
            "size": f"{_number(self.height)}x{_number(self.width)}",
            "steps": _number(self.steps),
            "solver": self.solver,
            "schedule": _schedule(self.schedule, self.options),
            "guidance": self.guidance,
            "shift": _number(self.shift),
            "seed": self.seed,
        }
        # A value stands behind =, so that none can be a flag.
        flags = [f"--{name}={value}" for name, value in words.items() if value or name in PROMPTS]
        for slot in self.slots:
            if slot.file:
                flags.append(f"--keep={self._place(slot)}={spelled(slot.file)}:{_number(slot.strength)}")
        return flags

    def _place(self, slot: Slot) -> str:
        last = (_whole(self.frames) - 1) // 4
        return "last" if slot.frame >= last > 0 else _number(slot.frame)

    def command(self, model: str = "") -> str:
        """The command line that makes the same video, of files by their names; `model` as a user has it."""
        named = [f"--model={model}"] if model else []
        flags = map(shlex.quote, [*named, *self.arguments(os.path.basename)])
        return " \\\n  ".join(["python -m fvdm_jax.sample", *flags])

    def request(self, complete: Callable[[Request], Request], uploads: Path) -> Request:
        """The complete Request. Raises Refusal where one cannot be, or asks for more than MOST."""
        try:
            given = vars(parser().parse_args(self.arguments(lambda file: _uploaded(file, uploads))))
            many = {name: tuple(given[name]) for name in ("keep", "lora")}
            asked = Request(**given | many)
            for name in ("frames", "steps"):
                obey(f"--{name}", getattr(asked, name), RULES[name])
            _check(asked.steps * asked.frames * asked.size[0] * asked.size[1])
            made = complete(asked)
            _check(sum(calls(made)) * made.frames * made.size[0] * made.size[1])
            return made
        except Refusal as refusal:
            # Where the files lie here is nobody's business, and longer than what is to be said.
            texts = (re.sub(rf"{re.escape(str(uploads))}/(?:[^\s=]*/)?", "", text) for text in refusal.args)
            raise Refusal(*texts) from refusal

    def settings(self, request: Request) -> dict:
        """The settings of the complete request, of files by their names."""
        told = {name: value for name, value in request.settings.items() if name not in ("files", "out")}
        told["keep"] = [re.sub(r"=.*/", "=", text) for text in told["keep"]]
        return told | {"model": os.path.basename(told["model"])}


def form(*fields) -> Form:
    """The Form of all fields one by one, those of the slots at the end."""
    count = len(Form._fields) - 1
    slots = [Slot(*fields[i : i + 3]) for i in range(count, len(fields), 3)]
    return Form(*fields[:count], tuple(slots))


def preset(name: str, model: dict) -> dict:
    """What the form's fields say under a preset, of the settings that a model has of its own."""
    chosen = model | PRESETS.get(name, {})
    guidance = chosen["guidance"]
    chosen["guidance"] = ",".join(map(str, guidance)) if isinstance(guidance, tuple | list) else str(guidance)
    chosen["schedule"], _, chosen["options"] = chosen["schedule"].partition(":")
    return {"kept": 0.0} | chosen


def _check(work: int) -> None:
    if work > MOST:
        what = f"{work / MOST:.3g} times the steps and pixels that this page makes at most"
        raise Refusal("--steps, --frames, --size", what, "ask for less, or run the command by yourself")


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, int | float) and abs(value) < 1e6 else plain(value)


def _whole(value: float) -> int:
    return int(value) if isinstance(value, int | float) and abs(value) < 1e6 else 1


def _schedule(name: str, options: str) -> str:
    """NAME[:OPTION=N,…], never a file. Raises Refusal."""
    if name not in ZOO:
        raise Refusal("--schedule", f"{plain(name)!r} is no schedule", f"choose one of {', '.join(ZOO)}")
    if options and not re.fullmatch(r"[a-z]{1,9}=[0-9.]{1,9}(,[a-z]{1,9}=[0-9.]{1,9})*", options):
        raise Refusal(
            "--schedule", f"{plain(options)!r} is no list of options", "write lag=2, or lag=5,block=3"
        )
    return f"{name}:{options}" if options else name


def _uploaded(file: str, uploads: Path) -> str:
    """The file, if it is one that was uploaded here. Raises Refusal."""
    found = os.path.realpath(file)
    if not Path(found).is_relative_to(uploads) or not os.path.isfile(found):
        raise Refusal("--keep", "a file was not uploaded on this page", "drop it on the strip again")
    return found
