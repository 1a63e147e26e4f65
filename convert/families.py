"""Which network a set of tensors is, of what size, and by which rules it becomes one of ours."""

import dataclasses
import re
from typing import NamedTuple

import numpy as np

from fvdm_jax.models import clip, dit, text, vae
from fvdm_jax.program import Refusal, plain

from . import names, wan
from .quantised import MARKER, WIDE, widened
from .sources import Part
from .table import Rule
from .tensors import Tensor, bare

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "module.")
SIZES = {
    **{name: ("dit", config) for name, config in dit.SIZES.items()},
    "vae_2_1": ("vae", vae.SIZES["wan_2_1"]),
    "vae_2_2": ("vae", vae.SIZES["wan_2_2"]),
    "umt5_xxl": ("text", text.TextConfig()),
    "clip_vit_h": ("clip", clip.CLIPConfig()),
}
"""Published name → our part of a model, and its config."""

_MARKS = {
    "dit": ("head.modulation", "proj_out.weight"),
    "vae": ("decoder.head.2.weight", "decoder.conv_out.weight"),
    "text": ("token_embedding.weight", "shared.weight", "encoder.embed_tokens.weight"),
    "clip": ("visual.patch_embedding.weight", "cls_embedding"),
}
"""Keys of which a network of this kind has one, and no other kind has any: official names, then others."""

HEAD = 128
"""Width of a head of every published transformer."""

TOKENIZER = "spiece_model"
"""A tensor of text encoders for ComfyUI that holds the file of the tokenizer."""


class Family(NamedTuple):
    """A recognised network: our part, its published name or "", its config, and its tensors by official keys.

    `names` says whose names they had: "official", "diffusers" or "transformers".
    """

    part: str
    name: str
    config: object
    names: str
    tensors: dict[str, Tensor]

    @property
    def rules(self) -> list[Rule]:
        if self.part == "dit":
            return wan.dit(image=self.config.image_width > 0, positions=self.config.image_tokens > 0)
        return {"vae": wan.vae, "clip": wan.clip, "text": lambda _: wan.umt5()}[self.part](self.config)

    @property
    def sizes(self) -> dict[str, int]:
        """Lengths that the rules' patterns need."""
        patch = {"dit": dit.PATCH, "clip": getattr(self.config, "patch", 1)}.get(self.part)
        return {} if patch is None else {"p": patch, "q": patch}


def recognise(part: Part, said: str | None = None, wide: np.dtype = WIDE) -> Family:
    """The family of a part; `said`, a name of SIZES, overrides what its tensors and its config say.

    Eight-bit weights are taken as `wide`. Raises Refusal where it is none that is known, or of no size that
    can be told.
    """
    tensors = widened(part.path, bare(part.tensors, PREFIXES, MARKER), wide)
    if empty := [key for key, tensor in tensors.items() if 0 in tensor.shape]:
        raise Refusal(part.path, f"has nothing in {plain(empty[0], 200)}", "copy it again")
    kinds = [kind for kind, marks in _MARKS.items() if any(mark in tensors for mark in marks)]
    if said:
        kinds = [SIZES[said][0]]
    if len(kinds) != 1:
        seen = ", ".join(plain(key, 60) for key in list(tensors)[:3])
        what = f"is no network that is known here: its tensors are {seen}, …"
        raise Refusal(part.path, what, f"of {', '.join(SIZES)} say with --as which it is")
    kind = kinds[0]
    read = {"dit": _dit, "vae": _vae, "text": _text, "clip": _clip}[kind]
    try:
        config, whose, official = read(part, tensors)
    except KeyError as absent:
        what = f"lacks {plain(absent.args[0], 200)} of a {kind}"
        raise Refusal(part.path, what, "give the whole network") from absent
    except (ValueError, IndexError, ZeroDivisionError) as odd:
        what = f"has tensors of shapes that no {kind} has"
        raise Refusal(part.path, what, "give the file of such a network") from odd
    name = next((n for n, (k, published) in SIZES.items() if k == kind and published == config), "")
    if said:
        name, config = said, SIZES[said][1]
    return Family(kind, name, config, whose, official)


def _depth(tensors: dict, pattern: str) -> int:
    """How many layers there are. Raises KeyError where they are numbered beyond what there can be."""
    depth = 1 + max((int(m[1]) for key in tensors if (m := re.match(pattern, key))), default=-1)
    if depth > len(tensors):
        raise KeyError(f"most of {depth} layers")
    return depth


def _count(part: Part, name: str, otherwise: int | None) -> int | None:
    """A number of the part's config. Raises Refusal where it is no whole number above 0."""
    value = part.config.get(name, otherwise)
    if value is not None and (type(value) is not int or not 0 < value <= 1_000_000):
        what = f"whose config has {name} {plain(value, 80)}"
        raise Refusal(part.path, what, "a whole number above 0 is wanted")
    return value


def _statistics(part: Part, name: str, published: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """The mean or spread of each latent channel. Raises Refusal where the config's is no such list."""
    values = part.config.get(f"latents_{name}", list(published))
    numbers = isinstance(values, list) and all(type(v) in (int, float) and abs(v) < 1e6 for v in values)
    if not numbers or len(values) != channels:
        what = f"has {channels} latent channels, whose {name} is not known"
        right = "give its config.json, with latents_mean and latents_std, with --config"
        raise Refusal(part.path, what, right)
    return tuple(map(float, values))


def _dit(part: Part, tensors: dict) -> tuple:
    whose = "diffusers" if "proj_out.weight" in tensors else "official"
    if whose == "diffusers":
        # An unknown key stays as it is, to be named as without a rule.
        tensors = {names.official(key, key): tensor for key, tensor in tensors.items()}
    width = tensors["head.modulation"].shape[-1]
    image, positions = tensors.get("img_emb.proj.0.bias"), tensors.get("img_emb.emb_pos")
    heads = _count(part, "num_heads", _count(part, "num_attention_heads", None))
    if heads is not None and width % heads:
        raise Refusal(part.path, f"has width {width}, and its config {heads} heads", "give its own config")
    if heads is None and width % HEAD:
        what = f"has width {width}, from which the number of heads cannot be told"
        raise Refusal(part.path, what, "give its config.json with --config")
    config = dit.DiTConfig(
        width=width,
        ffn=tensors["blocks.0.ffn.0.bias"].shape[0],
        heads=heads or width // HEAD,
        layers=_depth(tensors, r"blocks\.(\d+)\."),
        channels_in=tensors["patch_embedding.weight"].shape[1],
        channels_out=tensors["head.head.bias"].shape[0] // dit.PATCH**2,
        text_width=tensors["text_embedding.0.weight"].shape[1],
        image_width=image.shape[0] if image else 0,
        image_tokens=positions.shape[1] if positions else 0,
    )
    wanted = _count(part, "num_layers", _published_layers(config))
    if config.layers != wanted:
        what = f"has {config.layers} layers, and a network of this kind has {wanted}"
        raise Refusal(part.path, what, "copy it again, or give its config.json with --config")
    return config, whose, tensors


def _published_layers(config: dit.DiTConfig) -> int:
    """Layers of the published network that is as wide, else those of the config."""
    alike = [c.layers for c in dit.SIZES.values() if (c.width, c.ffn) == (config.width, config.ffn)]
    return alike[0] if alike else config.layers


def _vae(part: Part, tensors: dict) -> tuple:
    whose = "diffusers" if "decoder.conv_out.weight" in tensors else "official"
    first, last = (
        ("encoder.conv_in", "decoder.conv_in") if whose == "diffusers" else ("encoder.conv1", "decoder.conv1")
    )
    width, colours = tensors[f"{first}.weight"].shape[:2]
    published = vae.SIZES["wan_2_2" if colours > 3 else "wan_2_1"]
    widest, latent = tensors[f"{last}.weight"].shape[:2]
    mean, std = (_statistics(part, name, getattr(published, name), latent) for name in ("mean", "std"))
    decoder = widest // published.multipliers[-1]
    config = dataclasses.replace(
        published, width=width, decoder_width=decoder, latent=latent, mean=mean, std=std
    )
    if whose == "diffusers":
        sources = (rule.source for rule in wan.vae(config))
        renamed = {names.diffusers_vae(source, config.blocks): source for source in sources}
        tensors = {renamed.get(key, key): tensor for key, tensor in tensors.items()}
    return config, whose, tensors


def _text(part: Part, tensors: dict) -> tuple:
    whose = "official" if "token_embedding.weight" in tensors else "transformers"
    tensors = {key: tensor for key, tensor in tensors.items() if key != TOKENIZER}
    if whose == "transformers":
        # Two names of one matrix.
        alias = tensors.pop("encoder.embed_tokens.weight", None)
        if alias is not None:
            tensors.setdefault("shared.weight", alias)
        layers = _depth(tensors, r"encoder\.block\.(\d+)\.")
        renamed = {theirs: ours for ours, theirs in names.transformers_text(layers).items()}
        tensors = {renamed.get(key, key): tensor for key, tensor in tensors.items()}
    vocabulary, width = tensors["token_embedding.weight"].shape
    heads = tensors["blocks.0.pos_embedding.embedding.weight"].shape[1]
    config = text.TextConfig(
        vocabulary=vocabulary,
        width=width,
        heads=heads,
        head_width=tensors["blocks.0.attn.q.weight"].shape[0] // heads,
        ffn=tensors["blocks.0.ffn.fc1.weight"].shape[0],
        layers=_depth(tensors, r"blocks\.(\d+)\."),
        length=_count(part, "text_len", 512),
    )
    return config, whose, tensors


def _clip(part: Part, tensors: dict) -> tuple:
    if "cls_embedding" in tensors:
        # The tower by itself.
        tensors = {f"visual.{key}": tensor for key, tensor in tensors.items()}
    width, _, patch, _ = tensors["visual.patch_embedding.weight"].shape
    side = round((tensors["visual.pos_embedding"].shape[1] - 1) ** 0.5)
    # Beside it may lie the config of the transformer that it belongs to.
    own = _count(part, "num_heads", None) if part.config.get("dim") == width else None
    heads = own or (16 if width == clip.CLIPConfig.width else None)
    if heads is None:
        what = f"has width {width}, from which the number of heads cannot be told"
        raise Refusal(part.path, what, "give a config with dim and num_heads with --config")
    config = clip.CLIPConfig(
        image=side * patch,
        patch=patch,
        width=width,
        heads=heads,
        ffn=tensors["visual.transformer.0.mlp.0.bias"].shape[0],
        layers=_depth(tensors, r"visual\.transformer\.(\d+)\."),
    )
    published = clip.CLIPConfig()
    if width == published.width and config.layers != published.layers:
        what = f"has {config.layers} layers, and the published tower {published.layers}"
        raise Refusal(
            part.path, what, "give the original file: what convert writes lacks what Wan never runs"
        )
    return config, "official", tensors
