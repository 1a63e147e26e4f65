"""What was measured, as tables to be read."""

import sys
from collections.abc import Sequence

COLUMNS = {
    "colour": "colour", "shape": "shape", "size": "size", "direction": "way", "speed": "speed",
    "possible": "possible", "smooth": "smooth", "kept": "stays", "all": "all", "reaches": "reach",
    "continues": "goes on", "kept_psnr": "PSNR", "seam_delta_e": "seam ΔE", "seam_motion": "seam step",
    "path": "path", "frozen": "frozen", "change": "change",
}  # fmt: skip
"""The scores that are shown, and their titles: rates in per cent, of numbers the mean."""
DRIFT = ("drift_area", "drift_speed", "drift_delta_e", "drift_shape", "drift_colour")


def show(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for i, title in enumerate(titles):
        table.add_column(title, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def cell(score: dict | None, which: str = "mean") -> str:
    """A score, as `scores.summary` has it: a rate in per cent, of numbers the mean or the median."""
    if score is None:
        return ""
    if "rate" in score:
        return f"{100 * score['rate']:.0f}%"
    return "exact" if score[which] is None else f"{score[which]:.2f}"


def report(record: dict) -> None:
    """Prints what an evaluation has measured."""
    tasks = record["tasks"]
    rows = []
    for name, task in tasks.items():
        distance = "–" if task["frechet"] is None else f"{task['frechet']:.2f}"
        rows.append([name, *(cell(task["scores"].get(column)) for column in COLUMNS), distance])
    show(["", *COLUMNS.values(), "Fréchet"], rows)
    floors = ", ".join(
        f"{n} frames {'–' if f is None else f'{f:.2f}'}" for n, f in record["frechet"]["floor"].items()
    )
    clips = record["frechet"]["clips"]
    print(f"Fréchet distances are of {clips} clips to {clips} others; between true ones: {floors}")
    for name, task in tasks.items():
        if task["windows"] > 1:
            found = (f"{d.removeprefix('drift_')} {cell(task['scores'][d], 'median')}" for d in DRIFT)
            print(f"{name}, first to last of {task['windows']} windows, medians: {', '.join(found)}")
    if record["losses"]:
        print("held-out loss: " + ", ".join(f"{name} {loss:.4f}" for name, loss in record["losses"].items()))
