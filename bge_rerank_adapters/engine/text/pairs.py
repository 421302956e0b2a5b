"""Pairs of texts as token ids, and the template around them."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TokenPair:
    """A query and a document as one row of token ids.

    Attributes:
        ids: int64, shape (tokens,), special tokens included.
        document_start: Where the document's own tokens begin, and token type 1 in models that have
            two types.
        truncated: Whether the document was cut to fit.
        index: Position of the first pair with these texts in the caller's list.
        span: Start and end in the document of this window; `None` without windows.
        tokens_after: How many tokens follow the document's own.
        query_truncated: Whether the query was cut to fit.
    """

    ids: TokenIds
    document_start: int
    truncated: bool
    index: int
    span: tuple[int, int] | None = None
    tokens_after: int = 0
    query_truncated: bool = False

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class TokenizedPairs:
    """The distinct pairs of a call, and where each of the caller's pairs is among them.

    Attributes:
        distinct: m tokenised pairs; m <= n unless there are windows.
        positions: For each of the caller's n pairs, its position in `distinct`, or in `windows`.
        windows: For each distinct pair, where its windows are in `distinct`; `None` without
            windows.
    """

    distinct: list[TokenPair]
    positions: list[int]
    windows: list[range] | None = None

    def winners(self, logits: Sequence[float]) -> list[int]:
        """Return for each of the caller's n pairs the position of its row in `distinct`.

        With windows it is the window with the highest logit, the first if several are equal.

        Args:
            logits: The m logits of `distinct`.
        """
        if self.windows is None:
            return self.positions
        winners = [max(window, key=logits.__getitem__) for window in self.windows]
        return [winners[position] for position in self.positions]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Maximum numbers of tokens that are read, instructions included.

    Attributes:
        query: Of a query.
        pair: Of query, document and template together, without the template's `extra_tokens`.
        document: Of a document.
    """

    query: int
    pair: int = sys.maxsize
    document: int = sys.maxsize


@dataclass(frozen=True, slots=True)
class PairTemplate:
    """The tokens around a pair: `before` query `between` document `after`.

    Attributes:
        before: Token ids before the query; may be empty.
        between: Token ids between query and document; may be empty.
        after: Token ids after the document; may be empty.
        extra_tokens: By how many tokens a pair may exceed `max_length`.
        query_instruction: Text before each query; counts as its beginning.
        passage_instruction: Text before each document; counts as its beginning.
    """

    before: TokenIds
    between: TokenIds
    after: TokenIds
    extra_tokens: int = 0
    query_instruction: str = ""
    passage_instruction: str = ""

    @property
    def tokens(self) -> int:
        """Number of tokens of the template itself."""
        return len(self.before) + len(self.between) + len(self.after)
