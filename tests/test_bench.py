"""The program that measures: what it says of a small model, of what does not fit, and of who takes turns."""

import json
import time

import jax
import jax.numpy as jnp
import pytest
import small

from fvdm_jax import bench, costs, machine
from fvdm_jax.measuring import baseline, race, workloads
from fvdm_jax.models import text
from fvdm_jax.planning import hlo
from fvdm_jax.program import run

SIZES = ("--clip", "2x4x8", "--text", "24", "--turns", "2")
CASE = workloads.Subject(small.NETWORKS, (2, 4, 8), 24)


@pytest.fixture
def measure(model, tmp_path, monkeypatch, capfd):
    """Runs the program on a small model; gives its exit code, what it printed, and its record, if any."""
    monkeypatch.setattr(race, "LEAST", 0.0)

    def start(*argv: str):
        path = tmp_path / "measured.json"
        code = run(bench.main, ["--model", str(model), *SIZES, "--json", str(path), *argv])
        return code, *capfd.readouterr(), json.loads(path.read_text()) if path.exists() else None

    return start


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("what", "operations"),
    [
        ("dit", costs.forward(small.NETWORKS.dit, CASE.clip, 24)),
        ("sample", 2 * costs.forward(small.NETWORKS.dit, CASE.clip, 24)),
        ("train", costs.training(small.NETWORKS.dit, CASE.clip, 24)),
        ("vae-decode", None),
        ("text", None),
    ],
)
def test_each_work_is_measured(what, operations, measure):
    code, out, err, record = measure("--what", what, "--against", "none")
    assert code == 0, err
    work = record["works"][what]
    side = work["sides"]["fvdm_jax"]
    assert len(side["turns"]) == 2 and work["ratio"] is None and work["compiled"] > 0
    assert 0 < side["seconds"]["min"] <= side["seconds"]["median"] <= side["seconds"]["max"]
    assert side["operations_per_second"] == work["operations"] / side["seconds"]["median"]
    assert operations is None or work["operations"] == operations
    assert work["bytes"]["held"] > 0 < work["bytes"]["taken"]
    assert record["versions"]["jax"] == jax.__version__ and len(record["load"]) == 2
    assert f"\n{what} " in out and "MFU" not in out


def test_what_the_vae_encodes_are_the_pixels_of_the_latents():
    """A latent frame is four pictures, but the first; the small model's VAE halves sides three times."""
    assert CASE.coded == (1, 2, 4, 8, 4) and CASE.video == (1, 5, 32, 64, 3)


def test_what_the_text_encoder_computes_is_counted_as_the_compiler_does():
    config = small.NETWORKS.text
    shapes = workloads._stored(text.abstract(config), lambda path, leaf: "float32")
    inputs = jnp.zeros((1, 24), jnp.int32), jnp.ones((1, 24), bool)
    program = jax.jit(text.TextEncoder(config).apply).lower({"params": shapes}, *inputs).compile()
    counted = hlo.products(hlo.parse(program.as_text())).operations
    assert workloads.WORKS["text"].operations(CASE) == counted


def test_the_vaes_operations_grow_with_its_clip():
    longer = CASE._replace(clip=(3, 4, 8))
    for what in ("vae-encode", "vae-decode"):
        count = workloads.WORKS[what].operations
        assert 1.3 < count(longer) / count(CASE) < 2


def test_the_share_of_the_peak_is_told_where_it_is_known(measure, monkeypatch):
    monkeypatch.setattr(costs, "peak", lambda kind: 1e15)
    _, out, _, record = measure("--what", "text", "--against", "none")
    assert record["peak"] == 1e15 and "MFU" in out and "peak 1,000 TFLOP/s" in out


def test_what_does_not_fit_is_told_in_one_line(measure, monkeypatch):
    monkeypatch.setattr(machine, "free", lambda device: 2.0**10)
    code, out, _, record = measure("--what", "text", "--against", "none")
    assert code == 0 and "sides" not in record["works"]["text"]
    assert "text: takes 0.0 GiB, and 0.0 are free" in out


def test_types_and_layers_are_those_asked_for(model):
    asked = bench.parse(["--model", str(model), *SIZES, "--dtype", "bfloat16", "--layers", "3"])
    case = bench.described(asked, jax.devices()[0])
    networks = case.networks
    assert {getattr(networks, name).dtype for name in networks.there} == {"bfloat16"}
    assert case.networks.dit.layers == case.networks.text.layers == 3
    assert (case.clip, case.text, case.batch) == ((2, 4, 8), 24, 1)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--what", "vea"], "--what"),
        (["--clip", "5x60"], "'5x60' is no size"),
        (["--clip", "5x7x8"], "odd side"),
        (["--turns", "0"], "--turns"),
        (["--remat", "half"], "'half' is unknown; give one of none"),
        (["--attention", "splash"], "does not take"),
        (["--model", "nowhere"], "is no model"),
        (["--against", "diffusers"], "not all installed"),
        (["--json", __file__], "exists"),
    ],
)
def test_bad_flags_are_refused_in_one_line(argv, said, capfd, monkeypatch, model):
    monkeypatch.setattr(baseline, "installed", lambda: False)
    code = run(bench.main, ["--model", str(model), *argv])
    out, err = capfd.readouterr()
    assert code == 2 and not out and said in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["wan_9b", "wan_14b_i2v"])
def test_networks_that_cannot_be_measured_are_refused(name, capfd):
    assert run(bench.main, ["--network", name, "--against", "none"]) == 2
    assert "--network" in capfd.readouterr()[1]


def test_published_sizes_have_their_vae():
    asked = bench.parse(["--network", "wan_5b"])
    assert bench.networks(asked).vae.latent == 48
    assert bench.described(asked, jax.devices()[0]).clip == (5, 30, 52)


def test_sides_take_turns_and_the_first_is_not_counted(monkeypatch):
    monkeypatch.setattr(race, "LEAST", 0.0)
    done = []

    def start(name: str):
        done.append(f"start {name}")
        return lambda: done.append(name)

    sides = race.race({name: lambda name=name: start(name) for name in "ab"}, 2)
    assert done == ["start a", "a", "start b", "b", "a", "b", "a", "b"]
    assert [len(side.turns) for side in sides.values()] == [2, 2]


def test_a_side_without_memory_leaves_the_others_in_the_race(monkeypatch):
    monkeypatch.setattr(race, "LEAST", 0.0)
    hungry = lambda: lambda: jnp.zeros(2**52).block_until_ready()  # noqa: E731
    sides = race.race({"hungry": hungry, "modest": lambda: lambda: None}, 2)
    assert sides["hungry"] == race.Side([], "ran out of memory") and len(sides["modest"].turns) == 2
    assert race.ratio(*sides.values()) is None
    # torch says it in other words.
    for words in ("CUDA out of memory. Tried to allocate", "DefaultCPUAllocator: can't allocate memory"):
        with pytest.raises(MemoryError), race.limited():
            raise RuntimeError(words)
    with pytest.raises(RuntimeError, match="shapes"), race.limited():
        raise RuntimeError("shapes do not fit")
    with pytest.raises(TypeError):
        race.race({"broken": lambda: lambda: len(None)}, 1)


def test_a_turn_is_measured_on_the_clock_and_on_the_processor():
    def spin():
        until = time.process_time() + 0.05
        while time.process_time() < until:
            pass

    turn = race.timed(spin)
    # Ticks of the processor's clock are a hundredth of a second, over a turn of several spins.
    assert 0.03 < turn.processor < 0.08 and turn.clock > 0.04
    idle = race.timed(lambda: time.sleep(0.1))
    assert idle.clock >= 0.1 and idle.processor < 0.05
    double = race.ratio(race.Side([turn]), race.Side([turn._replace(clock=turn.clock / 2)]))
    assert double == {"seconds": pytest.approx(2), "processor": 1}


@pytest.mark.parity
def test_both_sides_are_measured(measure):
    code, out, err, record = measure()
    assert code == 0, err
    for what, work in record["works"].items():
        assert set(work["sides"]) == {"fvdm_jax", "diffusers"} and work["ratio"]["seconds"] > 0, what
    assert record["versions"]["diffusers"] and out.count("diffusers") >= 6


def test_the_flags_are_those_agreed():
    assert sorted(bench.parser()._option_string_actions) == sorted(
        "-h --help --debug --what --network --model --layers --clip --text --batch --dtype --attention"
        " --remat --turns --against --json --overwrite".split()
    )
    assert tuple(workloads.WORKS) == bench.WHAT == tuple(baseline.WORKS)
