"""Ours and the peers, each as its own documentation says to call it, behind one small interface."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Scores of a query's documents in input order. Logits, but for peers that give probabilities or
# an order alone, which `ORDER_ALONE` names.
Score = Callable[[str, Sequence[str]], list[float]]
MAX_LENGTH = 512


def ours(dtype: str, **settings: Any) -> Callable[[Path], Score]:
    """This package in a dtype."""

    def load(folder: Path) -> Score:
        from bge_rerank_adapters import Reranker

        reranker = Reranker(str(folder), dtype=dtype, **settings)
        return reranker.logits

    return load


def flag_reranker(folder: Path) -> Score:
    """FlagEmbedding's FlagReranker with its defaults, which are float32 on a processor."""
    from FlagEmbedding import FlagReranker

    reranker = FlagReranker(str(folder), use_fp16=False)

    def score(query: str, documents: Sequence[str]) -> list[float]:
        scores: Any = reranker.compute_score([(query, document) for document in documents])
        return list(scores)

    return score


def milvus(folder: Path) -> Score:
    """milvus-model's BGERerankFunction, which pymilvus brings."""
    from milvus_model.reranker import BGERerankFunction

    reranker = BGERerankFunction(str(folder), use_fp16=False, device="cpu", normalize=False)

    def score(query: str, documents: Sequence[str]) -> list[float]:
        results = reranker(query, list(documents), top_k=len(documents))
        return [each.score for each in sorted(results, key=lambda each: each.index)]

    return score


def cross_encoder(dtype: str, batch: int, **settings: Any) -> Callable[[Path], Score]:
    """sentence-transformers' CrossEncoder."""

    def load(folder: Path) -> Score:
        import torch
        from sentence_transformers import CrossEncoder

        kwargs = {} if "backend" in settings else {"dtype": getattr(torch, dtype)}
        model = CrossEncoder(
            str(folder),
            max_length=MAX_LENGTH,
            device="cpu",
            activation_fn=torch.nn.Identity(),
            **{"model_kwargs": kwargs, **settings},
        )

        def score(query: str, documents: Sequence[str]) -> list[float]:
            pairs = [(query, document) for document in documents]
            return [float(each) for each in model.predict(pairs, batch_size=batch)]

        return score

    return load


def llama_index(folder: Path) -> Score:
    """LlamaIndex's FlagEmbeddingReranker."""
    from llama_index.core.schema import NodeWithScore, TextNode
    from llama_index.postprocessor.flag_embedding_reranker import FlagEmbeddingReranker

    def score(query: str, documents: Sequence[str]) -> list[float]:
        reranker.top_n = len(documents)
        nodes = [
            NodeWithScore(node=TextNode(text=text, id_=str(place)))
            for place, text in enumerate(documents)
        ]
        found = reranker.postprocess_nodes(nodes, query_str=query)
        scores = {each.node.node_id: each.score for each in found}
        return [float(scores[str(place)] or 0.0) for place in range(len(documents))]

    reranker = FlagEmbeddingReranker(model=str(folder), top_n=1, use_fp16=False)
    return score


def langchain(folder: Path) -> Score:
    """LangChain's CrossEncoderReranker, which tells the order alone."""
    from langchain_classic.retrievers.document_compressors import CrossEncoderReranker
    from langchain_community.cross_encoders import HuggingFaceCrossEncoder
    from langchain_core.documents import Document

    model = HuggingFaceCrossEncoder(model_name=str(folder), model_kwargs={"device": "cpu"})

    def score(query: str, documents: Sequence[str]) -> list[float]:
        reranker = CrossEncoderReranker(model=model, top_n=len(documents))
        found = reranker.compress_documents(
            [Document(text, id=str(place)) for place, text in enumerate(documents)], query
        )
        places = {int(each.id or 0): -float(rank) for rank, each in enumerate(found)}
        return [places[place] for place in range(len(documents))]

    return score


def openvino(precision: str) -> Callable[[Path], Score]:
    """OpenVINO used as well as it can be: padded batches of 4 in length order, two streams."""

    def load(folder: Path) -> Score:
        from benchmarks.openvino_peer import OpenVinoReranker

        return OpenVinoReranker(folder, precision=precision, batch=4, streams=2).score

    return load


def onnx(*, int8: bool) -> Callable[[Path], Score]:
    """sentence-transformers' CrossEncoder on ONNX Runtime."""

    def load(folder: Path) -> Score:
        from benchmarks.onnx_peers import exported, quantised

        made, name = quantised(folder) if int8 else (exported(folder), "model.onnx")
        options = {"file_name": name, "provider": "CPUExecutionProvider"}
        return cross_encoder("float32", 8, backend="onnx", model_kwargs=options)(made)

    return load


def fastembed(folder: Path) -> Score:
    """Fastembed's TextCrossEncoder on an ONNX file of the checkpoint."""
    from fastembed.common.model_description import ModelSource
    from fastembed.rerank.cross_encoder import TextCrossEncoder

    from benchmarks.onnx_peers import exported

    made = exported(folder)
    TextCrossEncoder.add_custom_model(model="local", sources=ModelSource(url=made.as_uri()))
    model = TextCrossEncoder("local", specific_model_path=str(made), threads=os.cpu_count())
    return lambda query, documents: [float(each) for each in model.rerank(query, documents)]


CONTENDERS: dict[str, Callable[[Path], Score]] = {
    "ours float32": ours("float32"),
    "ours bfloat16": ours("bfloat16"),
    "ours int8": ours("int8"),
    "ours auto": ours("auto"),
    "FlagReranker": flag_reranker,
    "milvus BGERerankFunction": milvus,
    "CrossEncoder float32, batch 32": cross_encoder("float32", 32),
    "CrossEncoder float32, batch 8": cross_encoder("float32", 8),
    "CrossEncoder bfloat16, batch 32": cross_encoder("bfloat16", 32),
    "CrossEncoder bfloat16, batch 8": cross_encoder("bfloat16", 8),
    "CrossEncoder OpenVINO, batch 8": cross_encoder("float32", 8, backend="openvino"),
    "CrossEncoder ONNX, batch 8": onnx(int8=False),
    "CrossEncoder ONNX int8, batch 8": onnx(int8=True),
    "LlamaIndex FlagEmbeddingReranker": llama_index,
    "LangChain CrossEncoderReranker": langchain,
    "OpenVINO float32, tuned": openvino("f32"),
    "OpenVINO bfloat16, tuned": openvino("bf16"),
    "OpenVINO int8, tuned": openvino("int8"),
    "fastembed TextCrossEncoder": fastembed,
}
# These tell places or probabilities, so their scores are compared by order alone.
ORDER_ALONE = {"LangChain CrossEncoderReranker"}
# These choose a dtype by the processor, so no product rate is theirs.
OWN_CHOICE = {"ours auto", "CrossEncoder OpenVINO, batch 8"}
