"""The wheel: built, installed where nothing else is, and run from an empty folder."""

import os
import site
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]


def run(*argv: str | Path, cwd: Path) -> str:
    """What a program says, that must end well; nothing tells it of the checkout."""
    known = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    made = subprocess.run(list(map(str, argv)), cwd=cwd, env=known, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-3000:]
    return made.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built of what git tracks, as a release is."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source, cwd=folder)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The bin folder of an environment that has the wheel, and of the others what is here."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    python = folder / "env" / "bin" / "python"
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "env")}))
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel, cwd=folder)
    assert (packages / "fvdm_jax").is_dir()
    # A finder of an editable install would lead back to the checkout; a plain path does not start one.
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))
    assert str(packages) in run(python, "-c", "import fvdm_jax; print(fvdm_jax.__file__)", cwd=folder)
    return python.parent


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def test_it_holds_the_packages_and_the_model_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fvdm_jax").rglob("*.py")}
    modules |= {f"fvdm_jax/convert/{path.name}" for path in (ROOT / "convert").glob("*.py")}
    model = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fvdm_jax/assets/tiny").iterdir()}
    model |= {"fvdm_jax/convert/weights.lock.json"}
    assert {name for name in names if ".dist-info/" not in name} == modules | model
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert wheel.stat().st_size < 20 << 20


def test_programs_run_from_an_empty_folder(installed, empty):
    said = run(installed / "python", "-m", "fvdm_jax.sample", "--explain", cwd=empty)
    assert "20 calls of the network" in said and not list(empty.iterdir())
    assert "SOURCE" in run(installed / "fvdm-convert", "--help", cwd=empty)
    run(installed / "fvdm-sample", "--steps", "2", "--prompt", "a red circle", cwd=empty)
    made = {"fvdm.mp4", "fvdm.png", "fvdm.json", "fvdm.latents.safetensors"}
    assert {path.name for path in empty.iterdir()} == made


def test_every_program_gives_help(installed, empty):
    for path in sorted(installed.glob("fvdm-*")):
        assert "usage" in run(path, "--help", cwd=empty), path.name
    assert len(list(installed.glob("fvdm-*"))) == 9
