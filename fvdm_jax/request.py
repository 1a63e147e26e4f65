"""What a user asks of `python -m fvdm_jax.sample`: checked and completed."""

import dataclasses
import json
import math
import os
from pathlib import Path

from fvdm_jax import prompt_files, zoo
from fvdm_jax.defaults import OPTIONAL, PATCH, SAMPLING, Defaults, stamps
from fvdm_jax.flags import OUT, TINY, no_adapters
from fvdm_jax.keeps import Keep, latent, placed, total
from fvdm_jax.latents import SUFFIX, noise
from fvdm_jax.presets import PRESETS
from fvdm_jax.program import Refusal, check_output, plain
from fvdm_jax.rules import RULES, obey, sides
from fvdm_jax.video import STRIDE

FLAGS = ("seed", "rescale", "history", "history_level", "history_windows", "length", "overlap", "anchors",
         "context_noise", "cache")  # fmt: skip
"""The settings that no model has of its own."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A video to be sampled; None: as the model has it. Complete, with its `keeps`, once `validate` made it.

    frames are pixel frames, size is (H, W) in pixels, keep holds FRAME=FILE[:STRENGTH] as given. With
    `decode`, a file of latents, it is the request that made them. `tiles` (0, 0): as memory asks for.
    `guidance` may be two numbers, of the experts of high and of low noise, which meet at the level
    `boundary`; `lora` are folder, strength and the expert that it is for, "" for each. With `length`, in
    seconds, the video is made of windows of `frames`, of which each keeps `overlap` latent frames of the one
    before, 0: a third, and the first `anchors` of the video; `segments` are the windows' prompts, the last
    for all that follow. `context_noise` may be two numbers, a scale and a power. `files`: name, size and time
    of what it follows from. `beside`: the network has pictures beside the video, and makes all of its frames.
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
    guidance: float | tuple[float, float] | None = None
    boundary: float | None = None
    schedule: str | None = None
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
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    history: float = 1.0
    history_level: float = 0.0
    history_windows: int = 1
    context_noise: float | tuple[float, float] = 0.0
    cache: float = 0.0
    lora: tuple[tuple[str, float | None, str], ...] = ()
    preset: str = ""
    prompts: Path | None = None
    length: float | None = None
    overlap: int = 0
    anchors: int = 0
    still: bool = False
    noise_file: Path | None = None
    segments: tuple[str, ...] = ()
    keeps: tuple[Keep, ...] = ()
    files: tuple[tuple[str, int, int], ...] = ()
    beside: bool = False

    @property
    def latent_frames(self) -> int:
        """Latent frames of the video, or of each window of a long one."""
        return latent(self.frames)

    @property
    def total(self) -> int:
        """Latent frames of the whole video."""
        return total(self.frames, self.length, self.fps)

    def shape(self, model: Defaults) -> tuple[int, ...]:
        """The shape of the latents of the video, or of each window of a long one, [1 f h w c]."""
        spatial = model.multiple // PATCH
        return 1, self.latent_frames, *(side // spatial for side in self.size), model.channels

    @property
    def rolls(self) -> bool:
        """Whether a long video is made by a queue, and not in windows."""
        return self.length is not None and self.schedule.partition(":")[0] == "rolling"

    @property
    def guides(self) -> bool:
        """Whether a weight of guidance is asked for."""
        return self.guidance not in (1, (1, 1))

    @property
    def guided(self) -> bool:
        """Whether the network is asked of the prompt and of the negative one."""
        told = self.segments or (self.prompt,)
        return self.guides and any(prompt != self.negative for prompt in told)

    @property
    def given(self) -> int:
        """How many latent frames are kept as they are."""
        return self.strength.count(0.0)

    @property
    def new(self) -> int:
        """Latent frames of a window that those before it have not."""
        return self.latent_frames - self.overlap - self.anchors

    @property
    def windows(self) -> int:
        """How many windows a long video has."""
        return 1 + -(-(self.total - self.latent_frames) // self.new)

    @property
    def strength(self) -> list[float]:
        """For every latent frame how much of the path it takes part in: 0 kept … 1 generated."""
        return self._each("strength")

    @property
    def sampled(self) -> list[float]:
        """The same as the sampler has it, which knows nothing of pictures beside the video."""
        return [1.0] * self.total if self.beside else self.strength

    @property
    def settled(self) -> list[float]:
        """The same at the last step; `sampled` is that at the first."""
        return self.sampled if self.beside else self._each("settled")

    def _each(self, name: str) -> list[float]:
        values = [1.0] * self.total
        for keep in self.keeps:
            values[keep.first : keep.first + keep.count] = [getattr(keep, name)] * keep.count
        return values

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
        files = {name: stamp for name, *stamp in self.files}
        settings = dataclasses.asdict(self) | {"strength": self.strength, "files": files}
        for name in ("debug", "explain", "overwrite", "decode", "keeps", "beside"):
            del settings[name]
        return json.loads(json.dumps(settings | {"model": os.path.abspath(self.model)}, default=str))


def _read(request: Request) -> list[Path]:
    """The files and folders, beside the model's, that the video follows from."""
    adapters = (Path(folder) / "adapters" for folder, *_ in request.lora)
    read = [*(keep.path for keep in request.keeps), *adapters]
    read += [request.noise_file] if request.noise_file else []
    return read + ([Path(request.schedule)] if request.schedule.endswith(".json") else [])


def validate(request: Request, model: Defaults, outputs: bool = True, base: bool = False) -> Request:
    """The Request completed from preset and model, its keeps placed. Raises Refusal; changes nothing.

    In this order: values, files (images whole, clips by their header), and that the `outputs` can be written.
    What is read is stamped then, as `files`.
    A `base` is of others, which have pictures of their own.
    """
    request, kept = _preset(request, model)
    filled, where = _filled(request, model)
    for name, rule in (RULES | {"size": sides(model.multiple)}).items():
        if name in where:
            obey(where[name], getattr(filled, name), rule)
    _check_experts(filled, model, where["guidance"])
    keeps = placed(filled.keep, filled.latent_frames, filled.fps, kept)
    complete = dataclasses.replace(filled, keeps=keeps, beside=bool(model.pictures))
    if complete.schedule.endswith(".json"):
        if complete.sampled != complete.settled:
            what = "a strength that changes is of named schedules, and this one is a file's"
            raise Refusal("--keep", what, "give one strength, or write it into the file")
        try:
            zoo.levels(complete.schedule, (), complete.sampled[: complete.latent_frames])
        except ValueError as wrong:
            raise Refusal(where["schedule"], str(wrong)) from wrong
    several = complete.prompts is not None and complete.length is None
    if not (base or several):
        _check_pictures(complete, model)
    complete = _windows(complete, model)
    if complete.noise_file:
        if complete.length is not None:
            raise Refusal("--noise-file", "is of one window", "leave out --length")
        noise(complete.noise_file, complete.shape(model))
    if outputs and not complete.explain and not several:
        check_outputs(complete)
    return dataclasses.replace(complete, files=stamps(_read(complete)) + model.files)


def _preset(request: Request, model: Defaults) -> tuple[Request, float]:
    """The Request with what its preset sets and no flag says, and the strength of a keep that states none."""
    preset = dict(PRESETS[request.preset]) if request.preset else {}
    strengths, kept = preset.pop("strengths", ()), preset.pop("kept", 0.0)
    if len(model.transformers) == 1:
        preset.pop("boundary", None)
    values = {name: value for name, value in preset.items() if getattr(request, name) is None}
    lora = []
    for folder, strength, expert in request.lora:
        # One of both experts comes after those of either.
        each = [expert] if expert else ["high", "low"]
        before = max(sum(other in ("", one) for *_, other in lora) for one in each)
        usual = strengths[before] if before < len(strengths) else 1.0
        lora.append((folder, usual if strength is None else strength, expert))
    # Wan's own I2V networks take pictures as they are.
    return dataclasses.replace(request, **values, lora=tuple(lora)), 0.0 if model.pictures else kept


def _filled(request: Request, model: Defaults) -> tuple[Request, dict[str, str]]:
    """The Request without a None, and for each setting what to call it in a refusal."""
    if request.keep and request.prompt is None:
        # The model's example tells of a video of its own, not of what was given.
        request = dataclasses.replace(request, prompt="")
    values, where = {}, {name: f"--{name.replace('_', '-')}" for name in FLAGS}
    if request.length is None:
        del where["length"]
    for name in (*SAMPLING, *OPTIONAL):
        where[name] = f"--{name}"
        if getattr(request, name) is None:
            where[name] = f"{model.config}: sampling.{name}"
            if name not in model.sampling:
                raise Refusal(where[name], "is missing", "add it there")
            value = model.sampling[name]
            values[name] = tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(request, **values), where


def _check_experts(request: Request, model: Defaults, guidance: str) -> None:
    """Raises Refusal where something is asked of an expert, and the model has none."""
    if odd := [expert for *_, expert in request.lora if expert not in ("", "high", "low")]:
        raise Refusal("--lora", f"{plain(odd[0])!r} is no expert", "give high, low, or none for both")
    for folder, *_ in request.lora:
        if wrong := no_adapters(folder):
            raise Refusal("--lora", *wrong)
    if len(model.transformers) > 1:
        return
    if isinstance(request.guidance, tuple):
        what = f"{','.join(map(str, request.guidance))} is of two experts, and the model has one transformer"
        raise Refusal(guidance, what, "give one number")
    if named := [folder for folder, _, expert in request.lora if expert]:
        what = f"{plain(named[0])} is for one of two experts, and the model has one transformer"
        raise Refusal("--lora", what, "leave out high= or low=")


def _check_pictures(request: Request, model: Defaults) -> None:
    """Raises Refusal unless Wan's own I2V networks, which take no strength, have the pictures they need."""
    if not model.pictures:
        return
    needed = {0, *([request.latent_frames - 1] if model.pictures == 2 else [])}
    held = {frame for keep in request.keeps for frame in (keep.first, keep.first + keep.count - 1)}
    if absent := needed - held:
        place = "last" if min(absent) else "0"
        what = f"{place}=FILE is missing: {model.config.parent} makes a video of given pictures"
        raise Refusal("--keep", what, "give the first one" + " and the last" * (model.pictures == 2))
    if any(keep.strength for keep in request.keeps):
        what = f"has a strength, and {model.config.parent} takes pictures as they are"
        raise Refusal("--keep", what, "leave the strength out")
    for name, idle in (("still", False), ("history", 1.0), ("context_noise", 0.0)):
        if getattr(request, name) != idle:
            what = (
                f"has no effect: {model.config.parent} takes pictures beside the video, not as frames of it"
            )
            raise Refusal(f"--{name.replace('_', '-')}", what, "leave it out")


def _windows(request: Request, model: Defaults) -> Request:
    """The Request with the overlap that a long video's windows have.

    Raises Refusal where there can be no such windows.
    """
    if request.length is None:
        if request.overlap or request.anchors:
            raise Refusal("--overlap, --anchors", "are of long videos", "give --length with them")
        return request
    window, queue = request.latent_frames, request.rolls
    for wrong, what, right in (
        (model.pictures, f"cannot be of {model.config.parent}, which begins with a picture", "give another"),
        (request.rolls and request.schedule != "rolling", "by a queue takes no option, but --overlap",
         "give --schedule rolling"),
        (any(map(bool, request.tiles)), "is not decoded in tiles", "leave --tiles out"),
        (any(keep.first + keep.count == window for keep in request.keeps), "has no last frame to be kept",
         "keep frames of its beginning"),
        (queue and request.cache, "by a queue spares no steps", "leave --cache out"),
        (queue and len(model.transformers) > 1, "by a queue is not for two experts",
         "give another --schedule"),
        (queue and (request.anchors or request.prompts), "by a queue has no anchors, and one prompt",
         "give another --schedule"),
        (queue and [request.strength, request.settled] != [sorted(map(math.ceil, request.strength))] * 2,
         "by a queue keeps its first frames alone, and whole", "give 0=FILE:0, or another --schedule"),
    ):  # fmt: skip
        if wrong:
            raise Refusal("--length", what, right)
    if request.total < window:
        seconds = f"{(1 + STRIDE * (window - 1)) / request.fps:.3g} seconds"
        what = f"{request.length:g} is less than a window of {request.frames} frames, {seconds}"
        raise Refusal("--length", what, "give more, or fewer --frames")
    overlap = request.overlap or max(1, window // 3)
    if not overlap + request.anchors < window:
        what = f"{overlap} and {request.anchors} leave nothing of a window of {window} latent frames"
        raise Refusal("--overlap, --anchors", what, f"together at most {window - 1}")
    told = prompt_files.read(request.prompts) if request.prompts else [prompt_files.Line(request.prompt)]
    if any(line != prompt_files.Line(line.prompt) or line.prompt is None for line in told):
        what = "says more of a window than its prompt, or not that"
        raise Refusal(f"--prompts {request.prompts}", what, "give negative, seed and keep as flags")
    segments = tuple(line.prompt for line in told)
    request = dataclasses.replace(request, overlap=overlap, segments=segments)
    if len(told) > request.windows:
        what = f"has {len(told)} lines, and the video {request.windows} windows"
        raise Refusal(f"--prompts {request.prompts}", what, "make it longer, or tell less")
    return request


def check_outputs(request: Request) -> None:
    """Raises Refusal where the outputs cannot be written, or would replace what is not to be replaced."""
    if request.out.suffix.lower() not in (".mp4", ".gif"):
        raise Refusal("--out", f"{request.out} ends in neither .mp4 nor .gif", "give such a name")
    if request.out.suffix.lower() == ".gif" and request.fps > 50:
        raise Refusal("--out", f"a GIF has at most 50 frames a second, not {request.fps:g}", "give an .mp4")
    read = [request.prompts, request.noise_file, *(keep.path for keep in request.keeps)]
    read += [request.schedule] if request.schedule.endswith(".json") else []
    inputs = set() if request.decode else {os.path.realpath(path) for path in read if path}
    made = () if request.decode else (request.latents,)
    for path in (*request.outputs, *made):
        if os.path.exists(path) and os.path.realpath(path) in inputs:
            raise Refusal("--out", f"{path} would replace a file that is read", "give another name")
        check_output(path, "--out", request.overwrite or request.out == OUT)
