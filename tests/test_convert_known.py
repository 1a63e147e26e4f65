"""Which published files sources are: the list, and what `python -m convert` says and does about it."""

import gzip
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert import known
from convert.__main__ import main
from fvdm_jax.program import Refusal, run

ROOT = Path(__file__).resolve().parents[1]
WAN = "Wan-AI/Wan2.1-T2V-1.3B"


def listed() -> list[dict]:
    return json.loads(known.LOCK.read_text())["files"]


def test_the_list_is_well_formed():
    entries = listed()
    assert entries == sorted(entries, key=lambda entry: (entry["repository"], entry["path"]))
    assert len({(entry["repository"], entry["path"]) for entry in entries}) == len(entries)
    for entry in entries:
        assert set(entry) - {"revision"} == {"repository", "path", "size", "sha256"}
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", entry["repository"])
        assert re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]) and type(entry["size"]) is int
        assert re.fullmatch(r"[0-9a-f]{40}", entry.get("revision", "0" * 40))
        assert not {"", ".", ".."} & set(entry["path"].split("/")) and entry["size"] > 1 << 20
    assert "://" not in known.LOCK.read_text()


def test_equal_contents_have_equal_sizes_and_the_readme_counts_right():
    sizes = {}
    for entry in listed():
        assert sizes.setdefault(entry["sha256"], entry["size"]) == entry["size"]
    assert f"of the {len(listed())} in `weights.lock.json`" in (ROOT / "convert/README.md").read_text()


SIZES = {
    f"{WAN} diffusion_pytorch_model": ("wan21_t2v_1_3B", 4),
    "Wan-AI/Wan2.1-T2V-14B diffusion_pytorch_model": ("wan21_t2v_14B", 4),
    "Wan-AI/Wan2.2-TI2V-5B diffusion_pytorch_model": ("wan22_ti2v_5B", 4),
    "Wan-AI/Wan2.2-I2V-A14B high_noise_model/": ("wan22_i2v_A14B", 4),
    "Wan-AI/Wan2.2-I2V-A14B low_noise_model/": ("wan22_i2v_A14B", 4),
    f"{WAN} Wan2.1_VAE": ("vae21", 4),
    "Wan-AI/Wan2.2-TI2V-5B Wan2.2_VAE": ("vae22", 4),
    f"{WAN} models_t5": ("umt5_xxl_enc", 2),
    "Wan-AI/Wan2.1-I2V-14B-480P models_clip": ("clip", 4),
    "Comfy-Org/Wan_2.1_ComfyUI_repackaged split_files/diffusion_models/wan2.1_t2v_1.3B": (
        "wan21_t2v_1_3B",
        2,
    ),
    "Comfy-Org/Wan_2.1_ComfyUI_repackaged split_files/vae/": ("vae21", 2),
    "Comfy-Org/Wan_2.2_ComfyUI_Repackaged split_files/diffusion_models/wan2.2_ti2v_5B": ("wan22_ti2v_5B", 2),
    "Comfy-Org/Wan_2.2_ComfyUI_Repackaged split_files/vae/": ("vae22", 2),
    "Kijai/WanVideo_comfy Wan2_1_VAE": ("vae21", 2),
    "Kijai/WanVideo_comfy umt5-xxl": ("umt5_xxl_enc", 2),
}


def test_sizes_are_those_of_the_tensors_that_are_published_and_their_headers():
    with gzip.open(ROOT / "tests/golden/published.json.gz", "rt") as file:
        models = json.load(file)["models"]
    for start, (name, width) in SIZES.items():
        size = sum(file.size for file in known.files() if str(file).startswith(start))
        assert 0 < size - models[name]["params"] * width < 400_000, start


@pytest.fixture
def weights(tmp_path) -> Path:
    """A network of tests in a folder as Wan's, under Wan's name for its transformer."""
    folder = tmp_path / "Wan2.1-T2V-1.3B"
    folder.mkdir()
    with np.load(ROOT / "tests/golden/dit_t2v.npz") as arrays:
        tensors = {key[2:]: np.ascontiguousarray(arrays[key]) for key in arrays if key.startswith("w/")}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_heads": 2, "num_layers": 2}))
    (folder / "tokenizer.json").write_text("{}")
    return folder / "diffusion_pytorch_model.safetensors"


def lock(path: Path, monkeypatch, *files: tuple[str, Path]) -> None:
    """A list in which these files are known, by the paths in Wan's repository."""
    entries = [
        {
            "repository": WAN,
            "path": name,
            "size": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for name, file in files
    ]
    path.write_text(json.dumps({"files": entries}))
    monkeypatch.setattr(known, "LOCK", path)


def altered(file: Path, at: int = -1) -> None:
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


def convert(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def test_a_known_file_is_named_and_an_unknown_one_is_said_to_be(tmp_path, weights, monkeypatch, capsys):
    lock(tmp_path / "lock", monkeypatch, (weights.name, weights))
    convert(weights.parent, tmp_path / "out")
    said = capsys.readouterr().out
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert f"sha256 {digest}  = {WAN} {weights.name}\n" in said
    assert "tokenizer.json  2 bytes" in said and "  not in the list of known files\n" in said
    sources = json.loads((tmp_path / "out/manifest.json").read_text())["sources"]
    assert [source["known"] for source in sources] == [f"{WAN} {weights.name}", None]
    assert sources[0]["sha256"] == digest


def test_it_is_known_under_any_name(tmp_path, weights, monkeypatch, capsys):
    lock(tmp_path / "lock", monkeypatch, (weights.name, weights))
    weights.rename(weights.with_name("mine.safetensors"))
    convert(weights.parent, tmp_path / "out")
    assert f"= {WAN} {weights.name}\n" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--dry-run", "--verify"]])
def test_an_altered_download_is_refused_and_nothing_is_there(tmp_path, weights, monkeypatch, capsys, flags):
    lock(tmp_path / "lock", monkeypatch, (weights.name, weights))
    altered(weights)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert run(main, [str(weights.parent), str(tmp_path / "out"), *flags]) == 2
    refusal = capsys.readouterr().err.strip().splitlines()[-1]
    assert refusal.startswith(
        f"error: {weights}: has the name and size of {WAN} {weights.name}, and is not it"
    )
    assert "; download it again" in refusal
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_in_a_folder_of_another_name_it_is_somebodys_own(tmp_path, weights, monkeypatch, capsys):
    """Trained further, a Wan keeps the name of its file, and its size."""
    lock(tmp_path / "lock", monkeypatch, (weights.name, weights))
    altered(weights)
    folder = weights.parent.rename(tmp_path / "mine")
    convert(folder, tmp_path / "out")
    told = (
        f"not in the list of known files; {WAN} {weights.name} has this name and size, and other contents\n"
    )
    assert told in capsys.readouterr().out
    assert (tmp_path / "out/config.json").is_file()


def test_a_name_that_only_one_file_has_is_enough_to_refuse(tmp_path, weights, monkeypatch):
    weights = weights.rename(tmp_path / "Wan2.1_DiT.safetensors")
    lock(tmp_path / "lock", monkeypatch, ("Wan2.1_DiT.safetensors", weights))
    altered(weights)
    with pytest.raises(Refusal, match="is not it"):
        convert(weights, tmp_path / "out", "--config", tmp_path / "Wan2.1-T2V-1.3B/config.json")


@pytest.mark.parametrize(
    ("folder", "path", "refused"),
    [
        ("models--Wan-AI--Wan2.1-T2V-1.3B/snapshots/0", "diffusion_pytorch_model.safetensors", True),
        ("models--me--Wan2.1-T2V-1.3B/snapshots/0", "diffusion_pytorch_model.safetensors", False),
        ("Wan2.1-T2V-1.3B", "high/diffusion_pytorch_model.safetensors", False),
        ("Wan2.1-T2V-1.3B/high", "high/diffusion_pytorch_model.safetensors", True),
        ("Wan2.1-T2V-1.3B", "diffusion_pytorch_model.safetensors", True),
        ("Wan2.1-T2V-1.3B-mine", "diffusion_pytorch_model.safetensors", False),
    ],
)
def test_where_downloads_lie(tmp_path, monkeypatch, folder, path, refused):
    one = tmp_path / "one"
    one.write_bytes(b"12345")
    lock(tmp_path / "lock", monkeypatch, (path, one))
    file = tmp_path / folder / "diffusion_pytorch_model.safetensors"
    if refused:
        with pytest.raises(Refusal, match="download it again"):
            known.identify(file, 5, "0" * 64)
    else:
        assert known.identify(file, 5, "0" * 64) is None
    assert known.identify(file, 6, "0" * 64) is None


def test_a_dry_run_that_verifies_says_what_the_files_are(tmp_path, weights, monkeypatch, capsys):
    lock(tmp_path / "lock", monkeypatch, (weights.name, weights))
    convert(weights.parent, tmp_path / "out", "--dry-run", "--verify")
    said = capsys.readouterr().out
    assert f"= {WAN} {weights.name}\n" in said and "wrote" not in said
    assert not (tmp_path / "out").exists()
