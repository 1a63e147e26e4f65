"""Adapters at more than the strength they were trained at: more faithful to the image, and less in motion?

Hypothesis (what Pusa's documentation says of its LoRA, for which it advises 1.4 and more at inference): a
larger strength makes image-to-video keep more to the given frame, at the price of motion.

Threshold, on means over seeds: (1) I2V is right at 1.4 more often than at 1.0 by at least 0.02; (2) from
1.0 to 2.0 motion falls: the mean speed of I2V by at least 0.1 pixels a frame, or the share of frozen
videos rises by at least 0.05; (3) up to 1.4 valid generations fall by at most 0.05.

Arms: the adapters of nondestructive.py (random levels, 20 % of the base's steps) at 1.0, 1.4, 1.7 and
2.0; and the base.

    python configs/experiments/overscaling.py --steps 2500

Cost: where nondestructive.py has been run only measuring, 15 times ten seconds of one CPU core.
"""

import dataclasses
from pathlib import Path

from arms import Arm
from report import EXCESS, QUALITY, Experiment, Found, program, ruled, told

STRENGTHS = (1.0, 1.4, 1.7, 2.0)
MOTION = ("I2V speed", "I2V frozen", "I2V distance", "I2V valid")


def arms(steps: int) -> dict[str, Arm]:
    base = Arm("equal", steps)
    adapters = base.tuned("random", rank=16)
    return {"base": base} | {f"× {s}": dataclasses.replace(adapters, strength=s) for s in STRENGTHS}


def verdict(found: Found) -> list[str]:
    every = [f"× {strength}" for strength in STRENGTHS]

    def gain(measure: str, label: str) -> float:
        return found.mean(label, measure) - found.mean("× 1.0", measure)

    def numbers(measure: str) -> list[str]:
        return [told(found, label, measure) for label in every]

    slower = gain("I2V speed", "× 2.0") <= -0.1 or gain("I2V frozen", "× 2.0") >= 0.05
    kept = gain("generation valid", "× 1.4") >= -0.05
    return [
        ruled(
            "I2V is right more often at 1.4 by 0.02",
            gain("I2V right", "× 1.4") >= 0.02,
            *numbers("I2V right"),
        ),
        ruled("motion falls from 1.0 to 2.0", slower, *numbers("I2V speed"), *numbers("I2V frozen")),
        ruled("valid generations fall by at most 0.05 up to 1.4", kept, *numbers("generation valid")),
    ]


BARS = {"Of 256 videos": QUALITY, "Motion and fidelity of I2V": MOTION, "Excess risk over Bayes": EXCESS}
COLUMNS = QUALITY + MOTION + EXCESS
EXPERIMENT = Experiment(Path(__file__).stem, __doc__, arms, verdict, (), BARS, COLUMNS)

if __name__ == "__main__":
    program(EXPERIMENT)
