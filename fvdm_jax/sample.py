"""Samples videos: from prompts, from pictures and clips that are kept, or from both; as long as one likes."""

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Iterable, Iterator

from fvdm_jax import latents, machine, zoo
from fvdm_jax.commands import lines, parse
from fvdm_jax.explain import explain, picture
from fvdm_jax.flags import OUT
from fvdm_jax.presets import PRESETS
from fvdm_jax.program import alone, leave, legible, outputs, run
from fvdm_jax.progress import Stages
from fvdm_jax.request import Request


def main(argv: list[str]) -> None:
    """Samples what `argv` asks for and writes the videos, their contact sheets and their settings."""
    request = parse(argv)
    requests = lines(request)
    if request.preset and not request.decode:
        print(f"preset {request.preset}:", ", ".join(_preset(request)))
    if request.explain:
        for one in requests:
            explained(one)
        return
    if not requests:
        print("every video is there already, made with these settings")
        return
    tell(requests[0])
    with Stages() as stages:
        with stages("load"):
            from fvdm_jax.projector import Projector
            from fvdm_jax.studio import Studio

        projector = Projector(stages)
        several = request.prompts is not None and request.length is None
        studio = None if request.decode else Studio(requests, stages, many=several)
        for some in studio.batches(requests) if several else [requests]:
            if some[0] is not requests[0]:
                stages.begin()
            for one in some:
                if one is not requests[0]:
                    tell(one)
            if request.decode:
                show(request, [latents.load(request.decode)], stages, projector)
                print("wrote", *request.outputs)
                continue
            if request.length is None:
                together(some, studio, stages, projector)
            else:
                long(some[0], studio, stages, projector)
            for one in some:
                print("wrote", *one.outputs, one.latents)


def _preset(request: Request) -> Iterator[str]:
    """What a preset's settings are now, those that flags go before among them."""
    for name, value in PRESETS[request.preset].items():
        if name == "kept":
            yield f"kept {value:g} where --keep says nothing"
        elif name == "strengths":
            yield from (f"lora {expert and expert + '='}{path} {by:g}" for path, by, expert in request.lora)
        elif getattr(request, name) is not None:
            yield f"{name} {getattr(request, name)}"


def explained(request: Request) -> None:
    """Draws the noise level of every frame at every step, of the first window of a long video."""
    from fvdm_jax.steps import calls, rows

    frames = request.latent_frames
    print(picture(request.strength))
    if request.rolls:
        queue = frames - request.overlap
        request = dataclasses.replace(request, schedule=f"rolling:window={queue}", length=None)
        print(f"of the first {frames} frames, after which the queue of {queue} rolls on:")
    matrix = rows(request, request.sampled[:frames])
    print(explain(matrix))
    most, counts = "at most " if request.cache else "", calls(request)
    print(f"\n{most}{sum(counts)} calls of the network", end="")
    print(f" in {len(counts)} windows" if len(counts) > 1 else "", end="")
    print(f"; at most {zoo.check(matrix).under_way} frames under way at once")


def tell(request: Request) -> None:
    """Says what is kept of a video and what is not."""
    print(picture(request.strength))
    if request.guides and not request.guided:
        print(f"note: the prompt is the negative one, {request.negative!r}, and guidance does nothing")
    for note in filter(None, (keep.note for keep in request.keeps if not request.decode)):
        print(note)
    if not any(request.strength):
        print("note: every frame is kept, and nothing is left to generate")


def together(requests: list[Request], studio, stages: Stages, projector) -> None:
    """Makes videos at once, as many as the studio makes at a time; all are denoised before one is shown."""
    made = studio.clips(requests)
    with stages("write"):
        for request, one in zip(requests, made, strict=True):
            latents.save(request.latents, one, request.settings)
    spent = stages.since
    for request, one in zip(requests, made, strict=True):
        stages.begin(spent)
        try:
            show(request, [one], stages, projector)
        except BaseException:
            again = ["python", "-m", "fvdm_jax.sample", "--decode", str(request.latents)]
            again = shlex.join([*again, "--out", str(request.out)])
            print(f"note: what was denoised is safe; to decode it again: {again}", file=sys.stderr)
            raise


def long(request: Request, studio, stages: Stages, projector) -> None:
    """Makes a video piece by piece, of which each is on disk, and shown, before the next is begun.

    Where an earlier run was stopped, it goes on after the last whole window, or as its queue last stood.
    """
    replace = request.overwrite or request.out == OUT
    with contextlib.ExitStack() as closing:
        closing.enter_context(alone(request.out))
        shape = studio.shape(request.total)
        reel = closing.enter_context(latents.Reel(request.latents, shape, request.settings, replace))
        coming = (_queue if request.rolls else _windows)(request, studio, reel)
        if reel.frames:
            stages.say(f"going on after latent frame {reel.frames} of {request.total}, from {reel.part}")
        try:
            show(request, _pieces(reel, coming, request.total), stages, projector)
        except BaseException:
            safe = min(reel.frames, reel.noted) if request.rolls else reel.frames
            what = f"{safe} of {request.total} latent frames are safe"
            print(f"note: {what}; the same command goes on from there", file=sys.stderr)
            raise
        reel.finish()


def _windows(request: Request, studio, reel: latents.Reel) -> Iterator:
    """The latents that are not on the reel yet, of which only whole windows are left there."""
    frames, new = request.latent_frames, request.new
    whole = frames + (reel.frames - frames) // new * new if reel.frames >= frames else 0
    reel.keep(whole)
    return studio.windows(request, reel.read(0, whole) if whole else None)


def _queue(request: Request, studio, reel: latents.Reel) -> Iterator:
    """The same of a queue, which goes on from where it last said how it stood."""
    past = reel.stored()
    reel.keep(past[0] if past else 0)
    return studio.queue(request, past, reel.store)


def _pieces(reel: latents.Reel, coming: Iterator, total: int) -> Iterator:
    """What is on the reel, frame by frame, and then what comes, once it is there."""
    done = reel.frames
    yield from (reel.read(i, i + 1) for i in range(done))
    while done < total:
        reel.add(next(coming))
        yield reel.read(done, reel.frames)
        done = reel.frames


def show(request: Request, made: Iterable, stages: Stages, projector) -> None:
    """Decodes latents [1 k h w c], which may come in pieces, and writes the request's outputs one by one."""
    import jax
    import numpy as np

    from fvdm_jax import video

    frames, chosen = 1 + video.STRIDE * (request.total - 1), []
    wanted = set(video.shown(frames))

    def seen() -> Iterator:
        for index, one in enumerate(projector.pictures(request, made)):
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
        record = {
            "latents": str(request.latents),
            "seconds": stages.since,
            "device": jax.devices()[0].device_kind,
        }
        record = request.settings | record | {"versions": machine.versions()}
        drafts[2].write_text(legible(record) + "\n", "utf-8")


def cli() -> None:
    """The program, as `python -m fvdm_jax.sample` and as `fvdm-sample`."""
    leave(run(main))


if __name__ == "__main__":
    cli()
