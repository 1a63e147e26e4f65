"""`python -m convert` from end to end: what it takes, what it refuses, and what it leaves behind."""

import json
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from convert import wan, write
from convert.__main__ import main
from convert.table import unplan
from convert.tensors import Planned
from fvdm_jax import checkpoint, defaults, sharding
from fvdm_jax.flags import TINY
from fvdm_jax.models import dit
from fvdm_jax.models.dit import DiTConfig
from fvdm_jax.program import Refusal

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests/golden"
CONFIG = {"num_heads": 2, "num_layers": 2}
SIZE = DiTConfig(64, 160, 2, 2, text_width=48, dtype="float32")


def weights(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key[2:]: np.ascontiguousarray(arrays[key]) for key in arrays if key.startswith("w/")}


def put(folder: Path, tensors: dict, config: dict | None = CONFIG, name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder / name


def convert(*arguments) -> None:
    main([str(argument) for argument in arguments])


def tree(folder: Path) -> dict[str, np.ndarray]:
    return flatten_dict(checkpoint.restore_tree(folder), sep="/")


def expected(name: str) -> dict[str, np.ndarray]:
    from convert import convert as converted

    return flatten_dict(converted(wan.dit(), weights(name), p=2, q=2), sep="/")


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return put(tmp_path_factory.mktemp("source"), weights("dit_t2v"))


@pytest.fixture(scope="module")
def model(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("model") / "out"
    convert(source, out)
    return out


def test_the_tree_and_the_config_are_those_of_the_network(model):
    """Whose outputs the goldens of tests/test_dit.py hold to Wan's own."""
    stored = json.loads((model / "config.json").read_text())["dit"]
    assert DiTConfig(**stored | {"dtype": "float32"}) == SIZE
    assert equal(tree(model / "dit"), expected("dit_t2v"))


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "model.", "module."])
def test_prefixes_that_all_keys_carry_are_taken_off(tmp_path, model, prefix):
    tensors = {prefix + key: array for key, array in weights("dit_t2v").items()}
    convert(put(tmp_path, tensors), tmp_path / "out")
    assert equal(tree(tmp_path / "out/dit"), tree(model / "dit"))


def test_equal_input_gives_equal_bytes(tmp_path, source, model):
    convert(source, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(model)


def test_it_is_restored_by_orbax_onto_a_mesh(model):
    import orbax.checkpoint as ocp

    abstract = dit.abstract(SIZE)
    over = sharding.mesh(fsdp=4, tensor=2)
    target = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        nn.meta.unbox(abstract), sharding.shardings(over, abstract),
    )  # fmt: skip
    params = ocp.StandardCheckpointer().restore(model / "dit", target)
    kernel = params["blocks"]["ffn"]["up"]["kernel"]
    assert len({str(shard.index) for shard in kernel.addressable_shards}) == 8
    assert equal(jax.tree.map(np.asarray, flatten_dict(params, sep="/")), expected("dit_t2v"))


@pytest.mark.thorough
@pytest.mark.parametrize("layout", ["official", "diffusers"])
@pytest.mark.parametrize("name", ["dit_t2v", "dit_i2v", "dit_flf2v", "dit_ti2v", "vae21", "vae22", "umt5"])
def test_what_goes_out_comes_in_again_bit_for_bit(tmp_path, name, layout):
    """Under other names too: diffusers' and transformers', whose keys the goldens do not have."""
    tensors = weights(name)
    convert(put(tmp_path / "in", tensors), tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "out", "--to", layout)
    if layout == "official":
        (found,) = (tmp_path / "out").glob("*.safetensors")
        assert equal(load_file(found), tensors)
    convert(tmp_path / "out", tmp_path / "again")
    assert contents(tmp_path / "again" / "config.json") == contents(tmp_path / "model" / "config.json")
    first, second = (
        {k: v for k, v in contents(tmp_path / n).items() if "manifest" not in k} for n in ("model", "again")
    )
    assert first == second


@pytest.mark.thorough
def test_a_folder_of_a_whole_model_and_its_experts(tmp_path):
    folder = tmp_path / "A14B"
    for expert in ("high_noise_model", "low_noise_model"):
        put(folder / expert, weights("dit_t2v"), name="diffusion_pytorch_model.safetensors")
    put(folder, weights("vae21"), None, "Wan2.1_VAE.safetensors")
    put(folder, weights("umt5"), None, "models_t5.safetensors")
    (folder / "google/umt5-xxl").mkdir(parents=True)
    (folder / "google/umt5-xxl/tokenizer.json").write_text("{}")
    convert(folder, tmp_path / "out", "--verify")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "dit_high", "dit_low", "vae", "text", "config.json", "manifest.json", "tokenizer.json",
    }  # fmt: skip
    convert(tmp_path / "out", tmp_path / "back", "--to", "diffusers")
    convert(tmp_path / "back", tmp_path / "again")
    assert equal(tree(tmp_path / "again/dit_low"), tree(tmp_path / "out/dit_low"))


def eighths(tensors: dict, scaled: bool) -> dict:
    """Linear weights as fp8, with a scale each in ComfyUI's manner; the rest as float16."""
    result = {}
    for key, array in tensors.items():
        if array.ndim != 2:
            result[key] = array.astype(np.float16)
            continue
        scale = np.float32(np.abs(array).max() / 448) if scaled else np.float32(1)
        result[key] = (array / scale).astype(ml_dtypes.float8_e4m3fn)
        if scaled:
            result |= {f"{key.removesuffix('.weight')}.scale_weight": np.array(scale)}
            result |= {f"{key.removesuffix('.weight')}.scale_input": np.ones((), np.float32)}
    return result | ({"scaled_fp8": np.zeros(0, ml_dtypes.float8_e4m3fn)} if scaled else {})


@pytest.mark.parametrize("scaled", [False, True])
def test_eight_bits_are_widened(tmp_path, scaled):
    """Three bits of significand: 2^-4 from the original, and 0.002 of the largest at the small end."""
    convert(put(tmp_path, eighths(weights("dit_t2v"), scaled)), tmp_path / "out")
    found, wanted = tree(tmp_path / "out/dit"), expected("dit_t2v")
    kernel, exact = found["blocks/ffn/up/kernel"], wanted["blocks/ffn/up/kernel"]
    assert kernel.dtype == ml_dtypes.bfloat16 and found["blocks/ffn/up/bias"].dtype == np.float16
    near = 2**-4 * np.abs(exact) + (2**-10 if not scaled else 2**-10 * np.abs(exact).max())
    assert np.all(np.abs(kernel.astype(np.float32) - exact) <= 1.01 * near)


def test_a_type_is_rounded_to_once(tmp_path, source):
    convert(source, tmp_path / "out", "--dtype", "bfloat16")
    wanted = {key: array.astype(ml_dtypes.bfloat16) for key, array in expected("dit_t2v").items()}
    assert equal(tree(tmp_path / "out/dit"), wanted)


def test_odd_weights_are_told_of(tmp_path, capsys):
    tensors = weights("dit_t2v")
    tensors["blocks.0.ffn.2.weight"][:] = 0
    convert(put(tmp_path, tensors), tmp_path / "out")
    assert capsys.readouterr().out.count("blocks/ffn/down/kernel of layer 0 is all 0") == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    tensors = weights("dit_t2v")
    tensors["blocks.1.ffn.0.weight"][3, 4] = value
    source = put(tmp_path, tensors)
    with pytest.raises(Refusal, match="blocks/ffn/up/kernel of layer 1 holds NaN or infinity; copy it again"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_second_run_finds_it_complete_and_another_source_is_refused(tmp_path, source, model, capsys):
    before = contents(model)
    convert(source, model)
    assert "complete" in capsys.readouterr().out and contents(model) == before
    with pytest.raises(Refusal, match="something else"):
        convert(put(tmp_path, weights("dit_ti2v")), model)
    with pytest.raises(Refusal, match="something else"):
        convert(source, model, "--dtype", "bfloat16")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(Refusal, match="no checkpoint of ours"):
        convert(source, tmp_path)
    assert contents(model) == before


def test_a_changed_checkpoint_is_found_by_verify(tmp_path, source):
    convert(source, tmp_path / "out")
    (chunk,) = (tmp_path / "out/dit/head.out.bias").glob("0")
    raw = bytearray(chunk.read_bytes())
    raw[5] ^= 1
    chunk.write_bytes(raw)
    with pytest.raises(Refusal, match=r"dit/head/out/bias"):
        convert(source, tmp_path / "out", "--verify")


def test_a_dry_run_writes_nothing(tmp_path, source, capsys):
    convert(source, tmp_path / "out", "--dry-run")
    assert "170,816 parameters" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_the_sampler_takes_a_converted_model(tmp_path):
    """The bundled model's network, made Wan's file and converted back, says the same to the bit."""
    networks, params = checkpoint.load(TINY, ("dit",))
    arrays = {
        path: Planned(path, a.dtype, a.shape, a.shape[0] if path.startswith(write.STACKS) else None,
                      lambda i, a=a, path=path: np.asarray(a[i] if path.startswith(write.STACKS) else a))
        for path, a in flatten_dict(params["dit"], sep="/").items()
    }  # fmt: skip
    write.safetensors(tmp_path / "wan.safetensors", unplan(wan.dit(), arrays, p=2, q=2), lambda count: None)
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": networks.dit.heads}))
    convert(tmp_path / "wan.safetensors", tmp_path / "out")
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("dit.safetensors"))
    shutil.copytree(tmp_path / "out/dit", folder / "dit")
    assert defaults.defaults(folder).channels == networks.vae.latent
    _, loaded = checkpoint.load(folder, ("dit",))
    assert equal(flatten_dict(loaded["dit"], sep="/"), flatten_dict(params["dit"], sep="/"))


def test_clips_tower_comes_in_alone_and_with_its_text_tower(tmp_path):
    """Its last layer, which Wan never runs, and the text tower are passed over."""
    alone, config = weights("clip"), {"num_heads": 4, "dim": 64}
    whole = {f"visual.{key}": array for key, array in alone.items()}
    whole |= {"textual.x": np.zeros(1, np.float32), "log_scale": np.zeros((), np.float32)}
    for name, tensors in {"alone": alone, "whole": whole}.items():
        convert(put(tmp_path / f"{name}-in", tensors, config), tmp_path / name)
    found = tree(tmp_path / "alone/clip")
    assert equal(found, tree(tmp_path / "whole/clip")) and len(found["layers/qkv/bias"]) == 3
    with pytest.raises(Refusal, match="only CLIP"):
        convert(tmp_path / "alone", tmp_path / "back", "--to", "diffusers")


def test_the_embedding_that_transformers_stores_twice_is_taken_once(tmp_path):
    convert(put(tmp_path / "in", weights("umt5")), tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "hf", "--to", "diffusers")
    (path,) = (tmp_path / "hf/text_encoder").glob("*.safetensors")
    tensors = load_file(path)
    for name, changed in (
        ("both", tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"]}),
        ("other", {k.replace("shared", "encoder.embed_tokens"): a for k, a in tensors.items()}),
    ):
        convert(put(tmp_path / f"{name}-in", changed), tmp_path / name)
        assert equal(tree(tmp_path / name / "text"), tree(tmp_path / "model/text"))
