"""What a user asks of `python -m fvdm_jax.data.precompute`: read, checked and completed."""

import argparse
import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

from fvdm_jax.data.cutting import Cut
from fvdm_jax.defaults import PATCH
from fvdm_jax.flags import TINY, size
from fvdm_jax.program import Parser, Refusal, number, plain, whole
from fvdm_jax.rules import RULES, between, obey, sides, whole_from

PARTS = ("vae", "text")
"""What of a model encodes."""

EPILOG = """\
A SOURCE is a clip (MP4, MOV, WebM, MKV, AVI, GIF), a folder with clips anywhere below, or a table of them.
A folder of numbered pictures is one clip, at the rate --fps-in; a single picture is one with --images.

captions   a table (.csv with a head, or .jsonl) that has a column file_name, file, path or video and one
           text, caption or prompt; it is found in a folder, or given. Paths are taken from where it lies, or
           from its folder `train`. Else NAME.txt beside the clip NAME, or beside the folder of its pictures.
frames     --frames 81,49,25 makes clips of the longest of these that fits, counted at --fps a second by the
           times at which the file shows its frames; --clips all goes on where a clip ends.
size       --size 480x832,832x480,624x624 takes the one that is most like the file in shape; the picture is
           scaled to cover it, and cropped.

No clip is left out in silence: unless --allow-drop is given, a file that gives none stops the run before it
begins. --report says of each file what becomes of it, by its header and first picture. The same command again
goes on where a run was stopped, and encodes what is new or changed; a record whose file has since got another
caption, content or cut is replaced. Several machines share the work with --process 0/4, 1/4 and so on.
What Pusa's own program has encoded (*.tensors.pth) is imported by python -m convert FOLDER OUT.
"""


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be made of `sources`, validated. `process`: (index, count) of those that share the files."""

    sources: tuple[Path, ...]
    out: str
    model: Path
    cut: Cut
    caption: str | None
    batch: int | None
    dtype: str
    process: tuple[int, int]
    distributed: bool
    shard: int
    report: bool
    allow_drop: bool


def parser() -> Parser:
    """The flags of the program."""
    told = "Encodes clips and captions for training, into shards of records."
    flags = Parser(prog="python -m fvdm_jax.data.precompute", description=told, epilog=EPILOG)
    add = flags.add_argument
    add("source", nargs="+", type=Path, metavar="SOURCE", help="clips, folders of clips, tables of captions")
    add("--out", metavar="DIR", help="the folder of records, or its address, such as gs://bucket/clips")
    add("--model", type=Path, default=TINY, metavar="DIR", help="folder of a model; default the bundled one")
    add("--frames", type=_lengths, metavar="N[,N…]", help="lengths of clips, 1 + 4n; default the model's")
    add("--size", type=_sizes, metavar="HxW[,HxW…]", help="sizes of clips; default the model's")
    add("--fps", type=number, metavar="X", help="frames a second that are taken; default the model's")
    add("--fps-in", type=number, metavar="X", help="frames a second of folders of numbered pictures")
    add(
        "--clips",
        type=_most,
        default=1,
        metavar="first|all|N",
        help="how many clips of a file; default first",
    )
    add("--crop", choices=("centre", "random"), default="centre", help="random: the same for the same file")
    add("--images", action="store_true", help="single pictures are clips of one frame")
    add("--caption", metavar="TEXT", help="the caption of clips that have none of their own")
    add("--report", action="store_true", help="say what becomes of each file, and stop")
    add("--allow-drop", action="store_true", help="go on without the files that give no clip")
    kinds = "float32", "bfloat16", "float16"
    add("--dtype", choices=kinds, default="bfloat16", help="of what is stored; default bfloat16")
    add("--batch", type=whole, metavar="N", help="clips encoded together; default one on each device")
    add("--process", type=_process, default=(0, 1), metavar="I/N", help="take every Nth file from the Ith on")
    add("--distributed", action="store_true", help="take the share that the environment says (pods, Slurm)")
    add("--shard", type=number, default=256, metavar="MB", help="size of the files of records; default 256")
    return flags


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(whole(part) for part in text.split(","))


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    return tuple(size(part) for part in text.split(","))


def _most(text: str) -> int | None:
    if text in ("first", "all"):
        return 1 if text == "first" else None
    if (most := whole(text)) < 1:
        raise argparse.ArgumentTypeError(f"{most} is no number of clips; give first, all, or 1 or more")
    return most


def _process(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,5})/([0-9]{1,5})", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{plain(text)!r} is not I/N; of four give 0/4, 1/4, 2/4 and 3/4")
    return int(match[1]), int(match[2])


def parse(argv: Sequence[str]) -> Job:
    """The validated Job of a command line. Raises Refusal, or SystemExit after --help."""
    given = parser().parse_args(argv)
    usual, multiple = _model(given.model)
    lengths, sizes, fps = (
        usual.get(name) if getattr(given, name) is None else getattr(given, name)
        for name in ("frames", "size", "fps")
    )
    for name, value in (("frames", lengths), ("size", sizes), ("fps", fps)):
        if value is None:
            raise Refusal(f"--{name}", "is missing, and the model's config.json has none", "give it")
    rules = {
        "frames": (lengths, RULES["frames"]),
        "size": (sizes, sides(multiple)),
        "fps": ([fps], RULES["fps"]),
        "fps-in": ([given.fps_in], RULES["fps"]),
        "caption": ([given.caption], RULES["prompt"]),
        "batch": ([given.batch], whole_from(1, 4096)),
        "shard": ([given.shard], between(0, 1e6)),
    }
    for name, (values, rule) in rules.items():
        for value in values:
            if value is not None:
                obey(f"--{name}", value, rule)
    if not given.report and not given.out:
        raise Refusal("--out", "is missing", "give the folder of records, or --report")
    if given.out and "://" not in given.out and Path(given.out).exists() and not Path(given.out).is_dir():
        raise Refusal("--out", f"{plain(given.out)} is no folder", "give a folder, or a name that is free")
    # As a float, whoever says it: keys of records depend on it.
    cut = Cut(lengths, sizes, float(fps), given.clips, given.crop, given.fps_in, given.images)
    names = ("out", "model", "caption", "batch", "dtype", "process", "distributed", "report", "allow_drop")
    chosen = {name: getattr(given, name) for name in names}
    return Job(sources=tuple(given.source), cut=cut, shard=int(given.shard * 2**20), **chosen)


def _model(folder: Path) -> tuple[dict, int]:
    """The frames, size and fps that a model has of its own, and of what the sides of its clips are multiples.

    Raises Refusal, named --model, where the folder cannot encode.
    """
    config, right = folder / "config.json", "give the folder of a model, as of python -m convert"
    try:
        stored = json.loads(config.read_text("utf-8"))
        if absent := [name for name in PARTS if name not in stored]:
            raise Refusal("--model", f"{folder} has no {' and no '.join(absent)}", "convert them into it")
        vae, usual = stored["vae"], dict(stored.get("sampling", {}))
        multiple = PATCH * int(vae["patch"]) * 2 ** len(vae["temporal"])
    except OSError as failure:
        raise Refusal("--model", f"{config} cannot be read: {failure.strerror}", right) from failure
    except (ValueError, KeyError, TypeError, RecursionError) as broken:
        raise Refusal("--model", f"{config} is no config of a model", right) from broken
    for name in PARTS:
        if not (folder / name).is_dir() and not (folder / f"{name}.safetensors").is_file():
            what = f"{folder} has no {name}.safetensors and no folder {name}"
            raise Refusal("--model", what, "give a folder with all its files")
    lengths = {"frames": (usual["frames"],)} if "frames" in usual else {}
    sizes = {"size": (tuple(usual["size"]),)} if "size" in usual else {}
    return {"fps": usual.get("fps")} | lengths | sizes, multiple
