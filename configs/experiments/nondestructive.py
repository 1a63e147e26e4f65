"""Tuning a network that knows equal levels only: which levels teach it most and cost it least?

Hypothesis (Pusa, arXiv 2507.16116): a short tuning with a random level for every frame teaches
image-to-video and the other tasks, better than PTSS or an always clean first frame does, and leaves
text-to-video as it was.

Threshold, on means over seeds, "control" being the base tuned as long with equal levels: (1) after
"random" valid generations are at least the control's less 0.05, and (2) the diagonal excess at most 1.1
times the control's; (3) "random" is right at I2V more often than each of "first", "ptss 0.2", "ptss 0.5"
and "ptss 0.8"; (4) so it is at start-end, extension, completion and transition, in their mean; (5)
adapters (rank 16 of the ten matrices of a block) keep (1) and (2) as well; (6) with 1 % of the base's
samples the mean of the five tasks rises by half of what it rises by with 20 %.

Arms: the base (equal levels), and tuned for 20 % of its steps: control, first, ptss 0.2, 0.5 and 0.8,
random, random with adapters; for 1 %: random, and random with adapters. The rate is 2.5e-3, of
adapters 5e-3.

    python configs/experiments/nondestructive.py --steps 2500

Cost: 30 runs; at 2500 steps the base takes three minutes of one busy CPU core, a tuning one.
"""

from pathlib import Path

import numpy as np
from arms import SHORT, Arm
from report import BARS, DRIFT, EXCESS, QUALITY, RIGHT, Experiment, Found, program, ruled, told

RANK = 16
OTHERS = ("first", "ptss 0.2", "ptss 0.5", "ptss 0.8")


def arms(steps: int) -> dict[str, Arm]:
    base = Arm("equal", steps)
    return {
        "base": base,
        "control": base.tuned("equal"),
        **{draw: base.tuned(draw) for draw in (*OTHERS, "random")},
        "random, adapters": base.tuned("random", rank=RANK),
        "random, 1 %": base.tuned("random", SHORT),
        "random, adapters, 1 %": base.tuned("random", SHORT, RANK),
    }


def _mean(found: Found, label: str, measures: tuple[str, ...]) -> float:
    return float(np.mean([found.mean(label, measure) for measure in measures]))


def _kept(found: Found, label: str) -> list[str]:
    valid, diagonal = "generation valid", "excess diagonal"
    return [
        ruled(f"{label}: valid generations at least the control's less 0.05",
              found.mean(label, valid) >= found.mean("control", valid) - 0.05,
              *(told(found, each, valid) for each in ("base", "control", label))),
        ruled(f"{label}: diagonal excess at most 1.1 times the control's",
              found.mean(label, diagonal) <= 1.1 * found.mean("control", diagonal),
              *(told(found, each, diagonal) for each in ("base", "control", label))),
    ]  # fmt: skip


def verdict(found: Found) -> list[str]:
    image, rest = "I2V right", tuple(name for name in RIGHT if name != "I2V right")
    others = {label: _mean(found, label, rest) for label in (*OTHERS, "random")}
    best = max(found.mean(label, image) for label in OTHERS)
    gains = {
        label: _mean(found, label, RIGHT) - _mean(found, "base", RIGHT) for label in ("random", "random, 1 %")
    }
    return [
        *_kept(found, "random"),
        ruled("random is best at I2V", found.mean("random", image) > best,
              *(told(found, label, image) for label in (*OTHERS, "random"))),
        ruled("random is best at the other four tasks", others["random"] == max(others.values()),
              *(f"{label} {value:.3f}" for label, value in others.items())),
        *_kept(found, "random, adapters"),
        ruled("1 % of the samples give half the gain of 20 %", gains["random, 1 %"] >= gains["random"] / 2,
              *(f"{label} {gain:+.3f}" for label, gain in gains.items())),
    ]  # fmt: skip


CURVES = ("excess diagonal", "excess first", "excess prefix 4", "I2V right")
DRAWN = BARS | {"Relative change of parameters": DRIFT}
COLUMNS = EXCESS + QUALITY + DRIFT
EXPERIMENT = Experiment(Path(__file__).stem, __doc__, arms, verdict, CURVES, DRAWN, COLUMNS)

if __name__ == "__main__":
    program(EXPERIMENT)
