"""Runs that are killed, hung or told to stop, in processes of their own, till they are whole all the same."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import small

ROOT = Path(__file__).resolve().parents[1]
# jax is imported once; each run is a fork of the process that has it, before any device is touched.
SERVER = """
import os, sys, threading
import jax, optax, orbax.checkpoint, grain
import fvdm_jax.train_run, fvdm_jax.trainer
from fvdm_jax.program import run
from fvdm_jax.train import main
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(line.split()[0], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os.dup2(2, 1)
        os._exit(run(main, line.split()[1:]))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

KILLS, EVERY = int(os.environ.get("FVDM_KILLS", "5")), 100
"""How often a run is killed at least, and the steps between its checkpoints."""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    settings = dict(average=0.9, steps=100, save_every=5, evaluate_every=0, held_out=1, keep_last=2, batch=4)
    return small.training(tmp_path_factory.mktemp("config"), **settings)


def environment(devices: int) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


class Server:
    """Runs of one folder, one after the other."""

    def __init__(self, config: Path, log: Path, *more: str):
        self._command = f"{log} {config} --synthetic {' '.join(more)} --out"
        argv = [sys.executable, "-c", SERVER]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(argv, cwd=ROOT, env=environment(1), **pipes)

    def run(self, out: Path, kill_after: float | None = None) -> int:
        """The exit code of a run, which is killed after so many seconds if it is still there."""
        self._process.stdin.write(f"{self._command} {out}\n")
        self._process.stdin.flush()
        child = int(self._process.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        return int(self._process.stdout.readline())

    def close(self):
        self._process.communicate()


def arrays(out: Path, step: int) -> dict:
    """The checksums of all arrays of a checkpoint, and where in its data it was."""
    told = json.loads((out / "checkpoints" / str(step) / "run" / "metadata").read_text())
    return told["digests"] | {"position": told["position"]}


def logged(out: Path) -> list[dict]:
    """The lines of the log; the last may be half written."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def made(out: Path) -> list[tuple]:
    """The steps that are in the log, with their losses."""
    return [(line["step"], line["loss"], line["gradient"]) for line in logged(out)]


def committed(out: Path) -> dict[int, float]:
    """The checkpoints of a run, and the seconds that each took to be written."""
    seconds = {}
    for path in (out / "checkpoints").glob("[0-9]*/_CHECKPOINT_METADATA"):
        # Of one that was being deleted when the run was killed the rest may be there.
        if path.parent.name.isdigit():
            told = json.loads(path.read_text())
            taken = told["commit_timestamp_nsecs"] - told["init_timestamp_nsecs"]
            seconds[int(path.parent.name)] = taken / 1e9
    return seconds


@pytest.mark.thorough
@pytest.mark.fault("T2")
def test_it_is_killed_at_any_moment_and_loses_little_more_than_an_interval(config, tmp_path, capsys):
    """At most an interval of steps, and those made in the seconds that a checkpoint takes to be written.

    Intervals are longer than that here, as they are where steps take seconds.
    """
    log, draw = tmp_path / "log", random.Random(0)
    server = Server(config, log, "--steps", str(3 * EVERY), "--save-every", str(EVERY))
    for name in ("whole", "warm"):
        began = time.monotonic()
        assert server.run(tmp_path / name) == 0, log.read_text()
    # As long as a run takes that compiles nothing, or most would be done before they are killed.
    seconds = time.monotonic() - began
    out, done, turns, working = tmp_path / "run", 0, 0, 0
    most, beyond, longest = 0, 0.0, max(committed(tmp_path / "whole").values())
    # Many are to come while steps are made and checkpoints written, and not only in preparations.
    while done < KILLS or (working <= KILLS / 3 and done < 20 * KILLS):
        turns, before = turns + 1, len(logged(out))
        code = server.run(out, draw.uniform(0.3, seconds))
        saved = committed(out)
        longest = max(longest, *saved.values(), 0.0)
        if code == 0:
            # It was faster: another folder for the rest of the kills.
            assert arrays(out, 3 * EVERY) == arrays(tmp_path / "whole", 3 * EVERY)
            shutil.rmtree(out)
            continue
        assert code == -signal.SIGKILL, (code, log.read_text()[-2000:])
        done += 1
        lines = logged(out)
        working += len(lines) != before
        most = max(most, len(lines) - max(saved, default=0))
        after = [line["seconds"] for line in lines if line["step"] > max(saved, default=0) + EVERY]
        beyond = max(beyond, sum(after))
    assert server.run(out) == 0, log.read_text()[-2000:]
    server.close()
    assert arrays(out, 3 * EVERY) == arrays(tmp_path / "whole", 3 * EVERY)
    assert made(out) == made(tmp_path / "whole")
    assert not list((out / "checkpoints").glob("*tmp*"))
    with capsys.disabled():
        print(
            f"\n{done} kills in {turns} runs, {working} of them among steps; at most {most} made again,",
            end="",
        )
        print(
            f" {EVERY} an interval; {beyond:.2f} s beyond one, where a save took up to {longest:.2f} s",
            end="",
        )
    assert most < 2 * EVERY and beyond < longest and working > KILLS / 3


@pytest.mark.slow
@pytest.mark.fault("T11")
def test_it_goes_on_to_the_bit_from_every_checkpoint(config, tmp_path):
    log = tmp_path / "log"
    server, whole = Server(config, log, "--steps", "40", "--keep-last", "99"), tmp_path / "whole"
    assert server.run(whole) == 0
    for step in range(5, 40, 5):
        out = tmp_path / f"from {step}".replace(" ", "_")
        shutil.copytree(whole, out)
        for path in (out / "checkpoints").iterdir():
            if int(path.name) > step:
                shutil.rmtree(path)
        assert server.run(out) == 0
        for later in range(step + 5, 45, 5):
            assert arrays(out, later) == arrays(whole, later), (step, later)
        assert made(out) == made(whole)
    server.close()


def pair(config: Path, out: Path, *more: str) -> list[subprocess.Popen]:
    """Two processes of four devices each."""
    address = small.address()
    command = [sys.executable, "-m", "fvdm_jax.train", str(config), "--out", str(out), "--synthetic"]
    command += ["--steps", "100000", "--save-every", "20", "--batch", "8", *more]
    command += ["--coordinator", address, "--hosts", "2", "--host"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen([*command, str(i)], cwd=ROOT, env=environment(4), **pipes) for i in range(2)]


def started(out: Path, processes: list[subprocess.Popen], steps: int = 30) -> None:
    until = time.monotonic() + 300
    while not (
        (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) > steps
    ):
        assert time.monotonic() < until and all(process.poll() is None for process in processes)
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.fault("T9")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
@pytest.mark.parametrize("which", [0, 1], ids=["first", "second"])
def test_when_one_of_two_processes_is_lost_the_other_ends_and_says_so(
    config, tmp_path, number, which, capsys
):
    out = tmp_path / "run"
    processes = pair(config, out)
    started(out, processes)
    processes[which].send_signal(number)
    began = time.monotonic()
    said = processes[1 - which].communicate(timeout=120)
    seconds = time.monotonic() - began
    processes[which].kill()
    processes[which].communicate()
    with capsys.disabled():
        print(f"\nended after {seconds:.1f} s, exit code {processes[1 - which].returncode}", end="")
    if which == 0 and number == signal.SIGKILL:
        # jax, or what it talks through, ends at once a process whose coordinator is gone, with much ado.
        assert processes[1].returncode == -signal.SIGABRT, said
    else:
        assert processes[1 - which].returncode == 75, said
        assert f"error: process {which} of 2 has not been heard of for 16 s, at step" in said[1]
    assert seconds < 20


@pytest.mark.slow
@pytest.mark.fault("T1")
@pytest.mark.parametrize("told", [0, 1])
def test_two_processes_agree_where_to_stop(config, tmp_path, told, capsys):
    out = tmp_path / "run"
    processes = pair(config, out)
    started(out, processes)
    began = time.monotonic()
    processes[told].terminate()
    said = [process.communicate(timeout=120) for process in processes]
    seconds = time.monotonic() - began
    assert [process.returncode for process in processes] == [143, 143], said
    saved = max(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())
    assert f"stopped by SIGTERM after step {saved}, which is saved" in said[0][1].replace("\n", " ")
    with capsys.disabled():
        print(f"\nboth had saved step {saved} and ended after {seconds:.1f} s", end="")


def test_seeds_of_runs_do_not_know_the_machine():
    """What is drawn comes of the seed and the step alone."""
    from fvdm_jax.data.feed import Sizes, invented

    first, second = (invented((2, 2, 2), Sizes(4, 4, 4, 3), 7, 1, (0, 1)) for _ in range(2))
    a, b = next(first.stream(5)), next(second.stream(5))
    assert np.array_equal(a.latents, b.latents) and np.array_equal(a.states, b.states)
