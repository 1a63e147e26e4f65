"""Runs every task on the bundled model, and writes one page that shows what came out; or serves one."""

import importlib.util
import time
import webbrowser
from pathlib import Path

from fvdm_jax import machine, rules
from fvdm_jax.defaults import defaults
from fvdm_jax.evaluating.cases import TASKS, check
from fvdm_jax.program import Parser, Refusal, check_output, leave, outputs, run, whole
from fvdm_jax.progress import Stages
from fvdm_jax.request import TINY, Request, validate

DESCRIPTION = """Runs every task on one model, and writes one page that shows what came out.

With --serve, a page on which videos are made, for this machine alone: pip install -e ".[serve]".
"""
PORT = 7860
OUT = Path("demo.html")


def parser() -> Parser:
    """The flags."""
    flags = Parser(prog="python -m fvdm_jax.demo", description=DESCRIPTION)
    add = flags.add_argument
    add("--model", type=Path, default=TINY, metavar="DIR", help="folder of a model; default the bundled one")
    add("--steps", type=whole, metavar="N", help="steps of the solver; default: the model's")
    add("--clip", type=whole, default=0, metavar="N", help="which clip of the world is given and told")
    add("--seed", type=whole, default=0, metavar="N", help="of the noise; default 0")
    add(
        "--out", type=Path, default=OUT, metavar="PATH", help="the page; default demo.html, which is replaced"
    )
    add("--overwrite", action="store_true", help="replace another file that exists")
    add("--open", action="store_true", help="show it in a browser")
    add("--serve", action="store_true", help="instead, a page on which videos are made, on 127.0.0.1 alone")
    add("--port", type=whole, default=PORT, metavar="N", help=f"where --serve listens; default {PORT}")
    return flags


def parse(argv: list[str]) -> tuple[object, Request]:
    """The flags, and how the model is sampled. Raises Refusal, or SystemExit after --help."""
    given = parser().parse_args(argv)
    _check_served(given)
    rules.obey("--clip", given.clip, rules.whole_from(0, 10**6))
    asked = Request(prompt="", model=given.model, steps=given.steps, seed=given.seed, explain=True)
    model = defaults(given.model)
    request = validate(asked, model, base=True)
    if given.serve:
        return given, request
    check(request, model)
    check_output(given.out, "--out", given.overwrite or given.out == OUT)
    return given, request


def _check_served(given) -> None:
    """Raises Refusal where flags of the two pages are mixed, or the served one cannot be."""
    unset = vars(parser().parse_args([]))
    others = ("steps", "clip", "seed", "out", "overwrite") if given.serve else ("port",)
    for name in others:
        if getattr(given, name) != unset[name]:
            what = "has no effect " + ("with --serve" if given.serve else "without --serve")
            raise Refusal(f"--{name}", what, "leave it out")
    if given.serve and not importlib.util.find_spec("gradio"):
        raise Refusal("--serve", "needs gradio, which is not here", 'add it: pip install -e ".[serve]"')
    rules.obey("--port", given.port, rules.whole_from(1024, 65535))


def main(argv: list[str]) -> None:
    """Makes the page that `argv` asks for."""
    given, request = parse(argv)
    if given.serve:
        from fvdm_jax.serving.locks import hush

        hush()
        from fvdm_jax.serving.app import serve

        named = "" if given.model == TINY else str(given.model)
        return serve(given.model, named, given.port, given.open)
    with Stages() as stages:
        with stages("load"):
            import jax

            from fvdm_jax.evaluating.generate import Examiner
            from fvdm_jax.evaluating.page import page

            machine.keep_compiled_programs()
            machine.keep_memory()
        examiner = Examiner(request, 1, None, stages)
        rows = [_row(examiner, request, name, given.clip) for name in TASKS]
    told = f"{given.model.name}, {request.steps} steps of {request.solver}, {jax.devices()[0].device_kind}"
    with outputs(given.out) as (draft,):
        draft.write_text(page(rows, request.fps, told), "utf-8")
    print("wrote", given.out)
    if given.open:
        webbrowser.open(given.out.resolve().as_uri())


def _row(examiner, request: Request, name: str, clip: int):
    """A task, on this clip of the world."""
    import numpy as np

    from fvdm_jax.evaluating.page import Row
    from fvdm_jax.steps import rows

    case = TASKS[name](examiner.window)
    truth = examiner.truth(range(clip, clip + 1), case.frames)
    states = examiner.states(truth.captions)
    began = time.perf_counter()
    made = examiner.made(case, truth, states)
    seconds = time.perf_counter() - began
    given = sorted(case.given)
    levels = rows(request, np.array([0.0 if k in given else 1.0 for k in range(examiner.window)]))
    calls = case.windows * (len(levels) - 1)
    return Row(name, truth.captions[0], made.pixels[0], truth.pixels[0], given, levels, calls, seconds)


def cli() -> None:
    """The program, as `python -m fvdm_jax.demo` and as `fvdm-demo`."""
    leave(run(main))


if __name__ == "__main__":
    cli()
