"""The sampler where circumstances are against it: a bare environment, a full disk, Ctrl-C at any moment."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fvdm_jax import video

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def sampler(model, here):
    """Runs the program as a user does, in a folder with two pictures; `here` is that folder."""

    def start(*argv: str, first: str = "", environment: dict | None = None, **options):
        command = [sys.executable, "-m", "fvdm_jax.sample", "--model", str(model), *argv]
        command = ["sh", "-c", f'{first} exec "$@"', "sh", *command]
        without = ("HOME", "LANG", "XLA_FLAGS")
        told = {name: value for name, value in os.environ.items() if name not in without}
        told |= environment or {}
        return subprocess.run(command, cwd=here, env=told, capture_output=True, **options)

    return start


@pytest.mark.thorough
def test_a_bare_environment_will_do(sampler, here, model):
    """No HOME, a locale of ASCII alone, nobody who reads what is printed: the video is there all the same."""
    told = {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "XDG_CACHE_HOME": str(model / "cache"),
    }
    argv = ("--prompt", "größer 👩 שלום", "--out", "größe.mp4", "--keep", "0=a.png")
    done = sampler(*argv, first="exec >&-;", environment=told)
    assert done.returncode == 0, done.stderr
    assert json.loads((here / "größe.json").read_text("utf-8"))["prompt"] == "größer 👩 שלום"
    assert video.probe(here / "größe.mp4").frames == 9


def test_a_disk_that_is_full_at_the_end_costs_no_finished_latents(sampler, here, model):
    """As large a file as the latents may be written, and none as large as the video."""
    told = {"XDG_CACHE_HOME": str(model / "cache")}
    before = set(here.iterdir())
    done = sampler("--out", "v.mp4", first="ulimit -f 8;", environment=told, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: v.mp4: cannot be written: File too large")
    assert "what was denoised is safe" in done.stderr and "Traceback" not in done.stderr
    assert set(here.iterdir()) - before == {here / "v.latents.safetensors"}
    again = sampler("--decode", "v.latents.safetensors", "--out", "v.mp4", environment=told, text=True)
    assert again.returncode == 0 and video.probe(here / "v.mp4").frames == 9, again.stderr


@pytest.mark.parametrize("moment", [0.0, 1.0, 3.0, 6.0])
def test_ctrl_c_ends_it_at_any_moment(model, tmp_path, moment):
    """So many seconds after its first line: while jax is imported, loads, compiles or denoises."""
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    size = ["--steps", "1000", "--size", "128x128", "--frames", "81"]
    code = listen + "from fvdm_jax.sample import cli; cli()"
    command = [sys.executable, "-c", code, "--model", str(model), "--out", str(tmp_path / "out.mp4"), *size]
    told = os.environ | {"XDG_CACHE_HOME": str(model / "cache")}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=told, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout.readline().startswith("21 latent frames")
        time.sleep(moment)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert process.wait(timeout=10) == 130 and time.monotonic() - began < 5
        errors = process.stderr.read()
        assert errors.splitlines()[-1] == "stopped" and "Traceback" not in errors
    assert not list(tmp_path.iterdir())


STOPPER = """\
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["STOP_AT"]:
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(
    "program, module",
    [("fvdm_jax.sample", "numpy"), ("fvdm_jax.sample", "jax"), ("convert", "convert.tensors"),
     ("fvdm_jax.train", "fvdm_jax.program")],
)  # fmt: skip
def test_ctrl_c_ends_it_while_it_is_imported(tmp_path, program, module):
    """Long before the program itself is there to listen."""
    (tmp_path / "sitecustomize.py").write_text(STOPPER)
    told = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "STOP_AT": module}
    command = [sys.executable, "-m", program, "--out", str(tmp_path / "a.mp4")]
    done = subprocess.run(command, cwd=ROOT, env=told, capture_output=True, text=True)
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "stopped"
