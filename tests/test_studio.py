"""Many videos of one model, long ones, two experts, Wan's own I2V networks: by the programs of one clip."""

import dataclasses
import json
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
import small
from PIL import Image

from fvdm_jax import checkpoint, latents, lora, programs, sampling, video
from fvdm_jax.checkpoint import flatten, load_tree, save_tree
from fvdm_jax.commands import lines, parse
from fvdm_jax.models.clip import CLIPConfig
from fvdm_jax.program import Refusal, run
from fvdm_jax.progress import Stages
from fvdm_jax.sample import main
from fvdm_jax.studio import Studio, rows


@pytest.fixture(scope="module")
def experts(model, tmp_path_factory) -> Path:
    """The small model with two transformers, of which that of low noise is another."""
    folder = tmp_path_factory.mktemp("experts")
    for name in ("vae", "text"):
        (folder / f"{name}.safetensors").write_bytes((model / f"{name}.safetensors").read_bytes())
    tree = load_tree(model / "dit.safetensors")
    save_tree(folder / "dit_high.safetensors", tree)
    save_tree(folder / "dit_low.safetensors", jax.tree.map(lambda leaf: -0.5 * leaf, tree))
    told = json.loads((model / "config.json").read_text())
    dit = told.pop("dit")
    told |= {"dit_high": dit, "dit_low": dit}
    told["sampling"] |= {"boundary": 0.7}
    (folder / "config.json").write_text(json.dumps(told))
    return folder


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Every device does all for itself, which is compiled sooner; test_sample has the others."""
    monkeypatch.setattr(sampling.layouts, "recommended", lambda task, config, clip, devices, batch: "data=8")


@pytest.fixture
def here(tmp_path, monkeypatch, model):
    """An empty folder that has two pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(model / "cache"))
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 255, (32, 48, 3), dtype=np.uint8)).save(name)
    return tmp_path


def made(model: Path, *argv: str) -> np.ndarray:
    """The latents of what these flags ask for."""
    request = parse(["--model", str(model), *argv])
    return Studio([request], Stages()).clip(request)


def test_experts_that_are_alike_are_one(here, model, experts, tmp_path):
    """With the first expert on both sides of the boundary, two are the model of one transformer."""
    twin = tmp_path / "twin"
    twin.mkdir()
    for path in experts.iterdir():
        (twin / path.name).write_bytes(path.read_bytes())
    (twin / "dit_low.safetensors").write_bytes((experts / "dit_high.safetensors").read_bytes())
    one, two, other = made(model, "--seed", "3"), made(twin, "--seed", "3"), made(experts, "--seed", "3")
    assert np.array_equal(one, two) and not np.allclose(one, other, atol=1e-3)


def test_the_boundary_says_which_expert_works(here, experts, monkeypatch):
    """shift 3 and three steps are at levels 0.999, 0.857 and 0.6: 0.7 is before the third."""
    used = []
    load = checkpoint.load_transformer
    monkeypatch.setattr(
        checkpoint, "load_transformer", lambda folder, name: used.append(name) or load(folder, name)
    )
    at = {boundary: made(experts, "--boundary", boundary) for boundary in ("0", "0.7", "0.75", "1")}
    assert used == ["dit_high", *["dit_high", "dit_low"] * 2, "dit_low"]
    assert np.array_equal(at["0.7"], at["0.75"])
    # Kept frames, which are clean, have no say in it.
    used.clear()
    made(experts, "--keep", "0=a.png", "--keep", "1=b.png:0.3")
    assert used == ["dit_high", "dit_low"]


def test_an_expert_makes_room_for_the_other(here, experts, monkeypatch):
    """With no memory to spare nothing of the first is held when the second is loaded."""
    gone, load = [], checkpoint.load_transformer
    request = parse(["--model", str(experts)])
    studio = Studio([request], Stages())

    def loading(folder, name):
        if name == "dit_low":
            gone.append(alive() is None)
        return load(folder, name)

    placed = sampling.placed

    def watched(*args):
        nonlocal alive
        made = placed(*args)
        alive = weakref.ref(jax.tree.leaves(made)[0])
        return made

    alive = None
    monkeypatch.setattr(sampling, "placed", watched)
    monkeypatch.setattr(checkpoint, "load_transformer", loading)
    monkeypatch.setattr("fvdm_jax.studio.machine.free", lambda device: 0.0)
    studio.clip(request)
    assert gone == [True] and not studio._held


def test_each_expert_has_its_own_guidance_and_loras(here, experts):
    params = load_tree(experts / "dit_high.safetensors")
    config = checkpoint.network(experts, "dit_high")
    pairs = lora.init(jax.random.key(0), lora.abstract(checkpoint.dit.abstract(config), 2))
    pairs = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(0.1), pairs)
    for path, leaf in list(flatten(pairs)):
        if path.endswith("/a"):
            node = pairs
            for part in path.split("/")[:-1]:
                node = node[part]
            node["scale"] = np.ones(leaf.shape[:-2], np.float32)
    import orbax.checkpoint as ocp

    ocp.PyTreeCheckpointer().save((here / "taught/adapters").absolute(), {"low_rank": pairs})
    merged = lora.merge(params, lora.Adapters(pairs, {}), 0.5)
    other = here / "other"
    other.mkdir()
    for path in experts.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    save_tree(other / "dit_high.safetensors", merged)
    beside, within = made(experts, "--lora", "high=taught:0.5"), made(other)
    assert np.abs(beside - within).max() < 1e-4 and np.abs(beside - made(experts)).max() > 1e-2
    same, differing = made(experts, "--guidance", "2,2"), made(experts, "--guidance", "2,1")
    assert np.array_equal(same, made(experts)) and not np.array_equal(same, differing)


def test_one_program_whatever_is_asked(here, model, monkeypatch):
    """Of a size there is one step, to the letter: tasks, schedules, numbers of steps and weights are data."""
    texts, compile = [], programs.compiled

    def told(say, lowered, what, *options):
        if what.startswith("denoise"):
            texts.append(lowered.as_text())
        return compile(say, lowered, what, *options)

    monkeypatch.setattr(programs, "compiled", told)
    asked = (
        "", "--steps 5 --shift 7", "--keep 0=a.png --keep 2=b.png:0.6-0.1 --prompt a",
        "--schedule autoregressive",
        "--guidance 6 --interval 0.2-0.9 --rescale 0.5", "--seed 9 --prompt square", "--context-noise 0.02,2",
    )  # fmt: skip
    for flags in asked:
        made(model, *flags.split())
    assert len(texts) == len(asked)
    assert [texts.index(text) for text in texts] == [0] * len(asked)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--guidance 2,3", "is of two experts, and the model has one transformer"),
        ("--lora high=taught", "--lora: taught is for one of two experts"),
        ("--boundary 2", "--boundary: 2.0 is out of range"),
        ("--guidance 2,3,4", "is not a finite number"),
        ("--overlap 1", "are of long videos"),
        ("--length 0.5", "is less than a window of 9 frames, 1.12 seconds"),
        ("--length 3 --overlap 2 --anchors 1", "leave nothing of a window of 3 latent frames"),
        ("--length 3 --keep last=a.png", "has no last frame to be kept"),
        ("--length 3 --schedule rolling --keep 0=a.png", "by a queue keeps nothing"),
        ("--prompts none.txt", "--prompts: none.txt cannot be read"),
        ("--prompts empty.txt", "empty.txt has 0 lines"),
        ("--prompts bad.jsonl", "--prompts bad.jsonl line 2: is no JSON object"),
        ("--prompts strange.jsonl", "line 1: holds colour"),
        ("--prompts seed.jsonl", "line 1: seed -1"),
        ("--prompts frame.jsonl", "frame.jsonl, video 1: --keep 7=a.png: 7 is outside"),
    ],
)
def test_what_cannot_be_is_refused(here, model, flags, said):
    (here / "taught/adapters").mkdir(parents=True)
    Path("empty.txt").write_text("\n")
    Path("bad.jsonl").write_text('{"prompt": "a"}\n["b"]\n')
    Path("strange.jsonl").write_text('{"colour": "a"}\n')
    Path("seed.jsonl").write_text('{"seed": -1}\n')
    Path("frame.jsonl").write_text('{"keep": ["7=a.png"]}\n')
    with pytest.raises(Refusal) as refused:
        lines(parse(["--model", str(model), *flags.split()]))
    assert said in str(refused.value)


def test_a_file_of_prompts_is_as_each_alone_and_compiles_once(here, model, monkeypatch):
    Path("three.jsonl").write_text(
        '{"prompt": "a red circle", "seed": 5}\n{"prompt": "a square", "keep": ["0=a.png:0.5"]}\n\n'
        '{"prompt": "a red circle", "negative": "blue"}\n'
    )
    compiled = []
    compile = programs.compiled
    monkeypatch.setattr(
        programs,
        "compiled",
        lambda say, lowered, what, *o: compiled.append(what) or compile(say, lowered, what, *o),
    )
    flags = ["--model", str(model)]
    assert run(main, [*flags, "--prompts", "three.jsonl", "--out", "v.mp4"]) == 0
    assert compiled.count("denoise (3x4x6)") == 1
    alone = made(model, "--prompt", "a square", "--keep", "0=a.png:0.5")
    assert np.array_equal(latents.load(Path("v-2.latents.safetensors")), alone)
    record = json.loads(Path("v-1.json").read_text())
    assert record["seed"] == 5 and record["prompts"] is None
    # What is there is left; what is missing is made again.
    again = [*flags, "--prompts", "three.jsonl", "--out", "v.mp4"]
    assert lines(parse(again)) == []
    Path("v-3.mp4").unlink()
    assert [one.out.name for one in lines(parse(again))] == ["v-3.mp4"]
    assert len(lines(parse([*again, "--overwrite"]))) == len(lines(parse([*again, "--explain"]))) == 3
    one, two = (json.loads(Path(f"v-{i}.json").read_text())["seconds"] for i in (1, 2))
    assert "load" in one and "compile" in one and two.get("load", 0) < one["load"]
    Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save("a.png")
    with pytest.raises(Refusal, match="video 2: --out: v-2.mp4 exists"):
        lines(parse(again))
    with pytest.raises(Refusal, match="video 1: --out: v-1.mp4 exists"):
        lines(parse([*again, "--steps", "2"]))


LONG = ["--length", "5", "--overlap", "1", "--anchors", "1", "--keep", "0=a.png"]


def test_a_long_video_goes_on_where_it_was_stopped(here, model, monkeypatch, capfd):
    """5 seconds at 8 a second are 11 latent frames: a window of 3, and 8 more of 1 new frame each."""
    Path("told.txt").write_text("a red circle\na square\n")
    flags = ["--model", str(model), *LONG, "--prompts", "told.txt"]
    assert run(main, [*flags, "--out", "whole.mp4"]) == 0, capfd.readouterr().err
    whole = latents.load(Path("whole.latents.safetensors"))
    assert whole.shape[1] == 11 and video.probe("whole.mp4").frames == 41
    first = made(model, "--prompt", "a red circle", "--keep", "0=a.png")
    assert np.array_equal(whole[:, :3], first)

    class Stop(Exception):
        pass

    add, count = latents.Reel.add, []

    def stopping(reel, piece):
        if len(count) == 4:
            raise Stop
        count.append(piece.shape[1])
        add(reel, piece)

    monkeypatch.setattr(latents.Reel, "add", stopping)
    assert run(main, [*flags, "--out", "cut.mp4"]) == 1
    assert count == [3, 1, 1, 1] and "6 of 11 latent frames are safe" in capfd.readouterr().err
    assert not Path("cut.mp4").exists() and Path("cut.latents.safetensors.part").exists()
    monkeypatch.setattr(latents.Reel, "add", add)
    assert run(main, [*flags, "--out", "cut.mp4"]) == 0
    assert "going on after latent frame 6 of 11" in capfd.readouterr().err
    assert np.array_equal(latents.load(Path("cut.latents.safetensors")), whole)
    assert not Path("cut.latents.safetensors.part").exists()
    one, two = (video.read(f"{name}.mp4", 41, (32, 48)) for name in ("whole", "cut"))
    assert np.array_equal(one, two)
    assert run(main, ["--decode", "whole.latents.safetensors", "--out", "again.mp4"]) == 0
    assert np.array_equal(video.read("again.mp4", 41, (32, 48)), one)
    assert json.loads(Path("again.json").read_text())["segments"] == ["a red circle", "a square"]
    capfd.readouterr()
    assert run(main, [*flags, "--explain"]) == 0
    assert "27 calls of the network in 9 windows; at most 2 frames" in capfd.readouterr().out


def test_a_reel_of_other_settings_is_begun_anew(tmp_path):
    path, shape = tmp_path / "a.latents.safetensors", (1, 4, 2, 2, 3)
    piece = np.arange(24, dtype=np.float32).reshape(1, 2, 2, 2, 3)
    with latents.Reel(path, shape, {"seed": 1}) as reel:
        reel.add(piece)
    with latents.Reel(path, shape, {"seed": 1}) as again:
        assert again.frames == 2 and np.array_equal(again.read(0, 2), piece)
    # A frame that is half there does not count.
    with open(again.part, "ab") as file:
        file.write(b"\0" * 7)
    with latents.Reel(path, shape, {"seed": 1}) as half:
        assert half.frames == 2
    # How work was laid out makes no other video; a seed does, and nothing of it is lost unasked.
    with latents.Reel(path, shape, {"seed": 1, "mesh": "data=2"}) as laid:
        assert laid.frames == 2
    with pytest.raises(Refusal, match="is of a video of other settings that was stopped"):
        latents.Reel(path, shape, {"seed": 2})
    with latents.Reel(path, shape, {"seed": 2}, replace=True) as other:
        assert other.frames == 0
        other.add(piece)
        other.add(np.concatenate([piece, piece], axis=1))
        other.finish()
    assert np.array_equal(latents.load(path), np.concatenate([piece, piece], axis=1))
    assert latents.probe(path).settings == {"seed": 2} and not other.part.exists()


def test_a_queue_makes_a_long_video(here, model, capfd):
    flags = [
        "--model",
        str(model),
        "--length",
        "3",
        "--schedule",
        "rolling",
        "--steps",
        "4",
    ]
    assert run(main, [*flags, "--out", "q.mp4"]) == 0, capfd.readouterr().err
    made = latents.load(Path("q.latents.safetensors"))
    assert (
        run(main, [*flags, "--out", "p.mp4"]) == 0
        and run(main, [*flags, "--out", "r.mp4", "--seed", "1"]) == 0
    )
    same, other = (latents.load(Path(f"{name}.latents.safetensors")) for name in "pr")
    assert made.shape[1] == 7 and np.isfinite(made).all() and np.array_equal(made, same)
    assert all(np.abs(made[:, i] - other[:, i]).max() > 0.1 for i in range(7))
    assert json.loads(Path("q.json").read_text())["overlap"] == 1


@pytest.fixture(scope="module", params=["i2v", "flf2v", "i2v without clip"])
def pictured(request, tmp_path_factory) -> Path:
    """A small network of the kind of Wan's own I2V, with its image tower if it has one."""
    folder = tmp_path_factory.mktemp("pictured")
    c, tokens = small.NETWORKS, 2 * 5 if request.param == "flf2v" else 0
    width = 0 if "without" in request.param else 16
    dit = dataclasses.replace(c.dit, channels_in=12, image_width=width, image_tokens=tokens)
    tower = CLIPConfig(28, 14, 16, 2, 32, 2, "float32") if width else None
    networks = dataclasses.replace(c, dit=dit, clip=tower)
    kinds = {name: checkpoint.KINDS[name][1](getattr(networks, name)) for name in networks.there}
    params = {name: small.drawn(tree) for name, tree in kinds.items()}
    checkpoint.save(folder, networks, params, {"sampling": small.SAMPLING})
    return folder


def test_wans_own_networks_take_pictures(here, pictured):
    keeps = ["--keep", "0=a.png"]
    told = json.loads((pictured / "config.json").read_text())
    if told["dit"]["image_tokens"]:
        with pytest.raises(Refusal, match="last=FILE is missing"):
            parse(["--model", str(pictured), *keeps])
        keeps += ["--keep", "last=b.png"]
    with pytest.raises(Refusal, match="0=FILE is missing"):
        parse(["--model", str(pictured)])
    with pytest.raises(Refusal, match="takes pictures as they are"):
        parse(["--model", str(pictured), *keeps[:1], f"{keeps[1]}:0.5", *keeps[2:]])
    with pytest.raises(Refusal, match="--still: has no effect"):
        parse(["--model", str(pictured), *keeps, "--still"])
    Path("two.jsonl").write_text(json.dumps({"prompt": "a", "keep": keeps[1::2]}))
    assert len(lines(parse(["--model", str(pictured), "--prompts", "two.jsonl"]))) == 1
    one = made(pictured, *keeps)
    other = made(pictured, "--keep", "0=b.png", *keeps[2:])
    assert np.isfinite(one).all() and np.abs(one - other).max() > 1e-3


def test_an_image_that_stands_still_is_four_pictures(here, model):
    """Kept after frame 0, it is what the VAE makes of a clip that does not move."""
    still = made(model, "--keep", "2=a.png", "--still")[:, 2]
    networks, params = checkpoint.load(model)
    clip = np.repeat(video.to_unit(video.read("a.png", 1, (32, 48)))[None], 5, 1)
    assert np.abs(still - np.asarray(networks.encode(params, clip))[:, 1]).max() < 1e-5
    assert np.abs(still - made(model, "--keep", "2=a.png")[:, 2]).max() > 1e-3


def test_a_strength_that_changes_is_another_video(here, model):
    """It ends where the last strength does, and the matrix says so."""
    one = parse(["--model", str(model), "--keep", "1=a.png:0.8-0.2", "--steps", "4"])
    assert one.strength == [1.0, 0.8, 1.0] and one.settled == [1.0, 0.2, 1.0]
    matrix = rows(one, one.strength)
    assert np.allclose(matrix[:, 1] / np.maximum(matrix[:, 0], 1e-9), [0.8, 0.65, 0.5, 0.35, 0])
    soft, firm = (made(model, "--keep", f"1=a.png:{s}", "--steps", "4") for s in ("0.8-0.2", "0.8"))
    assert np.abs(soft - firm).max() > 1e-3


def test_a_preset_sets_what_no_flag_says(here, model, experts):
    (here / "one/adapters").mkdir(parents=True)
    (here / "two/adapters").mkdir(parents=True)
    loras = ["--lora", "high=one", "--lora", "high=two", "--lora", "low=two:1.2"]
    request = parse(["--model", str(experts), "--preset", "pusa-wan22-lightning", "--fps", "12", *loras])
    assert (request.steps, request.guidance, request.spacing, request.boundary) == (4, 1.0, "pusa", 0.875)
    assert request.fps == 12 and request.solver == "euler"
    assert request.lora == (("one", 1.0, "high"), ("two", 1.4, "high"), ("two", 1.2, "low"))
    kept = parse(
        ["--model", str(model), "--preset", "pusa-wan21", "--keep", "0=a.png", "--keep", "2=b.png:0"]
    )
    assert kept.strength == [0.2, 1.0, 0.0]
