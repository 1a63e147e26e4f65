"""How many samples does tuning take until a network is as good at I2V as one trained for nothing else?

Hypothesis (Pusa, arXiv 2507.16116: 1/2500 of the data and 1/200 of the cost of a dedicated model): a
network that generates from text is tuned to image-to-video with far fewer samples than training for it
from scratch takes.

Threshold, on means over seeds, "as good" being right at I2V as often as "I2V from scratch" at its end,
less 0.03: (1) "random" is as good after some tuning of at most 40 % of the samples; (2) so is "first";
(3) the least share that is enough is at most 5 %. The least share is that of the shortest arm that is as
good; each arm's rate has fallen to 0 at its end, so points on the way do not count.

Arms: from scratch, the first frame always clean; and the base (equal levels from scratch) tuned for 1, 5,
20 and 40 % of its steps with the first frame always clean, and for 1, 20 and 40 % with random levels.

    python configs/experiments/cost.py --steps 2500

Cost: 27 runs, of which 15 are new where nondestructive.py has been run; three minutes of one busy CPU core at
most each.
"""

from pathlib import Path

from arms import Arm
from report import Experiment, Found, program, ruled, told

SHARES = {"first": (0.01, 0.05, 0.2, 0.4), "random": (0.01, 0.2, 0.4)}
SCRATCH = "I2V from scratch"


def _label(draw: str, share: float) -> str:
    return f"{draw}, {share:.0%}"


def arms(steps: int) -> dict[str, Arm]:
    base = Arm("equal", steps)
    tuned = {_label(draw, share): base.tuned(draw, share) for draw in SHARES for share in SHARES[draw]}
    return {SCRATCH: Arm("first", steps), "base": base} | tuned


def verdict(found: Found) -> list[str]:
    image, lines, least = "I2V right", [], []
    goal = found.mean(SCRATCH, image) - 0.03
    for draw, shares in SHARES.items():
        enough = [share for share in shares if found.mean(_label(draw, share), image) >= goal]
        least += enough[:1]
        arms = [told(found, _label(draw, share), image) for share in shares]
        what = f"{draw} becomes as good at I2V as from scratch"
        what += f", with {enough[0]:.0%} of the samples" if enough else ""
        lines.append(ruled(what, bool(enough), told(found, SCRATCH, image), *arms))
    share = min(least, default=None)
    number = "none was enough" if share is None else f"the least that was enough is {share:.0%}"
    return [*lines, ruled("5 % of the samples are enough", share is not None and share <= 0.05, number)]


CURVES = ("I2V right", "excess first", "excess diagonal")
BARS = {
    "Of 256 videos": ("I2V right", "I2V valid", "I2V variation", "generation valid", "extension right"),
    "Excess risk over Bayes": ("excess first", "excess diagonal", "excess prefix 4"),
}
EXPERIMENT = Experiment(Path(__file__).stem, __doc__, arms, verdict, CURVES, BARS)

if __name__ == "__main__":
    program(EXPERIMENT)
