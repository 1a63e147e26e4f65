"""What Pusa's own program has encoded for training (train/NAME.tensors.pth), into records."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from einops import rearrange

from fvdm_jax.data.captions import table
from fvdm_jax.data.folder import digest
from fvdm_jax.data.records import Header, Record, Writer
from fvdm_jax.program import Refusal, plain
from fvdm_jax.progress import Stages
from fvdm_jax.prompts import trimmed

from . import torch_file
from .sources import ENCODED
from .tensors import Tensor
from .write import Progress

FPS = 16.0
"""Pusa takes frames as they come; Wan, whose clips it trains on, makes 16 a second."""

LATENTS, STATES = "latents", "prompt_emb/context"


class Cache(NamedTuple):
    """An encoded clip: its caption, latents [c f h w] and padded text states [1 l e]."""

    path: Path
    caption: str
    latents: Tensor
    states: Tensor


def find(folder: Path) -> list[Cache]:
    """All of a folder's, read no further than their headers.

    Raises Refusal unless they are exactly those that metadata.csv names (Pusa itself leaves out in silence
    what is not there), and of one size of latents' channels and of text.
    """
    captions, train = {}, folder / "train"
    for file, caption in table(folder / "metadata.csv").items():
        inside = file if file.is_relative_to(train) else train / file.relative_to(folder)
        captions[Path(f"{inside}{ENCODED}")] = caption
    there = set(train.rglob(f"*{ENCODED}"))
    for odd, what in (
        (sorted(captions.keys() - there), "of metadata.csv have not been encoded"),
        (sorted(there - captions.keys()), "are not in metadata.csv"),
    ):
        if odd:
            what = f"{len(odd):,} of {len(captions.keys() | there):,} clips {what}, this one first"
            raise Refusal(plain(odd[0], 200), what, "take them out, or put them in")
    caches = [_cache(path, captions[path]) for path in sorted(there)]
    for cache in caches:
        sizes = [(c.latents.shape[0], *c.states.shape[1:]) for c in (cache, caches[0])]
        if sizes[0] != sizes[1]:
            what = f"has {sizes[0]} channels, text length and width, and {plain(caches[0].path)} {sizes[1]}"
            raise Refusal(cache.path, what, "import clips of one model at a time")
    return caches


def _cache(path: Path, caption: str) -> Cache:
    found = torch_file.read_grouped(path)
    shapes = [found[key].shape if key in found else () for key in (LATENTS, STATES)]
    if len(shapes[0]) != 4 or len(shapes[1]) != 3 or shapes[1][0] != 1:
        what = f"has {LATENTS} of shape {shapes[0]} and {STATES} of shape {shapes[1]}"
        raise Refusal(path, what, "[c, f, h, w] and [1, length, width] are right")
    return Cache(path, caption, found[LATENTS], found[STATES])


def write(out: Path, caches: list[Cache], model: Path | None, progress: Progress) -> int:
    """Adds to the records of a folder what it does not have yet; how many that were.

    A `model`, whose networks have encoded the clips, is asked what it makes of the empty prompt. Raises
    Refusal where it is another one, and for clips of bad values.
    """
    channels, (length, width) = caches[0].latents.shape[0], caches[0].states.shape[1:]
    header = Header(channels, width, length, FPS, "encoded by Pusa's program", {}, {})
    if model:
        from fvdm_jax.data.encoder import Encoder

        encoder = Encoder(model, 1, "bfloat16", Stages())
        header = encoder.header(FPS)
        if (header.channels, header.text_width, header.text_length) != (channels, width, length):
            what = f"is no model of these clips, of {channels} channels and text {length} long, {width} wide"
            raise Refusal(model, what, "give the one that has encoded them")
    with Writer(out, header) as writer:
        before = len(writer.done)
        keys = {_added(writer, cache, progress) for cache in caches}
        if model:
            encoder.save_nothing(writer.folder)
        names = {_name(cache) for cache in caches}
        if gone := [entry for entry in writer.entries if entry.name in names and entry.key not in keys]:
            writer.supersede(gone)
    return len(writer.done) - before


def _name(cache: Cache) -> str:
    return os.path.abspath(cache.path).removesuffix(ENCODED)


def _added(writer: Writer, cache: Cache, progress: Progress) -> str:
    """Adds a clip that is not there yet; its key."""
    key = hashlib.sha256(f"{digest(cache.path)} {cache.caption}".encode()).hexdigest()
    if key not in writer.done:
        latents = rearrange(cache.latents.read(), "c f h w -> f h w c")
        try:
            states = trimmed(cache.states.read()[0])
            writer.add(Record(_name(cache), cache.caption, latents, states), key)
        except ValueError as wrong:
            raise Refusal(cache.path, str(wrong), "encode the clip again") from wrong
    progress(cache.latents.bytes + cache.states.bytes)
    return key
