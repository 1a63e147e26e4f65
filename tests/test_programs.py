"""Programs that are kept: what is said before one is compiled, and what a damaged cache does to it."""

import json
import re
import threading
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from fvdm_jax import programs
from fvdm_jax.commands import parse
from fvdm_jax.progress import Stages
from fvdm_jax.studio import Studio

CONFIG = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
FIRST = "compiling double (3) for cpu: for the first time here"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of kept programs of a user who has none, however short they are to compile."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before, folder = [jax.config._read(name) for name in CONFIG], tmp_path / "fvdm_jax" / "programs"
    for name, value in zip(CONFIG, (str(folder), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield folder
    for name, value in zip(CONFIG, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compiled(function=lambda x: 2 * x) -> list[str]:
    """What is said when `function`, by itself doubling, is compiled by a process that has not compiled it."""

    def double(x):
        return function(x)

    said: list[str] = []
    program = programs.compiled(said.append, jax.jit(double).lower(jnp.ones(3)), "double (3)")
    assert program(jnp.ones(3)).tolist() == [2, 2, 2]
    return said


def remember(folder: Path, seconds: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"seconds": {"double (3) for cpu": seconds}, "kept": []}
    (folder / "times.json").write_text(json.dumps(content))


def test_only_what_is_not_kept_is_announced(folder, monkeypatch):
    assert compiled() == [FIRST]
    monkeypatch.setattr(programs, "LONG", 0.0)
    assert compiled() == [] and len(list(folder.glob("jit_double-*-cache"))) == 1
    # Another program of the same name has to be compiled.
    assert compiled(lambda x: x + x) == [FIRST.replace("for the first time here", "took 0 s last time")]


@pytest.mark.parametrize(
    ("seconds", "said"), [(41.2, ["compiling double (3) for cpu: took 41 s last time"]), (1.9, [])]
)
def test_how_long_it_took_is_said_where_it_was_long(folder, seconds, said):
    remember(folder, seconds)
    assert compiled() == said
    assert json.loads((folder / "times.json").read_text())["seconds"]["double (3) for cpu"] < 1.9


def test_a_program_that_calls_back_is_announced_where_jax_does_not_keep_it(folder, monkeypatch):
    """jax 0.10 does not, 0.11 does."""

    def watched(x):
        jax.debug.callback(lambda: None)
        return 2 * x

    monkeypatch.setattr(programs, "LONG", 0.0)
    assert compiled(watched) == [FIRST]
    kept = list(folder.glob("jit_double-*-cache"))
    assert bool(compiled(watched)) == (not kept) == (jax.__version_info__ < (0, 11))


def test_the_devices_of_a_mesh_are_named(folder):
    over = jax.sharding.Mesh(jax.devices()[:2], "x")
    split = jax.sharding.NamedSharding(over, jax.sharding.PartitionSpec("x"))
    said: list[str] = []
    x = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=split)
    programs.compiled(said.append, jax.jit(lambda x: 2 * x).lower(x), "double (4)")
    assert said == ["compiling double (4) for 2 × cpu: for the first time here"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff", b'{"seconds": {"a": "x"}, "kept": []}', b'{"seconds": 1, "kept": null}'],
)
def test_a_damaged_file_of_times_is_written_anew(folder, content):
    folder.mkdir(parents=True)
    (folder / "times.json").write_bytes(content)
    assert compiled() == [FIRST] and compiled() == []
    assert list(json.loads((folder / "times.json").read_text())["seconds"]) == ["double (3) for cpu"]


def test_without_a_place_for_times_programs_are_compiled(folder):
    folder.parent.mkdir()
    folder.write_text("in the way")
    with warnings.catch_warnings():
        # jax's own, of its cache.
        warnings.simplefilter("ignore")
        assert compiled() == [FIRST] and compiled() == [FIRST]


@pytest.mark.parametrize("length", [0, 10, -1])
def test_a_damaged_program_is_compiled_and_kept_anew(folder, length):
    compiled()
    (kept,) = folder.glob("jit_double-*-cache")
    whole = kept.read_bytes()
    kept.write_bytes(whole[:length])
    (note,) = compiled()
    assert note.startswith("note: jit_double was damaged")
    compiled()
    assert len(kept.read_bytes()) > 0.9 * len(whole) and compiled() == []


def test_what_jax_warns_of_otherwise_is_passed_on():
    with pytest.warns(UserWarning, match="something else"), programs._removing() as damaged:
        warnings.warn("something else", stacklevel=1)
    assert damaged == []


def test_times_of_processes_that_write_at_once_stay_whole(tmp_path):
    def write(name: str) -> None:
        for i in range(5):
            programs.Times(tmp_path / "times.json").add(f"{name}{i}", name, 41.0, True)

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    last = [programs.Times(tmp_path / "times.json").line(f"{name}4", "") for name in "abc"]
    assert "took 41 s last time" in " ".join(last)
    assert [path.name for path in tmp_path.iterdir()] == ["times.json"]


def test_the_oldest_times_are_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "REMEMBERED", 2)
    times = programs.Times(tmp_path / "times.json")
    for name in ("a", "b", "a", "c"):
        times.add(name, name, 41.0, name != "b")
    assert [times.line(name, name) for name in "ac"] == [None, None]
    assert times.line("b", "b").endswith("for the first time here")


def test_a_second_run_of_the_sampler_says_nothing(folder, model, tmp_path, capfd):
    request, said = parse(["--model", str(model), "--out", str(tmp_path / "out.mp4")]), []
    for _ in range(2):
        Studio([request], Stages()).clip(request)
        said.append([line for line in capfd.readouterr().err.splitlines() if "denoise" in line])
    (line,), second = said
    assert re.fullmatch(r"compiling denoise \(3x4x6\) for .*cpu: for the first time here", line)
    assert second == []
