"""Whether a host that is told to go has the time to save: said at the start of a run."""

import contextlib
import os
import time
from pathlib import Path

import jax
import numpy as np

from fvdm_jax.program import flush
from fvdm_jax.together import most

GRACE = 15, 30
"""Seconds that a pod has from SIGTERM on when its node on GKE is preempted: as a rule, and at most unless it
is set otherwise. Source: GKE's documentation of Spot VMs."""
PROBE = 2**26
"""Bytes at most that are written to learn how fast a folder takes them."""


def told(folder: Path, state, every: int) -> str:
    """A line: bytes of a checkpoint, seconds to write it, and whether a preempted pod has as many.

    The seconds are of this folder now, by the slowest host: a few bytes are written to it and to the disk,
    and taken away. Copying from the device, and a checkpoint that is being written when the signal comes, add
    to them. To be called by all processes.
    """
    needed = held(state)
    seconds = most(needed * _seconds_a_byte(folder, min(needed, PROBE)))
    line = f"a checkpoint is at most {needed / 2**20:,.1f} MiB of each host, every {every} steps: "
    if not np.isfinite(seconds):
        return line + "how long it takes to write cannot be told now"
    line += f"about {seconds:,.1f} s to write, where a preempted pod has {GRACE[0]} to {GRACE[1]} s"
    if seconds > GRACE[0]:
        sure = "may have" if seconds <= GRACE[1] else "has"
        line += f"; it {sure} too few, and then goes on from the last checkpoint: save often"
    return line


def held(state) -> int:
    """Bytes of a tree of arrays, or of shapes, that this host has: each part once."""
    total = 0
    for leaf in jax.tree.leaves(state):
        places = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
        part = int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
        total += part * len({str(place) for place in places})
    return total


def _seconds_a_byte(folder: Path, count: int) -> float:
    """What one of `count` bytes takes to the disk; infinite where they cannot be written."""
    path = folder / f".probe-{jax.process_index()}"
    block = os.urandom(2**20)
    began = time.perf_counter()
    try:
        with open(path, "wb") as file:
            for size in np.diff([*range(0, count, len(block)), count]):
                file.write(block[:size])
        flush(path)
        return (time.perf_counter() - began) / max(count, 1)
    except OSError:
        return np.inf
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
