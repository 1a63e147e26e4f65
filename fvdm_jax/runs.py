"""A training run's folder: its settings, and what it has measured."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from fvdm_jax import config, machine
from fvdm_jax.config import Training
from fvdm_jax.program import Refusal, legible, outputs

SETTINGS, METRICS, INCIDENTS = "run.json", "metrics.jsonl", "incidents.jsonl"


def check(folder: Path, settings: Training, options: dict, allowed: tuple[str, ...] = ()) -> list[str]:
    """What differs from when the run in the folder began, if there is one, as lines to be shown.

    `options` are the config's. Raises Refusal where what differs must not, but for the settings `allowed`.
    """
    path = folder / SETTINGS
    if not path.is_file():
        return []
    began, now = json.loads(path.read_text("utf-8")), config.snapshot(settings)
    for name, ours, theirs in config.differences(now, began["settings"]):
        if name in config.MUST_MATCH and name not in allowed:
            what = f"is {ours!r}, and the run in {folder} began with {theirs!r}"
            right = f"give that, another --out, or --allow-change {name} if you know that it may"
            raise Refusal(config.flag(name), what, right)
    changed = list(config.differences(options, began["options"]))
    given, before = set(changed), config.flat(began["settings"])
    for name, ours, theirs in config.differences(config.flat(now), before):
        setting, _, last = name.rpartition(".")
        # What an option changes is told of as that option, and what the run did not know yet not at all.
        if (
            name in before
            and {setting, last}.isdisjoint(config.MUST_MATCH)
            and (last, ours, theirs) not in given
        ):
            changed.append((name, ours, theirs))
    return [f"{name} is {ours} (the run began with {theirs})" for name, ours, theirs in changed]


def write_settings(folder: Path, settings: Training, options: dict, source: Path) -> None:
    """Writes what the run is: its settings, the config's options that made them, and the config's text."""
    told = {"settings": config.snapshot(settings), "options": options, **machine.revision()}
    told |= {"config": source.read_text("utf-8")}
    with outputs(folder / SETTINGS) as (draft,):
        draft.write_text(legible(told | {"versions": machine.versions()}) + "\n", "utf-8")


class Log:
    """Measures by step, as lines of JSON and as TensorBoard's events.

    A run that goes on from a step first forgets the lines of the steps after it, which it makes again;
    `lost` has their number and their seconds. What stood out, such as a spike of the loss, goes to a file of
    its own.
    """

    def __init__(self, folder: Path, step: int):
        from tensorboardX import SummaryWriter

        path = folder / METRICS
        self.lost, self._incidents = (0, 0.0), folder / INCIDENTS
        if path.is_file():
            lines = list(_told(path))
            after = [told for told, _ in lines if told["step"] > step and "loss" in told]
            self.lost = len(after), sum(told["seconds"] for told in after)
            with outputs(path) as (draft,):
                draft.write_text("".join(line for told, line in lines if told["step"] <= step), "utf-8")
        if self._incidents.is_file():
            kept = [line for told, line in _told(self._incidents) if told["step"] <= step]
            with outputs(self._incidents) as (draft,):
                draft.write_text("".join(kept), "utf-8")
        self._file = open(path, "a", encoding="utf-8")
        self._events = SummaryWriter(str(folder / "events"), purge_step=step + 1, write_to_disk=True)

    def write(self, step: int, measures: dict[str, float]) -> None:
        """One line, and one point of each measure's curve."""
        self._file.write(json.dumps({"step": step} | measures) + "\n")
        self._file.flush()
        for name, value in measures.items():
            self._events.add_scalar(name, value, step)

    def incident(self, told: dict) -> None:
        """One line of what stood out at a step."""
        with open(self._incidents, "a", encoding="utf-8") as file:
            file.write(json.dumps(told) + "\n")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        self._events.close()


def _told(path: Path) -> Iterator[tuple[dict, str]]:
    """The whole lines of a file, and what they tell; a run that was killed may have left half of one."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                told = json.loads(line)
                if line.endswith("\n") and isinstance(told, dict) and "step" in told:
                    yield told, line


def metrics(folder: Path) -> list[dict]:
    """What a run has measured, a dict for each step that it has logged."""
    return [told for told, _ in _told(folder / METRICS)]
