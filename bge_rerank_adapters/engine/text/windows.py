"""Documents that are too long for the model, as overlapping windows that end between words."""

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from tokenizers import Encoding, Tokenizer

from bge_rerank_adapters.engine.text.batches import encode_texts
from bge_rerank_adapters.engine.text.pairs import (
    Lengths,
    PairTemplate,
    TokenIds,
    TokenizedPairs,
    TokenPair,
)
from bge_rerank_adapters.engine.text.tokenizer import PairTokenizer, without_surrogates
from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.settings import EngineSettings, check_window_sizes

Span = tuple[int, int]

# What the tokenizer's records of one batch may take: offsets are kept of every token.
_CHARACTERS_PER_BATCH = 2_000_000
# Scripts written without spaces, where a cut between any two characters is one between words:
# Thai, Lao, Burmese, Khmer, kana, Han.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff]"
)
_SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
# Of a window, where the overlap is left open.
_OVERLAP_PART = 4


@dataclass(frozen=True, slots=True)
class _Document:
    """A text that has been read once.

    Attributes:
        ids: int64, shape (tokens,), no special tokens.
        before: The instruction's ids, which stand before those of every window.
        text: The text itself.
        spans: Character offsets of each token in `text`; none where one window takes it whole.
    """

    ids: TokenIds
    before: TokenIds
    text: str
    spans: list[Span]

    def windows(self, size: int, overlap: int, most: int) -> Iterator[tuple[TokenIds, Span]]:
        """Yield the token ids and characters of each window of the first `most` tokens.

        Where all of the text fits, that is one of all of it.
        """
        if len(self.ids) <= min(size, most):
            yield np.concatenate((self.before, self.ids)), (0, len(self.text))
            return
        tokens = min(len(self.ids), most)
        for start, end in cut_windows(
            tokens, size=size, overlap=overlap, starts_word=self.starts_word
        ):
            yield np.concatenate((self.before, self.ids[start:end])), self.span(start, end)

    def starts_word(self, token: int) -> bool:
        """Return whether a cut before a token is one between words."""
        start = self.spans[token][0]
        return start >= self.spans[token - 1][1] and _is_between_words(self.text, start)

    def span(self, start: int, end: int) -> Span:
        """Return the characters of the tokens from `start` to before `end`, outer spaces aside."""
        first, last = self.spans[start][0], self.spans[end - 1][1]
        # A tokenizer that drops accents counts those behind the last letter to no token.
        while last < len(self.text) and _is_mark(self.text[last]):
            last += 1
        inner = self.text[first:last]
        return first + len(inner) - len(inner.lstrip()), first + len(inner.rstrip())


class WindowTokenizer(PairTokenizer):
    """Turns pairs into token ids, and what is too long for one row into rows that overlap.

    The query is cut as `PairTokenizer` does; nothing of a document is. Every document is read
    once, whatever the number of its windows.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        query_max_length: int | None = None,
        template: PairTemplate | None = None,
        query_truncation_side: str = "right",
        window_tokens: int | None = None,
        window_overlap_tokens: int | None = None,
    ) -> None:
        """Take over a tokenizer, which must not be changed afterwards.

        Args:
            tokenizer: It must put special tokens around a pair.
            max_length: Most tokens of a row, special tokens included, but for the `extra_tokens`
                that a template may add.
            query_max_length: Most tokens of a query; `None` is three quarters of `max_length`.
            template: What stands around a pair; `None` is what the tokenizer puts there.
            query_truncation_side: As of `PairTokenizer`.
            window_tokens: Most document tokens of a window; `None`, like a number that is too
                large, is all that fit beside the query.
            window_overlap_tokens: How many tokens two neighbours have in common at least; `None`
                is a quarter of a window, and a number above half of one is taken as half.

        Raises:
            SettingsError: The lengths leave no room for a document, or windows cannot advance.
            CheckpointError: The tokenizer has no template for pairs.
        """
        super().__init__(
            tokenizer,
            max_length=max_length,
            query_max_length=query_max_length,
            template=template,
            query_truncation_side=query_truncation_side,
        )
        check_window_sizes(window_tokens, window_overlap_tokens, max_length=max_length)
        self._tokenizer.no_truncation()
        self._window_tokens = window_tokens
        self._overlap_tokens = window_overlap_tokens
        self._instruction = self._template.passage_instruction

    def tokenize(
        self, pairs: Sequence[tuple[str, str]], lengths: Lengths | None = None
    ) -> TokenizedPairs:
        """Return the windows of (query, document) pairs; each distinct text is read once.

        Args:
            pairs: n pairs; may be empty.
            lengths: How much is read of them, before windows are made; `None` is all.

        Returns:
            The windows of the distinct pairs, each with its `span`, and for each of the n pairs
            which windows are of it.
        """
        lengths = lengths or Lengths(self.query_max_length)
        first: dict[tuple[str, str], int] = {}
        for index, pair in enumerate(pairs):
            first.setdefault(pair, index)
        queries = self._encode((query for query, _ in first), self._template.query_instruction)
        sizes = {query: self._window_size(ids, lengths) for query, ids in queries.items()}
        documents = self._read(
            list(dict.fromkeys(document for _, document in first)),
            longest_whole=min((min(each) for each in sizes.values()), default=0),
        )
        rows: list[TokenPair] = []
        groups: list[range] = []
        for (query, text), index in first.items():
            begin, (size, most) = len(rows), sizes[query]
            truncated = len(documents[text].ids) > most
            for ids, span in documents[text].windows(size, self._overlap(size), most):
                row = self._join(queries[query], ids, index, lengths)
                rows.append(replace(row, span=span, truncated=truncated))
            groups.append(range(begin, len(rows)))
        place = {pair: number for number, pair in enumerate(first)}
        return TokenizedPairs(rows, [place[pair] for pair in pairs], groups)

    def _window_size(self, query: TokenIds, lengths: Lengths) -> tuple[int, int]:
        """Return most tokens of a window beside a query, and of all that is read of a document."""
        room, most = (
            self._document_room(min(len(query), lengths.query), each) - self._instruction_tokens
            for each in (self._lengths, lengths)
        )
        return (room if self._window_tokens is None else min(room, self._window_tokens)), most

    def _overlap(self, size: int) -> int:
        if self._overlap_tokens is None:
            return size // _OVERLAP_PART
        return min(self._overlap_tokens, size // 2)

    def _read(self, texts: list[str], *, longest_whole: int) -> dict[str, _Document]:
        """Return each text's tokens, and where they stand if they may need more than one window."""
        documents: dict[str, _Document] = {}
        start = 0
        while start < len(texts):
            end, characters = start, 0
            while end < len(texts) and (end == start or characters < _CHARACTERS_PER_BATCH):
                characters += len(texts[end])
                end += 1
            batch = texts[start:end]
            for text, encoding in zip(batch, self._encode_with_offsets(batch), strict=True):
                documents[text] = self._document(text, encoding, longest_whole=longest_whole)
            start = end
        return documents

    def _document(self, text: str, encoding: Encoding, *, longest_whole: int) -> _Document:
        """Return a text's tokens, parted from those of the instruction before it."""
        ids = self._ids(encoding)
        bare, skipped = len(self._instruction.rstrip()), len(self._instruction)
        before, longest_before = 0, min(self._instruction_tokens, len(ids))
        # Read once and only where needed: the library makes a list of all tokens' each time.
        offsets: list[Span] = []
        if longest_before or len(ids) > longest_whole:
            offsets = encoding.offsets
        while before < longest_before and offsets[before][1] <= bare:
            before += 1
        spans: list[Span] = []
        if len(ids) - before > longest_whole:
            spans = [
                (max(0, start - skipped), max(0, end - skipped))
                for start, end in _spans(self._instruction + text, offsets)
            ][before:]
        return _Document(ids[before:], ids[:before], text, spans)

    def _encode_with_offsets(self, documents: list[str]) -> list[Encoding]:
        texts = [self._instruction + document for document in documents]
        try:
            return encode_texts(self._tokenizer, texts, offsets=True)
        except (TypeError, UnicodeEncodeError):
            valid = [without_surrogates(text) for text in texts]
            return encode_texts(self._tokenizer, valid, offsets=True)


def tokenizer_maker(settings: EngineSettings) -> Callable[..., PairTokenizer]:
    """Return what makes the tokenizer that treats long documents as the settings ask."""
    side = settings.query_truncation_side
    if settings.long_documents == "truncate":
        return partial(PairTokenizer, query_truncation_side=side)
    return partial(
        WindowTokenizer,
        query_truncation_side=side,
        window_tokens=settings.window_tokens,
        window_overlap_tokens=settings.window_overlap_tokens,
    )


def cut_windows(
    tokens: int, *, size: int, overlap: int, starts_word: Callable[[int], bool]
) -> list[Span]:
    """Return (start, end) of the windows that cover a document's tokens, in order.

    Each is at most `size` long and shares at least `overlap` tokens with the one before it. They
    begin and end where `starts_word` says that a cut may be, unless a single word is too long for
    that. The last one reaches back so that it is about as long as the others: a short rest on its
    own would be scored without what it belongs to.

    Args:
        tokens: Of the document; for 0 there is one window, an empty one.
        size: Most tokens of a window, at least 1.
        overlap: At least 0 and below `size`.
        starts_word: Whether a cut before the token at a place, from 1 to `tokens - 1`, is allowed.

    Raises:
        SettingsError: No window could advance with such a size and overlap.
    """
    if not 0 <= overlap < size:
        raise SettingsError(
            f"Windows need a size of at least 1 and an overlap from 0 to below it, got {size} and "
            f"{overlap}; make max_length larger or the overlap smaller."
        )
    windows: list[Span] = []
    start = end = 0
    while tokens - start > size:
        end = _last_place(max(start + overlap, end) + 1, start + size, starts_word)
        windows.append((start, end))
        following = _last_place(start + 1, end - overlap, starts_word)
        if tokens - following < size:
            following = _first_place(tokens - size, following, starts_word)
        start = following
    return [*windows, (start, tokens)]


def _last_place(low: int, high: int, allowed: Callable[[int], bool]) -> int:
    return next((place for place in range(high, low - 1, -1) if allowed(place)), high)


def _first_place(low: int, high: int, allowed: Callable[[int], bool]) -> int:
    return next((place for place in range(low, high) if allowed(place)), high)


def _is_between_words(text: str, position: int) -> bool:
    """Return whether a cut before the character at a position leaves all words whole."""
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


def _spans(text: str, offsets: list[Span]) -> list[Span]:
    """Return the characters in `text` of offsets in `without_surrogates(text)`."""
    if not _SURROGATE_PAIR.search(text):
        return offsets
    origins = _origins(text)
    return [(origins[start], origins[end]) for start, end in offsets]


def _origins(text: str) -> list[int]:
    """Return where in `text` each character of `without_surrogates(text)` begins, and its end."""
    origins: list[int] = []
    position = 0
    while position < len(text):
        origins.append(position)
        position += 2 if _SURROGATE_PAIR.match(text, position) else 1
    return [*origins, len(text)]
