"""The program that judges: what it refuses, what a run leaves, and what goes to VBench and comes back."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from fvdm_jax import evaluate, judge, metrics, sample
from fvdm_jax.data import source
from fvdm_jax.evaluating import cases, run, scores, vbench
from fvdm_jax.evaluating.cases import TASKS, Kept
from fvdm_jax.program import Refusal
from fvdm_jax.program import run as run_program

REFUSED = {
    "unknown": (["--tasks", "t2v,v2v"], "--tasks: 'v2v' is unknown"),
    "no tasks": (["--tasks", ","], "--tasks"),
    "no model": (["--model", "nowhere"], "--model: nowhere"),
    "short": (["--model", "short"], "--model: short makes 3 latent frames"),
    "there": (["--out", "there"], "--out: there.json exists"),
    "steps": (["--steps", "0"], "--steps: 0"),
    "batches": (["--clips", "10", "--batch", "4"], "--clips: 10 do not divide"),
    "no images": (["--export", "vbench-i2v"], "--export: needs images"),
    "no export": (["--images", "pictures"], "go with --export"),
    "a preset": (["--preset", "pusa-wan21"], "--preset, --lora: go with --export"),
    "too long": (["--export", "vbench-i2v", "--prompts", "long.json"], "at most 255"),
    "slash": (["--export", "vbench-i2v", "--prompts", "slash.json"], "no file can be named"),
    "no results": (["--collect", "pictures"], "holds no *_eval_results.json"),
}
SCRIPT = """
import json, sys
from fvdm_jax.evaluate import main
from fvdm_jax.program import run
for argv in json.loads(sys.argv[1]):
    print(run(main, argv), file=sys.stderr)
print("jax" in sys.modules)
"""


def test_refusals_are_one_line_and_come_before_jax(tmp_path, model):
    (tmp_path / "there.json").write_text("{}")
    (tmp_path / "short").symlink_to(model)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name, prompt in (("long", "é" * 125), ("slash", "either/or")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"a.png": prompt}))
    asked = json.dumps([argv for argv, _ in REFUSED.values()])
    command = [sys.executable, "-c", SCRIPT, asked]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert done.stdout.strip() == "False" and len(lines) == 2 * len(REFUSED)
    for line, code, (_, wanted) in zip(lines[::2], lines[1::2], REFUSED.values(), strict=True):
        assert code == "2" and line.startswith("error: ") and wanted in line


def test_cases_of_the_bundled_length():
    """Nine latent frames, 33 pixel frames: what is given, and where it meets what is made."""
    at = {name: TASKS[name](9) for name in TASKS}
    given = {name: sorted(case.given) for name, case in at.items()}
    assert given == {
        "t2v": [], "i2v": [0], "start-end": [0, 8], "extension": [0, 1, 2, 3], "completion": [0, 4, 8],
        "transition": [0, 1, 7, 8], "long": [],
    }  # fmt: skip
    assert [at[name].seams for name in ("i2v", "start-end", "extension")] == [[1], [1, 29], [13]]
    assert at["transition"].seams == [5, 25] and at["t2v"].seams == []
    assert Kept(0, 4).pixels == slice(0, 13) and Kept(8).pixels == slice(32, 33)
    long = at["long"]
    assert (long.windows, long.overlap, long.latents, long.frames) == (7, 4, 39, 153)
    assert long.latents >= cases.LONGER * 9 and long.seams == [33, 53, 73, 93, 113, 133]


@pytest.fixture(scope="module")
def true():
    """Two scenes and their clips."""
    scene = source.scenes(5, range(2))
    return scene, np.asarray(jax.jit(source.moving_shapes, static_argnums=(1, 2, 3))(scene, 33, 64, 64))


def test_true_clips_have_the_best_scores(true):
    scene, clips = true
    case = TASKS["extension"](9)
    rows = []
    for i, pixels in enumerate(clips):
        reading = judge.read(pixels)
        clip = scores.Clip(pixels, pixels, reading, reading, scene, i)
        rows.append(scores.scored(clip, case, [pixels[case.kept[0].pixels]]))
    found = scores.summary(rows)
    for name in ("all", "continues"):
        assert found[name]["rate"] == 1 and found[name]["count"] == 2 and found[name]["low"] < 0.4
    assert found["frozen"]["hits"] == 0 and found["path"]["mean"] == found["change"]["mean"] == 1
    assert found["kept_psnr"] == {"mean": None, "median": None, "spread": None, "count": 0, "exact": 2}
    # A seam in a true clip is a frame like the others.
    assert found["seam_motion"]["mean"] == pytest.approx(1, abs=0.5)
    assert found["kept_ssim"]["mean"] == pytest.approx(1) and "reaches" not in found


def test_a_jump_at_a_seam_is_seen(true):
    scene, (pixels, _) = true
    reading = judge.read(pixels)
    brighter = pixels.copy()
    brighter[13:] = np.clip(brighter[13:] + 0.3, -1, 1)
    case = TASKS["extension"](9)
    same, jump = (
        scores.seams(scores.Clip(p, pixels, reading, reading, scene, 0), case) for p in (pixels, brighter)
    )
    assert jump["seam_delta_e"] > 5 > 1 > same["seam_delta_e"] and jump["seam_colour"] > 5


@pytest.mark.thorough
def test_a_run_leaves_scores_and_a_picture(longer, tmp_path, capfd):
    out = tmp_path / "found"
    argv = ["--model", longer, "--clips", "2", "--batch", "2", "--steps", "2", "--out", out]
    code = run_program(evaluate.main, list(map(str, argv)))
    said, err = capfd.readouterr()
    assert code == 0, err
    record = json.loads(out.with_suffix(".json").read_text())
    assert set(record) == {
        "model", "settings", "scenes", "device", "versions", "seconds", "losses", "tasks", "frechet",
    }  # fmt: skip
    assert set(record["tasks"]) == {*TASKS, run.CEILING, f"{run.CEILING}, long"}
    assert set(record["losses"]) == {"equal", "random", "first", "ends", "prefix"}
    assert record["settings"]["steps"] == 2 and record["frechet"]["clips"] == 2
    for name, task in record["tasks"].items():
        assert {"colour", "shape", "all", "path", "frozen", "change"} <= set(task["scores"])
        assert set(task["scores"]["all"]) == set(metrics.Rate._fields) and task["clips"] == 2
        assert task["frechet"] >= 0 and f"\n{name} " in said
    tasks = {name: set(task["scores"]) for name, task in record["tasks"].items()}
    assert "continues" in tasks["extension"] and "reaches" in tasks["start-end"]
    assert "reaches" not in tasks["i2v"] and "kept_psnr" not in tasks["t2v"]
    assert "drift_area" in tasks["long"] and "seam_delta_e" in tasks["long"]
    with Image.open(out.with_suffix(".png")) as picture:
        assert picture.width < 2000 and picture.height > 2 * 9 * 150


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for prompt in ("a bear climbs over a fence.", "eggs, whisked"):
        Image.new("RGB", (32, 32), "red").save(folder / f"{prompt}.png")
    return folder


NAMES = {f"{p}-{i}.mp4" for p in ("a bear climbs over a fence.", "eggs, whisked") for i in range(5)}


def test_an_export_that_was_stopped_goes_on(images, tmp_path, monkeypatch, capfd):
    """Stopped in the midst of the fourth video; nothing half-written counts, and nothing is made twice."""
    out, made = tmp_path / "out", []

    def sampled(request, make, pair, seed, path):
        path.write_bytes(b"half")
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append((pair.prompt, seed))
        path.write_bytes(b"a whole video " + str(seed).encode())

    monkeypatch.setattr(evaluate, "sampled", sampled)
    monkeypatch.setattr(evaluate, "sampler", lambda asked, stages: None)
    argv = ["--export", "vbench-i2v", "--images", str(images), "--out", str(out)]
    assert run_program(evaluate.main, argv) == 130
    assert (
        len(list((out / "videos").iterdir()))
        == len(json.loads((out / "manifest.json").read_text())["videos"])
        == 3
    )
    # A file that is shorter than the manifest says is no video.
    damaged = sorted((out / "videos").iterdir())[0]
    damaged.write_bytes(b"")
    made.insert(0, "not three")
    assert run_program(evaluate.main, argv) == 0
    assert {path.name for path in (out / "videos").iterdir()} == NAMES
    told = json.loads((out / "manifest.json").read_text())["videos"]
    assert set(told) == NAMES and len(set(made[1:])) == 10 and len(made) == 1 + 10 + 1
    assert len({one["seed"] for one in told.values()}) == 10
    assert all((out / "videos" / name).stat().st_size == one["bytes"] for name, one in told.items())
    assert run_program(evaluate.main, argv) == 0 and len(made) == 12
    capfd.readouterr()
    assert run_program(evaluate.main, [*argv, "--guidance", "7"]) == 2
    assert "was made with guidance" in capfd.readouterr().err


def test_a_video_of_an_export_is_a_sample(model, images, tmp_path, monkeypatch):
    """It is what `python -m fvdm_jax.sample` makes of the image and the prompt, kept by these names."""
    asked = []

    def together(requests, studio, stages, projector):
        asked.extend(requests)
        requests[0].out.write_bytes(b"video")

    monkeypatch.setattr(sample, "together", together)
    argv = ["--model", model, "--export", "vbench-i2v", "--images", images, "--samples", "1", "--steps", "4"]
    out = tmp_path / "out"
    assert run_program(evaluate.main, [*map(str, argv), "--out", str(out)]) == 0
    told = json.loads((out / "manifest.json").read_text())["videos"]
    assert len(asked) == 2 and all(request.steps == 4 and request.guidance == 2 for request in asked)
    for request, (name, one) in zip(asked, told.items(), strict=True):
        assert (out / "videos" / name).read_bytes() == b"video" and name == f"{request.prompt}-0.mp4"
        assert request.seed == one["seed"] and request.strength == [0, 1, 1]
        assert str(request.keeps[0].path) == one["image"] == str(images / f"{request.prompt}.png")
    # By a preset as by a flag: Pusa keeps its image at 0.2, and gives its own LoRA 1.4.
    (tmp_path / "lora" / "adapters").mkdir(parents=True)
    argv += ["--preset", "pusa-wan21", "--lora", str(tmp_path / "lora"), "--out", str(tmp_path / "pusa")]
    assert run_program(evaluate.main, [*map(str, argv)]) == 0
    assert all(request.strength == [0.2, 1, 1] and request.spacing == "pusa" for request in asked[2:])
    assert all(request.steps == 4 and request.guidance == 3 for request in asked[2:])
    assert [request.lora for request in asked[2:]] == [((str(tmp_path / "lora"), 1.4, ""),)] * 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps([{"image_name": "x.png", "prompt_en": "a hat", "dimension": ["i2v_subject"]}])),
        ("b.json", json.dumps([{"file_name": "x.png", "caption": "a hat", "type": "other"}])),
        ("c.json", json.dumps({"x.png": "a hat"})),
        ("d.tsv", "x.png\ta hat\n"),
    ],
)
def test_lists_of_prompts_are_read(name, text, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    (tmp_path / name).write_text(text)
    assert vbench.pairs(None, tmp_path / name) == [vbench.Pair(tmp_path / "x.png", "a hat")]


def test_bad_lists_are_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "y.png")
    path = tmp_path / "a.json"
    for text, wanted in (
        ("[", "no list"),
        ("[1]", "no list"),
        ('[{"image": "x.png"}]', "no list"),
        ('{"z.png": "a"}', "there is no"),
        ('{"x.png": "a", "y.png": "a"}', "two images"),
    ):
        path.write_text(text)
        with pytest.raises(Refusal, match=wanted):
            vbench.pairs(None, path)


def test_results_of_vbench_are_collected(tmp_path, capfd):
    videos = [{"video_path": f"{i}.mp4", "video_results": 0.9} for i in range(3)]
    for name, score in (("i2v_subject", 0.9), ("camera_motion", 0.25)):
        (tmp_path / f"{name}_eval_results.json").write_text(json.dumps({name: [score, videos]}))
    out = tmp_path / "found"
    argv = ["--collect", str(tmp_path), "--out", str(out)]
    assert run_program(evaluate.main, argv) == 0
    said = capfd.readouterr().out
    assert "i2v_subject" in said and "90.00%" in said and "25.00%" in said
    found = json.loads(out.with_suffix(".json").read_text())["dimensions"]
    assert found["camera_motion"]["score"] == 0.25 and found["camera_motion"]["videos"] == 3
    (tmp_path / "again_eval_results.json").write_text(json.dumps({"camera_motion": [0.5, videos]}))
    assert run_program(evaluate.main, [*argv, "--overwrite"]) == 2
    assert "camera_motion is also in" in capfd.readouterr().err
