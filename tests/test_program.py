"""The contract of every program, by processes that are refused, interrupted and killed."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fvdm_jax.program import Parser, Refusal, alive, check_output, outputs, plain, run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def python():
    """Starts Python on a program that knows all of `program`; what still runs at the end is killed."""
    with contextlib.ExitStack() as started:

        def start(code: str, *arguments: str) -> subprocess.Popen:
            # Tests that run in the background ignore Ctrl-C, and so would what they start.
            listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            code = listen + "import sys; from fvdm_jax.program import *\n" + code
            command = [sys.executable, "-c", code, *arguments]
            pipe = subprocess.PIPE
            process = started.enter_context(
                subprocess.Popen(command, cwd=ROOT, text=True, stdout=pipe, stderr=pipe)
            )
            started.callback(process.kill)
            return process

        yield start


def test_a_refusal_is_one_printable_line():
    line = str(Refusal("--out\n", "bad\x1b[31m" + "x" * 5000, "r" * 5000))
    assert line.startswith("error: --out\\n: bad\\x1b[31m") and line.isprintable() and len(line) <= 1500


def test_plain_never_grows():
    assert plain("a" * 500, 10) == "a" * 9 + "…" and plain("å\0\n") == "å\\x00\\n"


CODES = {
    "done": ("pass", 0, ""),
    "refused": ("raise Refusal('--x', 'is bad', 'give y')", 2, "error: --x: is bad; give y\n"),
    "interrupted": ("raise KeyboardInterrupt", 130, "stopped\n"),
}


@pytest.mark.parametrize("body, code, message", CODES.values(), ids=CODES)
def test_exit_codes(body, code, message, python):
    process = python(f"def main(argv):\n    {body}\nleave(run(main))")
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (code, message)


def test_an_error_of_ours_has_its_traceback(python):
    process = python("def main(argv): 1 / 0\nleave(run(main))")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1 and "ZeroDivisionError" in errors and "Traceback" in errors


def test_debug_shows_where_a_refusal_arose(python):
    process = python("def main(argv): raise Refusal('--x', 'is bad')\nleave(run(main))", "--debug")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2 and "Traceback" in errors and errors.endswith("error: --x: is bad\n")


SLEEPS = {"python": "import time; time.sleep(60)", "native": "import ctypes; ctypes.CDLL(None).sleep(60)"}


STOPS = {"ctrl-c": (signal.SIGINT, 130), "sigterm": (signal.SIGTERM, 143)}


@pytest.mark.parametrize(("sent", "code"), STOPS.values(), ids=STOPS)
@pytest.mark.parametrize("sleep", SLEEPS.values(), ids=SLEEPS)
def test_it_ends_when_told_to_even_where_python_does_not_run(sleep, sent, code, python):
    """The second sleeps again and again in C, as a compiled loop runs on."""
    process = python(
        f"def main(argv):\n    print('on', flush=True)\n    while True: {sleep}\nleave(run(main))"
    )
    assert process.stdout.readline() == "on\n"
    began = time.monotonic()
    process.send_signal(sent)
    assert process.wait(timeout=10) == code and time.monotonic() - began < 5


@pytest.mark.parametrize(("sent", "code"), STOPS.values(), ids=STOPS)
def test_nothing_half_written_is_left_when_it_is_stopped(tmp_path, sent, code, python):
    process = python(
        "from pathlib import Path\nimport time\ndef main(argv):\n"
        "    with folder_output(Path(argv[0]) / 'out') as draft:\n"
        "        (draft / 'a').write_text('half')\n        print('on', flush=True)\n        time.sleep(60)\n"
        "leave(run(main))",
        str(tmp_path),
    )
    assert process.stdout.readline() == "on\n"
    process.send_signal(sent)
    assert process.wait(timeout=10) == code and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("sent", "code"), STOPS.values(), ids=STOPS)
def test_neither_threads_nor_children_outlive_a_program_that_is_stopped(sent, code, python):
    process = python(
        "import multiprocessing, threading, time\n"
        "def main(argv):\n    threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "    child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))\n"
        "    child.start()\n    print(child.pid, flush=True)\n    time.sleep(60)\nleave(run(main))"
    )
    child = int(process.stdout.readline())
    process.send_signal(sent)
    assert process.wait(timeout=5) == code
    until = time.monotonic() + 5
    while alive(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(child)


def test_a_reader_that_leaves_does_not_stop_the_work(python):
    process = python(
        "def main(argv):\n    for i in range(100000): print(i)\n"
        "    sys.stderr.write('finished')\nleave(run(main))"
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "finished" and process.wait(timeout=30) == 0


def test_outputs_appear_together_or_not_at_all(tmp_path):
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    with pytest.raises(RuntimeError), outputs(a, b) as drafts:
        drafts[0].write_text("half")
        assert drafts[0].suffix == ".txt" and drafts[0].parent == tmp_path
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with outputs(a, b) as drafts:
        for draft in drafts:
            draft.write_text("whole")
        assert not a.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b.txt"] and a.read_text() == "whole"


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path, python):
    process = python(
        f"from pathlib import Path\nwith outputs(Path({str(tmp_path / 'a.txt')!r})) as (draft,):\n"
        "    draft.write_text('half'); print('on', flush=True)\n    import time; time.sleep(60)"
    )
    assert process.stdout.readline() == "on\n"
    process.kill()
    process.wait()
    assert [p.name.startswith(".fvdm-") for p in tmp_path.iterdir()] == [True]
    with outputs(tmp_path / "b.txt") as (draft,):
        draft.write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["b.txt"]


def test_a_full_disk_is_a_refusal(tmp_path):
    with pytest.raises(Refusal, match="cannot be written"), outputs(tmp_path / "a"):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_outputs_that_cannot_be_made_are_refused_beforehand(tmp_path):
    (tmp_path / "there").write_text("x")
    for path, overwrite, what in [
        (tmp_path / "there", False, "exists"),
        (tmp_path, True, "is no ordinary file"),
        (tmp_path / "no" / "where", True, "cannot be written"),
        (tmp_path / ("n" * 300), True, "cannot be written"),
    ]:
        with pytest.raises(Refusal, match=what):
            check_output(path, "--out", overwrite)
    check_output(tmp_path / "there", "--out", True)
    assert (tmp_path / "there").read_text() == "x" and len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize(
    "given, message",
    {
        "--promt=a": r"error: --promt: is no flag; the nearest is --prompt",
        "--steps": r"error: --steps: expected one argument after it; a value that begins with a dash is",
        "stray": r"error: stray: belongs to no flag; quote a value",
        "--pro=a": r"error: --pro: is no flag",
    }.items(),
)
def test_flags_are_taken_at_their_word(given, message):
    parser = Parser(prog="x")
    parser.add_argument("--prompt")
    parser.add_argument("--steps", type=int)
    with pytest.raises(Refusal, match=message):
        parser.parse_args([given])


def test_run_returns_the_code_that_main_gives():
    assert run(lambda argv: len(argv), ["a", "b", "c"]) == 3
