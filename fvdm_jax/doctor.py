"""Says what a machine has, what of this system it can run, and what is missing."""

import importlib.util
import os
import shutil
import textwrap
from pathlib import Path

from fvdm_jax import machine
from fvdm_jax.chips import GIB
from fvdm_jax.program import Parser, leave, run

DESCRIPTION = "Says what this machine has, what it can run, and what is missing."
CLIP, SMALLER = (21, 60, 104), (21, 30, 52)
"""Of 81 frames at 480×832, in latents: f, h, w; and of those of Wan2.2's 5B, which has a VAE of its own."""

EXTRAS = {
    "libtpu": ("planning for TPUs, and TPUs", 'pip install -e ".[plan]"'),
    "huggingface_hub": ("sources of convert named hf:", 'pip install -e ".[hub]"'),
    "gradio": ("the page of demo --serve", 'pip install -e ".[serve]"'),
    "matplotlib": ("pictures of experiments", 'pip install -e ".[plots]"'),
    "torch": ("tests against the reference implementations", 'pip install -e ".[parity]"'),
}
"""What need not be there: what it is for, and the command that adds it."""


def main(argv: list[str]) -> None:
    """Prints the report."""
    Parser(prog="python -m fvdm_jax.doctor", description=DESCRIPTION).parse_args(argv)
    import jax

    devices = jax.devices()
    print("devices")
    each = ", ".join(f"{name} {version}" for name, version in machine.versions().items())
    print(
        f"  {len(devices)} × {devices[0].device_kind} ({devices[0].platform}), {jax.process_count()} process"
    )
    print(f"  {machine.free(devices[0]) / GIB:.1f} GiB free on the first; {os.cpu_count()} cores of the host")
    print(f"  {_unused(devices[0].platform)}")
    print("versions")
    print(textwrap.fill(each, 100, initial_indent="  ", subsequent_indent="  "))
    print("folders")
    for kind in ("programs", "text"):
        print(f"  {_folder(machine.cache(kind), kind)}")
    print(f"  {shutil.disk_usage(Path.cwd()).free / GIB:.0f} GiB free where this was started")
    print("which transformers fit, by formulas, with 81 frames at 480×832")
    for line in fitting(devices):
        print(f"  {line}")
    print("what may be added")
    for name, (purpose, command) in EXTRAS.items():
        there = "there" if importlib.util.find_spec(name) else f"not there: {command}"
        print(f"  {name:<16} {purpose:<46} {there}")


def _unused(platform: str) -> str:
    """Whether the machine has an accelerator that jax does not see."""
    if platform != "cpu":
        return "the accelerator is used"
    if Path("/dev/nvidia0").exists():
        return 'an NVIDIA GPU is there and not used: pip install "jax[cuda13]"'
    if Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists():
        return 'a TPU may be there and is not used: pip install "jax[tpu]"'
    return "no accelerator is seen; the bundled model runs on the CPU"


def _folder(folder: Path | None, kind: str) -> str:
    if folder is None:
        return f"no cache of {kind}: this user has no home"
    held = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    size = sum(path.stat().st_size for path in held)
    return f"{folder}: {len(held)} files, {size / 2**20:,.0f} MiB"


def fitting(devices: list) -> list[str]:
    """A line for each published size: whether a guided clip, and training, fit these devices."""
    from fvdm_jax import layouts, lora, sampling, sharding
    from fvdm_jax.models.dit import SIZES
    from fvdm_jax.planning import estimates
    from fvdm_jax.planning.roofline import Step

    free, lines = machine.free(devices[0]), []
    for name, config in SIZES.items():
        network, clip = lora.Network(config), SMALLER if config.channels_out == 48 else CLIP
        over, attention, _ = sampling.layout("", network, clip, 2)
        layout = layouts.recommended("train", config, clip, len(devices), len(devices))
        training = sharding.sizes(layout, len(devices))
        clips = training["data"] * training["fsdp"]
        steps = {
            "sampling": Step(config, clip, dict(over.shape), 2, train=False),
            "LoRA of 64": Step(config, clip, training, clips, rank=64),
            "all parameters": Step(config, clip, training, clips),
        }
        told = []
        for what, step in steps.items():
            need = estimates.held(step) + estimates.activations(step)
            told.append(f"{what} {need / GIB:.0f} GiB {'fits' if need < free else 'no'}")
        lines.append(f"{name:<14} {', '.join(told)}; attention by {attention}")
    return lines


def cli() -> None:
    """The program, as `python -m fvdm_jax.doctor` and as `fvdm-doctor`."""
    leave(run(main))


if __name__ == "__main__":
    cli()
