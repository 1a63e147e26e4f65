"""The training of FVDM (arXiv 2410.03160), from nothing: PTSS 0.2 and DDPM, at 256x256, by text or class.

    python -m fvdm_jax.data.precompute UCF-101/ --model wan21_1_3b --frames 13 --size 256x256 --out records
    python -m fvdm_jax.train configs/fvdm_scratch.py --data records --mesh fsdp=8 --out fvdm

As published: AdamW at 1e-4 without decay, an average of 0.9999, captions (there: classes) dropped for one
clip in ten, 500,000 steps; of each clip the coin is its own, where FVDM's code tosses one for a batch. The
paper's network is Latte-XL/2 (width 1152, 28 layers, 16 heads) on images' latents; this is a Wan transformer
of like size on a VAE that makes one latent frame of four, so 13 frames are 4 latent ones. A class is given as
a caption. Its learned variance is left out: DDIM does not use it.

What `--plan` says for one device: 9,325 MiB held, 2,331 MiB of gradients, 3.24e13 operations a step;
activations come on top. The paper's runs took two to eight A800. Not run at this size.
"""

from functools import partial

from fvdm_jax.config import Training
from fvdm_jax.levels import constant, ptss
from fvdm_jax.models.dit import DiTConfig
from fvdm_jax.optimisers import Optimiser


def config(model="wan21_1_3b", probability=0.2, rate=1e-4, **others) -> Training:
    published = {
        "dit": DiTConfig(1152, 4608, 16, 28),
        "fresh": True,
        "clip": "4x32x32",
        "process": "ddpm",
        "curriculum": constant(partial(ptss, probability=probability)),
        "dropout": 0.1,
        "optimizer": Optimiser("adamw", rate, decay=0.0),
        "average": 0.9999,
        "steps": 500_000,
        "batch": 8,
        "remat": "none",
        "save_every": 10_000,
        "evaluate_every": 10_000,
    }
    return Training(model=model, **published | others)
