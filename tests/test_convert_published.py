"""The published models by their headers alone: every key and shape, and every repository's shards."""

import gzip
import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from convert import back, families, hub, plans, write
from convert.__main__ import main
from convert.sources import Part
from convert.table import plan
from convert.tensors import Tensor
from fvdm_jax.program import Refusal

PUBLISHED = json.loads(gzip.decompress((Path(__file__).parent / "golden/published.json.gz").read_bytes()))
NAMES = {
    "wan21_t2v_1_3B": "wan_1_3b", "wan21_t2v_14B": "wan_14b", "wan21_i2v_14B": "wan_14b_i2v",
    "wan21_flf2v_14B": "wan_14b_flf2v", "wan22_t2v_A14B": "wan_14b", "wan22_i2v_A14B": "wan_a14b_i2v",
    "wan22_ti2v_5B": "wan_5b", "t2v14B_model.prefix": "wan_14b", "umt5_xxl_enc": "umt5_xxl",
    "vae21": "vae_2_1", "vae22": "vae_2_2", "clip": "clip_vit_h", "diffusers_t2v_1_3B": "wan_1_3b",
    "diffusers_t2v_14B": "wan_14b", "diffusers_i2v_14B": "wan_14b_i2v",
    "diffusers_flf2v_14B": "wan_14b_flf2v",
    "diffusers_i2v_A14B": "wan_a14b_i2v", "diffusers_ti2v_5B": "wan_5b", "diffusers_vae21": "vae_2_1",
    "diffusers_vae22": "vae_2_2", "hf_umt5": "umt5_xxl",
}  # fmt: skip
KEPT = {"clip": 611_086_080, "hf_umt5": 5_680_910_336}
"""Parameters that we keep where not all are used: without the text tower, and the embedding once."""


def tensors(name: str, dtype=np.float32) -> dict[str, Tensor]:
    shapes = PUBLISHED["models"][name]["shapes"]
    return {
        key: Tensor(Path(name), np.dtype(dtype), tuple(shape), lambda: None) for key, shape in shapes.items()
    }


def test_every_published_model_is_here():
    assert NAMES.keys() == PUBLISHED["models"].keys() and len(NAMES) == 21


@pytest.mark.parametrize("name", NAMES)
def test_a_published_model_is_planned_from_its_header(tmp_path, capsys, name):
    """A sparse file: header and size of the real one, and no data."""
    every = tensors(name)
    path = tmp_path / "model.safetensors"
    path.write_bytes(write.header(every))
    os.truncate(path, path.stat().st_size + sum(tensor.bytes for tensor in every.values()))
    main([str(path), str(tmp_path / "out"), "--dry-run"])
    said, count = capsys.readouterr().out, KEPT.get(name, PUBLISHED["models"][name]["params"])
    assert f": {NAMES[name]}," in said and f" {count:,} parameters" in said


SAMPLED = {
    "wan21_t2v_1_3B": ((8.0, 6.0, 50, None), "dit"), "wan21_t2v_14B": ((5.0, 5.0, 50, None), "dit"),
    "wan21_i2v_14B": ((3.0, 5.0, 40, None), "dit"), "wan21_flf2v_14B": ((16.0, 5.0, 50, None), "dit"),
    "wan22_ti2v_5B": ((5.0, 5.0, 50, None), "dit"),
    "wan22_t2v_A14B": ((12.0, (4.0, 3.0), 40, 0.875), "dit_high"),
    "wan22_i2v_A14B": ((5.0, 3.5, 40, 0.9), "dit_low"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLED)
def test_a_model_is_sampled_as_its_authors_do(name):
    """Shift, guidance, steps and boundary, as in Wan's generate.py and wan/configs."""
    wanted, part = SAMPLED[name]
    family = families.recognise(Part(Path(name), tensors(name), (), {}, {}))
    said = plans.config([plans.Network(part, family, [], None)])["sampling"]
    assert tuple(said.get(what) for what in ("shift", "guidance", "steps", "boundary")) == wanted
    assert said["process"] == "flow" and "schedule" not in said


SHARDS = {
    "T2V-14B official": ("wan21_t2v_14B", "official"),
    "TI2V-5B official": ("wan22_ti2v_5B", "official"),
    "I2V-14B official": ("wan21_i2v_14B", "official"),
    "FLF2V-14B official": ("wan21_flf2v_14B", "official"),
    "I2V-A14B official": ("wan22_i2v_A14B", "official"),
    "T2V-1.3B diffusers": ("wan21_t2v_1_3B", "diffusers"),
    "T2V-A14B diffusers": ("wan21_t2v_14B", "diffusers"),
    "T2V-1.3B text_encoder": ("umt5_xxl_enc", "diffusers"),
    "T2V-A14B text_encoder": ("umt5_xxl_enc", "diffusers"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARDS)
def test_what_goes_out_has_the_published_shards(name):
    """To the byte in size, and the same tensors in each."""
    model, layout = SHARDS[name]
    every = tensors(model, ml_dtypes.bfloat16 if name == "T2V-A14B text_encoder" else np.float32)
    family = families.recognise(Part(Path(name), every, (), {}, {}))
    arrays = plan(family.rules, family.tensors, **family.sizes)
    shards = back.shards(family._replace(tensors={array.path: array for array in arrays}), layout)
    wanted = PUBLISHED["shards"][name]
    assert [[*list(s)[:: max(1, len(s) - 1)], len(s)] for s in shards] == wanted["ends"]
    for shard, size in zip(shards, wanted["sizes"], strict=True):
        ordered = dict(sorted(shard.items()))
        assert len(write.header(ordered)) + sum(t.bytes for t in ordered.values()) == size


def test_the_hub_is_asked_only_for_what_is_not_here(monkeypatch, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def download(repo_id, revision, allow_patterns, local_files_only=False, cache_dir=None):
        # One file is kept apart from whole repositories.
        assert (cache_dir is not None) == (len(allow_patterns) == 1)
        asked.append((repo_id, revision, local_files_only))
        if repo_id == "a/here" or not local_files_only and repo_id == "a/there":
            return str(tmp_path)
        raise LocalEntryNotFoundError("not here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.place("a/here@v1") == tmp_path and asked == [("a/here", "v1", True)]
    assert hub.place("a/there") == tmp_path and asked[1:] == [
        ("a/there", None, True),
        ("a/there", None, False),
    ]
    with pytest.raises(Refusal, match="hf:a/nowhere: cannot be had"):
        hub.place("a/nowhere")
    asked.clear()
    with pytest.raises(Refusal, match="hf:a/there/lora/x.safetensors: has no file lora/x.safetensors"):
        hub.place("a/there/lora/x.safetensors")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "x.safetensors").touch()
    asked.clear()
    assert hub.place("a/here@v1/lora/x.safetensors") == tmp_path / "lora" / "x.safetensors"
    assert asked == [("a/here", "v1", True)]
