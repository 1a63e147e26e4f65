"""Modules under Wan's official names and under those of diffusers and transformers.

Shapes are the same under both, so that a checkpoint or an adapter is renamed and not changed.
Source: diffusers scripts/convert_wan_to_diffusers.py, against the published files' keys.
"""

_BLOCK = (
    ("modulation", "scale_shift_table"),
    ("self_attn.q", "attn1.to_q"),
    ("self_attn.k", "attn1.to_k"),
    ("self_attn.v", "attn1.to_v"),
    ("self_attn.o", "attn1.to_out.0"),
    ("self_attn.norm_q", "attn1.norm_q"),
    ("self_attn.norm_k", "attn1.norm_k"),
    ("cross_attn.q", "attn2.to_q"),
    ("cross_attn.k", "attn2.to_k"),
    ("cross_attn.v", "attn2.to_v"),
    ("cross_attn.o", "attn2.to_out.0"),
    ("cross_attn.norm_q", "attn2.norm_q"),
    ("cross_attn.norm_k", "attn2.norm_k"),
    ("cross_attn.k_img", "attn2.add_k_proj"),
    ("cross_attn.v_img", "attn2.add_v_proj"),
    ("cross_attn.norm_k_img", "attn2.norm_added_k"),
    # diffusers numbers norms in the order in which they are applied; its norm3 has no parameters.
    ("norm3", "norm2"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
)
_EMBEDDER = "condition_embedder"
DIFFUSERS_DIT: tuple[tuple[str, str], ...] = (
    ("patch_embedding", "patch_embedding"),
    ("text_embedding.0", f"{_EMBEDDER}.text_embedder.linear_1"),
    ("text_embedding.2", f"{_EMBEDDER}.text_embedder.linear_2"),
    ("time_embedding.0", f"{_EMBEDDER}.time_embedder.linear_1"),
    ("time_embedding.2", f"{_EMBEDDER}.time_embedder.linear_2"),
    ("time_projection.1", f"{_EMBEDDER}.time_proj"),
    ("img_emb.proj.0", f"{_EMBEDDER}.image_embedder.norm1"),
    ("img_emb.proj.1", f"{_EMBEDDER}.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", f"{_EMBEDDER}.image_embedder.ff.net.2"),
    ("img_emb.proj.4", f"{_EMBEDDER}.image_embedder.norm2"),
    ("img_emb.emb_pos", f"{_EMBEDDER}.image_embedder.pos_embed"),
    ("head.head", "proj_out"),
    ("head.modulation", "scale_shift_table"),
    *((f"blocks.*.{ours}", f"blocks.*.{theirs}") for ours, theirs in _BLOCK),
)
"""(official, diffusers) names of modules and of parameters that have no module; `*` is a layer's number."""

_TO_DIFFUSERS = dict(DIFFUSERS_DIT)
_TO_OFFICIAL = {theirs: ours for ours, theirs in DIFFUSERS_DIT}


def official(key: str, otherwise: str | None = None) -> str:
    """The official key of diffusers' module or parameter; `otherwise` where there is none, or KeyError."""
    try:
        return _renamed(key, _TO_OFFICIAL)
    except KeyError:
        if otherwise is None:
            raise
        return otherwise


def diffusers(key: str) -> str:
    """diffusers' key of an official module or parameter. Raises KeyError for a key that has no such name."""
    return _renamed(key, _TO_DIFFUSERS)


_FIRST = (
    "scale_shift_table", "patch_embedding", "condition_embedder.time_embedder",
    "condition_embedder.time_proj", "condition_embedder.text_embedder",
    "condition_embedder.image_embedder.pos_embed", "condition_embedder", "blocks",
)  # fmt: skip
_WITHIN = ("scale_shift_table", "attn1.norm", "attn1", "attn2.norm", "attn2", "norm2", "ffn")


def published_order(key: str) -> tuple[int, int, int]:
    """Sorts diffusers' keys as the published files have them, whose version had the norms before q."""
    _, number, within = (*key.split(".", 2), "", "")[:3]
    layer = int(number) if key.startswith("blocks.") else 0
    return _place(key, _FIRST), layer, _place(within, _WITHIN) if key.startswith("blocks.") else 0


def _place(key: str, order: tuple[str, ...]) -> int:
    return next((i for i, head in enumerate(order) if key.startswith(head)), len(order))


def _renamed(key: str, table: dict[str, str]) -> str:
    parts = key.split(".")
    number = parts[1] if parts[0] == "blocks" and len(parts) > 1 else ""
    generic = ["blocks", "*", *parts[2:]] if number.isdecimal() else parts
    for end in range(len(parts), 0, -1):
        if name := table.get(".".join(generic[:end])):
            return ".".join([name.replace("*", number), *parts[end:]])
    raise KeyError(key)


_RESIDUAL = {
    "residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}  # fmt: skip
"""Parts of a residual block of the VAE; below, the ends and the middle of a side."""

_SIDE = {
    "conv1": "conv_in", "head.0": "norm_out", "head.2": "conv_out", "middle.0": "mid_block.resnets.0",
    "middle.1": "mid_block.attentions.0", "middle.2": "mid_block.resnets.1",
}  # fmt: skip


def diffusers_vae(key: str, blocks: int) -> str:
    """diffusers' key of an official key of a VAE whose encoder has `blocks` residual blocks to a level."""
    side, _, rest = key.partition(".")
    if side in ("conv1", "conv2"):
        return {"conv1": "quant_conv", "conv2": "post_quant_conv"}[side] + f".{rest}"
    head = ".".join(rest.split(".")[: 1 if rest.startswith("conv1") else 2])
    if head in _SIDE:
        place, rest = _SIDE[head], rest.removeprefix(f"{head}.")
    else:
        place, rest = _level(rest, blocks)
    for ours, theirs in _RESIDUAL.items():
        if rest.startswith(f"{ours}."):
            rest = theirs + rest.removeprefix(ours)
    return f"{side}.{place}.{rest}"


def _level(key: str, blocks: int) -> tuple[str, str]:
    """diffusers' name of a part of a level, and what of the key follows it: 2.1 has one flat list, 2.2 a
    list of lists; diffusers keeps the encoder's flat list as it is."""
    parts = key.split(".")
    down, nested = parts[0] == "downsamples", parts[2] == parts[0]
    if down and not nested:
        return f"down_blocks.{parts[1]}", ".".join(parts[2:])
    count = blocks if down else blocks + 1
    level, part = (int(parts[1]), int(parts[3])) if nested else divmod(int(parts[1]), count + 1)
    name = f"resnets.{part}"
    if part == count:
        name = ("downsampler" if down else "upsampler") if nested else "upsamplers.0"
    return f"{'down' if down else 'up'}_blocks.{level}.{name}", ".".join(parts[4 if nested else 2 :])


_TEXT = {
    "token_embedding": "shared",
    **{f"blocks.*.attn.{n}": f"encoder.block.*.layer.0.SelfAttention.{n}" for n in "qkvo"},
    "blocks.*.pos_embedding.embedding": "encoder.block.*.layer.0.SelfAttention.relative_attention_bias",
    "blocks.*.norm1": "encoder.block.*.layer.0.layer_norm",
    "blocks.*.ffn.gate.0": "encoder.block.*.layer.1.DenseReluDense.wi_0",
    "blocks.*.ffn.fc1": "encoder.block.*.layer.1.DenseReluDense.wi_1",
    "blocks.*.ffn.fc2": "encoder.block.*.layer.1.DenseReluDense.wo",
    "blocks.*.norm2": "encoder.block.*.layer.1.layer_norm",
    "norm": "encoder.final_layer_norm",
}
"""Modules of umT5's encoder under Wan's names and under those of transformers."""


def transformers_text(layers: int) -> dict[str, str]:
    """Official key → transformers' key of every parameter of a text encoder of so many layers."""
    return {
        f"{ours.replace('*', str(i))}.weight": f"{theirs.replace('*', str(i))}.weight"
        for ours, theirs in _TEXT.items()
        for i in range(layers if "*" in ours else 1)
    }
