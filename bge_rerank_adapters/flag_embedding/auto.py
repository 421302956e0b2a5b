"""FlagEmbedding's class that chooses the class for a checkpoint."""

from typing import Any

from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.flag_embedding.decoders import (
    FlagLLMReranker,
    LayerWiseFlagLLMReranker,
    LightWeightFlagLLMReranker,
)
from bge_rerank_adapters.flag_embedding.encoder import FlagReranker
from bge_rerank_adapters.settings import EngineSettings
from bge_rerank_adapters.settings.checkpoints import known_family
from bge_rerank_adapters.settings.families import FAMILY_SETTINGS


class FlagAutoReranker:
    """Chooses the class that runs a checkpoint; see `from_finetuned`."""

    def __init__(self) -> None:
        """Refuse to be constructed, as in FlagEmbedding.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "FlagAutoReranker has no instances; use FlagAutoReranker.from_finetuned(model)."
        )

    @classmethod
    def from_finetuned(
        cls,
        model_name_or_path: str,
        model_class: Any = None,
        use_fp16: bool = False,
        trust_remote_code: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return a reranker of the class that runs a checkpoint.

        Args:
            model_name_or_path: A folder, a name on the hub, or `"tiny"` for the bundled checkpoint.
            model_class: FlagEmbedding's name of the class, such as `"encoder-only-base"`, or its
                enum; `None` chooses by the checkpoint's config.
            use_fp16: As for the class.
            trust_remote_code: No code of a checkpoint is run.
            **kwargs: Further arguments of the class.

        Raises:
            TypeError: The class has no such argument.
            RerankError: As for the class.
        """
        family = _named_family(model_class) or _found_family(model_name_or_path, kwargs)
        return _CLASSES[family](
            model_name_or_path,
            use_fp16=use_fp16,
            trust_remote_code=bool(trust_remote_code),
            **kwargs,
        )


_CLASSES: dict[str, Any] = {
    each.family: each
    for each in (
        FlagReranker,
        FlagLLMReranker,
        LayerWiseFlagLLMReranker,
        LightWeightFlagLLMReranker,
    )
}


def _named_family(model_class: object) -> str | None:
    name = getattr(model_class, "value", model_class)
    if name is None:
        return None
    families = {row.flag_name: row.name for row in FAMILY_SETTINGS.values()}
    if name not in families:
        raise SettingsError(
            f"model_class {name!r} is not known; use one of {', '.join(map(repr, families))}."
        )
    return families[str(name)]


def _found_family(model: str, options: dict[str, Any]) -> str:
    known = known_family(str(model))
    if known:
        return known
    from bge_rerank_adapters.engine.checkpoints.hub import find_folder
    from bge_rerank_adapters.engine.models.loading import read_checkpoint

    names = ("cache_dir", "revision", "local_files_only", "token")
    given = {name: options[name] for name in names if name in options}
    settings = EngineSettings(model=model, **given)
    return read_checkpoint(find_folder(settings), settings).family.name
