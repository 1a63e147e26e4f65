"""From the command line of `python -m fvdm_jax.sample` to requests: one, or one for each video."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from fvdm_jax import latents, prompt_files
from fvdm_jax.defaults import OPTIONAL, PATCH, defaults
from fvdm_jax.flags import TINY, parser
from fvdm_jax.keeps import Keep, total
from fvdm_jax.program import Refusal
from fvdm_jax.request import FLAGS, Request, check_outputs, validate
from fvdm_jax.rules import RULES, obey, sides, strengths, texts
from fvdm_jax.video import STRIDE

LATER = ("lora", "interval", "preset", "still", "segments", "noise_file", *FLAGS[1:])
"""The settings that not all files of latents name."""


def parse(argv: Sequence[str]) -> Request:
    """The validated Request of a command line. Raises Refusal, or SystemExit after --help."""
    given = vars(parser().parse_args(argv))
    if given["decode"]:
        return _stored(given)
    several = {name: tuple(given[name]) for name in ("keep", "lora")}
    request = Request(**given | several | {"model": given["model"] or TINY})
    return validate(request, defaults(request.model))


def lines(request: Request) -> list[Request]:
    """A validated request for each video: itself, or one for each line of its file of prompts.

    Those whose video is there, made with the same settings, are left out. Raises Refusal for a line that
    cannot be.
    """
    if request.prompts is None or request.length is not None:
        return [request]
    asked, model, requests = prompt_files.read(request.prompts), defaults(request.model), []
    for number, line in enumerate(asked, 1):
        said = {name: value for name, value in line._asdict().items() if value is not None}
        if line.keep and line.prompt is None and request.prompt == model.sampling["prompt"]:
            # As of a single video, the model's example is not told of what was given.
            said["prompt"] = ""
        out = request.out.with_stem(f"{request.out.stem}-{number:0{len(str(len(asked)))}}")
        one = dataclasses.replace(request, **said, prompts=None, out=out)
        try:
            one = validate(one, model, outputs=False)
            ours = not (request.overwrite or request.explain) and _ours(one)
            if ours and one.out.exists():
                continue
            if not request.explain:
                # What an earlier run of the same had half replaced is no stranger's.
                one = dataclasses.replace(one, overwrite=one.overwrite or ours)
                check_outputs(one)
            requests.append(one)
        except Refusal as refusal:
            where = f"{request.prompts}, video {number}: {refusal.where}"
            raise Refusal(where, refusal.what, refusal.right) from refusal
    return requests


def _ours(request: Request) -> bool:
    """Whether the settings that lie there, the first of its outputs to be whole, are the request's."""
    try:
        told = json.loads(request.outputs[-1].read_text("utf-8"))
        return told.items() >= request.settings.items()
    except (OSError, ValueError, AttributeError):
        return False


FOR_DECODE = ("decode", "model", "out", "fps", "tiles", "overwrite", "debug")


def _stored(given: dict) -> Request:
    """The Request that the latents of --decode were made by, with what is given besides. Raises Refusal."""
    unset = vars(parser().parse_args([]))
    if late := [name for name in given if given[name] != unset[name] and name not in FOR_DECODE]:
        right = f"with it go {', '.join(f'--{name}' for name in FOR_DECODE[1:])}"
        raise Refusal(f"--{late[0]}", "has no effect with --decode: the latents are made", right)
    saved = latents.probe(given["decode"])
    # Latents of before a setting was there do not name it.
    told = {field.name: field.default for field in dataclasses.fields(Request) if field.name in LATER}
    told |= OPTIONAL
    told |= {name: tuple(v) if isinstance(v, list) else v for name, v in saved.settings.items()}
    chosen = {name: given[name] for name in FOR_DECODE if given[name] != unset[name]}
    model = defaults(chosen.get("model") or Path(str(told.get("model"))))
    rules = RULES | {"size": sides(model.multiple), "keep": texts, "strength": strengths}
    for name, rule in rules.items():
        if rule(told.get(name)):
            raise Refusal(given["decode"], f"does not say with what {name} it was made", "sample again")
    obey("--fps", chosen.get("fps", 1), RULES["fps"])
    spatial = model.multiple // PATCH
    height, width = (side // spatial for side in told["size"])
    frames = total(told["frames"], told["length"], told["fps"])
    shape = (1, frames, height, width, model.channels)
    if saved.shape != shape or len(told["strength"]) != shape[1]:
        what = f"holds latents {list(saved.shape)}, and of {model.config.parent} they would be {list(shape)}"
        raise Refusal(given["decode"], what, "give the model that made them with --model")
    keeps = (Keep(i, 1, Path(), "image", s, s) for i, s in enumerate(told["strength"]) if s < 1)
    values = {
        name: told[name]
        for name in (*RULES, "size", "keep", "lora", "interval", "preset", "still", "segments")
    }
    # Decoding knows no windows.
    values |= {"frames": 1 + STRIDE * (frames - 1), "length": None}
    request = Request(**values | {"model": model.config.parent, "keeps": tuple(keeps)} | chosen)
    check_outputs(request)
    return request
