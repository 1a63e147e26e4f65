"""A long video whose process is killed, again and again, is the same file in the end."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fvdm_jax import latents

LONG = ["--length", "12", "--overlap", "1", "--steps", "2", "--keep", "0=a.png"]


def begin(model: Path, folder: Path, how: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "fvdm_jax.sample", "--model", str(model), *LONG, "--schedule", how]
    return subprocess.Popen(
        [*command, "--out", "long.mp4"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen) -> str:
    """What it said."""
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    return said


@pytest.mark.parametrize("how", ["together", "rolling"])
@pytest.mark.parametrize(
    "kills", [pytest.param(1, marks=pytest.mark.thorough), pytest.param(8, marks=pytest.mark.slow)]
)
def test_a_killed_video_goes_on_to_the_same_file(model, here, monkeypatch, kills, how):
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    whole, cut = here / "whole", here / "cut"
    for folder in (whole, cut):
        folder.mkdir()
        shutil.copy2("a.png", folder)
    finished(begin(model, whole, how))
    part, state = (cut / f"long{latents.SUFFIX}.{kind}" for kind in ("part", "state"))
    # Of the header alone, before the first of 25 frames of 4 × 6 × 4 numbers.
    size = (whole / f"long{latents.SUFFIX}").stat().st_size - 25 * 4 * 96
    for _ in range(kills):
        process, until = begin(model, cut, how), time.monotonic() + 300
        # One window, or frame, more than before is there, and the next is being made.
        while not (part.exists() and part.stat().st_size > size and state.exists() == (how == "rolling")):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.005)
        process.kill()
        process.communicate()
        size = part.stat().st_size
        assert not (cut / "long.mp4").exists()
    assert "going on after latent frame" in finished(begin(model, cut, how))
    for name in ("long.mp4", "long.png", f"long{latents.SUFFIX}"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    assert latents.probe(cut / f"long{latents.SUFFIX}").shape[1] == 25
    assert sorted(path.name for path in cut.iterdir()) == sorted(path.name for path in whole.iterdir())
