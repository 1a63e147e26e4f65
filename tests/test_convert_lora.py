"""LoRAs through the programs: adapters made, merged, sampled with, and given back."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from test_convert_program import contents, convert, put, tree, weights

from convert import convert as converted
from convert import wan
from fvdm_jax import checkpoint, lora
from fvdm_jax.flags import TINY
from fvdm_jax.program import Refusal

EVERY = load_file(Path(__file__).parent / "golden/lora_dialects.safetensors")
DIALECTS = sorted({key.split("/")[0] for key in EVERY if not key.startswith("merged")})


def part(name: str) -> dict[str, np.ndarray]:
    return {key.partition("/")[2]: np.array(a) for key, a in EVERY.items() if key.split("/")[0] == name}


def params() -> dict:
    return converted(wan.dit(), weights("dit_t2v"), p=2, q=2)


def merged(name: str) -> dict[str, np.ndarray]:
    """The weights that the fixture expects of a dialect, as our tree."""
    changed = weights("dit_t2v") | part("merged")
    changed |= part("merged_diffs_extra") if name == "lightx2v_diffs" else {}
    return flatten_dict(converted(wan.dit(), changed, p=2, q=2), sep="/")


def near(found: dict, wanted: dict) -> bool:
    return found.keys() == wanted.keys() and all(np.abs(found[k] - wanted[k]).max() < 1e-6 for k in wanted)


def saved(folder: Path, name: str) -> Path:
    """The file of a dialect; peft's has its config beside it, and its alpha is in B already."""
    path = put(folder, part(name), None, "lora.safetensors")
    if name == "peft_raw":
        (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4, "r": 4}))
    return path


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_becomes_adapters_and_is_merged(tmp_path, name):
    path = saved(tmp_path / "lora", name)
    convert(path, tmp_path / "adapters", "--verify")
    convert(put(tmp_path / "base", weights("dit_t2v")), tmp_path / "model", "--lora", path)
    assert near(tree(tmp_path / "model/dit"), merged(name))
    adapters = checkpoint.load_adapters(tmp_path / "adapters", params())
    assert near(
        flatten_dict(jax.tree.map(np.asarray, lora.merge(params(), adapters, 1.0)), sep="/"), merged(name)
    )


def test_a_strength_scales_what_is_merged(tmp_path):
    path, base = saved(tmp_path / "lora", "kohya_musubi"), put(tmp_path / "base", weights("dit_t2v"))
    convert(base, tmp_path / "half", "--lora", f"{path}:0.5")
    convert(base, tmp_path / "twice", "--lora", f"{path}:0.25", "--lora", f"{path}:0.25")
    start = flatten_dict(params(), sep="/")
    wanted = {key: (start[key] + a) / 2 for key, a in merged("kohya_musubi").items()}
    assert near(tree(tmp_path / "half/dit"), wanted) and near(tree(tmp_path / "twice/dit"), wanted)


BACK = {
    "comfy_diffusion_model": "comfy", "lightx2v_diffs": "comfy", "diffsynth": "pusa", "peft_raw": "peft",
}  # fmt: skip


@pytest.mark.parametrize(("name", "layout"), BACK.items())
def test_adapters_go_out_and_come_in_again(tmp_path, name, layout):
    convert(saved(tmp_path / "lora", name), tmp_path / "adapters")
    convert(tmp_path / "adapters", tmp_path / "out", "--to", layout)
    (path,) = (tmp_path / "out").glob("*.safetensors")
    if name != "lightx2v_diffs":
        given, found = part(name), load_file(path)
        assert found.keys() == given.keys() and all(np.array_equal(found[k], given[k]) for k in given)
    convert(path, tmp_path / "again")
    first, second = (contents(tmp_path / where / "adapters") for where in ("adapters", "again"))
    assert first == second


def test_a_lora_of_another_network_is_refused(tmp_path):
    path = saved(tmp_path / "lora", "diffsynth")
    convert(path, tmp_path / "adapters")
    _, tiny = checkpoint.load(TINY, ("dit",))
    with pytest.raises(Refusal, match="does not fit the model"):
        checkpoint.load_adapters(tmp_path / "adapters", tiny["dit"])
    with pytest.raises(Refusal, match="does not fit"):
        convert(put(tmp_path / "base", weights("dit_ti2v") | wide()), tmp_path / "model", "--lora", path)
    with pytest.raises(Refusal, match="no dit_low among dit"):
        convert(put(tmp_path / "base", weights("dit_t2v")), tmp_path / "model", "--lora", f"low={path}")
    with pytest.raises(Refusal, match="is no LoRA"):
        base = put(tmp_path / "base", weights("dit_t2v"))
        convert(base, tmp_path / "model", "--lora", base)
    assert not (tmp_path / "model").exists()


def test_a_lora_that_is_not_finite_is_refused(tmp_path):
    """By itself, and merged, where its network is not to blame."""
    tensors = part("diffsynth")
    tensors["blocks.1.ffn.0.lora_B.default.weight"][2, 1] = np.inf
    path, base = put(tmp_path / "lora", tensors, None), put(tmp_path / "base", weights("dit_t2v"))
    with pytest.raises(Refusal, match="low_rank/blocks/ffn/up/b of layer 1 holds NaN or infinity"):
        convert(path, tmp_path / "adapters")
    with pytest.raises(Refusal, match="--lora: blocks/ffn/up/kernel of layer 1 holds NaN or infinity"):
        convert(base, tmp_path / "model", "--lora", path)
    assert {each.name for each in tmp_path.iterdir()} == {"lora", "base"}


def wide() -> dict[str, np.ndarray]:
    """Feed-forward layers of another width."""
    zeros = {"0.weight": (96, 64), "0.bias": (96,), "2.weight": (64, 96)}
    return {f"blocks.{i}.ffn.{k}": np.zeros(s, np.float32) for i in range(2) for k, s in zeros.items()}


@pytest.mark.thorough
def test_the_sampler_runs_with_adapters(tmp_path):
    """Of the bundled model: at strength 0 as without, at others not; an unknown folder is refused early."""
    from fvdm_jax.commands import parse
    from fvdm_jax.sample import main

    rng, sizes = np.random.default_rng(0), checkpoint.describe(TINY).dit
    down = {
        f"blocks.{i}.self_attn.q.lora_A.weight": rng.normal(size=(4, sizes.width)).astype(np.float32)
        for i in range(sizes.layers)
    }
    up = {key.replace("_A", "_B"): rng.normal(size=(sizes.width, 4)).astype(np.float32) for key in down}
    save_file(down | up, tmp_path / "lora.safetensors")
    convert(tmp_path / "lora.safetensors", tmp_path / "adapters")
    pictures = {}
    for strength in ("none", "0", "1"):
        out = tmp_path / f"{strength}.mp4"
        given = [] if strength == "none" else ["--lora", f"{tmp_path / 'adapters'}:{strength}"]
        main(["--frames", "5", "--steps", "2", "--size", "48x48", "--out", str(out), *given])
        pictures[strength] = load_file(out.with_suffix(".latents.safetensors"))["latents"]
    assert np.array_equal(pictures["none"], pictures["0"])
    assert not np.allclose(pictures["none"], pictures["1"], atol=1e-2)
    with pytest.raises(Refusal, match="no folder with adapters; make it: python -m convert"):
        parse(["--lora", str(tmp_path / "lora.safetensors")])
