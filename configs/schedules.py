"""All schedules on one model, side by side: what each costs, and what the judge says of its videos.

    python configs/schedules.py                      # the bundled model, 8 clips, 10 steps
    python configs/schedules.py --model FOLDER --clips 16 --steps 20

It prints a table in Markdown, as README.md has it: calls of the network for one window, how many frames are
under way at once, whether colour and direction are as the prompt says, and how much a frame changes to the
next, over that of true clips; then of a video of 8 windows the drift in colour from the first to the last
window and the jump at the seams, both in ΔE, and the changes again. The clips are those of fvdm_jax.evaluate.
"""

import dataclasses
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fvdm_jax import judge, machine, zoo  # noqa: E402
from fvdm_jax.defaults import defaults  # noqa: E402
from fvdm_jax.evaluating import scores  # noqa: E402
from fvdm_jax.evaluating.cases import Case, check  # noqa: E402
from fvdm_jax.evaluating.generate import Examiner  # noqa: E402
from fvdm_jax.program import Parser, leave, run, whole  # noqa: E402
from fvdm_jax.progress import Stages  # noqa: E402
from fvdm_jax.request import TINY, Request, validate  # noqa: E402
from fvdm_jax.steps import rows  # noqa: E402

SCHEDULES = (
    "together", "pyramid:lag=1", "pyramid:lag=3", "trapezoid:lag=2", "autoregressive:block=8,first=1",
    "autoregressive:block=3", "autoregressive", "ad:lag=5,block=3", "chunks:chunk=3,flight=3",
    "rolling:window=4", "lattice:block=3", "random:lag=3", "budget:last=4",
)  # fmt: skip
WINDOWS = 8
SHOWN = ("colour", "direction", "change")
LATER = ("colour", "drift_delta_e", "seam_delta_e", "change")
TITLES = ("calls", "under way", "colour", "direction", "change", "colour, 8 windows", "drift ΔE",
          "seam ΔE", "change")  # fmt: skip


def parser() -> Parser:
    """The flags."""
    flags = Parser(prog="python configs/schedules.py", description="All schedules on one model.")
    flags.add_argument("--model", type=Path, default=TINY, metavar="DIR")
    flags.add_argument("--clips", type=whole, default=8, metavar="N")
    flags.add_argument("--steps", type=whole, default=10, metavar="N")
    return flags


def main(argv: list[str]) -> None:
    """Prints the table."""
    given = parser().parse_args(argv)
    request = Request(prompt="", model=given.model, steps=given.steps, explain=True)
    model = defaults(given.model)
    request = validate(request, model, base=True)
    check(request, model)
    machine.keep_compiled_programs()
    machine.keep_memory()
    with Stages() as stages:
        examiner = Examiner(request, given.clips, None, stages)
        one = Case(examiner.window)
        cases = {one: SHOWN, one._replace(windows=WINDOWS): LATER}
        truths = {case: examiner.truth(range(given.clips), case.frames) for case in cases}
        states = examiner.states(truths[one].captions)
        print("| schedule |", " | ".join(TITLES), "|\n|---|" + "---|" * len(TITLES), flush=True)
        for name in SCHEDULES:
            matrix = rows(dataclasses.replace(request, schedule=name), np.ones(examiner.window))
            cells, began = [*map(str, zoo.check(matrix))], time.process_time()
            for case, shown in cases.items():
                found = measured(examiner.made(case, truths[case], states, name).pixels, truths[case], case)
                cells += [_cell(found[column]) for column in shown]
            print(f"| `{name}` |", " | ".join(cells), "|", flush=True)
            stages.say(f"{name}: {time.process_time() - began:.0f} s of CPU")


def measured(pixels: np.ndarray, truth, case: Case) -> dict:
    """The scores of these clips of a case, as `scores.summary` has them."""
    found = []
    for i, (clip, true) in enumerate(zip(pixels, truth.pixels, strict=True)):
        one = scores.Clip(clip, true, judge.read(clip), judge.read(true), truth.scene, i)
        found.append(scores.scored(one, case, []))
    return scores.summary(found)


def _cell(score: dict) -> str:
    return f"{100 * score['rate']:.0f} %" if "rate" in score else f"{score['median']:.2f}"


if __name__ == "__main__":
    leave(run(main))
