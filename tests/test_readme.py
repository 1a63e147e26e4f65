"""What the READMEs say can be done: every command is read by its own program, and every Python block runs."""

import contextlib
import importlib.util
import inspect
import itertools
import json
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fvdm_jax import bench, commands, demo, doctor, evaluate, latents, sample, sharding, video, zoo
from fvdm_jax import train_request as train
from fvdm_jax.data import job as precompute
from fvdm_jax.flags import TINY
from fvdm_jax.planning import request as plan
from fvdm_jax.schedule import SPACINGS

ROOT = Path(__file__).resolve().parents[1]
READMES = sorted(path for path in ROOT.rglob("README.md") if ".venv" not in path.parts)
MARKED = re.compile(r"^pytestmark = pytest\.mark\.(thorough|slow)", re.MULTILINE)
EXTRAS = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
# Programs of others, whose flags nobody here can check.
OTHERS = set(
    "cd git gcloud xpk docker kubectl gcsfuse mkdir tail tensorboard"
    " pip .venv/bin/pip uv python3 . srun alias scontrol [ code=$?".split()
)


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def commands_of(text: str) -> Iterator[list[str]]:
    """The simple commands of a shell block, aliases put in, and those that others are told to run."""
    aliases = {}
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        one: list[str] = []
        for word in [*words, "&&"]:
            if word not in ("&&", "|", ";"):
                one.append(word)
                continue
            if one:
                if one[0] == "alias":
                    name, _, meaning = one[1].partition("=")
                    aliases[name] = shlex.split(meaning)
                one = aliases.get(one[0], one[:1]) + one[1:]
                yield one
                for told in one[1:]:
                    if told.startswith("--command="):
                        yield from commands_of(told.removeprefix("--command="))
            one = []


EVERY = [
    pytest.param(words, id=f"{path.relative_to(ROOT)}: {' '.join(words)[:90]}")
    for path in READMES
    for text in ["\n".join(blocks(path, "sh"))]
    for words in commands_of(text)
]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder that holds what the commands name: pictures, clips, prompts, models, LoRAs, latents."""
    folder = tmp_path_factory.mktemp("desk")
    for place in (folder, folder / "fvdm_jax"):
        place.mkdir(exist_ok=True)
        (place / "configs").symlink_to(ROOT / "configs")
    rng = np.random.default_rng(0)
    for name in ("cat.jpg", "a.jpg", "b.jpg", "pictures/a cat.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / name)
    for name in ("clip.mp4", "other.mp4"):
        video.write_mp4(folder / name, rng.integers(0, 255, (21, 64, 64, 3), dtype=np.uint8), 12)
    for name in ("prompts.txt", "story.txt"):
        (folder / name).write_text("a red circle\na blue square\n")
    rows = np.linspace(1, 0, 5)[:, None].repeat(9, 1)
    (folder / "rows.json").write_text(json.dumps(rows.tolist()))
    for name in ("clips", "videos", "vbench", "shared/videos"):
        (folder / name).mkdir(parents=True)
    request = commands.parse(["--out", str(folder / "x.mp4")])
    latents.save(
        folder / "image.latents.safetensors", np.zeros((1, 9, 8, 8, 16), np.float32), request.settings
    )
    for name in "pusa lora style light light_high pusa_high light_low pusa_low".split():
        (folder / name / "adapters").mkdir(parents=True)
    for name in "wan wan21 wan21_pusa wan21_i2v wan21_flf2v wan22 ti2v_5b wan21_14b shared/wan21_14b".split():
        modelled(folder / name)
    return folder


def modelled(folder: Path) -> None:
    """A folder that says of itself what a model does of that name, without weights."""
    folder.mkdir()
    told = json.loads((TINY / "config.json").read_text())
    dit = told.pop("dit")
    if "i2v" in folder.name and "ti2v" not in folder.name or "flf2v" in folder.name:
        dit |= {"channels_in": 36, "image_tokens": 514 if "flf2v" in folder.name else 0}
    names = ("dit_high", "dit_low") if folder.name == "wan22" else ("dit",)
    told |= dict.fromkeys(names, dit)
    (folder / "config.json").write_text(json.dumps(told))
    for name in (*names, "vae", "text"):
        (folder / f"{name}.safetensors").write_bytes(b"")


def sampled(argv: list[str]) -> None:
    request = commands.parse(argv if "--decode" in argv else [*argv, "--explain"])
    if not request.decode:
        commands.lines(request)
    if "--explain" in argv:
        sample.main(argv)


def trained(argv: list[str]) -> None:
    # What is exported must not be there yet, though another command takes it.
    before = ["", *argv]
    asked = train.parse([f"new_{word}" if before[i] == "--export" else word for i, word in enumerate(argv)])
    # On as many devices as its mesh names, the batch has to divide.
    settings = asked.settings
    devices = math.prod(int(part.partition("=")[2]) for part in settings.mesh.split(",") if part)
    over = sharding.sizes(settings.mesh, devices)
    assert settings.batch % (over["data"] * over["fsdp"] * settings.parts) == 0, argv


def converted(argv: list[str]) -> None:
    from convert.__main__ import _check, parser

    unset = vars(parser().parse_args(["SOURCE", "OUT"]))
    _check(parser().parse_args(argv), unset)


def schedules(argv: list[str]) -> None:
    spec = importlib.util.spec_from_file_location("schedules", ROOT / "configs" / "schedules.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.parser().parse_args(argv)


def of_tests(argv: list[str]) -> None:
    """Files and marks exist, words of -k are in names of tests there, and not all would be left out."""
    marks = re.findall(r'^    "(\w+)(?:\(\w+\))?: ', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    text = "".join((ROOT / word).read_text("utf-8") for word in argv if word.endswith(".py"))
    for flag, value in itertools.pairwise(argv):
        words = set(re.findall(r"\w+", value)) - {"and", "or", "not"}
        assert flag != "-m" or words <= set(marks), value
        assert flag != "-k" or all(re.search(rf'def test_\w*{word}|"{word}"', text) for word in words), value
    assert "-m" in argv or not MARKED.search(text), argv


def told_by_doctor(argv: list[str]) -> None:
    assert not argv and doctor.DESCRIPTION


PROGRAMS = {
    "fvdm_jax.sample": sampled,
    "fvdm_jax.demo": demo.parse,
    "fvdm_jax.doctor": told_by_doctor,
    "fvdm_jax.evaluate": evaluate.parse,
    "fvdm_jax.bench": bench.parse,
    "fvdm_jax.plan": plan.parse,
    "fvdm_jax.train": trained,
    "fvdm_jax.data.precompute": precompute.parse,
    "convert": converted,
    "configs/schedules.py": schedules,
    "pytest": of_tests,
}


@pytest.mark.parametrize("words", EVERY)
def test_a_command_can_be_given(desk, monkeypatch, words):
    """Its program takes its flags and values; those that say what would be done do so."""
    monkeypatch.chdir(desk / "fvdm_jax" if any("../shared" in word for word in words) else desk)
    # Extras that are not installed are no fault of a command.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    python = next((i for i, word in enumerate(words) if Path(word).name == "python"), None)
    if python is None:
        assert words[0] in OTHERS, words
        for extra in re.findall(r"\.\[([\w,]+)\]", " ".join(words)):
            assert set(extra.split(",")) <= set(EXTRAS), extra
        return
    rest = words[python + 1 :]
    rest = rest[1:] if rest[0] == "-m" else rest
    assert rest[0] in PROGRAMS, words
    with contextlib.suppress(SystemExit):
        PROGRAMS[rest[0]](rest[1:])


def test_there_are_commands_of_every_program():
    said = {word for one in EVERY for word in one.values[0]}
    assert set(PROGRAMS) <= said


@pytest.mark.parametrize(
    ("path", "code"),
    [
        pytest.param(path, code, id=f"{path.relative_to(ROOT)}: {i}")
        for path in READMES
        for i, code in enumerate(blocks(path, "python"))
    ],
)
def test_python_runs(tmp_path, monkeypatch, alone, path, code):
    """With two steps, and the bundled model."""
    monkeypatch.chdir(tmp_path)
    code = re.sub(r"steps=\d+", "steps=2", re.sub(r"sigmas\(\d+", "sigmas(2", code))
    names: dict = {}
    exec(compile(code, str(path), "exec"), names)  # noqa: S102 what a reader would run
    if "sample(" in code:
        shape = names["video"].pixels.shape if "load()" in code else names["video"].shape[1:]
        assert shape == (33, 64, 64, 3)


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_named_is_there(path):
    """Files that stand in backticks, and links within the tree."""
    text = path.read_text("utf-8")
    for name in re.findall(r"`((?:fvdm_jax|convert|configs|tests)/[\w./-]+\.\w+)`", text):
        assert (ROOT / name).is_file(), name
    for target in re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", text):
        assert (path.parent / target.partition("#")[0]).exists(), target


TESTED = sorted(
    {each for path in READMES for each in re.findall(r"python -m pytest [^`#\n]*", path.read_text("utf-8"))}
)


@pytest.mark.parametrize("line", TESTED)
def test_the_tests_that_a_table_names_are_there(line):
    of_tests(shlex.split(line)[3:])


def test_the_tables_of_schedules_are_the_schedules():
    """Their names, their options, and what a window of the bundled model costs by each."""
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:]] for line in lines if line.startswith("| `")]
    told = {row[0].strip("`"): re.findall(r"`(\w+)`", row[1]) for row in rows if not row[1].isdigit()}
    options = {name: list(inspect.signature(zoo.ZOO[name]).parameters)[2:] for name in zoo.ZOO}
    assert {name: told.get(name) for name in zoo.ZOO} == options
    measured = {row[0].strip("`"): (int(row[1]), int(row[2])) for row in rows if row[1].isdigit()}
    assert {name.partition(":")[0] for name in measured} == set(zoo.ZOO)
    for name, cost in measured.items():
        matrix = zoo.levels(name, SPACINGS["wan"](10, 3.0), np.ones(9, np.float32))
        assert tuple(zoo.check(matrix)) == cost, name


def test_a_command_that_cannot_be_is_found_out(desk, monkeypatch):
    """That the tests above can fail."""
    from fvdm_jax.program import Refusal

    monkeypatch.chdir(desk)
    for line in (
        "sample --stepz 3",
        "sample --keep 0=gone.jpg",
        "python -m fvdm_jax.train configs/tiny.py --ot run",
    ):
        text = 'alias sample="python -m fvdm_jax.sample"\n' + line
        *_, words = commands_of(text)
        with pytest.raises(Refusal):
            PROGRAMS[words[2]](words[3:])
    assert list(commands_of('a --command="cd b && c"'))[1:] == [["cd", "b"], ["c"]]
