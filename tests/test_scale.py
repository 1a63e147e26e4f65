"""Over a mesh, and with states that are kept smaller or elsewhere, the results are those of one device."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest
from test_training import PLAIN, far, trained

from fvdm_jax import lora, sampling, schedule, sharding, train, trainer
from fvdm_jax.data import feed
from fvdm_jax.guidance import Generation
from fvdm_jax.kernels.parallel import Attending
from fvdm_jax.models import dit
from fvdm_jax.process import flow
from fvdm_jax.program import Refusal
from fvdm_jax.samplers import SAMPLERS

SIZES = dit.DiTConfig(32, 64, 4, 2, 4, 4, text_width=16, dtype="float32")
CLIP = (3, 8, 8)


def clip(mesh: str, exchange: str = "auto", adapted: bool = False) -> np.ndarray:
    """A guided clip of three steps over a mesh, by `sample`'s programs."""
    over = sharding.mesh(**sharding.sizes(mesh, 8 if mesh else 1))
    network = lora.Network(SIZES, attending=Attending(exchange=exchange))
    generation = Generation(network, flow, SAMPLERS["unipc"])
    rng = np.random.default_rng(0)
    draw = lambda leaf: (rng.standard_normal(leaf.shape) * 0.2).astype(np.float32)  # noqa: E731
    params = {"dit": jax.tree.map(draw, nn.meta.unbox(dit.abstract(SIZES)))}
    if adapted:
        pairs = jax.tree.map(draw, nn.meta.unbox(lora.abstract(dit.abstract(SIZES), 8)))
        params["adapters"] = [(lora.scaled(pairs, 0.5), 1.0)]
    text, negative, noise = (
        rng.standard_normal(shape).astype(np.float32) for shape in [(1, 5, 16)] * 2 + [(1, *CLIP, 4)]
    )
    rows = schedule.schedule(schedule.sigmas(3, 3.0), np.ones(CLIP[0], np.float32))
    params = sampling.placed(over, params, SIZES)
    given = jax.device_put(((text, negative), 3.0, noise, rows), sharding.replicated(over))
    prompts, scale, noise, rows = given
    with jax.set_mesh(over):
        made = sampling.programs(generation, over)
        prompt, carry = made.told(params, prompts), made.begin(noise, noise, rows)
        for s in range(3):
            carry = made.advance(params, prompt, scale, carry, rows[s : s + 2])
        whole = jax.jit(generation.sample)(params, prompts, scale, noise, noise, rows)
    np.testing.assert_allclose(carry[0], whole, atol=1e-5)
    return np.asarray(carry[0])


@pytest.fixture(scope="module")
def alone() -> dict[bool, np.ndarray]:
    return {adapted: clip("", adapted=adapted) for adapted in (False, True)}


@pytest.mark.thorough
@pytest.mark.parametrize(
    "mesh, exchange, adapted",
    [
        ("data=2,context=4", "ulysses", False),
        ("fsdp=2,context=2,tensor=2", "auto", True),
        ("context=8", "ring", False),
        # Two clips do not divide among four: all of them do the same.
        ("fsdp=4,tensor=2", "auto", True),
    ],
)
def test_a_clip_over_a_mesh_is_that_of_one_device(alone, mesh, exchange, adapted):
    np.testing.assert_allclose(clip(mesh, exchange, adapted), alone[adapted], atol=1e-5)


@pytest.fixture(scope="module")
def plain() -> tuple:
    return trained(PLAIN, 3)


@pytest.mark.thorough
def test_masters_of_half_the_size_learn_the_same(plain):
    """In bfloat16, of 8 bits, a rate that is lost in rounding would show as a loss that stays."""
    state, losses = trained(dataclasses.replace(PLAIN, masters="bfloat16"), 3)
    kinds = {leaf.dtype for leaf in jax.tree.leaves((state.params, state.optimizer)) if leaf.ndim}
    assert kinds == {np.dtype("bfloat16")}
    np.testing.assert_allclose(losses, plain[1], rtol=0.02)
    with pytest.raises(Refusal, match="--average"):
        dataclasses.replace(PLAIN, masters="bfloat16", average=0.9)


@pytest.mark.thorough
def test_what_waits_in_the_hosts_memory_is_the_same(plain):
    away = dataclasses.replace(PLAIN, offload=True)
    kept = trainer.build(dataclasses.replace(away, average=0.9), PLAIN.dit, jax.devices()[:1])
    near = kept.trained(kept.start())
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(near)} == {"device"}
    made = trainer.build(away, PLAIN.dit, jax.devices()[:1])
    moved = [leaf for leaf in jax.tree.leaves(made.state.optimizer) if leaf.shape]
    assert moved and {leaf.sharding.memory_kind for leaf in moved} == {"pinned_host"}
    assert "in the host's memory" in "".join(trainer.plan(made, (3, 8, 4), 5))
    state, losses = trained(away, 3)
    assert losses == plain[1] and far(state.params, plain[0].params) == 0


@pytest.mark.thorough
def test_clips_of_two_sizes_are_trained_on(monkeypatch, tmp_path):
    """Each has a program of its own; the second is compiled when it first comes."""
    config = tmp_path / "config.py"
    config.write_text(
        "from fvdm_jax.config import Training\nfrom fvdm_jax.models.dit import DiTConfig\n"
        "def config(**others):\n"
        "    sizes = DiTConfig(32, 64, 2, 2, 4, 4, text_width=16, dtype='float32')\n"
        "    return Training(**{'model': 'nowhere', 'dit': sizes, 'text': 5, 'steps': 4, 'batch': 8,"
        " 'held_out': 0, 'evaluate_every': 0, 'mesh': 'data=4,context=2'} | others)\n"
    )
    one, other = (
        feed.invented(size, feed.Sizes(8, 4, 16, 5), 0, 0, (0, 1)) for size in [(3, 8, 4), (1, 4, 4)]
    )

    def mixed(start: int = 0, workers: int = 0):
        streams = one.stream(), other.stream()
        for step in range(start, 100):
            yield next(streams[step % 2])

    both = one._replace(stream=mixed, sizes=[(3, 8, 4), (1, 4, 4)])
    monkeypatch.setattr(train, "feeding", lambda asked, made: both)
    train.main([str(config), "--synthetic", "--out", str(tmp_path / "run")])
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) >= 4
    settings = dataclasses.replace(PLAIN, mesh="data=4,context=2")
    with pytest.raises(Refusal, match=r"clips of \(1, 2, 2\)"):
        trainer.build(settings, PLAIN.dit).check([(3, 8, 4), (1, 2, 2)])
