"""Windows against truncation on long documents, made by joining passages of a BEIR folder.

python -m benchmarks.long_documents FOLDER --model tiny --joined 10 --max-length 128
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from bge_rerank_adapters.evaluation import Collection, bm25, evaluate, read_collection
from bge_rerank_adapters.settings import EngineSettings


def join_passages(collection: Collection, passages: int) -> Collection:
    """Return a collection whose documents are so many neighbouring passages each.

    The passage that answers a query may be anywhere in its document.

    Args:
        collection: Of short documents.
        passages: How many make one document; the last may have fewer.
    """
    names = list(collection.documents)
    home = {name: f"joined-{place // passages}" for place, name in enumerate(names)}
    texts: dict[str, list[str]] = {}
    for name, text in collection.documents.items():
        texts.setdefault(home[name], []).append(text)
    judgements = {
        query: {home[name]: grade for name, grade in grades.items() if name in home}
        for query, grades in collection.judgements.items()
    }
    return replace(
        collection,
        documents={name: " ".join(parts) for name, parts in texts.items()},
        judgements=judgements,
    )


def engines(model: str, *, max_length: int, window_tokens: list[int]) -> dict[str, EngineSettings]:
    """Return truncation, windows of all the room there is, and windows of the sizes given."""
    base = EngineSettings(model=model, max_length=max_length)
    windows = replace(base, long_documents="window")
    return {
        "truncate": base,
        "windows": windows,
        **{f"windows of {size}": replace(windows, window_tokens=size) for size in window_tokens},
    }


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--joined", type=int, default=10, help="passages of a document")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--window-tokens", type=int, nargs="*", default=[64, 128])
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--queries", type=int, default=100)
    options = parser.parse_args()
    collection = join_passages(read_collection(options.folder), options.joined)
    collection = collection.sample(options.queries)
    report = evaluate(
        collection,
        bm25(collection, depth=options.depth),
        engines(options.model, max_length=options.max_length, window_tokens=options.window_tokens),
        progress=sys.stderr.isatty(),
    )
    sys.stdout.write(f"{report}\n")


if __name__ == "__main__":
    main()
