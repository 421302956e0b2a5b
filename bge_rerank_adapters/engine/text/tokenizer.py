"""Texts to token ids, by FlagEmbedding's truncation rule, with every text read once."""

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

# Bounds the memory that the tokenizer's own records take for a call with very many documents.
_TEXTS_PER_BATCH = 1024


class PairTokenizer:
    """Turns pairs of texts into token ids; safe to use from many threads at once.

    The rule is that of FlagEmbedding 1.4 (`inference/reranker/encoder_only/base.py`): the query is
    cut to `query_max_length` tokens, at its end unless its beginning is to be cut off, then the
    document so that pair and special tokens fit `max_length`. FlagEmbedding on transformers 5 turns
    the ids back into text and tokenises that again (`utils/tokenizer_compat.py`), which can move a
    truncated pair, or one with a character that the tokenizer does not know, by some tokens; on
    transformers 4 it follows the rule.

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
            tokenizer: It must put special tokens around a pair, unless `template` does.
            max_length: Most tokens of a pair, special tokens included.
            query_max_length: Most tokens of a query; `None` is three quarters of `max_length`.
            template: What stands around a pair; `None` is what the tokenizer puts there.
            query_truncation_side: What of a query that is too long is cut off: `"right"` its end,
                `"left"` what follows the template's instruction.

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
        # The space that ends one goes with the first word of its text.
        self._query_instruction_tokens, self._instruction_tokens = (
            len(tokenizer.encode(instruction.rstrip(), add_special_tokens=False).ids)
            for instruction in (
                self._template.query_instruction,
                self._template.passage_instruction,
            )
        )
        if self._query_instruction_tokens >= self.query_max_length:
            raise SettingsError(
                f"query_max_length {self.query_max_length} leaves no room for a query after "
                f"{self._query_instruction_tokens} tokens of query_instruction; make "
                "query_max_length larger or query_instruction shorter."
            )
        self._lengths = Lengths(self.query_max_length, max_length)
        self._check_room()
        self._keeps_query_end = query_truncation_side == "left"
        # Set once and never again: changing it while another thread encodes is what raises
        # "Already borrowed" elsewhere. Longer texts need not cross over into Python; one token
        # more than is kept tells that a text was cut. The end of a query is found in all of it.
        if not self._keeps_query_end:
            tokenizer.enable_truncation(max_length + 1)
        self._tokenizer = tokenizer
        self._embeddings = sys.maxsize

    def limit_ids(self, embeddings: int) -> None:
        """Have texts refused whose tokens the model does not know.

        Tokens that were added to a tokenizer and never trained are common, and do no harm as long
        as no text has one.

        Args:
            embeddings: How many tokens the model knows.

        Raises:
            CheckpointError: It lacks some of the vocabulary itself, or of what stands around pairs.
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
        """How many tokens stand around the texts of a pair."""
        return self._template.tokens

    def first_id(self, text: str) -> int:
        """Return the first token id of a text.

        Raises:
            CheckpointError: The tokenizer makes no token of it.
        """
        ids = self._ids(self._tokenizer.encode(text, add_special_tokens=False))
        if not len(ids):
            raise CheckpointError(f"The tokenizer makes no token of {text!r}, which is needed.")
        return int(ids[0])

    def lengths(self, limits: TokenLimits) -> Lengths:
        """Return how much is read of a call's texts, at most what the settings allow.

        Raises:
            SettingsError: The limits leave no room for a document, or for a query.
        """
        lengths = Lengths(
            query=self._query_instruction_tokens + (limits.max_query_tokens or sys.maxsize),
            pair=limits.max_pair_tokens or sys.maxsize,
            document=self._instruction_tokens + (limits.max_document_tokens or sys.maxsize),
        )
        # A token of the document is left at least.
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
        """Return the token ids of (query, document) pairs; each distinct text is read once.

        Args:
            pairs: n pairs; may be empty.
            lengths: How much is read of them; `None` is all that the settings allow.

        Returns:
            The distinct pairs, and the position among them of each of the n.
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

    def _cut_query(self, query: TokenIds, most: int) -> TokenIds:
        beyond = len(query) - most
        if beyond <= 0 or not self._keeps_query_end:
            return query[:most]
        first = self._query_instruction_tokens
        return np.concatenate((query[:first], query[first + beyond :]))

    def _check_room(self) -> None:
        """Refuse lengths at which documents would be cut to nothing, and all score alike."""
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
        """Return how many tokens of a document and its instruction are read beside a query."""
        return min(self._document_room(query_tokens, each) for each in (lengths, self._lengths))

    def _document_room(self, query_tokens: int, lengths: Lengths) -> int:
        return min(lengths.document, self._beside(query_tokens, lengths))

    def _beside(self, tokens: int, lengths: Lengths) -> int:
        """Return how many tokens of one text fit a pair beside so many of the other."""
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

    def _encode_batch(self, texts: list[str]) -> list[Encoding]:
        if not hasattr(self._tokenizer, "encode_batch_fast"):
            # tokenizers before 0.20, which reads surrogates in a way of its own.
            texts = [without_surrogates(text) for text in texts]
        try:
            return encode_texts(self._tokenizer, texts, offsets=False)
        except (TypeError, UnicodeEncodeError):
            valid = [without_surrogates(text) for text in texts]
            return encode_texts(self._tokenizer, valid, offsets=False)


def without_surrogates(text: str) -> str:
    """Return the text with U+FFFD for each lone surrogate, and pairs of them joined."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_template(tokenizer: Tokenizer) -> PairTemplate:
    """Find the special tokens around a pair by tokenising the pair of "a" and "b".

    Raises:
        CheckpointError: The tokenizer puts none there.
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
