"""Video diffusion in which every frame has its own noise level.

import fvdm_jax

model = fvdm_jax.load()
model.sample("a red circle moves up", keep={0: "first.png"}).save("up.mp4")
"""

__version__ = "0.1.0"


def load(model=None):
    """A `session.Session` of a model's folder, by default the bundled one; its `sample` makes videos."""
    # Here, so that `import fvdm_jax` starts at once, and programs refuse before jax is there.
    from fvdm_jax.session import Session

    return Session() if model is None else Session(model)
