"""The routes that score, with the answers of each API."""

import json
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from bge_rerank_adapters.calls.ranked_document import RankedDocument
from bge_rerank_adapters.serve.bodies import JsonRoute
from bge_rerank_adapters.serve.refusals import Refusal, documented
from bge_rerank_adapters.serve.schemas import answers
from bge_rerank_adapters.serve.schemas.kinds import Document
from bge_rerank_adapters.serve.schemas.requests import (
    EitherRequest,
    RerankRequest,
    TeiRerankRequest,
)
from bge_rerank_adapters.serve.scoring import rank, shown_score
from bge_rerank_adapters.serve.service import Service

_PROBLEMS = (400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503, 504)
# As Cohere counts.
_DOCUMENTS_PER_SEARCH_UNIT = 100

_RANKS_DOCUMENTS: dict[str, Any] = {
    "response_model": answers.RerankResponse,
    "response_model_exclude_none": True,
    "responses": documented(*_PROBLEMS),
}

scoring_router = APIRouter(route_class=JsonRoute)


@scoring_router.post(
    "/v1/rerank", summary="Rank documents, as Cohere and Jina do", **_RANKS_DOCUMENTS
)
async def rerank_v1(request: Request, body: RerankRequest) -> Response:
    """Return the documents' scores, best first."""
    return await _rerank(request, body, version="1")


@scoring_router.post("/v2/rerank", summary="Rank documents, as Cohere does", **_RANKS_DOCUMENTS)
async def rerank_v2(request: Request, body: RerankRequest) -> Response:
    """Return the documents' scores, best first."""
    return await _rerank(request, body, version="2")


@scoring_router.post(
    "/infinity/rerank", summary="Rank documents, as infinity does", **_RANKS_DOCUMENTS
)
async def rerank_infinity(request: Request, body: RerankRequest) -> Response:
    """Return the documents' scores, best first; documents that are sent back are bare texts."""
    return await _rerank(request, body, version="1", bare_texts=True)


@scoring_router.post(
    "/rerank",
    summary="Rank texts as text-embeddings-inference does, or documents as vLLM does",
    response_model=list[answers.Rank] | answers.RerankResponse,
    response_model_exclude_none=True,
    responses=documented(*_PROBLEMS, tei=True),
)
async def rerank_either(request: Request, body: EitherRequest) -> Response:
    """Return the scores, best first: a bare list for `texts`, an object for `documents`."""
    if isinstance(body, RerankRequest):
        return await _rerank(request, body, version="1")
    return await _rerank_texts(request, body)


async def _rerank_texts(request: Request, body: TeiRerankRequest) -> Response:
    if "documents" in body.ignored:
        raise Refusal(422, "There are texts and documents; send texts, or documents, not both.")
    if not body.texts:
        raise Refusal(400, "`texts` cannot be empty.", kind="Empty")
    ranks = [
        {"index": each.index, "score": shown_score(body, each)}
        | ({"text": body.texts[each.index]} if body.return_text else {})
        for each in await rank(request, body, body.texts)
    ]
    return _json(ranks)


async def _rerank(
    request: Request, body: RerankRequest, *, version: str, bare_texts: bool = False
) -> Response:
    service: Service = request.app.state.service
    service.check_model(body.model)
    texts = body.texts()
    ranking = await rank(request, body, texts)
    sent_back: Sequence[Any] = texts if bare_texts else list(map(_as_sent, body.documents))
    results = [
        {"index": each.index, "relevance_score": shown_score(body, each)}
        | ({"document": sent_back[each.index]} if body.return_documents else {})
        | (_details(each) if body.return_details else {})
        for each in ranking
    ]
    tokens = 0 if ranking.usage is None else ranking.usage.tokens
    return _json(
        {
            "id": str(uuid.uuid4()),
            "object": "rerank",
            "model": service.settings.model_name,
            "results": results,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "meta": {
                "api_version": {"version": version},
                "billed_units": {"search_units": _search_units(body.documents)},
                "tokens": {"input_tokens": tokens},
            },
        }
    )


def _search_units(documents: Sequence[Document]) -> int:
    return max(1, -(-len(documents) // _DOCUMENTS_PER_SEARCH_UNIT))


def _as_sent(document: Document) -> dict[str, Any]:
    return {"text": document} if isinstance(document, str) else document


def _details(result: RankedDocument) -> dict[str, Any]:
    details: dict[str, Any] = {
        "logit": result.logit,
        "truncated": result.truncated,
        "query_truncated": result.query_truncated,
    }
    return details if result.span is None else details | {"span": list(result.span)}


def _json(content: Any) -> Response:
    shown = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        body = shown.encode("utf-8")
    except UnicodeEncodeError:
        # A returned document has a lone surrogate, which JSON can escape.
        body = json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")
    return Response(body, media_type="application/json")
