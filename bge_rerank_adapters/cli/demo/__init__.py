"""`bge-rerank demo`: reranks real text with the engine and in two hosts."""

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bge_rerank_adapters.calls.ranking import Scorer
from bge_rerank_adapters.cli.demo.first_stage import collection, search
from bge_rerank_adapters.engine.checkpoints.published import PUBLISHED_SCORES
from bge_rerank_adapters.engine.reranker import Reranker
from bge_rerank_adapters.settings import EngineSettings

QUESTION = "What year did Tesla die?"
FETCH, SHOWN, TOP_K = 20, 5, 3
Row = tuple[str, str, str]


def run(console: Console, settings: EngineSettings) -> None:
    """Rerank with the engine, in a LangChain chain and in a LlamaIndex query engine.

    Args:
        console: Where the tables go. For a host that is not installed it prints the extra to
            install.
        settings: The engine's settings.

    Raises:
        RerankError: The model cannot be loaded, or failed.
    """
    with Reranker.from_settings(settings) as reranker:
        console.print(f"{escape(repr(reranker))}\n", highlight=False)
        _engine_part(console, reranker)
        console.rule("The same in LangChain and LlamaIndex")
        console.print(f"\n{len(collection())} sentences of XQuAD-R. Question: {QUESTION}\n")
        found = search(QUESTION, top_k=SHOWN)
        before = [
            (f"{score:.3f}", str(index), collection()[name])
            for index, (name, score) in enumerate(found)
        ]
        console.print(_table("Before: BM25", before))
        _langchain_part(console, reranker)
        _llama_index_part(console, reranker)


def _engine_part(console: Console, reranker: Scorer) -> None:
    pairs = PUBLISHED_SCORES[0].pairs
    query, documents = pairs[0][0], [document for _, document in pairs]
    console.rule("The engine")
    console.print(f"\nQuestion: {query}\n")
    before = [("", str(index), text) for index, text in enumerate(documents)]
    console.print(_table("Before: as given", before))
    ranked = reranker.rerank(query, documents)
    console.print(
        _table(
            "After: reranked",
            [(f"{each.score:.3f}", str(each.index), each.text) for each in ranked],
        )
    )


def _langchain_part(console: Console, reranker: Scorer) -> None:
    try:
        from bge_rerank_adapters.cli.demo import langchain_part
    except ImportError:
        _skip(console, "LangChain", "langchain")
        return
    name, retriever = langchain_part.reranking_retriever(reranker, fetch=FETCH, top_k=TOP_K)
    documents, answer = langchain_part.answer(retriever, QUESTION)
    rows = [
        (
            f"{document.metadata['relevance_score']:.3f}",
            str(document.metadata["retrieval_index"]),
            document.page_content,
        )
        for document in documents
    ]
    console.print(_table(f"After: LangChain, {name} over BM25's best {FETCH}", rows))
    console.print(f"The chain's answer: {answer}\n")


def _llama_index_part(console: Console, reranker: Scorer) -> None:
    try:
        from bge_rerank_adapters.cli.demo import llama_index_part
    except ImportError:
        _skip(console, "LlamaIndex", "llama-index")
        return
    nodes = llama_index_part.query(reranker, QUESTION, fetch=FETCH, top_k=TOP_K)
    rows = [
        (
            f"{node.node.metadata['relevance_score']:.3f}",
            str(node.node.metadata["retrieval_index"]),
            node.node.get_content(),
        )
        for node in nodes
    ]
    console.print(_table(f"After: LlamaIndex query engine over BM25's best {FETCH}", rows))


def _skip(console: Console, host: str, extra: str) -> None:
    console.print(
        f"{host} is not installed, so its part is left out; to see it: "
        f'pip install "bge-rerank-adapters\\[{extra}]"\n'
    )


def _table(title: str, rows: Iterable[Row]) -> Table:
    table = Table("rank", "score", "index", "text", title=title, title_justify="left")
    for rank, (score, index, text) in enumerate(rows, start=1):
        table.add_row(str(rank), score, index, escape(text))
    return table
