"""The page itself, by gradio: its form, what happens on it, and how it is served to this machine alone."""

import secrets
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from fvdm_jax import video
from fvdm_jax.keeps import latent
from fvdm_jax.presets import PRESETS
from fvdm_jax.program import Refusal
from fvdm_jax.rules import SOLVERS
from fvdm_jax.serving import drawing, form, locks
from fvdm_jax.serving.work import Maker, Progress
from fvdm_jax.session import Session, Video
from fvdm_jax.steps import calls, rows
from fvdm_jax.zoo import ZOO

UPLOAD = "25mb"
"""The largest file that can be dropped."""


class Page:
    """What happens on the page: every answer is a tuple of the values of its outputs."""

    def __init__(self, session: Session, work: Maker, rooms: locks.Rooms, model: str):
        """`model` is what a user calls the model's folder; empty: the bundled one."""
        self._session, self._work, self._rooms, self._model = session, work, rooms, model

    def drawn(self, *fields) -> tuple[str, str]:
        """The strip and the command of what the form asks for; or why that cannot be, and no command."""
        try:
            asked = form.form(*fields)
            request = asked.request(self._session.complete, self._rooms.uploads)
        except Refusal as refusal:
            return drawing.refused(str(refusal)), ""
        matrix = rows(request, request.sampled)
        return drawing.strip(request.strength, matrix, sum(calls(request))), asked.command(self._model)

    def made(self, *fields) -> Iterator[tuple]:
        """Status, frames, video, settings and command, as they come."""
        name = self._rooms.made / f"{secrets.token_hex(8)}.mp4"
        try:
            asked = form.form(*fields)
            request = asked.request(self._session.complete, self._rooms.uploads)
            command = asked.command(self._model)
            for event in self._work.shown(request):
                if isinstance(event, Progress):
                    yield self._progress(event, request)
                else:
                    yield self._finished(event, name), *self._results(event, asked, name), command
        except Refusal as refusal:
            yield drawing.refused(str(refusal)), *[gr.skip()] * 4
        except Exception:
            yield drawing.refused("error: this page: it failed; the terminal says how"), *[gr.skip()] * 4
            raise
        finally:
            name.unlink(missing_ok=True)

    def _progress(self, event: Progress, request) -> tuple:
        if event.preview is None:
            picture = gr.skip()
        else:
            picture = video.contact_sheet(event.preview, strength=request.strength)
        told = f"step {event.done} of {event.total}" if event.done else "getting ready"
        return f"<p>{told}</p>", picture, *[gr.skip()] * 3

    def _finished(self, event: Video, name: Path) -> str:
        event.save(name)
        told = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in event.seconds.items())
        return f"<p>done: {told}</p>"

    def _results(self, event: Video, asked: form.Form, name: Path) -> tuple:
        sheet = video.contact_sheet(event.pixels, strength=event.request.strength)
        return sheet, str(name), asked.settings(event.request)


def blocks(session: Session, page: Page) -> gr.Blocks:
    """The page's form, and what its buttons do."""
    own = session.defaults.sampling
    with gr.Blocks(title="fvdm_jax", analytics_enabled=False, delete_cache=(600, 3600)) as app:
        gr.Markdown(
            "# Every frame has its own noise level\n"
            "Drop pictures or clips on a frame of the strip, or into a slot: they are kept, and a video "
            "is made around them."
        )
        with gr.Row():
            with gr.Column(scale=3):
                words = _words(own)
                drawn = gr.HTML(elem_id="strip")
                slots = _slots(own)
                go, stop = _buttons()
            with gr.Column(scale=2):
                status = gr.HTML("<p>nothing made yet</p>", elem_id="status")
                result = gr.Video(label="video", interactive=False, autoplay=True, loop=True, elem_id="video")
                sheet = gr.Image(label="frames", interactive=False, buttons=["fullscreen"], elem_id="frames")
                command = gr.Textbox(
                    label="the command that makes it again, where your files lie", lines=6, max_lines=20,
                    interactive=False, buttons=["copy"], elem_id="command",
                )  # fmt: skip
                with gr.Accordion("all its settings", open=False):
                    settings = gr.JSON(show_label=False, elem_id="settings")
        inputs = [*words.values(), *slots]
        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        events = [each.change for each in inputs if each not in (words["prompt"], words["negative"])]
        events += [words["prompt"].blur, app.load]
        gr.on(events, page.drawn, inputs, [drawn, command], queue=False, trigger_mode="always_last", **quiet)
        making = go.click(page.made, inputs, [status, sheet, result, settings, command], **quiet)
        stop.click(lambda: "<p>stopped</p>", None, status, cancels=[making], queue=False, **quiet)
        chosen = [words[name] for name in form.BY_PRESET] + slots[2::3]
        words["preset"].change(partial(_preset, own), words["preset"], chosen, queue=False, **quiet)
        # Another schedule has other options. Presets, which set both, are no input of a user's.
        words["schedule"].input(lambda: "", None, words["options"], queue=False, **quiet)
        words["frames"].change(_places, words["frames"], slots[1::3], queue=False, **quiet)
    return app


def _words(own: dict) -> dict:
    """The fields of a Form but for its slots, by their names and in their order."""
    said, made = form.preset("", own), {}
    made["prompt"] = gr.Textbox(own["prompt"], label="prompt", lines=2, max_length=10_000, elem_id="prompt")
    with gr.Accordion("more settings", open=False):
        made["negative"] = gr.Textbox(own["negative"], label="what not to show", max_length=10_000)
        made["preset"] = gr.Dropdown([("none", ""), *PRESETS], value="", label="preset")
        with gr.Row():
            made["schedule"] = gr.Dropdown(
                list(ZOO), value=said["schedule"], label="schedule", elem_id="schedule"
            )
            made["options"] = gr.Textbox(
                said["options"], label="its options", placeholder="lag=2", max_length=60
            )
        with gr.Row():
            made["solver"] = gr.Dropdown(list(SOLVERS), value=said["solver"], label="solver")
            made["steps"] = gr.Slider(1, 100, said["steps"], step=1, label="steps", elem_id="steps")
        with gr.Row():
            made["guidance"] = gr.Textbox(said["guidance"], label="guidance", max_length=20)
            made["shift"] = gr.Number(said["shift"], label="shift")
            made["frames"] = gr.Slider(1, max(121, said["frames"]), said["frames"], step=4, label="frames")
        with gr.Row():
            made["height"] = gr.Number(said["size"][0], label="height", precision=0)
            made["width"] = gr.Number(said["size"][1], label="width", precision=0)
            made["seed"] = gr.Textbox("0", label="seed", max_length=20)
    return made


def _slots(own: dict) -> list:
    """The files that may be dropped, with their frames and strengths, as a Form has them."""
    last, made = latent(own["frames"]) - 1, []
    begins = [round(i * last / (form.SLOTS - 1)) for i in range(form.SLOTS)]
    with gr.Row():
        for i, frame in enumerate(begins):
            with gr.Column(min_width=120):
                kinds = ["image", "video"]
                made.append(
                    gr.File(
                        label=f"keep {i + 1}",
                        file_types=kinds,
                        height=120,
                        elem_id=f"keep{i}",
                        elem_classes="slot",
                    )
                )
                made.append(gr.Slider(0, last, frame, step=1, label="at frame", buttons=[], elem_id=f"at{i}"))
                made.append(gr.Slider(0, 1, 0, step=0.05, label="loosened", buttons=[]))
    return made


def _buttons() -> tuple:
    with gr.Row():
        return gr.Button("make the video", variant="primary", elem_id="go"), gr.Button("stop", elem_id="stop")


def _preset(own: dict, name: str) -> list:
    said = form.preset(name, own)
    return [said[each] for each in form.BY_PRESET] + [said["kept"]] * form.SLOTS


def _places(frames: float) -> list:
    """The frames to which files can be kept reach to the last."""
    return [gr.update(maximum=latent(int(frames)) - 1)] * form.SLOTS


def serve(model: Path, named: str, port: int, show: bool) -> None:
    """Serves the page until the process is told to stop."""
    locks.check_port(port)
    session = Session(model.resolve())
    work = Maker(session)
    try:
        with locks.rooms() as rooms:
            app = blocks(session, Page(session, work, rooms, named))
            try:
                _launch(app, port, show)
                print(f"http://{locks.HOST}:{port} is there for this machine alone, until Ctrl-C", flush=True)
                threading.Event().wait()
            finally:
                app.close(verbose=False)
    finally:
        work.close()


def _launch(app: gr.Blocks, port: int, show: bool) -> None:
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    # By a name of another's that leads here, a strange page could read this one.
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[locks.HOST, "localhost"])
    app.queue(max_size=8, default_concurrency_limit=1, api_open=False)
    app.launch(
        server_name=locks.HOST, server_port=port, share=False, inbrowser=show, quiet=True, show_error=False,
        max_file_size=UPLOAD, allowed_paths=[], ssr_mode=False, mcp_server=False, prevent_thread_lock=True,
        footer_links=[], enable_monitoring=False, strict_cors=True, theme=gr.themes.Base(**fonts),
        css=drawing.STYLE, js=drawing.DROPPING, app_kwargs={"middleware": [hosts]},
    )  # fmt: skip
