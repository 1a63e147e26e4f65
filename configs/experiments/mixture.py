"""A mixture of the levels that tasks have, against PTSS: is it better at the tasks for the same generation?

Hypothesis (the project's own, specification of FVDM §10, H4): of a mixture of equal levels (50 % of
clips), random ones (20 %), clean first frames (10 %), clean ends (10 %) and ramps (10 %) more is learned
of the tasks than of PTSS at 0.2 and at 0.5, at equal quality of plain generation.

Threshold, on means over seeds: at equal diagonal excess, which is the largest that any arm and seed ends
at, read off each curve by interpolation of logarithms, the mixture has a lower excess than both PTSS (1)
first, (2) ends, (3) prefix 4 and (4) ramp. At the end of training, for which there is no such equality,
(5) valid generations of the mixture are at least those of PTSS 0.2 less 0.05.

Arms: the mixture, PTSS 0.2, PTSS 0.5, from scratch with the same batches and steps.

    python configs/experiments/mixture.py --steps 2500

Cost: 9 runs, of which 3 are new where ptss.py has been run; three minutes of one busy CPU core each at 2500
steps.
"""

from pathlib import Path

import numpy as np
from arms import Arm
from report import Experiment, Found, program, ruled, told

DRAWS = ("ptss 0.2", "ptss 0.5", "mixture")


def arms(steps: int) -> dict[str, Arm]:
    return {draw: Arm(draw, steps) for draw in DRAWS}


def at_equal(found: Found, label: str, measure: str, goal: float) -> float:
    """The measure where the diagonal excess first falls to `goal`, the mean over seeds."""
    _, diagonal = found.curve(label, "excess diagonal")
    _, wanted = found.curve(label, measure)
    # A curve may rise a little on its way; its lowest so far falls always, as interpolation needs.
    lowest = np.log(np.minimum.accumulate(diagonal, axis=1))
    pairs = zip(lowest, np.log(wanted), strict=True)
    return float(np.exp(np.mean([np.interp(-np.log(goal), -x, y) for x, y in pairs])))


def verdict(found: Found) -> list[str]:
    goal = max(found.values(label, "excess diagonal").max() for label in DRAWS)
    lines = []
    for measure in ("excess first", "excess ends", "excess prefix 4", "excess ramp"):
        at = {label: at_equal(found, label, measure, goal) for label in DRAWS}
        better = at["mixture"] < min(at["ptss 0.2"], at["ptss 0.5"])
        what = f"{measure} is lowest with the mixture where the diagonal's is {goal:.4f}"
        lines.append(ruled(what, better, *(f"{label} {value:.4f}" for label, value in at.items())))
    valid = "generation valid"
    kept = found.mean("mixture", valid) >= found.mean("ptss 0.2", valid) - 0.05
    numbers = (told(found, label, valid) for label in DRAWS)
    return [*lines, ruled("valid generations at least those of PTSS 0.2 less 0.05", kept, *numbers)]


CURVES = ("excess diagonal", "excess first", "excess ends", "excess prefix 4", "excess ramp")
EXPERIMENT = Experiment(Path(__file__).stem, __doc__, arms, verdict, CURVES)

if __name__ == "__main__":
    program(EXPERIMENT)
