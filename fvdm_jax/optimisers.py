"""Optimisers by name: AdamW and Muon of optax, with the rate's schedule, clipping and what is decayed."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from optax import contrib

NAMES = ("adamw", "muon")
MATRICES = ("kernel", "a", "b")
"""Names of the parameters whose last two axes are a matrix, in a network and in its adapters."""

OUTER = ("patch_embedding", "head")
"""The first and the last layer, whose kernels Muon leaves to AdamW."""

SCHEDULES: dict[str, Callable[[float, int], optax.Schedule]] = {
    "constant": lambda rate, steps: optax.constant_schedule(rate),
    "cosine": lambda rate, steps: optax.cosine_decay_schedule(rate, steps),
    "linear": lambda rate, steps: optax.linear_schedule(rate, 0.0, steps),
    "trapezoid": lambda rate, steps: optax.linear_schedule(
        rate, 0.0, max(1, steps // 3), steps - max(1, steps // 3)
    ),
}
"""The rate after the warm-up by name: functions (rate, steps left) → schedule. All but the first end at 0."""


@dataclass(frozen=True)
class Optimiser:
    """The settings of an optimiser; by default Pusa's, but for `decay_all`.

    `steps` are all of a run, and a constant schedule needs none; in the first `warmup` of them the rate rises
    evenly. "trapezoid" falls in the last third of what follows the warm-up. A share rate·`decay` of each
    matrix (kernels, a and b of adapters) is taken off at a step, with `decay_all` of every parameter, as in
    torch. `clip` is the largest global norm of the gradients, 0 for none. `betas` are AdamW's, with Muon too.
    `moments` is the type in which they are kept; they are computed in float32.
    Raises ValueError for a setting that makes no sense.
    """

    name: str = "adamw"
    rate: float = 1e-5
    warmup: int = 0
    steps: int = 0
    schedule: str = "constant"
    decay: float = 0.01
    decay_all: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 0.0
    moments: str = "float32"

    def __post_init__(self):
        _one_of("name", self.name, NAMES)
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("moments", self.moments, ("float32", "bfloat16"))
        if not 0 < self.rate < math.inf:
            raise ValueError(f"rate is {self.rate}; give a positive number, such as 1e-5")
        if self.warmup < 0 or self.steps < 0:
            raise ValueError(f"warmup is {self.warmup} and steps {self.steps}; neither can be negative")
        if self.schedule != "constant" and self.steps <= self.warmup:
            wanted = f"more steps than the {self.warmup} of the warm-up"
            raise ValueError(f"steps is {self.steps}; schedule {self.schedule!r} takes {wanted}")
        for name, value in (("decay", self.decay), ("clip", self.clip)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; give a number from 0 (none)")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}; give two numbers from 0 to below 1")

    def rate_at(self, step: int | Int[Array, ""]) -> Float[Array, ""]:
        """The rate of the update that is made at this step, the first being 0; float32."""
        plan = SCHEDULES[self.schedule](self.rate, self.steps - self.warmup)
        if self.warmup:
            # The first step is not wasted on a rate of 0.
            rise = optax.linear_schedule(self.rate / (self.warmup + 1), self.rate, self.warmup)
            plan = optax.join_schedules([rise, plan], [self.warmup])
        return jnp.asarray(plan(step), jnp.float32)

    def transformation(self) -> optax.GradientTransformation:
        """What optax is given; its updates are float32, whatever the parameters and `moments` are.

        A moment lies in the state under the path of its parameter and has the parameter's shape. Of adapters
        only a and b are parameters: their scale and rank must not be among what is passed.
        """
        adam = optax.scale_by_adam(*self.betas, eps=1e-8)
        muon = optax.chain(contrib.scale_by_muon(weight_dimension_numbers=_dimensions), _evened())
        rule = optax.partition({"adamw": adam, "muon": muon}, _rules) if self.name == "muon" else adam
        return _in_float32(
            optax.chain(
                optax.clip_by_global_norm(self.clip) if self.clip else optax.identity(),
                rule,
                optax.add_decayed_weights(self.decay, None if self.decay_all else _matrices),
                optax.scale_by_learning_rate(self.rate_at),
            ),
            self.moments,
        )


def _one_of(what: str, given: str, known) -> None:
    if given not in known:
        raise ValueError(f"{what} is {given!r}; give one of {', '.join(known)}")


def _by_name(rule: Callable[[list[str]], object], params):
    def of(path, leaf):
        return rule(jax.tree_util.keystr(path, simple=True, separator="/").split("/"))

    return jax.tree_util.tree_map_with_path(of, params)


def _matrices(params):
    # By name, since in a stack of layers a bias has two axes as well.
    return _by_name(lambda names: names[-1] in MATRICES, params)


def _rules(params):
    def rule(names: list[str]) -> str:
        inner = names[-1] in MATRICES and not (names[-1] == "kernel" and set(OUTER) & set(names))
        return "muon" if inner else "adamw"

    return _by_name(rule, params)


def _dimensions(params):
    """Every layer of a stack is a matrix of its own."""
    return jax.tree.map(lambda leaf: contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1), params)


def _evened() -> optax.GradientTransformation:
    """Muon's updates as large as AdamW's, so that one rate serves both (arXiv 2502.16982, eq. 4)."""

    def update(updates, params):
        return jax.tree.map(lambda u: 0.2 * math.sqrt(max(u.shape[-2:])) * u, updates)

    return optax.stateless(update)


def _in_float32(rule: optax.GradientTransformation, moments: str) -> optax.GradientTransformation:
    """`rule` computed in float32, and its state kept as `moments`."""

    def cast(dtype, tree):
        def one(leaf):
            return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

        return jax.tree.map(one, tree)

    wide, narrow = partial(cast, jnp.float32), partial(cast, jnp.dtype(moments))

    def update(updates, state, params=None):
        # Optax raises a float to the power of a count, which strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = rule.update(wide(updates), wide(state), wide(params))
            return updates, narrow(state)

    return optax.GradientTransformation(lambda params: narrow(rule.init(wide(params))), update)
