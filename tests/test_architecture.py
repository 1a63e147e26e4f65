"""The house: who may import whom, what is packaged, which flags there are, what the documents list."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# A module imports only from lower floors; within a floor, only from those named before it on its line.
FLOORS = {
    7: "given projector steps studio sample data.job data.encoder data.precompute"
    " runs measures export previews budget saving train_run replay train_request train"
    " planning.programs planning.request plan measuring.race measuring.workloads measuring.baseline bench"
    " evaluating.cases evaluating.scores evaluating.picture evaluating.generate evaluating.run"
    " evaluating.table evaluating.vbench evaluating.page evaluate session serving.form serving.work"
    " serving.drawing serving.locks serving.app demo doctor",
    6: "guidance rollout checkpoint prompts training held_out config trainer sampling together integrity",
    5: "samplers",
    4: "models.dit models.clip models.vae models.streaming models.text lora costs layouts planning.roofline"
    " planning.estimates conditioning caching",
    3: "coverage kernels.flash kernels.splash kernels.cudnn kernels.attention kernels.parallel models.layers"
    " models.causal",
    2: "stopping claims program presence goodput machine programs chips planning.hlo planning.collectives"
    " planning.aot planning.published progress media clips decode video keeps latents zoo rules presets"
    " prompt_files defaults flags request commands explain sharding process schedule tasks levels weights"
    " optimisers models.tokenizer data.textures data.source metrics sight judge data.folder data.records"
    " data.pipeline data.feed data.captions data.corpus data.cutting",
    1: "shapes",
}
PLACE = {name: (floor, place) for floor, names in FLOORS.items() for place, name in enumerate(names.split())}
MATHEMATICS = (
    "process",
    "schedule",
    "zoo",
    "tasks",
    "levels",
    "samplers",
    "weights",
    "coverage",
    "training",
    "rollout",
)
MODULES = {
    ".".join(path.relative_to(ROOT / "fvdm_jax").with_suffix("").parts): path
    for path in sorted((ROOT / "fvdm_jax").rglob("*.py"))
    if path.stem != "__init__"
}
SOURCES = [p for d in ("fvdm_jax", "convert", "configs", "tests") for p in sorted((ROOT / d).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in it; of `from a import b` both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # So that nothing escapes this test, the library is imported absolutely; convert by its siblings.
            assert not node.level or "convert" in path.parts, f"{path} imports relatively"
            found |= {node.module or "."} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_module_has_its_floor():
    assert set(PLACE) == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_lower_floors(module):
    ours = {name.removeprefix("fvdm_jax.") for name in imports(MODULES[module])} & set(PLACE)
    higher = [name for name in ours if PLACE[name] >= PLACE[module] and name != module]
    assert not higher, f"{module} on floor {PLACE[module][0]} imports {higher}"


@pytest.mark.parametrize("module", MATHEMATICS)
def test_the_mathematics_knows_no_network(module):
    assert not [name for name in imports(MODULES[module]) if name.split(".")[0] == "flax"]


def test_nothing_in_the_library_imports_the_converter():
    for path in MODULES.values():
        assert not [name for name in imports(path) if re.match(r"(fvdm_jax\.)?convert\b", name)], path


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_imports_what_is_no_dependency(path):
    foreign = {"tensorflow", "pickle"}
    if "tests" not in path.relative_to(ROOT).parts and path.stem != "baseline":
        # Tests marked parity may import them, inside the test, and what `bench` compares with.
        foreign |= {"torch", "diffusers", "transformers"}
    assert not foreign & {name.split(".")[0] for name in imports(path)}
    assert not [name for name in imports(path) if name.startswith("flax.nnx")]


def test_files_and_functions_stay_small():
    for path in SOURCES:
        text = path.read_text()
        assert len(text.splitlines()) <= 350, f"{path} is too long; a noun is missing"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                every = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                arguments = [argument for argument in every if argument.arg not in ("self", "cls")]
                assert length <= 60 and len(arguments) <= 6 + path.parts.count("tests"), (
                    f"{path}: {node.name}"
                )


def test_the_package_list_is_what_is_on_disk():
    on_disk = {"fvdm_jax.convert"} | {
        ".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "fvdm_jax").rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == on_disk


def test_every_third_party_import_is_a_declared_dependency():
    declared = {re.match(r"[\w-]+", line)[0].lower() for line in PROJECT["project"]["dependencies"]}
    names = {
        "PIL": "pillow", "orbax": "orbax-checkpoint", "ml_dtypes": "ml-dtypes", "absl": "absl-py",
        "array_record": "array-record",
    }  # fmt: skip
    converter = sorted((ROOT / "convert").glob("*.py"))
    # What the converter imports relatively, and what only its extra for the hub needs, in that one file.
    known = set(sys.stdlib_module_names) | {path.stem for path in converter} | {"fvdm_jax", "", "None"}
    for path in (*MODULES.values(), *converter):
        foreign = {name.split(".")[0] for name in imports(path)} - known
        optional = {"hub": {"huggingface_hub"}, "baseline": {"torch", "diffusers", "transformers"}}
        optional["app"] = {"gradio", "starlette"}
        for root in foreign - optional.get(path.stem, set()):
            assert names.get(root, root).lower() in declared | {"numpy"}, f"{path} imports {root}"


def test_the_readme_explains_every_dependency_and_lists_every_file():
    readme = (ROOT / "README.md").read_text()
    for line in PROJECT["project"]["dependencies"]:
        name = re.match(r"[\w-]+", line)[0]
        assert f"| {name} |" in readme
    listed = set(re.findall(r"^\| `([\w./-]+\.py)` \|", readme, re.MULTILINE))
    on_disk = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        if path.stem != "__init__" and "tests" not in path.relative_to(ROOT).parts
    }
    assert listed == on_disk


def test_nothing_else_lies_at_the_top():
    if not (shutil.which("git") and (ROOT / ".git").exists()):
        pytest.skip("not a git checkout, or no git")
    shown = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    top = {name.split("/")[0] for name in shown.stdout.splitlines()}
    allowed = {"fvdm_jax", "convert", "configs", "tests", "pyproject.toml", "README.md"}
    assert {name for name in top - allowed if not name.startswith(".")} == {"LICENSE", "requirements.lock"}


def test_the_lock_has_hashes_and_names_no_host():
    lock = (ROOT / "requirements.lock").read_text()
    pins = re.findall(r"^([\w.-]+(?:\[[\w,]+\])?)==\S+", lock, re.MULTILINE)
    assert len(pins) > 20 and "://" not in lock
    for block in re.split(r"\n(?=\S)", lock):
        if "==" in block and not block.startswith("#"):
            assert "--hash=sha256:" in block, block.splitlines()[0]


def test_the_flags_are_those_agreed():
    """A flag is a promise; adding, renaming or removing one changes this list first."""
    from fvdm_jax.flags import parser

    assert sorted(parser()._option_string_actions) == sorted(
        "-h --help --debug --prompt --negative --keep --frames --size --steps --solver --shift --guidance"
        " --seed --fps --model --lora --out --overwrite --explain --decode --tiles --mesh --attention"
        " --schedule --interval --rescale --history --history-level --history-windows --preset --spacing"
        " --boundary --still --prompts --length --overlap --anchors --context-noise --cache"
        " --noise-file".split()
    )


def test_the_flags_of_training_are_those_agreed():
    from fvdm_jax.train_request import parser

    assert sorted(parser()._option_string_actions) == sorted(
        "--debug --out --plan --synthetic --export --replay --profile --allow-change --no-fallback --takeover"
        " --distributed --coordinator --hosts --host".split()
    )


def test_the_converters_flags_are_those_agreed():
    from convert.__main__ import parser

    assert sorted(parser()._option_string_actions) == sorted(
        "-h --help --debug --as --config --dtype --lora --to --dry-run --verify".split()
    )


def test_choices_that_are_spelled_without_jax_are_those_of_the_library():
    from fvdm_jax.kernels.attention import IMPLEMENTATIONS
    from fvdm_jax.process import PROCESSES
    from fvdm_jax.rules import KERNELS, SOLVERS, SPACINGS
    from fvdm_jax.rules import PROCESSES as REQUESTED
    from fvdm_jax.samplers import SAMPLERS
    from fvdm_jax.schedule import SPACINGS as TABLES

    assert set(SOLVERS) == set(SAMPLERS) and set(SPACINGS) == set(TABLES)
    assert KERNELS == ("auto", *IMPLEMENTATIONS)
    assert set(REQUESTED) == set(PROCESSES)


def test_every_fault_of_training_has_a_test_and_a_line():
    wanted = {f"T{number}" for number in range(1, 21)}
    found = set()
    for path in (ROOT / "tests").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
                found |= {argument.value for argument in node.args}
    assert found == wanted
    assert wanted == set(re.findall(r"\| (T\d+) \|", (ROOT / "tests/README.md").read_text()))


def test_ci_runs_the_readmes_test_command():
    readme, ci = ((ROOT / name).read_text() for name in ("README.md", ".ci/run"))
    commands = re.findall(r"^python3 -m venv .*python -m (\S+)$", readme, re.MULTILINE)
    assert commands == ["fvdm_jax.sample", "pytest"]
    assert "grep" in ci and "README.md" in ci
