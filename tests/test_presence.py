"""One run at a time has a folder, and processes of a run see when another is no more."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from fvdm_jax import presence
from fvdm_jax.presence import Presence
from fvdm_jax.program import Refusal

ALONE = """
import sys, time
from pathlib import Path
from fvdm_jax import presence
presence.SILENCE, presence.BEAT = 1.0, 0.1
place = presence.Presence(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
if place._number == 0:
    place.take()
place.join()
place.doing("step 7")
print("here", flush=True)
time.sleep(float(sys.argv[4]))
place.leave()
"""


def begin(folder, number: int = 0, count: int = 1, seconds: float = 60) -> subprocess.Popen:
    """A process that is there for some seconds."""
    argv = [sys.executable, "-c", ALONE, str(folder), str(number), str(count), str(seconds)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "here\n"
    return process


def ended(process: subprocess.Popen) -> tuple[int, str]:
    said = process.communicate(timeout=30)[1]
    return process.returncode, said


@pytest.mark.fault("T13")
def test_a_second_run_is_refused_at_once_and_the_first_goes_on(tmp_path):
    first = begin(tmp_path)
    began = time.monotonic()
    with pytest.raises(Refusal, match=f"is in use by process {first.pid} on .*--takeover"):
        Presence(tmp_path).take()
    assert time.monotonic() - began < 1
    first.kill()
    first.communicate()
    # A dead owner owns nothing, even if its number is another process's by now.
    Presence(tmp_path).take()
    held = json.loads((tmp_path / presence.OWNER).read_text())
    (tmp_path / presence.OWNER).write_text(json.dumps(held | {"born": "12345"}))
    Presence(tmp_path).take()


def test_a_run_that_ends_leaves_the_folder(tmp_path):
    first = begin(tmp_path, seconds=0.3)
    assert ended(first) == (0, "") and not (tmp_path / presence.OWNER).exists()


@pytest.mark.fault("T13")
def test_a_takeover_ends_the_other_run(tmp_path):
    first = begin(tmp_path)
    second = Presence(tmp_path)
    second.take(takeover=True)
    code, said = ended(first)
    assert code == 2 and f"was taken over by process {os.getpid()}" in said and said.count("\n") == 1
    second.leave()
    assert not (tmp_path / presence.OWNER).exists()


@pytest.mark.fault("T13")
@pytest.mark.parametrize("alive", [True, False])
def test_an_owner_on_another_host_is_judged_by_its_count(tmp_path, monkeypatch, alive):
    monkeypatch.setattr(presence, "STRANGE", 1.0)
    Presence(tmp_path).take()
    held = json.loads((tmp_path / presence.OWNER).read_text())
    (tmp_path / presence.OWNER).write_text(json.dumps(held | {"host": "elsewhere"}))
    beats = tmp_path / presence.BEATS / "0"
    beats.parent.mkdir()
    beats.write_text("x 1")
    if alive:
        threading.Timer(0.3, lambda: beats.write_text("x 2")).start()
        with pytest.raises(Refusal, match="on elsewhere"):
            Presence(tmp_path).take()
    else:
        Presence(tmp_path).take()


@pytest.mark.fault("T9")
@pytest.mark.parametrize("dead", [0, 1])
def test_a_process_that_is_killed_ends_the_others_in_one_line(tmp_path, dead):
    processes = [begin(tmp_path, number, 2) for number in range(2)]
    # Who has never been seen to count is waited for.
    time.sleep(1)
    processes[dead].kill()
    processes[dead].communicate()
    code, said = ended(processes[1 - dead])
    assert code == presence.AGAIN
    told = f"process {dead} of 2 has not been heard of for 1 s, at step 7"
    assert said == f"error: {told}; start the run again, it goes on\n"


def test_a_process_that_leaves_in_order_is_not_missed(tmp_path):
    first, second = begin(tmp_path, 0, 2, 3.0), begin(tmp_path, 1, 2, 0.2)
    assert ended(second) == (0, "") and ended(first) == (0, "")


@pytest.mark.fault("T14")
def test_clocks_do_not_matter(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: -1e9)
    first = begin(tmp_path)
    with pytest.raises(Refusal, match="is in use"):
        Presence(tmp_path).take()
    first.kill()
    first.communicate()


def test_a_damaged_note_of_the_owner_is_no_owner(tmp_path):
    (tmp_path / presence.OWNER).write_text("{")
    Presence(tmp_path).take()
