"""The page of all tasks, and what the doctor says."""

import re

import pytest

from fvdm_jax import demo, doctor
from fvdm_jax.evaluating.cases import TASKS
from fvdm_jax.program import run


def test_the_page_has_every_task(longer, tmp_path, capfd):
    out = tmp_path / "demo.html"
    assert run(demo.main, ["--model", str(longer), "--steps", "2", "--out", str(out)]) == 0, (
        capfd.readouterr()
    )
    page = out.read_text("utf-8")
    assert re.findall("<h2>(.*?)</h2>", page) == list(TASKS)
    assert page.count("data:video/mp4;base64,") == 2 * len(TASKS)
    # Complete in itself: nothing is fetched.
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert "2 steps × 5 frames" in page and "made: 2 calls" in page


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--steps", "0"], "--steps: 0"),
        (["--clip", "-1"], "--clip: -1"),
        (["--model", "nowhere"], "--model: nowhere"),
        (["--out", "a/b.html"], "--out: a/b.html cannot be written"),
    ],
)
def test_what_the_demo_refuses(tmp_path, monkeypatch, capfd, flags, said):
    monkeypatch.chdir(tmp_path)
    assert run(demo.main, flags) == 2
    assert said in capfd.readouterr().err and not list(tmp_path.iterdir())


def test_a_model_of_short_clips_is_refused(model, capfd):
    assert run(demo.main, ["--model", str(model)]) == 2
    assert "makes 3 latent frames, and tasks need 5" in capfd.readouterr().err


def test_the_doctor_says_what_fits(capfd):
    assert run(doctor.main, []) == 0
    told = capfd.readouterr().out
    assert "8 × cpu" in told and "wan_1_3b" in told and "attention by xla" in told
    assert re.search(r"all parameters \d+ GiB (fits|no)", told) and "GiB free where" in told
