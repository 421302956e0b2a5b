"""The LangChain part of the demo: retriever, reranking, prompt, chat model."""

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda, RunnablePassthrough

from bge_rerank_adapters.calls.ranking import Scorer
from bge_rerank_adapters.cli.demo.first_stage import collection, search
from bge_rerank_adapters.langchain import BGEDocumentCompressor


class FirstStage(BaseRetriever):
    """Searches the demo's collection with BM25."""

    top_k: int

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,  # noqa: ARG002
    ) -> list[Document]:
        return [
            Document(id=name, page_content=collection()[name], metadata={"bm25": score})
            for name, score in search(query, top_k=self.top_k)
        ]


def reranking_retriever(reranker: Scorer, *, fetch: int, top_k: int) -> tuple[str, BaseRetriever]:
    """Return a retriever and its name: LangChain's own if it is installed."""
    compressor = BGEDocumentCompressor(reranker=reranker, top_k=top_k)
    first_stage = FirstStage(top_k=fetch)
    try:
        from langchain_classic.retrievers import ContextualCompressionRetriever
    except ImportError:
        return "compressor.wrap(retriever)", compressor.wrap(first_stage)
    retriever = ContextualCompressionRetriever(
        base_compressor=compressor, base_retriever=first_stage
    )
    return "ContextualCompressionRetriever", retriever


def answer(retriever: BaseRetriever, question: str) -> tuple[list[Document], str]:
    """Run the whole chain; return the documents that reached the prompt, and the answer."""
    seen: list[Document] = []

    def join(documents: list[Document]) -> str:
        seen.extend(documents)
        return "\n".join(document.page_content for document in documents)

    prompt = ChatPromptTemplate.from_template("Answer from:\n{context}\n\nQuestion: {question}")
    model = FakeListChatModel(responses=["(a fake chat model stands here)"])
    chain = (
        {"context": retriever | RunnableLambda(join), "question": RunnablePassthrough()}
        | prompt
        | model
        | StrOutputParser()
    )
    return seen, chain.invoke(question)
