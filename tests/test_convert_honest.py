"""What must not go wrong without a word: other sources, other flags, other numbers, damage."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_convert_lora import part, saved
from test_convert_program import CONFIG, convert, eighths, equal, expected, put, tree, weights

from fvdm_jax.defaults import defaults
from fvdm_jax.flags import TINY
from fvdm_jax.program import Refusal

Q = "blocks/self_attn/q/kernel"


def test_complete_means_made_of_this_in_this_way(tmp_path):
    path = put(tmp_path / "in", weights("dit_t2v"))
    loras = [saved(tmp_path / name, name) for name in ("diffsynth", "kohya_musubi")]
    convert(path, tmp_path / "out", "--lora", loras[0])
    convert(path, tmp_path / "out", "--lora", loras[0])
    for flags in (
        [],
        ["--lora", loras[1]],
        ["--lora", f"{loras[0]}:0.5"],
        ["--dtype", "float16", "--lora", loras[0]],
    ):
        with pytest.raises(Refusal, match="something else"):
            convert(path, tmp_path / "out", *flags)
    other = weights("dit_t2v")
    other["blocks.0.modulation"][0, 0, 0] += 1
    put(tmp_path / "in", other)
    with pytest.raises(Refusal, match="something else"):
        convert(path, tmp_path / "out", "--lora", loras[0])
    put(tmp_path / "in", weights("dit_t2v"), CONFIG | {"num_heads": 4})
    with pytest.raises(Refusal, match="something else"):
        convert(path, tmp_path / "out", "--lora", loras[0])


def test_merging_and_a_type_round_once(tmp_path):
    """Two LoRAs into bfloat16: of the exact float32 sum."""
    path, lora = put(tmp_path / "in", weights("dit_t2v")), saved(tmp_path / "lora", "diffsynth")
    once, (a, b) = expected("dit_t2v")[Q], (
        np.stack([part("diffsynth")[f"blocks.{i}.self_attn.q.lora_{x}.default.weight"].T for i in range(2)])
        for x in "AB"
    )  # fmt: skip
    exact = once + 0.75 * (a.astype(np.float64) @ b.astype(np.float64))
    convert(path, tmp_path / "out", "--lora", f"{lora}:0.5", "--lora", f"{lora}:0.25", "--dtype", "bfloat16")
    found = tree(tmp_path / "out/dit")[Q]
    assert np.mean(found != exact.astype(np.float32).astype(ml_dtypes.bfloat16)) < 1e-3
    twice = (once + 0.5 * (a @ b)).astype(ml_dtypes.bfloat16).astype(np.float32) + 0.25 * (a @ b)
    assert np.mean(twice.astype(ml_dtypes.bfloat16) != found) > 0.01


def test_eight_bits_scaled_into_float32_are_not_rounded(tmp_path):
    tensors = eighths(weights("dit_t2v"), scaled=True)
    convert(put(tmp_path / "in", tensors), tmp_path / "out", "--dtype", "float32")
    name = "blocks.1.self_attn.q"
    exact = tensors[f"{name}.weight"].astype(np.float32) * tensors[f"{name}.scale_weight"]
    assert np.array_equal(tree(tmp_path / "out/dit")[Q][1], exact.T)
    prefixed = {f"model.diffusion_model.{key}": array for key, array in tensors.items()}
    convert(put(tmp_path / "prefixed", prefixed), tmp_path / "again", "--dtype", "float32")
    assert equal(tree(tmp_path / "again/dit"), tree(tmp_path / "out/dit"))


def test_clip_beside_a_transformer_does_not_take_its_heads(tmp_path):
    put(tmp_path / "in", weights("dit_t2v"), CONFIG | {"dim": 63})
    path = put(
        tmp_path / "in", {f"visual.{k}": a for k, a in weights("clip").items()}, None, "clip.safetensors"
    )
    with pytest.raises(Refusal, match="number of heads"):
        convert(path, tmp_path / "out")


def test_damage_is_no_zeros(tmp_path):
    convert(put(tmp_path / "in", weights("dit_t2v")), tmp_path / "out")
    chunk = tmp_path / "out/dit/blocks.ffn.up.kernel/0.0.0"
    whole = chunk.read_bytes()
    chunk.unlink()
    with pytest.raises(Refusal, match="damaged"):
        convert(tmp_path / "out", tmp_path / "back", "--to", "official")
    chunk.write_bytes(whole[:-1])
    with pytest.raises(Refusal, match="damaged"):
        convert(tmp_path / "in/model.safetensors", tmp_path / "out", "--verify")
    shutil.rmtree(tmp_path / "out/dit/blocks.ffn.up.kernel")
    with pytest.raises(Refusal):
        convert(tmp_path / "out", tmp_path / "back", "--to", "official")
    (tmp_path / "out/config.json").write_text("{}")
    with pytest.raises(Refusal, match="no checkpoint that convert has made"):
        convert(tmp_path / "out", tmp_path / "back", "--to", "official")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("flags", [
    ["--lora", "x"], ["--dtype", "float16"], ["--as", "wan_14b"], ["--verify"], ["--config", "c.json"],
])  # fmt: skip
def test_a_flag_without_effect_is_refused(tmp_path, flags):
    with pytest.raises(Refusal, match="no effect with --to"):
        convert(tmp_path, tmp_path / "out", "--to", "official", *flags)


@pytest.mark.parametrize("strength", ["nan", "inf", "101", "1e3"])
def test_a_strength_beyond_reason_is_refused(tmp_path, strength):
    lora, path = saved(tmp_path / "lora", "diffsynth"), put(tmp_path / "in", weights("dit_t2v"))
    with pytest.raises(Refusal, match="-100 to 100"):
        convert(path, tmp_path / "out", "--lora", f"{lora}:{strength}")


def test_two_files_are_two_experts_where_the_user_says_so(tmp_path):
    path, lora = put(tmp_path / "in", weights("dit_t2v")), saved(tmp_path / "lora", "diffsynth")
    convert(f"high={path}", f"low={path}", tmp_path / "out", "--lora", f"low={lora}")
    assert equal(tree(tmp_path / "out/dit_high"), expected("dit_t2v"))
    assert not np.array_equal(tree(tmp_path / "out/dit_low")[Q], expected("dit_t2v")[Q])
    sampling = json.loads((tmp_path / "out/config.json").read_text())["sampling"]
    assert (sampling["guidance"], sampling["boundary"], sampling["shift"]) == ([4.0, 3.0], 0.875, 12.0)
    convert(tmp_path / "out", tmp_path / "back", "--to", "diffusers")
    index = json.loads((tmp_path / "back/model_index.json").read_text())
    assert index["boundary_ratio"] == 0.875 and "vae" not in index
    with pytest.raises(Refusal, match="has no vae and no text; convert dit_high, dit_low, vae, text"):
        defaults(tmp_path / "out")


NUMBERS = {"num_heads": ["12", 0, -2, 1.5, 7, [2], 10**30, True], "num_layers": ["2", 0], "text_len": ["a"]}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in NUMBERS.items() for v in values])
def test_a_config_with_odd_numbers_is_refused(tmp_path, name, value):
    kind = "umt5" if name == "text_len" else "dit_t2v"
    with pytest.raises(Refusal):
        convert(put(tmp_path / "in", weights(kind), CONFIG | {name: value}), tmp_path / "out")


SHAPES = {
    "umt5": {"token_embedding.weight": (384,), "blocks.0.pos_embedding.embedding.weight": (32, 0)},
    "dit_t2v": {"head.modulation": (1, 2, 0), "blocks.99999999999.modulation": (1, 6, 64)},
    "clip": {"patch_embedding.weight": (64, 3)},
    "vae21": {"encoder.conv1.weight": (6,)},
}


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, keys in SHAPES.items() for key in keys])
def test_odd_shapes_and_layers_without_end_are_refused(tmp_path, kind, key):
    tensors = weights(kind) | {key: np.zeros(SHAPES[kind][key], np.float32)}
    with pytest.raises(Refusal):
        convert(put(tmp_path / "in", tensors), tmp_path / "out")
    lora = part("diffsynth") | {
        "blocks.99999999999.ffn.0.lora_A.default.weight": np.zeros((4, 64), np.float32)
    }
    with pytest.raises(Refusal, match="adapts layer 99999999999"):
        convert(put(tmp_path / "lora", lora, None), tmp_path / "out")


@pytest.mark.thorough
def test_parts_of_two_models_are_told_of_and_not_sampled(tmp_path, capsys):
    paths = [put(tmp_path / name, weights(name)) for name in ("dit_t2v", "umt5", "vae22")]
    convert(*paths, tmp_path / "out")
    said = capsys.readouterr().out
    assert "of two models" in said and "no tokenizer lies there" in said
    with pytest.raises(Refusal, match="of two models"):
        defaults(tmp_path / "out")
    convert(put(tmp_path / "i2v", weights("dit_i2v")), *paths[1:], tmp_path / "other")
    with pytest.raises(Refusal, match="no clip, with which its transformer looks at pictures"):
        defaults(tmp_path / "other")
    convert(paths[2], tmp_path / "vae")
    with pytest.raises(Refusal, match="no dit and no text"):
        defaults(tmp_path / "vae")
    with pytest.raises(Refusal, match="checkpoint of ours already"):
        convert(tmp_path / "vae", tmp_path / "again")
    assert defaults(TINY).channels == 16


def test_a_lora_of_trainers_and_of_eight_bits(tmp_path):
    """Prefixes that trainers leave, and fp8 as it is widened."""
    plain = part("diffsynth")
    convert(put(tmp_path / "plain", plain, None), tmp_path / "out")
    for prefix in ("pipe.dit.", "module.", "_forward_module."):
        convert(
            put(tmp_path / prefix, {prefix + k: a for k, a in plain.items()}, None), tmp_path / f"out{prefix}"
        )
        assert equal(tree(tmp_path / f"out{prefix}/adapters"), tree(tmp_path / "out/adapters"))
    small = {key: array.astype(ml_dtypes.float8_e4m3fn) for key, array in plain.items()}
    convert(put(tmp_path / "small", small, None), tmp_path / "outsmall")
    found = tree(tmp_path / "outsmall/adapters")["low_rank/blocks/self_attn/q/a"]
    assert np.array_equal(found[0].T, small["blocks.0.self_attn.q.lora_A.default.weight"].astype(np.float32))
    convert(tmp_path / "outsmall", tmp_path / "back", "--to", "pusa")
    assert len(load_file(tmp_path / "back/pusa.safetensors")) == len(plain)


def test_a_lora_for_both_experts_is_taken_for_the_one_that_is_named(tmp_path):
    rng, tensors = np.random.default_rng(0), {}
    for expert in ("transformer", "transformer_2"):
        for half, shape in (("A", (4, 64)), ("B", (64, 4))):
            key = f"{expert}.blocks.0.attn1.to_q.lora_{half}.weight"
            tensors[key] = rng.normal(size=shape).astype(np.float32)
    path = put(tmp_path / "in", tensors, None)
    with pytest.raises(Refusal, match="adapts both experts.*high=FILE"):
        convert(path, tmp_path / "out")
    for said, expert in (("high", "transformer"), ("low", "transformer_2")):
        convert(f"{said}={path}", tmp_path / said)
        found = tree(tmp_path / said / "adapters")["low_rank/blocks/self_attn/q/a"]
        assert np.array_equal(found[0].T, tensors[f"{expert}.blocks.0.attn1.to_q.lora_A.weight"])
    with pytest.raises(Refusal, match="something else"):
        convert(f"low={path}", tmp_path / "high")
