"""Wan's official keys, as published for 2.1 and 2.2, against our trees."""

from fvdm_jax.models.clip import CLIPConfig
from fvdm_jax.models.vae import VAEConfig

from .table import Rule, affine, dense, left_out

_CONV = "o i t h w -> t h w i o"
_FRAME_CONV = "o i h w -> 1 h w i o"


def _attention(source: str, target: str) -> list[Rule]:
    layers = [rule for name in "qkvo" for rule in dense(f"{source}.{name}", f"{target}/{name}")]
    norms = [
        Rule(f"{source}.{name}.weight", f"{target}/{name}/scale", "d -> d") for name in ("norm_q", "norm_k")
    ]
    return layers + norms


def dit(image: bool = False, positions: bool = False) -> list[Rule]:
    """Rules of the transformer; `image` for the CLIP branch of Wan2.1's I2V, `positions` for FLF2V.

    In the order in which the published files have the tensors.
    """
    block, cross = "blocks.*", "blocks.*.cross_attn"
    return [
        *dense("patch_embedding", "patch_embedding", "o c 1 p q -> (c p q) o"),
        *dense("text_embedding.0", "text_embedding/up"),
        *dense("text_embedding.2", "text_embedding/down"),
        *dense("time_embedding.0", "time_embedding/up"),
        *dense("time_embedding.2", "time_embedding/down"),
        *dense("time_projection.1", "time_projection"),
        Rule(f"{block}.modulation", "blocks/modulation", "1 r d -> r d"),
        *_attention(f"{block}.self_attn", "blocks/self_attn"),
        *affine(f"{block}.norm3", "blocks/norm3"),
        *_attention(cross, "blocks/cross_attn"),
        *(_image_attention(cross, "blocks/cross_attn") if image else ()),
        *dense(f"{block}.ffn.0", "blocks/ffn/up"),
        *dense(f"{block}.ffn.2", "blocks/ffn/down"),
        Rule("head.modulation", "head/modulation", "1 r d -> r d"),
        *dense("head.head", "head/out"),
        *([Rule("img_emb.emb_pos", "image_embedding/positions", "1 n e -> n e")] if positions else ()),
        *(_image_embedding() if image else ()),
    ]


def _image_attention(source: str, target: str) -> list[Rule]:
    return [
        *dense(f"{source}.k_img", f"{target}/k_img"),
        *dense(f"{source}.v_img", f"{target}/v_img"),
        Rule(f"{source}.norm_k_img.weight", f"{target}/norm_k_img/scale", "d -> d"),
    ]


def _image_embedding() -> list[Rule]:
    return [
        *affine("img_emb.proj.0", "image_embedding/norm_in"),
        *dense("img_emb.proj.1", "image_embedding/up"),
        *dense("img_emb.proj.3", "image_embedding/down"),
        *affine("img_emb.proj.4", "image_embedding/norm_out"),
    ]


def _residual(source: str, target: str, shortcut: bool) -> list[Rule]:
    rules = [
        Rule(f"{source}.residual.0.gamma", f"{target}/norm_0/scale", "c 1 1 1 -> c"),
        *dense(f"{source}.residual.2", f"{target}/conv_0", _CONV),
        Rule(f"{source}.residual.3.gamma", f"{target}/norm_1/scale", "c 1 1 1 -> c"),
        *dense(f"{source}.residual.6", f"{target}/conv_1", _CONV),
    ]
    return rules + (list(dense(f"{source}.shortcut", f"{target}/shortcut", _CONV)) if shortcut else [])


def _resample(source: str, target: str, temporal: bool) -> list[Rule]:
    rules = list(dense(f"{source}.resample.1", f"{target}/conv", _FRAME_CONV))
    return rules + (list(dense(f"{source}.time_conv", f"{target}/time_conv", _CONV)) if temporal else [])


def _ends(side: str) -> list[Rule]:
    """What encoder and decoder have alike: first and last convolution, and the middle."""
    middle = f"{side}.middle.1"
    return [
        *dense(f"{side}.conv1", f"{side}/conv_in", _CONV),
        *_residual(f"{side}.middle.0", f"{side}/middle/block_0", False),
        Rule(f"{middle}.norm.gamma", f"{side}/middle/attention/norm/scale", "c 1 1 -> c"),
        *dense(f"{middle}.to_qkv", f"{side}/middle/attention/qkv", "o i 1 1 -> 1 1 1 i o"),
        *dense(f"{middle}.proj", f"{side}/middle/attention/out", "o i 1 1 -> 1 1 1 i o"),
        *_residual(f"{side}.middle.2", f"{side}/middle/block_1", False),
        Rule(f"{side}.head.0.gamma", f"{side}/norm_out/scale", "c 1 1 1 -> c"),
        *dense(f"{side}.head.2", f"{side}/conv_out", _CONV),
    ]


def _level_keys(config: VAEConfig, side: str, list_name: str, blocks: int):
    """(level, part) → official key: one flat list in 2.1, a list of lists in 2.2."""
    for level in range(len(config.multipliers)):
        parts = blocks + (level < len(config.temporal))
        for part in range(parts):
            flat = f"{side}.{list_name}.{level * (blocks + 1) + part}"
            nested = f"{side}.{list_name}.{level}.{list_name}.{part}"
            yield level, part, nested if config.shortcuts else flat


def vae(config: VAEConfig) -> list[Rule]:
    """Rules of the VAE of this config, 2.1 or 2.2 (which is the one with shortcuts)."""
    rules = [
        *dense("conv1", "encoder/quant", _CONV),
        *dense("conv2", "decoder/post_quant", _CONV),
        *_ends("encoder"),
        *_ends("decoder"),
    ]
    widths = [1, *config.multipliers]
    for level, part, key in _level_keys(config, "encoder", "downsamples", config.blocks):
        if part == config.blocks:
            rules += _resample(key, f"encoder/level_{level}_down", config.temporal[level])
        else:
            wider = part == 0 and widths[level] != widths[level + 1]
            rules += _residual(key, f"encoder/level_{level}_block_{part}", wider)
    for level, part, key in _level_keys(config, "decoder", "upsamples", config.blocks + 1):
        if part == config.blocks + 1:
            rules += _resample(key, f"decoder/level_{level}_up", config.temporal[::-1][level])
        else:
            entering = _entering(config, level)
            wider = part == 0 and entering != config.multipliers[::-1][level]
            rules += _residual(key, f"decoder/level_{level}_block_{part}", wider)
    return rules


def _entering(config: VAEConfig, level: int) -> float:
    """Width that enters a level of the decoder, in units of `decoder_width`; 2.1's upsampling halves it."""
    widths = config.multipliers[::-1]
    if level == 0:
        return widths[0]
    return widths[level - 1] if config.shortcuts else widths[level - 1] / 2


def umt5() -> list[Rule]:
    """Rules of the text encoder under its official keys."""
    pairs = {
        "attn.q": "attention/q", "attn.k": "attention/k", "attn.v": "attention/v", "attn.o": "attention/o",
        "ffn.gate.0": "gate", "ffn.fc1": "up", "ffn.fc2": "down",
    }  # fmt: skip
    norms = {"blocks.*.norm1": "layers/norm_attention", "blocks.*.norm2": "layers/norm_ffn", "norm": "norm"}
    return [
        Rule("token_embedding.weight", "embedding", "v e -> v e"),
        Rule("blocks.*.pos_embedding.embedding.weight", "layers/attention/positions", "p a -> p a"),
        *(Rule(f"blocks.*.{s}.weight", f"layers/{t}/kernel", "o i -> i o") for s, t in pairs.items()),
        *(Rule(f"{s}.weight", f"{t}/scale", "d -> d") for s, t in norms.items()),
    ]


def clip(config: CLIPConfig) -> list[Rule]:
    """Rules of CLIP's image tower under its official keys, of a file that holds the text tower too."""
    stack, block = "visual.transformer", "visual.transformer.*"
    unused = ("log_scale", "textual.", "visual.head", "visual.post_norm.", f"{stack}.{config.layers - 1}.")
    return [
        *map(left_out, unused),
        Rule("visual.cls_embedding", "class_token", "1 1 e -> e"),
        Rule("visual.pos_embedding", "positions", "1 n e -> n e"),
        Rule("visual.patch_embedding.weight", "patch_embedding/kernel", "o c p q -> (c p q) o"),
        *affine("visual.pre_norm", "norm_in"),
        *affine(f"{block}.norm1", "layers/norm_attention"),
        *dense(f"{block}.attn.to_qkv", "layers/qkv"),
        *dense(f"{block}.attn.proj", "layers/o"),
        *affine(f"{block}.norm2", "layers/norm_ffn"),
        *dense(f"{block}.mlp.0", "layers/up"),
        *dense(f"{block}.mlp.2", "layers/down"),
    ]
