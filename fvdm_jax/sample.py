"""Samples a video: from a prompt, from pictures and clips that are kept, or from both."""

import json
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import fvdm_jax
from fvdm_jax.program import leave, outputs, run
from fvdm_jax.progress import Stages
from fvdm_jax.request import Request, explain, parse, picture

LONG = 1e13
"""Operations of the whole run from which on its steps are reported one by one."""


def main(argv: list[str]) -> None:
    """Samples what `argv` asks for and writes the video, its contact sheet and its settings."""
    request = parse(argv)
    print(picture(request.strength))
    for note in filter(None, (keep.note for keep in request.keeps)):
        print(note)
    if not any(request.strength):
        print("note: every frame is kept, and nothing is left to generate")
    if request.explain:
        print(explain(_schedule(request)))
        return
    with outputs(*request.outputs) as drafts, Stages() as stages:
        pixels, device = generate(request, stages)
        with stages("write"):
            _write(request, drafts, pixels)
        record = request.settings | {"seconds": stages.seconds, "device": device, "versions": _versions()}
        drafts[2].write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print("wrote", *request.outputs)


def generate(request: Request, stages: Stages):
    """The pixels, uint8 [t H W 3], that a validated Request asks for, and the kind of device used."""
    with stages("load"):
        import jax

        from fvdm_jax import checkpoint, tasks, video

        _keep_compiled_programs()
        networks, params = checkpoint.load(request.model)
        params = jax.device_put(params)
    height, width = (side // networks.vae.spatial for side in request.size)
    shape = (1, request.latent_frames, height, width, networks.vae.latent)

    tokens = _tokens(request, networks.text.length)
    prompts = tuple(_call(stages, "text", networks.read, params, *tokens)[:, None])
    task, encoders = tasks.text_to_video(shape), {}
    for keep in request.keeps:
        with stages("read"):
            clip = video.to_unit(video.read(keep.path, keep.frames, request.size, keep.skip))[None]
        if keep.frames not in encoders:
            encoders[keep.frames] = _compiled(stages, networks.encode, params, clip)
        latents = _run(stages, "encode", encoders[keep.frames], params, clip)
        task = task.keep(latents, keep.first, keep.strength)

    noise = jax.random.normal(_key(request.seed), shape)
    inputs = (prompts, request.guidance, noise, task.canvas, _schedule(request))
    program, steps = _denoiser(request, networks, params, stages)
    if steps:
        stages.expect("denoise", steps)
    latents = _call(stages, "denoise", program, params, *inputs)
    decoded = _call(stages, "decode", networks.decode, params, latents)
    return video.to_pixels(decoded)[0], jax.devices()[0].device_kind


def _schedule(request: Request):
    import numpy as np

    from fvdm_jax.schedule import SPACINGS, schedule

    strength = np.array(request.strength, np.float32)
    return schedule(SPACINGS[request.spacing](request.steps, request.shift), strength)


def _tokens(request: Request, length: int):
    """Tokens and mask, each [2 length], of the prompt and of the negative prompt."""
    from fvdm_jax.models.tokenizer import byte_length, byte_tokens

    for flag, prompt in (("--prompt", request.prompt), ("--negative", request.negative)):
        if byte_length(prompt) > length:
            print(f"note: {flag} is cut to the {length - 1} bytes that the model reads", file=sys.stderr)
    return byte_tokens([request.prompt, request.negative], length)


def _denoiser(request: Request, networks, params: dict, stages: Stages):
    """The whole of denoising as one function of arrays, and its steps if it reports them to `stages`."""
    import jax

    from fvdm_jax.guidance import guided
    from fvdm_jax.models.dit import PATCH
    from fvdm_jax.process import PROCESSES
    from fvdm_jax.samplers import SAMPLERS, sample

    process, sampler = PROCESSES[request.process], SAMPLERS[request.solver]
    alone = request.guidance == 1 or request.prompt == request.negative
    height, width = (side // networks.vae.spatial // PATCH for side in request.size)
    tokens = request.latent_frames * height * width * request.steps * (1 if alone else 2)
    # A program that reports its steps cannot be kept in the compilation cache, so short ones do not.
    watched = 2.0 * sum(leaf.size for leaf in jax.tree.leaves(params["dit"])) * tokens > LONG

    def program(params, prompts, scale, noise, canvas, rows):
        text, negative = prompts
        denoise = guided(
            process, partial(networks.velocity, params), text, None if alone else negative, scale
        )

        def reporting(x, level):
            jax.debug.callback(stages.step)
            return denoise(x, level)

        return sample(process, reporting if watched else denoise, sampler, noise, canvas, rows)

    return program, request.steps if watched else None


def _key(seed: int):
    """jax.random.key of a seed of 64 bits, of which jax by itself takes 32."""
    import jax
    import numpy as np

    return jax.random.wrap_key_data(np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32))


def _call(stages: Stages, stage: str, function: Callable, *inputs):
    """function(*inputs) on the device, its compilation and its run timed apart."""
    return _run(stages, stage, _compiled(stages, function, *inputs), *inputs)


def _compiled(stages: Stages, function: Callable, *inputs):
    """The function compiled for inputs of these shapes."""
    import jax

    with stages("compile"):
        return jax.jit(function).lower(*inputs).compile()


def _run(stages: Stages, stage: str, program: Callable, *inputs):
    """program(*inputs), when it is there."""
    import jax

    with stages(stage):
        result = jax.block_until_ready(program(*inputs))
        jax.effects_barrier()
        return result


def _keep_compiled_programs() -> None:
    """Compiled programs go to the user's cache, so that a second run starts at once."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        try:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        except RuntimeError:
            return  # A user without a home has no cache.
        jax.config.update("jax_compilation_cache_dir", str(cache / "fvdm_jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _write(request: Request, drafts: tuple[Path, ...], pixels) -> None:
    from fvdm_jax import video

    comment = json.dumps(request.settings, ensure_ascii=False)
    write = video.write_gif if request.out.suffix.lower() == ".gif" else video.write_mp4
    write(drafts[0], pixels, request.fps, comment)
    video.contact_sheet(pixels, strength=request.strength).save(drafts[1])


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("jax", "jaxlib", "flax", "numpy", "av")
    ours = {"fvdm_jax": fvdm_jax.__version__, "python": platform.python_version()}
    return ours | {name: version(name) for name in packages}


def cli() -> None:
    """The program, as `python -m fvdm_jax.sample` and as `fvdm-sample`."""
    leave(run(main))


if __name__ == "__main__":
    cli()
