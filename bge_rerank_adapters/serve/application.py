"""The ASGI app: its routes, and the engine's life cycle."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

import bge_rerank_adapters
from bge_rerank_adapters.engine.stats import EngineStats
from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.serve.about import key, keyed_router, open_router
from bge_rerank_adapters.serve.concurrency import IncomingBodies
from bge_rerank_adapters.serve.gate import Gate
from bge_rerank_adapters.serve.metrics import Metrics
from bge_rerank_adapters.serve.page.routes import page_router
from bge_rerank_adapters.serve.refusals import handle_errors
from bge_rerank_adapters.serve.routes import scoring_router
from bge_rerank_adapters.serve.service import Service
from bge_rerank_adapters.serve.settings import ServerSettings
from bge_rerank_adapters.serve.tracing import Tracing

if TYPE_CHECKING:
    from bge_rerank_adapters.engine.reranker import Reranker


def create_app(
    settings: ServerSettings | None = None, *, engine: "Reranker | None" = None
) -> FastAPI:
    """Return an ASGI app that reranks.

    Args:
        settings: The server's settings; `None` is the defaults, without the environment.
        engine: A loaded engine, which the caller closes after the app has ended; `None` loads one
            from `settings.engine` when the app starts, and closes it when it ends.

    Raises:
        SettingsError: The settings were pickled, which removed their api_key.

    Example:
        ```python
        from bge_rerank_adapters.serve import ServerSettings, create_app
        from bge_rerank_adapters.settings import EngineSettings

        app = create_app(ServerSettings(engine=EngineSettings(model="tiny"), max_documents=100))
        ```
    """
    settings = ServerSettings() if settings is None else settings
    if settings.api_key_left_out:
        raise SettingsError(
            "These settings had an api_key, which was left out where they were pickled; use "
            "settings.with_secrets(), or replace(settings, api_key=...)."
        )
    service = Service(settings, engine)
    metrics = Metrics(lambda: _stats(service), lambda: _about(service))

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(service.load)
        try:
            yield
        finally:
            await asyncio.to_thread(service.close)

    app = FastAPI(
        title="bge_rerank_adapters",
        version=bge_rerank_adapters.__version__,
        description="Ranks documents by how well they answer a query, with a BGE reranker.",
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        # A redirect would repeat the request's Host header, which may be forged.
        redirect_slashes=False,
    )
    app.state.settings, app.state.service, app.state.metrics = settings, service, metrics
    app.state.incoming_bodies = IncomingBodies(
        max_requests=settings.max_reading_requests, max_bytes=settings.max_reading_bytes
    )
    app.include_router(open_router)
    app.include_router(page_router())
    for router in (scoring_router, keyed_router):
        app.include_router(router, dependencies=[key] if settings.api_key else [])
    app.state.tracing = Tracing()
    app.add_middleware(Gate, settings=settings, metrics=metrics, tracing=app.state.tracing)
    if settings.cors_origins:
        # Outside the gate: preflight requests have no key, and browsers must see refusals too.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    handle_errors(app)
    return app


def _stats(service: Service) -> EngineStats | None:
    return None if service.loaded is None else service.loaded.stats()


def _about(service: Service) -> dict[str, str] | None:
    engine = service.loaded
    if engine is None:
        return None
    return {
        "model": service.settings.model_name,
        "device": engine.device,
        "dtype": engine.dtype,
        "version": bge_rerank_adapters.__version__,
    }
