"""The evaluation itself: clips of the world, batch by batch, through every case, and what was measured."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fvdm_jax import judge
from fvdm_jax.evaluating import scores
from fvdm_jax.evaluating.cases import TASKS, Case
from fvdm_jax.evaluating.generate import Examiner, Made, Truth, batches
from fvdm_jax.evaluating.picture import Example, said
from fvdm_jax.evaluating.scores import Clip
from fvdm_jax.progress import Stages

CEILING = "ceiling"
"""The name of the true clips as they come out of the VAE: the best that a model can do with it."""
EXAMPLES = 3


class Plan(NamedTuple):
    """The cases by name, with a ceiling for each length of video, so many `clips`, and so many at once."""

    cases: dict[str, Case]
    ceilings: dict[str, Case]
    clips: int
    batch: int


def plan(window: int, names: Sequence[str], clips: int, batch: int) -> Plan:
    """The Plan of the named tasks for windows of so many latent frames."""
    cases = {name: TASKS[name](window) for name in names}
    windows = dict.fromkeys([1, *(case.windows for case in cases.values())])
    longest = {CEILING if n == 1 else f"{CEILING}, long": Case(window, windows=n) for n in windows}
    return Plan(cases, longest, clips, batch)


class Found:
    """What was measured so far, by the name of the case; `true` are features of the true clips, by frames."""

    def __init__(self):
        self.rows, self.features, self.examples = defaultdict(list), defaultdict(list), defaultdict(list)
        self.true, self.errors = defaultdict(list), []

    def add(self, name: str, case: Case, truth: Truth, readings: list, made: Made) -> None:
        """Takes in a batch of clips; `readings` are of the true ones."""
        for i, (pixels, true, read) in enumerate(zip(made.pixels, truth.pixels, readings, strict=True)):
            clip = Clip(pixels, true, judge.read(pixels), read, truth.scene, i)
            row = scores.scored(clip, case, [alone[i] for alone in made.alone])
            self.rows[name].append(row)
            self.features[name].append(scores.features(pixels, clip.reading))
            if len(self.examples[name]) < EXAMPLES:
                self.examples[name].append(Example(pixels, true, case.given, truth.captions[i], said(row)))

    def told(self, name: str, case: Case, reference: np.ndarray) -> dict:
        """What was measured of a case as JSON has it; `reference` are features of other true clips."""
        return {
            "clips": len(self.rows[name]),
            "frames": case.frames,
            "given": sorted(case.given),
            "windows": case.windows,
            "scores": scores.summary(self.rows[name]),
            "frechet": scores.distance(np.array(self.features[name]), reference),
        }


def evaluate(examiner: Examiner, plan: Plan, losses: bool, stages: Stages) -> tuple[dict, dict]:
    """What was measured, as JSON has it, and Examples by the name of the case."""
    found = Found()
    stages.expect("judge", plan.clips // plan.batch)
    for index in batches(plan.clips, plan.batch):
        with stages("judge"):
            _take(found, examiner, plan, index, losses)
            stages.step()
    reference = {}
    with stages("reference"):
        for case in plan.ceilings.values():
            reference[case.frames] = np.array(_reference(examiner, case.frames, plan))
    everything = plan.cases | plan.ceilings
    record = {
        "losses": {n: float(np.mean([each[n] for each in found.errors])) for n in (found.errors or [{}])[0]},
        "tasks": {name: found.told(name, case, reference[case.frames]) for name, case in everything.items()},
        "frechet": {
            "features": scores.FEATURES,
            "clips": plan.clips,
            "floor": {n: scores.distance(np.array(found.true[n]), each) for n, each in reference.items()},
        },
    }
    return record, dict(found.examples)


def _take(found: Found, examiner: Examiner, plan: Plan, index: range, losses: bool) -> None:
    """A batch of scenes through all cases."""
    truths, readings, states = {}, {}, None
    for name, case in plan.ceilings.items():
        truth = truths[case.frames] = examiner.truth(index, case.frames)
        read = readings[case.frames] = [judge.read(pixels) for pixels in truth.pixels]
        found.true[case.frames] += [scores.features(p, r) for p, r in zip(truth.pixels, read, strict=True)]
        latents = examiner.encoded(truth.pixels)
        found.add(name, case, truth, read, Made(examiner.decoded(latents), []))
        if states is None:
            states = examiner.states(truth.captions)
        if losses and case.windows == 1:
            found.errors.append(examiner.errors(latents, states))
    for name, case in plan.cases.items():
        truth = truths[case.frames]
        found.add(name, case, truth, readings[case.frames], examiner.made(case, truth, states))


def _reference(examiner: Examiner, frames: int, plan: Plan) -> list[np.ndarray]:
    """Features of as many other true clips."""
    found = []
    for index in batches(plan.clips, plan.batch, after=plan.clips):
        pixels = examiner.truth(index, frames).pixels
        found += [scores.features(each, judge.read(each)) for each in pixels]
    return found
