"""The world of the experiments is known exactly, what is measured tells right from wrong, and arms learn."""

import dataclasses
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "configs/experiments"
sys.path.insert(0, str(FOLDER))

import arms  # noqa: E402
import circle  # noqa: E402
import report  # noqa: E402

from fvdm_jax import program, trainer  # noqa: E402
from fvdm_jax.process import PROCESSES, Prediction, mix  # noqa: E402

pytestmark = pytest.mark.thorough

SHARED = {"arms", "circle", "report"}
EXPERIMENTS = [path for path in sorted(FOLDER.glob("*.py")) if path.stem not in SHARED]


def noised(process, level, seed=0):
    noise = jax.random.normal(jax.random.key(seed), circle.VIDEOS.shape)
    level = jnp.broadcast_to(jnp.asarray(level, jnp.float32), (64, circle.FRAMES))
    return mix(process, jnp.asarray(circle.VIDEOS), noise, level), noise, level


def perturbed(process, params, x, level):
    """The best denoiser, but for what it takes clips to be made of."""
    best = circle.bayes(process, params, x, level)
    return Prediction(1.1 * best.clean, best.noise)


@pytest.fixture(scope="module")
def best() -> circle.Measuring:
    return circle.measuring("flow", partial(circle.bayes, PROCESSES["flow"]))


def test_the_videos_are_64_and_apart():
    off = np.sqrt(np.mean(np.square(circle.VIDEOS[:, None] - circle.VIDEOS), (2, 3, 4, 5)))
    assert off.shape == (64, 64) and np.min(off + 9 * np.eye(64)) > 3 * circle.NEAR
    assert abs(circle.VIDEOS.mean()) < 1e-6 and abs(circle.VIDEOS.std() - 1) < 1e-6
    flat = circle.VIDEOS.reshape(64, circle.FRAMES, circle.PIXELS)
    at = (circle.STARTS[:, None] + circle.SPEED[:, None] * np.arange(circle.FRAMES)) % circle.PIXELS
    np.testing.assert_array_equal(flat.argmax(2), at)


@pytest.mark.parametrize("name", ["flow", "ddpm"])
def test_the_best_denoiser_knows_a_clip_that_is_almost_clean(name):
    process, best = PROCESSES[name], jax.jit(partial(circle.bayes, PROCESSES[name], {}))
    for level in (0.0, 0.001, 0.02, [0.0] + [1.0] * 3 + [0.01] * 4):
        x, noise, level = noised(process, level)
        said = best(x, level)
        np.testing.assert_allclose(said.clean, circle.VIDEOS, rtol=0, atol=1e-5)
        # Of a frame's noise ε its clean part tells with an error of α/σ times its own.
        noisy = np.asarray(level > 0.005)
        np.testing.assert_allclose(np.asarray(said.noise)[noisy], np.asarray(noise)[noisy], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["flow", "ddpm"])
def test_the_best_denoiser_is_the_mean_over_videos(name):
    """Against a sum in float64 of the posterior as it stands in a textbook."""
    process = PROCESSES[name]
    x, _, level = noised(process, np.linspace(0.7, 1, 8))
    alpha, sigma = (np.asarray(part(level[0]), np.float64) for part in (process.alpha, process.sigma))
    clips = circle.VIDEOS.reshape(64, 8, 16).astype(np.float64)
    off = np.asarray(x, np.float64).reshape(64, 1, 8, 16) - alpha[:, None] * clips
    weight = np.exp(-np.sum(off**2, 3) / 2 / sigma**2).prod(2)
    expected = np.einsum("bn,nfp->bfp", weight / weight.sum(1, keepdims=True), clips)
    assert np.ptp(weight / weight.sum(1, keepdims=True)) < 0.9
    said = circle.bayes(process, {}, x, level)
    np.testing.assert_allclose(np.asarray(said.clean).reshape(64, 8, 16), expected, rtol=0, atol=1e-4)


def test_only_the_best_denoiser_has_no_excess(best):
    wrong = circle.measuring("flow", partial(perturbed, PROCESSES["flow"]))
    for family in ("diagonal", "prefix 4"):
        probe = circle.probe("flow", family)
        assert float(best.excess({}, probe)[0]) < 1e-9
        assert float(wrong.excess({}, probe)[0]) > 1e-3
    assert probe.level.size == circle.DRAWS * circle.FRAMES
    assert np.all(probe.level[..., :4] == 0) and np.all(probe.level[..., 4:] >= 0.01)


def test_another_process_is_asked_at_the_same_ratio_of_noise_to_clean():
    level = np.array([0.0, 0.01, 0.3, 0.99], np.float32)
    other = circle._at(PROCESSES["ddpm"], level)
    alpha, sigma = PROCESSES["ddpm"].alpha(other), PROCESSES["ddpm"].sigma(other)
    # Interpolated on a grid of 20000 levels.
    np.testing.assert_allclose(sigma / (alpha + sigma), level, rtol=2e-3)
    np.testing.assert_array_equal(circle._at(PROCESSES["flow"], level), level)


def test_sampling_with_the_best_denoiser_is_right(best):
    made = {}
    for task in circle.TASKS:
        made |= circle.carried_out("flow", task, best, {})
    assert made["generation valid"] >= 0.99 and made["I2V right"] >= 0.95
    # 0.17 is what 256 draws of 64 give, 0.04 what they give of four speeds.
    assert made["generation variation"] < 0.25 and made["I2V variation"] < 0.1
    assert all(made[measure] >= 0.95 for measure in report.RIGHT)
    assert all(value == 1 for key, value in made.items() if key.endswith("kept"))


def test_what_is_wrong_is_told():
    truth = circle.VIDEOS[circle.TRUTH]
    late = np.roll(circle.TRUTH, 4 * len(circle.SPEEDS))
    assert circle.judged("extension", truth)["extension right"] == 1
    assert circle.judged("extension", circle.VIDEOS[late])["extension right"] == 0
    assert circle.judged("I2V", circle.VIDEOS[late])["I2V right"] == 0
    assert circle.judged("I2V", circle.VIDEOS[late])["I2V valid"] == 1
    noise = np.random.default_rng(0).standard_normal(truth.shape, np.float32)
    assert circle.judged("generation", truth + 0.2 * noise)["generation valid"] == 0
    near = circle.judged("extension", truth + 0.2 * noise)
    assert near["extension nearest"] == 1 and near["extension right"] == 0
    still = circle.judged("generation", np.repeat(truth[:, :1], circle.FRAMES, 1))
    assert still["generation frozen"] == 1 and still["generation valid"] == 0
    assert circle.judged("generation", truth)["generation frozen"] == 0
    assert circle.judged("generation", truth)["generation variation"] < 1e-6
    assert circle.judged("generation", truth[:4])["generation variation"] == pytest.approx(63 / 64)


@pytest.fixture(scope="module")
def learned(tmp_path_factory, best) -> tuple[Path, arms.Arm, list]:
    """An arm of 20 steps and adapters on it, with what the trainer told of each step."""
    losses: dict[int, list[float]] = {}
    step = trainer.Trainer.step

    def watched(made, *inputs):
        state, told = step(made, *inputs)
        losses.setdefault(made.settings.rank, []).append(float(told["loss"]))
        return state, told

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "step", watched)
        patch.setattr(circle, "FAMILIES", {"diagonal": circle.FAMILIES["diagonal"]})
        patch.setattr(arms, "measuring", lambda process: best)
        out, base = tmp_path_factory.mktemp("arms"), arms.Arm("ptss 0.5", 20)
        adapted = dataclasses.replace(base.tuned("random", 1.0, rank=2), steps=20)
        for arm in (base, adapted):
            arms.trained(arm, out)
    return out, adapted, list(losses.values())


def test_an_arm_learns_and_adapters_on_it_too(learned):
    out, adapted, (scratch, tuned) = learned
    assert len(scratch) == len(tuned) == 20
    assert np.mean(scratch[-5:]) < 0.9 * np.mean(scratch[:5])
    assert np.mean(tuned[-5:]) < np.mean(tuned[:5])
    params, told = arms.trained(adapted, out)
    moved = arms.drift(arms.trained(adapted.base, out)[0], params)
    assert moved["drift ffn"] > 1e-3 and moved["drift self_attn"] > 1e-3
    assert moved["drift head"] == moved["drift modulation"] == moved["drift time"] == 0
    assert told["curve"][-1]["step"] == 20 and np.isfinite(told["curve"][-1]["loss"])


def test_what_was_learned_is_read_back_bit_equal(learned, monkeypatch):
    out, adapted, _ = learned
    monkeypatch.setattr(arms, "_learned", None)
    once, again = (arms.trained(adapted.base, out)[0] for _ in range(2))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), once, again))
    names = {adapted.name, adapted.base.name, adapted.seeded(1).name}
    assert len(names) == 3 and {path.suffix for path in out.iterdir()} == {".json", ".safetensors"}
    with pytest.raises(TypeError):
        arms.trained(adapted.seeded(1), out)


def test_a_stronger_adapter_changes_more_and_is_the_same_file(learned):
    out, adapted, _ = learned
    base = arms.trained(adapted.base, out)[0]
    twice = dataclasses.replace(adapted, strength=2.0)
    one, two = (arms.drift(base, arms.trained(arm, out)[0])["drift ffn"] for arm in (adapted, twice))
    assert two == pytest.approx(2 * one, rel=1e-3)
    assert twice.name != adapted.name


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_says_what_it_expects(path):
    """Before it is run; and its command is its own."""
    module = __import__(path.stem)
    text = module.__doc__
    assert "\nHypothesis" in text and "\nThreshold" in text and "\nArms" in text and "\nCost" in text
    assert f"python configs/experiments/{path.stem}.py" in text
    chosen = module.EXPERIMENT.arms(4000)
    assert len({arm.name for arm in chosen.values()}) == len(chosen) > 1
    assert set(module.EXPERIMENT.curves) <= {*report.EXCESS, "I2V right", "own diagonal", "own first"}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_a_verdict_follows_from_numbers(path):
    """Where all arms are alike and all wrong, nothing that asks for a gain is met."""
    experiment = __import__(path.stem).EXPERIMENT
    every = {name: 0.5 for name in (*experiment.columns, "I2V speed", "I2V frozen", "extension nearest")}
    curve = [{"step": step} | {name: 1 / step for name in every} for step in (1, 2)]
    found = report.Found({label: [every | {"curve": curve}] * 2 for label in experiment.arms(4000)})
    lines = experiment.verdict(found)
    assert all(line.startswith(("met: ", "NOT MET: ")) for line in lines)
    assert any(line.startswith("NOT MET") for line in lines) or path.stem == "cost"
    assert len(report.table(found, experiment.columns).splitlines()) == len(found.results) + 2


def test_equal_quality_is_read_off_the_curve():
    from mixture import at_equal

    curve = [
        {"step": s, "excess diagonal": d, "excess ramp": d**2} for s, d in ((1, 0.4), (2, 0.2), (3, 0.1))
    ]
    found = report.Found({"a": [{"curve": curve}]})
    assert at_equal(found, "a", "excess ramp", 0.15) == pytest.approx(0.0225)


def test_no_picture_is_refused_in_a_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    experiment = __import__("ptss").EXPERIMENT
    code = program.run(partial(report.main, experiment), ["--out", str(tmp_path)])
    assert code == 2 and capsys.readouterr().err.startswith("error: matplotlib: is not installed")
    for flags, wrong in ((["--seeds", "0,0"], "--seeds"), (["--steps", "3"], "--steps")):
        assert program.run(partial(report.main, experiment), flags) == 2
        assert wrong in capsys.readouterr().err
