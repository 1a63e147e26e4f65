"""Measures what a model can do: every task, on clips that it was never trained on, judged by rule."""

import argparse
import dataclasses
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fvdm_jax import machine, rules
from fvdm_jax.defaults import defaults
from fvdm_jax.evaluating.cases import TASKS, check
from fvdm_jax.evaluating.vbench import Export, Pair, collected, pairs
from fvdm_jax.flags import lora
from fvdm_jax.presets import PRESETS
from fvdm_jax.program import Parser, Refusal, check_output, leave, legible, number, outputs, plain, run, whole
from fvdm_jax.progress import Stages
from fvdm_jax.request import TINY, Request, validate

DESCRIPTION = "Measures what a model can do, on clips that it was never trained on."
HELP = """
  python -m fvdm_jax.evaluate                              the bundled model, all tasks
  python -m fvdm_jax.evaluate --tasks i2v,extension --clips 64 --batch 8
  python -m fvdm_jax.evaluate --model FOLDER --export vbench-i2v --images FOLDER --out FOLDER
  python -m fvdm_jax.evaluate --collect FOLDER             VBench's results as one table
It writes NAME.json, with every setting and score, and NAME.png, with examples. Tasks are given frames of true
clips and told their captions; what comes out is judged by image processing alone. The row `ceiling` has
the true clips as they come out of the VAE. An export that was stopped goes on when it is started again:
its folder has videos/ for VBench, samples/ with the settings of each, and manifest.json with their seeds.

Columns: colour to speed, shares of clips that are as their caption says · possible, straight ways and
reflections alone · smooth, no jumps · stays, that shape and colour in three quarters of its last frames ·
all of these · reach, a frame given at the end is come to · goes on, the way of a given clip, within 10 % of
its speed · PSNR, of given frames against the VAE's own · seam, the jump where what is given ends · path and
change, of the shape and of a frame, over the true clip's · frozen, nothing moves. Fréchet distances say
nothing of fewer than some 32 clips.
"""
FORMATS = ("vbench-i2v",)
OUT = "evaluate"


class Asked(NamedTuple):
    """What to measure: the flags, what those come to that are named again, and how the model is sampled."""

    flags: argparse.Namespace
    request: Request
    tasks: list[str]
    batch: int
    out: Path
    pairs: list[Pair]


def parser() -> Parser:
    """The flags."""
    flags = Parser(prog="python -m fvdm_jax.evaluate", description=DESCRIPTION, epilog=HELP)
    add = flags.add_argument
    add("--model", type=Path, default=TINY, metavar="FOLDER", help="default: the bundled one")
    add("--tasks", default=",".join(TASKS), metavar="NAMES", help=f"some of {', '.join(TASKS)}; default all")
    add("--clips", type=whole, default=256, metavar="N", help="clips of each task (default 256)")
    add("--batch", type=whole, default=16, metavar="N", help="clips at once (default 16)")
    add("--steps", type=whole, metavar="N", help="steps of the solver; default: the model's")
    add("--solver", choices=rules.SOLVERS, help="how a step is taken; default: the model's")
    add("--schedule", metavar="NAME[:OPTION=N,…]", help="as of fvdm_jax.sample; default: the model's")
    add("--history", type=number, default=1.0, metavar="X", help="weight of the frames that are clean")
    add("--shift", type=number, metavar="X", help="above 1: more of the steps at high noise")
    add("--guidance", type=number, metavar="X", help="weight of the prompt; 1 turns guidance off")
    add("--seed", type=whole, default=0, metavar="N", help="of the noise (default 0)")
    add("--dtype", choices=("float32", "bfloat16"), help="the transformer's; default: as its config has it")
    add("--no-losses", dest="losses", action="store_false", help="leave the held-out loss out")
    add("--out", type=Path, metavar="NAME", help=f"default {OUT}; of an export its folder")
    add("--overwrite", action="store_true", help="replace files that exist")
    add("--export", choices=FORMATS, help="make the videos of a suite instead, to be judged by others")
    add("--images", type=Path, metavar="FOLDER", help="images named PROMPT.jpg, or those of --prompts")
    add("--prompts", type=Path, metavar="FILE", help="which image has which prompt: JSON, or a TSV")
    add("--samples", type=whole, default=5, metavar="N", help="videos of each prompt (default 5)")
    add("--preset", default="", choices=PRESETS, help="of an export, as of fvdm_jax.sample")
    add("--lora", type=lora, action="append", default=[], metavar="[high=|low=]DIR[:STRENGTH]", help="too")
    add("--collect", type=Path, metavar="FOLDER", help="read VBench's results there instead")
    return flags


def parse(argv: list[str]) -> Asked:
    """The flags, checked. Raises Refusal, or SystemExit after --help."""
    given = parser().parse_args(argv)
    for name, most in (("clips", 10**6), ("batch", 10**4), ("samples", 1000)):
        rules.obey(f"--{name}", vars(given)[name], rules.whole_from(1, most))
    _check_mode(given)
    batch = min(given.batch, given.clips)
    if given.clips % batch:
        right = f"give {given.clips - given.clips % batch} clips, or another --batch"
        raise Refusal("--clips", f"{given.clips} do not divide into batches of {batch}", right)
    several = pairs(given.images, given.prompts) if given.export else []
    out, request = given.out or Path("vbench-i2v" if given.export else OUT), Request()
    if not given.collect:
        request = _request(given)
    names = _tasks(given.tasks)
    if not given.export:
        for path in files(out)[: 1 if given.collect else 2]:
            check_output(path, "--out", given.overwrite)
    return Asked(given, request, names, batch, out, several)


def files(out: Path) -> tuple[Path, Path]:
    """The record and the picture of this name."""
    return out.with_name(f"{out.name}.json"), out.with_name(f"{out.name}.png")


def _check_mode(given) -> None:
    if given.export and given.collect:
        raise Refusal("--collect", "goes with no --export", "export, judge, then collect")
    if given.export and given.dtype:
        raise Refusal(
            "--dtype", "goes with no --export", "leave it out: videos are made as by fvdm_jax.sample"
        )
    if not given.export and (given.preset or given.lora):
        right = f"add --export {FORMATS[0]}, or merge the LoRA into the model with python -m convert"
        raise Refusal("--preset, --lora", "go with --export", right)
    if given.export and not (given.images or given.prompts):
        raise Refusal("--export", "needs images", "give --images FOLDER, --prompts FILE, or both")
    if not given.export and (given.images or given.prompts):
        raise Refusal("--images, --prompts", "go with --export", f"add --export {FORMATS[0]}")


def _tasks(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names or [""]:
        if name not in TASKS:
            raise Refusal("--tasks", f"{name!r} is unknown", f"give some of {', '.join(TASKS)}")
    return list(dict.fromkeys(names))


def _request(given) -> Request:
    """The request of the model's own settings, but for what is given."""
    asked = Request(
        prompt="", model=given.model, steps=given.steps, solver=given.solver, shift=given.shift,
        guidance=given.guidance, seed=given.seed, explain=True,
        schedule=given.schedule, history=given.history, preset=given.preset, lora=tuple(given.lora),
    )  # fmt: skip
    model = defaults(given.model)
    request = validate(asked, model, base=True)
    if not given.export:
        check(request, model)
    return request


def main(argv: list[str]) -> None:
    """Measures what `argv` asks for, prints a table and writes JSON and a picture."""
    asked = parse(argv)
    if asked.flags.collect:
        collect(asked)
    elif asked.pairs:
        export(asked)
    else:
        measure(asked)


def measure(asked: Asked) -> None:
    """All tasks of a model, judged."""
    with Stages() as stages:
        with stages("load"):
            import jax

            from fvdm_jax.evaluating import generate, picture, run, table

            machine.keep_compiled_programs()
            machine.keep_memory()
        examiner = generate.Examiner(asked.request, asked.batch, asked.flags.dtype, stages)
        plan = run.plan(examiner.window, asked.tasks, asked.flags.clips, asked.batch)
        record, examples = run.evaluate(examiner, plan, asked.flags.losses, stages)
    said = {
        "model": os.path.abspath(asked.request.model),
        "settings": generate.described(asked.request)
        | {"clips": asked.flags.clips, "batch": asked.batch, "dtype": examiner.networks.dit.dtype},
        "scenes": {"seed": generate.EVALUATION_SEED, "first": 0},
        "device": f"{len(jax.devices())} × {jax.devices()[0].device_kind}",
        "versions": machine.versions(),
        "seconds": stages.seconds,
    }
    with outputs(*files(asked.out)) as drafts:
        drafts[0].write_text(legible(said | record) + "\n", "utf-8")
        picture.sheet(examples).save(drafts[1])
    table.report(record)
    print("wrote", *files(asked.out))


def export(asked: Asked) -> None:
    """Videos of all pairs that are not made yet, for others to judge."""
    settings = asked.request.settings
    shown = {n: v for n, v in settings.items() if n not in ("prompt", "keep", "out", "strength", "files")}
    folder = Export(asked.out, shown)
    total = len(asked.pairs) * asked.flags.samples
    missing = len(folder.missing(asked.pairs, asked.flags.samples))
    print(f"{total} videos of {len(asked.pairs)} prompts, {missing} of them still to be made")
    if missing:
        with Stages() as stages:
            make = partial(sampled, asked.request, sampler(asked, stages))
            for name in folder.fill(asked.pairs, asked.flags.samples, make):
                stages.say(f"{len(folder.done)}: {plain(name)}")
    print("wrote", folder.videos)


def sampler(asked: Asked, stages: Stages) -> Callable[[Request], None]:
    """What makes the video of a request, by a model that is loaded once for all pairs."""
    with stages("load"):
        from fvdm_jax import sample
        from fvdm_jax.projector import Projector
        from fvdm_jax.studio import Studio

    studio = Studio([dataclasses.replace(asked.request, prompt=pair.prompt) for pair in asked.pairs], stages)
    projector = Projector(stages)
    return lambda request: sample.together([request], studio, stages, projector)


def sampled(request: Request, make: Callable, pair: Pair, seed: int, path: Path) -> None:
    """Writes the video that `python -m fvdm_jax.sample --keep 0=IMAGE` makes, and what lies beside it."""
    one = dataclasses.replace(
        request,
        prompt=pair.prompt,
        keep=(f"0={pair.image}",),
        seed=seed,
        out=path,
        overwrite=True,
        explain=False,
    )
    make(validate(one, defaults(request.model)))


def collect(asked: Asked) -> None:
    """VBench's results as one table and one file."""
    from fvdm_jax.evaluating import table

    found = collected(asked.flags.collect)
    path = files(asked.out)[0]
    with outputs(path) as (draft,):
        draft.write_text(legible({"folder": str(asked.flags.collect), "dimensions": found}) + "\n", "utf-8")
    rows = [[name, f"{100 * each['score']:.2f}%", str(each["videos"])] for name, each in found.items()]
    table.show(["dimension", "score", "videos"], rows)
    print("wrote", path)


def cli() -> None:
    """The program, as `python -m fvdm_jax.evaluate` and as `fvdm-evaluate`."""
    leave(run(main))


if __name__ == "__main__":
    cli()
