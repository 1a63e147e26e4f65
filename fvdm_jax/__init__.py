"""Video diffusion in which every frame has its own noise level."""
