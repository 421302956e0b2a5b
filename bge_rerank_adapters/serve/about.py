"""The routes that report: health, metrics, limits, and the model's names."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from fastapi.security import HTTPBearer
from prometheus_client.exposition import CONTENT_TYPE_LATEST

import bge_rerank_adapters
from bge_rerank_adapters.serve.metrics import Metrics
from bge_rerank_adapters.serve.refusals import documented
from bge_rerank_adapters.serve.schemas import answers
from bge_rerank_adapters.serve.service import Service
from bge_rerank_adapters.serve.settings import ANY_MODEL

_TEXT = "The metrics in Prometheus' text format."

# Only for the OpenAPI description: the gate checks the key.
key = Depends(HTTPBearer(auto_error=False, description="The server's API key."))

open_router = APIRouter()
keyed_router = APIRouter()


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Served = Annotated[Service, Depends(_service)]


@keyed_router.get(
    "/metrics",
    summary="Metrics for Prometheus",
    response_class=Response,
    responses=documented(401) | {200: {"content": {"text/plain": {}}, "description": _TEXT}},
)
async def metrics(request: Request) -> Response:
    """Return requests by route and status, and the engine's counters."""
    counted: Metrics = request.app.state.metrics
    return Response(counted.text(), media_type=CONTENT_TYPE_LATEST)


@keyed_router.get(
    "/info", summary="What the server is, and its limits", responses=documented(401, 503)
)
async def info(service: Served) -> answers.Info:
    """Return the model's name and dtype, and the limits of a request."""
    settings, engine = service.settings, service.engine
    return answers.Info(
        server="bge_rerank_adapters",
        version=bge_rerank_adapters.__version__,
        model_id=settings.model_name,
        model_sha=engine.settings.revision,
        model_dtype=engine.dtype,
        model_type={"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}},
        served_model_name=settings.model_name,
        max_input_length=engine.settings.max_length,
        max_client_batch_size=settings.max_documents,
        max_batch_tokens=engine.pack_tokens,
        max_concurrent_requests=settings.max_concurrent_requests,
        max_body_bytes=settings.max_body_bytes,
        max_characters=settings.max_characters,
        auto_truncate=True,
        tokenization_workers=1,
        long_documents=engine.settings.long_documents,
    )


@keyed_router.get("/v1/models", summary="The names of the model", responses=documented(401))
async def models(service: Served) -> answers.ServedModels:
    """Return the names that requests may use for the model."""
    names = [name for name in service.settings.model_names if name != ANY_MODEL]
    return answers.ServedModels(object="list", data=[_model(name, service) for name in names])


@keyed_router.get(
    "/v1/models/{model:path}", summary="The model by name", responses=documented(401, 404)
)
async def model(model: str, service: Served) -> answers.ServedModel:
    """Return the model, if this is one of its names; a name may contain slashes."""
    service.check_model(model)
    return _model(model, service)


@open_router.get("/v1/cluster/auth", summary="Whether a key is needed, in Xinference's format")
async def key_needed(service: Served) -> answers.KeyNeeded:
    """Return what Xinference's clients ask before they send their key."""
    return answers.KeyNeeded(auth=service.settings.api_key is not None)


@open_router.get("/health", summary="Whether the server scores", responses=documented(503))
@open_router.head("/health", include_in_schema=False)
async def health(service: Served) -> answers.Health:
    """Answer 200 while the model is loaded, 503 before and after."""
    _ = service.engine
    return answers.Health(status="ok")


def _model(name: str, service: Service) -> answers.ServedModel:
    return answers.ServedModel(
        id=name,
        object="model",
        created=service.started,
        owned_by="bge_rerank_adapters",
        model_name=service.settings.model_name,
        model_type="rerank",
    )
