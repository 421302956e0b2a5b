"""The server on many machines: a Ray Serve application of replicas, each with its own engine."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bge_rerank_adapters.calls.extras import require
from bge_rerank_adapters.serve.settings import ReplicaSettings, ServerSettings

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application


def bind(settings: ServerSettings, replicas: ReplicaSettings | None = None) -> "Application":
    """Return an application for `ray.serve.run`, whose replicas load an engine each.

    Args:
        settings: The server's settings. Secrets are not sent to the replicas, which read them from
            their own environment: `BGE_RERANK_API_KEY` and `BGE_RERANK_TOKEN`.
        replicas: Number and resources of replicas; `None` is the defaults.

    Raises:
        ImportError: Ray Serve is not installed.
    """
    require("ray", "ray.serve", of="serve", extra="ray")
    from ray import serve

    chosen = ReplicaSettings() if replicas is None else replicas
    deployment = serve.deployment(
        name="Reranker",
        # More than the app's own limit, so that the app refuses, with a reason, and not Ray.
        max_ongoing_requests=2 * settings.max_concurrent_requests,
        autoscaling_config={
            "min_replicas": chosen.min_replicas,
            "max_replicas": chosen.max_replicas,
            "target_ongoing_requests": chosen.target_ongoing_requests,
        },
        ray_actor_options={"num_cpus": chosen.num_cpus, "num_gpus": chosen.num_gpus},
        graceful_shutdown_timeout_s=settings.timeout_s + settings.body_timeout_s,
    )
    application: Application = deployment(serve.ingress(_builder(settings))(_Replica)).bind()
    return application


def _builder(settings: ServerSettings) -> Callable[[], "FastAPI"]:
    def build() -> "FastAPI":
        """Make the app in the replica; its start loads the engine there."""
        from bge_rerank_adapters.serve.application import create_app

        return create_app(settings.with_secrets())

    return build


class _Replica:
    """Ray Serve's health check of a replica; Ray Serve adds the app as an attribute."""

    def check_health(self) -> None:
        """Raise if the engine is closed, so that Ray Serve starts another replica."""
        app: Any = self.app  # type: ignore[attr-defined]
        app.state.service.check_alive()
