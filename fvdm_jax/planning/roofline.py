"""How fast a step can be at most on a slice, and what its devices have to send each other at least."""

import dataclasses
import functools
import math
import re
from typing import NamedTuple

import flax.linen as nn
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from fvdm_jax import costs, lora, sharding
from fvdm_jax.chips import Chip, Slice
from fvdm_jax.kernels import parallel
from fvdm_jax.models import dit
from fvdm_jax.planning.collectives import Collective


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step is, by its sizes: of training, or `passes` passes of the network one after another.

    `clip` is (f, h, w) in latents, `batch` how many clips the network sees at once; `rank` and `where` are
    of adapters; `asked` is the exchange that is asked for, `masters` are bytes of a parameter that is
    trained; a batch is worked through in `parts`.
    """

    network: dit.DiTConfig
    clip: tuple[int, int, int]
    mesh: dict[str, int]
    batch: int = 1
    text: int = 512
    train: bool = True
    remat: str = "full"
    rank: int = 0
    where: str = lora.TARGETS
    masters: int = 4
    parts: int = 1
    passes: int = 1
    asked: str = "auto"

    @property
    def exchange(self) -> str:
        """How attention reaches the tokens of other devices, "" where there are none."""
        context, heads = self.mesh["context"], self.network.heads // self.mesh["tensor"]
        return parallel.exchange_for(heads, context, self.asked) if context > 1 else ""

    @property
    def base(self) -> dict:
        """The network's parameters, by path, as shapes with names."""
        return _base(self.network)

    @property
    def adapters(self) -> dict:
        """Those of the adapters."""
        return _adapters(self.network, self.rank, self.where) if self.rank else {}

    @property
    def formula(self) -> float:
        """Operations of the step by the formula."""
        args = self.network, self.clip, self.text
        once = costs.training(*args, count(self.adapters)) if self.train else costs.forward(*args)
        return once * self.batch * self.passes

    @property
    def again(self) -> tuple[float, float]:
        """Operations (products, attention) of what is computed twice to save memory."""
        if not self.train:
            return 0.0, 0.0
        args = self.network, self.clip, self.remat, self.text, count(self.adapters)
        products, attention = costs.again(*args)
        return products * self.batch, attention * self.batch

    @property
    def attended(self) -> float:
        """Operations of one pass of all clips in attention."""
        parts = costs.parts(self.network, self.clip, self.text)
        return (parts.among + parts.prompt) * self.batch


@functools.lru_cache
def _base(network: dit.DiTConfig) -> dict[str, nn.LogicallyPartitioned]:
    return flatten_dict(dit.abstract(network), sep="/")


@functools.lru_cache
def _adapters(network: dit.DiTConfig, rank: int, where: str) -> dict[str, nn.LogicallyPartitioned]:
    return flatten_dict(lora.abstract(dit.abstract(network), rank, where), sep="/")


def count(leaves: dict[str, nn.LogicallyPartitioned]) -> int:
    """How many numbers they hold."""
    return sum(leaf.value.size for leaf in leaves.values())


class Seconds(NamedTuple):
    """Of one step, if nothing is slower than the chip's peaks: products, attention, memory, interconnect."""

    products: float
    attention: float
    memory: float
    collectives: float

    @property
    def overlapped(self) -> float:
        """Where memory and interconnect work while the matrix unit does."""
        return max(self.products + self.attention, self.memory, self.collectives)

    @property
    def apart(self) -> float:
        """Where each waits for the other."""
        return sum(self)


def attention(step: Step, chip: Chip, split: bool = False) -> float:
    """Seconds of all devices together in attention, at the rate that the chip's matrix unit allows.

    A head narrower than the unit fills it in part where the head is summed over: in one of the two products
    forward, in two of the five backward. With `split` kernels, dq apart from dk and dv, those two are made
    twice. Source: MaxDiffusion, commit 8dd63054, by which heads of 128 reach 2/3 of a unit of 256.
    """
    narrow = max(1.0, chip.unit * step.network.heads / step.network.width)
    product = step.attended / 2
    forward, backward = narrow + 1, (4 * narrow + 3 if split else 2 * narrow + 3)
    units = step.passes * forward
    if step.train:
        units = forward + backward + forward * step.again[1] / step.attended
    return units * product / chip.peak


def inside(step: Step) -> float:
    """Operations of the step in attention, by the formula, with what is computed again."""
    return step.attended * (3 if step.train else step.passes) + step.again[1]


def products(step: Step) -> float:
    """Operations of the step outside of attention, by the formula, with what is computed again."""
    return step.formula + sum(step.again) - inside(step)


class Sent(NamedTuple):
    """Bytes that one device sends at least in a step: parameters, their gradients, tokens for attention, and
    what is summed up over tensor."""

    parameters: float
    gradients: float
    attention: float
    tensor: float


def lower_bound(step: Step) -> Sent:
    """What the layout requires.

    Parameters are gathered once in a pass, once more for the gradient, which is reduced once, in the types in
    which they are computed with. By "ulysses" each device sends its part of q, k, v and of what attention
    gives, backward of their gradients; what is not kept is sent again: all four, or with attention's output
    kept q, k and v. By a "ring" k and v go round, backward they and their gradients in float32; kept or not,
    once more with remat "full".
    """
    leaves = step.base | step.adapters
    gathered = sum(_uses(step, path) * _width(step, path) * _cut(step, leaf) for path, leaf in leaves.items())
    trained = step.adapters or step.base
    reduced = sum(_reduced(step, path, leaf) for path, leaf in trained.items()) if step.train else 0.0
    return Sent(gathered, reduced * step.parts, _exchanged(step), _summed(step))


_PROMPT = r"text_embedding/.*|image_embedding/.*|blocks/cross_attn/(norm_)?[kv](_img)?/.*"
"""What is used for a prompt, of which a sampler asks only once."""


def _uses(step: Step, path: str) -> int:
    """How often a parameter is needed whole."""
    if step.train:
        return 2 * step.parts
    return 1 if re.fullmatch(_PROMPT, path) else step.passes


_WIDE = r"time_.*|head/.*|.*(norm|modulation).*"
"""What is computed with in float32 whatever the network's type."""


def _width(step: Step, path: str) -> int:
    """Bytes of a number as it is computed with."""
    return 4 if re.fullmatch(_WIDE, path) else width(step)


def shards(step: Step, leaf: nn.LogicallyPartitioned) -> tuple[int, int]:
    """How many numbers of a parameter a device keeps, and with how many it computes."""
    over = AbstractMesh(tuple(step.mesh.values()), tuple(step.mesh))
    shape = leaf.value.shape

    def held(spec: PartitionSpec) -> int:
        return math.prod(NamedSharding(over, sharding.fitting(spec, shape, over)).shard_shape(shape))

    return held(sharding.kept(leaf.names)), held(sharding.used(leaf.names))


def _cut(step: Step, leaf: nn.LogicallyPartitioned) -> int:
    kept, used = shards(step, leaf)
    return used - kept


def _reduced(step: Step, path: str, leaf: nn.LogicallyPartitioned) -> float:
    kept, used = shards(step, leaf)
    copies = step.mesh["data"]
    return _width(step, path) * (used - kept + 2 * (copies - 1) / copies * kept)


def tokens(step: Step) -> float:
    """Bytes of a device's tokens at the network's width."""
    clips = step.batch / (step.mesh["data"] * step.mesh["fsdp"])
    here = clips * costs.tokens(step.clip) / step.mesh["context"]
    return here * step.network.width * width(step)


def width(step: Step) -> int:
    """Bytes of a number in the network's type."""
    return 2 if step.network.dtype == "bfloat16" else 4


def _exchanged(step: Step) -> float:
    context = step.mesh["context"]
    array = tokens(step) / step.mesh["tensor"]
    if step.exchange == "ulysses":
        rounds = {"none": 8, "full": 12}.get(step.remat, 11) if step.train else 4
        sent = rounds * array * (context - 1) / context
    else:
        wide = 4 / width(step)
        rounds = 2 + (2 + 2 * wide + (2 if step.remat == "full" else 0) if step.train else 0)
        sent = rounds * array * (context - 1)
    return sent * step.network.layers * step.passes


def _summed(step: Step) -> float:
    """Three sums of a layer forward, as many backward, and again what is not kept."""
    tensor = step.mesh["tensor"]
    rounds = {"none": 6}.get(step.remat, 9) if step.train else 3
    return rounds * 2 * (tensor - 1) / tensor * tokens(step) * step.network.layers * step.passes


def seconds(every: list[Collective], over: Slice, places: list[tuple[int, ...]]) -> float:
    """How long a program's collectives take on a slice, one after the other, at the rate of its links.

    `places` are the chips' coordinates in the torus, in the program's order.
    """
    return sum(each.wire / _rate(each, over, places) for each in every)


def _rate(each: Collective, over: Slice, places: list[tuple[int, ...]]) -> float:
    """Bytes a second that a device sends in this collective.

    Two links of an axis that the group closes to a ring, one of a part of it; of links that several groups
    have to share, their part. All-to-all sends across the group what others send to the neighbour.
    """
    chip = over.chip
    spans = [sorted(set(along)) for along in zip(*(places[i] for i in each.groups[0]), strict=True)]
    links, longest = 0.0, 1
    for span, side in zip(spans, (*over.shape, 1)[: len(spans)], strict=True):
        if len(span) > 1:
            stride = math.ceil((span[-1] - span[0]) / (len(span) - 1))
            closed = side % chip.closes == 0 and stride * len(span) == side
            links += (2 if closed else 1) / stride
            longest = max(longest, len(span))
    # Devices of one chip reach each other faster than by any link.
    links = links or 2 * chip.axes
    if each.kind == "collective-permute":
        links = min(links, 1.0)
    if each.kind == "all-to-all":
        links /= max(1.0, longest / 4)
    return links * chip.link / chip.devices
