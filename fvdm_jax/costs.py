"""What a network costs: operations of a pass and of a training step, and what devices can do at most."""

from typing import NamedTuple

from fvdm_jax import chips
from fvdm_jax.models.dit import FREQUENCIES, PATCH, DiTConfig


def peak(kind: str) -> float | None:
    """Operations a second at most of a device of this kind, as jax names it; None where it is not known."""
    chip = chips.named(kind)
    return chip.peak / chip.devices if chip else None


def tokens(shape: tuple[int, int, int]) -> int:
    """Tokens of a clip of (f, h, w) in latent frames and pixels."""
    return shape[0] * (shape[1] // PATCH) * (shape[2] // PATCH)


class Parts(NamedTuple):
    """Operations of one clip's forward pass: products with parameters in the layers and beside them,
    attention of the tokens among themselves, and to the prompt."""

    layers: float
    ends: float
    among: float
    prompt: float


def parts(config: DiTConfig, shape: tuple[int, int, int], text: int = 512) -> Parts:
    """The operations of one clip's forward pass, by what they are for."""
    count, width, frames = tokens(shape), config.width, shape[0]
    others = text + (257 if config.image_width else 0)
    layer = count * (12 * width**2 + 4 * width * config.ffn) + others * 4 * width**2
    ends = 2 * PATCH**2 * (config.channels_in + config.channels_out) * count * width
    embedded = 2 * text * (config.text_width * width + width**2)
    timed = 2 * frames * (FREQUENCIES * width + 7 * width**2)
    among, prompt = 4.0 * count**2 * width, 4.0 * count * others * width
    return Parts(
        float(config.layers * layer),
        float(ends + embedded + timed),
        config.layers * among,
        config.layers * prompt,
    )


def forward(config: DiTConfig, shape: tuple[int, int, int], text: int = 512) -> float:
    """Operations of one clip's forward pass, a multiplication and an addition counted as two."""
    return sum(parts(config, shape, text))


def training(config: DiTConfig, shape: tuple[int, int, int], text: int = 512, adapters: int = 0) -> float:
    """Operations of one clip's training step, without what is computed again to save memory.

    All parameters: three times the forward pass. With `adapters`, the number of their parameters, matrices
    that stand still need no gradient: twice the products, three times the attention, and the adapters' own.
    """
    layers, ends, among, prompt = parts(config, shape, text)
    if not adapters:
        return 3 * (layers + ends + among + prompt)
    return 2 * (layers + ends) + 3 * (among + prompt) + 6.0 * adapters * tokens(shape)


def again(
    config: DiTConfig, shape: tuple[int, int, int], remat: str, text: int = 512, adapters: int = 0
) -> tuple[float, float]:
    """Operations (products, attention) of a clip that a training step computes twice, by a name of REMAT."""
    layers, _, among, prompt = parts(config, shape, text)
    if remat == "none":
        return 0.0, 0.0
    return layers + 2.0 * adapters * tokens(shape), prompt + (among if remat == "full" else 0.0)
