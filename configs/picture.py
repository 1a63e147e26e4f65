"""The moving picture of README.md: a clip that becomes clean frame by frame, from a first picture to a last.

    python configs/picture.py           # a minute on two cores; replaces fvdm_jax/assets/idea.gif

Every picture is a step: above, what the running latents of each latent frame show; below, its noise level.
The two pictures that are given are of a clip that the bundled model was never trained on.
"""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fvdm_jax import checkpoint, guidance, process, samplers, schedule, tasks, video, zoo  # noqa: E402
from fvdm_jax.data import source  # noqa: E402
from fvdm_jax.flags import TINY  # noqa: E402
from fvdm_jax.models.tokenizer import byte_tokenizer  # noqa: E402

OUT = TINY.parent / "idea.gif"
STEPS, SEED, CLIP, SIDE, BAR, GAP = 9, 77, 3, 52, 26, 3


def main() -> None:
    """Makes the picture."""
    scene = source.scenes(SEED, range(CLIP, CLIP + 1))
    true, caption = source.moving_shapes(scene, 33, 64, 64), source.caption(scene, 0)
    networks, params = checkpoint.load(TINY)
    tokens, mask = byte_tokenizer([caption, ""], networks.text.length)
    text, nothing = networks.read(params, tokens, mask)[:, None]
    denoise = guidance.guided(process.flow, partial(networks.velocity, params), text, nothing, 3.0)
    first, last = (networks.encode(params, true[:, k : k + 1]) for k in (0, 32))
    noise = jax.random.normal(jax.random.key(1), (1, 9, *first.shape[2:]))
    task = tasks.start_end(noise.shape, first, last)
    levels = zoo.levels("trapezoid:lag=2", schedule.sigmas(STEPS, 3.0), np.asarray(task.strength))
    advance = jax.jit(partial(samplers.advance, process.flow, denoise, samplers.unipc))
    decode = jax.jit(partial(networks.decode, params))
    carry = samplers.begin(process.flow, samplers.unipc, noise, task.canvas, jnp.asarray(levels))
    drawn = [drawing(decode(carry[0]), levels[0])]
    for pair in zip(levels[:-1], levels[1:], strict=True):
        carry = advance(carry, jnp.stack(pair))
        drawn.append(drawing(decode(carry[0]), pair[1]))
    print(caption)
    write(drawn)


def drawing(pixels, levels: np.ndarray) -> np.ndarray:
    """One picture for each latent frame of the clip [1 t H W 3], above its level, uint8 [h w 3]."""
    shown = video.to_pixels(np.asarray(pixels))[0, :: video.STRIDE]
    columns = []
    for picture, level in zip(shown, levels, strict=True):
        column = np.full((SIDE + GAP + BAR, SIDE + GAP, 3), 24, np.uint8)
        column[:SIDE, :SIDE] = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        column[SIDE + GAP :, :SIDE] = 63
        top = SIDE + GAP + round(BAR * (1 - float(level)))
        column[top:, :SIDE] = 214
        if level == 0:
            column[-4:, :SIDE] = (245, 178, 66)
        columns.append(column)
    return np.concatenate(columns, axis=1)


def write(drawn: list[np.ndarray]) -> None:
    """Three pictures a second, and a while at the end."""
    sample = Image.fromarray(np.concatenate(drawn[:: max(1, len(drawn) // 4)]))
    palette = sample.quantize(48, Image.Quantize.MEDIANCUT)
    frames = [Image.fromarray(one).quantize(palette=palette, dither=Image.Dither.NONE) for one in drawn]
    times = [300] * (len(frames) - 1) + [2500]
    frames[0].save(OUT, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)
    print("wrote", OUT, f"{OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
