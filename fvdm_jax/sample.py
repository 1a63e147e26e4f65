"""Samples a video: from a prompt, from pictures and clips that are kept, or from both."""

import shlex
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from fvdm_jax import latents, machine, zoo
from fvdm_jax.explain import explain, picture
from fvdm_jax.program import Refusal, leave, legible, outputs, run
from fvdm_jax.progress import Stages
from fvdm_jax.request import Request, parse


def main(argv: list[str]) -> None:
    """Samples what `argv` asks for and writes the video, its contact sheet and its settings."""
    request = parse(argv)
    print(picture(request.strength))
    for note in filter(None, (keep.note for keep in request.keeps if not request.decode)):
        print(note)
    if not any(request.strength):
        print("note: every frame is kept, and nothing is left to generate")
    if request.explain:
        rows = _schedule(request)
        print(explain(rows))
        print("\n{} calls of the network; at most {} frames under way at once".format(*zoo.check(rows)))
        return
    with Stages() as stages:
        if request.decode:
            made = latents.load(request.decode)
        else:
            made = generate(request, stages)
            with stages("write"):
                latents.save(request.latents, made, request.settings)
        try:
            show(request, made, stages)
        except BaseException:
            if not request.decode:
                again = ["python", "-m", "fvdm_jax.sample", "--decode", str(request.latents)]
                again = shlex.join([*again, "--out", str(request.out)])
                print(f"note: what was denoised is safe; to decode it again: {again}", file=sys.stderr)
            raise
    print("wrote", *request.outputs, *(() if request.decode else (request.latents,)))


def generate(request: Request, stages: Stages):
    """The denoised latents, float32 [1 f h w c] on the host, that a validated Request asks for."""
    with stages("load"):
        import jax
        import numpy as np

        from fvdm_jax import checkpoint, lora, sampling, sharding, tasks
        from fvdm_jax.guidance import Generation, Looks, Weights
        from fvdm_jax.kernels.parallel import Attending
        from fvdm_jax.process import PROCESSES
        from fvdm_jax.samplers import SAMPLERS

        machine.keep_compiled_programs()
        machine.keep_memory()
        networks = checkpoint.describe(request.model)
        height, width = (side // networks.vae.spatial for side in request.size)
        shape = (1, request.latent_frames, height, width, networks.vae.latent)
        network = lora.Network(networks.dit, attending=Attending(request.attention))
        looks = Looks(_guided(request), request.history_windows if request.history != 1 else 0)
        over, attention = sampling.mesh(request.mesh, network, shape[1:4], looks.count)
    sizes = ", ".join(f"{name} {size}" for name, size in over.shape.items() if size > 1)
    stages.say(f"attention by {attention}" + (f"; devices: {sizes}" if sizes else ""))
    prompts = _read(request, networks, stages)

    task = tasks.text_to_video(shape)
    for keep, kept in _kept(request, networks, stages):
        task = task.keep(kept, keep.first, keep.strength)
    with stages("load"):
        params = checkpoint.load(request.model, ("dit",))[1]
        params["adapters"] = [
            (checkpoint.load_adapters(Path(folder), params["dit"]), strength)
            for folder, strength in request.lora
        ]
        params = sampling.placed(over, params, networks.dit)
    noise, rows = jax.random.normal(_key(request.seed), shape), _schedule(request)
    weights = Weights(
        request.guidance, request.history, request.history_level, *request.interval, request.rescale
    )
    inputs = (prompts, weights, (noise, task.canvas, rows))
    inputs = jax.device_put(inputs, sharding.replicated(over))
    generation = Generation(network, PROCESSES[request.process], SAMPLERS[request.solver], looks)
    stages.expect("denoise", len(rows) - 1)
    with jax.set_mesh(over):
        made = sampling.programs(generation, over)
        return np.asarray(_denoised(made, stages, params, *inputs))


def _kept(request: Request, networks, stages: Stages) -> Iterator:
    """Each keep of the request with its latents [1 f h w c]."""
    if not request.keeps:
        return
    with stages("load"):
        import jax
        import jax.numpy as jnp

        from fvdm_jax import checkpoint, programs, video
        from fvdm_jax.models.streaming import Stream

        params = jax.device_put(checkpoint.load(request.model, ("vae",))[1]["vae"])
    with stages("compile"):
        compiled = partial(programs.compiled, stages.say)
        encode = Stream(networks.vae, "encode", params, jnp.zeros((1, 1, *request.size, 3)), compiled)
    for keep in request.keeps:
        with stages("read"):
            pixels = video.read(keep.path, keep.frames, request.size, keep.skip, request.fps)
            clip = video.to_unit(pixels)[None]
        with stages("encode"):
            latents = jax.block_until_ready(jnp.concatenate(list(encode(clip)), axis=1))
        yield keep, latents


def show(request: Request, made, stages: Stages) -> None:
    """Decodes latents [1 f h w c] and writes the request's outputs, picture by picture."""
    with stages("load"):
        import jax
        import numpy as np

        from fvdm_jax import checkpoint, video

        machine.keep_compiled_programs()
        networks, params = checkpoint.load(request.model, ("vae",))
    stages.expect("decode", made.shape[1])
    frames, chosen = 1 + (made.shape[1] - 1) * networks.vae.stride, []
    wanted = set(video.shown(frames))

    def seen():
        for index, one in enumerate(pictures(request, networks, params, made, stages)):
            if index in wanted:
                chosen.append(one)
            yield one

    comment = legible(request.settings)
    with outputs(*request.outputs) as drafts:
        with stages("write"):
            if request.out.suffix.lower() == ".gif":
                video.write_gif(drafts[0], np.stack(list(seen())), request.fps, comment)
            else:
                video.write_mp4(drafts[0], seen(), request.fps, comment)
            sheet = video.contact_sheet(np.stack(chosen), strength=request.strength, frames=frames)
            sheet.save(drafts[1])
        device = jax.devices()[0].device_kind
        record = {"latents": str(request.latents), "seconds": stages.seconds, "device": device}
        record = request.settings | record | {"versions": machine.versions()}
        drafts[2].write_text(legible(record) + "\n", "utf-8")


def pictures(request: Request, networks, params: dict, made, stages: Stages) -> Iterator:
    """The pictures, uint8 [H W 3], of latents [1 f h w c], one by one as they are decoded."""
    from fvdm_jax import video
    from fvdm_jax.models.streaming import decode_tiled

    decoder, tiles = _decoder(request, networks.vae, params["vae"], made, stages)
    if tiles is None:
        pieces = decoder(made)
    else:
        pieces = decode_tiled(decoder, made, tiles, networks.vae)
    while True:
        with stages("decode"):
            piece = next(pieces, None)
            if piece is None:
                return
            piece = video.to_pixels(piece)[0]
            stages.step()
        yield from piece


def _decoder(request: Request, config, params: dict, made, stages: Stages):
    """What decodes frames of this size, and the tiles that they are cut into, if they are."""
    import jax
    import jax.numpy as jnp

    from fvdm_jax import programs, sharding
    from fvdm_jax.models.streaming import Stream, Tiles

    height, width, channels = made.shape[2:]
    asked, free = any(request.tiles), 0.9 * machine.free(jax.devices()[0])
    grid = Tiles(*request.tiles) if asked else Tiles(1, 1)
    if not grid.useful(height, width):
        what = f"{grid.rows}x{grid.columns} tiles of {height}x{width} latent pixels would overlap whole"
        raise Refusal("--tiles", what, "give fewer, or leave it out")
    while True:
        over = sharding.across(width) if grid == Tiles(1, 1) else sharding.mesh()
        tile = jnp.zeros((1, 1, *grid.sides(height, width), channels))
        tile = jax.device_put(tile, sharding.spatial(over))
        with stages("compile"):
            placed = jax.device_put(params, sharding.replicated(over))
            decoder = Stream(config, "decode", placed, tile, partial(programs.compiled, stages.say))
            enough = asked or decoder.bytes < free
        if enough or grid.smallest(height, width):
            break
        grid = grid.finer(height, width)
    if grid == Tiles(1, 1):
        return decoder, None
    why = "" if asked else f", since whole ones do not fit in the {free / 2**30:.1f} GiB that are free"
    print(f"note: frames are decoded in {grid.rows}x{grid.columns} blended tiles{why}", file=sys.stderr)
    return decoder, grid


def _schedule(request: Request):
    """The level of every frame at every step."""
    from fvdm_jax.schedule import SPACINGS

    return zoo.levels(
        request.schedule, SPACINGS[request.spacing](request.steps, request.shift), request.strength
    )


def _read(request: Request, networks, stages: Stages):
    """States, each [1 l e], of the prompt and of the negative prompt."""
    from fvdm_jax.prompts import Reader

    reader = Reader(request.model, networks, stages, machine.cache("text"))
    for flag, prompt in (("--prompt", request.prompt), ("--negative", request.negative)):
        if (count := reader.count(prompt)) > reader.length:
            cut = f"{count} tokens and is cut to the model's {reader.length}"
            print(f"note: {flag} has {cut}", file=sys.stderr)
    with stages("text"):
        return tuple(reader.states(text)[None] for text in (request.prompt, request.negative))


def _denoised(made, stages: Stages, params: dict, prompts, scale, start: tuple):
    """The denoised latents, by the Programs of a sampler: a step is one, whatever their number."""
    import jax

    *start, rows = start
    told = _compiled(stages, "prompt", made.told, params, prompts)
    with stages("text"):
        prompt = told(params, prompts)
    carry = made.begin(*start, rows)
    what = f"denoise ({'x'.join(map(str, carry[0].shape[1:4]))})"
    step = _compiled(stages, what, made.advance, params, prompt, scale, carry, rows[:2])
    for s in range(len(rows) - 1):
        with stages("denoise"):
            carry = jax.block_until_ready(step(params, prompt, scale, carry, rows[s : s + 2]))
            stages.step()
    return carry[0]


def _guided(request: Request) -> bool:
    """Whether the network is asked twice at a step."""
    return request.guidance != 1 and request.prompt != request.negative


def _key(seed: int):
    """jax.random.key of a seed of 64 bits, of which jax by itself takes 32."""
    import jax
    import numpy as np

    return jax.random.wrap_key_data(np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32))


def _compiled(stages: Stages, what: str, function: Callable, *inputs):
    """The jitted function compiled for inputs of these shapes, under the name `what`."""
    from fvdm_jax import programs

    with stages("compile"):
        return programs.compiled(stages.say, function.lower(*inputs), what)


def cli() -> None:
    """The program, as `python -m fvdm_jax.sample` and as `fvdm-sample`."""
    leave(run(main))


if __name__ == "__main__":
    cli()
