"""What a run measures of itself while it trains: shown on the terminal, and written to its log."""

import contextlib
import math
import time
from collections.abc import Iterator

import jax
import numpy as np

from fvdm_jax import costs
from fvdm_jax.program import Refusal, plain
from fvdm_jax.trainer import Trainer

QUIET = 10.0
"""Seconds between lines where there is no terminal."""


class Meter:
    """Reads what each step told when the next one has begun, and times steps and the wait for data.

    `log` is a `runs.Log`, or None in processes that write nothing. Raises Refusal, naming the step and its
    clips, where a loss or a gradient was not finite.
    """

    def __init__(self, trainer: Trainer, log, bad: dict[str, str]):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._trainer, self._log, self._bad = trainer, log, bad
        self._pending: tuple | None = None
        self._waited = self._all_waited = self._spent = 0.0
        self._named: set[str] = set()
        self._console = Console(stderr=True, quiet=log is None)
        columns = (
            MofNCompleteColumn(),
            BarColumn(24),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._progress.add_task("", total=trainer.settings.steps)
        adapters = _count(trainer.state.params) if trainer.settings.rank else 0
        peak = costs.peak(trainer.over.devices.flat[0].device_kind)
        self._adapters, self._peak = adapters, peak and peak * trainer.over.size
        self._last = self._shown = time.perf_counter()
        self._first = True

    def __enter__(self) -> "Meter":
        self._progress.start()
        return self

    def __exit__(self, *failure) -> None:
        self._progress.stop()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what gets the next batch."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def step(self, step: int, told: dict, rows) -> None:
        """A step was begun; the one before it is read."""
        self.settle()
        self._pending = step, told, rows

    def settle(self) -> None:
        """Reads the step that was begun, if it has not been read, when it is done."""
        if self._pending is None:
            return
        (step, told, rows), self._pending = self._pending, None
        told = jax.device_get(told)
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        if not told["finite"]:
            names = plain(", ".join(rows.names), 300)
            what = f"loss {float(told['loss'])}, gradient's norm {float(told['gradient'])}, of clips {names}"
            right = "lower --rate, or leave a clip out; the last checkpoint is sound"
            raise Refusal(f"step {step}", what, right)
        self._record(step, told, rows, seconds)

    def _record(self, step: int, told: dict, rows, seconds: float) -> None:
        settings, clip = self._trainer.settings, rows.latents.shape[1:4]
        frames = np.maximum(told["frames"], 1)
        bands = {
            f"error/{i}": float(error)
            for i, (error, count) in enumerate(zip(told["error"] / frames, told["frames"], strict=True))
            if count
        }
        measures = {
            "loss": float(told["loss"]),
            "gradient": float(told["gradient"]),
            "rate": float(told["rate"]),
            **bands,
            "seconds": seconds,
            "data_seconds": self._waited,
        }
        if self._peak:
            flops = costs.training(self._trainer.network, clip, rows.states.shape[1], self._adapters)
            measures["mfu"] = flops * settings.batch / (seconds * self._peak)
        if not self._first:
            # The first step compiles.
            self._all_waited, self._spent = self._all_waited + self._waited, self._spent + seconds
        self._first, self._waited = False, 0.0
        self.write(step, measures)
        self._show(step, measures)
        for name in self._bad.keys() - self._named:
            self.say(f"warning: {plain(name)} {plain(self._bad[name])}; another clip takes its place")
        self._named |= self._bad.keys()

    def _show(self, step: int, measures: dict[str, float]) -> None:
        used = f"  {measures['mfu']:.1%} of peak" if "mfu" in measures else ""
        line = f"loss {measures['loss']:.4f}  {measures['seconds']:.2f} s{used}"
        self._progress.update(self._task, completed=step, description=line)
        steps, now = self._trainer.settings.steps, time.perf_counter()
        if self._progress.disable and (step == steps or now - self._shown > QUIET):
            self._shown = now
            self._console.print(f"step {step} of {steps}  {line}", highlight=False)

    def write(self, step: int, measures: dict[str, float]) -> None:
        """To the log; a log that cannot be written costs the run nothing but itself."""
        if self._log is None:
            return
        try:
            self._log.write(step, {k: v for k, v in measures.items() if math.isfinite(v)})
        except OSError as failure:
            self.say(f"warning: the log cannot be written: {failure.strerror}")

    def resume(self) -> None:
        """Steps go on after something else was done, whose time is not theirs."""
        self._last = time.perf_counter()

    def say(self, line: str) -> None:
        """One line above the progress."""
        self._console.print(line, markup=False, highlight=False)

    def finish(self, step: int, code: int) -> None:
        """Tells how the run ended, and how long it waited for data."""
        why = {0: "done", 130: "stopped by Ctrl-C", 143: "stopped by SIGTERM"}[code]
        share = self._all_waited / self._spent if self._spent else 0.0
        self.say(
            f"{why} after step {step}, which is saved; {share:.1%} of the time was spent waiting for data"
        )
        if self._bad:
            self.say(f"warning: {len(self._bad)} records could not be read; others took their places")


def _count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
