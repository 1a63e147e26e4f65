"""A training run's folder: its settings, its checkpoints, and what it has measured."""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from fvdm_jax import config, machine
from fvdm_jax.config import Training
from fvdm_jax.program import Refusal, legible, outputs
from fvdm_jax.training import TrainState

SETTINGS, METRICS, CHECKPOINTS = "run.json", "metrics.jsonl", "checkpoints"


class Position(NamedTuple):
    """Where in its data a run is: the next batch, and how many clips it has taken."""

    batch: int
    clips: int


class Checkpoints:
    """The checkpoints of a run, written beside the training and committed whole, by Orbax.

    Each holds the whole TrainState, the Position, the settings and the revision of the code. The newest
    `keep_last` stay, and those of steps that `keep_every` divides.
    """

    def __init__(self, folder: Path, settings: Training, read_only: bool = False):
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as rules

        keep = [rules.LatestN(settings.keep_last)]
        if settings.keep_every:
            keep.append(rules.EveryNSteps(settings.keep_every))
        # What is being written beside one who only reads is not to be cleaned up.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if read_only else rules.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
        )
        self._manager = ocp.CheckpointManager((folder / CHECKPOINTS).absolute(), options=options)
        self._told = {"settings": config.snapshot(settings), "versions": machine.versions(), **revision()}

    def save(self, state: TrainState, position: Position) -> None:
        """Begins to write the state under its step, if that is not there; training may go on at once."""
        import orbax.checkpoint as ocp

        step = int(state.step)
        if step in self._manager.all_steps():
            return
        told = self._told | {"position": position._asdict()}
        args = ocp.args.Composite(state=ocp.args.StandardSave(_raw(state)), run=ocp.args.JsonSave(told))
        self._manager.save(step, args=args, force=True)

    def newest(self) -> int | None:
        """The step of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def restore(self, step: int, wanted: TrainState) -> tuple[TrainState, Position]:
        """The state in the places of the shapes `wanted`, on whatever mesh it was saved; and its position."""
        import orbax.checkpoint as ocp

        args = ocp.args.Composite(state=ocp.args.StandardRestore(_raw(wanted)), run=ocp.args.JsonRestore())
        found = self._manager.restore(step, args=args)
        state = found["state"]
        key = jax.random.wrap_key_data(state["key"])
        return TrainState(**(state | {"key": key})), Position(**found["run"]["position"])

    def part(self, step: int, name: str, wanted: dict) -> dict:
        """One part of the state alone: "params" or "average"."""
        import orbax.checkpoint as ocp

        folder = self._manager.directory / str(step) / "state"
        args = ocp.checkpoint_utils.construct_restore_args({name: wanted})
        args = ocp.args.PyTreeRestore(item={name: wanted}, restore_args=args, partial_restore=True)
        return ocp.PyTreeCheckpointer().restore(folder, args=args)[name]

    def wait(self) -> None:
        """Returns when what was begun is committed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def _raw(state: TrainState) -> dict:
    """The state as a plain tree: its key as the numbers that it is made of."""
    if isinstance(state.key, jax.ShapeDtypeStruct):
        shape = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), state.key.dtype))
        data = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=state.step.sharding)
    else:
        data = jax.random.key_data(state.key)
    return state._asdict() | {"key": data}


def revision() -> dict[str, str]:
    """The revision of the code, where it is a checkout of git and git is there."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        here = Path(__file__).parent
        said = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
        return {"revision": said.stdout.strip()}
    return {}


def check(folder: Path, settings: Training, options: dict) -> list[str]:
    """What differs from when the run in the folder began, if there is one, as lines to be shown.

    `options` are the config's. Raises Refusal where what differs must not.
    """
    path = folder / SETTINGS
    if not path.is_file():
        return []
    began, now = json.loads(path.read_text("utf-8")), config.snapshot(settings)
    for name, ours, theirs in config.differences(now, began["settings"]):
        if name in config.MUST_MATCH:
            what = f"is {ours!r}, and the run in {folder} began with {theirs!r}"
            raise Refusal(config.flag(name), what, "give that, or another --out")
    changed = config.differences(options, began["options"])
    return [f"{name} is {ours} (the run began with {theirs})" for name, ours, theirs in changed]


def write_settings(folder: Path, settings: Training, options: dict, source: Path) -> None:
    """Writes what the run is: its settings, the config's options that made them, and the config's text."""
    told = {"settings": config.snapshot(settings), "options": options, **revision()}
    told |= {"config": source.read_text("utf-8")}
    with outputs(folder / SETTINGS) as (draft,):
        draft.write_text(legible(told | {"versions": machine.versions()}) + "\n", "utf-8")


class Log:
    """Measures by step, as lines of JSON and as TensorBoard's events.

    A run that goes on from a step first forgets the lines of the steps after it, which it makes again.
    """

    def __init__(self, folder: Path, step: int):
        from tensorboardX import SummaryWriter

        path = folder / METRICS
        if path.is_file():
            kept = [line for line in _lines(path) if json.loads(line)["step"] <= step]
            with outputs(path) as (draft,):
                draft.write_text("".join(kept), "utf-8")
        self._file = open(path, "a", encoding="utf-8")
        self._events = SummaryWriter(str(folder / "events"), purge_step=step + 1, write_to_disk=True)

    def write(self, step: int, measures: dict[str, float]) -> None:
        """One line, and one point of each measure's curve."""
        self._file.write(json.dumps({"step": step} | measures) + "\n")
        self._file.flush()
        for name, value in measures.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._events.close()


def _lines(path: Path) -> Iterator[str]:
    """The whole lines of a file; a killed run may have left half of one at the end."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield line


def metrics(folder: Path) -> list[dict]:
    """What a run has measured, a dict for each step that it has logged."""
    return [json.loads(line) for line in _lines(folder / METRICS)]
