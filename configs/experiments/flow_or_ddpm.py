"""Rectified flow against FVDM's own process, with the same network and the same draw of levels.

Hypothesis (the project's, from the step that Pusa took from FVDM's ddpm to flow): a level for each frame
works with either process, and flow learns faster.

Threshold, on means over seeds, PTSS 0.2 from scratch at equal steps: (1) valid generations of flow exceed
ddpm's by at least 0.05; (2) so does the mean of the five tasks; (3) with ddpm too extension is nearest to
the right video at least half the time. Excesses are printed and no part of the rule: "excess" is of the
velocity noise − clean at equal ratios of noise to clean, in which an error of ddpm's ε near pure noise
counts up to ten thousandfold; "own" is in the units of what each network says, which cannot be compared
between the two.

Arms: flow (the velocity, 25 Euler steps, evenly spaced) and ddpm (ε, 25 DDIM steps, FVDM's spacing).

    python configs/experiments/flow_or_ddpm.py --steps 2500

Cost: 6 runs, of which 3 are new where ptss.py has been run; three minutes of one busy CPU core each at 2500
steps.
"""

from pathlib import Path

import numpy as np
from arms import Arm
from report import EXCESS, QUALITY, RIGHT, Experiment, Found, program, ruled, told

OWN = tuple(name.replace("excess", "own") for name in EXCESS)


def arms(steps: int) -> dict[str, Arm]:
    return {process: Arm("ptss 0.2", steps, process) for process in ("flow", "ddpm")}


def verdict(found: Found) -> list[str]:
    valid, extension = "generation valid", "extension nearest"
    tasks = {label: np.mean([found.mean(label, measure) for measure in RIGHT]) for label in ("flow", "ddpm")}
    return [
        ruled("valid generations of flow exceed ddpm's by 0.05",
              found.mean("flow", valid) >= found.mean("ddpm", valid) + 0.05,
              told(found, "flow", valid), told(found, "ddpm", valid)),
        ruled("the mean of the five tasks with flow exceeds ddpm's by 0.05",
              tasks["flow"] >= tasks["ddpm"] + 0.05,
              *(f"{label} {value:.3f}" for label, value in tasks.items())),
        ruled("with ddpm extension is nearest to the right video half the time",
              found.mean("ddpm", extension) >= 0.5,
              told(found, "flow", extension), told(found, "ddpm", extension)),
    ]  # fmt: skip


CURVES = ("excess diagonal", "excess first", "own diagonal", "own first", "I2V right")
BARS = {"Of 256 videos": QUALITY, "Excess risk over Bayes, as a velocity": EXCESS}
COLUMNS = EXCESS + QUALITY + OWN
EXPERIMENT = Experiment(Path(__file__).stem, __doc__, arms, verdict, CURVES, BARS, COLUMNS)

if __name__ == "__main__":
    program(EXPERIMENT)
