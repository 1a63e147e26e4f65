"""What the served page does without its library: its form as a command, its locks, the work behind it."""

import os
import shlex
import socket
import stat
import tempfile
from pathlib import Path

import pytest

import fvdm_jax
from fvdm_jax import commands, demo
from fvdm_jax.program import Refusal, run
from fvdm_jax.serving import drawing, form, locks, work
from fvdm_jax.session import Video

FIELDS = {
    "prompt": "a red circle",
    "negative": "",
    "preset": "",
    "schedule": "together",
    "options": "",
    "solver": "euler",
    "steps": 5,
    "guidance": "2.0",
    "shift": 3.0,
    "frames": 9,
    "height": 32,
    "width": 48,
    "seed": "7",
}


def filled(*slots, **fields) -> form.Form:
    return form.form(*(FIELDS | fields).values(), *(value for slot in slots for value in slot))


@pytest.fixture(scope="module")
def session(model):
    return fvdm_jax.load(model)


def test_the_command_is_the_request(here, model, session):
    asked = filled(
        ("a.png", 0, 0.0), (None, 1, 0.0), (str(here / "b.png"), 2, 0.25), schedule="pyramid", options="lag=2"
    )
    request = asked.request(session.complete, here)
    command = asked.command(str(model)).replace("\\\n", "")
    again = commands.parse(shlex.split(command)[3:])
    # Files are named as the user has them.
    assert again.keep == ("0=a.png:0", "last=b.png:0.25")
    for name in (
        "prompt",
        "frames",
        "size",
        "steps",
        "solver",
        "schedule",
        "guidance",
        "shift",
        "seed",
        "fps",
    ):
        assert getattr(again, name) == getattr(request, name), name
    assert again.strength == request.strength == [0, 1, 0.25]
    # What is empty on the page is empty, whatever a preset has.
    assert filled(preset="pusa-wan21").request(session.complete, here).negative == ""
    assert form.preset("pusa-wan21", {"negative": "x"})["negative"].startswith("Bright tones")
    assert str(here) not in str(asked.settings(request))


@pytest.mark.parametrize("prompt", ["--out=/tmp/x", "'; rm -rf ~", "$(id) `id`", "a\nb", "ünï 🦊", "--help"])
def test_what_is_typed_stays_a_prompt(session, here, prompt):
    asked = filled(prompt=prompt)
    assert asked.request(session.complete, here).prompt == prompt
    again = shlex.split(asked.command().replace(" \\\n", " "))
    assert commands.parse([*again[3:], "--explain"]).prompt == prompt


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"frames": 10**7}, "--frames: 10000000"),
        ({"frames": -3}, "--frames: -3"),
        ({"frames": float("nan")}, "'nan' is not a whole number"),
        ({"steps": 1e300}, "is not a whole number"),
        ({"steps": 1000, "frames": 10001, "height": 8192, "width": 8192}, "times the steps and pixels"),
        ({"steps": 1000, "schedule": "autoregressive", "height": 720, "width": 1280}, "times the steps"),
        ({"schedule": "/etc/passwd.json"}, "is no schedule"),
        ({"schedule": "together:x.json"}, "is no schedule"),
        ({"options": "lag=/etc/x.json"}, "is no list of options"),
        ({"schedule": "pyramid", "options": "block=2"}, "pyramid has no option 'block'"),
        ({"preset": "../x"}, "invalid choice"),
        ({"guidance": "a"}, "is not a finite number"),
        ({"seed": "-1"}, "--seed: -1"),
        ({"solver": "heun"}, "invalid choice"),
        ({"height": 33}, "not a multiple"),
    ],
)
def test_what_the_form_refuses(session, here, fields, said):
    with pytest.raises(Refusal) as refused:
        filled(**fields).request(session.complete, here)
    line = str(refused.value)
    assert said in line and "\n" not in line and len(line) <= 1500
    assert "<" not in drawing.refused("<img src=x>").removeprefix('<div class="refused">').removesuffix(
        "</div>"
    )


@pytest.mark.parametrize("file", ["/etc/passwd", "../passwd", "/proc/self/environ", "%2e%2e/x", ""])
def test_only_what_was_uploaded_is_read(session, here, file):
    uploads = here / "uploads"
    uploads.mkdir()
    (uploads / "link.png").symlink_to("/etc/passwd")
    for name in (file, str(uploads / file), str(uploads / "link.png"), str(uploads)):
        if not name:
            continue
        with pytest.raises(Refusal, match="was not uploaded on this page"):
            filled((name, 0, 0)).request(session.complete, uploads)


def test_a_refusal_does_not_say_where_files_lie(session, here):
    (here / "bad name.png").write_text("no picture")
    with pytest.raises(Refusal) as refused:
        filled((str(here / "bad name.png"), 0, 0)).request(session.complete, here)
    assert str(here) not in str(refused.value) and "0=bad name.png" in str(refused.value)


def test_a_preset_fills_the_form():
    own = {"steps": 3, "guidance": 2.0, "schedule": "pyramid:lag=2"}
    shown = {"kept": 0.0, "guidance": "2.0", "schedule": "pyramid", "options": "lag=2"}
    assert form.preset("", own) == own | shown
    said = form.preset("wan22-t2v", own)
    assert (said["steps"], said["guidance"], said["schedule"], said["options"]) == (
        40,
        "4.0,3.0",
        "together",
        "",
    )
    assert form.preset("pusa-wan21", own)["kept"] == 0.2


@pytest.mark.thorough
def test_the_work_is_shown_and_ended(session, here):
    request = filled(steps=10).request(session.complete, here)
    makes = work.Maker(session)
    events = list(makes.shown(request))
    assert [event.done for event in events[:-1]] == list(range(11)) and isinstance(events[-1], Video)
    # A preview once, after a fifth of the steps.
    assert [event.done for event in events[:-1] if event.preview is not None] == [2]
    coming = makes.shown(request)
    assert next(coming).done == 0 and next(coming).done == 1
    coming.close()
    makes.close()
    assert not makes._worker.is_alive()
    with pytest.raises(work._Left):
        list(makes.shown(request))


def test_rooms_are_closed_to_others_and_gone_afterwards(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, value in (
        ("GRADIO_SHARE", "True"),
        ("GRADIO_SERVER_NAME", "0.0.0.0"),
        ("GRADIO_TEMP_DIR", "/"),
    ):
        monkeypatch.setenv(name, value)
    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "")
    with locks.rooms() as rooms:
        home = rooms.uploads.parent
        assert Path.cwd() == home / "empty" and not list(Path.cwd().iterdir())
        assert tempfile.gettempdir() == str(rooms.made) and os.environ["GRADIO_TEMP_DIR"] == str(
            rooms.uploads
        )
        assert "GRADIO_SHARE" not in os.environ and "GRADIO_SERVER_NAME" not in os.environ
        for folder in (home, *home.iterdir()):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert Path.cwd() == tmp_path and not home.exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--serve", "--steps", "3"], "--steps: has no effect with --serve"),
        (["--port", "8000"], "--port: has no effect without --serve"),
        (["--serve", "--model", "nowhere"], "--model: nowhere"),
        (["--serve", "--port", "80"], "--port: 80 is not a possible number"),
        (["--serve", "--listen", "0.0.0.0"], "--listen: is no flag"),
    ],
)
def test_what_the_served_page_refuses(monkeypatch, capfd, flags, said):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: True)
    assert run(demo.main, flags) == 2
    assert said in capfd.readouterr().err


def test_without_its_library_the_extra_is_named(monkeypatch, capfd):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert run(demo.main, ["--serve"]) == 2
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and 'pip install -e ".[serve]"' in told


def test_a_port_in_use_is_refused():
    with socket.socket() as other:
        other.bind((locks.HOST, 0))
        other.listen()
        with pytest.raises(Refusal, match="--port: .* cannot be listened on"):
            locks.check_port(other.getsockname()[1])
