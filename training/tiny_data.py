"""Reads the training pairs and mines each question's candidates and teacher scores."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import bm25s
import numpy as np
import Stemmer
import torch
from tokenizers import Tokenizer
from transformers import BertModel

POOL = 40
# Best share of the cosine in the teacher on the development collections: 0.6 to 0.7.
COSINE_SHARE = 0.65
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


@dataclass(frozen=True)
class Document:
    """One text of a collection."""

    title: str
    text: str

    def full(self) -> str:
        """Returns title and text in one string, as the BEIR collections are searched."""
        return f"{self.title} {self.text}".strip()


@dataclass
class Question:
    """One query with the documents it is trained against.

    Attributes:
        text: The query.
        positive: Index of the right document in its collection.
        removed: A part of the positive's text to take out, because it is the query.
        known: Indices of all documents given as right for this text.
        pool: Indices of wrong documents, the hardest first.
        teacher: Standardised teacher scores, of the positive first, then of the pool.
    """

    text: str
    positive: int
    removed: str = ""
    known: frozenset[int] = frozenset()
    pool: list[int] = field(default_factory=list)
    teacher: list[float] = field(default_factory=list)


@dataclass
class Source:
    """A collection with its questions.

    Attributes:
        documents: The collection that negatives are mined from.
        questions: What is trained on.
        held_out: What the calibration is fitted on.
        title_share: How often a document is shown with its title.
        teacher_weight: Share of the teacher in the target; the rest is the label.
        negatives: Wrong documents per question: many where they are short and so cost little.
    """

    documents: list[Document]
    questions: list[Question]
    held_out: list[Question]
    title_share: float
    teacher_weight: float
    negatives: int


def read_pairs(path: Path) -> dict[str, list[dict[str, str]]]:
    """Returns the English lines that share nothing with XQuAD, by source."""
    rows: dict[str, list[dict[str, str]]] = defaultdict(list)
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if row["lang"] == "en" and not row["overlaps_xquad"]:
                rows[row["source"]].append(row)
    return dict(rows)


def collect(rows: list[dict[str, str]]) -> tuple[list[Document], list[Question]]:
    """Turns lines into a collection without duplicates and its questions."""
    index: dict[Document, int] = {}
    right: dict[str, set[int]] = defaultdict(set)
    pairs: dict[tuple[str, int], None] = {}
    for row in rows:
        document = Document(row["title"], row["positive"])
        place = index.setdefault(document, len(index))
        right[row["query"].lower()].add(place)
        pairs[row["query"], place] = None
    questions = [
        Question(text, place, known=frozenset(right[text.lower()])) for text, place in pairs
    ]
    return list(index), questions


def statements(documents: list[Document], rng: random.Random) -> list[Question]:
    """Makes one pseudo-query per document out of one of its own sentences.

    The sentence is taken out of the document, so that the rest has to be recognised by what it
    says. This teaches long documents and queries that are no questions.
    """
    made = []
    for place, document in enumerate(documents):
        sentences = [s for s in SENTENCE_END.split(document.text) if 6 <= len(s.split()) <= 40]
        if len(sentences) < 3:
            continue
        chosen = rng.choice(sentences)
        made.append(Question(chosen, place, removed=chosen, known=frozenset({place})))
    return made


def titles(documents: list[Document]) -> list[Question]:
    """Makes one pseudo-query per document out of its title."""
    return [
        Question(document.title, place, known=frozenset({place}))
        for place, document in enumerate(documents)
        if len(document.title.split()) >= 5
    ]


class Teacher:
    """BM25 and the cosine of the starting encoder, which is a good sentence encoder."""

    def __init__(self, encoder_folder: Path, documents: list[Document]) -> None:
        """Indexes one collection.

        Args:
            encoder_folder: Folder of the sentence encoder.
            documents: The collection.
        """
        self._tokenizer = Tokenizer.from_file(str(encoder_folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(160)
        self._encoder = BertModel.from_pretrained(encoder_folder, add_pooling_layer=False).eval()
        self._stemmer = Stemmer.Stemmer("english")
        texts = [document.full() for document in documents]
        self._vectors = self._embed(texts)
        self._bm25 = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
        self._bm25.index(self._words(texts), show_progress=False)

    def _words(self, texts: list[str]) -> list[list[str]]:
        """Returns the stemmed words of each text."""
        return bm25s.tokenize(
            texts, stopwords=None, stemmer=self._stemmer, return_ids=False, show_progress=False
        )

    @torch.inference_mode()
    def _embed(self, texts: list[str]) -> np.ndarray:
        """Returns unit vectors, batched by length so that little padding is computed."""
        ids = [item.ids for item in self._tokenizer.encode_batch(texts)]
        vectors = np.zeros((len(texts), 384), dtype=np.float32)
        order = sorted(range(len(texts)), key=lambda place: len(ids[place]))
        for start in range(0, len(order), 64):
            places = order[start : start + 64]
            tokens, mask = pad([ids[place] for place in places])
            with torch.autocast("cpu", dtype=torch.bfloat16):
                hidden = self._encoder(tokens, attention_mask=mask).last_hidden_state.float()
            mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
            vectors[places] = torch.nn.functional.normalize(mean, dim=1).numpy()
        return vectors

    def mine(self, questions: list[Question]) -> None:
        """Fills each question's pool and teacher scores."""
        cosines = self._embed([question.text for question in questions]) @ self._vectors.T
        words = self._words([question.text for question in questions])
        for question, cosine, terms in zip(questions, cosines, words, strict=True):
            lexical = self._bm25.get_scores(terms) if terms else np.zeros_like(cosine)
            near = set(np.argsort(-lexical)[:POOL].tolist())
            near |= set(np.argsort(-cosine)[:POOL].tolist())
            near -= question.known
            places = np.array([question.positive, *sorted(near)])
            scores = 2 * COSINE_SHARE * standardise(cosine[places])
            scores += 2 * (1 - COSINE_SHARE) * standardise(lexical[places])
            order = 1 + np.argsort(-scores[1:], kind="stable")[:POOL]
            question.pool = places[order].tolist()
            question.teacher = [float(scores[0]), *scores[order].tolist()]


def standardise(values: np.ndarray) -> np.ndarray:
    """Returns values with mean 0 and deviation 1."""
    return (values - values.mean()) / (values.std() + 1e-6)


def pad(ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns token ids padded with 0 on the right, and their mask."""
    width = max(map(len, ids))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    return tokens, mask


def make_source(
    documents: list[Document],
    questions: list[Question],
    teacher: Teacher,
    *,
    held_out: int,
    title_share: float,
    teacher_weight: float,
    negatives: int,
) -> Source:
    """Mines the questions and sets the first of them aside for the calibration."""
    teacher.mine(questions)
    return Source(
        documents,
        questions[held_out:],
        questions[:held_out],
        title_share,
        teacher_weight,
        negatives,
    )


def load_sources(pairs: Path, encoder_folder: Path, seed: int) -> dict[str, Source]:
    """Reads, samples and mines everything that is trained on.

    Args:
        pairs: The training pairs, gzip-compressed JSON lines.
        encoder_folder: Folder of the sentence encoder.
        seed: Decides the samples.
    """
    rng = random.Random(seed)  # noqa: S311
    rows = read_pairs(pairs)
    for name in sorted(rows):
        rng.shuffle(rows[name])
    made: dict[str, Source] = {}

    documents, questions = collect(rows["scifact"])
    teacher = Teacher(encoder_folder, documents)
    made["claims"] = make_source(
        documents,
        questions,
        teacher,
        held_out=40,
        title_share=0.9,
        teacher_weight=0.5,
        negatives=5,
    )
    made["titles"] = make_source(
        documents,
        titles(documents),
        teacher,
        held_out=0,
        title_share=0.0,
        teacher_weight=0.4,
        negatives=4,
    )
    made["sentences"] = make_source(
        documents,
        statements(documents, rng),
        teacher,
        held_out=0,
        title_share=0.8,
        teacher_weight=0.4,
        negatives=4,
    )

    # The teacher reads every document of a collection, so the largest one is sampled.
    documents, questions = collect(rows["medquad"][:3500])
    teacher = Teacher(encoder_folder, documents)
    made["medical"] = make_source(
        documents,
        questions[:2000],
        teacher,
        held_out=60,
        title_share=0.4,
        teacher_weight=0.3,
        negatives=4,
    )
    made["medical-sentences"] = make_source(
        documents,
        statements(documents, rng)[:1500],
        teacher,
        held_out=0,
        title_share=0.3,
        teacher_weight=0.3,
        negatives=4,
    )

    documents, questions = collect(rows["afriqa-translated"])
    made["passages"] = make_source(
        documents,
        questions,
        Teacher(encoder_folder, documents),
        held_out=60,
        title_share=0.4,
        teacher_weight=0.25,
        negatives=5,
    )

    documents, questions = collect(rows["squad-nqg-sentences"])
    made["answers"] = make_source(
        documents,
        questions,
        Teacher(encoder_folder, documents),
        held_out=120,
        title_share=0.0,
        teacher_weight=0.25,
        negatives=8,
    )
    return made
