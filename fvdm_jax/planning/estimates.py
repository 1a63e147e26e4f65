"""What a step takes by formulas alone, for chips whose compiler is not at hand."""

from fvdm_jax.chips import HOST, NETWORK, Slice
from fvdm_jax.planning import roofline
from fvdm_jax.planning.roofline import Sent, Step

_KEPT = {"full": 1, "attention": 2, "offload": 1, "none": 18}
"""Arrays of a layer's tokens, at the network's width, that wait for the gradient, by a name of REMAT."""

_TOUCHED = 40
"""Times that a layer reads or writes its tokens in a pass: norms, modulation, residuals, products."""


def _numbers(step: Step, leaves: dict) -> int:
    """How many numbers of these parameters a device keeps."""
    return sum(roofline.shards(step, leaf)[0] for leaf in leaves.values())


def held(step: Step, average: bool = False) -> float:
    """Bytes of parameters, two moments, gradients and running average on one device."""
    narrow = roofline.width(step)
    if not step.train:
        return float(narrow * _numbers(step, step.base))
    trained = _numbers(step, step.adapters or step.base)
    still = _numbers(step, step.base) if step.rank else 0
    return float(trained * step.masters * (4 + average) + narrow * still)


def activations(step: Step) -> float:
    """Bytes of tokens on one device: those kept for the gradient, and a layer at work."""
    array = roofline.tokens(step) / step.parts
    kept = _KEPT.get(step.remat, 2) * step.network.layers if step.train else 0
    work = 8 + 2 * step.network.ffn / step.network.width
    return array * (kept + work)


def traffic(step: Step) -> float:
    """Bytes that a device reads from its memory and writes to it in a step."""
    passes = 4 if step.train else step.passes
    parameters = sum(roofline.shards(step, leaf)[1] for leaf in step.base.values()) * roofline.width(step)
    activity = _TOUCHED * roofline.tokens(step) * step.network.layers
    return passes * (parameters + activity) + (2 * held(step) if step.train else 0)


def sending(sent: Sent, step: Step, over: Slice) -> float:
    """Seconds in which GPUs send these bytes: within a host through its switch, else by the network."""
    inner = step.mesh["context"] * step.mesh["tensor"]
    near, far = over.chip.link, min(over.chip.link, NETWORK)
    by = {
        "parameters": near if inner * step.mesh["fsdp"] <= HOST else far,
        "gradients": near if over.chips <= HOST else far,
        "attention": near if inner <= HOST else far,
        "tensor": near if inner <= HOST else far,
    }
    return sum(bytes_ / by[name] for name, bytes_ in sent._asdict().items())


def seconds(step: Step, over: Slice) -> roofline.Seconds:
    """The bound by the chips' peaks."""
    return roofline.Seconds(
        roofline.products(step) / over.chip.peak / over.chips,
        roofline.attention(step, over.chip) / over.chips,
        traffic(step) / over.chip.bandwidth,
        sending(roofline.lower_bound(step), step, over),
    )
