"""Many videos of one model, long ones, two experts, Wan's own I2V networks: by the programs of one clip."""

import dataclasses
import json
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
import small
from flax.traverse_util import flatten_dict

from fvdm_jax import checkpoint, lora, programs, sample, sampling, video
from fvdm_jax.checkpoint import load_tree, save_tree
from fvdm_jax.commands import lines, parse
from fvdm_jax.models.clip import CLIPConfig
from fvdm_jax.program import Refusal, run
from fvdm_jax.progress import Stages
from fvdm_jax.steps import calls, rows
from fvdm_jax.studio import Studio

pytestmark = pytest.mark.usefixtures("alone")


def made(model: Path, *argv: str) -> np.ndarray:
    """The latents of what these flags ask for."""
    request = parse(["--model", str(model), *argv])
    return Studio([request], Stages()).clip(request)


@pytest.mark.thorough
def test_experts_that_are_alike_are_one(here, model, experts, tmp_path):
    """With the first expert on both sides of the boundary, two are the model of one transformer."""
    twin = tmp_path / "twin"
    twin.mkdir()
    for path in experts.iterdir():
        (twin / path.name).write_bytes(path.read_bytes())
    (twin / "dit_low.safetensors").write_bytes((experts / "dit_high.safetensors").read_bytes())
    one, two, other = made(model, "--seed", "3"), made(twin, "--seed", "3"), made(experts, "--seed", "3")
    assert np.array_equal(one, two) and not np.allclose(one, other, atol=1e-3)


@pytest.mark.thorough
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


def taught(here: Path, experts: Path) -> tuple[dict, dict]:
    """The first expert's parameters, and the pairs of a LoRA that is written to `taught`."""
    params = load_tree(experts / "dit_high.safetensors")
    config = checkpoint.network(experts, "dit_high")
    pairs = lora.init(jax.random.key(0), lora.abstract(checkpoint.dit.abstract(config), 2))
    pairs = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(0.1), pairs)
    for path, leaf in flatten_dict(pairs, sep="/").items():
        if path.endswith("/a"):
            node = pairs
            for part in path.split("/")[:-1]:
                node = node[part]
            node["scale"] = np.ones(leaf.shape[:-2], np.float32)
    import orbax.checkpoint as ocp

    ocp.PyTreeCheckpointer().save((here / "taught/adapters").absolute(), {"low_rank": pairs})
    return params, pairs


@pytest.mark.thorough
def test_each_expert_has_its_own_guidance_and_loras(here, experts):
    params, pairs = taught(here, experts)
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
        (
            "--length 3 --schedule rolling --keep 1=a.png",
            "keeps its first frames alone, and whole; give 0=FILE:0",
        ),
        ("--length 3 --schedule rolling --keep 0=a.png:0.5", "by a queue keeps its first frames alone"),
        ("--length 3 --schedule rolling --anchors 1", "by a queue has no anchors, and one prompt"),
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


@pytest.mark.thorough
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
    # What is drawn and counted is what is sampled: every frame of the video is made.
    staggered = parse(["--model", str(pictured), *keeps, "--schedule", "pyramid:lag=1"])
    assert calls(staggered) == [len(rows(staggered, [1.0] * 3)) - 1] == [5]
    one = made(pictured, *keeps)
    other = made(pictured, "--keep", "0=b.png", *keeps[2:])
    assert np.isfinite(one).all() and np.abs(one - other).max() > 1e-3


@pytest.mark.thorough
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


def test_of_frames_that_the_second_expert_never_sees_is_told(here, experts, capfd):
    """Together every frame ends with the expert of low noise; one after the other only the last does."""
    flags = ["--model", str(experts), "--steps", "4", "--schedule"]
    one, other = (parse([*flags, schedule]) for schedule in ("together", "autoregressive"))
    studio = Studio([one], Stages())
    studio.welcome(one)
    assert "expert" not in capfd.readouterr().err
    studio.welcome(other)
    assert "note: 2 of 3 frames are clean before the expert of low noise begins" in capfd.readouterr().err


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


def test_what_a_preset_comes_to_is_printed(here, model, capsys):
    """The strengths that LoRAs have, also where a flag gave them; one that the preset knows not has 1."""
    for name in ("light", "pusa", "style"):
        (here / name / "adapters").mkdir(parents=True)
    loras = ["--lora", "light:0.7", "--lora", "pusa", "--lora", "style"]
    flags = ["--model", str(model), "--preset", "pusa-wan21-lightning", "--fps", "12", *loras, "--explain"]
    assert run(sample.main, flags) == 0
    told = capsys.readouterr().out.splitlines()[0]
    assert "lora light 0.7, lora pusa 1.4, lora style 1" in told and "fps 12" in told
    assert "kept 0.2 where --keep says nothing" in told and "negative Bright tones" in told


@pytest.mark.parametrize(
    "flags, told", [(["", "--guidance", "2"], True), (["a", "--guidance", "2"], False), ([""], False)]
)
def test_a_prompt_that_is_the_negative_one_is_told_of(model, capsys, flags, told):
    sample.tell(parse(["--model", str(model), "--guidance", "1", "--negative", "", "--prompt", *flags]))
    assert ("is the negative one, '', and guidance does nothing" in capsys.readouterr().out) == told
