"""Nothing touches the network unless it is asked to, and importing does nothing but import.

Every program runs with a hook that notes what Python does (sys.addaudithook) and, where the system lets it,
in a namespace that has no network at all, in which code that is not Python's finds none either.
"""

import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import small
from test_convert_program import put, weights

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = [
    "fvdm_jax.sample", "convert", "fvdm_jax.data.precompute", "fvdm_jax.train", "fvdm_jax.plan",
    "fvdm_jax.bench", "fvdm_jax.evaluate", "fvdm_jax.demo", "fvdm_jax.doctor",
]  # fmt: skip
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("fvdm_jax", "convert")
    for path in (ROOT / folder).rglob("*.py")
    if not path.stem.startswith("__")
    # The served page is imported with gradio at hand, an extra's.
    and (path.parent.name != "serving" or importlib.util.find_spec("gradio"))
)
HOOK = """\
import os, socket, sys

_open = os.open(os.environ["NOTED"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def _note(event, arguments):
    if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"):
        if arguments[0].family == socket.AF_UNIX:
            return
    elif event == "open":
        if isinstance(arguments[0], int) or arguments[0] == os.devnull:
            return
        if not isinstance(arguments[2], int) or not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
    elif event not in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "os.mkdir"):
        return
    os.write(_open, f"{event} {arguments[0]!r}\\n".encode())
    if event.startswith("socket."):
        raise PermissionError("the network is forbidden")


sys.addaudithook(_note)
"""
APART = ["unshare", "--map-root-user", "--net"]


def without_network() -> list[str]:
    """What to put before a command so that there is no network; nothing where the system does not let us."""
    if not shutil.which("unshare") or subprocess.run([*APART, "true"], capture_output=True).returncode:
        return []
    return APART


@pytest.fixture
def watched(tmp_path):
    """Runs Python with these arguments; gives what it printed, what was noted, and its seconds of CPU."""
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(HOOK)

    def run(*arguments: object, before: list[str] = (), **environment: str):
        noted = tmp_path / "noted"
        noted.unlink(missing_ok=True)
        told = os.environ | {"PYTHONPATH": f"{hooks}{os.pathsep}{ROOT}", "NOTED": str(noted)}
        told |= {"PYTHONDONTWRITEBYTECODE": "1", "XLA_FLAGS": ""} | environment
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [*before, sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=told, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr[-2000:]
        seconds = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
        return done.stdout, noted.read_text().splitlines(), seconds

    return run


def reached(noted: list[str]) -> list[str]:
    return [line for line in noted if line.startswith("socket.")]


def test_the_hook_sees_what_would_reach_the_network(watched):
    code = """
import socket, urllib.request
for reach in (
    lambda: socket.create_connection(("127.0.0.1", 9)),
    lambda: urllib.request.urlopen("http://localhost:9"),
    lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", 9)),
):
    try: reach()
    except PermissionError: print("refused")
    except OSError as failure: print(failure)
"""
    printed, noted, _ = watched("-c", code)
    assert printed.count("refused") + printed.count("forbidden") == 3 and len(reached(noted)) == 3


def test_importing_does_nothing_but_import(watched):
    """No backend of jax, no file, no folder, no handler of a signal, no network; and no HOME is needed."""
    code = f"""
import importlib, json, os, signal, sys, threading
os.environ.pop("HOME", None); os.environ.pop("XDG_CACHE_HOME", None)
numbers = sorted(signal.valid_signals())
before = [signal.getsignal(number) for number in numbers]
for module in {MODULES}: importlib.import_module(module)
import jax._src.xla_bridge
print(json.dumps({{
    "handlers": before == [signal.getsignal(number) for number in numbers],
    "backends": list(jax._src.xla_bridge._backends),
}}))
"""
    printed, noted, _ = watched("-c", code)
    assert json.loads(printed.splitlines()[-1]) == {"handlers": True, "backends": []}
    assert not noted


def test_the_package_itself_costs_nothing(watched):
    heavy = "[m for m in ('jax', 'numpy', 'flax', 'gradio') if m in sys.modules]"
    printed, _, seconds = watched("-c", f"import fvdm_jax, sys; print({heavy})")
    assert printed == "[]\n" and seconds < 0.3


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_there_at_once(watched, program):
    """In a second of the processor's time, in which there is no time for jax, and without writing a file."""
    printed, noted, seconds = watched("-m", program, "--help")
    assert printed.startswith("usage:") and "--debug" in printed
    assert not noted and seconds < 1.0


CANNOT_BE = {
    "convert": ["none.pth", "out"], "fvdm_jax.demo": ["--steps", "0"],
    "fvdm_jax.data.precompute": ["none", "--out", "records"], "fvdm_jax.train": ["none.py", "--out", "run"],
    "fvdm_jax.plan": ["none.py", "--topology", "v5p:2x2x1"], "fvdm_jax.evaluate": ["--clips", "0"],
}  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS[1:])
def test_a_refusal_takes_less_than_a_second_and_no_jax(tmp_path, program):
    """Of sample in test_request.py. A config that is there is code, which imports jax before its flags."""
    command = [sys.executable, "-X", "importtime", "-m", program, *CANNOT_BE.get(program, ["--flames"])]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    here = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=here, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and done.stdout == "" and len(said) == 1 and said[0].startswith("error: ")
    assert not [line for line in done.stderr.splitlines() if line.rstrip().endswith((" jax", " flax"))]
    assert after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime < 1.0
    assert not [*tmp_path.iterdir()]


def test_every_program_is_among_them():
    import tomllib

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].values()
    named = {
        entry.partition(":")[0].removeprefix("fvdm_jax.convert.__main__") or "convert" for entry in scripts
    }
    assert named == set(PROGRAMS)


@pytest.mark.thorough
def test_programs_run_without_a_network(watched, tmp_path, longer):
    before, config = without_network(), small.training(tmp_path, steps=2, save_every=2, held_out=0)
    source, made = put(tmp_path / "source", weights("dit_t2v")), tmp_path / "made"
    (tmp_path / "clips").mkdir()
    shutil.copy(ROOT / "tests/golden/real.jpg", tmp_path / "clips")
    model, here = ["--model", longer], {"XDG_CACHE_HOME": str(longer / "cache")}
    runs = {
        "doctor": [],
        "sample": [*model, "--steps", 1, "--out", made / "a.mp4"],
        "convert": [source, made / "model"],
        "data.precompute": ["clips", *model, "--images", "--caption", "a cat", "--out", made / "records"],
        "train": [config, "--synthetic", "--out", made / "run"],
        "evaluate": [*model, "--clips", 1, "--steps", 1, "--tasks", "t2v", "--out", made / "scores"],
    }
    made.mkdir()
    for name, arguments in runs.items():
        program = name if name == "convert" else f"fvdm_jax.{name}"
        _, noted, _ = watched("-m", program, *arguments, before=before, **here)
        assert not reached(noted), name
    assert {"a.mp4", "model", "records", "run", "scores.json"} <= {*os.listdir(made)}


def test_a_namespace_has_no_network(watched):
    before = without_network()
    if not before:
        pytest.skip("this system gives nobody a namespace without network")
    printed, _, _ = watched("-c", "print(open('/proc/net/dev').read())", before=before)
    assert [line.split(":")[0].strip() for line in printed.splitlines() if ":" in line] == ["lo"]
