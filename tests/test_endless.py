"""An endless video of the bundled model: memory that stays flat, and seams that the judge does not see.

With -s it prints what it measures.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fvdm_jax import judge, latents, video
from fvdm_jax.metrics import delta_e
from fvdm_jax.video import STRIDE

ROOT = Path(__file__).resolve().parents[1]
WINDOWS, WINDOW, OVERLAP, SIDE, FPS = 64, 9, 3, 64, 12
TOTAL = WINDOW + (WINDOWS - 1) * (WINDOW - OVERLAP)
SEAMS = [STRIDE * (WINDOW + i * (WINDOW - OVERLAP)) - STRIDE + 1 for i in range(WINDOWS - 1)]
NEAR = STRIDE * (WINDOW - OVERLAP)


def run(out: Path, *flags: str) -> list[float]:
    """Makes the video; gives the peak of memory in MB, in each quarter of its frames and at the end."""
    part, frame = out.with_name(f"{out.stem}{latents.SUFFIX}.part"), 4 * 8 * 8 * 16
    command = [sys.executable, "-m", "fvdm_jax.sample", "--length", str((1 + STRIDE * (TOTAL - 1)) / FPS)]
    usual = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    process = subprocess.Popen([*command, "--out", str(out), *flags], cwd=ROOT, env=usual)
    peaks = [0.0] * 5
    while process.poll() is None:
        try:
            done = part.stat().st_size // frame
            resident = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            continue
        finally:
            time.sleep(0.01)
        # At the end all is there, and what is left is the sheet.
        quarter = 4 * done // TOTAL
        peaks[quarter] = max(peaks[quarter], resident * os.sysconf("SC_PAGESIZE") / 1e6)
    assert process.returncode == 0
    return peaks


def judged(clip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ΔE of the mean colour [t − 1] between frames of a clip [t H W 3], and how far its shape steps.

    Steps are over those of the path that is fitted to what is near, as of `judge.seams`.
    """
    mean = (clip.mean((1, 2), dtype=np.float64) + 1) / 2
    steps = np.zeros(len(clip) - 1)
    for at in range(0, len(clip) - NEAR, NEAR):
        near = clip[at : at + 2 * NEAR + 1]
        found = judge.seams(near, judge.read(near, at), range(1, len(near)))
        # Each step by the stretch of which it is in the middle, as far as there is one.
        first = 0 if at == 0 else NEAR // 2
        steps[at + first : at + len(near) - 1] = [seam.motion for seam in found[first:]]
    return delta_e(mean[1:], mean[:-1]), steps


def drift(clip: np.ndarray) -> list[float]:
    """ΔE of the median colour of every eighth of a clip from that of the first."""
    tones = [np.median((part + 1) / 2, (0, 1, 2)) for part in np.array_split(clip, 8)]
    return [float(delta_e(tone, tones[0])) for tone in tones]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["together", "rolling"])
def test_64_windows_take_flat_memory_and_show_no_seam(tmp_path, how):
    began, out = time.perf_counter(), tmp_path / "endless.mp4"
    peaks = run(out, "--overlap", str(OVERLAP), "--schedule", how)
    frames = 1 + STRIDE * (TOTAL - 1)
    clip = video.to_unit(video.read(out, frames, (SIDE, SIDE)))
    assert len(clip) == frames
    colour, motion = judged(clip)
    at = np.array(SEAMS) - 1
    # Where a latent frame ends, but no window.
    inside = np.setdiff1d(np.arange(0, frames - 1, STRIDE), at)
    for name, values in (("ΔE", colour), ("motion", motion)):
        for where, which in (("seams", at), ("other latent frames", inside), ("all", slice(None))):
            middle, high, most = np.quantile(values[which], (0.5, 0.95, 1))
            print(f"{name} at {where}: median {middle:.2f}, 95 % {high:.2f}, most {most:.2f}")
    print("drift ΔE by eighths:", " ".join(f"{value:.1f}" for value in drift(clip)))
    print("memory by quarters and at the end, MB:", " ".join(f"{peak:.1f}" for peak in peaks))
    print(f"{time.perf_counter() - began:.0f} s")
    assert peaks[3] <= 1.02 * peaks[1]
    for values in (colour, motion):
        # No more happens at a seam than elsewhere: a quarter is what 63 of them may be off by chance.
        assert np.all(np.quantile(values[at], (0.5, 0.95)) < 1.25 * np.quantile(values[inside], (0.5, 0.95)))
