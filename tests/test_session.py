"""From Python: `fvdm_jax.load`, and the session that it gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fvdm_jax
from fvdm_jax import commands, process, samplers, video
from fvdm_jax.program import Refusal
from fvdm_jax.progress import Stages
from fvdm_jax.request import Request
from fvdm_jax.studio import Studio

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(scope="module")
def session(model):
    return fvdm_jax.load(model)


def test_a_session_makes_what_the_program_makes(here, model, session):
    made = session.sample("a blue ring", keep={0: "a.png", "last": ("b.png", 0.3)}, steps=2, seed=3)
    flags = ["--keep", "0=a.png", "--keep", "last=b.png:0.3", "--steps", "2", "--seed", "3"]
    request = commands.parse(["--model", str(model), "--prompt", "a blue ring", *flags])
    assert made.request.keeps == request.keeps and made.request.strength == [0, 1, 0.3]
    assert np.array_equal(made.latents, Studio([request], Stages()).clip(request))
    assert made.pixels.shape == (9, 32, 48, 3) and made.pixels.dtype == np.uint8
    made.save("made.mp4")
    made.save("made.mp4")
    assert video.probe(here / "made.mp4").frames == 9


@pytest.mark.thorough
def test_weights_and_programs_stay(here, model, monkeypatch):
    from fvdm_jax import checkpoint
    from fvdm_jax import session as module

    loaded, built = [], []
    load, studio = checkpoint.load_transformer, module.Studio
    monkeypatch.setattr(checkpoint, "load_transformer", lambda *a: loaded.append(a) or load(*a))
    monkeypatch.setattr(module, "Studio", lambda *a: built.append(a) or studio(*a))
    session = fvdm_jax.load(model)
    first = session.sample("a red circle", steps=2)
    # Other prompts, seeds, schedules and keeps are data.
    session.sample("something else", steps=2, seed=1, schedule="pyramid:lag=1")
    session.sample("another", keep={0: "a.png"}, steps=2)
    assert len(built) == len(loaded) == 1
    assert np.array_equal(session.sample("a red circle", steps=2).latents, first.latents)
    # Another solver is another program.
    session.sample("a red circle", steps=2, solver="euler")
    assert len(built) == 2


def test_long_videos(session):
    made = session.sample("a red circle", steps=2, length=3)
    assert made.latents.shape[1] == made.request.total == 7 and len(made.pixels) == 25


def test_refusals_are_one_line(session):
    for settings, said in (
        ({"steps": 0}, "error: --steps: 0"),
        ({"keep": {0: "nowhere.png"}}, "error: --keep 0=nowhere.png"),
        ({"keep": {9: "nowhere.png"}}, "outside the video's 3 latent frames"),
        ({"prompts": "two.txt"}, "error: prompts: is of many videos"),
        ({"lora": (("folder", 1.0, "High"),)}, "error: --lora: 'High' is no expert"),
    ):
        with pytest.raises(Refusal, match=said):
            session.sample("a", **settings)
    with pytest.raises(Refusal, match="--model: nowhere"):
        fvdm_jax.load("nowhere")


def test_every_step_is_told_and_may_end_the_work(session):
    class Enough(Exception):
        pass

    request, seen = session.complete(Request(prompt="a red circle", steps=4)), []

    def look(step) -> None:
        seen.append((step.count, np.asarray(step.latents())))
        if step.count == 3:
            raise Enough

    with pytest.raises(Enough):
        session.make(request, look)
    assert [count for count, _ in seen] == [1, 2, 3] and all(np.isfinite(clean).all() for _, clean in seen)
    # It is ready for the next, which tells nobody.
    made = session.make(request)
    assert len(seen) == 3
    assert np.linalg.norm(seen[2][1] - made.latents) < np.linalg.norm(seen[0][1] - made.latents)


@pytest.mark.parametrize("kind", [process.flow, process.ddpm])
def test_a_step_heads_for_what_was_predicted(kind):
    """Exactly so for Euler; a kept frame is shown as it is, one that waits in noise as nothing."""
    keys = jax.random.split(jax.random.key(0), 2)
    clean, noise = (jax.random.normal(key, (1, 4, 2, 2, 3)) for key in keys)
    rows = jnp.array([[0.9, 0.5, 0.0, 1.0], [0.6, 0.0, 0.0, 1.0]])
    before = process.mix(kind, clean, noise, rows[:1])
    moved, _ = samplers.euler.step(kind, before, process.Prediction(clean, noise), rows[:1], rows[1:], ())
    after = jnp.where(process.expand((rows[1] < rows[0])[None], moved), moved, before)
    found = samplers.heading(kind, before, after, rows)
    assert jnp.allclose(found[:, :3], clean[:, :3], atol=1e-5)
    assert jnp.allclose(found[:, 3], kind.alpha(jnp.ones(())) * before[:, 3], atol=1e-6)
