"""The server that `bge-rerank serve` runs."""

from typing import Any

import uvicorn
from fastapi import FastAPI

from bge_rerank_adapters.serve.metrics import Metrics
from bge_rerank_adapters.serve.settings import ServerSettings
from bge_rerank_adapters.serve.transport.protocol import GuardedProtocol

# Longer than clients keep idle connections, so that the server does not close one while a request
# is on its way.
_KEEP_ALIVE_S = 75
_BACKLOG = 2048
_MAX_CONNECTIONS = 4096
# Files that the process has open besides its connections.
_OTHER_FILES = 128


def server_of(app: FastAPI, **options: Any) -> uvicorn.Server:
    """Return a server for an app of `create_app`; `options` are uvicorn's, such as `access_log`."""
    settings: ServerSettings = app.state.settings
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=_protocol(app.state.metrics),
            ws="none",
            lifespan="on",
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            # No request takes longer than both timeouts together.
            timeout_graceful_shutdown=int(settings.timeout_s + settings.body_timeout_s) + 1,
            backlog=_BACKLOG,
            **options,
        )
    )


def _protocol(metrics: Metrics) -> type[GuardedProtocol]:
    """Return the protocol, limited to the connections that the process may open."""

    class Connection(GuardedProtocol):
        max_connections = _max_connections()

        @staticmethod
        def count_refusal(status: int) -> None:
            metrics.refused.labels(str(status)).inc()

    return Connection


def _max_connections() -> int:
    try:
        import resource
    except ImportError:  # Windows has neither the module nor the limit
        return _MAX_CONNECTIONS
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(_MAX_CONNECTIONS, max(1, files - _OTHER_FILES))
