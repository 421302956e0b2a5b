"""The settings that an actor makes its engine from, and the resources of an actor."""

import numbers
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bge_rerank_adapters.calls.limits import Limits
from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.settings import EngineSettings, checks

if TYPE_CHECKING:
    from bge_rerank_adapters.engine.reranker import Reranker


class _Secret:
    """A text that is sent to the actors and never shown."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return "<secret>"


@dataclass(frozen=True, slots=True)
class Recipe:
    """The settings of an actor's engine and rankings, without weights.

    Attributes:
        settings: The engine's settings, without the token.
        limits: The limits of each ranking.
        secret: The token for the hub, which pickled settings leave out.
    """

    settings: EngineSettings
    limits: Limits
    secret: _Secret | None = None

    def load(self) -> "Reranker":
        """Return a new engine; errors as in `Reranker`."""
        # Imported here, in the actor: the program that starts the job needs no torch.
        from bge_rerank_adapters.engine.reranker import Reranker

        token = self.secret.text if self.secret else None
        return Reranker.from_settings(replace(self.settings, token=token))


@dataclass(frozen=True, slots=True)
class Resources:
    """The resources of each actor.

    Attributes:
        num_gpus: GPUs, or a fraction of one; 0 for none.
        num_cpus: CPUs, which is also the number of the engine's threads.
    """

    num_gpus: float = 0
    num_cpus: float = 1

    def __post_init__(self) -> None:
        """Check both.

        Raises:
            SettingsError: One of them is not allowed.
        """
        checks.zero_or_more("num_gpus", self.num_gpus)
        checks.zero_or_more("num_cpus", self.num_cpus)
        if self.num_gpus > 1 and self.num_gpus != int(self.num_gpus):
            raise SettingsError(
                f"num_gpus above 1 must be a whole number, got {self.num_gpus!r}: an actor has a "
                "part of one GPU, or whole ones."
            )

    def fit(self, settings: EngineSettings) -> EngineSettings:
        """Return the settings with the device "auto" replaced by the actor's own device.

        Ray hides other actors' GPUs from an actor with GPUs, but hides none from an actor without:
        such actors would all take the first GPU.
        """
        if settings.device != "auto":
            return settings
        if self.num_gpus > 1:
            return replace(
                settings, device=tuple(f"cuda:{place}" for place in range(int(self.num_gpus)))
            )
        return replace(settings, device="cuda" if self.num_gpus else "cpu")


def make_recipe(
    model: str | None,
    settings: EngineSettings | None,
    *,
    top_k: int | None,
    score_threshold: float | None,
    resources: Resources,
) -> Recipe:
    """Return the recipe for a job's engines.

    Raises:
        SettingsError: A setting or limit is not allowed, or both `model` and `settings` are given.
    """
    if settings is None:
        settings = EngineSettings() if model is None else EngineSettings(model=model)
    elif model is not None:
        raise SettingsError(
            f"settings has a model already, so model={model!r} cannot be set beside it; give one "
            "or the other."
        )
    if not isinstance(settings, EngineSettings):
        raise SettingsError(
            f"settings must be EngineSettings or None, got {type(settings).__name__}."
        )
    limits = Limits(top_k, score_threshold)
    secret = _Secret(settings.token) if settings.token else None
    return Recipe(resources.fit(settings).without_token(), limits, secret)


def check_concurrency(concurrency: Any) -> tuple[int, int]:
    """Return the minimum and maximum number of actors of a pool.

    Raises:
        SettingsError: It is neither a whole number nor two of them, of at least 1.
    """
    ends = concurrency if isinstance(concurrency, tuple | list) else (concurrency, concurrency)
    if not all(map(_is_count, ends)) or len(ends) != 2 or ends[0] > ends[1]:
        raise SettingsError(
            "concurrency must be a number of actors of at least 1, or the least and the most of "
            f"them, got {concurrency!r}."
        )
    return int(ends[0]), int(ends[1])


def _is_count(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, numbers.Integral) and int(value) >= 1
