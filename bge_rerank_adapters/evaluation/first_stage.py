"""BM25 as a first stage."""

from bge_rerank_adapters.calls.extras import require
from bge_rerank_adapters.calls.limits import check_top_k
from bge_rerank_adapters.calls.trec import Run
from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.evaluation.collection import Collection

# Lucene's variant with the parameters that BEIR's baselines use (Thakur et al., 2021).
_K1, _B = 0.9, 0.4


def bm25(collection: Collection, *, depth: int = 100, language: str | None = "english") -> Run:
    """Return BM25's best documents of each query.

    Args:
        collection: The collection to search.
        depth: Maximum number of documents of each query.
        language: The language of Snowball's stemmer; `None` is no stemming.

    Returns:
        Documents best first, equal scores in the collection's order. Documents without a word of
        the query are left out.

    Raises:
        SettingsError: There is no stemmer for the language, or `depth` is below 1.
    """
    require("bm25s", "Stemmer", of="evaluation", extra="eval")
    import bm25s
    import numpy as np
    import Stemmer

    depth = check_top_k(depth, name="depth") or len(collection.documents)
    if language is not None and language not in Stemmer.algorithms():
        raise SettingsError(
            f'language {language!r} has no stemmer; use None (in a shell "none"), or one of '
            f"{', '.join(Stemmer.algorithms())}."
        )
    stemmer = None if language is None else Stemmer.Stemmer(language)

    def words(texts: list[str]) -> list[list[str]]:
        tokens: list[list[str]] = bm25s.tokenize(
            texts, stopwords=None, stemmer=stemmer, return_ids=False, show_progress=False
        )
        return tokens

    names = list(collection.documents)
    texts = words(list(collection.documents.values()))
    if not any(texts):
        return {query: {} for query in collection.queries}
    index = bm25s.BM25(method="lucene", k1=_K1, b=_B)
    index.index(texts, show_progress=False)
    run: Run = {}
    terms = words(list(collection.queries.values()))
    for query, each in zip(collection.queries, terms, strict=True):
        if not each:
            run[query] = {}
            continue
        scores = index.get_scores(each)
        best = np.argsort(-scores, kind="stable")[:depth]
        run[query] = {names[place]: float(scores[place]) for place in best if scores[place] > 0}
    return run
