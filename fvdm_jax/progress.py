"""What a program is doing, shown while it does it, and how long each part took."""

import contextlib
import time
from collections.abc import Iterator, Mapping


class Stages:
    """The named stages of one run, shown on standard error; `seconds` has the wall time of each.

    A stage that is entered again goes on where it was; one that is entered within another interrupts it. On a
    terminal the lines live; elsewhere they are written once, when the run ends.
    """

    def __init__(self):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn

        stages = self

        class Seconds(ProgressColumn):
            def render(self, task):
                return f"{stages._elapsed(task.description):6.1f} s"

        columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description:<8}"), Seconds())
        bar = (BarColumn(24), TextColumn("{task.fields[steps]}"))
        self.seconds: dict[str, float] = {}
        self._before: dict[str, float] = {}
        self._progress = Progress(*columns, *bar, console=Console(stderr=True))
        self._tasks: dict = {}
        self._running: tuple[str, float] | None = None

    def __enter__(self) -> "Stages":
        self._progress.start()
        return self

    def __exit__(self, *failure) -> None:
        self._progress.stop()

    def _elapsed(self, name: str) -> float:
        before, running = self.seconds.get(name, 0.0), self._running
        # Read once: the display asks from a thread of its own.
        if running and running[0] == name:
            return before + time.perf_counter() - running[1]
        return before

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """The stage of this name, until the block ends."""
        if name not in self._tasks:
            self.expect(name, None)
        outer = self._running
        if outer:
            self.seconds[outer[0]] = self._elapsed(outer[0])
        self._running = name, time.perf_counter()
        try:
            yield
            task = self._progress.tasks[self._tasks[name]]
            if task.total is None:
                self._progress.update(task.id, total=1, completed=1)
        finally:
            self.seconds[name] = self._elapsed(name)
            self._running = (outer[0], time.perf_counter()) if outer else None

    def begin(self, already: Mapping[str, float] | None = None) -> None:
        """From here on `since` counts, beginning with what was there already; before, it is the whole run."""
        past = already or {}
        self._before = {name: seconds - past.get(name, 0.0) for name, seconds in self.seconds.items()}

    @property
    def since(self) -> dict[str, float]:
        """The seconds of each stage since `begin`."""
        past = {name: self._elapsed(name) - self._before.get(name, 0.0) for name in self.seconds}
        return {name: seconds for name, seconds in past.items() if seconds > 0}

    def expect(self, name: str, steps: int | None) -> None:
        """Says that the stage of this name takes so many steps, each of which will be told by `step`."""
        self.seconds.setdefault(name, 0.0)
        if name in self._tasks:
            self._progress.reset(self._tasks[name], total=steps, steps="")
        else:
            self._tasks[name] = self._progress.add_task(name, total=steps, steps="")

    def say(self, line: str) -> None:
        """One line above the stages."""
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def step(self) -> None:
        """One more step of the running stage."""
        running = self._running
        if running:
            task = self._progress.tasks[self._tasks[running[0]]]
            done, total = int(task.completed) + 1, int(task.total or 0)
            self._progress.update(task.id, completed=done, steps=f"step {done} of {total}")
