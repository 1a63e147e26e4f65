"""What a network costs: operations of a pass and of a training step, and what devices can do at most."""

import re

from fvdm_jax.models.dit import FREQUENCIES, PATCH, DiTConfig

PEAKS = {
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12, "TPU v6e": 918e12,
    "TPU v7": 2307e12, "TPU7x": 1153e12, "A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12,
    "GB200": 2500e12, "GB300": 2500e12, "H20": 148e12, "4090": 165e12, "5090": 209.5e12,
}  # fmt: skip
"""Operations a second of a device, dense bfloat16, by what its kind contains; of TPU7x each of two cores."""


def peak(kind: str) -> float | None:
    """Operations a second at most of a device of this kind, as jax names it; None where it is not known."""
    fitting = [name for name in PEAKS if re.search(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![0-9])", kind)]
    return PEAKS[max(fitting, key=len)] if fitting else None


def tokens(shape: tuple[int, int, int]) -> int:
    """Tokens of a clip of (f, h, w) in latent frames and pixels."""
    return shape[0] * (shape[1] // PATCH) * (shape[2] // PATCH)


def _parts(config: DiTConfig, shape: tuple[int, int, int], text: int) -> tuple[float, float]:
    """Operations of one clip's forward pass in products with parameters, and in attention."""
    count, width, frames = tokens(shape), config.width, shape[0]
    others = text + (257 if config.image_width else 0)
    blocks = count * (12 * width**2 + 4 * width * config.ffn) + others * 4 * width**2
    attended = 4 * count**2 * width + 4 * count * others * width
    ends = 2 * PATCH**2 * (config.channels_in + config.channels_out) * count * width
    embedded = 2 * text * (config.text_width * width + width**2)
    timed = 2 * frames * (FREQUENCIES * width + 7 * width**2)
    return config.layers * blocks + ends + embedded + timed, float(config.layers * attended)


def forward(config: DiTConfig, shape: tuple[int, int, int], text: int = 512) -> float:
    """Operations of one clip's forward pass, a multiplication and an addition counted as two."""
    return sum(_parts(config, shape, text))


def training(config: DiTConfig, shape: tuple[int, int, int], text: int = 512, adapters: int = 0) -> float:
    """Operations of one clip's training step, without what is computed again to save memory.

    All parameters: three times the forward pass. With `adapters`, the number of their parameters, matrices
    that stand still need no gradient: twice the products, three times the attention, and the adapters' own.
    """
    products, attention = _parts(config, shape, text)
    if not adapters:
        return 3 * (products + attention)
    return 2 * products + 3 * attention + 6.0 * adapters * tokens(shape)
