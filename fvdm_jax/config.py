"""What a training run is: one frozen bundle of settings, and the Python files that make it.

A config is a file with a function `config`, whose keyword arguments are flags of `python -m fvdm_jax.train`.
What it does not take itself it may pass on: with `**others` every plain field of Training is a flag too.
"""

import argparse
import dataclasses
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from fvdm_jax import rules
from fvdm_jax.flags import TINY
from fvdm_jax.kernels.attention import IMPLEMENTATIONS
from fvdm_jax.kernels.parallel import EXCHANGES
from fvdm_jax.levels import constant, per_frame, shifted
from fvdm_jax.lora import TARGETS
from fvdm_jax.models.dit import PATCH, DiTConfig
from fvdm_jax.models.layers import REMAT
from fvdm_jax.optimisers import Optimiser
from fvdm_jax.process import PROCESSES
from fvdm_jax.program import Refusal, number, whole
from fvdm_jax.weights import WEIGHTS


@dataclasses.dataclass(frozen=True)
class Training:
    """The settings of one run.

    `model` is a folder as of `python -m convert`, of which the network `part` is trained: "dit", or
    "dit_high" or "dit_low" of a model with two experts. `dit` are its sizes, for use without the folder;
    `fresh` trains one of these sizes from nothing. `together` gives the frames of a clip the mean of their
    weights, as Pusa's trainer does. With a `rank` adapters are trained on the layers that `where`
    matches, times `scale`; with 0 all parameters. `data` is a folder of records, of which the first
    `held_out` are never trained on; without data, `clip` gives the size of clips, frames, height and width of
    latents, and `text` the tokens of a prompt. `batch` counts the clips of a step on all devices, worked
    through in `parts`. `average` is the decay of the running average of what is trained, 0 for none. `mesh`
    gives the sizes of its axes, such as "fsdp=8,context=2"; the devices that are left lie along "data".
    `dtype` is what the network computes in, if not what its model says; what is trained and its moments are
    kept as `masters`; with `offload` the optimizer's state and the running average wait in the host's memory.
    `attention` is a name of `attention.IMPLEMENTATIONS`, `exchange` of `parallel.EXCHANGES`, or "auto". Steps
    between checkpoints, of which `keep_last` stay and those that `keep_every` divides; between evaluations,
    and between samples: 0 for never. Up to `skip` steps whose loss or gradient is not finite are left out; of
    the records, the share `max_bad` may be unreadable.
    """

    model: str = str(TINY)
    part: str = "dit"
    dit: DiTConfig | None = None
    fresh: bool = False
    data: str = ""
    clip: str = "21x60x104"
    text: int = 512
    process: str = "flow"
    curriculum: Callable = constant(shifted(per_frame, 5.0))
    weight: str = "uniform"
    together: bool = False
    dropout: float = 0.1
    rank: int = 0
    scale: float = 1.0
    where: str = TARGETS
    optimizer: Optimiser = Optimiser()
    steps: int = 1000
    batch: int = 8
    parts: int = 1
    average: float = 0.0
    seed: int = 0
    remat: str = "full"
    attention: str = "auto"
    exchange: str = "auto"
    dtype: str = ""
    masters: str = "float32"
    offload: bool = False
    mesh: str = ""
    held_out: int = 8
    workers: int = 0
    save_every: int = 100
    keep_last: int = 3
    keep_every: int = 0
    evaluate_every: int = 100
    sample_every: int = 0
    skip: int = 0
    max_bad: float = 0.01

    def __post_init__(self):
        tables = {"process": PROCESSES, "weight": WEIGHTS, "remat": REMAT}
        tables |= {"attention": ("auto", *IMPLEMENTATIONS), "exchange": ("auto", *EXCHANGES)}
        for name, table in tables.items():
            if getattr(self, name) not in table:
                raise Refusal(f"--{name}", f"{getattr(self, name)!r} is unknown", f"give {', '.join(table)}")
        types = "float32", "bfloat16"
        for name, known, use in (("dtype", ("", *types), "compute in"), ("masters", types, "keep them in")):
            if getattr(self, name) not in known:
                what = f"{getattr(self, name)!r} is no type to {use}"
                raise Refusal(flag(name), what, "give float32 or bfloat16")
        for name, rule in _RULES.items():
            rules.obey(flag(name), getattr(self, name), rule)
        if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){2}", self.clip):
            raise Refusal("--clip", f"{self.clip!r} is no size", "give FxHxW in latents, such as 21x60x104")
        if any(int(side) % PATCH for side in self.clip.split("x")[1:]):
            raise Refusal("--clip", f"{self.clip!r} has an odd side", "give even ones, such as 21x60x104")
        if self.average and self.masters != "float32":
            raise Refusal("--average", "is of float32 only", "leave --masters out, or give --average 0")
        if self.batch % self.parts:
            what = f"{self.batch} clips do not divide into {self.parts} parts"
            raise Refusal("--parts", what, "give a divisor of --batch")


_RULES = {
    "dropout": rules.between(0, 1),
    "average": rules.between(0, 1),
    "scale": rules.between(0, 1e6),
    "max_bad": rules.between(0, 1),
    **{name: rules.whole_from(0, 10**6) for name in ("rank", "held_out", "keep_every", "workers", "skip")},
    **{name: rules.whole_from(1, 10**9) for name in ("steps", "batch", "parts", "keep_last", "save_every")},
    **{name: rules.whole_from(0, 10**9) for name in ("evaluate_every", "sample_every")},
    "seed": rules.whole_from(0, 2**32 - 1),
    "text": rules.whole_from(1, 10**6),
}

MUST_MATCH = (
    "model", "part", "dit", "fresh", "data", "held_out", "batch", "seed",
    "process", "rank", "scale", "where", "average", "masters",
)  # fmt: skip
"""What a run that goes on must have as when it began; the rest may be changed."""


def flag(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def load(path: Path) -> Callable[..., Training]:
    """The function `config` of a Python file, NAME.py. Raises Refusal where there is none."""
    spec = importlib.util.spec_from_file_location(f"fvdm_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    # So that a config can say how it differs from another one beside it.
    if str(path.parent.resolve()) not in sys.path:
        sys.path.append(str(path.parent.resolve()))
    spec.loader.exec_module(module)
    if not callable(vars(module).get("config")):
        raise Refusal(path, "has no function config", "see fvdm_jax/config.py")
    return module.config


def options(config: Callable[..., Training]) -> dict[str, object]:
    """The keyword arguments that a config takes and are plain enough for a flag, with their defaults."""
    parameters = inspect.signature(config).parameters.values()
    own = {p.name: p.default for p in parameters}
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        own = vars(config()) | own
    return {name: value for name, value in own.items() if isinstance(value, bool | int | float | str)}


def add_flags(parser: argparse.ArgumentParser, config: Callable[..., Training]) -> None:
    """Gives the parser a flag for each of the config's options; what is not given is absent."""
    group = parser.add_argument_group("the config's own, with its defaults")
    for name, default in sorted(options(config).items()):
        kind = type(default)
        reading = {
            bool: {"action": argparse.BooleanOptionalAction},
            int: {"type": whole},
            float: {"type": number},
        }
        extra = reading.get(kind, {}) | ({} if kind is bool else {"metavar": kind.__name__.upper()})
        shown = repr(default) if kind is str else f"{default}"
        group.add_argument(
            flag(name), dest=name, default=argparse.SUPPRESS, help=shown.replace("%", "%%"), **extra
        )


def snapshot(training: Training) -> dict:
    """The settings as JSON has them; of the curriculum, a function, the config's options must tell."""
    fields = dataclasses.asdict(training)
    del fields["curriculum"]
    return json.loads(json.dumps(fields, default=str))


def flat(told: dict) -> dict:
    """A snapshot with what is inside a setting under names such as "optimizer.rate"."""
    each = ((name, value if isinstance(value, dict) else {"": value}) for name, value in told.items())
    return {f"{name}.{inner}".rstrip("."): v for name, inside in each for inner, v in inside.items()}


def differences(ours: dict, theirs: dict) -> Iterator[tuple[str, object, object]]:
    """(name, ours, theirs) of the settings of two snapshots that are not equal."""
    for name in ours:
        if ours[name] != theirs.get(name):
            yield name, ours[name], theirs.get(name)
