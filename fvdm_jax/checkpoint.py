"""Trees of arrays and the configs of networks, in and out of a folder."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from fvdm_jax import conditioning, lora
from fvdm_jax.models import clip, dit, streaming, text, vae
from fvdm_jax.models.clip import CLIPConfig, ImageTokens
from fvdm_jax.program import Refusal, outputs
from fvdm_jax.shapes import Latents, Levels, Mask, TextStates, Tokens, Video


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks of a model, by their configs, as functions of its parameters.

    `params` is a dict with a tree for each field, as of `load`, and "adapters", if any: pairs of
    `lora.Adapters` and their strength. `clip` have only models whose transformer reads image tokens.
    """

    dit: dit.DiTConfig
    vae: vae.VAEConfig
    text: text.TextConfig
    clip: CLIPConfig | None = None

    @property
    def there(self) -> list[str]:
        """The names of those that are not None."""
        return [field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None]

    def velocity(self, params: dict, x: Latents, timestep: Levels, text_states: TextStates) -> Latents:
        """What the transformer says of x [b f h w c] at timesteps [b f], told [b l e]."""
        return lora.Network(self.dit).velocity(params, x, timestep, text_states)

    def read(self, params: dict, tokens: Tokens, mask: Mask) -> TextStates:
        """States [b l e] of tokens [b l]."""
        return text.TextEncoder(self.text).apply({"params": params["text"]}, tokens, mask)

    def look(self, params: dict, pictures: Sequence[Float[Array, "H W 3"]]) -> ImageTokens:
        """Tokens [1 n e] of pictures in −1 … 1, as `conditioning.image_tokens`."""
        return conditioning.image_tokens(self.clip, params["clip"], pictures)

    def encode(self, params: dict, video: Video) -> Latents:
        """Normalised latents [b f h w c] of pixels [b t H W 3], in memory that does not grow with t."""
        return streaming.encode(self.vae, params["vae"], video)

    def decode(self, params: dict, latents: Latents) -> Video:
        """Pixels [b t H W 3] of normalised latents [b f h w c], in memory that does not grow with f."""
        return streaming.decode(self.vae, params["vae"], latents)


KINDS = {
    "dit": (dit.DiTConfig, dit.abstract),
    "vae": (vae.VAEConfig, vae.abstract),
    "text": (text.TextConfig, text.abstract),
    "clip": (CLIPConfig, clip.abstract),
}
"""What configures each network, and its parameters as shapes."""

REQUIRED = ("dit", "vae", "text")
"""Those that every model has."""


def save_tree(path: Path, tree: dict, dtype: str | None = None) -> None:
    """Writes a nested tree of arrays as safetensors, keys joined by "/", floats as `dtype` where given.

    The file at `path` is replaced when the new one is whole.
    """
    from safetensors.numpy import save_file

    flat = {}
    for key, leaf in flatten_dict(tree, sep="/").items():
        array = np.asarray(leaf)
        # A strided array is written wrong by some versions of the library, hence contiguous.
        flat[key] = np.ascontiguousarray(array.astype(dtype) if dtype and _is_float(array) else array)
    with outputs(path) as (draft,):
        save_file(flat, draft)


def load_tree(path: Path, widen: bool = True) -> dict:
    """The nested tree of `save_tree`, with `widen` as float32 where it was stored narrower.

    Raises Refusal, named `path`, where the file is not whole.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(path)
    except (SafetensorError, OSError) as broken:
        raise Refusal(path, f"is not a whole safetensors file ({broken})", "copy it again") from broken
    wide = {k: a.astype(np.float32) if widen and _is_float(a) else a for k, a in arrays.items()}
    return unflatten_dict(wide, sep="/")


def load_adapters(folder: Path, params: dict) -> lora.Adapters:
    """The adapters of a folder that `python -m convert` made of a LoRA, for the transformer `params`.

    Raises Refusal where it holds none, or those of another network.
    """
    tree = restore_tree(folder / "adapters")
    adapters = lora.Adapters(tree.get("low_rank", {}), tree.get("delta", {}))
    try:
        lora.check(params, adapters)
    except ValueError as misfit:
        raise Refusal(folder, f"does not fit the model: {misfit}", "give a LoRA of this network") from misfit
    return adapters


def _is_float(array: np.ndarray) -> bool:
    # numpy by itself does not count bfloat16 among the floats.
    return jnp.issubdtype(array.dtype, jnp.floating)


def load(folder: Path, parts: Iterable[str] | None = None) -> tuple[Networks, dict]:
    """The networks of a folder and the parameters of those of them that `parts` names; None: of all.

    The folder holds `config.json`, with a config for each, and NAME.safetensors or a folder NAME.
    Raises Refusal where a config is none, a file is not whole, or its arrays are not those of its config.
    """
    networks = describe(folder, REQUIRED if parts is None else parts)
    params = {}
    for name in networks.there if parts is None else parts:
        config = getattr(networks, name)
        params[name] = _part(folder, name, config.dtype, KINDS[name][1](config))
    return networks, params


def load_transformer(folder: Path, name: str) -> dict:
    """The parameters of a transformer of a folder, on the host, by its name: "dit", "dit_high" or "dit_low".

    Raises Refusal as `load` does.
    """
    config = network(folder, name)
    return _part(folder, name, config.dtype, dit.abstract(config))


def _part(folder: Path, name: str, dtype: str, expected: dict) -> dict:
    """The parameters of this name, which must be as expected."""
    path = folder / name if (folder / name).is_dir() else folder / f"{name}.safetensors"
    restore = restore_tree if path.is_dir() else load_tree
    # Networks that compute in float32 get what they compute with; others what is stored, half as large.
    params = restore(path, dtype == "float32")
    _check(path, params, expected)
    return params


def restore_tree(folder: Path, widen: bool = False) -> dict:
    """The nested tree of arrays of a folder that `python -m convert` or Orbax has written, on the host.

    With `widen` as float32 where it was stored narrower. Onto a mesh such a folder is restored by Orbax
    itself, with `abstract` parameters that have shardings as its target. Raises Refusal where it is none.
    """
    import orbax.checkpoint as ocp

    try:
        # Orbax's checkpointer would wait here for all processes, and this is called by one as well.
        tree = ocp.PyTreeCheckpointHandler().restore(folder.absolute())
    except (OSError, ValueError, KeyError) as broken:
        raise Refusal(folder, f"is no whole checkpoint ({broken})", "convert it again") from broken
    return jax.tree.map(lambda a: a.astype(np.float32) if widen and _is_float(a) else a, tree)


def restore_onto(folder: Path, name: str, wanted: dict) -> dict:
    """The parameters of a network of a model's folder, in the places and types of the shapes `wanted`.

    Each device's part is read for itself, and no host holds the whole. Raises Refusal where the folder has
    no such network, or one of other sizes.
    """
    if (folder / name).is_dir():
        return _restored(folder / name, wanted)
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise Refusal(folder, f"holds no {name}", "give the folder of a model, as of python -m convert")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
            found = {key: jax.ShapeDtypeStruct(shape, np.float32) for key, shape in shapes.items()}
            _check(path, unflatten_dict(found, sep="/"), wanted)

            def placed(key: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
                stored = file.get_slice(key)
                read = lambda at: np.asarray(stored[at] if at else stored[:], leaf.dtype)  # noqa: E731
                return jax.make_array_from_callback(leaf.shape, leaf.sharding, read)

            leaves = flatten_dict(wanted, sep="/").items()
            return unflatten_dict({key: placed(key, leaf) for key, leaf in leaves}, sep="/")
    except SafetensorError as broken:
        raise Refusal(path, f"is not a whole safetensors file ({broken})", "copy it again") from broken


def _restored(folder: Path, wanted: dict) -> dict:
    import orbax.checkpoint as ocp

    try:
        handler = ocp.PyTreeCheckpointer()
        stored = handler.metadata(folder).item_metadata.tree
        _check(
            folder, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.float32), stored), wanted
        )
        args = ocp.checkpoint_utils.construct_restore_args(wanted)
        return handler.restore(folder, args=ocp.args.PyTreeRestore(item=wanted, restore_args=args))
    except (OSError, ValueError, KeyError) as broken:
        raise Refusal(folder, f"is no whole checkpoint ({broken})", "convert it again") from broken


def describe(folder: Path, parts: Iterable[str] = REQUIRED) -> Networks:
    """The networks of a folder, without their parameters. Raises Refusal where a config is none.

    Those that `parts` does not name need not be there; they are None then.
    """
    path = folder / "config.json"
    stored = json.loads(path.read_text("utf-8"))
    needed = stored.keys() | set(parts)
    configs = {
        n: _configured(path, n, kind, stored) if n in needed else None for n, (kind, _) in KINDS.items()
    }
    return Networks(**configs)


def network(folder: Path, name: str) -> dit.DiTConfig:
    """The sizes of a transformer of a folder, by its name there. Raises Refusal where there is none."""
    path = folder / "config.json"
    if not path.is_file():
        raise Refusal(folder, "is no model", "give the folder of one, as of python -m convert")
    return _configured(path, name, dit.DiTConfig, json.loads(path.read_text("utf-8")))


def config_of(kind: type, fields: dict):
    """The config of this kind with fields as JSON has them. Raises TypeError or AttributeError for others."""
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def _configured(path: Path, name: str, kind: type, stored: dict):
    try:
        return config_of(kind, stored[name])
    except (KeyError, TypeError, AttributeError) as wrong:
        names = ", ".join(field.name for field in dataclasses.fields(kind))
        raise Refusal(path, f"does not describe {name}: {wrong}", f"its fields are {names}") from wrong


def _check(path: Path, params: dict, expected: dict) -> None:
    """Raises Refusal unless the arrays have the names and shapes that the network expects."""
    found = {key: array.shape for key, array in flatten_dict(params, sep="/").items()}
    wanted = {key: array.shape for key, array in flatten_dict(nn.meta.unbox(expected), sep="/").items()}
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            what = f"{key} is {found.get(key, 'absent')}, and of its config {wanted.get(key, 'no part')}"
            raise Refusal(path, what, "config.json and this file must be of one model")


def save(folder: Path, networks: Networks, params: dict, extra: dict, dtype: str = "float16") -> None:
    """Writes the folder that `load` reads; `extra` joins `config.json`, which is written last."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in networks.there:
        save_tree(folder / f"{name}.safetensors", params[name], dtype)
    described = {name: dataclasses.asdict(getattr(networks, name)) for name in networks.there}
    with outputs(folder / "config.json") as (draft,):
        draft.write_text(json.dumps(described | extra, indent=1) + "\n", "utf-8")
