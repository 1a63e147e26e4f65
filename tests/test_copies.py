"""Many prompts over many devices: each has a clip of its own, which is the one that is made alone."""

from pathlib import Path

import jax
import numpy as np
import pytest

from fvdm_jax import latents, lora, programs, sampling, video
from fvdm_jax.commands import parse
from fvdm_jax.program import Refusal, run
from fvdm_jax.progress import Stages
from fvdm_jax.sample import main
from fvdm_jax.studio import Studio

LINES = """\
{"prompt": "a red circle", "seed": 5}
{"prompt": "a square", "keep": ["0=a.png:0.5"]}
{"prompt": "a red circle", "negative": "blue"}
{"prompt": "", "keep": ["0=a.png", "last=b.png:0.6-0.1"]}
{"prompt": "a ring", "keep": ["1=b.png"]}
{"prompt": "a ring moves up", "seed": 18446744073709551615}
"""


def made(*flags: str) -> list[np.ndarray]:
    """The latents of each line."""
    assert run(main, [*flags, "--overwrite", "--prompts", "many.jsonl", "--out", "v.mp4"]) == 0
    return [latents.load(Path(f"v-{i + 1}.latents.safetensors")) for i in range(LINES.count("\n"))]


@pytest.fixture
def compiled(monkeypatch) -> list[str]:
    """The names of what is compiled."""
    names, compile = [], programs.compiled

    def told(say, lowered, what, *options):
        names.append(what)
        return compile(say, lowered, what, *options)

    monkeypatch.setattr(programs, "compiled", told)
    return names


def test_each_device_makes_a_clip_of_its_own(here, model, compiled):
    """Six lines on four devices, the second batch half full: one program, and the files of one device."""
    Path("many.jsonl").write_text(LINES)
    copies = made("--model", str(model), "--mesh", "data=8", "--steps", "2")
    assert compiled.count("denoise (8 of 3x4x6)") == 1
    assert not [name for name in compiled if name.startswith("denoise (3")]
    alone = made("--model", str(model), "--mesh", "data=8", "--steps", "2")
    print([float(np.abs(a - b).max()) for a, b in zip(copies, alone, strict=True)])
