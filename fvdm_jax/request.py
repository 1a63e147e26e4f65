"""What a user asks of `python -m fvdm_jax.sample`: read, checked and completed."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from fvdm_jax import latents, zoo
from fvdm_jax.flags import OUT, TINY, parser
from fvdm_jax.keeps import Keep, latent, placed
from fvdm_jax.latents import SUFFIX
from fvdm_jax.program import Refusal, check_output, plain
from fvdm_jax.rules import RULES, sides, strengths, texts

WEIGHTS = ("dit", "vae", "text")
SAMPLING = tuple("prompt negative frames size steps solver process spacing shift guidance fps".split())
"""The settings that a model has of its own."""

HISTORY = ("history", "history_level", "history_windows")
LATER = ("lora", "schedule", "interval", "rescale", *HISTORY)
"""The settings that not all files of latents name."""

PATCH = 2
"""Latent pixels to a side of a token of the transformer."""


@dataclasses.dataclass(frozen=True)
class Defaults:
    """The settings with which a model samples where the user states none, and the file that says so.

    The sides of its videos are multiples of `multiple` pixels; its latents have so many `channels`.
    """

    config: Path
    sampling: dict
    multiple: int
    channels: int


@dataclasses.dataclass(frozen=True)
class Request:
    """A video to be sampled; None: as the model has it. Complete, with its `keeps`, once `validate` made it.

    frames are pixel frames, size is (H, W) in pixels, keep holds FRAME=FILE[:STRENGTH] as given. With
    `decode`, a file of latents, it is the request that made them. `tiles` (0, 0): as memory asks for.
    """

    prompt: str | None = None
    negative: str | None = None
    keep: tuple[str, ...] = ()
    frames: int | None = None
    size: tuple[int, int] | None = None
    steps: int | None = None
    solver: str | None = None
    process: str | None = None
    spacing: str | None = None
    shift: float | None = None
    guidance: float | None = None
    fps: float | None = None
    seed: int = 0
    model: Path = TINY
    out: Path = OUT
    overwrite: bool = False
    explain: bool = False
    debug: bool = False
    decode: Path | None = None
    tiles: tuple[int, int] = (0, 0)
    mesh: str = ""
    attention: str = "auto"
    schedule: str = "together"
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    history: float = 1.0
    history_level: float = 0.0
    history_windows: int = 1
    lora: tuple[tuple[str, float], ...] = ()
    keeps: tuple[Keep, ...] = ()

    @property
    def latent_frames(self) -> int:
        """How many latent frames stand for the video."""
        return latent(self.frames)

    @property
    def strength(self) -> list[float]:
        """For every latent frame how much of the path it takes part in: 0 kept … 1 generated."""
        strength = [1.0] * self.latent_frames
        for keep in self.keeps:
            strength[keep.first : keep.first + keep.count] = [keep.strength] * keep.count
        return strength

    @property
    def outputs(self) -> tuple[Path, Path, Path]:
        """The video, its contact sheet and its settings."""
        return self.out, self.out.with_suffix(".png"), self.out.with_suffix(".json")

    @property
    def latents(self) -> Path:
        """Where the denoised latents are, or are to be."""
        return self.decode or self.out.with_suffix(SUFFIX)

    @property
    def settings(self) -> dict:
        """Every setting as plain JSON values; what the video's comment and the settings file hold."""
        settings = dataclasses.asdict(self) | {"strength": self.strength}
        for name in ("debug", "explain", "overwrite", "decode", "keeps"):
            del settings[name]
        return json.loads(json.dumps(settings | {"model": os.path.abspath(self.model)}, default=str))


def parse(argv: Sequence[str]) -> Request:
    """The validated Request of a command line. Raises Refusal, or SystemExit after --help."""
    given = vars(parser().parse_args(argv))
    if given["decode"]:
        return _stored(given)
    several = {name: tuple(given[name]) for name in ("keep", "lora")}
    request = Request(**given | several | {"model": given["model"] or TINY})
    return validate(request, defaults(request.model))


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
    told |= {name: tuple(v) if isinstance(v, list) else v for name, v in saved.settings.items()}
    chosen = {name: given[name] for name in FOR_DECODE if given[name] != unset[name]}
    model = defaults(chosen.get("model") or Path(str(told.get("model"))))
    rules = RULES | {"size": sides(model.multiple), "keep": texts, "strength": strengths}
    for name, rule in rules.items():
        if rule(told.get(name)):
            raise Refusal(given["decode"], f"does not say with what {name} it was made", "sample again")
    if wrong := RULES["fps"](chosen.get("fps", 1)):
        raise Refusal("--fps", f"{chosen['fps']} {wrong[0]}", wrong[1])
    spatial = model.multiple // PATCH
    height, width = (side // spatial for side in told["size"])
    shape = (1, latent(told["frames"]), height, width, model.channels)
    if saved.shape != shape or len(told["strength"]) != shape[1]:
        what = f"holds latents {list(saved.shape)}, and of {model.config.parent} they would be {list(shape)}"
        raise Refusal(given["decode"], what, "give the model that made them with --model")
    keeps = (Keep(i, 1, Path(), "image", s) for i, s in enumerate(told["strength"]) if s < 1)
    values = {name: told[name] for name in (*RULES, "size", "keep")} | {
        k: told[k] for k in ("lora", "interval")
    }
    request = Request(**values | {"model": model.config.parent, "keeps": tuple(keeps)} | chosen)
    _check_outputs(request)
    return request


def defaults(folder: Path) -> Defaults:
    """What the config.json of a model's folder says of sampling. Raises Refusal, named --model."""
    config = folder / "config.json"
    try:
        stored = json.loads(config.read_text("utf-8"))
        if not isinstance(stored, dict):
            raise TypeError("no object")
        _check_parts(folder, stored)
        sampling, vae = dict(stored["sampling"]), stored["vae"]
        multiple = PATCH * int(vae["patch"]) * 2 ** len(vae["temporal"])
        return Defaults(config, sampling, multiple, int(vae["latent"]))
    except OSError as failure:
        what = f"{config} cannot be read: {failure.strerror}"
    except (KeyError, TypeError):
        what = f"{config} has no settings under 'sampling' or no 'vae'"
    except (ValueError, RecursionError):
        what = f"{config} is not JSON"
    raise Refusal("--model", what, "give the folder of a model, or leave the flag out for the bundled one")


def _check_parts(folder: Path, stored: dict) -> None:
    """Raises Refusal unless the config is of a model that can be sampled, and all its weights are there."""
    if {"dit_high", "dit_low"} & stored.keys():
        what = f"{folder} holds one or both of two experts, which cannot be sampled yet"
        raise Refusal("--model", what, "give a model with one transformer")
    if absent := [name for name in WEIGHTS if name not in stored]:
        what = f"{folder} has no {' and no '.join(absent)}"
        raise Refusal("--model", what, f"convert {', '.join(WEIGHTS)} of a model into one folder")
    dit, vae, text = (stored[name] for name in WEIGHTS)
    if dit["channels_in"] > dit["channels_out"]:
        what = f"{folder} is Wan's own image-to-video network, which cannot be sampled yet"
        raise Refusal("--model", what, "give a text-to-video model; --keep makes it image-to-video")
    for what, ours, theirs in (
        ("latent channels", dit["channels_out"], vae["latent"]),
        ("wide text states", dit["text_width"], text["width"]),
    ):
        if ours != theirs:
            what = (
                f"{folder} is of two models: its transformer has {ours} {what}, and the other part {theirs}"
            )
            raise Refusal("--model", what, "convert the parts of one model into one folder")
    for name in WEIGHTS:
        if not (folder / name).is_dir() and not (folder / f"{name}.safetensors").is_file():
            what = f"{folder} has no {name}.safetensors and no folder {name}"
            raise Refusal("--model", what, "give a folder with all its files")


def validate(request: Request, model: Defaults) -> Request:
    """The Request completed from the model's settings, its keeps placed. Raises Refusal; changes nothing.

    In this order: values, files (images whole, clips by their header), and that the outputs can be written.
    """
    filled, where = _filled(request, model)
    for name, rule in (RULES | {"size": sides(model.multiple)}).items():
        if wrong := rule(getattr(filled, name)):
            value = getattr(filled, name)
            shown = "x".join(map(str, value)) if isinstance(value, tuple) else plain(value)
            raise Refusal(where[name], f"{shown} {wrong[0]}", wrong[1])
    complete = dataclasses.replace(filled, keeps=placed(filled.keep, filled.latent_frames, filled.fps))
    if complete.schedule.endswith(".json"):
        try:
            zoo.levels(complete.schedule, (), complete.strength)
        except ValueError as wrong:
            raise Refusal("--schedule", str(wrong)) from wrong
    if not complete.explain:
        _check_outputs(complete)
    return complete


def _filled(request: Request, model: Defaults) -> tuple[Request, dict[str, str]]:
    """The Request without a None, and for each setting what to call it in a refusal."""
    if request.keep and request.prompt is None:
        # The model's example tells of a video of its own, not of what was given.
        request = dataclasses.replace(request, prompt="")
    if strange := sorted(set(model.sampling) - set(SAMPLING)):
        right = f"it may hold {', '.join(SAMPLING)}"
        raise Refusal(model.config, f"'sampling' holds {plain(strange[0])}", right)
    values, where = {}, {"seed": "--seed", "schedule": "--schedule", "rescale": "--rescale"}
    where |= {name: f"--{name.replace('_', '-')}" for name in HISTORY}
    for name in SAMPLING:
        where[name] = f"--{name}"
        if getattr(request, name) is None:
            where[name] = f"{model.config}: sampling.{name}"
            if name not in model.sampling:
                raise Refusal(where[name], "is missing", "add it there")
            value = model.sampling[name]
            values[name] = tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(request, **values), where


def _check_outputs(request: Request) -> None:
    if request.out.suffix.lower() not in (".mp4", ".gif"):
        raise Refusal("--out", f"{request.out} ends in neither .mp4 nor .gif", "give such a name")
    if request.out.suffix.lower() == ".gif" and request.fps > 50:
        raise Refusal("--out", f"a GIF has at most 50 frames a second, not {request.fps:g}", "give an .mp4")
    inputs = set() if request.decode else {os.path.realpath(keep.path) for keep in request.keeps}
    made = () if request.decode else (request.latents,)
    for path in (*request.outputs, *made):
        if os.path.realpath(path) in inputs:
            raise Refusal("--out", f"{path} would replace a file that is kept", "give another name")
        check_output(path, "--out", request.overwrite or request.out == OUT)
