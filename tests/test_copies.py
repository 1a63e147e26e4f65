"""Many prompts over many devices: each has a clip of its own, which is the one that is made alone."""

import re
from pathlib import Path

import numpy as np
import pytest
from test_studio import taught

from fvdm_jax import latents, programs
from fvdm_jax.program import run
from fvdm_jax.sample import main

LINES = """\
{"prompt": "a red circle", "seed": 5}
{"prompt": "a square", "keep": ["0=a.png:0.5"]}
{"prompt": "a red circle", "negative": "blue"}
{"prompt": "", "keep": ["0=a.png", "last=b.png:0.6-0.1"]}
{"prompt": "a ring", "keep": ["1=b.png"]}
{"prompt": "a ring moves up", "seed": 18446744073709551615}
"""


SENT = r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
ALONE = r"replica_groups=(\{\{\d+\}(,\{\d+\})*\}|\[8,1\]<=\[8\])"
"""Groups of one device each, to which nothing is sent."""


def made(model: Path, *flags: str) -> list[np.ndarray]:
    """The latents of each line."""
    argv = ["--model", str(model), *flags, "--prompts", "many.jsonl", "--overwrite", "--out", "v.mp4"]
    assert run(main, argv) == 0
    count = len(Path("many.jsonl").read_text().splitlines())
    return [latents.load(Path(f"v-{i + 1}{latents.SUFFIX}")) for i in range(count)]


@pytest.fixture
def compiled(monkeypatch) -> dict[str, list[str]]:
    """The programs that are compiled, by their names."""
    texts, compile = {}, programs.compiled

    def told(say, lowered, what, *options):
        program = compile(say, lowered, what, *options)
        texts.setdefault(what, []).append(program.as_text())
        return program

    monkeypatch.setattr(programs, "compiled", told)
    return texts


@pytest.mark.usefixtures("alone")
def test_each_device_makes_a_clip_of_its_own(here, model, compiled):
    """Six lines on eight devices: one program, in which nothing is sent, and to the bit the clips of one."""
    Path("many.jsonl").write_text(LINES)
    copies = made(model, "--mesh", "data=8")
    (text,) = compiled.pop("denoise (8 of 3x4x6)")
    sent = [line for line in text.splitlines() if re.search(rf" ({SENT})[\w-]*\(", line)]
    assert not [line for line in sent if not re.search(ALONE, line)]
    assert not [name for name in compiled if name.startswith("denoise")]
    # Without a mesh that is asked for each device does all for itself.
    for ours, theirs in zip(copies, made(model), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert len(compiled["denoise (3x4x6)"]) == 1


@pytest.mark.thorough
@pytest.mark.usefixtures("alone")
def test_copies_may_be_of_several_devices_each(here, experts, compiled):
    """Two experts, one with a LoRA, and clips of four devices each: a batch and a half."""
    Path("many.jsonl").write_text("\n".join(LINES.splitlines()[1:4]))
    taught(here, experts)
    flags = ["--lora", "high=taught:0.5"]
    copies = made(experts, *flags, "--mesh", "data=2,context=2,tensor=2")
    assert [len(texts) for name, texts in compiled.items() if name.startswith("denoise (2 of")] == [2]
    for ours, theirs in zip(copies, made(experts, *flags), strict=True):
        assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)
