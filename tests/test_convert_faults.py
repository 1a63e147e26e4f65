"""What befalls a conversion: it is killed or stopped, the disk is full, a link leads elsewhere."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_convert_program import ROOT, contents, convert, equal, expected, put, tree, weights

from convert import write
from convert.__main__ import main
from fvdm_jax.program import Refusal, run


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return put(tmp_path_factory.mktemp("source"), weights("dit_t2v"))


KILLS = """
import os, random, signal, sys, time
import orbax.checkpoint
from convert import jobs, sources
from convert import wan, write
from convert.__main__ import main
from convert.table import unplan
from convert.tensors import Planned
from fvdm_jax.program import run

source, out, trials = sys.argv[1], sys.argv[2], int(sys.argv[3])


def start(name):
    child = os.fork()
    if not child:
        os._exit(run(main, [source, name]))
    return child


began = time.perf_counter()
os.waitpid(start(f"{out}-whole"), 0)
took, chance = time.perf_counter() - began, random.Random(0)
for trial in range(trials):
    child = start(f"{out}{trial}")
    time.sleep(chance.uniform(0, 1.5 * took))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


@pytest.mark.thorough
def test_it_survives_being_killed_at_any_moment(tmp_path):
    """Twenty times, of a parent that has imported everything, so that the moments are moments of the work:
    never is there a folder under a final name that is not whole, and the next run clears what was left."""
    source = put(tmp_path / "in", weights("dit_t2v"))
    convert(source, tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    killed = [sys.executable, "-W", "ignore", "-c", KILLS, source, tmp_path / "out", "20"]
    subprocess.run(list(map(str, killed)), cwd=ROOT, check=True, capture_output=True, timeout=300)
    left = [path for path in tmp_path.iterdir() if path.name.startswith("out")]
    # Both kinds of moment were met.
    assert 1 < len(left) < 21 and all(contents(path) == whole for path in left)
    convert(source, tmp_path / "last")
    assert contents(tmp_path / "last") == whole
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_full_disk_leaves_nothing(tmp_path, source):
    """A limit on the size of files stands for the disk: it fails at the same writes, with another number."""
    limited = ["bash", "-c", 'ulimit -f 20; exec "$@"', "-", sys.executable, "-m", "convert"]
    command = [*limited, str(source), str(tmp_path / "out")]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 2, child.stderr
    assert child.stderr.strip().splitlines()[-1].startswith("error: "), child.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["/proc/out", "absent/out", "file/out"])
def test_a_place_that_cannot_be_written_is_refused(tmp_path, source, out):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal):
        convert(source, out if out.startswith("/") else tmp_path / out)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_is_to_be_made_at_a_link_that_leads_nowhere(tmp_path, source):
    """It is made where the link leads to, and the link stays."""
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    convert(source, tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and contents(tmp_path / "elsewhere")


def test_files_of_a_hubs_cache_are_links(tmp_path, source):
    """A snapshot's names lead to blobs that are named by their hashes, and have no ending."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(source.parent.iterdir())):
        shutil.copy(path, blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    convert(snapshot, tmp_path / "out")
    assert equal(tree(tmp_path / "out/dit"), expected("dit_t2v"))


def test_ctrl_c_in_the_midst_leaves_nothing(tmp_path, source, monkeypatch):
    plain = write.tree

    def stopped(*arguments):
        plain(*arguments)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(write, "tree", stopped)
    before = sorted(tmp_path.rglob("*"))
    # A shell that starts tests in the background has them ignore it.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run(main, [str(source), str(tmp_path / "out")]) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert sorted(tmp_path.rglob("*")) == before
