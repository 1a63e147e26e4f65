"""Adapters: every dialect against the reference implementations' merge, and what must hold of any adapter."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from test_convert_lora import part
from test_convert_program import weights

from convert import convert, lora, wan
from convert.dialects import dialect, recognised
from convert.tensors import Tensor
from fvdm_jax.lora import Adapters, merge, variables
from fvdm_jax.models.dit import DiT, DiTConfig
from fvdm_jax.program import Refusal

CONFIG = DiTConfig(64, 160, 2, 2, text_width=48, dtype="float32")
RULES = wan.dit()
FILE = Path("adapters.safetensors")
PEFT = {"r": 4, "lora_alpha": 4}
DIALECTS = {
    "diffsynth": "pusa", "diffsynth_nodefault": "diffsynth", "comfy_diffusion_model": "comfy",
    "diffusers_peft": "diffusers", "peft_raw": "peft", "kohya_musubi": "kohya", "lightx2v": "lightx2v",
    "wan_fun_double_underscore": "wan_fun",
}  # fmt: skip
"""The fixture's names for dialects, and ours."""
OTHERS = {
    "hada_w1_a": "LoHa", "lokr_w1": "LoKr", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA",
    "lora_mid.weight": "Tucker", "oft_blocks": "OFT",
}  # fmt: skip
WRITTEN = {"comfy_diffusion_model": "comfy", "diffsynth": "pusa", "peft_raw": "peft"}


@pytest.fixture(scope="module")
def base() -> dict[str, np.ndarray]:
    return weights("dit_t2v")


@pytest.fixture(scope="module")
def params(base) -> dict:
    return convert(RULES, base)


@pytest.fixture(scope="module")
def run():
    x, text = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(1, 3, 6, 8, 16), (1, 9, 48)]))
    network = jax.jit(DiT(CONFIG).apply)
    return lambda trees: network(trees, x, jnp.array([[900.0, 500.0, 20.0]]), text)


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {key: Tensor(FILE, a.dtype, a.shape, lambda a=a: a) for key, a in arrays.items()}


def read(arrays: dict[str, np.ndarray], config: dict | None = PEFT, **more) -> Adapters:
    """The adapters of a file, each piece of each plan checked against the plan."""
    tree = {}
    for array in lora.planned(tensors(arrays), RULES, CONFIG.layers, config, **more):
        pieces = [array.piece(i) for i in range(array.layers or 1)]
        whole = np.stack(pieces) if array.layers else pieces[0]
        assert (whole.shape, whole.dtype) == (array.shape, array.dtype), array.path
        tree[array.path] = whole
    nested = unflatten_dict(tree, sep="/")
    return Adapters(nested.get("low_rank", {}), nested.get("delta", {}))


@pytest.fixture(scope="module")
def adapters() -> Adapters:
    """Those with full differences too."""
    return read(part("lightx2v_diffs"))


def refused(arrays: dict[str, np.ndarray], *told: str, **more) -> None:
    with pytest.raises(Refusal) as refusal:
        read(arrays, **more)
    assert not [word for word in (str(FILE), *told) if word not in str(refusal.value)], refusal.value


def low_rank(module: str, rank: int = 3, width: int = 64, dtype=np.float32) -> dict:
    """A pair in comfy's dialect."""
    draw, key = np.random.default_rng(0), f"diffusion_model.{module}"
    return {
        f"{key}.lora_A.weight": draw.normal(size=(rank, width)).astype(dtype) / 8,
        f"{key}.lora_B.weight": draw.normal(size=(width, rank)).astype(dtype) / 8,
    }


def same(ours: dict, theirs: dict) -> None:
    assert sorted(ours) == sorted(theirs)
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype and ours[key].shape == theirs[key].shape, key
        assert ours[key].tobytes() == theirs[key].tobytes(), key


def close(ours: dict, theirs: dict) -> None:
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-6), ours, theirs)


@pytest.mark.parametrize("found, ours", DIALECTS.items())
def test_every_dialect_merges_as_the_reference_does(base, params, found, ours):
    arrays = part(found)
    assert recognised(arrays) and dialect(tensors(arrays)) == ours
    close(merge(params, read(arrays), 1.0), convert(RULES, base | part("merged")))


def test_differences_merge_as_the_reference_does(base, params):
    changed = part("merged") | part("merged_diffs_extra")
    close(merge(params, read(part("lightx2v_diffs")), 1.0), convert(RULES, base | changed))


@pytest.mark.parametrize("found", ["kohya_musubi", "lightx2v_diffs"])
def test_adapters_at_run_time_are_what_is_merged(params, run, found):
    adapters = read(part(found))
    merged, beside = run({"params": merge(params, adapters, 0.7)}), run(variables(params, [(adapters, 0.7)]))
    # Of outputs of about 1; the products are summed in another order.
    np.testing.assert_allclose(beside, merged, rtol=0, atol=1e-5)
    assert np.abs(merged - run({"params": params})).max() > 1e-2


def test_two_adapters_at_once_are_one_merged_after_the_other(params, adapters, run):
    other = read(low_rank("blocks.1.self_attn.q", rank=7) | low_rank("time_embedding.2", 2))
    beside = variables(params, [(adapters, 1.0), (other, -0.5)])
    assert beside["lora"]["blocks"]["self_attn"]["q"]["a"].shape == (2, 64, 4 + 7)
    merged = merge(merge(params, adapters, 1.0), other, -0.5)
    np.testing.assert_allclose(run(beside), run({"params": merged}), rtol=0, atol=1e-5)


def test_another_strength_compiles_nothing(params, adapters):
    traces = []

    @jax.jit
    def energy(strength):
        traces.append(strength)
        x, text = jnp.ones((1, 1, 4, 4, 16)), jnp.ones((1, 2, 48))
        beside = variables(params, [(adapters, strength)])
        return jnp.mean(DiT(CONFIG).apply(beside, x, jnp.full((1, 1), 500.0), text) ** 2)

    assert energy(jnp.float32(0.5)) != energy(jnp.float32(1.5)) and len(traces) == 1


def test_strength_nought_changes_nothing_and_what_is_not_adapted_is_not_copied(params, adapters):
    for tree in (merge(params, adapters, 0.0), variables(params, [(adapters, 0.0)])["params"]):
        jax.tree.map(np.testing.assert_array_equal, tree, params)
        assert tree["text_embedding"]["up"]["kernel"] is params["text_embedding"]["up"]["kernel"]


def test_layers_that_a_file_leaves_out_stay_as_they_are(params):
    adapters = read(low_rank("blocks.1.cross_attn.o"))
    merged = merge(params, adapters, 1.0)["blocks"]["cross_attn"]["o"]["kernel"]
    before = params["blocks"]["cross_attn"]["o"]["kernel"]
    np.testing.assert_array_equal(merged[0], before[0])
    assert np.abs(merged[1] - before[1]).max() > 1e-2
    np.testing.assert_array_equal(adapters.low_rank["blocks"]["cross_attn"]["o"]["rank"], [0, 3])


def test_ranks_may_differ_between_layers(params):
    arrays = low_rank("blocks.0.self_attn.v", 2) | low_rank("blocks.1.self_attn.v", 5)
    merged = merge(params, read(arrays), 2.0)["blocks"]["self_attn"]["v"]["kernel"]
    for i in range(2):
        a, b = (arrays[f"diffusion_model.blocks.{i}.self_attn.v.lora_{x}.weight"] for x in "AB")
        expected = params["blocks"]["self_attn"]["v"]["kernel"][i] + 2 * (b @ a).T
        np.testing.assert_allclose(merged[i], expected, rtol=0, atol=1e-6)
    same(lora.exported(read(arrays), RULES, "comfy"), arrays)


def test_a_convolution_of_patches_is_adapted_as_the_linear_layer_that_it_is(base, params):
    shapes = (3, 16, 1, 2, 2), (64, 3, 1, 1, 1)
    a, b = (np.random.default_rng(0).normal(size=s).astype(np.float32) for s in shapes)
    arrays = {f"diffusion_model.patch_embedding.lora_{x}.weight": y for x, y in {"A": a, "B": b}.items()}
    weight = base["patch_embedding.weight"] + np.einsum("or,rcfpq->ocfpq", b[..., 0, 0, 0], a)
    expected = convert(RULES, base | {"patch_embedding.weight": weight})["patch_embedding"]["kernel"]
    merged = merge(params, read(arrays), 1.0)["patch_embedding"]["kernel"]
    np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-5)
    same(lora.exported(read(arrays), RULES, "comfy"), arrays)


def test_a_stack_may_be_merged_layer_by_layer(params, adapters):
    """So that a converter need not hold more than one layer."""
    trees = params, adapters.low_rank, adapters.delta, merge(params, adapters, 0.7)
    for i in range(CONFIG.layers):
        layer, *changes, merged = (jax.tree.map(lambda a, i=i: a[i], tree["blocks"]) for tree in trees)
        close(merge(layer, Adapters(*changes), 0.7), merged)


def test_a_sum_is_rounded_once(params, adapters):
    cast = lambda tree, dtype: jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), tree)  # noqa: E731
    bf16 = cast(params, ml_dtypes.bfloat16)
    rounded = cast(merge(cast(bf16, np.float32), adapters, 0.7), ml_dtypes.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, merge(bf16, adapters, 0.7), rounded)
    beside = variables(bf16, [(adapters, 0.7)])["params"]["head"]
    jax.tree.map(np.testing.assert_array_equal, beside, rounded["head"])
    assert beside["out"]["bias"].dtype == jnp.bfloat16


@pytest.mark.parametrize("found, ours", WRITTEN.items())
def test_what_is_read_and_written_again_is_the_same_to_the_bit(found, ours):
    arrays = part(found)
    same(lora.exported(read(arrays), RULES, ours), arrays)
    if ours == "peft":
        config = lora.adapter_config(read(arrays), RULES)
        assert (config["r"], config["lora_alpha"], len(config["target_modules"])) == (4, 4, 20)


def test_bfloat16_and_alpha_come_back_to_the_bit():
    arrays = low_rank("blocks.0.ffn.0", dtype=ml_dtypes.bfloat16)
    arrays["diffusion_model.blocks.0.ffn.0.lora_B.weight"] = np.ones((160, 3), ml_dtypes.bfloat16)
    for alpha in (1.0, 2.0, 8.0, 0.3, 1.5):
        arrays["diffusion_model.blocks.0.ffn.0.alpha"] = np.array(alpha, np.float32)
        same(lora.exported(read(arrays), RULES, "comfy"), arrays)


def test_every_dialect_that_is_written_means_the_same(params):
    adapters = read(part("kohya_musubi"))
    adapters.low_rank["blocks"]["ffn"]["up"]["scale"][1] = 0.25
    expected = merge(params, adapters, 1.0)
    for name in ("comfy", "pusa", "peft"):
        again = read(lora.exported(adapters, RULES, name), config=lora.adapter_config(adapters, RULES))
        close(merge(params, again, 1.0), expected)


def test_differences_are_written_where_the_dialect_has_them(adapters):
    written = lora.exported(adapters, RULES, "comfy")
    differences = {k: v for k, v in part("lightx2v_diffs").items() if ".diff" in k}
    assert len(differences) == 5
    same({key: array for key, array in written.items() if ".diff" in key}, differences)
    for name, told in {"pusa": "difference of", "peft": "difference of", "kohya": "comfy, pusa"}.items():
        with pytest.raises(Refusal, match=told):
            lora.exported(adapters, RULES, name)
    with pytest.raises(KeyError, match="self_attn/q/kernel"):
        lora.exported(adapters, RULES[:9], "comfy")


def test_peft_scales_by_its_configuration():
    arrays = {
        key.replace("diffusion_model", "base_model.model"): array
        for module in ("blocks.0.self_attn.q", "blocks.1.self_attn.q", "text_embedding.0")
        for key, array in low_rank(module, 4, 64 if "blocks" in module else 48).items()
    }
    arrays["base_model.model.text_embedding.0.lora_B.weight"] = np.ones((64, 4), np.float32)
    config = {"lora_alpha": 8, "alpha_pattern": {"blocks.1.self_attn.q": 6}}
    layer = read(arrays, config).low_rank["blocks"]["self_attn"]["q"]
    np.testing.assert_array_equal(layer["scale"], [2, 1.5])
    assert read(arrays, {"lora_alpha": 8, "use_rslora": True}).low_rank["text_embedding"]["up"]["scale"] == 4
    refused(arrays, "adapter_config.json", config=None)
    refused(arrays, "DoRA", config={"use_dora": True})
    for wrong in ("8", float("nan"), None, True, 10**400):
        refused(arrays, "lora_alpha", config={"lora_alpha": wrong})
    for wrong in ([1], {r"blocks\..*": 2}):
        refused(arrays, "alpha_pattern", config={"alpha_pattern": wrong})


def test_diffusers_configuration_lies_in_the_header():
    header = {"lora_adapter_metadata": '{"transformer.r": 4, "transformer.lora_alpha": 2, "text.r": 1}'}
    config = lora.header_config(FILE, header)
    assert config == {"r": 4, "lora_alpha": 2}
    layer = read(part("diffusers_peft"), config).low_rank["blocks"]["self_attn"]["q"]
    np.testing.assert_array_equal(layer["scale"], [0.5, 0.5])
    assert lora.header_config(FILE, {"format": "pt"}) is None
    for damaged in ("{", "[1]", "7"):
        with pytest.raises(Refusal, match="damaged"):
            lora.header_config(FILE, {"lora_adapter_metadata": damaged})


def test_of_a_file_for_both_experts_one_is_chosen():
    high = part("diffusers_peft")
    low = {key.replace("transformer.", "transformer_2."): 2 * array for key, array in high.items()}
    refused(high | low, "transformer_2", "choose")
    for expert, arrays in {"transformer": high, "transformer_2": low}.items():
        jax.tree.map(np.testing.assert_array_equal, read(high | low, expert=expert), read(arrays))


def test_kohyas_modules_may_keep_their_dots():
    plain = part("kohya_musubi")
    dotted = {key.replace("_self_attn_k", ".self_attn.k"): array for key, array in plain.items()}
    jax.tree.map(np.testing.assert_array_equal, read(dotted), read(plain))
    refused(plain | dotted, "changes the same as", "self_attn.k")


def test_every_refusal_names_its_key():
    good, key = low_rank("blocks.0.self_attn.q"), "diffusion_model.blocks.0.self_attn.q"
    a, b = good[f"{key}.lora_A.weight"], good[f"{key}.lora_B.weight"]
    refused({f"{key}.lora_A.weight": a}, f"{key}.lora_A.weight", "lora_B.weight")
    refused({f"{key}.lora_B.weight": b}, f"{key}.lora_B.weight", "lora_A.weight")
    refused({f"{key}.alpha": np.float32(1)} | low_rank("blocks.1.ffn.0"), f"{key}.alpha", "lora_A.weight")
    refused(good | {f"{key}.lora_B.weight": b[:, :2]}, f"{key}.lora_B.weight", "rank 2", "3")
    refused(good | {f"{key}.lora_B.weight": b[None]}, f"{key}.lora_B.weight", "(1, 64, 3)")
    refused({k: v[:0] if "A" in k else v[:, :0] for k, v in good.items()}, key, "above 0")
    refused(good | {f"{key}.lora_A.weight": a.astype(np.int8)}, f"{key}.lora_A.weight", "int8")
    refused(good | {f"{key}.alpha": np.ones(2, np.float32)}, f"{key}.alpha", "one number")
    refused(good | {f"{key}.alpha": np.float32("nan")}, f"{key}.alpha", "nan")
    refused(good | {f"{key}.strange": a}, f"{key}.strange", "is no key of an adapter")
    refused(good | low_rank("blocks.1.self_attn.q", width=48), "blocks.1.self_attn.q", "48")
    for module in "blocks.2.ffn.0 blocks.0.cross_attn.k_img blocks.00.ffn.0 blocks.0.norm3 blocks".split():
        refused(low_rank(module), f"diffusion_model.{module}.", "the network does not have")
    refused(good | {"diffusion_model.head.diff": a}, "diffusion_model.head.diff", "the network does not have")
    refused(part("kohya_musubi") | good, "another dialect", key)
    refused({"transformer.blocks.0.attn3.to_q.lora_A.weight": a}, "attn3.to_q", "the network does not have")


def test_adapters_of_other_kinds_are_refused_by_name():
    for ending, kind in OTHERS.items():
        arrays = {f"lora_unet_blocks_0_self_attn_q.{ending}": np.ones((4, 4), np.float32)}
        assert recognised(arrays)
        refused(arrays, kind, ending)


def test_a_checkpoint_is_not_taken_for_adapters(base):
    assert not any(map(recognised, (base, [], ["clip.alpha"]))) and not lora.planned({}, RULES, 2)


def test_a_piece_reads_its_own_layer_and_a_plan_reads_nothing():
    found, seen = tensors(part("kohya_musubi")), []
    watched = {k: t._replace(read=lambda k=k, t=t: (seen.append(k), t.read())[1]) for k, t in found.items()}
    plans = {array.path: array for array in lora.planned(watched, RULES, CONFIG.layers)}
    assert len(plans) == 40 and not seen
    plans["low_rank/blocks/ffn/down/a"].piece(1)
    assert seen == ["lora_unet_blocks_1_ffn_2.lora_down.weight"]


def test_an_adapter_of_another_network_is_refused_by_its_module(params, adapters):
    wider = jax.tree.map(lambda leaf: np.pad(leaf, [(0, 1)] * leaf.ndim), params)
    up, bias = adapters.low_rank["blocks"]["ffn"]["up"], {"bias": np.ones(3)}
    cases = [
        (wider, adapters.low_rank, {}, r"blocks/(self|cross)_attn/\w: a is \(2, 64, 4\)"),
        (wider, {}, adapters.delta, "the difference is"),
        (params, {"nowhere": up}, {}, "nowhere: the network has no such layer"),
        (params, {}, {"nowhere": bias}, "nowhere/bias: the network has no such parameter"),
        (params, {"blocks": {"ffn": {"up": {"a": up["a"]}}}}, {}, "ffn/up: the adapter lacks b, scale"),
        (params, {"blocks": {"ffn": {"up": up | {"scale": np.ones(3)}}}}, {}, r"ffn/up: .*scale \(3,\)"),
    ]
    for network, pairs, deltas, told in cases:
        with pytest.raises(ValueError, match=told):
            merge(network, Adapters(pairs, deltas), 1.0)
        with pytest.raises(ValueError, match=told):
            variables(network, [(Adapters(pairs, deltas), 1.0)])
