"""PTSS from scratch: what share of clips should have levels of their own for each frame?

Hypothesis (FVDM, arXiv 2410.03160): at equal steps a share p = 0.2 costs plain generation nothing, while
a network that has only seen equal levels (p = 0) cannot be given frames.

Threshold, on means over seeds: (1) diagonal excess at 0.2 at most 1.05 times that at 0; (2) valid
generations at 0.2 at least those at 0 less 0.05; (3) at p = 0 each of I2V, start-end and extension is
right less than half as often as at 0.2.

Arms: p of 0, 0.2, 0.5 and 1, the same batches and steps.

    python configs/experiments/ptss.py --steps 2500

Cost: 12 runs, about three minutes of one busy CPU core each at 2500 steps.
"""

from pathlib import Path

from arms import Arm
from report import Experiment, Found, program, ruled, told

DRAWS = {"p = 0": "equal", "p = 0.2": "ptss 0.2", "p = 0.5": "ptss 0.5", "p = 1": "random"}


def arms(steps: int) -> dict[str, Arm]:
    return {label: Arm(draw, steps) for label, draw in DRAWS.items()}


def verdict(found: Found) -> list[str]:
    none, some = "p = 0", "p = 0.2"
    diagonal, valid = "excess diagonal", "generation valid"
    lines = [
        ruled("diagonal excess at 0.2 is at most 1.05 times that at 0",
              found.mean(some, diagonal) <= 1.05 * found.mean(none, diagonal),
              told(found, none, diagonal), told(found, some, diagonal)),
        ruled("valid generations at 0.2 are at least those at 0 less 0.05",
              found.mean(some, valid) >= found.mean(none, valid) - 0.05,
              told(found, none, valid), told(found, some, valid)),
    ]  # fmt: skip
    for measure in ("I2V right", "start-end right", "extension right"):
        fails = found.mean(none, measure) < 0.5 * found.mean(some, measure)
        numbers = told(found, none, measure), told(found, some, measure)
        lines.append(ruled(f"p = 0 fails at {measure}", fails, *numbers))
    return lines


CURVES = ("excess diagonal", "excess first", "excess prefix 4", "I2V right")
EXPERIMENT = Experiment(Path(__file__).stem, __doc__, arms, verdict, CURVES)

if __name__ == "__main__":
    program(EXPERIMENT)
