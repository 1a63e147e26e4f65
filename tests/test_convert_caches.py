"""Clips that Pusa's own program has encoded, as records."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import small
import torch_cases as cases
from safetensors.numpy import load_file

from convert.__main__ import main
from convert.torch_file import read_grouped
from fvdm_jax.data.encoder import identity
from fvdm_jax.data.records import Reader, verify
from fvdm_jax.program import Refusal, alone, run

LENGTH, WIDTH, CHANNELS = small.NETWORKS.text.length, small.NETWORKS.text.width, 8


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("set/train").mkdir(parents=True)


def drawn(seed: int, rows: int = 5, channels: int = CHANNELS) -> tuple[np.ndarray, np.ndarray]:
    """Latents [c f h w] and states [1 l e] of which some rows are not 0, both bfloat16."""
    rng = np.random.default_rng(seed)
    latents, states = rng.normal(size=(channels, 3, 4, 6)), np.zeros((1, LENGTH, WIDTH))
    states[0, :rows] = rng.normal(size=(rows, WIDTH))
    return latents.astype(ml_dtypes.bfloat16), states.astype(ml_dtypes.bfloat16)


def stored(array: np.ndarray, key: str) -> bytes:
    """The call for a tensor whose elements are those of a record."""
    strides = tuple(np.cumprod((1, *array.shape[:0:-1]))[::-1].tolist())
    storage = cases.storage("BFloat16Storage", key=key, count=array.size)
    return cases.tensor(storage, shape=array.shape, strides=strides)


def cache(name: str, latents: np.ndarray, states: np.ndarray) -> Path:
    """Writes what Pusa's program does for a clip."""
    image, words = cases.state(), cases.state(context=stored(states, "1"))
    program = cases.state(latents=stored(latents, "0"), prompt_emb=words, image_emb=image)
    records = [(f"x/data/{i}", array.tobytes()) for i, array in enumerate((latents, states))]
    path = Path("set/train", f"{name}.tensors.pth")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(cases.saved(program, *records))
    return path


def listed(*rows: str) -> None:
    Path("set/metadata.csv").write_text("\n".join(["file_name,text", *rows]) + "\n", "utf-8")


def records(folder: str = "out") -> dict:
    manifest = verify(folder)
    reader = Reader(manifest)
    return {entry.name.rpartition("/train/")[2]: reader.read(entry) for entry in manifest.entries}


def test_clips_are_what_was_encoded(capfd):
    made = {"a.mp4": drawn(0), "b/ü.jpg": drawn(1, 3), "c.mp4": drawn(2, 0)}
    for name, arrays in made.items():
        cache(name, *arrays)
    listed("a.mp4,a cat", '"b/ü.jpg","größer, und mehr"', "c.mp4,")
    assert run(main, ["set", "out", "--dry-run"]) == 0 and not Path("out").exists()
    assert run(main, ["set", "out"]) == 0
    out = capfd.readouterr().out
    assert "3 clips that Pusa's program has encoded" in out and "wrote 3 records to out" in out
    found = records()
    assert {name: record.caption for name, record in found.items()} == {
        "a.mp4": "a cat", "b/ü.jpg": "größer, und mehr", "c.mp4": "",
    }  # fmt: skip
    for (name, (latents, states)), rows in zip(made.items(), (5, 3, 0), strict=True):
        assert np.array_equal(found[name].latents, latents.transpose(1, 2, 3, 0))
        assert found[name].states.dtype == states.dtype and np.array_equal(
            found[name].states, states[0, :rows]
        )
    header = verify("out").header
    assert (header.channels, header.text_length, header.text_width, header.fps) == (8, LENGTH, WIDTH, 16)


def test_a_second_run_adds_what_is_new_and_replaces_what_has_changed(capfd):
    cache("a.mp4", *drawn(0)), cache("b.mp4", *drawn(1))
    listed("a.mp4,a cat", "b.mp4,a dog")
    assert run(main, ["set", "out"]) == 0 and run(main, ["set", "out"]) == 0
    assert "2 of 2 already there; wrote 0 records" in capfd.readouterr().out
    cache("c.mp4", *drawn(2))
    listed("a.mp4,a cat", "b.mp4,a wolf", "c.mp4,a fish")
    assert run(main, ["set", "out"]) == 0
    assert "1 of 3 already there; wrote 2 records" in capfd.readouterr().out
    assert sorted(record.caption for record in records().values()) == ["a cat", "a fish", "a wolf"]


def test_the_model_tells_the_empty_prompt():
    small.save(Path("model"))
    cache("a.mp4", *drawn(0, channels=small.NETWORKS.vae.latent))
    listed("a.mp4,a cat")
    assert run(main, ["set", "model", "out"]) == 0
    assert verify("out").header.model == identity(Path("model"))
    assert load_file("out/null.safetensors")["states"].shape == (1, WIDTH)


@pytest.mark.parametrize(
    "rows, what",
    [
        (
            ["a.mp4,x", "gone.mp4,y"],
            "gone.mp4.tensors.pth: 1 of 3 clips of metadata.csv have not been encoded",
        ),
        (["a.mp4,x"], "b.mp4.tensors.pth: 1 of 2 clips are not in metadata.csv"),
        (["a.mp4,x", "a.mp4,y"], "another caption"),
        ([], "clips are not in metadata.csv"),
    ],
)
def test_nothing_is_left_out_in_silence(rows, what, capfd):
    cache("a.mp4", *drawn(0)), cache("b.mp4", *drawn(1))
    listed(*rows)
    assert run(main, ["set", "out"]) == 2 and what in capfd.readouterr().err
    assert not Path("out").exists()


def test_what_is_no_cache_or_another_models_is_refused(capfd):
    latents, states = drawn(0)
    listed("a.mp4,x", "b.mp4,y")
    cache("a.mp4", latents, states)
    for odd, what in (
        ((latents[:, 0], states), "latents of shape (8, 4, 6)"),
        ((latents, states[0]), "prompt_emb/context of shape (24, 16)"),
        ((latents[:4], states), "has (4, 24, 16) channels, text length and width"),
        ((np.full_like(latents, np.nan), states), "not finite"),
    ):
        cache("b.mp4", *odd)
        assert run(main, ["set", "out"]) == 2 and what in capfd.readouterr().err
    Path("set/train/b.mp4.tensors.pth").write_bytes(cases.saved(cases.GOOD))
    with pytest.raises(Refusal, match=r"latents of shape \(\)"):
        main(["set", "out"])
    with pytest.raises(Refusal, match="--dtype: has no effect on encoded clips"):
        main(["set", "out", "--dtype", "float32"])
    with pytest.raises(Refusal, match="one source too many"):
        main(["set", "a", "b", "out"])


def test_groups_of_tensors_are_one_deep_and_named_once(tmp_path):
    path, tensor = tmp_path / "a.pth", cases.tensor()
    for program, what in (
        (cases.state(a=cases.state(b=cases.state(c=tensor))), "a/b is no tensor"),
        (cases.state(**{"a": cases.state(b=tensor), "a/b": tensor}), "a key twice"),
        (cases.state(a=cases.state()), "holds no tensors"),
    ):
        path.write_bytes(cases.saved(program))
        with pytest.raises(Refusal, match=what):
            read_grouped(path)
    path.write_bytes(cases.saved(cases.state(a=cases.state(b=tensor), c=tensor)))
    assert read_grouped(path).keys() == {"a/b", "c"}


def test_of_two_that_add_to_a_folder_at_once_one_is_refused(capfd):
    cache("a.mp4", *drawn(0))
    listed("a.mp4,a cat")
    with alone(Path("out")):
        assert run(main, ["set", "out"]) == 2 and not Path("out").exists()
    assert "error: out: is being made by another process; wait for it" in capfd.readouterr().err
    assert run(main, ["set", "out"]) == 0 and len(records()) == 1
    assert sorted(path.name for path in Path().iterdir()) == ["out", "set"]
