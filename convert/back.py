"""Our checkpoint as the files that others read: Wan's own layout, or that of diffusers."""

import json
from pathlib import Path

from fvdm_jax.models.dit import DiTConfig
from fvdm_jax.presets import PRESETS

from . import names, write
from .families import Family
from .table import unplan
from .tensors import Tensor

LAYOUTS = ("official", "diffusers")
OFFICIAL = {
    "dit": "", "dit_high": "high_noise_model", "dit_low": "low_noise_model", "vae": "", "text": "",
}  # fmt: skip
DIFFUSERS = {
    "dit": "transformer", "dit_high": "transformer", "dit_low": "transformer_2", "vae": "vae",
    "text": "text_encoder",
}  # fmt: skip
"""Folder of each part of a model in either layout."""

_WHOLE = 10**12


def official(family: Family) -> dict[str, Tensor]:
    """The tensors of one of our networks by official keys, in the published order; `tensors` are arrays."""
    return unplan(family.rules, family.tensors, **family.sizes)


def export(folder: Path, part: str, family: Family, layout: str, progress: write.Progress) -> None:
    """Writes one part of a model, whose arrays are in `family.tensors`, into its place in a folder."""
    place = folder / (OFFICIAL if layout == "official" else DIFFUSERS)[part]
    place.mkdir(exist_ok=True, parents=True)
    write.sharded(place, _file(family, layout)[0], shards(family, layout), progress)
    settings = _settings(family, layout)
    if settings:
        (place / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def shards(family: Family, layout: str) -> list[dict[str, Tensor]]:
    """The tensors of a part of a model in the files that the layout has of it."""
    tensors = official(family)
    if layout == "diffusers":
        tensors = _renamed(family, tensors)
    return write.split(tensors, _file(family, layout)[1])


def _renamed(family: Family, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if family.part == "dit":
        renamed = {names.diffusers(key): tensor for key, tensor in tensors.items()}
        return dict(sorted(renamed.items(), key=lambda item: names.published_order(item[0])))
    if family.part == "vae":
        return {names.diffusers_vae(key, family.config.blocks): tensor for key, tensor in tensors.items()}
    table = names.transformers_text(family.config.layers)
    order = {key: place for place, key in enumerate(table.values())}
    renamed = {table[key]: tensor for key, tensor in tensors.items()}
    return dict(sorted(renamed.items(), key=lambda item: _layer_first(item[0], order[item[0]])))


def _layer_first(key: str, place: int) -> tuple[int, int, int]:
    parts = key.split(".")
    if parts[1] == "block":
        return 1, int(parts[2]), place
    return (0 if parts[0] == "shared" else 2), 0, place


def _file(family: Family, layout: str) -> tuple[str, int]:
    """Stem of the files of a network, and the bytes that one of them holds at most, as published."""
    if layout == "diffusers":
        return ("model" if family.part == "text" else "diffusion_pytorch_model"), 5 * 10**9
    if family.part == "dit":
        return "diffusion_pytorch_model", 99 * 10**8 if family.name == "wan_14b" else 10**10
    version = "2.2" if family.part == "vae" and family.config.shortcuts else "2.1"
    stems = {"vae": f"Wan{version}_VAE", "text": "models_t5_umt5-xxl-enc"}
    return stems[family.part], _WHOLE


def _model_type(config: DiTConfig) -> str:
    """What Wan's config.json calls the kind of a transformer."""
    if config.image_tokens:
        return "flf2v"
    return {36: "i2v", 48: "ti2v"}.get(config.channels_in, "t2v")


def _settings(family: Family, layout: str) -> dict:
    """The config.json that the layout has beside a network; {} where it has none."""
    c = family.config
    if family.part == "dit":
        if layout == "official":
            return {
                "_class_name": "WanModel", "dim": c.width, "eps": 1e-6, "ffn_dim": c.ffn, "freq_dim": 256,
                "in_dim": c.channels_in, "model_type": _model_type(c), "num_heads": c.heads,
                "num_layers": c.layers, "out_dim": c.channels_out, "text_len": 512,
            }  # fmt: skip
        return {
            "_class_name": "WanTransformer3DModel", "added_kv_proj_dim": c.width if c.image_width else None,
            "attention_head_dim": c.width // c.heads, "cross_attn_norm": True, "eps": 1e-6, "ffn_dim": c.ffn,
            "freq_dim": 256, "image_dim": c.image_width or None, "in_channels": c.channels_in,
            "num_attention_heads": c.heads, "num_layers": c.layers, "out_channels": c.channels_out,
            "patch_size": [1, 2, 2], "pos_embed_seq_len": c.image_tokens or None,
            "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024, "text_dim": c.text_width,
        }  # fmt: skip
    if layout == "official":
        return {}
    if family.part == "text":
        return {
            "architectures": ["UMT5EncoderModel"], "model_type": "umt5", "d_model": c.width,
            "d_kv": c.head_width, "d_ff": c.ffn,
            "num_heads": c.heads, "num_layers": c.layers, "vocab_size": c.vocabulary,
            "feed_forward_proj": "gated-gelu", "is_encoder_decoder": True, "dense_act_fn": "gelu_new",
            "is_gated_act": True, "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128, "tie_word_embeddings": False,
        }  # fmt: skip
    own = {
        "_class_name": "AutoencoderKLWan", "base_dim": c.width, "z_dim": c.latent,
        "dim_mult": list(c.multipliers),
        "num_res_blocks": c.blocks, "temperal_downsample": list(c.temporal),
        "attn_scales": [], "dropout": 0.0, "latents_mean": list(c.mean), "latents_std": list(c.std),
    }  # fmt: skip
    if c.shortcuts:
        own |= {
            "decoder_base_dim": c.decoder_width, "is_residual": True, "patch_size": c.patch,
            "in_channels": 12, "out_channels": 12, "scale_factor_spatial": c.spatial,
            "scale_factor_temporal": 4,
        }  # fmt: skip
    return own


def write_model_index(folder: Path, parts: dict[str, Family]) -> None:
    """The model_index.json of what is in the folder: which pipeline runs it, and how."""
    size = next((family.config for name, family in parts.items() if name.startswith("dit")), None)
    image = size is not None and size.channels_in > size.channels_out
    classes = {
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"], "text_encoder": ["transformers", "UMT5EncoderModel"],
    }  # fmt: skip
    index = {"_class_name": "WanImageToVideoPipeline" if image else "WanPipeline"}
    index |= {DIFFUSERS[name]: classes[DIFFUSERS[name]] for name in parts}
    if "dit_low" in parts:
        index["boundary_ratio"] = PRESETS["wan22-i2v" if image else "wan22-t2v"]["boundary"]
    if size is not None and size.channels_out == 48:
        index["expand_timesteps"] = True
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
