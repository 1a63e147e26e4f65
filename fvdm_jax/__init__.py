"""Video diffusion in which every frame has its own noise level."""

import os
import sys

__version__ = "0.1.0"


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
