"""What `python -m fvdm_jax.evaluate` is made of: cases, their clips, their scores, and what is shown."""
