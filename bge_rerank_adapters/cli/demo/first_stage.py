"""The demo's collection, and BM25 as its first stage."""

import math
import re
from collections import Counter
from functools import cache
from itertools import islice

from bge_rerank_adapters.evaluation.collection import sample_collection

_SENTENCES = 200
# BM25's usual parameters (Robertson and Zaragoza, 2009).
_K1, _B = 1.2, 0.75


@cache
def collection() -> dict[str, str]:
    """Return the first sentences of the package's sample collection, by id."""
    return dict(islice(sample_collection().documents.items(), _SENTENCES))


def search(query: str, *, top_k: int) -> list[tuple[str, float]]:
    """Return ids and BM25 scores of the best sentences, best first."""
    counts = {name: Counter(_words(text)) for name, text in collection().items()}
    average = sum(map(Counter.total, counts.values())) / len(counts)
    scores: dict[str, float] = {}
    for word in set(_words(query)):
        having = [name for name, words in counts.items() if word in words]
        rarity = math.log(1 + (len(counts) - len(having) + 0.5) / (len(having) + 0.5))
        for name in having:
            count = counts[name][word]
            length = _K1 * (1 - _B + _B * counts[name].total() / average)
            scores[name] = scores.get(name, 0.0) + rarity * count * (_K1 + 1) / (count + length)
    return sorted(scores.items(), key=lambda found: -found[1])[:top_k]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
