"""The routes: requests to calls of the engine, rankings to answers."""

import json
import uuid
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from fastapi.security import HTTPBearer
from prometheus_client.exposition import CONTENT_TYPE_LATEST

import bge_rerank_adapters
from bge_rerank_adapters.calls.ranking import RankedDocument
from bge_rerank_adapters.serve import schemas
from bge_rerank_adapters.serve.bodies import JsonRoute
from bge_rerank_adapters.serve.metrics import Metrics
from bge_rerank_adapters.serve.refusals import Refusal, documented
from bge_rerank_adapters.serve.schemas import Document, RerankRequest, TeiRerankRequest
from bge_rerank_adapters.serve.service import Service

_PROBLEMS = (400, 401, 408, 413, 415, 422, 429, 500, 503, 504)
_TEXT = "The metrics in Prometheus' text format."

# The gate checks the key; this tells the OpenAPI description of it.
key = Depends(HTTPBearer(auto_error=False, description="The server's API key."))

open_router = APIRouter()
keyed_router = APIRouter(route_class=JsonRoute)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Served = Annotated[Service, Depends(_service)]


@keyed_router.post(
    "/v1/rerank",
    summary="Rank documents, as Cohere and Jina do",
    response_model=schemas.RerankResponse,
    response_model_exclude_none=True,
    responses=documented(404, *_PROBLEMS),
)
async def rerank_v1(request: Request, body: RerankRequest, service: Served) -> Response:
    """Return the documents' scores, best first."""
    return await _rerank(request, body, service, version="1")


@keyed_router.post(
    "/v2/rerank",
    summary="Rank documents, as Cohere does",
    response_model=schemas.RerankResponse,
    response_model_exclude_none=True,
    responses=documented(404, *_PROBLEMS),
)
async def rerank_v2(request: Request, body: RerankRequest, service: Served) -> Response:
    """Return the documents' scores, best first."""
    return await _rerank(request, body, service, version="2")


@keyed_router.post(
    "/rerank",
    summary="Rank texts, as text-embeddings-inference does",
    response_model=list[schemas.Rank],
    response_model_exclude_none=True,
    responses=documented(*_PROBLEMS, tei=True),
)
async def rerank_tei(request: Request, body: TeiRerankRequest, service: Served) -> Response:
    """Return the texts' scores, best first."""
    if not body.texts:
        raise Refusal(400, "`texts` cannot be empty.", kind="Empty")
    ranking = await service.rank(request.receive, body.query, body.texts)
    if body.truncate is False:
        _refuse_cuts(ranking)
    ranks = [
        {"index": each.index, "score": each.logit if body.raw_scores else each.score}
        | ({"text": body.texts[each.index]} if body.return_text else {})
        for each in ranking
    ]
    return _json(ranks)


@keyed_router.get(
    "/metrics",
    summary="What was done so far, for Prometheus",
    response_class=Response,
    responses=documented(401) | {200: {"content": {"text/plain": {}}, "description": _TEXT}},
)
async def metrics(request: Request) -> Response:
    """Return requests by route and status, and the engine's counts."""
    counted: Metrics = request.app.state.metrics
    return Response(counted.text(), media_type=CONTENT_TYPE_LATEST)


@keyed_router.get(
    "/info", summary="What the server is, and its limits", responses=documented(401, 503)
)
async def info(service: Served) -> schemas.Info:
    """Return the model's name and dtype, and the limits of a request."""
    settings, engine = service.settings, service.engine
    return schemas.Info(
        server="bge_rerank_adapters",
        version=bge_rerank_adapters.__version__,
        model_id=settings.model_name,
        model_dtype=engine.dtype,
        model_type={"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}},
        max_input_length=engine.settings.max_length,
        max_client_batch_size=settings.max_documents,
        max_concurrent_requests=settings.max_concurrent_requests,
        max_body_bytes=settings.max_body_bytes,
        max_characters=settings.max_characters,
        auto_truncate=True,
        long_documents=engine.settings.long_documents,
    )


@keyed_router.get("/v1/models", summary="The model that is served", responses=documented(401))
async def models(service: Served) -> schemas.ServedModels:
    """Return the one model that requests may name."""
    name = service.settings.model_name
    model = schemas.ServedModel(
        id=name, object="model", created=service.started, owned_by="bge_rerank_adapters"
    )
    return schemas.ServedModels(object="list", data=[model])


@open_router.get("/health", summary="Whether the server scores", responses=documented(503))
@open_router.head("/health", include_in_schema=False)
async def health(service: Served) -> schemas.Health:
    """Answer 200 while the model is loaded, 503 before and after."""
    _ = service.engine
    return schemas.Health(status="ok")


async def _rerank(
    request: Request, body: RerankRequest, service: Service, *, version: str
) -> Response:
    service.check_model(body.model)
    texts = body.texts()
    _check_cuts(body, service)
    ranking = await service.rank(request.receive, body.query, texts, top_k=body.top_n)
    results = [
        {"index": each.index, "relevance_score": each.score}
        | ({"document": _as_sent(body.documents[each.index])} if body.return_documents else {})
        | (_details(each) if body.return_details else {})
        for each in ranking
    ]
    return _json(
        {
            "id": str(uuid.uuid4()),
            "model": service.settings.model_name,
            "results": results,
            "meta": {"api_version": {"version": version}},
        }
    )


def _check_cuts(body: RerankRequest, service: Service) -> None:
    """Refuse what would have cut documents in another way than the engine does.

    Raises:
        Refusal: It would.
    """
    settings = service.engine.settings
    for name, given, least in (
        ("max_tokens_per_doc", body.max_tokens_per_doc, settings.max_length),
        ("max_chunks_per_doc", body.max_chunks_per_doc, 1),
    ):
        if given is None:
            continue
        if settings.long_documents == "window":
            raise Refusal(
                422, f"{name} has no effect here: all of a long document is read; leave it out."
            )
        if given < least:
            raise Refusal(
                422,
                f"{name}={given} is less than the {least} that this server reads, which cannot be "
                "set for a request; leave it out, or cut documents before they are sent.",
            )


def _refuse_cuts(ranking: Sequence[RankedDocument]) -> None:
    cut = sorted(each.index for each in ranking if each.truncated)
    if cut:
        shown = ", ".join(map(str, cut[:5])) + (", ..." if len(cut) > 5 else "")
        raise Refusal(
            413,
            f"These texts are longer than the model reads: {shown}; send them in parts, or with "
            "truncate: true.",
        )


def _as_sent(document: Document) -> dict[str, Any]:
    return {"text": document} if isinstance(document, str) else document


def _details(result: RankedDocument) -> dict[str, Any]:
    details: dict[str, Any] = {"logit": result.logit, "truncated": result.truncated}
    return details if result.span is None else details | {"span": list(result.span)}


def _json(content: Any) -> Response:
    shown = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        body = shown.encode("utf-8")
    except UnicodeEncodeError:
        # A document that is sent back has a lone surrogate, which is no text but has an escape.
        body = json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")
    return Response(body, media_type="application/json")
