"""The flags of `python -m fvdm_jax.sample`, and what each of them takes."""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

from fvdm_jax import zoo
from fvdm_jax.keeps import GRAMMAR
from fvdm_jax.latents import SUFFIX
from fvdm_jax.presets import PRESETS
from fvdm_jax.program import Parser, number, numbered, plain, spoken, whole
from fvdm_jax.prompt_files import GRAMMAR as LINES
from fvdm_jax.rules import KERNELS, SOLVERS, SPACINGS

TINY = Path(__file__).parent / "assets" / "tiny"
OUT = Path("fvdm.mp4")

EPILOG = f"""{GRAMMAR}
{LINES}
The video goes to --out, and beside it a contact sheet (.png), every setting (.json), and what was denoised
({SUFFIX}), written before it is decoded: --decode makes a video of that again. Existing files
are only replaced with --overwrite, except those of the default name, fvdm.mp4, which each run replaces.
Compiled programs are kept in ~/.cache/fvdm_jax. --explain looks at neither --out nor the weights.
"""


def parser() -> Parser:
    """The flags of the program; those left out are the model's, from the config.json of its folder."""
    flags = Parser(prog="fvdm_jax.sample", description="Samples a video.", epilog=EPILOG + _bundled())
    _shown(flags.add_argument_group("what is shown").add_argument)
    _sampled(flags.add_argument_group("how it is sampled").add_argument)
    _long(flags.add_argument_group("long videos, and many").add_argument)
    _made(flags.add_argument_group("with what, and where to").add_argument)
    return flags


def _shown(add: Callable) -> None:
    add("--prompt", type=spoken, metavar="TEXT", help="what to show; empty: whatever the model likes")
    add("--negative", type=spoken, metavar="TEXT", help="what not to show")
    add(
        "--keep",
        metavar="FRAME=FILE",
        action="append",
        default=[],
        help="an image or clip to keep; repeatable",
    )
    add("--still", action="store_true", help="encode images kept after frame 0 as clips that stand still")
    add("--frames", type=whole, metavar="N", help="frames of the video, 1 + 4n")
    add(
        "--size",
        type=size,
        metavar="HxW",
        help="height and width in pixels, multiples of 16 (or as the model has it)",
    )
    add("--fps", type=number, metavar="X", help="frames a second in the file")
    add("--seed", type=whole, default=0, metavar="N", help="0 to 2^64 - 1; default 0")


def _sampled(add: Callable) -> None:
    add(
        "--preset", default="", choices=PRESETS, help="settings that a model's authors publish; it tells them"
    )
    add("--steps", type=whole, metavar="N", help="steps of the solver")
    add("--solver", choices=SOLVERS, help="how a step is taken")
    add(
        "--schedule",
        metavar="NAME[:OPTION=N,…]",
        help=f"when each frame takes its steps: {', '.join(zoo.ZOO)}, or a .json file of levels",
    )
    add("--spacing", choices=SPACINGS, help="how levels are spaced, before they are shifted")
    add("--shift", type=number, metavar="X", help="above 1: more of the steps at high noise")
    add(
        "--guidance",
        type=_one_or_two,
        metavar="X[,Y]",
        help="weight of the prompt; 1 turns guidance off; X,Y: of the experts of high and of low noise",
    )
    add("--boundary", type=number, metavar="X", help="level below which the expert of low noise takes over")
    add(
        "--interval",
        type=_interval,
        default=(0.0, 1.0),
        metavar="LOW-HIGH",
        help="noise levels at which the prompt's guidance is in force; default 0-1",
    )
    add("--rescale", type=number, default=0.0, metavar="X", help="0 to 1: take back contrast of guidance")
    add(
        "--history",
        type=number,
        default=1.0,
        metavar="X",
        help="weight of the frames that are clean; 1, the default, turns that guidance off",
    )
    add("--history-level", type=number, default=0.0, metavar="X", help="noise level at which it sees them")
    add("--history-windows", type=whole, default=1, metavar="N", help="parts of them that it sees by turns")
    add(
        "--context-noise",
        type=_one_or_two,
        default=0.0,
        metavar="X[,POWER]",
        help="noise level at which the network sees clean frames, which stay clean, against drift, as 0.02; "
        "times the largest level of any frame to the power",
    )
    add(
        "--cache",
        type=number,
        default=0.0,
        metavar="X",
        help="above 0, as 0.1: spare the network steps; the more, the larger, and the less exact",
    )


def _long(add: Callable) -> None:
    add("--prompts", type=Path, metavar="FILE", help="a prompt a line: a video each, or a segment each")
    add("--length", type=number, metavar="SECONDS", help="of a long video, made in windows of --frames")
    add("--overlap", type=whole, default=0, metavar="N", help="latent frames that windows share; a third")
    add("--anchors", type=whole, default=0, metavar="N", help="first latent frames that every window keeps")


def _made(add: Callable) -> None:
    add("--model", type=Path, metavar="DIR", help="folder of a model; default the bundled one")
    add(
        "--lora",
        type=lora,
        action="append",
        default=[],
        metavar="[high=|low=]DIR[:STRENGTH]",
        help="a LoRA, as a folder that `python -m convert` has made, of both experts or one; repeatable; "
        "strength 1 if not given, or the preset's",
    )
    add("--out", type=Path, default=OUT, metavar="PATH", help=".mp4 or .gif; default fvdm.mp4")
    add("--overwrite", action="store_true", help="replace files that exist")
    add(
        "--decode", type=Path, metavar="FILE", help=f"make a video of latents ({SUFFIX}), instead of sampling"
    )
    add(
        "--tiles",
        type=_tiles,
        default=(0, 0),
        metavar="RxC",
        help="decode frames in so many rows and columns of tiles, blended; default: as memory asks for",
    )
    add(
        "--noise-file",
        type=Path,
        metavar="FILE.npy",
        help="begin with this noise and not with the seed's, to compare with other programs",
    )
    add(
        "--mesh",
        default="",
        metavar="SIZES",
        help="how devices share the work, such as data=2,context=4; with --prompts, so many videos at a time "
        "as there are along data",
    )
    add("--attention", choices=KERNELS, default="auto", help="kernel of attention; auto: the first that can")
    add("--explain", action="store_true", help="print the noise level of every frame at every step, and stop")


def _bundled() -> str:
    """The settings of the bundled model, for the help."""
    sampling = json.loads((TINY / "config.json").read_text("utf-8"))["sampling"]
    values = (f"{name} {'x'.join(map(str, v)) if isinstance(v, list) else v}" for name, v in sampling.items())
    shown = ", ".join(value for value in values if not value.startswith(("prompt", "negative", "process")))
    return f"\nSettings of the bundled model where no flag says otherwise: {shown}.\n"


def lora(text: str) -> tuple[str, float | None, str]:
    """Folder, strength if it is told, and expert, "" for each, of a LoRA; for `type=` of an argument."""
    expert, equals, rest = text.partition("=")
    expert, rest = (expert, rest) if equals and expert in ("high", "low") else ("", text)
    folder, strength = numbered(rest, None)
    if strength is not None and not abs(strength) <= 100:
        raise argparse.ArgumentTypeError(f"the strength of {plain(text)} is not from -100 to 100")
    if wrong := no_adapters(folder):
        raise argparse.ArgumentTypeError("; ".join(wrong))
    return folder, strength, expert


def no_adapters(folder: str) -> tuple[str, str] | None:
    """What is wrong with a folder that has no adapters, and what would be right."""
    if (Path(folder) / "adapters").is_dir():
        return None
    right = f"make it: python -m convert {plain(folder)} FOLDER"
    if (Path(folder) / "run.json").is_file():
        right = f"export it: python -m fvdm_jax.train CONFIG --out {plain(folder)} --export FOLDER"
    return f"{plain(folder)} is no folder with adapters", right


def _one_or_two(text: str) -> float | tuple[float, float]:
    first, comma, second = text.partition(",")
    return (number(first), number(second)) if comma else number(text)


def size(text: str) -> tuple[int, int]:
    """Height and width that HxW spells; for `type=` of an argument."""
    match = re.fullmatch(r"([0-9]{1,6})[xX×]([0-9]{1,6})", text.strip())
    if not match:
        raise argparse.ArgumentTypeError(
            f"{plain(text)!r} is not HxW; give height and width, such as 480x832"
        )
    return int(match[1]), int(match[2])


def _interval(text: str) -> tuple[float, float]:
    match = re.fullmatch(r"(0|1|0?\.\d+|[01]\.\d*)-(0|1|0?\.\d+|[01]\.\d*)", text.strip())
    low, high = map(float, match.groups()) if match else (1.0, 0.0)
    if not low < high <= 1:
        raise argparse.ArgumentTypeError(f"{plain(text)!r} is not LOW-HIGH; give two levels, such as 0.2-0.9")
    return low, high


def _tiles(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9][0-9]?)[xX×]([1-9][0-9]?)", text.strip())
    if not match:
        raise argparse.ArgumentTypeError(f"{plain(text)!r} is not RxC; give rows and columns, such as 2x2")
    return int(match[1]), int(match[2])
