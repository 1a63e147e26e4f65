"""What a run measures of itself while it trains: shown on the terminal, and written to its log."""

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from fvdm_jax import costs
from fvdm_jax.integrity import path_name
from fvdm_jax.program import Refusal, plain
from fvdm_jax.runs import INCIDENTS
from fvdm_jax.trainer import Trainer

QUIET = 10.0
"""Seconds between lines where there is no terminal."""
SPIKE = 12.0
"""Median deviations above the median of the last WINDOW losses from which a loss is a spike."""
WINDOW, SETTLED = 64, 16
HUNG, LEAST = 10.0, 60.0
"""How many times as long as most steps something takes, and how many seconds, from which it is told of."""


class NotFinite(Refusal):
    """A loss or a gradient is not finite; `step` is the one whose batch brought it."""

    def __init__(self, step: int, what: str, right: str):
        super().__init__(f"step {step}", what, right)
        self.step = step


class Meter:
    """Reads what each step told when the next one has begun, and times steps and the wait for data.

    `log` is a `runs.Log`, or None in processes that write nothing. Raises NotFinite, naming the step and its
    clips, where a loss or a gradient was not finite once more than the settings let pass, and Refusal where
    too many records are bad.
    """

    def __init__(self, trainer: Trainer, log, feed):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._trainer, self._log, self._bad, self._count = trainer, log, feed.bad, feed.count
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._times: deque[float] = deque(maxlen=WINDOW)
        self._skipped, self._deaf = 0, False
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
        with self.watched("the wait for data"):
            yield
        self._waited += time.perf_counter() - began

    @contextlib.contextmanager
    def watched(self, what: str) -> Iterator[None]:
        """Within it what takes far longer than most steps is told of while it does, by who has the log."""
        if self._log is None:
            yield
            return
        usual = float(np.median(self._times)) if self._times else 0.0
        limit = max(LEAST, HUNG * usual)
        most = f", and most steps take {usual:.3g} s" if usual else ""
        said = f"warning: {what} has taken {limit:.0f} s so far{most}: something may hang"
        timer = threading.Timer(limit, self.say, [said])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def step(self, step: int, told: dict, rows) -> None:
        """A step was begun; the one before it is read."""
        self.settle()
        self._pending = step, told, rows

    def settle(self) -> None:
        """Reads the step that was begun, if it has not been read, when it is done."""
        if self._pending is None:
            return
        (step, told, rows), self._pending = self._pending, None
        with self.watched(f"step {step}"):
            told = jax.device_get(told)
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        if told["finite"]:
            self._record(step, told, rows, seconds)
        else:
            self._not_finite(step, told, rows)
        self._check_bad()

    def _not_finite(self, step: int, told: dict, rows) -> None:
        what = f"loss {float(told['loss'])}, gradient's norm {float(told['gradient'])}"
        if not math.isfinite(told["gradient"]):
            paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(self._trainer.state.params)]
            what += f", first in {path_name(paths[int(told['leaf'])])}"
        self.incident("not finite", step, what, rows.names)
        what += f", of clips {plain(', '.join(rows.names), 300)}"
        self._skipped += 1
        if self._skipped > self._trainer.settings.skip:
            right = "lower --rate, leave a clip out, or --skip such steps; the last checkpoint is sound"
            raise NotFinite(step, what, right)
        self.say(f"warning: step {step} is left out: {what}")

    def _check_bad(self) -> None:
        for name in self._bad.keys() - self._named:
            self.say(f"warning: {plain(name)} {plain(self._bad[name])}; another clip takes its place")
        self._named |= self._bad.keys()
        most = self._trainer.settings.max_bad
        # Every process knows of those that it has read.
        if len(self._bad) > most * self._count / jax.process_count():
            what = (
                f"{len(self._bad)} records of {self._count} cannot be read, such as {next(iter(self._bad))}"
            )
            raise Refusal("--max-bad", what, f"mend them, or allow more than {most:.2%}")

    def _spike(self, step: int, loss: float, rows) -> None:
        """Tells of a loss that stands out from those before it."""
        usual = np.median(self._losses) if self._losses else loss
        spread = np.median(np.abs(np.array(self._losses) - usual)) if self._losses else 0.0
        if len(self._losses) >= SETTLED and loss > usual + SPIKE * max(spread, 0.02 * abs(usual)):
            what = f"the loss is {loss:.4g}, where {usual:.4g} is usual"
            self.incident("spike", step, what, rows.names)
            self.say(f"warning: step {step}: {what}; its clips are in {INCIDENTS}")
        else:
            self._losses.append(loss)

    def incident(self, kind: str, step: int, what: str, clips: Sequence[str] = ()) -> None:
        """To the run's incidents, with the clips of the step if they have to do with it."""
        if self._log is not None:
            with self._unheard():
                self._log.incident({"step": step, "kind": kind, "what": what, "clips": list(clips)})

    def _record(self, step: int, told: dict, rows, seconds: float) -> None:
        settings, clip = self._trainer.settings, rows.latents.shape[1:4]
        frames = np.maximum(told["frames"], 1)
        bands = {
            f"error/{i}": float(error)
            for i, (error, count) in enumerate(zip(told["error"] / frames, told["frames"], strict=True))
            if count
        }
        most = settings.optimizer.clip
        clipped = {"clipped": float(told["gradient"] > most)} if most else {}
        measures = {
            "loss": float(told["loss"]),
            "gradient": float(told["gradient"]),
            "rate": float(told["rate"]),
            **clipped,
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
            self._times.append(seconds)
        self._first, self._waited = False, 0.0
        self.write(step, measures)
        self._show(step, measures)
        self._spike(step, measures["loss"], rows)

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
        if self._log is not None:
            with self._unheard():
                self._log.write(step, {k: v for k, v in measures.items() if math.isfinite(v)})

    @contextlib.contextmanager
    def _unheard(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as failure:
            if not self._deaf:
                self.say(f"warning: the log cannot be written: {failure}; training goes on without")
            self._deaf = True

    def resume(self) -> None:
        """Steps go on after something else was done, whose time is not theirs."""
        self._last = time.perf_counter()

    def say(self, line: str) -> None:
        """One line above the progress."""
        self._console.print(line, markup=False, highlight=False)

    def finish(self, step: int, code: int, seconds: dict[str, float]) -> None:
        """Tells how the run ended, how long it waited for data, and where its `seconds` went."""
        why = {0: "done", 130: "stopped by Ctrl-C", 143: "stopped by SIGTERM"}[code]
        share = self._all_waited / self._spent if self._spent else 0.0
        self.say(
            f"{why} after step {step}, which is saved; {share:.1%} of the time was spent waiting for data"
        )
        spent = ", ".join(f"{what} {part:.0f} s" for what, part in seconds.items() if part >= 0.5)
        self.say(
            f"{seconds.get('step', 0) / max(sum(seconds.values()), 1e-9):.1%} of it went to steps: {spent}"
        )
        if self._bad:
            self.say(f"warning: {len(self._bad)} records could not be read; others took their places")


def _count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
