"""Pusa's recipe with all 14,288,491,584 parameters of Wan2.1-T2V-14B trained, float32 masters.

    alias train="python -m fvdm_jax.train configs/pusa_wan21_14b_full.py --data clips --out pusa_full"
    train --mesh fsdp=16,context=4 --batch 16 --remat attention      # 64 chips of v5p
    train --batch 64 --export pusa_full_model      # in one process, with room for the weights in float32

Clips are made as for configs/pusa_wan21_14b_lora.py. Source: Pusa V1.0 (arXiv 2507.16116), table 5a, where
this is best at 600 steps and a little behind the LoRA.

What `python -m fvdm_jax.plan` says of that on v5p 4×4×4: 36.4 GB of 102.8 are set aside on a device, a step
takes 15.5 s at best. Not run at this size.
"""

from pusa_wan21_14b_lora import config as adapters

from fvdm_jax.config import Training


def config(model="wan21_14b", rate=1e-5, shift=5.0, **others) -> Training:
    return adapters(model, rate, shift, **{"rank": 0, "steps": 600} | others)
