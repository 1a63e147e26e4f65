"""What `bench` measures of ours: the programs that users run, compiled before anything is allocated."""

import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from fvdm_jax import costs, lora, samplers, sampling, schedule, sharding, trainer
from fvdm_jax.checkpoint import Networks
from fvdm_jax.config import Training
from fvdm_jax.guidance import Generation
from fvdm_jax.kernels.parallel import Attending
from fvdm_jax.levels import constant, per_frame
from fvdm_jax.models import dit, streaming, text, vae
from fvdm_jax.optimisers import Optimiser
from fvdm_jax.process import flow


class Subject(NamedTuple):
    """Networks, and the sizes of what goes through them.

    `clip`: (f, h, w) of latents · `text`: tokens of a prompt · `batch`: clips at once, sampling apart, which
    has one · `attention`: a name of `attention.IMPLEMENTATIONS` · `remat`: of `layers.REMAT`.
    """

    networks: Networks
    clip: tuple[int, int, int]
    text: int = 512
    batch: int = 1
    attention: str = "auto"
    remat: str = "none"

    @property
    def latents(self) -> tuple[int, ...]:
        """The shape of a batch of what the transformer takes."""
        return self.batch, *self.clip, self.networks.dit.channels_in

    @property
    def states(self) -> tuple[int, ...]:
        """The shape of a batch of prompts as the transformer takes them."""
        return self.batch, self.text, self.networks.dit.text_width

    @property
    def video(self) -> tuple[int, ...]:
        """The shape of a batch of clips in pixels."""
        config, (f, h, w) = self.networks.vae, self.clip
        return self.batch, 1 + (f - 1) * config.stride, h * config.spatial, w * config.spatial, 3

    @property
    def coded(self) -> tuple[int, ...]:
        """The shape of a batch of what the VAE makes of it."""
        return self.batch, *self.clip, self.networks.vae.latent


class Prepared(NamedTuple):
    """A compiled program: the `seconds` that took, bytes `held` from run to run and `taken` while it runs.

    `begin` allocates, and gives the function that does the work once and waits for its end.
    """

    seconds: float
    held: float
    taken: float
    begin: Callable[[], Callable[[], object]]


class Workload(NamedTuple):
    """Something to measure: how many operations it is, and how it is prepared."""

    operations: Callable[[Subject], float]
    prepare: Callable[[Subject], Prepared]


def drawn(shapes):
    """Arrays of these shapes and types: normal, divided by the root of what goes into each output."""
    leaves, tree = jax.tree.flatten(shapes)
    # The generator that is fast to compile and to run; nobody needs these numbers twice.
    keys = jax.random.split(jax.random.key(0, impl="rbg"), len(leaves))
    return tree.unflatten([_drawn(key, leaf) for key, leaf in zip(keys, leaves, strict=True)])


def _drawn(key: jax.Array, leaf) -> jax.Array:
    fan_in = leaf.shape[-2] if len(leaf.shape) > 1 else 1
    return (jax.random.normal(key, leaf.shape) * fan_in**-0.5).astype(leaf.dtype)


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _stored(abstract: dict, kind: Callable[[str, jax.ShapeDtypeStruct], object]) -> dict:
    """Shapes of the type that `kind(path, leaf)` says, without names."""
    leaves = flatten_dict(nn.meta.unbox(abstract), sep="/")
    typed = {path: jax.ShapeDtypeStruct(leaf.shape, kind(path, leaf)) for path, leaf in leaves.items()}
    return unflatten_dict(typed, sep="/")


def _one() -> jax.sharding.Mesh:
    return sharding.mesh(devices=jax.devices()[:1])


def _compiled(lower: Callable[[], jax.stages.Lowered], inputs: Callable[[], tuple]) -> Prepared:
    """The program that is lowered, which leaves its inputs as they are."""
    began = time.perf_counter()
    with jax.set_mesh(_one()):
        program = lower().compile()
    seconds, sizes = time.perf_counter() - began, program.memory_analysis()

    def begin() -> Callable[[], object]:
        given = jax.device_put(inputs(), jax.devices()[0])
        return lambda: jax.block_until_ready(program(*given))

    taken = sizes.temp_size_in_bytes + sizes.output_size_in_bytes
    return Prepared(seconds, sizes.argument_size_in_bytes, taken, begin)


def _forward(case: Subject) -> Prepared:
    """The transformer's answer to noisy latents with a level for every frame."""
    network = lora.Network(case.networks.dit, attending=Attending(case.attention))
    weights = _stored(dit.abstract(network.config), partial(dit.stored, network.config.dtype))
    shapes = {"dit": weights}, _float32(*case.latents), _float32(*case.latents[:2]), _float32(*case.states)
    options = dit.options(network.config, jax.default_backend())
    forward = jax.jit(network.velocity, compiler_options=options)
    return _compiled(lambda: forward.lower(*shapes), lambda: drawn(shapes))


def _sample(case: Subject) -> Prepared:
    """A step of sampling, with guidance: `sample`'s program."""
    network = lora.Network(case.networks.dit, attending=Attending(case.attention))
    generation = Generation(network, flow, samplers.SAMPLERS["unipc"])
    weights = _stored(dit.abstract(network.config), partial(dit.stored, network.config.dtype))

    def inputs() -> tuple:
        params, clip, states = drawn(
            ({"dit": weights}, _float32(1, *case.latents[1:]), _float32(1, *case.states[1:]))
        )
        rows = jnp.repeat(schedule.sigmas(1)[:, None], case.clip[0], axis=1)
        made = sampling.programs(generation, _one())
        with jax.set_mesh(_one()):
            prompt, carry = made.told(params, (states, states)), made.begin(clip, clip, rows)
        return params, prompt, jnp.float32(5.0), carry, rows

    return _compiled(lambda: sampling.lower(generation, _one(), case.clip, case.text)[1], inputs)


def _train(case: Subject) -> Prepared:
    """A step of training all parameters, kept as float32, with AdamW: `train`'s program."""
    settings = Training(
        dit=case.networks.dit,
        fresh=True,
        curriculum=constant(per_frame),
        dropout=0.0,
        batch=case.batch,
        optimizer=Optimiser(decay_all=True),
        remat=case.remat,
        attention=case.attention,
    )
    made = trainer.build(settings, case.networks.dit, jax.devices()[:1])
    began = time.perf_counter()
    program = made.lower(case.clip, case.text).compile()
    seconds, sizes = time.perf_counter() - began, program.memory_analysis()

    def begin() -> Callable[[], object]:
        state = made.start()
        latents, states = drawn((_float32(*case.latents), _float32(*case.states)))
        number = itertools.count()

        def step() -> object:
            nonlocal state
            batch = made.batch(latents, states, states[0], next(number))
            state, told = program(state, {}, batch)
            return jax.block_until_ready((state.step, told))

        return step

    return Prepared(seconds, sizes.argument_size_in_bytes, sizes.temp_size_in_bytes, begin)


def _vae(method: str, case: Subject) -> Prepared:
    """A clip through the VAE, piece by piece, as `sample` and `precompute` have it."""
    config, shape = case.networks.vae, case.video if method == "encode" else case.coded
    params = drawn(_stored(vae.abstract(config), lambda path, leaf: leaf.dtype))
    began = time.perf_counter()
    stream = streaming.Stream(config, method, params, jnp.zeros((shape[0], 1, *shape[2:])))
    taken = stream.bytes
    seconds = time.perf_counter() - began
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))

    def begin() -> Callable[[], object]:
        clip = drawn(_float32(*shape))
        return lambda: jax.block_until_ready(list(stream(clip)))

    return Prepared(seconds, held, taken, begin)


def _vae_operations(method: str, case: Subject) -> float:
    """As XLA counts them in the whole clip at once, before it changes anything."""
    config, shape = case.networks.vae, case.video if method == "encode" else case.coded
    run = jax.jit(partial(vae.VAE(config).apply, method=method))
    params = _stored(vae.abstract(config), lambda path, leaf: leaf.dtype)
    return run.lower({"params": params}, _float32(*shape)).cost_analysis()["flops"]


def _text(case: Subject) -> Prepared:
    """The states of a batch of prompts, each of all its tokens."""
    config, shape = case.networks.text, (case.batch, case.text)
    weights = _stored(text.abstract(config), lambda path, leaf: config.dtype)
    tokens = jnp.broadcast_to(jnp.arange(case.text) % config.vocabulary, shape)
    shapes = {"params": weights}, tokens, jnp.ones(shape, bool)
    lower = partial(jax.jit(text.TextEncoder(config).apply).lower, *shapes)
    return _compiled(lower, lambda: (drawn(shapes[0]), *shapes[1:]))


def _text_operations(case: Subject) -> float:
    c, count = case.networks.text, case.text
    inner = c.heads * c.head_width
    products = 2 * c.width * (4 * inner + 3 * c.ffn)
    return float(case.batch * c.layers * count * (products + 4 * count * inner))


def _transformed(count: Callable[..., float], clips: Callable[[Subject], int], case: Subject) -> float:
    return clips(case) * count(case.networks.dit, case.clip, case.text)


WORKS = {
    "dit": Workload(partial(_transformed, costs.forward, lambda case: case.batch), _forward),
    "sample": Workload(partial(_transformed, costs.forward, lambda case: 2), _sample),
    "train": Workload(partial(_transformed, costs.training, lambda case: case.batch), _train),
    "vae-encode": Workload(partial(_vae_operations, "encode"), partial(_vae, "encode")),
    "vae-decode": Workload(partial(_vae_operations, "decode"), partial(_vae, "decode")),
    "text": Workload(_text_operations, _text),
}
"""What can be measured, by name."""
