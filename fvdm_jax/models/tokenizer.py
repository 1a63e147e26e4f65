"""Prompts to tokens."""

import numpy as np

PAD, END, OFFSET = 0, 1, 3
"""ByT5's numbering: 0 pads, 1 ends, 2 is unknown, bytes follow."""

VOCABULARY = OFFSET + 256


def byte_tokens(prompts: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, mask), each [b length]: UTF-8 bytes, an end token, then padding, where mask is False.

    A prompt longer than length − 1 bytes is cut there; `byte_length` says whether it is.
    """
    tokens = np.full((len(prompts), length), PAD, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        ids = [byte + OFFSET for byte in prompt.encode()[: length - 1]] + [END]
        row[: len(ids)] = ids
    return tokens, tokens != PAD


def byte_length(prompt: str) -> int:
    """Tokens that the whole prompt would take, its end token included."""
    return len(prompt.encode()) + 1
