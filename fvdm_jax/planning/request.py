"""What a user asks of `python -m fvdm_jax.plan`: its own flags, and those of a config."""

import argparse
import importlib.util
from pathlib import Path

from fvdm_jax import chips
from fvdm_jax.program import Parser, Refusal, check_output, number, whole
from fvdm_jax.train_request import Asked, config_file, read

DESCRIPTION = (
    "Compiles a step for TPUs that are not there, and says what it would take: bytes, operations, time."
)
HELP = """
  python -m fvdm_jax.plan CONFIG.py --topology v5p:4x4x4 --batch 16 --mesh fsdp=16,context=4
  python -m fvdm_jax.plan CONFIG.py --topology v6e:16x16 --batch 32           tries layouts, tells the fastest
  python -m fvdm_jax.plan CONFIG.py --topology v6e:2x4 --task sample --price 2.7 --json plan.json
  python -m fvdm_jax.plan CONFIG.py --topology gpu:h100x8 --batch 8            by formulas alone
Bytes, collectives and products are those of the compiled program; seconds are a bound by the chips' peaks,
not a measurement. The config's own flags are those of fvdm_jax.train: --batch, --remat, --clip and the rest.
"""

TASKS = ("train", "sample", "decode", "encode")


def parser(config=None) -> Parser:
    """The flags; those of a config are its own."""
    flags = Parser(
        prog="python -m fvdm_jax.plan", description=DESCRIPTION, epilog=HELP, add_help=config is not None
    )
    flags.add_argument("config", metavar="CONFIG.py", help="a file of configs/, or your own")
    flags.add_argument("--topology", help="the slice, such as v5p:4x4x4, v6e:16x16 or gpu:h100x8")
    flags.add_argument("--task", choices=TASKS, default="train", help="what is compiled (default: train)")
    flags.add_argument(
        "--sampling-steps", type=whole, default=50, metavar="N", help="of --task sample (default: 50)"
    )
    flags.add_argument(
        "--guided",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="sample with guidance, two passes of the network a step (default)",
    )
    flags.add_argument(
        "--tries", type=whole, default=3, metavar="N", help="layouts to compile without --mesh"
    )
    flags.add_argument("--price", type=number, metavar="DOLLARS", help="what an hour of a chip costs")
    flags.add_argument("--json", type=Path, metavar="FILE", help="write the plan there too")
    flags.add_argument("--overwrite", action="store_true", help="replace that file")
    if config is not None:
        from fvdm_jax.config import add_flags

        add_flags(flags, config)
    return flags


def parse(argv: list[str]) -> tuple[Asked, chips.Slice]:
    """What the command line says, and the slice. Raises Refusal for a flag or a value that cannot be."""
    path, where = config_file(argv, parser), _slice(argv)
    asked = read(path, argv, parser)
    if where is None:
        raise Refusal("--topology", "is missing", chips.FORMS)
    _check(asked.flags)
    return asked, where


def _slice(argv: list[str]) -> chips.Slice | None:
    """The slice that is named, before the config is read, which imports jax."""
    flags = Parser(prog="python -m fvdm_jax.plan", add_help=False)
    flags.add_argument("--topology")
    named = flags.parse_known_args(argv)[0].topology
    if named is None:
        return None
    try:
        found = chips.parse(named)
    except ValueError as wrong:
        raise Refusal("--topology", str(wrong)) from wrong
    if not found.gpu and importlib.util.find_spec("libtpu") is None:
        what = "needs TPU's compiler, libtpu, which is not installed"
        raise Refusal("--topology", what, 'pip install -e ".[plan]"')
    return found


def _check(flags) -> None:
    if not 1 <= flags.sampling_steps <= 10_000:
        raise Refusal("--sampling-steps", f"{flags.sampling_steps} is out of range", "give 1 to 10000")
    if flags.tries < 1:
        raise Refusal("--tries", f"{flags.tries} is too few", "give 1 or more")
    if flags.price is not None and flags.price < 0:
        raise Refusal("--price", f"{flags.price} is less than nothing", "give dollars for an hour of a chip")
    if flags.json:
        check_output(flags.json, "--json", flags.overwrite)
