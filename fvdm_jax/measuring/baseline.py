"""The works of `workloads` as diffusers and transformers do them, on torch: what `bench` compares ours with.

torch need not be installed, and is imported where it is used. Each of WORKS gives a function that does its
work once and waits for its end.
"""

import functools
import importlib.util
import os
from collections.abc import Callable

import numpy as np
from einops import rearrange

from fvdm_jax.measuring.workloads import Subject
from fvdm_jax.models.dit import PATCH, DiTConfig

NAME = "diffusers"
PACKAGES = ("torch", "diffusers", "transformers")

Run = Callable[[], object]


def installed() -> bool:
    """Whether all that is needed is."""
    return all(importlib.util.find_spec(name) for name in PACKAGES)


def versions() -> dict[str, str]:
    """Of the packages that do the work."""
    from importlib.metadata import version

    return {name: version(name) for name in PACKAGES}


def device(platform: str) -> str | None:
    """What torch calls a device of a platform of jax; None where it cannot use it."""
    import torch

    if platform == "cpu":
        return "cpu"
    return "cuda" if platform == "gpu" and torch.cuda.is_available() else None


def threads() -> int:
    """How many threads XLA's CPU backend computes with: one for each processor that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def release() -> None:
    """Gives back what torch keeps of a GPU's memory though nothing is in it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def transformer(config: DiTConfig):
    """diffusers' transformer of these sizes, its weights drawn as torch does, float32 on the CPU."""
    import torch
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=config.channels_in,
        out_channels=config.channels_out,
        text_dim=config.text_width,
        ffn_dim=config.ffn,
        num_layers=config.layers,
    )


def training(network, optimizer, dtype: str = "float32") -> Callable[..., float]:
    """(latents, text, noise, level) → the loss of a step of rectified flow, as `training.train_step`.

    Arrays on the host: latents and noise [b f h w c], text [b l e], level [b f], which diffusers takes for
    each token. Parameters stay as they are kept; `dtype` is what products are computed in.
    """
    import torch

    where = next(network.parameters()).device

    def step(latents: np.ndarray, text: np.ndarray, noise: np.ndarray, level: np.ndarray) -> float:
        clean, noise = (_placed(_channels_first(x), where) for x in (latents, noise))
        level, text = _placed(level, where), _placed(text, where)
        timestep = 1000 * level.repeat_interleave(latents.shape[2] * latents.shape[3] // PATCH**2, 1)
        level = level[:, None, :, None, None]
        with torch.autocast(where.type, getattr(torch, dtype), enabled=dtype != "float32"):
            said = network((1 - level) * clean + level * noise, timestep, text).sample
            loss = torch.nn.functional.mse_loss(said.float(), noise - clean)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _channels_first(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rearrange(x, "b f h w c -> b c f h w"))


def _placed(x: np.ndarray, where, dtype: str = "float32"):
    import torch

    return torch.from_numpy(x).to(where, getattr(torch, dtype))


def _noise(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def _waiting(work: Run, where: str) -> Run:
    """The work without gradients, to its end."""
    import torch

    def run() -> object:
        with torch.inference_mode():
            result = work()
            if where == "cuda":
                torch.cuda.synchronize()
            return result

    return run


def _loaded(make: Callable, where: str, dtype: str):
    """A network for use, on the device."""
    import torch

    torch.set_num_threads(threads())
    return torch.nn.Module.to(make(), where, getattr(torch, dtype)).eval()


def _transformer(config: DiTConfig, where: str):
    """For use: what diffusers keeps as float32 when it loads weights is so here too."""
    import torch

    torch.set_num_threads(threads())
    network = transformer(config).eval()
    kept = tuple(network._keep_in_fp32_modules)
    for name, parameter in network.named_parameters():
        dtype = "float32" if any(part in name for part in kept) else config.dtype
        parameter.data = parameter.data.to(where, getattr(torch, dtype))
    for buffer in network.buffers():
        buffer.data = buffer.data.to(where)
    return network


def _inputs(case: Subject, where: str, batch: int):
    dtype = case.networks.dit.dtype
    latents = _placed(_channels_first(_noise((batch, *case.latents[1:]))), where, dtype)
    return latents, _placed(_noise((batch, *case.states[1:])), where, dtype)


def _forward(case: Subject, where: str) -> Run:
    """With one timestep for all frames, which is the less work for it."""
    import torch

    network = _transformer(case.networks.dit, where)
    x, text = _inputs(case, where, case.batch)
    timestep = torch.full((case.batch,), 500.0, device=where)
    return _waiting(lambda: network(x, timestep, text, return_dict=False), where)


def _sample(case: Subject, where: str) -> Run:
    """A step as its pipeline takes it: the network twice, guidance, UniPC."""
    from diffusers import UniPCMultistepScheduler

    network = _transformer(case.networks.dit, where)
    x, text = _inputs(case, where, 1)
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}
    scheduler = UniPCMultistepScheduler(**options)

    def work() -> object:
        scheduler.set_timesteps(1, device=where)
        (timestep,) = scheduler.timesteps
        said, without = (network(x, timestep[None], text, return_dict=False)[0] for _ in range(2))
        return scheduler.step(without + 5.0 * (said - without), timestep, x, return_dict=False)

    return _waiting(work, where)


def _train(case: Subject, where: str) -> Run:
    import torch

    torch.set_num_threads(threads())
    network = torch.nn.Module.to(transformer(case.networks.dit), where)
    if case.remat != "none":
        network.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)
    level = np.full(case.latents[:2], 0.5, np.float32)
    inputs = _noise(case.latents), _noise(case.states), _noise(case.latents), level
    step = training(network, optimizer, case.networks.dit.dtype)
    return lambda: step(*inputs)


def autoencoder(config):
    """diffusers' VAE of these sizes."""
    from diffusers import AutoencoderKLWan

    channels = 3 * config.patch**2
    return AutoencoderKLWan(
        base_dim=config.width,
        decoder_base_dim=config.decoder_width,
        z_dim=config.latent,
        dim_mult=list(config.multipliers),
        num_res_blocks=config.blocks,
        temperal_downsample=list(config.temporal),
        latents_mean=list(config.mean),
        latents_std=list(config.std),
        is_residual=config.shortcuts,
        in_channels=channels,
        out_channels=channels,
        patch_size=config.patch if config.patch > 1 else None,
    )


def _vae(method: str, case: Subject, where: str) -> Run:
    config = case.networks.vae
    network = _loaded(functools.partial(autoencoder, config), where, config.dtype)
    shape = case.video if method == "encode" else case.coded
    clip = _placed(_channels_first(_noise(shape)), where, config.dtype)
    return _waiting(lambda: getattr(network, method)(clip), where)


def _text(case: Subject, where: str) -> Run:
    import torch
    from transformers import UMT5Config, UMT5EncoderModel

    c = case.networks.text
    sizes = UMT5Config(
        vocab_size=c.vocabulary,
        d_model=c.width,
        d_kv=c.head_width,
        d_ff=c.ffn,
        num_layers=c.layers,
        num_heads=c.heads,
        feed_forward_proj="gated-gelu",
    )
    network = _loaded(lambda: UMT5EncoderModel(sizes), where, c.dtype)
    tokens = (torch.arange(case.text, device=where) % c.vocabulary).expand(case.batch, -1)
    return _waiting(lambda: network(input_ids=tokens, attention_mask=torch.ones_like(tokens)), where)


WORKS = {
    "dit": _forward,
    "sample": _sample,
    "train": _train,
    "vae-encode": functools.partial(_vae, "encode"),
    "vae-decode": functools.partial(_vae, "decode"),
    "text": _text,
}
"""By the names of `workloads.WORKS`: (case, device) → what does the work once."""
