"""LangChain's interface of cross-encoders."""

from typing import Any, Unpack

from langchain_core.cross_encoders import BaseCrossEncoder

from bge_rerank_adapters.engine.hosted.lazy import LazyEngine
from bge_rerank_adapters.settings import EngineOptions, EngineSettings
from bge_rerank_adapters.settings.options import check_options, shows_options


class BGECrossEncoder(BaseCrossEncoder):
    """Scores pairs of texts, with LangChain's interface of cross-encoders.

    Use it where such a model is taken in place of `HuggingFaceCrossEncoder`, for example in
    langchain-classic's `CrossEncoderReranker`. `BGEDocumentCompressor` does more: it keeps scores,
    traces its runs and does not block event loops. The model is loaded on first use.
    """

    @shows_options(EngineOptions)
    def __init__(
        self,
        model: str = EngineSettings.model,
        *,
        reranker: Any = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        """Check the settings.

        Args:
            model: A folder, a name on the hub, or `"tiny"` for the bundled checkpoint.
            reranker: A ready engine, such as a `RemoteReranker`, to use instead of loading one; not
                together with engine settings.
            **options: The engine's settings.

        Raises:
            TypeError: There is no setting of that name.
            SettingsError: A setting has a value that is not allowed, or is given together with an
                engine.
        """
        check_options(BGECrossEncoder, options)
        self._engine = LazyEngine.from_options(model, options, reranker=reranker)

    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """Return the scores of (query, document) pairs in input order: in [0, 1], `[]` for none.

        Raises:
            InputTypeError: A pair is not two `str`; the message names which.
            RerankError: The model could not be loaded, or failed.
        """
        engine: Any = self._engine.get()
        return [float(score) for score in engine.score_pairs(text_pairs)]

    def warm_up(self) -> None:
        """Load the model now and run it once, so that the first query does not wait for it."""
        self._engine.warm_up()

    def close(self) -> None:
        """Release the shared engine, which is freed with its last user; a later use loads again.

        An engine that was given as `reranker=` stays open, since its owner closes it.
        """
        self._engine.close()
