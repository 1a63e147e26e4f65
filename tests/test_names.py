"""The names that other programs give to the networks' modules."""

import pytest

from convert import names, wan


def test_names_of_diffusers_are_a_bijection():
    """Held against all published files' keys when the table was made."""
    sources = [rule.source.replace("*", "7") for rule in wan.dit(image=True, positions=True)]
    theirs = [names.diffusers(source) for source in sources]
    assert len(set(theirs)) == len(sources) == 24 + 32 and [names.official(key) for key in theirs] == sources
    pairs = {
        "blocks.11.norm3.bias": "blocks.11.norm2.bias",
        "blocks.0.cross_attn.o.weight": "blocks.0.attn2.to_out.0.weight",
        "blocks.0.modulation": "blocks.0.scale_shift_table",
        "head.modulation": "scale_shift_table",
        "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
        "time_projection.1.bias": "condition_embedder.time_proj.bias",
    }
    for ours, key in pairs.items():
        assert names.diffusers(ours) == key and names.official(key) == ours
    for unknown in ("blocks.0.norm3.bias", "blocks.x.attn1.to_q.weight", "blocks", "", "head.head.weight"):
        with pytest.raises(KeyError):
            names.official(unknown)
