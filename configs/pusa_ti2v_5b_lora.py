"""Pusa's recipe for Wan2.2-TI2V-5B, which already knows a clean first frame, at 704x1280.

    python -m convert Wan2.2-TI2V-5B/ wan22_5b
    python -m fvdm_jax.data.precompute clips/ --model wan22_5b --frames 121 --size 704x1280 --out records
    python -m fvdm_jax.train configs/pusa_ti2v_5b_lora.py --data records --mesh fsdp=8 --out pusa_5b

What `--plan` says with `--mesh fsdp=8`: 2,145 MiB a device held, 308 MiB of gradients, 1.14e16 operations
a step; activations come on top. Not run at this size.
"""

from pusa_wan21_14b_lora import config as larger

from fvdm_jax.config import Training
from fvdm_jax.models.dit import SIZES


def config(model="wan22_5b", rate=1e-5, shift=5.0, **others) -> Training:
    own = {"dit": SIZES["wan_5b"], "clip": "31x44x80", "rank": 256}
    return larger(model, rate, shift, **own | others)
