"""Measures a checkpoint as a reranker of BM25's best documents."""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import bm25s
import ir_measures
import numpy as np
import Stemmer
import torch
from ir_measures import Qrel, ScoredDoc, nDCG
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

LOG = logging.getLogger("evaluate_tiny")
METRIC = nDCG @ 10
BATCH_TOKENS = 8192

Ranking = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Collection:
    """A BEIR folder.

    Attributes:
        documents: Title and text of each document, by id.
        queries: The queries that have judgements, by id.
        judgements: All judgements.
    """

    documents: dict[str, str]
    queries: dict[str, str]
    judgements: list[Qrel]


def read_lines(path: Path) -> list[dict[str, str]]:
    """Reads a file of JSON lines."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def read_collection(folder: Path, most_queries: int | None) -> Collection:
    """Reads a BEIR folder.

    Args:
        folder: Folder with corpus.jsonl, queries.jsonl and qrels.tsv.
        most_queries: Use only so many queries, evenly spread; None for all.
    """
    documents = {
        row["_id"]: f"{row.get('title', '')} {row['text']}".strip()
        for row in read_lines(folder / "corpus.jsonl")
    }
    rows = (folder / "qrels.tsv").read_text(encoding="utf-8").splitlines()[1:]
    judgements = [
        Qrel(query, document, int(grade))
        for query, document, grade in (row.split("\t") for row in rows)
    ]
    judged = {judgement.query_id for judgement in judgements}
    queries = {
        row["_id"]: row["text"]
        for row in read_lines(folder / "queries.jsonl")
        if row["_id"] in judged
    }
    if most_queries is not None and most_queries < len(queries):
        names = list(queries)
        kept = np.linspace(0, len(names) - 1, most_queries).astype(int)
        queries = {names[place]: queries[names[place]] for place in kept}
        judgements = [judgement for judgement in judgements if judgement.query_id in queries]
    return Collection(documents, queries, judgements)


def rank_bm25(collection: Collection, top: int) -> Ranking:
    """Returns BM25's best documents of each query (Lucene's variant, Snowball stems)."""
    names = list(collection.documents)
    stemmer = Stemmer.Stemmer("english")

    def words(texts: list[str]) -> list[list[str]]:
        return bm25s.tokenize(
            texts, stopwords=None, stemmer=stemmer, return_ids=False, show_progress=False
        )

    index = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
    index.index(words(list(collection.documents.values())), show_progress=False)
    ranking: Ranking = {}
    for query, terms in zip(
        collection.queries, words(list(collection.queries.values())), strict=True
    ):
        scores = index.get_scores(terms)
        best = np.argsort(-scores, kind="stable")[:top]
        ranking[query] = {names[place]: float(scores[place]) for place in best}
    return ranking


def batches(lengths: list[int]) -> list[list[int]]:
    """Groups places by length, the longest first, with a bound on a batch's tokens."""
    groups: list[list[int]] = []
    room = 0
    for place in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        if room < 1:
            groups.append([])
            room = max(1, BATCH_TOKENS // lengths[place])
        groups[-1].append(place)
        room -= 1
    return groups


class CrossEncoder:
    """The checkpoint under test, in plain transformers."""

    def __init__(self, folder: Path, max_length: int) -> None:
        """Loads the float16 file as float32.

        Args:
            folder: The checkpoint folder.
            max_length: Most tokens of a pair.
        """
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        self._model = model.float().eval()
        self._max_length = max_length

    @torch.inference_mode()
    def score(self, pairs: list[tuple[str, str]]) -> list[float]:
        """Returns one logit per (query, document) pair."""
        encoded = self._tokenizer(
            [query for query, _ in pairs],
            [document for _, document in pairs],
            truncation="only_second",
            max_length=self._max_length,
        )
        scores = [0.0] * len(pairs)
        for group in batches([len(ids) for ids in encoded["input_ids"]]):
            rows = {name: [encoded[name][place] for place in group] for name in encoded}
            inputs = self._tokenizer.pad(rows, return_tensors="pt")
            logits = self._model(**inputs).logits[:, 0].tolist()
            for place, logit in zip(group, logits, strict=True):
                scores[place] = logit
        return scores

    def rerank(self, collection: Collection, first: Ranking) -> Ranking:
        """Scores the first stage's documents anew."""
        places = [(query, document) for query, found in first.items() for document in found]
        scores = self.score(
            [(collection.queries[query], collection.documents[name]) for query, name in places]
        )
        ranking: Ranking = {query: {} for query in first}
        for (query, document), value in zip(places, scores, strict=True):
            ranking[query][document] = value
        return ranking


class SentenceEncoder:
    """The starting encoder as it was meant to be used: mean of the tokens, cosine."""

    def __init__(self, folder: Path) -> None:
        """Loads the encoder."""
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder).float().eval()

    @torch.inference_mode()
    def embed(self, texts: list[str]) -> np.ndarray:
        """Returns one unit vector per text."""
        encoded = self._tokenizer(texts, truncation=True, max_length=256, padding=False)
        vectors = np.zeros((len(texts), self._model.config.hidden_size), dtype=np.float32)
        for group in batches([len(ids) for ids in encoded["input_ids"]]):
            rows = {name: [encoded[name][place] for place in group] for name in encoded}
            inputs = self._tokenizer.pad(rows, return_tensors="pt")
            hidden = self._model(**inputs).last_hidden_state
            mask = inputs["attention_mask"][:, :, None]
            mean = (hidden * mask).sum(1) / mask.sum(1)
            vectors[group] = torch.nn.functional.normalize(mean, dim=1).numpy()
        return vectors

    def rerank(self, collection: Collection, first: Ranking) -> Ranking:
        """Scores the first stage's documents by cosine."""
        names = sorted({name for found in first.values() for name in found})
        rows = self.embed([collection.documents[name] for name in names])
        documents = dict(zip(names, rows, strict=True))
        queries = self.embed([collection.queries[query] for query in first])
        return {
            query: {name: float(vector @ documents[name]) for name in found}
            for vector, (query, found) in zip(queries, first.items(), strict=True)
        }


def hybrid(left: Ranking, right: Ranking) -> Ranking:
    """Adds two rankings of the same documents, each standardised per query."""

    def standard(found: dict[str, float]) -> dict[str, float]:
        values = np.array(list(found.values()))
        scaled = (values - values.mean()) / (values.std() + 1e-9)
        return dict(zip(found, scaled.tolist(), strict=True))

    return {
        query: {
            name: value + other[name]
            for other in [standard(right[query])]
            for name, value in standard(found).items()
        }
        for query, found in left.items()
    }


def ndcg(collection: Collection, ranking: Ranking) -> float:
    """Returns the mean nDCG@10."""
    run = [
        ScoredDoc(query, document, value)
        for query, found in ranking.items()
        for document, value in found.items()
    ]
    return float(ir_measures.calc_aggregate([METRIC], collection.judgements, run)[METRIC])


def measure(folder: Path, model: CrossEncoder, options: argparse.Namespace) -> None:
    """Measures one collection and logs what came out."""
    collection = read_collection(folder, options.queries)
    first = rank_bm25(collection, options.top)
    LOG.info("%s: %d queries", folder.name, len(collection.queries))
    LOG.info("  BM25 %.4f", ndcg(collection, first))
    if options.encoder is not None:
        cosine = SentenceEncoder(options.encoder).rerank(collection, first)
        LOG.info("  sentence encoder %.4f", ndcg(collection, cosine))
        LOG.info("  sentence encoder + BM25 %.4f", ndcg(collection, hybrid(cosine, first)))
    started = time.monotonic()
    reranked = model.rerank(collection, first)
    seconds = time.monotonic() - started
    pairs = sum(map(len, first.values()))
    LOG.info("  cross-encoder %.4f (%.0f pairs/s)", ndcg(collection, reranked), pairs / seconds)
    LOG.info("  cross-encoder + BM25 %.4f", ndcg(collection, hybrid(reranked, first)))


def show_examples(path: Path, model: CrossEncoder) -> None:
    """Logs the sigmoids of each example question's documents.

    Args:
        path: A JSON file with "checks", of which those with "query" and "documents" are used.
        model: The checkpoint.
    """
    for check in json.loads(path.read_text(encoding="utf-8"))["checks"]:
        if "pairs" in check:
            pairs = [(query, document) for query, document in check["pairs"]]
        else:
            pairs = [(check["query"], document) for document in check["documents"]]
        chances = torch.sigmoid(torch.tensor(model.score(pairs))).tolist()
        LOG.info("%s", pairs[0][0])
        for (query, document), chance in zip(pairs, chances, strict=True):
            LOG.info("  %.4f  %s | %s", chance, query[:30], document[:60])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, help="also measure this sentence encoder")
    parser.add_argument("--examples", type=Path, help="JSON file with example questions")
    parser.add_argument("--top", type=int, default=50, help="documents that BM25 hands over")
    parser.add_argument("--queries", type=int, help="use only so many queries of a collection")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("folders", type=Path, nargs="*", help="BEIR folders")
    return parser.parse_args(arguments)


def main() -> None:
    """Measures everything asked for."""
    options = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    model = CrossEncoder(options.checkpoint, options.max_length)
    if options.examples is not None:
        show_examples(options.examples, model)
    for folder in options.folders:
        measure(folder, model, options)


if __name__ == "__main__":
    main()
