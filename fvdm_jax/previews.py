"""Videos of what a run can do so far: two tasks for a clip that it was not trained on."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from fvdm_jax import checkpoint, latents, tasks, video, zoo
from fvdm_jax.data.records import Record
from fvdm_jax.defaults import OPTIONAL
from fvdm_jax.export import sampling
from fvdm_jax.guidance import Generation
from fvdm_jax.process import PROCESSES
from fvdm_jax.program import outputs
from fvdm_jax.samplers import SAMPLERS
from fvdm_jax.schedule import SPACINGS
from fvdm_jax.sharding import replicated
from fvdm_jax.trainer import Trainer, within

TASKS = {"text": (), "image": (0,)}
"""Latent frames that are kept of the clip, by the task's name."""


class Previews(NamedTuple):
    """Samples a clip's caption from the same noise at every call: from text, and from its first frame.

    `program` is what `python -m fvdm_jax.sample` compiles, of `settings` as in the model's config.json.
    """

    folder: Path
    model: Path
    settings: dict
    clip: Record
    prompts: tuple[np.ndarray, np.ndarray]
    program: Callable

    def write(self, step: int, variables: dict) -> list[Path]:
        """Writes a video and a contact sheet for each task; without a VAE in the model its latents."""
        clean = np.asarray(self.clip.latents, np.float32)[None]
        noise = jax.random.normal(jax.random.key(0), clean.shape)
        sigmas = SPACINGS[self.settings["spacing"]](self.settings["steps"], self.settings["shift"])
        made = {}
        # All are made before the first is written, so that a process that fails to write has sampled with
        # the others.
        for name, kept in TASKS.items():
            task = tasks.text_to_video(clean.shape)
            for frame in kept:
                task = task.keep(clean[:, frame : frame + 1], frame)
            rows = zoo.levels(self.settings["schedule"], sigmas, task.strength)
            inputs = (self.prompts, self.settings["guidance"], noise, task.canvas, rows)
            made[name] = np.asarray(self.program(variables, *inputs)), np.asarray(task.strength).tolist()
        if jax.process_index():
            return []
        return [path for name in made for path in self._written(f"step_{step:06d}_{name}", *made[name])]

    def _written(self, name: str, made: np.ndarray, strength: list[float]) -> list[Path]:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not has_vae(self.model):
            path = self.folder / f"{name}{latents.SUFFIX}"
            latents.save(path, made, self.settings)
            return [path]
        networks, params = checkpoint.load(self.model, ("vae",))
        pixels = video.to_pixels(np.asarray(networks.decode(params, made)))[0]
        paths = [self.folder / f"{name}{suffix}" for suffix in (".mp4", ".png")]
        with outputs(*paths) as drafts:
            video.write_mp4(drafts[0], iter(pixels), self.settings["fps"], self.clip.caption)
            shown = [pixels[i] for i in video.shown(len(pixels))]
            video.contact_sheet(np.stack(shown), strength=strength, frames=len(pixels)).save(drafts[1])
        return paths


def has_vae(model: Path) -> bool:
    """Whether the model's folder holds a VAE, with which latents can be shown."""
    return (model / "vae").is_dir() or (model / "vae.safetensors").is_file()


def prepared(trainer: Trainer, folder: Path, clip: Record, prompts: tuple) -> Previews | None:
    """Previews of a clip told `prompts`, the states [1 l e] of its caption and of nothing.

    None where the model does not say how it samples.
    """
    model = Path(trainer.settings.model)
    if not (model / "config.json").is_file():
        return None
    settings = json.loads((model / "config.json").read_text("utf-8")).get("sampling")
    if settings is None:
        return None
    settings = OPTIONAL | sampling(trainer.settings, settings)
    process, solver = PROCESSES[trainer.settings.process], SAMPLERS[settings["solver"]]
    generation = Generation(trainer.sampled, process, solver)
    program = jax.jit(generation.sample, out_shardings=replicated(trainer.over))
    return Previews(folder, model, settings, clip, prompts, partial(within, trainer.over, program))
