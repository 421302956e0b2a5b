"""What the engine adds around the forward pass of one small request, and tokenising's share.

`python -m benchmarks.overhead FOLDER` calls the engine and, in turn, its model alone on the same
token ids.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

from benchmarks.texts import pick, read_collection, short
from bge_rerank_adapters import Reranker


def seconds(run: Callable[[], object]) -> float:
    """Return how long one call takes."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def main() -> None:
    """Print medians in milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help='a checkpoint, or "tiny"')
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    query, texts = read_collection(None)
    with Reranker(options.folder, dtype=options.dtype) as reranker:
        model = reranker._core.workers[0].model  # noqa: SLF001 - what is measured is inside
        for documents in (short(texts, 4), pick(texts, 20)):
            pairs = [(query, document) for document in documents]
            tokenize = reranker._tokenizer.tokenize  # noqa: SLF001
            packed = sorted(tokenize(pairs).distinct, key=len, reverse=True)
            timed: dict[str, list[float]] = {"engine": [], "model": [], "tokenizing": []}
            for _ in range(options.rounds):
                timed["engine"].append(seconds(lambda d=documents: reranker.rerank(query, d)))
                timed["model"].append(seconds(lambda p=packed: model.logits(p)))
                timed["tokenizing"].append(seconds(partial(tokenize, pairs)))
            medians = {name: 1e3 * statistics.median(each) for name, each in timed.items()}
            around = medians["engine"] - medians["model"]
            shown = ", ".join(f"{name} {each:.2f} ms" for name, each in medians.items())
            print(f"{len(documents)} passages: {shown}; around the model {around:.2f} ms")  # noqa: T201


if __name__ == "__main__":
    main()
