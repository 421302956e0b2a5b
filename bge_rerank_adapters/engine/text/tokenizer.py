"""Turns texts into token ids by FlagEmbedding's truncation rule, each distinct text once."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace

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
from bge_rerank_adapters.errors import CheckpointError, ScoringError, SettingsError
from bge_rerank_adapters.settings.token_limits import TokenLimits

# Bounds the memory that encodings take in a call with very many documents.
_TEXTS_PER_BATCH = 1024


class PairTokenizer:
    """Turns pairs of texts into token ids; safe to use from many threads at once.

    The rule is FlagEmbedding 1.4's (`inference/reranker/encoder_only/base.py`): the query is cut to
    `query_max_length` tokens, then the document so that pair and special tokens fit `max_length`.
    On transformers 4 FlagEmbedding follows this rule. On transformers 5 it turns the ids back into
    text and tokenises that again (`utils/tokenizer_compat.py`). That can change some tokens of a
    truncated pair, or of one with a character that the tokenizer does not know.

    A lone surrogate, which is not valid text, is read as U+FFFD.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        query_max_length: int | None = None,
        template: PairTemplate | None = None,
        query_truncation_side: str = "right",
    ) -> None:
        """Take over a tokenizer, which must not be changed afterwards.

        Args:
            tokenizer: It must put special tokens around a pair, unless `template` is given.
            max_length: Maximum tokens of a pair, special tokens included.
            query_max_length: Maximum tokens of a query; `None` is three quarters of `max_length`.
            template: The tokens around a pair; `None` is the tokenizer's own.
            query_truncation_side: Where a query that is too long is cut: `"right"` at its end,
                `"left"` at its beginning, after the template's instruction.

        Raises:
            SettingsError: The lengths leave no room for a document, or for a query.
            CheckpointError: The tokenizer has no template for pairs.
        """
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._template = read_template(tokenizer) if template is None else template
        self.max_length = max_length
        self.query_max_length = (
            max_length * 3 // 4 if query_max_length is None else query_max_length
        )
        # The space at the end of an instruction becomes part of the text's first token.
        self._query_instruction_tokens, self._instruction_tokens = (
            len(tokenizer.encode(instruction.rstrip(), add_special_tokens=False).ids)
            for instruction in (
                self._template.query_instruction,
                self._template.passage_instruction,
            )
        )
        self._lengths = Lengths(self.query_max_length, max_length)
        self._check_room()
        self._keeps_query_end = query_truncation_side == "left"
        # Saves converting the ids of long texts to Python; one token more than is kept shows that
        # a text was cut. Keeping a query's end takes the whole query. Never changed afterwards:
        # that raises "Already borrowed" while another thread encodes.
        if not self._keeps_query_end:
            tokenizer.enable_truncation(max_length + 1)
        self._tokenizer = tokenizer
        self._embeddings = sys.maxsize

    def limit_ids(self, embeddings: int) -> None:
        """Refuse texts from now on that have a token without an embedding.

        Tokens that were added to a tokenizer but not to the model are common, and harmless as long
        as no text has one.

        Args:
            embeddings: How many embeddings the model has.

        Raises:
            CheckpointError: The vocabulary itself, or the template, needs more.
        """
        highest = max(self._tokenizer.get_vocab(with_added_tokens=False).values(), default=-1)
        template = self._template
        around = np.concatenate((template.before, template.between, template.after))
        if max(highest, around.max(initial=-1)) >= embeddings:
            raise CheckpointError(
                f"the tokenizer has ids up to {max(highest, around.max(initial=-1))}, but the "
                f"model has embeddings for {embeddings}; tokenizer and weights are not of one "
                "checkpoint."
            )
        self._embeddings = embeddings

    @property
    def special_tokens(self) -> int:
        """Number of tokens around the texts of a pair."""
        return self._template.tokens

    def first_id(self, text: str) -> int:
        """Return the first token id of a text.

        Raises:
            CheckpointError: The text has no tokens.
        """
        ids = self._ids(self._tokenizer.encode(text, add_special_tokens=False))
        if not len(ids):
            raise CheckpointError(f"The tokenizer makes no token of {text!r}, which is needed.")
        return int(ids[0])

    def lengths(self, limits: TokenLimits) -> Lengths:
        """Return how many tokens of a call's texts are read, at most what the settings allow.

        Raises:
            SettingsError: The limits leave no room for a document, or for a query.
        """
        lengths = Lengths(
            query=self._query_instruction_tokens + (limits.max_query_tokens or sys.maxsize),
            pair=limits.max_pair_tokens or sys.maxsize,
            document=self._instruction_tokens + (limits.max_document_tokens or sys.maxsize),
        )
        # At least one token of the document must fit.
        beside_one = self._beside(self._instruction_tokens + 1, lengths)
        query = min(lengths.query, self.query_max_length, lengths.pair * 3 // 4, beside_one)
        if query <= self._query_instruction_tokens:
            raise SettingsError(
                f"max_pair_tokens {lengths.pair} leaves no room for a query and a document beside "
                f"{self._template.tokens} special tokens and the instructions; make it larger."
            )
        return replace(lengths, query=query)

    def tokenize(
        self, pairs: Sequence[tuple[str, str]], lengths: Lengths | None = None
    ) -> TokenizedPairs:
        """Return the token ids of (query, document) pairs; each distinct text is tokenised once.

        Args:
            pairs: n pairs; may be empty.
            lengths: How many tokens of them are read; `None` is what the settings allow.

        Returns:
            The distinct pairs, and for each of the n its position among them.
        """
        lengths = lengths or self._lengths
        distinct: dict[tuple[str, str], int] = {}
        first: list[int] = []
        positions: list[int] = []
        for index, pair in enumerate(pairs):
            position = distinct.setdefault(pair, len(distinct))
            if position == len(first):
                first.append(index)
            positions.append(position)
        template = self._template
        queries = self._encode((query for query, _ in distinct), template.query_instruction)
        documents = self._encode((text for _, text in distinct), template.passage_instruction)
        return TokenizedPairs(
            [
                self._join(queries[query], documents[document], index, lengths)
                for (query, document), index in zip(distinct, first, strict=True)
            ],
            positions,
        )

    def _join(self, query: TokenIds, document: TokenIds, index: int, lengths: Lengths) -> TokenPair:
        template = self._template
        query_truncated = len(query) > lengths.query
        query = self._cut_query(query, lengths.query)
        room = self._room(len(query), lengths)
        ids = np.concatenate(
            (template.before, query, template.between, document[:room], template.after)
        )
        start = len(template.before) + len(query) + len(template.between)
        truncated = len(document) > room
        return TokenPair(
            ids,
            start,
            truncated,
            index,
            tokens_after=len(template.after),
            query_truncated=query_truncated,
        )

    def _cut_query(self, query: TokenIds, max_tokens: int) -> TokenIds:
        beyond = len(query) - max_tokens
        if beyond <= 0 or not self._keeps_query_end:
            return query[:max_tokens]
        first = self._query_instruction_tokens
        return np.concatenate((query[:first], query[first + beyond :]))

    def _check_room(self) -> None:
        """Refuse lengths at which queries or documents would be cut to nothing."""
        if self._query_instruction_tokens >= self.query_max_length:
            raise SettingsError(
                f"query_max_length {self.query_max_length} leaves no room for a query after "
                f"{self._query_instruction_tokens} tokens of query_instruction; make "
                "query_max_length larger or query_instruction shorter."
            )
        if self._room(self.query_max_length, self._lengths) - self._instruction_tokens < 1:
            instruction = self._instruction_tokens
            beside = f", {instruction} tokens of passage_instruction" if instruction else ""
            shorter = " or passage_instruction shorter" if instruction else ""
            raise SettingsError(
                f"max_length {self.max_length} leaves no room for a document beside a query of "
                f"query_max_length {self.query_max_length}{beside} and {self._template.tokens} "
                f"special tokens; make max_length larger or query_max_length smaller{shorter}."
            )

    def _room(self, query_tokens: int, lengths: Lengths) -> int:
        """Return how many tokens of a document, instruction included, fit beside a query."""
        return min(self._document_room(query_tokens, each) for each in (lengths, self._lengths))

    def _document_room(self, query_tokens: int, lengths: Lengths) -> int:
        return min(lengths.document, self._beside(query_tokens, lengths))

    def _beside(self, tokens: int, lengths: Lengths) -> int:
        """Return how many tokens of one text fit a pair if the other has `tokens`."""
        template = self._template
        return min(lengths.pair, lengths.pair + template.extra_tokens - template.tokens - tokens)

    def _encode(self, texts: Iterable[str], instruction: str) -> dict[str, TokenIds]:
        """Return each distinct text's ids, without special tokens, cut after `max_length`."""
        encoded: dict[str, TokenIds] = {}
        remaining = list(dict.fromkeys(texts))
        for start in range(0, len(remaining), _TEXTS_PER_BATCH):
            batch = remaining[start : start + _TEXTS_PER_BATCH]
            whole = [instruction + text for text in batch] if instruction else batch
            for text, encoding in zip(batch, self._encode_batch(whole), strict=True):
                encoded[text] = self._ids(encoding)
        return encoded

    def _ids(self, encoding: Encoding) -> TokenIds:
        """Return a text's ids.

        Raises:
            ScoringError: The model has no embedding for one.
        """
        ids = np.asarray(encoding.ids, dtype=np.int64)
        if ids.max(initial=-1) >= self._embeddings:
            highest = int(ids.max())
            raise ScoringError(
                f"a text has the token {self._tokenizer.id_to_token(highest)!r} of id {highest}, "
                "which was added to the tokenizer, but the model has embeddings for "
                f"{self._embeddings} ids; take it out of the text, or give a checkpoint that was "
                "trained with it."
            )
        return ids

    def _encode_batch(self, texts: list[str], *, offsets: bool = False) -> list[Encoding]:
        if not hasattr(self._tokenizer, "encode_batch_fast"):
            # tokenizers before 0.20 reads surrogates differently.
            texts = [without_surrogates(text) for text in texts]
        try:
            return encode_texts(self._tokenizer, texts, offsets=offsets)
        except (TypeError, UnicodeEncodeError):
            valid = [without_surrogates(text) for text in texts]
            return encode_texts(self._tokenizer, valid, offsets=offsets)


def without_surrogates(text: str) -> str:
    """Return the text with U+FFFD for each lone surrogate, and surrogate pairs joined."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_template(tokenizer: Tokenizer) -> PairTemplate:
    """Find the special tokens around a pair by tokenising the pair of "a" and "b".

    Raises:
        CheckpointError: There are none.
    """
    pair = tokenizer.encode("a", "b", add_special_tokens=True)
    ids, owners = np.asarray(pair.ids, dtype=np.int64), pair.sequence_ids
    if not {None, 0, 1} <= set(owners):
        raise CheckpointError(
            "the tokenizer puts no special tokens around a pair of texts, so the model could not "
            "tell where the query ends; a reranker's tokenizer has a post-processor for pairs."
        )
    query_start, document_start = owners.index(0), owners.index(1)
    query_end = len(owners) - owners[::-1].index(0)
    document_end = len(owners) - owners[::-1].index(1)
    return PairTemplate(ids[:query_start], ids[query_end:document_start], ids[document_end:])
