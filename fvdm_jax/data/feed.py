"""What a run is fed with: batches of encoded clips from a folder of records, or made up."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from fvdm_jax.data.pipeline import Batch, Batches
from fvdm_jax.data.records import Manifest, Record, array
from fvdm_jax.program import Refusal

NOTHING = "null.safetensors"
"""The file of a folder of records that holds the states of the empty prompt."""


class Sizes(NamedTuple):
    """Of a batch: clips over all processes, channels of latents, width and length of text states."""

    batch: int
    channels: int
    width: int
    length: int


class Feed(NamedTuple):
    """Where a run's clips come from.

    `stream(start)` yields this process's rows of batch start, start + 1, …; `nothing` [l e] are the states
    of the empty prompt; `held` are clips that are not trained on; `sizes` are those of clips, (f, h, w), the
    largest first; `told` describes the whole in a table; `bad` names the records found bad so far, and why,
    of `count` that there are.
    """

    stream: object
    nothing: np.ndarray
    held: list[Record]
    sizes: list[tuple[int, int, int]]
    told: str
    bad: dict[str, str]
    count: int


def recorded(folder: str, sizes: Sizes, seed: int, held_out: int, process: tuple[int, int]) -> Feed:
    """The feed of a folder of records. Raises Refusal where it is none, or not for such a network.

    Where the folder does not say what the empty prompt's states are, `nothing` is zeros, and `told` says so.
    """
    batches = Batches(folder, sizes.batch, seed, held_out, process)
    header = batches.manifest.header
    if (header.channels, header.text_width) != (sizes.channels, sizes.width):
        what = f"holds {header.channels} channels and text {header.text_width} wide"
        right = f"the network takes {sizes.channels} and {sizes.width}: encode the clips with its own model"
        raise Refusal(folder, what, right)
    found = [record for records in batches.held_out().values() for record in records]
    told, nothing = batches.describe(), np.zeros((0, header.text_width), np.float32)
    if NOTHING in batches.manifest.folder.sizes():
        nothing = _nothing(batches.manifest)
    else:
        told += f"\nnote: without {NOTHING} a caption that is dropped is all zeros"
    nothing = _padded(nothing, header.text_length)
    clips = {*batches.buckets, *(record.latents.shape[:3] for record in found)}
    largest_first = sorted(clips, key=np.prod, reverse=True)
    count = len(batches.manifest.entries)
    return Feed(batches.stream, nothing, found, largest_first, told, batches.bad, count)


def invented(
    clip: tuple[int, int, int], sizes: Sizes, seed: int, held_out: int, process: tuple[int, int]
) -> Feed:
    """A feed of noise, the same for any number of processes."""
    rows = slice(process[0] * sizes.batch // process[1], (process[0] + 1) * sizes.batch // process[1])

    def clips(key: tuple[int, ...], count: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(key)
        shapes = (count, *clip, sizes.channels), (count, sizes.length, sizes.width)
        latents, states = (rng.standard_normal(shape, np.float32) for shape in shapes)
        return latents, states

    def stream(start: int = 0, workers: int = 0) -> Iterator[Batch]:
        names = tuple(f"noise {row}" for row in range(sizes.batch))
        for step in range(start, 2**31):
            latents, states = clips((seed, 1, step), sizes.batch)
            yield Batch(latents[rows], states[rows], names[rows], {})

    pairs = zip(*clips((seed, 0), held_out), strict=True)
    held = [Record(f"held {i}", "", *pair) for i, pair in enumerate(pairs)]
    nothing = np.zeros((sizes.length, sizes.width), np.float32)
    return Feed(stream, nothing, held, [clip], "made up: noise, and prompts of noise", {}, held_out + 1)


def gathered(records: list[Record], length: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of the records of each size the latents [n f h w c] and states [n l e], float32."""
    sizes: dict[tuple, list[Record]] = {}
    for record in records:
        sizes.setdefault(record.latents.shape, []).append(record)
    return [
        (
            np.stack([record.latents.astype(np.float32) for record in alike]),
            np.stack([_padded(record.states, length) for record in alike]),
        )
        for alike in sizes.values()
    ]


def _nothing(manifest: Manifest) -> np.ndarray:
    from safetensors import SafetensorError, deserialize

    try:
        return array(dict(deserialize(manifest.folder.read(NOTHING)))["states"])
    except (OSError, SafetensorError, KeyError) as broken:
        what = f"{NOTHING}, the states of the empty prompt, cannot be read ({broken})"
        raise Refusal(manifest.folder.where, what, "run python -m fvdm_jax.data.precompute again") from broken


def _padded(states: np.ndarray, length: int) -> np.ndarray:
    return np.pad(states.astype(np.float32), ((0, length - len(states)), (0, 0)))
