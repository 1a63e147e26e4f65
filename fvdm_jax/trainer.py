"""From settings to a compiled training step over a mesh: shapes first, then where they lie, then arrays."""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from fvdm_jax import checkpoint, costs, held_out, lora, sharding, training
from fvdm_jax.config import Training
from fvdm_jax.kernels.parallel import Attending
from fvdm_jax.models import dit
from fvdm_jax.process import PROCESSES
from fvdm_jax.program import Refusal
from fvdm_jax.shapes import Latents
from fvdm_jax.training import Batch, Objective, Recipe, TrainState
from fvdm_jax.weights import WEIGHTS, together


class Trainer(NamedTuple):
    """A run's functions, and where its arrays lie.

    `state` and `frozen` are trees of shapes with shardings: of the TrainState, and of the parameters that
    stand still beside adapters ({} where all are trained). `program`, of which `step` is a call, is compiled
    once; `errors(params, frozen, batch)` has the error for each of `held_out.FAMILIES`.
    """

    settings: Training
    network: dit.DiTConfig
    over: Mesh
    recipe: Recipe
    state: TrainState
    frozen: dict
    program: Callable
    errors: Callable

    def step(self, state: TrainState, frozen: dict, batch: Batch) -> tuple[TrainState, dict]:
        """The state after an update, as `training.train_step`; it takes over the memory of the one before."""
        return within(self.over, self.program, state, frozen, batch)

    def check(self, sizes: Iterable[tuple[int, int, int]]) -> None:
        """Raises Refusal where clips of one of these sizes do not fit, or attention is not to be had."""
        for clip in sizes:
            try:
                self.sampled.attention(self.over, clip)
            except ValueError as wrong:
                raise Refusal("--mesh, --attention, --exchange", f"clips of {clip}: {wrong}") from wrong

    def lower(self, clip: tuple[int, int, int], text: int) -> jax.stages.Lowered:
        """The step's program for clips of (f, h, w) in latents and prompts of `text` tokens.

        Nothing is allocated, and the devices of the mesh may be such as are only known by name.
        """
        c, b = self.network, self.settings.batch
        clips, whole = NamedSharding(self.over, sharding.CLIPS), sharding.replicated(self.over)
        shapes = (
            ((b, *clip, c.channels_out), clips),
            ((b, text, c.text_width), clips),
            ((text, c.text_width), whole),
        )
        number = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
        batch = Batch(
            *(jax.ShapeDtypeStruct(shape, jnp.float32, sharding=at) for shape, at in shapes), number
        )
        return within(self.over, self.program.lower, self.state, self.frozen, batch)

    def rows(self) -> tuple[int, int]:
        """(index, count): which block of a batch's rows this process is to give, of how many.

        Processes over which only context or tensor lie give the same ones. Raises Refusal, named --mesh,
        where a process's rows are not one block.
        """
        clips, batch = NamedSharding(self.over, sharding.CLIPS), self.settings.batch
        held = clips.addressable_devices_indices_map((batch,)).values()
        rows = {row for (at,) in held for row in range(*at.indices(batch))}
        first, size = min(rows), len(rows)
        if max(rows) - first + 1 != size or first % size or batch % size:
            what = f"{self.settings.mesh!r} gives this process rows that are not one block"
            raise Refusal("--mesh", what, "let context and tensor lie within a process")
        return first // size, batch // size

    def batch(
        self,
        latents: np.ndarray,
        text: np.ndarray,
        nothing: np.ndarray | jax.Array,
        number: int | None = None,
    ) -> Batch:
        """This process's rows of a batch over the mesh; `nothing` [l e] and the number are everyone's."""
        clips, count = NamedSharding(self.over, sharding.CLIPS), self.settings.batch

        def placed(rows: np.ndarray) -> jax.Array:
            return jax.make_array_from_process_local_data(clips, rows, (count, *rows.shape[1:]))

        whole = nothing if isinstance(nothing, jax.Array) else self.whole(nothing)
        number = None if number is None else self.whole(np.int32(number))
        return Batch(placed(latents), placed(text), whole, number)

    def whole(self, array: np.ndarray) -> jax.Array:
        """An array that every process has, on every device."""
        place = sharding.replicated(self.over)
        return jax.make_array_from_callback(array.shape, place, lambda at: array[at])

    def start(self, params: dict | None = None) -> TrainState:
        """The state before the first step, born in its place: of parameters as of `load`, or of none."""
        places = jax.tree.map(_place, self.state)
        make = partial(_start, self.settings, self.network, self.recipe.optimizer)
        return jax.jit(make, out_shardings=places, donate_argnums=0)(params)

    def load(self) -> tuple[dict, dict | None]:
        """What stands still, in its place, and the parameters that training starts from, if there are any.

        Of a model's folder every device gets its part, and no host the whole.
        """
        if self.settings.fresh:
            return self.invented(), None
        wanted = self.frozen if self.settings.rank else self.state.params
        tree = checkpoint.restore_onto(Path(self.settings.model), self.settings.part, wanted)
        return (tree, None) if self.settings.rank else ({}, tree)

    def invented(self) -> dict:
        """What stands still, drawn at random, where there is no model to load."""
        if not self.frozen:
            return {}
        draw = jax.jit(
            partial(_drawn, self.network, self.frozen), out_shardings=jax.tree.map(_place, self.frozen)
        )
        return draw(jax.random.key(self.settings.seed))

    def trained(self, state: TrainState) -> dict:
        """What is exported of a state: its running average if it has one, else its parameters."""
        if state.average is None:
            return state.params
        # It may wait in the host's memory.
        return jax.device_put(state.average, jax.tree.map(_place, self.state.params))

    def stored(self) -> dict:
        """The types in which the network's parameters are stored: as they are computed with."""
        shapes = sharding.placed(
            self.over, dit.abstract(self.network), partial(dit.stored, self.network.dtype)
        )
        return jax.tree.map(lambda leaf: leaf.dtype, shapes)

    def variables(self, params: dict, frozen: dict) -> dict:
        """What is trained, with what stands still, as `sampled` takes them."""
        return _variables(self.settings, frozen, params)

    @property
    def sampled(self) -> lora.Network:
        """The network as a sampler uses it."""
        return lora.Network(
            self.network, attending=Attending(self.settings.attention, self.settings.exchange)
        )


def build(settings: Training, network: dit.DiTConfig, devices: list | None = None) -> Trainer:
    """The trainer of a network of these sizes over `devices`, or all of them; nothing is allocated.

    Raises Refusal, named for the flag, where the mesh, the pattern of adapters or the batch does not fit.
    """
    over = _mesh(settings, jax.devices() if devices is None else devices)
    if network.channels_in != network.channels_out or network.image_width:
        what = "is of Wan's own image-to-video networks, which have inputs beside the noisy latents"
        raise Refusal("--model", what, "train a text-to-video network; it learns the other tasks")
    network = dataclasses.replace(network, dtype=settings.dtype or network.dtype)
    base = dit.abstract(network)
    trained, frozen = base, {}
    if settings.rank:
        try:
            trained, frozen = lora.abstract(base, settings.rank, settings.where), base
        except ValueError as wrong:
            raise Refusal("--where", str(wrong)) from wrong
    recipe = _recipe(settings)
    state = _state(settings, network, recipe.optimizer, over, trained)
    model = lora.Network(network, settings.remat, Attending(settings.attention, settings.exchange))
    apply = partial(_velocity, model, settings)
    step = jax.jit(
        partial(_step, apply, recipe, settings.optimizer),
        donate_argnums=0,
        out_shardings=(jax.tree.map(_place, state), sharding.replicated(over)),
        compiler_options=dit.options(network, over.devices.flat[0].platform),
    )
    at_once = settings.batch // settings.parts
    errors = jax.jit(partial(held_out.errors, apply, recipe.objective.process, at_once=at_once))
    return Trainer(
        settings,
        network,
        over,
        recipe,
        state,
        sharding.placed(over, frozen, partial(dit.stored, network.dtype)),
        step,
        partial(within, over, errors),
    )


def _mesh(settings: Training, devices: list) -> Mesh:
    try:
        over = sharding.mesh(**sharding.sizes(settings.mesh, len(devices)), devices=devices)
    except ValueError as wrong:
        raise Refusal("--mesh", str(wrong)) from wrong
    share = over.shape["data"] * over.shape["fsdp"]
    if settings.batch % (share * settings.parts):
        what = f"{settings.batch} clips in {settings.parts} parts do not divide among {share} devices"
        raise Refusal("--batch", what, f"give a multiple of {share * settings.parts}")
    return over


def _recipe(settings: Training) -> Recipe:
    process = PROCESSES[settings.process]
    weight = WEIGHTS[settings.weight](process)
    weight = together(weight) if settings.together else weight
    objective = Objective(process, settings.curriculum, weight, settings.dropout)
    rule = settings.optimizer
    if settings.masters != "float32":
        rule = dataclasses.replace(rule, moments=settings.masters)
    return Recipe(objective, rule.transformation(), settings.parts, settings.average, settings.skip > 0)


def within(over: Mesh, function: Callable, *inputs):
    """function(*inputs) with the mesh set, so that what is inside can say how it lies."""
    with jax.set_mesh(over):
        return function(*inputs)


def _step(apply, recipe: Recipe, optimizer, state: TrainState, frozen: dict, batch: Batch):
    """`training.train_step`, and the rate: on the host it would have to wait for the device."""
    state = state._replace(optimizer=_near(state.optimizer), average=_near(state.average))
    moved, told = training.train_step(state, batch, partial(apply, frozen), recipe)
    return moved, told | {"rate": optimizer.rate_at(state.step)}


def _variables(settings: Training, frozen: dict, params: dict) -> dict:
    if not settings.rank:
        return {"dit": params}
    return {"dit": frozen, "adapters": [(lora.scaled(params, settings.scale), 1.0)]}


def _velocity(model: lora.Network, settings: Training, frozen: dict, params: dict, *inputs) -> Latents:
    """What the network says of `inputs`: x, timestep, text."""
    return model.velocity(_variables(settings, frozen, params), *inputs)


def _start(settings: Training, network: dit.DiTConfig, tx, params: dict | None = None) -> TrainState:
    params_key, key = jax.random.split(jax.random.key(settings.seed))
    if params is None and settings.rank:
        params = lora.init(params_key, lora.abstract(dit.abstract(network), settings.rank, settings.where))
    elif params is None:
        params = _fresh(network, params_key)
    params = jax.tree.map(lambda leaf: leaf.astype(settings.masters), params)
    return training.init(params, tx, key, settings.average > 0)


def _fresh(network: dit.DiTConfig, key: jax.Array) -> dict:
    inputs = dit.example(network)
    return nn.meta.unbox(dit.DiT(network).init(key, *inputs)["params"])


def _state(settings: Training, network, tx, over: Mesh, trained: dict) -> TrainState:
    """The TrainState as shapes with shardings: moments and averages lie as what they are of."""
    params = sharding.placed(over, trained, lambda path, leaf: jnp.dtype(settings.masters))
    shapes = jax.eval_shape(lambda: _start(settings, network, tx))
    whole = sharding.replicated(over)
    places = jax.tree.map(_place, params)

    def like(leaf, place):
        # Where one rule has nothing to do with a parameter, its state has a mask instead of a moment.
        if isinstance(leaf, optax.MaskedNode):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    optimizer = optax.tree_map_params(
        tx,
        like,
        shapes.optimizer,
        places,
        transform_non_params=lambda leaf: like(leaf, whole),
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )
    step, key = like(shapes.step, whole), like(shapes.key, whole)
    average = None if shapes.average is None else params
    if settings.offload:
        optimizer, average = jax.tree.map(_away, (optimizer, average))
    return TrainState(step, params, optimizer, average, key)


def _near(tree):
    """What may lie in the host's memory, on the device."""
    return jax.tree.map(
        lambda leaf: jax.device_put(leaf, jax.memory.Space.Device) if leaf.ndim else leaf, tree
    )


def _away(leaf):
    if not leaf.shape:
        return leaf
    place = leaf.sharding.with_memory_kind("pinned_host")
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _drawn(network: dit.DiTConfig, wanted: dict, key: jax.Array) -> dict:
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), _fresh(network, key), wanted)


def _place(leaf) -> NamedSharding:
    return leaf.sharding


def plan(trainer: Trainer, clip: tuple[int, int, int], text: int) -> list[str]:
    """What a run of clips of (f, h, w) will take, as lines: parameters, bytes, tokens, operations."""
    settings, mib = trainer.settings, 2**20
    attention = trainer.sampled.attention(trainer.over, clip)
    trained = sum(leaf.size for leaf in jax.tree.leaves(trainer.state.params))
    still = sum(leaf.size for leaf in jax.tree.leaves(trainer.frozen))
    leaves = jax.tree.leaves((trainer.state, trainer.frozen))
    away = sum(bytes_of(leaf) for leaf in leaves if leaf.sharding.memory_kind == "pinned_host")
    held = sum(map(bytes_of, leaves)) - away
    gradients = sum(bytes_of(leaf) for leaf in jax.tree.leaves(trainer.state.params))
    flops = costs.training(trainer.network, clip, text, trained if settings.rank else 0) * settings.batch
    shape = ", ".join(f"{name} {size}" for name, size in trainer.over.shape.items())
    return [
        f"parameters   {trained:,} trained, {still:,} still",
        f"mesh         {trainer.over.size} × {trainer.over.devices.flat[0].device_kind}: {shape}",
        f"a device     {held / mib:,.0f} MiB held, {gradients / mib:,.0f} MiB of gradients, and activations"
        + (f"; {away / mib:,.0f} MiB in the host's memory" if away else ""),
        f"a clip       {clip[0]} × {clip[1]} × {clip[2]} latents, {costs.tokens(clip):,} tokens",
        f"attention    {attention}",
        f"a step       {settings.batch} clips in {settings.parts} parts, {flops:.3g} operations",
    ]


def bytes_of(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array on one device."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 8
    return int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
