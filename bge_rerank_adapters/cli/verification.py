"""Compares an installed model's scores with the published ones."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bge_rerank_adapters.calls.ranking import sigmoid
from bge_rerank_adapters.cli.words import in_shell_words
from bge_rerank_adapters.engine.checkpoints.published import PUBLISHED_SCORES, PublishedScores
from bge_rerank_adapters.engine.reranker import Reranker
from bge_rerank_adapters.errors import CheckpointNotFoundError
from bge_rerank_adapters.settings import EngineSettings

# How far a logit may differ in other dtypes, in addition to the source's own rounding. Measured
# maximum differences from float32 on a CPU, bundled checkpoint: 0.003 in float16 and 0.031 in
# bfloat16 on 120 real pairs, 0.24 in int8 on 240. A model of base's size with random weights: 0.27
# in bfloat16 on 16 pairs. Deeper models may differ more, so the tolerances are larger.
LOGIT_TOLERANCE = {"float32": 0.0, "float16": 0.05, "bfloat16": 0.3, "int8": 0.6}
# The maximum slope of the sigmoid: a score differs at most by this fraction of its logit.
_STEEPEST = 0.25


@dataclass(frozen=True, slots=True)
class Comparison:
    """One published figure and the one computed here.

    Attributes:
        source: Where the figure was published.
        kind: `"score"` or `"logit"`.
        query: The pair's query.
        document: The pair's document.
        expected: The published figure.
        got: The one computed here.
        tolerance: How far they may differ.
    """

    source: str
    kind: str
    query: str
    document: str
    expected: float
    got: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the two are close enough."""
        return abs(self.got - self.expected) <= self.tolerance


def compare(reranker: Reranker, published: Iterable[PublishedScores]) -> list[Comparison]:
    """Return every published figure with the engine's own.

    Raises:
        RerankError: The engine fails.
    """
    compared: list[Comparison] = []
    for entry in published:
        for index, expected in entry.expected.items():
            query, document = entry.pairs[index]
            logit = reranker.logits(query, [document])[0]
            got = sigmoid(logit) if entry.kind == "score" else logit
            rounding = max(LOGIT_TOLERANCE[each] for each in reranker.dtype.split(", "))
            rounding *= _STEEPEST if entry.kind == "score" else 1.0
            compared.append(
                Comparison(
                    entry.source,
                    entry.kind,
                    query,
                    document,
                    expected,
                    got,
                    entry.tolerance + rounding,
                )
            )
    return compared


def published_for(model: str) -> list[PublishedScores]:
    """Return what was published for a checkpoint: a hub name, or a folder named like one."""
    return [
        entry
        for entry in PUBLISHED_SCORES
        if model == entry.model or Path(model).name == entry.model.partition("/")[2]
    ]


def run(console: Console, settings: EngineSettings) -> bool:
    """Print a table of published figures and an engine's own; return whether all agree.

    If nothing was published for the model, or its weights are not found, it says so and returns
    False.
    """
    model = settings.model
    published = published_for(model)
    if not published:
        known = ", ".join(sorted({entry.model for entry in PUBLISHED_SCORES}))
        message = f"No scores were published for {model!r}; there are some for {known}."
        console.print(escape(message))
        return False
    try:
        reranker = Reranker.from_settings(settings)
    except CheckpointNotFoundError as error:
        told = in_shell_words(str(error))
        message = f"Nothing was compared, since the weights are missing: {told}"
        console.print(escape(message), highlight=False)
        return False
    with reranker:
        compared = compare(reranker, published)
        console.print(_table(compared, title=f"{model}, {reranker.device}, {reranker.dtype}"))
    return all(each.passed for each in compared)


def _table(compared: list[Comparison], *, title: str) -> Table:
    columns = ("source", "query", "document", "kind", "published", "here", "")
    table = Table(*columns, title=escape(title))
    for each in compared:
        table.add_row(
            escape(each.source),
            escape(_short(each.query)),
            escape(_short(each.document)),
            each.kind,
            f"{each.expected:.4f}",
            f"{each.got:.4f}",
            "[green]pass[/green]" if each.passed else "[red]FAIL[/red]",
        )
    return table


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:39]}…"
