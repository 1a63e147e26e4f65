"""Other people's files into our trees, and back: one table a network."""

# First, since it has programs end well that are stopped while they are imported.
from fvdm_jax import __version__ as __version__

from .table import Rule, convert

__all__ = ["Rule", "convert"]
