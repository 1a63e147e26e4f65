"""What the processes of a run do alike: all of them have to call these, at the same place."""

import jax
import numpy as np


def most(number: float) -> float:
    """The largest of the numbers that the processes give."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return float(np.max(multihost_utils.process_allgather(np.float32(number))))


def meet(where: str) -> None:
    """Returns when all processes are here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(where)
