"""What others have published: seconds of a training step or of sampling a clip, and their share of the peak.

Times are the systems' own; shares are those times by our count of operations (`costs`). Wan 2.1 or 2.2, 81
frames, bfloat16; sampling is denoising with guidance, of a whole clip.
"""

import math
from typing import NamedTuple

from fvdm_jax.chips import CHIPS

P720, P480 = 75_600, 32_760
"""Tokens of 81 frames at 720x1280 and 480x832."""


class Published(NamedTuple):
    """One measurement: `width` of the network, on so many chips; `share` of the peak, 0 … 1."""

    task: str
    width: int
    tokens: int
    chip: str
    chips: int
    seconds: float
    share: float
    what: str

    def __str__(self) -> str:
        return f"{self.what}: {self.seconds:g} s on {self.chips} {self.chip}, {self.share:.1%} of the peak"


_MAX, _WAN, _LIGHT = "AI-Hypercomputer/maxdiffusion", "Wan-Video/Wan", "ModelTC/LightX2V"
_B14, _B1 = 5120, 1536
TABLE = (
    Published("train", _B14, P720, "v5p", 4, 36.01, 0.296, f"{_MAX} README, 14B full, 720p, 1 clip"),
    Published("train", _B14, P720, "v5p", 4, 32.78, 0.325, f"{_MAX} #273, 14B full, 720p, with offload"),
    Published("train", _B14, P720, "v7x", 64, 13.57, 0.313, f"{_MAX} #487, A14B full, 720p"),
    Published(
        "train", _B14, 37_440, "h100", 128, 19.0, 0.329, "NVIDIA DFM, 14B full, 37,440 tokens, a sample"
    ),
    Published("train", _B14, P480, "h200", 1, 9.9, 0.43, "Stable-Video-Infinity #49, 14B LoRA, about 480p"),
    Published("train", _B14, P480, "a100", 1, 40.0, 0.34, "DiffSynth-Studio #658, 14B LoRA, 480p (A800)"),
    Published("train", _B1, P480, "a100", 1, 8.3, 0.30, "DiffSynth-Studio #435, 1.3B LoRA, 480p"),
    Published("sample", _B14, P720, "v6e", 8, 251.5, 0.283, f"{_MAX} #376, A14B, 720p, 40 steps"),
    Published("sample", _B14, P720, "v7x", 4, 105.3, 0.537, f"{_MAX} 8dd63054, A14B, 720p, 40 steps"),
    Published("sample", _B14, P720, "v7x", 8, 127.1, 0.278, f"{_MAX} README, 14B, 720p, 50 steps"),
    Published("sample", _B14, P720, "h100", 8, 155.1, 0.425, f"{_WAN}2.2, A14B, 720p, 40 steps"),
    Published("sample", _B14, P720, "h100", 1, 1041.5, 0.507, f"{_WAN}2.2, A14B, 720p, 40 steps"),
    Published("sample", _B14, P480, "h100", 8, 51.5, 0.33, f"{_WAN}2.2, A14B, 480p, 40 steps"),
    Published("sample", _B14, P720, "a100", 8, 469.9, 0.556, f"{_WAN}2.1, 14B, 720p, 50 steps"),
    Published(
        "sample", _B14, P720, "h200", 1, 751.0, 0.70, f"{_LIGHT}, 14B I2V, 720p, 40 steps, int8 scores"
    ),
    Published(
        "sample", _B14, P480, "h200", 1, 216.0, 0.63, f"{_LIGHT}, 14B I2V, 480p, 40 steps, int8 scores"
    ),
    Published("sample", _B1, P480, "h200", 1, 95.2, 0.30, "FastVideo, 1.3B, 480p, 50 steps"),
    Published("sample", _B1, P480, "a100", 1, 198.1, 0.48, "FastVideo, 1.3B, 480p, 50 steps, compiled"),
    Published("sample", _B1, P480, "4090", 1, 261.4, 0.655, f"{_WAN}2.1, 1.3B, 480p, 50 steps"),
)


def nearest(task: str, width: int, tokens: int, chip: str) -> Published | None:
    """The measurement of a task that is nearest: of this chip, else of its maker's; then by size."""

    def distance(row: Published) -> tuple:
        maker = bool(CHIPS[row.chip].axes) != bool(CHIPS[chip].axes)
        sizes = abs(math.log(row.width / width)) + abs(math.log(row.tokens / tokens))
        return maker, row.chip != chip, sizes

    return min((row for row in TABLE if row.task == task), key=distance, default=None)
