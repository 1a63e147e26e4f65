"""The real programs of a task, lowered for a slice, and the record of what they would take."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fvdm_jax import checkpoint, costs, layouts, sampling, sharding, trainer
from fvdm_jax.chips import Slice
from fvdm_jax.config import Training
from fvdm_jax.guidance import Generation, Looks
from fvdm_jax.kernels.parallel import Attending
from fvdm_jax.lora import Network
from fvdm_jax.models import streaming, vae
from fvdm_jax.models.dit import DiTConfig
from fvdm_jax.planning import aot, collectives, estimates, published, roofline
from fvdm_jax.process import PROCESSES
from fvdm_jax.program import Refusal
from fvdm_jax.samplers import SAMPLERS


class Case(NamedTuple):
    """What is planned: a task of TASKS, by a config's settings, for a slice; `steps` are a sampler's."""

    task: str
    settings: Training
    network: DiTConfig
    over: Slice
    steps: int = 50
    guided: bool = True

    @property
    def clip(self) -> tuple[int, int, int]:
        """(f, h, w) in latents."""
        return tuple(map(int, self.settings.clip.split("x")))

    @property
    def batch(self) -> int:
        """Clips that the network sees in a step, or at once."""
        if self.task == "train":
            return self.settings.batch
        return 1 + self.guided if self.task == "sample" else 1

    @property
    def codes(self) -> bool:
        """Whether it is the VAE that works."""
        return self.task in ("decode", "encode")


def layouts_of(case: Case) -> list[dict[str, int]]:
    """The layouts to try: the one that is asked for, or those of the table, the likeliest first.

    Raises ValueError where the one that is asked for, or any, is not possible.
    """
    devices, clip, settings = case.over.devices, case.clip, case.settings
    parts = settings.parts if case.task == "train" else 1
    work = layouts.work(case.network, clip, case.batch, parts)
    if settings.mesh:
        asked = sharding.sizes(settings.mesh, devices)
        if case.codes and (asked["context"] != devices or clip[2] % devices):
            raise ValueError(f"frames of {clip[2]} latent pixels are cut along context, and by nothing else")
        if not case.codes and (wrong := layouts.problem(asked, work)):
            raise ValueError(wrong)
        return [asked]
    if case.codes:
        return [layouts.whole({"context": sharding.parts(clip[2], devices)})]
    found = layouts.candidates(devices, work)
    if not found:
        one = layouts.problem(layouts.whole({"fsdp": devices}), work)
        raise ValueError(f"no layout is possible for {devices} devices: {one}")
    first = layouts.recommended(case.task, case.network, clip, devices, case.batch)
    first = sharding.sizes(first, devices)
    return [first, *(sizes for sizes in found if sizes != first)]


def network(case: Case) -> Network:
    """The network as the task's programs have it. Raises Refusal where it takes more than noisy latents."""
    settings = case.settings
    if case.network.channels_in != case.network.channels_out or case.network.image_width:
        what = "is of Wan's own image-to-video networks, which have inputs beside the noisy latents"
        raise Refusal("--model", what, "plan for a text-to-video network; it learns the other tasks")
    sizes = dataclasses.replace(case.network, dtype=settings.dtype or case.network.dtype)
    return Network(sizes, settings.remat, Attending(settings.attention, settings.exchange))


def check(case: Case, sizes: dict[str, int], devices: list) -> None:
    """Raises Refusal where attention is not to be had as asked for, or not of this network."""
    if case.codes:
        return
    try:
        network(case).attention(sharding.mesh(**sizes, devices=devices), case.clip)
    except ValueError as wrong:
        raise Refusal("--attention, --exchange", str(wrong)) from wrong


def step(case: Case, sizes: dict[str, int]) -> roofline.Step | None:
    """What a step is by its sizes; None of the VAE, for which there is no formula."""
    if case.codes:
        return None
    settings, train = case.settings, case.task == "train"
    network = dataclasses.replace(case.network, dtype=settings.dtype or case.network.dtype)
    own = {"remat": settings.remat, "rank": settings.rank, "where": settings.where, "parts": settings.parts}
    own |= {"masters": jnp.dtype(settings.masters).itemsize}
    return roofline.Step(
        network,
        case.clip,
        sizes,
        case.batch,
        settings.text,
        train,
        asked=settings.exchange,
        **(own if train else {"remat": "none", "passes": case.steps}),
    )


def compiled(case: Case, sizes: dict[str, int], devices: list) -> Iterator[tuple[aot.Compiled, int]]:
    """The programs of a step, or of a clip, over these devices, and how often each runs. Raises TooLarge."""
    settings = case.settings
    if case.codes:
        yield from _coded(case, sharding.mesh(**sizes, devices=devices))
        return
    with aot.fitting():
        if case.task == "train":
            settings = dataclasses.replace(settings, mesh=layouts.text(sizes))
            lowered = trainer.build(settings, case.network, devices).lower(case.clip, settings.text)
            yield aot.read(lowered.compile()), 1
        else:
            sampled = network(case)._replace(remat="none")
            generation = Generation(
                sampled, PROCESSES[settings.process], SAMPLERS["unipc"], Looks(case.guided)
            )
            over = sharding.mesh(**sizes, devices=devices)
            told, advance = sampling.lower(generation, over, case.clip, settings.text)
            yield aot.read(told.compile()), 1
            yield aot.read(advance.compile()), case.steps


def _coded(case: Case, over: jax.sharding.Mesh) -> Iterator[tuple[aot.Compiled, int]]:
    """The first piece of a clip through the VAE, and the others."""
    config, (frames, height, width) = _vae(case), case.clip
    whole = sharding.replicated(over)
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
        nn.meta.unbox(vae.abstract(config)),
    )
    side = 1 if case.task == "decode" else config.spatial
    channels = config.latent if case.task == "decode" else 3
    shape = 1, 1, height * side, width * side, channels
    first = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding.spatial(over))
    with aot.fitting():
        begin, proceed = streaming.Stream(config, case.task, params, first).programs
        yield aot.read(begin), 1
        yield aot.read(proceed), frames - 1


def _vae(case: Case) -> vae.VAEConfig:
    """That of the model, or the published one of latents with so many channels."""
    folder = Path(case.settings.model)
    if folder.is_dir():
        return checkpoint.describe(folder, ("vae",)).vae
    name = "wan_2_2" if case.network.channels_out == 48 else "wan_2_1"
    return dataclasses.replace(vae.SIZES[name], dtype=case.settings.dtype or "bfloat16")


def seconds(case: Case, sized: roofline.Step | None, runs: list, places: list) -> roofline.Seconds:
    """The bound by the chips' peaks for compiled programs, each with how often it runs."""
    chip, share = case.over.chip, case.over.chip.devices
    passes = sum(program.products.passes * times for program, times in runs)
    attended = 0.0
    if sized is not None:
        attended = roofline.attention(sized, chip, split=True) / case.over.chips
        if not any(program.kernels for program, _ in runs):
            passes -= min(passes, roofline.inside(sized) / case.over.devices)
    return roofline.Seconds(
        passes * share / chip.peak,
        attended,
        sum(program.moved * times for program, times in runs) * share / chip.bandwidth,
        sum(roofline.seconds(program.collectives, case.over, places) * times for program, times in runs),
    )


def record(case: Case, sizes: dict[str, int], runs: list, places: list[tuple[int, ...]]) -> dict:
    """What compiled programs, each with how often it runs, would take; bytes and what is sent of a device.

    `places` are the coordinates of the devices' chips.
    """
    sized = step(case, sizes)
    time = seconds(case, sized, runs, places)
    most = max((program.bytes for program, _ in runs), key=lambda sizes: sizes.reserved)
    operations = sum(program.products.operations * times for program, times in runs) * math.prod(
        sizes.values()
    )
    if sized is not None and any(program.kernels for program, _ in runs):
        operations += roofline.inside(sized)
    told = {
        "bytes": most._asdict()
        | {"reserved": most.reserved, "there": case.over.chip.memory / case.over.chip.devices},
        "collectives": _sent(case, runs, places),
        "uncounted_loops": sum(program.uncounted for program, _ in runs),
    }
    return _common(case, sized, sizes, time, operations) | told


def estimated(case: Case, sizes: dict[str, int]) -> dict:
    """The same by formulas alone."""
    sized = step(case, sizes)
    time = estimates.seconds(sized, case.over)
    held, active = estimates.held(sized, case.settings.average > 0), estimates.activations(sized)
    there = case.over.chip.memory / case.over.chip.devices
    told = {"bytes": {"arguments": held, "temporaries": active, "reserved": held + active, "there": there}}
    return _common(case, sized, sizes, time, None) | told


def _sent(case: Case, runs: list, places: list) -> dict[str, dict[str, float]]:
    """Of each kind of collective bytes and seconds."""
    found = {}
    for kind in collectives.KINDS:
        every = [
            (each, times) for program, times in runs for each in program.collectives if each.kind == kind
        ]
        if every:
            found[kind] = {
                "bytes": sum(each.wire * times for each, times in every),
                "seconds": sum(roofline.seconds([each], case.over, places) * times for each, times in every),
                "runs": sum(each.times * times for each, times in every),
            }
    return found


def _common(case: Case, sized: roofline.Step | None, sizes: dict[str, int], time, operations) -> dict:
    """What is told of compiled programs and of estimates alike."""
    told = {
        "task": case.task,
        "topology": str(case.over),
        "chips": case.over.chips,
        "mesh": sizes,
        "clip": case.clip,
        "batch": case.settings.batch if case.task == "train" else 1,
        "seconds": time._asdict() | {"overlapped": time.overlapped, "apart": time.apart},
        "operations": {"compiled": operations},
    }
    if sized is None:
        return told
    work, near = (
        sized.formula,
        published.nearest(case.task, case.network.width, costs.tokens(case.clip), case.over.name),
    )
    told["operations"] |= {"formula": work, "again": sum(sized.again)}
    told |= {
        "exchange": sized.exchange,
        "remat": sized.remat,
        "parameters": roofline.count(sized.base),
        "trained": roofline.count(sized.adapters or sized.base) if sized.train else 0,
        "tokens": costs.tokens(case.clip),
        "lower_bound": roofline.lower_bound(sized)._asdict(),
        "mfu": work / (time.overlapped * case.over.chip.peak * case.over.chips),
        "published": near._asdict() if near else None,
    }
    return told
