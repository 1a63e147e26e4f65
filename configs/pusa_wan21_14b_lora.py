"""Pusa V1.0 (arXiv 2507.16116): a LoRA of rank 512 that gives Wan2.1-T2V-14B a level for every frame.

    python -m convert Wan2.1-T2V-14B/ wan21_14b
    python -m fvdm_jax.data.precompute PusaV1_training/ --model wan21_14b --size 720x1280 --out clips
    alias train="python -m fvdm_jax.train configs/pusa_wan21_14b_lora.py --data clips --mesh fsdp=8"
    train --out pusa
    train --out pusa --export lora
    python -m fvdm_jax.sample --model wan21_14b --lora lora:1.4 --keep 0=photo.jpg --prompt "…"

As published: rank 512 on the ten matrices of a block (2,453,667,840 parameters), fully random levels, shift
5, AdamW at 1e-5 with decay 0.01 on everything, 8 clips of 81 frames at 720x1280 a step, 900 steps; captions
are never dropped, gradients not clipped, nothing averaged. The weights of the loss are here per frame;
`--together` gives each clip their mean, as Pusa's trainer does. Not copied: its levels of a grid, rounded to
bfloat16 (`levels.pusa_grid`), and its bfloat16 noise.

What `--plan` says with `--mesh fsdp=8`: 6,990 MiB a device held, 1,170 MiB of gradients, 1.51e17 operations a
step; activations come on top. Not run at this size; the paper's run had 8 GPUs of 80 GB.
"""

from fvdm_jax.config import Training
from fvdm_jax.levels import constant, per_frame, shifted
from fvdm_jax.models.dit import SIZES
from fvdm_jax.optimisers import Optimiser


def config(model="wan21_14b", rate=1e-5, shift=5.0, **others) -> Training:
    published = {
        "dit": SIZES["wan_14b"],
        "clip": "21x90x160",
        "curriculum": constant(shifted(per_frame, shift)),
        "weight": "bump",
        "dropout": 0.0,
        "rank": 512,
        "optimizer": Optimiser("adamw", rate, decay=0.01, decay_all=True),
        "steps": 900,
        "batch": 8,
        "remat": "full",
    }
    return Training(model=model, **published | others)
