"""Trees of arrays and the configs of networks, in and out of a folder."""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from fvdm_jax.models import dit, text, vae
from fvdm_jax.models.dit import DiT, DiTConfig
from fvdm_jax.models.text import TextConfig, TextEncoder
from fvdm_jax.models.vae import VAE, VAEConfig
from fvdm_jax.program import Refusal
from fvdm_jax.shapes import Latents, Levels, Mask, TextStates, Tokens, Video

NETWORKS = {
    "dit": (DiTConfig, dit.abstract),
    "vae": (VAEConfig, vae.abstract),
    "text": (TextConfig, text.abstract),
}
"""The networks of a model: what configures each, and its parameters as shapes."""


class Model(NamedTuple):
    """Configs and parameters of the networks, by name (`dit`, `vae`, `text`), as one folder holds them.

    The methods are the networks as functions of their parameters, to be compiled.
    """

    configs: dict
    params: dict

    def network(self, params: dict, x: Latents, timestep: Levels, text: TextStates) -> Latents:
        """What the transformer says of x [b f h w c]."""
        return DiT(self.configs["dit"]).apply({"params": params}, x, timestep, text)

    def read(self, params: dict, tokens: Tokens, mask: Mask) -> TextStates:
        """States [b l e] of tokens [b l]."""
        return TextEncoder(self.configs["text"]).apply({"params": params}, tokens, mask)

    def encode(self, params: dict, video: Video) -> Latents:
        """Normalised latents [b f h w c] of pixels [b t H W 3]."""
        return VAE(self.configs["vae"]).apply({"params": params}, video, method="encode")

    def decode(self, params: dict, latents: Latents) -> Video:
        """Pixels [b t H W 3] of normalised latents [b f h w c]."""
        return VAE(self.configs["vae"]).apply({"params": params}, latents, method="decode")


def save_tree(path: Path, tree: dict, dtype: str | None = None) -> None:
    """Writes a nested tree of arrays as safetensors, keys joined by "/", floats as `dtype` where given."""
    from safetensors.numpy import save_file

    flat = {key: np.asarray(x) for key, x in flatten(tree)}
    # A strided array is written wrong by some versions of the library, hence contiguous.
    flat = {
        k: np.ascontiguousarray(x.astype(dtype) if dtype and _is_float(x) else x) for k, x in flat.items()
    }
    save_file(flat, path)


def load_tree(path: Path) -> dict:
    """The nested tree of `save_tree`, as float32 where it was stored narrower.

    Raises Refusal, named `path`, where the file is not whole.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(path)
    except (SafetensorError, OSError) as broken:
        raise Refusal(path, f"is not a whole safetensors file ({broken})", "copy it again") from broken
    tree: dict = {}
    for key, array in arrays.items():
        *parents, leaf = key.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array.astype(np.float32) if _is_float(array) else array
    return tree


def _is_float(array: np.ndarray) -> bool:
    # numpy by itself does not count bfloat16 among the floats.
    return jnp.issubdtype(array.dtype, jnp.floating)


def flatten(tree: dict, prefix: str = ""):
    """(path, array) of every leaf, in the order of the keys."""
    for key in sorted(tree):
        if isinstance(tree[key], dict):
            yield from flatten(tree[key], f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", tree[key]


def load(folder: Path) -> Model:
    """The model of a folder: `config.json` with a config for each network, and its NAME.safetensors.

    Raises Refusal where a config is none, a file is not whole, or its arrays are not those of its config.
    """
    stored = json.loads((folder / "config.json").read_text("utf-8"))
    model = Model({}, {})
    for name, (kind, abstract) in NETWORKS.items():
        model.configs[name] = _configured(folder / "config.json", name, kind, stored)
        path = folder / f"{name}.safetensors"
        model.params[name] = load_tree(path)
        _check(path, model.params[name], abstract(model.configs[name]))
    return model


def _configured(path: Path, name: str, kind: type, stored: dict):
    try:
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored[name].items()})
    except (KeyError, TypeError, AttributeError) as wrong:
        names = ", ".join(field.name for field in dataclasses.fields(kind))
        raise Refusal(path, f"does not describe {name}: {wrong}", f"its fields are {names}") from wrong


def _check(path: Path, params: dict, expected: dict) -> None:
    """Raises Refusal unless the arrays have the names and shapes that the network expects."""
    found = {key: array.shape for key, array in flatten(params)}
    wanted = {key: array.shape for key, array in flatten(nn.meta.unbox(expected))}
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            what = f"{key} is {found.get(key, 'absent')}, and of its config {wanted.get(key, 'no part')}"
            raise Refusal(path, what, "config.json and this file must be of one model")


def save(folder: Path, model: Model, extra: dict, dtype: str = "float16") -> None:
    """Writes the folder that `load` reads; `extra` joins `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tree in model.params.items():
        save_tree(folder / f"{name}.safetensors", tree, dtype)
    stored = {name: dataclasses.asdict(config) for name, config in model.configs.items()}
    (folder / "config.json").write_text(json.dumps(stored | extra, indent=1) + "\n")
