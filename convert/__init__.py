"""Other people's files into our trees, and back: one table a network."""

from .table import Rule, convert

__all__ = ["Rule", "convert"]
