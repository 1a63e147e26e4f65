"""Checkpoints: what was damaged is never gone on from, what cannot be written costs nothing but itself."""

import gc
import json
import re
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fvdm_jax import integrity, saving, sharding
from fvdm_jax.config import Training
from fvdm_jax.program import Refusal
from fvdm_jax.saving import Checkpoints, Position
from fvdm_jax.training import TrainState

# Where a file is damaged, threads of Orbax's that nobody waits for end with noise of their own.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
SETTINGS = Training(keep_last=3)
SPECS = {"wide": ("fsdp", "tensor"), "tall": (None, "fsdp"), "norm": ()}


def over(**sizes):
    return sharding.mesh(**sizes)


def state(step: int, mesh=None, specs=SPECS) -> TrainState:
    """A state of a few arrays, which differ from step to step."""
    mesh = mesh or over(data=2, fsdp=2, context=1, tensor=2)
    rng = np.random.default_rng(step)
    shapes = {"wide": (16, 256), "tall": (64, 16), "norm": (32,)}

    def placed(array, spec=()):
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))

    def tree(dtype):
        return {
            name: placed(rng.standard_normal(shape).astype(dtype), specs[name])
            for name, shape in shapes.items()
        }

    return TrainState(
        placed(jnp.int32(step)),
        tree(np.float32),
        {"m": tree(jnp.bfloat16)},
        None,
        placed(jax.random.key(step)),
    )


def shapes_of(of: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), of)


def same(a: TrainState, b: TrainState) -> bool:
    pairs = zip(jax.tree.leaves(saving.raw(a)), jax.tree.leaves(saving.raw(b)), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run's folder with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(folder, SETTINGS)
    for step in (1, 2):
        checkpoints.save(state(step), Position(step, 8 * step))
    checkpoints.settle()
    checkpoints.close()
    return folder


@pytest.fixture
def run(saved, tmp_path):
    """A copy of that folder, opened; `told` has what was said."""
    shutil.copytree(saved, tmp_path / "run")
    said = []
    opened = []

    def reopened(**flags) -> Checkpoints:
        opened.append(Checkpoints(tmp_path / "run", SETTINGS, tell=said.append, **flags))
        return opened[-1]

    yield SimpleNamespace(open=reopened, told=said, steps=tmp_path / "run" / saving.CHECKPOINTS)
    for each in opened:
        each.close()


@pytest.mark.fault("T10")
@pytest.mark.parametrize(
    "sizes", [{}, {"data": 8}, {"fsdp": 8}, {"data": 2, "context": 2, "tensor": 2}], ids=str
)
def test_a_state_comes_back_to_the_bit_on_any_mesh(run, sizes):
    mesh = over(**({"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | sizes))
    wanted = state(2, mesh, {"wide": (None, "tensor"), "tall": ("fsdp",), "norm": ()})
    found, position = run.open().restore(shapes_of(wanted))
    assert same(found, wanted) and position == (2, 16) and not run.told
    assert found.params["wide"].sharding == wanted.params["wide"].sharding


def damage(path: Path, kind: str, rng) -> None:
    content = bytearray(path.read_bytes())
    at = int(rng.integers(len(content)))
    if kind == "flip":
        content[at] ^= 1 << int(rng.integers(8))
    elif kind == "cut":
        content = content[:at]
    elif kind == "zero":
        content = bytearray(len(content))
    path.write_bytes(content)
    if kind == "lost":
        path.unlink()


def outcome(steps: Path, folder: Path, kind: str, number: int) -> str:
    """Damages a file of the newest checkpoint, in a copy: what is said of it, if it is found.

    If not, the state is still the one saved. Every copy has a name of its own, since what was read of a file
    is kept.
    """
    rng = np.random.default_rng((number, len(kind)))
    shutil.copytree(steps.parent, folder)
    files = [path for path in sorted((folder / saving.CHECKPOINTS / "2").rglob("*")) if path.is_file()]
    # As a disk would: a byte of a file of ten thousand is hit ten times as often as one of a thousand.
    weights = np.array([path.stat().st_size for path in files], float)
    damage(files[rng.choice(len(files), p=weights / weights.sum())], kind, rng)
    said = []
    checkpoints = Checkpoints(folder, SETTINGS, tell=said.append)
    found, position = checkpoints.restore(shapes_of(state(1)))
    checkpoints.close()
    step, aside = position.batch, folder / saving.CHECKPOINTS / "2.corrupt"
    assert same(found, state(step)), (kind, number)
    assert (step == 1) == aside.is_dir() == bool(said)
    shutil.rmtree(folder)
    return said[0] if said else ""


KINDS = {"flip": 12, "cut": 6, "lost": 4, "zero": 4}
MANY = {"flip": 150, "cut": 60, "lost": 30, "zero": 30}


@pytest.mark.fault("T5")
@pytest.mark.parametrize(
    "counts", [KINDS, pytest.param(MANY, marks=pytest.mark.slow)], ids=["some", "150 flips and 120 others"]
)
def test_damage_is_found_before_training_and_the_step_before_is_taken(run, tmp_path, counts, capsys):
    said = {
        kind: [outcome(run.steps, tmp_path / f"{kind} {number}", kind, number) for number in range(count)]
        for kind, count in counts.items()
    }
    with capsys.disabled():
        for kind, lines in said.items():
            print(f"\n{kind}: {sum(map(bool, lines))} found of {len(lines)}", end="")
    # Threads of Orbax's that nobody waits for end here, and not in another test.
    gc.collect()
    assert all(all(lines) for lines in said.values())
    every = [line for lines in said.values() for line in lines if line]
    told = "the checkpoint of step 2 is damaged: .*; it is set aside, and that of step 1 taken"
    assert all(re.search(told, line) for line in every)


def test_a_flipped_bit_of_an_array_is_known_by_its_digest(run):
    """Also where no hash of a file tells of it, as of large ones."""
    data = largest(run.steps / "2")
    content = bytearray(data.read_bytes())
    content[5000] ^= 4
    data.write_bytes(content)
    (run.steps / "2" / integrity.FILES).unlink()
    assert run.open().restore(shapes_of(state(1)))[1].batch == 1
    assert re.search("damaged: (params|optimizer/m)/(wide|tall) is not what was saved", run.told[0])


def largest(folder: Path) -> Path:
    """The file that holds the arrays."""
    return max(folder.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)


@pytest.mark.fault("T5")
def test_a_damaged_one_may_be_refused(run):
    data = largest(run.steps / "2")
    data.write_bytes(bytes(data.stat().st_size))
    with pytest.raises(Refusal, match="step 2 is damaged.*leave --no-fallback out"):
        run.open().restore(shapes_of(state(1)), fallback=False)
    assert (run.steps / "2").is_dir()


def test_a_changed_position_is_found(run):
    (run.steps / "2" / integrity.FILES).unlink()
    path = run.steps / "2" / "run" / "metadata"
    path.write_text(path.read_text().replace('"batch": 2', '"batch": 3'))
    assert run.open().restore(shapes_of(state(1)))[1].batch == 1
    assert "what is stored with it has changed" in run.told[0]


@pytest.mark.fault("T5")
def test_nothing_is_set_aside_where_none_is_sound(run):
    for step in "12":
        shutil.rmtree(run.steps / step / "state" / "d")
    with pytest.raises(Refusal, match="none of its 2 checkpoints is sound"):
        run.open().restore(shapes_of(state(1)))
    assert {path.name for path in run.steps.iterdir()} == {"1", "2"}


def test_other_arrays_are_no_damage(run):
    wanted = shapes_of(state(2))
    with pytest.raises(Refusal, match=r"optimizer/v was saved as no part, and is now \(\(32,\), 'float32'\)"):
        run.open().restore(wanted._replace(optimizer=wanted.optimizer | {"v": wanted.params["norm"]}))
    assert {path.name for path in run.steps.iterdir()} == {"1", "2"}


def test_a_part_is_checked_too(run):
    wanted = shapes_of(state(2)).params
    found, step = run.open(read_only=True).part("params", wanted)
    assert step == 2 and np.array_equal(found["wide"], state(2).params["wide"])
    data = largest(run.steps / "2")
    data.write_bytes(bytes(data.stat().st_size))
    assert run.open(read_only=True).part("params", wanted)[1] == 1
    # One who only reads changes nothing.
    assert {path.name for path in run.steps.iterdir()} == {"1", "2"}


@pytest.fixture
def full_disk():
    """From when it is called, files may have no more than so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size if size else soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.fault("T4")
def test_a_full_disk_leaves_nothing_and_is_tried_again(run, full_disk):
    checkpoints = run.open()
    full_disk(8000)
    checkpoints.save(state(3), Position(3, 24))
    checkpoints.settle()
    full_disk(0)
    assert "the checkpoint of step 3 cannot be written" in run.told[0] and "of step 2" in run.told[0]
    assert {path.name for path in run.steps.iterdir()} == {"1", "2"}
    checkpoints.save(state(4), Position(4, 32))
    checkpoints.settle()
    found, position = run.open().restore(shapes_of(state(4)))
    assert position.batch == 4 and same(found, state(4))


@pytest.mark.fault("T4")
def test_hashes_that_cannot_be_written_do_not_end_the_run(run, monkeypatch):
    def full(path):
        raise Refusal(path, "no space left on device")

    checkpoints = run.open()
    with monkeypatch.context() as patch:
        patch.setattr(saving, "outputs", full)
        checkpoints.save(state(3), Position(3, 24))
        checkpoints.settle()
    assert "checkpoint of step 3 has no hashes: " in run.told[0] and "no space" in run.told[0]
    checkpoints.finish(state(4), Position(4, 32))
    assert run.open().restore(shapes_of(state(4)))[1].batch == 4


@pytest.mark.fault("T4")
def test_a_disk_that_stays_full_ends_the_run(run, monkeypatch):
    checkpoints = run.open()
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    for step in (3, 4):
        checkpoints.save(state(step), Position(step, 8 * step))
    with pytest.raises(Refusal, match=r"step 5 cannot .*it takes 0.0 MiB, and 0.0 MiB are free.*of step 2"):
        checkpoints.save(state(5), Position(5, 40))
    with pytest.raises(Refusal, match="step 6 cannot"):
        run.open().finish(state(6), Position(6, 48))


@pytest.mark.fault("T6", "T18")
def test_what_is_not_finite_or_not_alike_is_never_kept(run):
    checkpoints, sound = run.open(), state(3)
    bad = sound._replace(params=sound.params | {"norm": sound.params["norm"].at[3].set(jnp.nan)})
    with pytest.raises(Refusal, match="step 3: params/norm is not finite, and is not saved"):
        checkpoints.save(bad, Position(3, 24))
    norm = sound.params["norm"]
    shards = []
    for shard in norm.addressable_shards:
        data = np.array(shard.data)
        if shard.device.id == 5:
            data.view(np.uint32)[7] ^= 1 << 20
        shards.append(jax.device_put(data, shard.device))
    strange = jax.make_array_from_single_device_arrays(norm.shape, norm.sharding, shards)
    assert integrity.digests({"norm": strange})["norm"].strays == (5,)
    with pytest.raises(Refusal, match="device: 5 has not what the others have of params/norm, at step 3"):
        checkpoints.save(sound._replace(params=sound.params | {"norm": strange}), Position(3, 24))
    assert {path.name for path in run.steps.iterdir()} == {"1", "2"}


@pytest.mark.fault("T3")
def test_a_checkpoint_is_on_the_disk_before_the_next_is_begun(run, monkeypatch):
    """And before its own hashes say that it is whole."""
    done = []
    monkeypatch.setattr(saving, "flush", done.append)
    monkeypatch.setattr(Checkpoints, "_check_room", lambda *_: done.append("begun"))
    plain = integrity.files
    monkeypatch.setattr(integrity, "files", lambda folder: done.append("hashed") or plain(folder))
    checkpoints = run.open()
    for step in (3, 4):
        checkpoints.save(state(step), Position(step, 8 * step))
    checkpoints.settle()
    assert [one for one in done if isinstance(one, str)] == ["begun", "hashed"] * 2
    for step in "34":
        flushed, done = done[1 : done.index("hashed")], done[done.index("hashed") + 1 :]
        written = {*(run.steps / step).rglob("*"), run.steps / step, run.steps}
        assert written - {run.steps / step / integrity.FILES} == set(flushed)


def test_a_digest_knows_the_place_of_what_it_sums():
    x = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)

    def digest(array):
        place = NamedSharding(over(data=8, fsdp=1, context=1, tensor=1), PartitionSpec("data"))
        return integrity.digests({"x": jax.device_put(array, place)})["x"].sums

    assert len({digest(x), digest(x[::-1]), digest(x[:, ::-1]), digest(-x), digest(np.zeros_like(x))}) == 5


@pytest.mark.fault("T19")
def test_a_checkpoint_of_the_first_version_is_read(tmp_path, monkeypatch):
    """Made by revision 7af7ceb, whose states had no digests."""
    from fvdm_jax import trainer
    from fvdm_jax.train import parse, sizes

    golden = Path(__file__).parent / "golden" / "checkpoint_v1"
    shutil.unpack_archive(golden / "run_v1.tar.gz", tmp_path, filter="data")
    run = tmp_path / "run"
    asked = parse([str(run / "config.py"), "--out", str(run), "--synthetic"])
    made, said = trainer.build(asked.settings, sizes(asked)), []
    checkpoints = Checkpoints(run, asked.settings, tell=said.append)
    found, position = checkpoints.restore(made.state)
    checkpoints.close()
    expected = json.loads((golden / "digests.json").read_text())
    digests = integrity.digests(saving.raw(found))
    assert position == (2, 16) and {path: digest.sums for path, digest in digests.items()} == expected
    assert "of an older version, which kept no checksums" in said[0]
