"""Tokenises batches of texts; after a fork without the threads that it has lost."""

import os

from tokenizers import Encoding, Tokenizer

# The tokenizers library's own variable, and its values for false.
_PARALLELISM = "TOKENIZERS_PARALLELISM"
_OFF = ("", "off", "false", "f", "no", "n", "0")

_forked = False


def encode_texts(tokenizer: Tokenizer, texts: list[str], *, offsets: bool) -> list[Encoding]:
    """Return the encoding of each text, without special tokens.

    Args:
        tokenizer: Not changed.
        texts: May have lone surrogates.
        offsets: Whether encodings need the character offsets of tokens, which takes longer.

    Raises:
        TypeError: A text has a lone surrogate, and this release of tokenizers refuses it.
        UnicodeEncodeError: Likewise.
    """
    if _threads_are_gone():
        return [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    # Tokenizers before 0.20 have no faster way without offsets.
    fast = None if offsets else getattr(tokenizer, "encode_batch_fast", None)
    return list((fast or tokenizer.encode_batch)(texts, add_special_tokens=False))


def _threads_are_gone() -> bool:
    """Return whether a batch might wait for ever for threads of the parent process.

    The library detects forks itself, unless its variable is set.
    """
    return _forked and os.environ.get(_PARALLELISM, "").strip().lower() not in _OFF


def _remember_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_remember_fork)
