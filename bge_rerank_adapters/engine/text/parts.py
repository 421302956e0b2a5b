"""A large call's pairs in parts, so that a device scores the first while the next is tokenised."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

TextPair = tuple[str, str]


class Part(NamedTuple):
    """Some of the pairs of a call.

    Attributes:
        pairs: n pairs.
        indices: Of each of them in the caller's list, the first one where it is there repeatedly.
    """

    pairs: Sequence[TextPair]
    indices: Sequence[int]

    def name(self, name: Callable[[int], str]) -> Callable[[int], str]:
        """Return what names a pair at an index of this part, given what names the caller's."""
        return lambda index: name(self.indices[index])


def parts_of(pairs: Sequence[TextPair], most: int) -> list[Part]:
    """Return the pairs of a call in parts.

    Args:
        pairs: n >= 1 pairs.
        most: Most pairs of a part. Where there are no more, they make one part as they are;
            otherwise each pair is in one part once, however often it is in the list, so that equal
            ones have equal logits.
    """
    if len(pairs) <= most:
        return [Part(pairs, range(len(pairs)))]
    firsts: dict[TextPair, int] = {}
    for index, pair in enumerate(pairs):
        firsts.setdefault(pair, index)
    distinct, indices = list(firsts), list(firsts.values())
    return [
        Part(distinct[start : start + most], indices[start : start + most])
        for start in range(0, len(distinct), most)
    ]
