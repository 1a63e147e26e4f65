"""Video diffusion in which every frame has its own noise level."""

__version__ = "0.1.0"
