"""What a step would take on chips that are not there: layouts, bounds, the program, and what it refuses."""

import dataclasses
import importlib.util
import json
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fvdm_jax import chips, layouts, plan
from fvdm_jax.config import Training
from fvdm_jax.models.dit import SIZES, DiTConfig
from fvdm_jax.planning import aot, collectives, programs, roofline
from fvdm_jax.program import run

SMALL = DiTConfig(64, 128, 8, 3, 4, 4, text_width=16, dtype="float32")
SETTINGS = Training(
    model="nowhere", dit=SMALL, fresh=True, clip="3x16x16", text=24, batch=4, dropout=0.0, remat="attention"
)
CONFIG = """
from fvdm_jax.config import Training
from fvdm_jax.models.dit import DiTConfig


def config(**others):
    sizes = DiTConfig({width}, {ffn}, {heads}, 2)
    own = dict(model="nowhere", dit=sizes, fresh=True, clip="{clip}", batch=4, remat="attention", steps=100)
    return Training(**own | others)
"""
FULL = Path(__file__).resolve().parents[1] / "configs/pusa_wan21_14b_full.py"


def mesh(data: int = 1, fsdp: int = 1, context: int = 1, tensor: int = 1) -> dict[str, int]:
    return {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The program sets variables, which are not to outlive a test."""
    for name in aot.ENVIRONMENT:
        monkeypatch.setenv(name, os.environ.get(name, ""))


def said(capsys, *argv: object) -> tuple[int, str, str]:
    """The program's exit code, and what it says and complains of."""
    code = run(plan.main, list(map(str, argv)))
    out, err = capsys.readouterr()
    return code, out, err


# What is possible, and what is best.


@pytest.mark.parametrize("devices", [1, 4, 6, 8, 64, 256])
@pytest.mark.parametrize(("batch", "frame"), [(1, 1560), (2, 3600), (16, 1560), (64, 3600)])
def test_candidates_are_possible_and_use_all_devices(devices, batch, frame):
    work = layouts.Work(40, frame, batch)
    found = layouts.candidates(devices, work)
    assert len({tuple(sizes.values()) for sizes in found}) == len(found)
    for sizes in found:
        assert math.prod(sizes.values()) == devices and not layouts.problem(sizes, work)
    ulysses = [40 % (sizes["tensor"] * sizes["context"]) == 0 for sizes in found]
    assert ulysses == sorted(ulysses, reverse=True)


@pytest.mark.parametrize(("task", "width", "devices"), layouts.TABLE)
def test_the_table_is_possible(task, width, devices):
    config = next(config for config in SIZES.values() if config.width == width)
    for clip in ((21, 60, 104), (21, 90, 160)):
        row = layouts.whole(layouts.TABLE[task, width, devices])
        batch = 2 if task == "sample" else row["fsdp"]
        assert math.prod(row.values()) == devices
        assert not layouts.problem(row, layouts.Work(config.heads, clip[1] * clip[2] // 4, batch))
        assert layouts.recommended(task, config, clip, devices, batch) == layouts.text(row)


def test_why_a_layout_is_not_possible():
    work = layouts.Work(40, 1560, 16)
    assert "16 clips" in layouts.problem(mesh(fsdp=32), work)
    assert "1560 tokens" in layouts.problem(mesh(context=16), work)
    assert "40 heads" in layouts.problem(mesh(tensor=3), work)
    assert layouts.recommended("sample", SIZES["wan_14b"], (21, 60, 104), 7, 2) == "data=7"


# What has to be sent.


def test_the_lower_bound_by_hand():
    """A float32 network: parameters twice and gradients once, tokens by all-to-all 4, 4 and again 3 times."""
    step = roofline.Step(SMALL, (3, 16, 16), mesh(fsdp=2, context=4), 4, 24, remat="attention")
    sent = roofline.lower_bound(step)
    kept = sum(roofline.shards(step, leaf)[0] for leaf in step.base.values())
    whole = roofline.count(step.base)
    assert whole / 8 <= kept < whole / 6
    assert sent.parameters == 2 * 4 * (whole - kept) and sent.gradients == 4 * (whole - kept)
    array = 4 / 2 * 3 * 64 / 4 * 64 * 4
    assert sent.attention == pytest.approx(3 * 11 * array * 3 / 4)
    assert sent.tensor == 0


def test_the_lower_bound_of_a_ring():
    config = dataclasses.replace(SMALL, heads=2)
    step = roofline.Step(config, (3, 16, 16), mesh(context=4), 1, 24, remat="full")
    array = 3 * 64 / 4 * 64 * 4
    assert step.exchange == "ring"
    assert roofline.lower_bound(step).attention == pytest.approx(3 * (2 + 4 + 2) * array * 3)


def test_a_sampler_gathers_what_a_prompt_needs_once():
    step = roofline.Step(SMALL, (3, 16, 16), mesh(fsdp=2), 2, 24, train=False, passes=10)
    once = dataclasses.replace(step, passes=1)
    ten, one = (roofline.lower_bound(each).parameters for each in (step, once))
    assert 5 * one < ten < 10 * one


def test_links_of_a_slice():
    """14B's gathers over a ring of 16 of v6e's chips, over a line of 4, and a hop."""
    over, places = chips.parse("v6e:16x16"), [(x, y, 0) for y in range(16) for x in range(16)]

    def seconds(kind: str, group: tuple[int, ...]) -> float:
        return roofline.seconds([collectives.Collective(kind, "bf16", 1e9, 2, (group,))], over, places)

    ring, line, spread = tuple(range(16)), (0, 1, 2, 3), (0, 4, 8, 12)
    assert seconds("all-gather", ring) == pytest.approx(2e9 / 200e9)
    assert seconds("all-gather", line) == pytest.approx(2e9 / 100e9)
    assert seconds("all-gather", spread) == pytest.approx(2e9 / 50e9)
    assert seconds("all-gather", tuple(range(256))) == pytest.approx(2e9 / 400e9)
    assert seconds("all-to-all", ring) == pytest.approx(4 * seconds("all-gather", ring))
    assert seconds("collective-permute", (0, 1)) == pytest.approx(2e9 / 100e9)


# The program that is compiled, here for virtual CPUs in place of chips.


@pytest.fixture(scope="module")
def trained() -> dict:
    """The record of a step on eight devices, as if they were a v5e 2x4."""
    sizes = mesh(fsdp=2, context=4)
    case = programs.Case("train", SETTINGS, SMALL, chips.parse("v5e:2x4"))
    runs = list(programs.compiled(case, sizes, jax.devices()))
    return programs.record(case, sizes, runs, [(i % 2, i // 2, 0) for i in range(8)])


def test_the_record_of_a_step(trained):
    assert trained["parameters"] == trained["trained"] == roofline.count(planning_step().base)
    assert trained["exchange"] == "ulysses" and trained["uncounted_loops"] == 0
    held = 3 * 4 * trained["parameters"] / 8
    assert held < trained["bytes"]["arguments"] < 1.5 * held + 4 * 4 * (3 * 16 * 16 * 4 + 25 * 16)
    assert trained["bytes"]["reserved"] < trained["bytes"]["there"]
    seconds = trained["seconds"]
    assert seconds["overlapped"] <= seconds["apart"] and min(seconds.values()) >= 0
    assert 0 < trained["mfu"] < 1
    json.dumps(trained)


def planning_step() -> roofline.Step:
    case = programs.Case("train", SETTINGS, SMALL, chips.parse("v5e:2x4"))
    return programs.step(case, mesh(fsdp=2, context=4))


def test_what_a_step_sends_is_near_the_bound(trained):
    """Three times it is allowed: XLA for CPUs has no reduce-scatter, and the arrays are tiny."""
    sent = sum(each["bytes"] for each in trained["collectives"].values())
    bound = sum(trained["lower_bound"].values())
    assert 0.8 * bound < sent < 3 * bound
    assert trained["collectives"]["all-to-all"]["bytes"] == pytest.approx(
        trained["lower_bound"]["attention"], rel=0.15
    )


def test_compiled_operations_are_those_of_the_formula(trained):
    """Plain XLA makes the scores once more for their gradient: five products, where the formula has four."""
    step, work = planning_step(), trained["operations"]
    named = step.formula + sum(step.again) + step.attended / 2
    # Every device of context embeds the prompt, 24 tokens here beside 48 of the clip's.
    prompt = 3 * 4 * 3 * 24 * (4 * SMALL.width**2 * SMALL.layers * 4 / 3)
    assert 0.97 * step.formula < work["compiled"] < 1.05 * named + prompt


def test_a_sampler_is_planned_like_a_step():
    sizes = mesh(fsdp=2, context=4)
    case = programs.Case("sample", SETTINGS, SMALL, chips.parse("v5e:2x4"), steps=5)
    runs = list(programs.compiled(case, sizes, jax.devices()))
    told = programs.record(case, sizes, runs, [(i % 2, i // 2, 0) for i in range(8)])
    exchanged = told["collectives"]["all-to-all"]
    assert exchanged["runs"] >= 5 * 4 * SMALL.layers
    assert exchanged["bytes"] == pytest.approx(told["lower_bound"]["attention"], rel=0.15)
    assert told["operations"]["compiled"] == pytest.approx(told["operations"]["formula"], rel=0.2)
    assert told["uncounted_loops"] == 0


# What a user sees.


def test_a_plan_for_gpus_by_formulas(capsys, tmp_path):
    out = tmp_path / "plan.json"
    flags = ("--topology", "gpu:h100x8", "--batch", 8, "--mesh", "context=8", "--price", 2.5, "--json", out)
    code, text, _ = said(capsys, FULL, *flags)
    told = json.loads(out.read_text())
    assert code == 0 and told["parameters"] == 14_288_491_584
    assert told["mfu"] == pytest.approx(0.69, abs=0.01)
    assert told["cost"] == pytest.approx(2.5 * told["chip_hours"])
    assert "68.8% of the peak" in text and "600 steps" in text and "NVIDIA DFM" in text
    # Bytes of masters, two moments and gradients, over eight.
    assert told["bytes"]["arguments"] == pytest.approx(16 * 14_288_491_584 / 8, rel=0.01)


def test_of_several_layouts_the_fastest_that_fits_is_told(capsys, tmp_path):
    out = tmp_path / "plan.json"
    code, text, _ = said(capsys, FULL, "--topology", "gpu:h100x32", "--batch", 32, "--json", out)
    told = json.loads(out.read_text())
    best = min(each["seconds"]["overlapped"] for each in told["tried"] if plan.over(each) <= 0)
    assert code == 0 and len(told["tried"]) == 3 and told["seconds"]["overlapped"] == best


@pytest.mark.parametrize(
    ("flags", "where", "right"),
    [
        (["--topology", "v5p:4x4"], "--topology", "v5p:4x4x4"),
        (["--topology", "moon"], "--topology", "gpu:h100x8"),
        ([], "--topology", "v5p:4x4x4"),
        (["--topology", "gpu:4090x1", "--batch", "1"], "GB too much", "more chips"),
        (["--topology", "gpu:h100x8", "--mesh", "fsdp=3"], "--mesh", "8"),
        (["--topology", "gpu:h100x8", "--mesh", "fsdp=8", "--batch", "4"], "--mesh", "divide"),
        (["--topology", "gpu:h100x7", "--batch", "8"], "--batch", "no layout"),
        (["--topology", "gpu:h100x8", "--task", "decode"], "--task", "TPUs"),
        (["--topology", "gpu:h100x8", "--tries", "0"], "--tries", "1 or more"),
        (["--topology", "gpu:h100x8", "--price", "-1"], "--price", "dollars"),
        (["--topology", "gpu:h100x8", "--json", "no/such/folder.json"], "--json", "folder"),
        (["--topology", "gpu:h100x8", "--bacth", "8"], "--bacth", "--batch"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(capsys, flags, where, right):
    code, out, err = said(capsys, FULL, *flags)
    assert code == 2 and err.count("\n") == 1
    assert where in err and right in err and not out


def test_without_the_compiler_its_package_is_named(capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else found(name))
    code, _, err = said(capsys, FULL, "--topology", "v5p:4x4x4")
    assert code == 2 and 'pip install -e ".[plan]"' in err and err.count("\n") == 1


def test_what_a_compiler_says_of_memory():
    words = "the total memory required for HLO temporaries (24.50G) exceeds available HBM (15.75G)."
    large = aot._too_large(f"RESOURCE_EXHAUSTED: Ran out of memory on HBM, {words}")
    assert large.needed == 24.5 * 2**30 and large.there == 15.75 * 2**30
    large = aot._too_large("Ran out of memory in memory space hbm. Used 512.00M of 31.25G hbm.")
    assert large.needed == 2**29
    assert aot._too_large("INTERNAL: Mosaic failed") is None


# For chips, by their compiler.


@pytest.fixture
def libtpu():
    """Where the compiler is installed, and libtpu's variables are set."""
    pytest.importorskip("libtpu", reason='needs libtpu: pip install -e ".[plan]"')
    aot.prepare()


@pytest.mark.tpu_aot
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:1x1", "v7x:2x2x1"])
def test_the_memory_of_a_chip_is_what_its_compiler_says(libtpu, name):
    over = chips.parse(name)
    if name == "v4:2x2x1":
        # libtpu shows its two cores apart, and `aot.devices` refuses that.
        found = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    else:
        found = aot.devices(over)
    one = NamedSharding(Mesh(np.asarray(found[:1]), "x"), PartitionSpec())
    huge = jax.ShapeDtypeStruct((2**22, 2**13), jnp.float32, sharding=one)
    with pytest.raises(aot.TooLarge) as large, aot.fitting():
        jax.jit(lambda x: jnp.sort(x, 0)).lower(huge).compile()
    devices = 2 if name.startswith(("v4", "v7x")) else 1
    assert large.value.there == over.chip.memory / devices


@pytest.mark.tpu_aot
@pytest.mark.parametrize(("name", "words"), [("v6e:3x3", "not divisible"), ("v4:2x2x1", "8 devices")])
def test_slices_that_there_are_not(libtpu, capsys, name, words):
    code, _, err = said(capsys, FULL, "--topology", name, "--mesh", "context=1")
    assert code == 2 and err.count("\n") == 1 and "--topology" in err and words in err


@pytest.mark.tpu_aot
def test_a_step_of_two_layers_of_14b_on_64_chips(libtpu, capsys, tmp_path):
    """Two to five minutes of the CPU. What 40 layers take is in the README."""
    path, out = tmp_path / "two.py", tmp_path / "plan.json"
    path.write_text(CONFIG.format(width=5120, ffn=13824, heads=40, clip="21x60x104"))
    flags = ("--topology", "v5p:4x4x4", "--batch", 16, "--mesh", "fsdp=16,context=4", "--json", out)
    code, text, _ = said(capsys, path, *flags)
    told = json.loads(out.read_text())
    work, sent = told["operations"], sum(each["bytes"] for each in told["collectives"].values())
    assert code == 0 and "ulysses" in text
    assert work["compiled"] <= 1.05 * (work["formula"] + work["again"])
    assert sent <= 1.3 * sum(told["lower_bound"].values())
    assert told["uncounted_loops"] == 0
    # Masters and moments over all chips; a clip, its text and the empty prompt on each.
    given = 4 * (21 * 60 * 104 * 16 + 2 * 512 * 4096)
    assert told["bytes"]["arguments"] == pytest.approx(12 * told["parameters"] / 64 + given, rel=0.05)
    assert 0.3 < told["mfu"] < 0.9


@pytest.mark.tpu_aot
def test_sampling_and_decoding_on_chips(libtpu, model):
    """By a model that is smaller than the bundled one."""
    settings = dataclasses.replace(SETTINGS, model=str(model), clip="3x16x64")
    case = programs.Case("sample", settings, SMALL, chips.parse("v5e:2x4"), steps=4)
    devices = aot.devices(case.over)
    places = [tuple(device.coords) for device in devices]
    for task, turns in (("sample", 1), ("decode", 3)):
        case = case._replace(task=task)
        (sizes, *_) = programs.layouts_of(case)
        runs = list(programs.compiled(case, sizes, devices))
        told = programs.record(case, sizes, runs, places)
        assert sum(times for _, times in runs) == turns
        assert told["operations"]["compiled"] > 0 and told["seconds"]["overlapped"] > 0
