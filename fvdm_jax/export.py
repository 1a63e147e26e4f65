"""What a run has learned, as a folder that `sample` runs and `convert` gives to other programs."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fvdm_jax import lora
from fvdm_jax.config import Training
from fvdm_jax.models.dit import SIZES
from fvdm_jax.program import folder_output
from fvdm_jax.trainer import Trainer

IDLE = 1e-6
"""A change this small beside the weights does nothing that anybody would see."""


def write(out: Path, trainer: Trainer, learned: dict) -> None:
    """Writes adapters as `python -m convert` does of a LoRA's file, all parameters as a whole model.

    The model's other networks are taken over from the folder that was trained from. Raises Refusal where
    `out` is not free.
    """
    settings, family = trainer.settings, _family(trainer)
    with folder_output(out) as draft:
        if settings.rank:
            name, described, base = "adapters", {"family": family}, None
            tree = {"low_rank": lora.scaled(learned, settings.scale).low_rank}
        else:
            name, described, base = settings.part, dataclasses.asdict(trainer.network), Path(settings.model)
            tree = jax.tree.map(lambda leaf, like: leaf.astype(like), learned, trainer.stored())
        _save(draft / name, tree)
        kind = {"family": family, "names": "lora" if settings.rank else "our"}
        for file, told in (("config.json", described), ("manifest.json", kind)):
            said = _said(base, file)
            if file == "config.json":
                said[name] = told
                if "sampling" in said:
                    said["sampling"] = sampling(settings, said["sampling"])
            else:
                said.setdefault("networks", {})[name] = told
            (draft / file).write_text(json.dumps(said, indent=1) + "\n", "utf-8")
        if base is not None:
            _take_over(base, draft, name)


def sampling(settings: Training, stored: dict) -> dict:
    """How a model that was trained so is sampled: as `stored` says, unless its process is another."""
    if stored["process"] == settings.process:
        return stored
    spacing, solver = ("wan", "unipc") if settings.process == "flow" else ("ddpm", "euler")
    return stored | {"process": settings.process, "spacing": spacing, "solver": solver}


def _save(folder: Path, tree: dict) -> None:
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    handler.save(folder, args=ocp.args.PyTreeSave(jax.tree.map(np.asarray, tree)))


def _family(trainer: Trainer) -> str:
    """The published size that the network has; empty for any other."""
    wanted = dataclasses.replace(trainer.network, dtype="bfloat16")
    return next((name for name, size in SIZES.items() if size == wanted), "")


def _said(base: Path | None, file: str) -> dict:
    path = base / file if base else None
    return json.loads(path.read_text("utf-8")) if path and path.is_file() else {}


def _take_over(base: Path, out: Path, name: str) -> None:
    """Gives the folder what the base has beside the network that was trained: links where that can be."""
    for path in sorted(base.iterdir()):
        if path.stem == name or (out / path.name).exists() or path.name.startswith("."):
            continue
        if path.is_dir():
            shutil.copytree(path, out / path.name, copy_function=_link)
        else:
            _link(path, out / path.name)


def _link(source: str | Path, to: str | Path) -> None:
    try:
        os.link(source, to)
    except OSError:
        shutil.copyfile(source, to)


def changes(trainer: Trainer, learned: dict) -> list[str]:
    """How large the changes are beside the weights, ‖ΔW‖/‖W‖, as a table of the adapted modules."""
    settings = trainer.settings
    if not settings.rank:
        return []
    frozen, _ = trainer.load()
    ratios = lora.changes(frozen, lora.scaled(learned, settings.scale))
    lines = ["module                              ‖ΔW‖/‖W‖, least   median    most"]
    for name, ratio in sorted(ratios.items()):
        least, most = float(jnp.min(ratio)), float(jnp.max(ratio))
        idle = "   nothing was learned here" if most < IDLE else ""
        lines.append(f"{name:36} {least:14.2e} {float(jnp.median(ratio)):9.2e} {most:9.2e}{idle}")
    return lines
