"""What a user asks of `python -m fvdm_jax.train`: its own flags, and those of a config."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fvdm_jax.program import Parser, Refusal, whole

DESCRIPTION = "Trains a transformer, or adapters for one, on encoded clips."
HELP = """
  python -m fvdm_jax.train CONFIG.py --help           the config's own flags too
  python -m fvdm_jax.train CONFIG.py --out run        trains; goes on where a run in that folder has stopped
  python -m fvdm_jax.train CONFIG.py --plan           what it will take, and how near it comes to each task
  python -m fvdm_jax.train CONFIG.py --out run --export lora    what it has learned, for sample and convert
  python -m fvdm_jax.train CONFIG.py --out run --replay 500    whether those steps give the same bits again
  python -m fvdm_jax.train CONFIG.py --out run --synthetic --steps 20       without data
Ctrl-C and SIGTERM save before the program ends (exit codes 130 and 143); a second one ends it at once. Where
another process of the run dies or hangs, all end within twenty seconds with exit code 75 (134, by jax, where
it was the first one that died): start the run again. On every host of a pod the same command is run with
--distributed, under Slurm and on GKE too; --out, --model and --data are folders that all of them share.
"""


def parser(config=None) -> Parser:
    """The flags; those of a config are its own."""
    flags = Parser(
        prog="python -m fvdm_jax.train", description=DESCRIPTION, epilog=HELP, add_help=config is not None
    )
    flags.add_argument("config", metavar="CONFIG.py", help="a file of configs/, or your own")
    flags.add_argument("--out", type=Path, help="the folder of the run: checkpoints, measures, samples")
    flags.add_argument("--plan", action="store_true", help="say what the run will take, and stop")
    flags.add_argument("--synthetic", action="store_true", help="train on noise, without data or weights")
    flags.add_argument(
        "--export", type=Path, metavar="FOLDER", help="write what the run has learned, and stop"
    )
    flags.add_argument(
        "--replay", type=whole, metavar="STEP", help="make a run's steps again and compare the bits, and stop"
    )
    flags.add_argument(
        "--profile", type=whole, default=0, metavar="N", help="trace N steps, after two of warm-up"
    )
    flags.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="NAME",
        help="let this setting differ from when the run began, such as data",
    )
    flags.add_argument(
        "--no-fallback", action="store_true", help="refuse where the newest checkpoint is damaged"
    )
    flags.add_argument("--takeover", action="store_true", help="end the run that has the folder, if one does")
    flags.add_argument(
        "--distributed", action="store_true", help="one of several processes, as the environment says"
    )
    flags.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where process 0 is, instead of the environment"
    )
    flags.add_argument("--hosts", type=whole, help="how many processes there are")
    flags.add_argument("--host", type=whole, help="which of them this is, from 0")
    if config is not None:
        from fvdm_jax.config import add_flags

        add_flags(flags, config)
    return flags


class Asked(NamedTuple):
    """What the command line says: the program's own flags, the settings, and what of them was changed."""

    flags: object
    settings: object
    changed: dict
    options: dict


def config_file(argv: list[str], parser: Callable[[], Parser]) -> Path:
    """The config that is named; without one help is given, or a Refusal raised. Imports no jax."""
    path = next((Path(word) for word in argv if word.endswith(".py")), None)
    if path is not None:
        if not path.is_file():
            raise Refusal(path, "is no file", "give one of configs/, or your own")
        return path
    if {"-h", "--help"} & set(argv):
        Parser.print_help(parser())
        raise SystemExit(0)
    raise Refusal("CONFIG.py", "is missing", "give a file of configs/ first")


def read(path: Path, argv: list[str], parser: Callable[..., Parser]) -> Asked:
    """The flags of a program, `parser(config)`, and the settings that a config makes of its own."""
    from fvdm_jax import config

    function = config.load(path)
    flags = parser(function).parse_args(argv)
    own = config.options(function)
    given = {name: value for name, value in vars(flags).items() if name in own}
    try:
        settings = function(**given)
    except ValueError as wrong:
        raise Refusal(path, str(wrong)) from wrong
    changed = {name: (own[name], value) for name, value in given.items() if value != own[name]}
    return Asked(flags, settings, changed, own | given)


def parse(argv: list[str]) -> Asked:
    """Raises Refusal for a flag or a value that cannot be."""
    asked = read(config_file(argv, parser), argv, parser)
    _check(asked.flags)
    if asked.settings.rank and asked.settings.fresh and not (asked.flags.synthetic or asked.flags.plan):
        raise Refusal("--fresh", "leaves adapters nothing to adapt to", "give --no-fresh, or --rank 0")
    return asked


def _check(flags) -> None:
    """Raises Refusal for flags of the program that cannot be, or not together."""
    if not flags.out and (flags.export or not flags.plan):
        raise Refusal("--out", "is missing", "give the folder of the run, or --plan")
    if flags.out and ("://" in str(flags.out) or ":/" in str(flags.out)):
        raise Refusal(
            "--out", f"{flags.out} is an address", "give a folder, such as one where a bucket is mounted"
        )
    if flags.out and flags.out.exists() and not flags.out.is_dir():
        raise Refusal("--out", f"{flags.out} is no folder", "give the name of one")
    if flags.replay is not None and (flags.replay < 1 or flags.export or flags.plan):
        what = f"{flags.replay} is no step, or --export or --plan is asked for too"
        raise Refusal("--replay", what, "give it alone, with the number of a step from 1 on")
    if flags.export and flags.export.exists():
        raise Refusal("--export", f"{flags.export} exists", "give a name that is free")
    if flags.export and (flags.distributed or flags.coordinator):
        raise Refusal("--export", "is for one process", "run it alone, with memory for what was trained")
    if (flags.hosts is None) != (flags.host is None) or flags.hosts is not None and not flags.coordinator:
        raise Refusal("--hosts", "says how many and --host which of them", "give both, and --coordinator")
