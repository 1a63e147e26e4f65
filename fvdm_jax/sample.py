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

LONG = 1e14
"""Operations of the whole run from which on its steps are reported one by one."""


def main(argv: list[str]) -> None:
    """Samples what `argv` asks for and writes the video, its contact sheet and its settings."""
    request = parse(argv)
    print(picture(request.strength))
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
        model = checkpoint.load(request.model)
        model = model._replace(params=jax.device_put(model.params))
    vae = model.configs["vae"]
    height, width = (side // vae.spatial for side in request.size)
    shape = (1, request.latent_frames, height, width, vae.latent)

    prompts = _read_prompts(model, request, stages)
    task = tasks.text_to_video(shape)
    for keep in request.keeps:
        with stages("read"):
            clip = video.to_unit(video.read(keep.path, keep.frames, request.size, keep.skip))[None]
        latents = _call(stages, "encode", model.encode, model.params["vae"], clip)
        task = task.keep(latents, keep.first, keep.strength)

    latents = _denoise(model, request, stages, task, prompts)
    decoded = _call(stages, "decode", model.decode, model.params["vae"], latents)
    return video.to_pixels(decoded)[0], jax.devices()[0].device_kind


def _schedule(request: Request):
    import numpy as np

    from fvdm_jax.schedule import SPACINGS, schedule

    strength = np.asarray(request.strength, np.float32)
    return schedule(SPACINGS[request.spacing](request.steps, request.shift), strength)


def _read_prompts(model, request: Request, stages: Stages):
    """States [1 l e] of the prompt and of the negative prompt."""
    from fvdm_jax.models.tokenizer import byte_length, byte_tokens

    length = model.configs["text"].length
    for flag, prompt in (("--prompt", request.prompt), ("--negative", request.negative)):
        if byte_length(prompt) > length:
            print(f"note: {flag} is cut to the {length - 1} bytes that the model reads", file=sys.stderr)
    tokens, mask = byte_tokens([request.prompt, request.negative], length)
    states = _call(stages, "text", model.read, model.params["text"], tokens, mask)
    return states[:1], states[1:]


def _denoise(model, request: Request, stages: Stages, task, prompts):
    import jax
    import jax.numpy as jnp

    from fvdm_jax.guidance import guided
    from fvdm_jax.process import flow
    from fvdm_jax.samplers import SAMPLERS, sample

    network, rows = model.network, _schedule(request)
    calls = (len(rows) - 1) * (1 if request.guidance == 1 else 2)
    tokens = task.canvas.size // task.canvas.shape[-1] // 4
    weights = sum(leaf.size for leaf in jax.tree.leaves(model.params["dit"]))
    # A program that reports its steps cannot be kept in the compilation cache, so short ones do not.
    watched = 2.0 * weights * tokens * calls > LONG

    def program(params, prompts, scale, noise, canvas, rows):
        text, negative = prompts
        apply = partial(network, params)
        denoise = guided(flow, apply, text, None if request.guidance == 1 else negative, scale)

        def reporting(x, level):
            jax.debug.callback(stages.step)
            return denoise(x, level)

        return sample(flow, reporting if watched else denoise, SAMPLERS[request.solver], noise, canvas, rows)

    noise = jax.random.normal(_key(request.seed), task.canvas.shape)
    inputs = (prompts, jnp.float32(request.guidance), noise, task.canvas, rows)
    if watched:
        stages.expect("denoise", len(rows) - 1)
    return _call(stages, "denoise", program, model.params["dit"], *inputs)


def _key(seed: int):
    """jax.random.key of a seed of 64 bits, of which jax by itself takes 32."""
    import jax
    import numpy as np

    return jax.random.wrap_key_data(np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32))


def _call(stages: Stages, stage: str, function: Callable, *inputs):
    """function(*inputs) on the device, its compilation and its run timed apart."""
    import jax

    with stages("compile"):
        program = jax.jit(function).lower(*inputs).compile()
    with stages(stage):
        return jax.block_until_ready(program(*inputs))


def _keep_compiled_programs() -> None:
    """Compiled programs go to the user's cache, so that a second run starts at once."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
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
