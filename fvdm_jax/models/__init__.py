"""The networks: one a file, none of which knows what diffusion is."""
