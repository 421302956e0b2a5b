"""The query and the passages that a benchmark scores."""

import json
from pathlib import Path

_BUILT_IN = Path(__file__).parent.parent / "tests" / "data" / "xquad-r-en"
_SENTENCES_PER_PASSAGE = 5


def read_collection(folder: Path | None) -> tuple[str, list[str]]:
    """Return the first query of a collection and all its passages.

    Args:
        folder: A BEIR folder; `None` is the built-in set, in which sentences of XQuAD-R are joined
            to passages of about 130 words.
    """
    source = folder or _BUILT_IN
    rows = _lines(source / "corpus.jsonl")
    texts = [f"{row.get('title', '')} {row['text']}".strip() for row in rows]
    if folder is None:
        texts = [
            " ".join(texts[start : start + _SENTENCES_PER_PASSAGE])
            for start in range(len(texts) - _SENTENCES_PER_PASSAGE)
        ]
    return _lines(source / "queries.jsonl")[0]["text"], texts


def pick(texts: list[str], count: int) -> list[str]:
    """Return so many distinct passages, spread evenly; more than there are get a number in front.

    A repeated passage would be scored once by an engine that notices, so none is.
    """
    if count <= len(texts):
        return [texts[place * len(texts) // count] for place in range(count)]
    return [
        f"{place // len(texts)} {texts[place % len(texts)]}" if place >= len(texts) else text
        for place in range(count)
        for text in [texts[place % len(texts)]]
    ]


def short(texts: list[str], count: int) -> list[str]:
    """Return so many passages of twelve words each."""
    return [" ".join(text.split()[:12]) for text in pick(texts, count)]


def _lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
