"""The served page in a browser, as a user and as an intruder: by hand, with the extras serve and e2e.

    python -m pytest -m e2e tests/test_served_page.py

Chromium is Debian's package, or any that FVDM_CHROMIUM names. FVDM_SHOTS names a folder for pictures of the
page, to be looked at.
"""

import base64
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fvdm_jax.commands import parse

pytestmark = pytest.mark.e2e
SHOTS = os.environ.get("FVDM_SHOTS")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The port of a page that is served, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Shared pages are asked for, and other addresses; neither must come.
    wishes = {"GRADIO_SHARE": "True", "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_ALLOWED_PATHS": "/"}
    argv = [sys.executable, "-m", "fvdm_jax.demo", "--serve", "--port", str(port)]
    process = subprocess.Popen(
        argv,
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env=os.environ | wishes,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert str(port) in process.stdout.readline()
            yield port, process
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    path = os.environ.get("FVDM_CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(served, browser):
    """The page, loaded; whatever it asks for must be asked of this machine."""
    asked = []
    page = browser.new_page(viewport={"width": 1280, "height": 1100})
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"http://127.0.0.1:{served[0]}")
    page.wait_for_selector("#strip .strip")
    yield page
    strangers = {url for url in asked if not re.match(r"(http://127\.0\.0\.1:|data:|blob:)", url)}
    page.close()
    assert not strangers


@pytest.fixture
def cat(tmp_path) -> Path:
    path = tmp_path / "my cat.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    return path


def shot(page, name: str) -> None:
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/serve-{name}.png", full_page=True)


def test_a_picture_is_dropped_and_a_video_made(page, cat, tmp_path, monkeypatch):
    shot(page, "loaded")
    page.set_input_files("#keep0 input[type=file]", cat)
    page.wait_for_selector("#strip .strip .kept")
    page.fill("#prompt textarea", "a red circle; $(rm) moves up")
    page.get_by_text("more settings").click()
    page.fill("#steps input[type=number]", "5")
    page.keyboard.press("Tab")
    page.wait_for_function("document.querySelector('#strip .told').textContent.includes('10 calls')")
    shot(page, "asked")
    page.click("#go")
    page.wait_for_selector("#frames img", timeout=120_000)
    assert "step" in page.inner_text("#status")
    shot(page, "preview")
    page.wait_for_selector("#status:has-text('done')", timeout=120_000)
    page.wait_for_function("document.querySelector('#video video')?.videoWidth == 64", timeout=30_000)
    page.get_by_text("all its settings").click()
    shot(page, "made")
    command = shlex.split(page.input_value("#command textarea").replace("\\\n", ""))
    # What is shown is what was made: it is run where the file lies.
    assert command[:3] == ["python", "-m", "fvdm_jax.sample"]
    monkeypatch.chdir(tmp_path)
    request = parse([*command[3:], "--explain"])
    assert request.prompt == "a red circle; $(rm) moves up" and request.steps == 5
    assert [keep.path.name for keep in request.keeps] == ["my cat.png"]


def test_another_schedule_takes_its_options_with_it(page):
    """Those of the model's own are of no other one."""
    page.get_by_text("more settings").click()
    assert page.input_value("#schedule input") == "autoregressive"
    page.click("#schedule input")
    page.get_by_role("option", name="together").click()
    page.wait_for_function("document.querySelector('#command textarea').value.includes('schedule=together')")
    assert "block=" not in page.input_value("#command textarea")


def test_pictures_are_dropped_on_frames_of_the_strip(page, cat):
    """Each goes into a free slot, kept at the frame that it fell on; beside the strip nothing is taken."""
    drop = """async ([where, name, data]) => {
      const one = new DataTransfer(), bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
      one.items.add(new File([bytes], name, { type: 'image/png' }));
      const told = new DragEvent('drop', { bubbles: true, dataTransfer: one });
      document.querySelector(where).dispatchEvent(told);
    }"""
    data = base64.b64encode(cat.read_bytes()).decode()
    for kept, frame in enumerate((3, 6), 1):
        page.evaluate(drop, [f"#strip .strip div:nth-child({frame + 1})", f"cat {frame}.png", data])
        page.wait_for_function(f"document.querySelectorAll('#strip .strip .kept').length == {kept}")
        assert "kept" in page.get_attribute(f"#strip .strip div:nth-child({frame + 1})", "class")
    page.evaluate(drop, ["#status", "beside.png", data])
    command = shlex.split(page.input_value("#command textarea").replace("\\\n", ""))
    shot(page, "dropped")
    kept = [word for word in command if word.startswith("--keep")]
    assert kept == ["--keep=3=cat 3.png:0", "--keep=6=cat 6.png:0"]


def test_what_is_no_picture_is_refused_in_one_line(page, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"<svg onload=alert(1)>")
    page.set_input_files("#keep0 input[type=file]", bad)
    page.wait_for_selector("#strip .refused")
    said = page.inner_text("#strip .refused")
    assert said.startswith("error: --keep 0=bad.png") and "\n" not in said and "/" not in said.split(";")[0]
    page.click("#go")
    page.wait_for_selector("#status .refused")
    shot(page, "refused")


def test_a_video_is_stopped(page):
    page.get_by_text("more settings").click()
    page.fill("#steps input[type=number]", "100")
    page.keyboard.press("Tab")
    page.wait_for_function("document.querySelector('#strip .told').textContent.includes('200 calls')")
    page.click("#go")
    page.wait_for_selector("#status:has-text('step 1')", timeout=120_000)
    page.click("#stop")
    page.wait_for_selector("#status:has-text('stopped')")


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../etc/passwd",
        "/gradio_api/file=%2e%2e/%2e%2e/etc/passwd",
        "/gradio_api/file=C:\\Windows\\win.ini",
        f"/gradio_api/file={Path(parse.__code__.co_filename)}",
        "/gradio_api/file=http://127.0.0.1:9/",
        "/static/../../../../etc/passwd",
        "/assets/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/gradio_api/stream/x/../../etc/passwd",
    ],
)
def test_no_file_of_the_machine_is_served(served, path):
    status, text = asked(served[0], "GET", path)
    assert status in (400, 403, 404) and b"root:" not in text


def asked(port: int, method: str, path: str, body: bytes = b"", **headers) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in ({"Content-Length": str(len(body))} | headers).items():
        connection.putheader(name, value)
    connection.endheaders(body)
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


def test_a_stranger_that_goes_by_another_name_is_refused(served):
    assert asked(served[0], "GET", "/", Host="evil.example")[0] == 400
    form = {"Content-Type": "application/json", "Origin": "http://evil.example"}
    assert asked(served[0], "POST", "/gradio_api/queue/join", b"{}", **form)[0] in (400, 403, 422)


FIELDS = ["a circle", "", "", "together", "", "unipc", 100, "3", 3, 33, 64, 64, "0", *[None, 0, 0] * 4]
"""What the page sends for its form, in the order of `form.Form`."""


def sent(port: int, session: str, **others) -> int:
    """The status of asking for a video past the page: its form with other fields, by their place."""
    config = json.loads(asked(port, "GET", "/config")[1])
    made = [one["id"] for one in config["dependencies"] if len(one["outputs"]) == 5]
    fields = list(FIELDS)
    for place, value in others.items():
        fields[int(place[1:])] = value
    told = {"data": fields, "fn_index": made[0], "session_hash": session, "event_data": None}
    kind = {"Content-Type": "application/json"}
    return asked(port, "POST", "/gradio_api/queue/join", json.dumps(told).encode(), **kind)[0]


def heard(port: int, session: str) -> str:
    """What comes of it, to the end."""
    return asked(port, "GET", f"/gradio_api/queue/data?session_hash={session}")[1].decode()


def test_nothing_is_to_be_had_past_the_page(served):
    port = served[0]
    told = json.loads(asked(port, "GET", "/gradio_api/info")[1])
    assert not told["named_endpoints"] and not told["unnamed_endpoints"]
    # A path that was not uploaded, as gradio's component and as bare text; too much work; a file as schedule.
    path = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    for i, (place, value) in enumerate({"_13": path, "_9": 10**7, "_3": "rows.json", "_6": 10**9}.items()):
        assert sent(port, f"s{i}", **{place: value}) == 200
        answer = heard(port, f"s{i}")
        assert "process_completed" in answer and "root:" not in answer
        assert '"success":false' in answer.replace(" ", "") or "refused" in answer, answer
    assert sent(port, "s9", _13="/etc/passwd") in (200, 422) and "root:" not in heard(port, "s9")


def test_large_uploads_are_refused(served):
    edge = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body = edge + b"0" * (26 << 20) + b"\r\n--x--\r\n"
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    assert asked(served[0], "POST", "/gradio_api/upload", body, **form)[0] in (400, 413)


def test_only_this_machine_is_listened_to(served):
    """Sockets of the process that listen, by /proc/net: address 127.0.0.1, as 0100007F."""
    sockets = {os.readlink(link) for link in Path(f"/proc/{served[1].pid}/fd").iterdir() if link.is_symlink()}
    inodes = {match[1] for match in (re.match(r"socket:\[(\d+)\]", name) for name in sockets) if match}
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            local, state, inode = (line.split()[i] for i in (1, 3, 9))
            if state == "0A" and inode in inodes:
                listening.append(local)
    assert listening == [f"0100007F:{served[0]:04X}"]


def test_the_queue_is_short(served):
    """One works and eight wait; who comes then is sent away."""
    port = served[0]
    came = [sent(port, f"q{i}") for i in range(12)]
    assert came.count(200) in (8, 9) and came.count(503) in (3, 4), came
