"""Trains the tiny English cross-encoder on a processor, within a time limit."""

from __future__ import annotations

import argparse
import logging
import random
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_data import Question, Source, load_sources, pad
from tiny_model import CLS_ID, SEP_ID, build_model, build_tokenizer, export
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import XLMRobertaForSequenceClassification

LOG = logging.getLogger("train_tiny")

# Share of each source among the questions at the start and at the end of training: cheap short
# pairs teach matching first, long documents come late.
MIX = {
    "answers": (0.66, 0.62),
    "passages": (0.10, 0.07),
    "medical": (0.06, 0.04),
    "medical-sentences": (0.04, 0.04),
    "claims": (0.08, 0.14),
    "titles": (0.04, 0.05),
    "sentences": (0.02, 0.04),
}
QUERY_TOKENS = 64
SHORT_DOCUMENT = 128
LONG_DOCUMENT = 300
SHORT_PART = 0.35
CHUNK_TOKENS = 4096
# Up to this width plain matrix products are faster to go back through than the fused attention.
PLAIN_ATTENTION_TOKENS = 128
# The same documents, questions and held-out part in every run, whatever its own seed.
SAMPLE_SEED = 13
TEACHER_SCALE = 1.5
POINTWISE_WEIGHT = 0.2


class Pairs:
    """Tokenizes questions with some of their documents."""

    def __init__(self, tokenizer: Tokenizer, sources: dict[str, Source]) -> None:
        """Keeps what is needed to build pairs.

        Args:
            tokenizer: The tokenizer; its pair template is applied by hand here.
            sources: What is trained on.
        """
        self._tokenizer = tokenizer
        self._sources = sources

    def _ids(self, text: str) -> list[int]:
        """Returns the ids of a text without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def build(
        self, name: str, question: Question, places: list[int], limit: int, rng: random.Random
    ) -> list[list[int]]:
        """Returns one id list per document, the positive first.

        Args:
            name: The source.
            question: The question.
            places: Wrong documents.
            limit: Most tokens of a document.
            rng: Decides whether this question's documents are shown with their titles.
        """
        source = self._sources[name]
        with_title = rng.random() < source.title_share
        query = self._ids(question.text)[:QUERY_TOKENS]
        rows = []
        for place in [question.positive, *places]:
            document = source.documents[place]
            text = document.text
            if question.removed and place == question.positive:
                text = text.replace(question.removed, " ")
            if with_title:
                text = f"{document.title} {text}"
            rows.append([CLS_ID, *query, SEP_ID, SEP_ID, *self._ids(text)[:limit], SEP_ID])
        return rows


def draw_negatives(question: Question, count: int, rng: random.Random) -> list[int]:
    """Returns places in the pool: most from its hard front, the others from behind it."""
    hard = min(10, len(question.pool))
    front = rng.sample(range(hard), min(hard, (count + 1) // 2))
    rest = [place for place in range(len(question.pool)) if place not in front]
    return front + rng.sample(rest, min(len(rest), count - len(front)))


def chunks(rows: list[list[int]]) -> list[list[int]]:
    """Groups pairs of like length, so that little padding is computed."""
    groups: list[list[int]] = [[]]
    for place in sorted(range(len(rows)), key=lambda item: len(rows[item])):
        if groups[-1] and (len(groups[-1]) + 1) * len(rows[place]) > CHUNK_TOKENS:
            groups.append([])
        groups[-1].append(place)
    return groups


def score(model: XLMRobertaForSequenceClassification, rows: list[list[int]]) -> torch.Tensor:
    """Returns one logit per pair, in the order of the pairs."""
    groups = chunks(rows)
    parts = []
    for group in groups:
        tokens, mask = pad([rows[place] for place in group])
        plain = tokens.shape[1] <= PLAIN_ATTENTION_TOKENS
        model.set_attn_implementation("eager" if plain else "sdpa")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.roberta(tokens, attention_mask=mask).last_hidden_state
        # The head stays in float32: its outputs are compared with one another.
        parts.append(model.classifier(hidden.float())[:, 0])
    order = torch.tensor([place for group in groups for place in group])
    return torch.cat(parts)[torch.argsort(order)]


def list_loss(logits: torch.Tensor, teacher: torch.Tensor, weight: float) -> torch.Tensor:
    """Returns one question's loss: the softmax over its list, and a little pointwise loss.

    Args:
        logits: The model's scores, the positive's first.
        teacher: The teacher's scores in the same order.
        weight: The teacher's share in the target.
    """
    target = weight * torch.softmax(TEACHER_SCALE * teacher, dim=0)
    target[0] += 1.0 - weight
    listwise = -(target * torch.log_softmax(logits, dim=0)).sum()
    label = torch.zeros_like(logits)
    label[0] = 1.0
    # A softmax does not see a shift of the whole list, so without this term scores of different
    # questions could not be compared.
    pointwise = functional.binary_cross_entropy_with_logits(logits, label)
    return listwise + POINTWISE_WEIGHT * pointwise


def pick_sources(progress: float, count: int, rng: random.Random) -> list[str]:
    """Returns the sources of one step's questions."""
    weights = [first + (last - first) * progress for first, last in MIX.values()]
    return rng.choices(list(MIX), weights, k=count)


class Run:
    """The state of one training run, which can be saved and resumed."""

    def __init__(self, options: argparse.Namespace, sources: dict[str, Source]) -> None:
        """Builds the model and its optimiser.

        Args:
            options: The command's arguments.
            sources: What is trained on.
        """
        self.options = options
        self.sources = sources
        self.model = build_model(options.encoder)
        if options.start:
            self.model.load_state_dict(load_file(options.start / "model.safetensors"))
        self.tokenizer = build_tokenizer(options.encoder)
        self.pairs = Pairs(self.tokenizer, sources)
        # Words seen in a short training would otherwise move away from those not seen.
        self.model.roberta.embeddings.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(self.model.roberta.encoder.parameters()), "peak": options.rate},
                {"params": list(self.model.classifier.parameters()), "peak": 3 * options.rate},
            ],
            weight_decay=0.01,
        )
        self.step = 0
        self.seconds = 0.0
        self.used = dict.fromkeys(sources, 0)

    def progress(self) -> float:
        """Returns how far the run is: by steps or by time, whichever is further."""
        options = self.options
        return min(1.0, max(self.step / options.steps, self.seconds / (60 * options.minutes)))

    def set_rate(self) -> None:
        """Sets the learning rate: a short rise, then a straight line to 0."""
        factor = min(1.0, (self.step + 1) / self.options.warm_up) * (1.0 - self.progress())
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * max(factor, 1e-3)

    def next_question(self, name: str) -> Question:
        """Returns a source's next question; each round goes through them in a new order."""
        questions = self.sources[name].questions
        round_, place = divmod(self.used[name], len(questions))
        self.used[name] += 1
        order = list(range(len(questions)))
        random.Random(f"{self.options.seed}-{name}-{round_}").shuffle(order)  # noqa: S311
        return questions[order[place]]

    def train_step(self) -> float:
        """Trains on one batch of questions and returns its mean loss."""
        rng = random.Random(f"{self.options.seed}-{self.step}")  # noqa: S311
        limit = SHORT_DOCUMENT if self.progress() < SHORT_PART else LONG_DOCUMENT
        rows: list[list[int]] = []
        lists: list[tuple[int, torch.Tensor, float]] = []
        for name in pick_sources(self.progress(), self.options.questions, rng):
            question = self.next_question(name)
            drawn = draw_negatives(question, self.sources[name].negatives, rng)
            places = [question.pool[place] for place in drawn]
            built = self.pairs.build(name, question, places, limit, rng)
            teacher = [question.teacher[0], *(question.teacher[1 + place] for place in drawn)]
            lists.append((len(built), torch.tensor(teacher), self.sources[name].teacher_weight))
            rows.extend(built)
        self.set_rate()
        scores = torch.split(score(self.model, rows), [size for size, _, _ in lists])
        losses = [
            list_loss(logits, teacher, weight)
            for logits, (_, teacher, weight) in zip(scores, lists, strict=True)
        ]
        loss = torch.stack(losses).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return float(loss.detach())

    def save(self, path: Path) -> None:
        """Saves everything that is needed to go on from here."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "used": self.used,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Goes on from a saved state."""
        state = torch.load(path)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.used = state["step"], state["seconds"], state["used"]

    @torch.inference_mode()
    def held_out_scores(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns logits and labels of the questions that were set aside."""
        rng = random.Random(self.options.seed)  # noqa: S311
        rows, labels = [], []
        for name, source in self.sources.items():
            for question in source.held_out:
                drawn = draw_negatives(question, source.negatives, rng)
                places = [question.pool[place] for place in drawn]
                rows.extend(self.pairs.build(name, question, places, LONG_DOCUMENT, rng))
                labels.extend([1.0] + [0.0] * len(places))
        return score(self.model, rows), torch.tensor(labels)

    def export(self, out: Path) -> None:
        """Calibrates a copy of the weights and writes the checkpoint folder."""
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        scale, shift = fit_scale(*self.held_out_scores())
        state["classifier.out_proj.weight"] *= scale
        state["classifier.out_proj.bias"] = state["classifier.out_proj.bias"] * scale + shift
        export(self.model.config, state, self.tokenizer, out)
        LOG.info("exported at step %d, scale %.3f, shift %.3f", self.step, scale, shift)


def fit_scale(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Fits scale and shift so that a logit's sigmoid says how likely a pair is relevant.

    Both classes count the same, so 0.5 lies between a typical hard negative and a typical
    positive. The scale is positive, so no order changes.

    Args:
        logits: Scores of held-out pairs.
        labels: 1 for the right document, 0 for the others.
    """
    logits, labels = logits.clone(), labels.clone()
    balance = torch.where(labels > 0, 0.5 / labels.mean(), 0.5 / (1 - labels.mean()))
    log_scale = torch.zeros(1, requires_grad=True)
    shift = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_scale, shift], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        scaled = logits * log_scale.exp() + shift
        loss = functional.binary_cross_entropy_with_logits(scaled, labels, weight=balance)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(log_scale.detach().exp()), float(shift.detach())


def train(run: Run) -> None:
    """Trains until the steps or the time run out."""
    options = run.options
    state_path = options.work / "state.pt"
    saved = time.monotonic()
    recent: list[float] = []
    while run.progress() < 1.0:
        started = time.monotonic()
        recent.append(run.train_step())
        run.seconds += time.monotonic() - started
        if run.step % 10 == 0:
            mean = sum(recent) / len(recent)
            LOG.info(
                "step %d, %.0f s, progress %.3f, loss %.4f",
                run.step,
                run.seconds,
                run.progress(),
                mean,
            )
            recent.clear()
        if time.monotonic() - saved > 60 * options.save_minutes:
            run.save(state_path)
            run.export(options.out)
            saved = time.monotonic()
    run.save(state_path)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=Path, required=True, help="training pairs (.jsonl.gz)")
    parser.add_argument("--encoder", type=Path, required=True, help="all-MiniLM-L6-v2 folder")
    parser.add_argument("--start", type=Path, help="a checkpoint folder of an earlier run")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--work", type=Path, required=True, help="folder for resumable state")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=60.0, help="time limit of the training")
    parser.add_argument("--questions", type=int, default=20, help="questions in a step")
    parser.add_argument("--rate", type=float, default=1e-4, help="highest learning rate")
    parser.add_argument("--warm-up", type=int, default=40, help="steps of rising rate")
    parser.add_argument("--save-minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=13)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(arguments)


def main() -> None:
    """Mines, trains and exports."""
    options = parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.work.mkdir(parents=True, exist_ok=True)
    sources_path = options.work / "sources.pt"
    if sources_path.exists():
        # Written by an earlier start of this same run.
        sources = torch.load(sources_path, weights_only=False)
    else:
        sources = load_sources(options.pairs, options.encoder, SAMPLE_SEED)
        torch.save(sources, sources_path)
    for name, source in sources.items():
        LOG.info(
            "%s: %d documents, %d questions", name, len(source.documents), len(source.questions)
        )
    run = Run(options, sources)
    state_path = options.work / "state.pt"
    if state_path.exists():
        run.load(state_path)
        LOG.info("going on from step %d", run.step)
    train(run)
    run.export(options.out)


if __name__ == "__main__":
    main()
