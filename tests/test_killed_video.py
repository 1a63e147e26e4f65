"""A long video whose process is killed, again and again, is the same file in the end."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fvdm_jax import latents

ROOT = Path(__file__).resolve().parents[1]
LONG = ["--length", "12", "--overlap", "1", "--steps", "2"]


def begin(model: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "fvdm_jax.sample", "--model", str(model), *LONG, "--out", str(out)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("kills", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_a_killed_video_goes_on_to_the_same_file(model, tmp_path, monkeypatch, kills):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    whole, cut = tmp_path / "whole.mp4", tmp_path / "cut.mp4"
    process = begin(model, whole)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    part, sizes = tmp_path / "cut.latents.safetensors.part", [0]
    for _ in range(kills):
        process = begin(model, cut)
        until = time.monotonic() + 300
        # One window more than before is there, and the next is being made.
        while not (part.exists() and part.stat().st_size > sizes[-1]):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.005)
        process.kill()
        process.communicate()
        sizes.append(part.stat().st_size)
        assert not cut.exists()
    process = begin(model, cut)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    ours, theirs = (latents.load(path.with_suffix(latents.SUFFIX)) for path in (cut, whole))
    assert np.array_equal(ours, theirs) and ours.shape[1] == 25
    assert not part.exists() and not [path for path in tmp_path.iterdir() if path.name.startswith(".fvdm")]
