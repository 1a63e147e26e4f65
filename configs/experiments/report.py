"""From the arms of an experiment to its table, picture and verdict: what its file, run as a program, does."""

import argparse
import importlib
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import arms
import circle
import numpy as np

from fvdm_jax import machine
from fvdm_jax.process import PROCESSES
from fvdm_jax.program import Parser, Refusal, leave, legible, outputs, run, whole

EXCESS = tuple(f"excess {family}" for family in circle.FAMILIES)
RIGHT = tuple(f"{task} right" for task in circle.TASKS if task != "generation")
QUALITY = ("generation valid", "generation variation", *RIGHT)
DRIFT = tuple(f"drift {group}" for group in arms.GROUPS)


class Found(NamedTuple):
    """What came of every arm: by its label, the results of all seeds."""

    results: dict[str, list[dict]]

    def values(self, label: str, measure: str) -> np.ndarray:
        """A measure of an arm by seed; NaN where an arm has no such measure."""
        return np.array([result.get(measure, np.nan) for result in self.results[label]])

    def mean(self, label: str, measure: str) -> float:
        """Its mean over seeds."""
        return float(self.values(label, measure).mean())

    def curve(self, label: str, measure: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps [n] and the measure [seeds n] along training."""
        curves = [result["curve"] for result in self.results[label]]
        steps = np.array([point["step"] for point in curves[0]])
        return steps, np.array([[point[measure] for point in curve] for curve in curves])


BARS = {"Excess risk over Bayes": EXCESS, "Of 256 videos": QUALITY}
"""What is drawn of most experiments, by title."""


class Experiment(NamedTuple):
    """What an experiment's file says: `arms(steps)` by label, and `verdict(found)` by the rules of its text.

    `columns` are printed, `bars` by title and `curves` are drawn. `text` is the file's docstring.
    """

    name: str
    text: str
    arms: Callable[[int], dict[str, arms.Arm]]
    verdict: Callable[[Found], list[str]]
    curves: tuple[str, ...]
    bars: dict[str, tuple[str, ...]] = BARS
    columns: tuple[str, ...] = EXCESS + QUALITY


def ruled(what: str, holds: bool, *numbers: str) -> str:
    """A line of a verdict."""
    return f"{'met' if holds else 'NOT MET'}: {what} ({', '.join(numbers)})"


def told(found: Found, label: str, measure: str) -> str:
    """An arm's measure as text: the mean over seeds and their range."""
    values = found.values(label, measure)
    return f"{label} {values.mean():.3f} [{values.min():.3f}–{values.max():.3f}]"


def table(found: Found, columns: tuple[str, ...]) -> str:
    """Arms down and measures across: the mean over seeds, and half their range."""
    wide = max(map(len, found.results)) + 1
    heads = [[word.rjust(14) for word in column.rsplit(" ", 1)] for column in columns]
    lines = [" " * wide + "".join(head[row] for head in heads) for row in (0, 1)]
    for label in found.results:
        values = [found.values(label, column) for column in columns]
        cells = (f"{v.mean():.3f}±{np.ptp(v) / 2:.3f}".rjust(14) for v in values)
        lines.append(label.ljust(wide) + "".join(cells))
    return "\n".join(lines)


def drawing() -> type:
    """Matplotlib's Figure. Raises Refusal where it is not installed."""
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError as missing:
        raise Refusal("matplotlib", "is not installed", "pip install matplotlib") from missing


def picture(experiment: Experiment, found: Found):
    """A Figure: a row of curves along training, and a row of bars for each title of the experiment."""
    figure = drawing()(figsize=(15, 4.2 + 3.8 * len(experiment.bars)), layout="constrained")
    heights = [1.15] * bool(experiment.curves) + [1.0] * len(experiment.bars)
    rows = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    colours = {label: f"C{i}" if len(found.results) <= 10 else None for i, label in enumerate(found.results)}
    if None in colours.values():
        palette = importlib.import_module("matplotlib").colormaps["tab20"]
        colours = {label: palette(i) for i, label in enumerate(colours)}
    figure.suptitle(f"{experiment.name}: {experiment.text.splitlines()[0]}", fontsize=13)
    if experiment.curves:
        _curves(rows[0], experiment.curves, found, colours)
    for row, (title, measures) in zip(rows[-len(experiment.bars) :], experiment.bars.items(), strict=True):
        _bars(row, title, measures, found, colours)
    return figure


def _curves(row, measures: tuple[str, ...], found: Found, colours: dict) -> None:
    last = [found.curve(label, measures[0])[0][-1] for label in colours]
    for axes, measure in zip(np.atleast_1d(row.subplots(1, len(measures))), measures, strict=True):
        for label, colour in colours.items():
            steps, values = found.curve(label, measure)
            axes.plot(steps, values.mean(0), color=colour, marker="o", markersize=3, label=label)
            axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
        if measure.startswith(("excess", "own")):
            axes.set_yscale("log")
        if max(last) > 10 * min(last):
            axes.set_xscale("log")
        axes.set_xlabel("steps of the arm's own training")
        axes.set_title(measure, fontsize=11)
        axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    row.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), fontsize=9)


def _bars(row, title: str, measures: tuple[str, ...], found: Found, colours: dict) -> None:
    axes, wide = row.subplots(), 0.84 / len(colours)
    for i, (label, colour) in enumerate(colours.items()):
        values = np.array([found.values(label, measure) for measure in measures])
        mean = values.mean(1)
        error = np.stack([mean - values.min(1), values.max(1) - mean])
        at = np.arange(len(measures)) + (i - (len(colours) - 1) / 2) * wide
        axes.bar(at, mean, wide * 0.95, yerr=error, color=colour, error_kw={"elinewidth": 1}, label=label)
    axes.set_xticks(range(len(measures)), measures, fontsize=9)
    if measures[0].startswith("excess"):
        axes.set_yscale("log")
    axes.set_ylabel("mean and range of seeds", fontsize=9)
    axes.set_title(title, fontsize=11)
    row.legend(fontsize=9, loc="outside right upper")
    axes.grid(axis="y", alpha=0.3)


def _seeds(text: str) -> tuple[int, ...]:
    seeds = tuple(map(whole, text.split(",")))
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r} are no seeds; give different ones from 0, such as 0,1,2")
    return seeds


def _steps(text: str) -> int:
    if not 20 <= (steps := whole(text)) <= 10**6:
        raise argparse.ArgumentTypeError(f"{steps} is out of range; give 20 to 1000000 steps")
    return steps


def parser(text: str) -> Parser:
    """The flags of every experiment."""
    flags = Parser(description=text)
    flags.add_argument("--out", type=Path, default=Path("runs/experiments"), help="folder of results")
    flags.add_argument("--steps", type=_steps, default=4000, help="of an arm from scratch; 4000")
    flags.add_argument("--seeds", type=_seeds, default=(0, 1, 2), help="as 0,1,2, which is the default")
    return flags


def ceiling(process: str) -> dict:
    """What the best denoiser of a process reaches in the same measures."""
    best = circle.measuring(process, partial(circle.bayes, PROCESSES[process]))
    return circle.measures(process, best, {})


def main(experiment: Experiment, argv: list[str]) -> None:
    """Trains and measures what `--out` lacks, prints table and verdict, writes results and picture."""
    flags = parser(experiment.text).parse_args(argv)
    # Better refused now than after hours of training.
    drawing()
    machine.keep_compiled_programs()
    chosen, kept = experiment.arms(flags.steps), flags.out / "arms"
    results: dict[str, list[dict]] = {label: [] for label in chosen}
    for label, arm in chosen.items():
        for seed in flags.seeds:
            one = arms.result(arm.seeded(seed), kept)
            results[label].append({"seed": seed} | one)
            spent = one["CPU seconds"] + one["CPU seconds of measuring"]
            print(f"{experiment.name}: {label}, seed {seed}: {spent:.0f} s of CPU", flush=True)
    found = Found(results)
    verdict = experiment.verdict(found)
    ceilings = {process: ceiling(process) for process in sorted({arm.process for arm in chosen.values()})}
    print("", table(found, experiment.columns), "", *verdict, sep="\n", flush=True)
    what = {
        "experiment": experiment.name,
        "text": experiment.text,
        "command": shlex.join(["python", f"configs/experiments/{experiment.name}.py", *argv]),
        "steps": flags.steps,
        "versions": machine.versions(),
        "verdict": verdict,
        "arms": results,
        "Bayes": ceilings,
    }
    files = (flags.out / f"{experiment.name}.{kind}" for kind in ("json", "png"))
    with outputs(*files) as (told, drawn):
        told.write_text(legible(what) + "\n", encoding="utf-8")
        picture(experiment, found).savefig(drawn, dpi=110)


def program(experiment: Experiment) -> None:
    """Runs the experiment as this process's program."""
    leave(run(partial(main, experiment), sys.argv[1:]))
