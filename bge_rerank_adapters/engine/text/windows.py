"""Tokenises documents that are too long for the model as overlapping windows."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from tokenizers import Encoding, Tokenizer

from bge_rerank_adapters.engine.text.cutting import Span, TokenizedDocument
from bge_rerank_adapters.engine.text.pairs import (
    Lengths,
    PairTemplate,
    TokenIds,
    TokenizedPairs,
    TokenPair,
)
from bge_rerank_adapters.engine.text.tokenizer import PairTokenizer
from bge_rerank_adapters.settings import EngineSettings, check_window_sizes

# Bounds the memory that a batch's encodings take, which hold the offsets of every token.
_CHARACTERS_PER_BATCH = 2_000_000
_SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
# The default overlap is a window's size divided by this.
_OVERLAP_DIVISOR = 4


class WindowTokenizer(PairTokenizer):
    """Turns pairs into token ids, one row for each window of the document.

    The query is cut as in `PairTokenizer`; the document is not. Each distinct document is tokenised
    once, however many windows it has.
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
            max_length: As for `PairTokenizer`, as are the next three.
            query_max_length: Maximum tokens of a query.
            template: The tokens around a pair.
            query_truncation_side: Where a query that is too long is cut.
            window_tokens: Maximum document tokens of a window; `None`, or a number that is too
                large, is all that fit beside the query.
            window_overlap_tokens: Minimum tokens that neighbouring windows share; `None` is a
                quarter of a window, and more than half a window is reduced to half.

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
        """Return the windows of (query, document) pairs; each distinct text is tokenised once.

        Args:
            pairs: n pairs; may be empty.
            lengths: How many tokens of them are read, before windows are made; `None` is all.

        Returns:
            The windows of the distinct pairs, each with its `span`, and for each of the n pairs
            its windows.
        """
        lengths = lengths or Lengths(self.query_max_length)
        first: dict[tuple[str, str], int] = {}
        for index, pair in enumerate(pairs):
            first.setdefault(pair, index)
        queries = self._encode((query for query, _ in first), self._template.query_instruction)
        sizes = {query: self._max_tokens(ids, lengths) for query, ids in queries.items()}
        documents = self._read(
            list(dict.fromkeys(document for _, document in first)),
            longest_whole=min((min(each) for each in sizes.values()), default=0),
        )
        rows: list[TokenPair] = []
        groups: list[range] = []
        for (query, text), index in first.items():
            begin, (size, max_tokens) = len(rows), sizes[query]
            truncated = len(documents[text].ids) > max_tokens
            for ids, span in documents[text].windows(size, self._overlap(size), max_tokens):
                row = self._join(queries[query], ids, index, lengths)
                rows.append(replace(row, span=span, truncated=truncated))
            groups.append(range(begin, len(rows)))
        place = {pair: number for number, pair in enumerate(first)}
        return TokenizedPairs(rows, [place[pair] for pair in pairs], groups)

    def _max_tokens(self, query: TokenIds, lengths: Lengths) -> tuple[int, int]:
        """Return the maximum tokens of a window and of a document beside a query."""
        room, document = (
            self._document_room(min(len(query), lengths.query), each) - self._instruction_tokens
            for each in (self._lengths, lengths)
        )
        return (room if self._window_tokens is None else min(room, self._window_tokens)), document

    def _overlap(self, size: int) -> int:
        if self._overlap_tokens is None:
            return size // _OVERLAP_DIVISOR
        return min(self._overlap_tokens, size // 2)

    def _read(self, texts: list[str], *, longest_whole: int) -> dict[str, TokenizedDocument]:
        """Return each text's tokens, with their spans if it may need more than one window."""
        documents: dict[str, TokenizedDocument] = {}
        start = 0
        while start < len(texts):
            end, characters = start, 0
            while end < len(texts) and (end == start or characters < _CHARACTERS_PER_BATCH):
                characters += len(texts[end])
                end += 1
            batch = texts[start:end]
            whole = [self._instruction + text for text in batch]
            for text, encoding in zip(batch, self._encode_batch(whole, offsets=True), strict=True):
                documents[text] = self._document(text, encoding, longest_whole=longest_whole)
            start = end
        return documents

    def _document(self, text: str, encoding: Encoding, *, longest_whole: int) -> TokenizedDocument:
        """Return a text's tokens, separated from the instruction's."""
        ids = self._ids(encoding)
        bare, skipped = len(self._instruction.rstrip()), len(self._instruction)
        before, longest_before = 0, min(self._instruction_tokens, len(ids))
        # Read once, and only if needed: each access makes a new list of all offsets.
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
        return TokenizedDocument(ids[before:], ids[:before], text, spans)


def tokenizer_maker(settings: EngineSettings) -> Callable[..., PairTokenizer]:
    """Return the constructor of the tokenizer that the settings ask for."""
    side = settings.query_truncation_side
    if settings.long_documents == "truncate":
        return partial(PairTokenizer, query_truncation_side=side)
    return partial(
        WindowTokenizer,
        query_truncation_side=side,
        window_tokens=settings.window_tokens,
        window_overlap_tokens=settings.window_overlap_tokens,
    )


def _spans(text: str, offsets: list[Span]) -> list[Span]:
    """Return the spans in `text` of offsets in `without_surrogates(text)`."""
    if not _SURROGATE_PAIR.search(text):
        return offsets
    origins = _origins(text)
    return [(origins[start], origins[end]) for start, end in offsets]


def _origins(text: str) -> list[int]:
    """Return where each character of `without_surrogates(text)` begins in `text`, then its end."""
    origins: list[int] = []
    position = 0
    while position < len(text):
        origins.append(position)
        position += 2 if _SURROGATE_PAIR.match(text, position) else 1
    return [*origins, len(text)]
