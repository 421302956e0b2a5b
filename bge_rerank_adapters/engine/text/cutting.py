"""Cuts a tokenised document into overlapping windows that end between words."""

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from bge_rerank_adapters.engine.text.pairs import TokenIds
from bge_rerank_adapters.errors import SettingsError

Span = tuple[int, int]
"""Start and end, of characters or of tokens."""

# Scripts without spaces, which may be cut between any two characters: Thai, Lao, Burmese, Khmer,
# kana, Han.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff]"
)


@dataclass(frozen=True, slots=True)
class TokenizedDocument:
    """The tokens of a document.

    Attributes:
        ids: int64, shape (tokens,), no special tokens.
        before: The instruction's ids, which precede those of every window.
        text: The text itself.
        spans: Character offsets of each token in `text`; empty if the text fits one window.
    """

    ids: TokenIds
    before: TokenIds
    text: str
    spans: list[Span]

    def windows(self, size: int, overlap: int, max_tokens: int) -> Iterator[tuple[TokenIds, Span]]:
        """Yield the token ids and span of each window of the first `max_tokens` tokens.

        A text that fits one window is yielded whole.
        """
        if len(self.ids) <= min(size, max_tokens):
            yield np.concatenate((self.before, self.ids)), (0, len(self.text))
            return
        tokens = min(len(self.ids), max_tokens)
        for start, end in cut_windows(
            tokens, size=size, overlap=overlap, starts_word=self.starts_word
        ):
            yield np.concatenate((self.before, self.ids[start:end])), self.span(start, end)

    def starts_word(self, token: int) -> bool:
        """Return whether a cut before a token is between words."""
        start = self.spans[token][0]
        return start >= self.spans[token - 1][1] and _is_between_words(self.text, start)

    def span(self, start: int, end: int) -> Span:
        """Return the span in the text of the tokens in [start, end), without spaces around it."""
        first, last = self.spans[start][0], self.spans[end - 1][1]
        # Accents that a tokenizer drops belong to no token.
        while last < len(self.text) and _is_mark(self.text[last]):
            last += 1
        inner = self.text[first:last]
        return first + len(inner) - len(inner.lstrip()), first + len(inner.rstrip())


def cut_windows(
    tokens: int, *, size: int, overlap: int, starts_word: Callable[[int], bool]
) -> list[Span]:
    """Return (start, end) of the windows that cover a document's tokens, in order.

    Each has at most `size` tokens and shares at least `overlap` with the one before it. They begin
    and end where `starts_word` allows a cut, unless a single word is too long for that. The last
    one starts early enough to be about as long as the others, so that it has enough context.

    Args:
        tokens: Number of tokens of the document; for 0 there is one empty window.
        size: Maximum tokens of a window, at least 1.
        overlap: At least 0 and below `size`.
        starts_word: Whether a cut before a token, from 1 to `tokens - 1`, is allowed.

    Raises:
        SettingsError: Windows could not advance with this size and overlap.
    """
    if not 0 <= overlap < size:
        raise SettingsError(
            f"Windows need a size of at least 1 and an overlap from 0 to below it, got {size} and "
            f"{overlap}; make max_length larger or the overlap smaller."
        )
    windows: list[Span] = []
    start = end = 0
    while tokens - start > size:
        end = _last_allowed(max(start + overlap, end) + 1, start + size, starts_word)
        windows.append((start, end))
        following = _last_allowed(start + 1, end - overlap, starts_word)
        if tokens - following < size:
            following = _first_allowed(tokens - size, following, starts_word)
        start = following
    return [*windows, (start, tokens)]


def _last_allowed(low: int, high: int, allowed: Callable[[int], bool]) -> int:
    return next((cut for cut in range(high, low - 1, -1) if allowed(cut)), high)


def _first_allowed(low: int, high: int, allowed: Callable[[int], bool]) -> int:
    return next((cut for cut in range(low, high) if allowed(cut)), high)


def _is_between_words(text: str, position: int) -> bool:
    """Return whether a cut before the character at a position is between words."""
    if not 0 < position < len(text):
        return True
    before, after = text[position - 1], text[position]
    if before.isspace() or after.isspace():
        return True
    if _is_mark(after):
        return False
    return bool(_UNSPACED.match(before) or _UNSPACED.match(after))


def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")
