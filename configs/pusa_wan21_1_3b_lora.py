"""Pusa's recipe for Wan2.1-T2V-1.3B at 480x832: a LoRA of rank 128 for one GPU or a small slice.

    python -m convert Wan2.1-T2V-1.3B/ wan21_1_3b
    python -m fvdm_jax.data.precompute clips/ --model wan21_1_3b --out records
    python -m fvdm_jax.train configs/pusa_wan21_1_3b_lora.py --data records --out pusa_1_3b

The rate is larger than Pusa's, since ranks are fewer. What `--plan` says for one device: 4,761 MiB held,
668 MiB of gradients, 6.41e15 operations a step, a clip at a time; activations come on top. Not run at this
size.
"""

from pusa_wan21_14b_lora import config as larger

from fvdm_jax.config import Training
from fvdm_jax.models.dit import SIZES


def config(model="wan21_1_3b", rate=5e-5, shift=5.0, **others) -> Training:
    small = {"dit": SIZES["wan_1_3b"], "clip": "21x60x104", "rank": 128, "parts": 8}
    return larger(model, rate, shift, **small | others)
