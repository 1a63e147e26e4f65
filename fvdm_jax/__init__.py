"""Video diffusion in which every frame has its own noise level.

import fvdm_jax

model = fvdm_jax.load()
model.sample("a red circle moves up", keep={0: "first.png"}).save("up.mp4")
"""

import os
import sys

__version__ = "0.1.0"


def load(model=None):
    """A `session.Session` of a model's folder, by default the bundled one; its `sample` makes videos."""
    # Here, so that `import fvdm_jax` starts at once, and programs refuse before jax is there.
    from fvdm_jax.session import Session

    return Session() if model is None else Session(model)


def _stopped(kind, *told) -> None:
    """Ends a program as `program.run` does, where Ctrl-C comes while its modules are still imported."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, *told)
        return
    print("stopped", file=sys.stderr, flush=True)
    os._exit(130)


# "-m" stands there while Python looks for the module that it is to run, and so for no other program's import.
if sys.argv and (sys.argv[0] == "-m" or os.path.basename(sys.argv[0]).startswith("fvdm-")):
    sys.excepthook = _stopped
