"""Prompts to tokens."""

import contextlib
import dataclasses
import html
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from fvdm_jax.program import Refusal

PAD, END, OFFSET = 0, 1, 3
"""ByT5's numbering, and in its first three umT5's: 0 pads, 1 ends, 2 is unknown, bytes follow."""

VOCABULARY = OFFSET + 256
"""Tokens of `byte_tokenizer`."""

LARGEST = 2**28
"""Bytes of a file from which on it is not read: umT5's largest has 17 million, its weights 11 billion."""

_RIGHT = "give spiece.model or tokenizer.json as google/umt5-xxl has them"
# The last is a character that hardly any vocabulary has.
_PROBE = "a 猫 \ue000"


def clean(prompt: str) -> str:
    """The prompt as Wan's programs clean it: encodings mended, entities resolved, single spaces.

    Full-width punctuation becomes ASCII by it, control characters vanish, and what is no character (the lone
    surrogates by which Python spells undecodable bytes of an argument) becomes U+FFFD. Source: Wan2.1,
    wan/modules/tokenizers.py, `whitespace`.
    """
    import ftfy  # Here, since it takes a twelfth of a second.

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A vocabulary and what all of them have in common: cleaning, cutting, an end token, padding.

    `encode` gives the tokens of a clean prompt, without an end; all are below `vocabulary`.
    """

    encode: Callable[[str], list[int]]
    vocabulary: int

    def __call__(self, prompts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32, mask bool), each [b length]; the mask is True up to and with the end token.

        Of a prompt that is too long the first length − 1 tokens are kept; `count` says whether it is.
        """
        tokens = np.full((len(prompts), length), PAD, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, read, prompt in zip(tokens, mask, prompts, strict=True):
            ids = [*self.encode(clean(prompt))[: length - 1], END]
            row[: len(ids)], read[: len(ids)] = ids, True
        return tokens, mask

    def count(self, prompt: str) -> int:
        """Tokens that the whole prompt would take, its end token included."""
        return len(self.encode(clean(prompt))) + 1


def _bytes(prompt: str) -> list[int]:
    return [byte + OFFSET for byte in prompt.encode()]


byte_tokenizer = Tokenizer(_bytes, VOCABULARY)
"""ByT5's tokens, one for each byte of UTF-8; the bundled model reads them."""


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a SentencePiece model or a tokenizer.json; the contents tell which, not the name.

    Both give the tokens of transformers' T5TokenizerFast, but a SentencePiece model knows no special tokens
    by name: of "</s>" in a prompt it makes ordinary ones. Raises Refusal, named `path`, where the file is
    neither, or does not pad with 0 and end with 1.
    """
    data = _read(path)
    load = _load_json if data[:64].lstrip().startswith(b"{") else _load_sentencepiece
    return load(path, data)


def _read(path: Path) -> bytes:
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise Refusal(path, "is no ordinary file", _RIGHT)
        if not 0 < found.st_size < LARGEST:
            raise Refusal(path, f"has {found.st_size} bytes, which no tokenizer has", _RIGHT)
        return Path(path).read_bytes()
    except (OSError, ValueError) as failure:
        reason = getattr(failure, "strerror", None) or str(failure)
        raise Refusal(path, f"cannot be read: {reason}", _RIGHT) from failure


@contextlib.contextmanager
def _refusing(path: Path, kind: str) -> Iterator[None]:
    """What a library raises within it, of a file that is damaged or another kind, becomes a Refusal."""
    try:
        yield
    except BaseException as broken:
        # A panic of tokenizers, as of a damaged table of characters, is no Exception; its class has no home.
        if not isinstance(broken, Exception) and type(broken).__name__ != "PanicException":
            raise
        raise Refusal(path, f"is not {kind}, or is damaged", _RIGHT) from broken


def _load_sentencepiece(path: Path, data: bytes) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor

    with _refusing(path, "a SentencePiece model"):
        model = SentencePieceProcessor(model_proto=data)
    _pieces(path, model, _PROBE)
    _check(path, model.pad_id(), model.eos_id(), [model.eos_id()])
    return Tokenizer(partial(_pieces, path, model), model.get_piece_size())


def _pieces(path: Path, model, prompt: str) -> list[int]:
    """The model's tokens, but a run of what it does not know is one unknown token.

    umT5's model itself would spell the unknown in bytes; transformers' fast tokenizer, through which Wan's
    prompts go, does not.
    """
    unknown, ids = model.unk_id(), []
    with _refusing(path, "a SentencePiece model"):
        for token in model.encode(prompt):
            token = unknown if model.is_byte(token) else token
            if token != unknown or ids[-1:] != [unknown]:
                ids.append(token)
    return ids


def _load_json(path: Path, data: bytes) -> Tokenizer:
    from tokenizers import Tokenizer as Model

    with _refusing(path, "a tokenizer.json"):
        model = Model.from_buffer(data)
        # The file has those of its last use, which would cut and pad before we do.
        model.no_truncation()
        model.no_padding()
        ended = model.encode(_PROBE).ids
    ids = _words(path, model, _PROBE)
    added = ended[len(ids) :] if ended[: len(ids)] == ids else ended
    _check(path, model.token_to_id("<pad>"), model.token_to_id("</s>"), added)
    return Tokenizer(partial(_words, path, model), model.get_vocab_size())


def _words(path: Path, model, prompt: str) -> list[int]:
    with _refusing(path, "a tokenizer.json"):
        return model.encode(prompt, add_special_tokens=False).ids


def _check(path: Path, pad: int | None, end: int | None, added: list[int]) -> None:
    """Raises Refusal unless what the file's tokenizer adds to a prompt is what a Tokenizer adds."""
    if (pad, end, added) != (PAD, END, [END]):
        what = f"pads with {pad}, ends with {end} and adds {added[:9]} to a prompt"
        raise Refusal(path, f"{what}; {PAD}, {END} and [{END}] are needed", _RIGHT)
