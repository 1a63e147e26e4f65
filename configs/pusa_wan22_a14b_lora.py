"""Pusa's recipe for the two experts of Wan2.2-T2V-A14B, one run for each, both on the full range of levels.

    python -m convert Wan2.2-T2V-A14B/ wan22_a14b
    alias train="python -m fvdm_jax.train configs/pusa_wan22_a14b_lora.py --data clips --mesh fsdp=8"
    train --part dit_high --out pusa_high && train --part dit_low --out pusa_low

Clips are made as for configs/pusa_wan21_14b_lora.py: Wan2.2's A14B has Wan2.1's VAE. Pusa's author reports
that the full range for each works much better than its own part of it (Pusa-VidGen, issue 53). Memory and
operations are those of configs/pusa_wan21_14b_lora.py. Not run at this size.
"""

from pusa_wan21_14b_lora import config as one

from fvdm_jax.config import Training


def config(model="wan22_a14b", rate=1e-5, shift=5.0, **others) -> Training:
    return one(model, rate, shift, **{"part": "dit_high"} | others)
