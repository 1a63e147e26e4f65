"""Eight virtual CPU devices, strict dtype promotion; every warning is an error (pyproject.toml).

Programs that tests start find the package wherever they run, installed or not. Most of the time goes into
compiling: on a CPU programs are compiled with little optimisation, and once for all processes of a session.
"""

import atexit
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", os.environ.get("FVDM_TEST_PLATFORM", "cpu"))
if "device_count=8" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
if os.environ["JAX_PLATFORMS"] == "cpu":
    kept = tempfile.mkdtemp(prefix="fvdm_jax_tests_")
    atexit.register(shutil.rmtree, kept, ignore_errors=True)
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": kept,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="module")
def optimised():
    """From here to the end of the module programs are compiled as for users, to compute rather than once."""
    before = jax.config._read("jax_disable_most_optimizations")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)
        jax.config.update("jax_disable_most_optimizations", False)
        yield
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True)
def as_for_users(request):
    """What looks at programs for accelerators gets them as users have them."""
    if request.node.get_closest_marker("tpu_aot"):
        request.getfixturevalue("optimised")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The folder of a model that is smaller than the bundled one."""
    import small

    folder = tmp_path_factory.mktemp("model")
    small.save(folder)
    return folder


@pytest.fixture(scope="module")
def experts(model, tmp_path_factory) -> Path:
    """The small model with two transformers, of which that of low noise is another."""
    from fvdm_jax.checkpoint import load_tree, save_tree

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


@pytest.fixture(scope="module")
def longer(model, tmp_path_factory) -> Path:
    """The small model, with clips of 17 frames, long enough for every task."""
    folder = tmp_path_factory.mktemp("longer")
    for path in model.glob("*.safetensors"):
        (folder / path.name).symlink_to(path)
    told = json.loads((model / "config.json").read_text())
    told["sampling"] |= {"frames": 17, "size": [32, 32]}
    (folder / "config.json").write_text(json.dumps(told))
    return folder


@pytest.fixture(scope="session")
def tpu():
    """Compiles for chips that are not there: devices of a slice, by its name."""
    pytest.importorskip("libtpu", reason='needs libtpu: pip install -e ".[plan]"')
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    from jax.experimental import topologies

    return functools.cache(
        lambda name: topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    )


@pytest.fixture
def alone(monkeypatch):
    """Every device does all for itself, which is compiled sooner; test_sample has the others."""
    from fvdm_jax import sampling

    monkeypatch.setattr(sampling.layouts, "recommended", lambda task, config, clip, devices, batch: "data=8")


@pytest.fixture
def here(tmp_path, monkeypatch, model):
    """An empty folder that has two pictures."""
    import numpy as np
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(model / "cache"))
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 255, (32, 48, 3), dtype=np.uint8)).save(name)
    return tmp_path
