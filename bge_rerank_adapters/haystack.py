"""Reranking inside Haystack: a ranker component for pipelines.

```python
from haystack import Pipeline

from bge_rerank_adapters.haystack import BGERanker

pipeline = Pipeline()
pipeline.add_component("retriever", retriever)
pipeline.add_component("ranker", BGERanker(model="BAAI/bge-reranker-v2-m3", top_k=3))
pipeline.connect("retriever.documents", "ranker.documents")
```

Haystack reads a pipeline back from YAML with the components of modules that it is told to trust:
`Pipeline.loads(text, allowed_modules=["bge_rerank_adapters.haystack"])`.
"""

import asyncio
import copy
from dataclasses import replace
from typing import Any, Unpack

try:
    from haystack import Document, component, default_from_dict, default_to_dict
    from haystack.utils import Secret, deserialize_secrets_inplace
except ImportError as error:
    raise ImportError(
        "bge_rerank_adapters.haystack needs haystack-ai; "
        'run: pip install "bge-rerank-adapters[haystack]"'
    ) from error

from bge_rerank_adapters.calls.checks import check_host_documents, check_query
from bge_rerank_adapters.calls.limits import Limits
from bge_rerank_adapters.calls.metadata import with_metadata
from bge_rerank_adapters.calls.ranked_document import RankedDocument
from bge_rerank_adapters.engine.hosted.copies import copied
from bge_rerank_adapters.engine.hosted.lazy import LazyEngine
from bge_rerank_adapters.errors import InputTypeError, SettingsError
from bge_rerank_adapters.settings import EngineOptions, EngineSettings
from bge_rerank_adapters.settings.options import check_options, shows_options


@component
class BGERanker:
    """A Haystack ranker that keeps the documents that best answer the query.

    The model is loaded at `warm_up` or on first use, and shared by all users of equal settings.

    Attributes:
        top_k: Maximum number of documents, unless a run gives another; `None` is all.
        score_threshold: Lowest score to keep, in [0, 1] and inclusive.
        meta_fields_to_embed: Names of metadata whose values are put before the scored text.
    """

    @shows_options(EngineOptions)
    def __init__(
        self,
        model: str = EngineSettings.model,
        *,
        top_k: int | None = 10,
        score_threshold: float | None = None,
        meta_fields_to_embed: list[str] | None = None,
        reranker: Any = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        """Check the settings; nothing is loaded yet.

        Args:
            model: A folder, a name on the hub, or `"tiny"` for the bundled checkpoint.
            top_k: Maximum number of documents; `None` is all.
            score_threshold: Lowest score to keep, in [0, 1], inclusive; applied before `top_k`.
            meta_fields_to_embed: Names of metadata whose values are put before the scored text,
                each on a line of its own; those a document lacks are left out.
            reranker: A ready engine, such as a `RemoteReranker`, to use instead of loading one; not
                in dumps.
            **options: The engine's other settings; a token is a `Secret`, such as
                `Secret.from_env_var("HF_TOKEN")`.

        Raises:
            TypeError: There is no setting of that name.
            SettingsError: A setting has a value that is not allowed, or is given together with an
                engine.
        """
        # Haystack's metaclass replaces the signature of the class.
        check_options(BGERanker.__init__, options)
        limits = Limits(top_k, score_threshold)
        self.top_k, self.score_threshold = limits.top_k, limits.score_threshold
        self.meta_fields_to_embed = list(meta_fields_to_embed or [])
        self._token = _checked_token(options.get("token"))
        if "token" in options:
            options["token"] = _value(self._token)
        self._engine = LazyEngine.from_options(model, options, reranker=reranker)

    @component.output_types(documents=list[Document])
    def run(
        self,
        query: str,
        documents: list[Document],
        top_k: int | None = None,
        score_threshold: float | None = None,
    ) -> dict[str, list[Document]]:
        """Return copies of the best documents, best first.

        Args:
            query: The query.
            documents: The documents of the first stage; neither they nor their metadata are
                changed.
            top_k: Maximum number of documents of this run; `None` is as constructed.
            score_threshold: Lowest score of this run; `None` is as constructed.

        Returns:
            `{"documents": [...]}`, each with its id and its score in [0, 1] as `score`. If the end
            of one was cut off, its metadata has `relevance_truncated` (True).

        Raises:
            InputTypeError: The query is not a `str`, or a document is not a `Document` with text.
            SettingsError: `top_k` or `score_threshold` is out of range.
            RerankError: The model could not be loaded, or failed.
        """
        query, found, limits = self._checked(query, documents, top_k, score_threshold)
        texts = [self._text(document) for document in found]
        ranked = self._engine.get().rerank(query, texts, **limits) if texts else []
        return {"documents": [_with_score(found[each.index], each) for each in ranked]}

    @component.output_types(documents=list[Document])
    async def run_async(
        self,
        query: str,
        documents: list[Document],
        top_k: int | None = None,
        score_threshold: float | None = None,
    ) -> dict[str, list[Document]]:
        """Return what `run` returns, without blocking the event loop."""
        query, found, limits = self._checked(query, documents, top_k, score_threshold)
        texts = [self._text(document) for document in found]
        ranked = await (await self._engine.aget()).arerank(query, texts, **limits) if texts else []
        return {"documents": [_with_score(found[each.index], each) for each in ranked]}

    def warm_up(self) -> None:
        """Load the model now and run it once, so that the first query does not wait for it."""
        self._engine.warm_up()

    async def warm_up_async(self) -> None:
        """Do what `warm_up` does, without blocking the event loop."""
        await asyncio.to_thread(self._engine.warm_up)

    def close(self) -> None:
        """Release the shared engine, which is freed with its last user; a later use loads again.

        An engine that was given as `reranker=` stays open, since its owner closes it.
        """
        self._engine.close()

    async def close_async(self) -> None:
        """Do what `close` does."""
        self._engine.close()

    def to_dict(self) -> dict[str, Any]:
        """Return the settings for YAML; of a token only where it is read from.

        Raises:
            SettingsError: A ready engine of unknown settings was given.
            ValueError: The token is a plain one, which Haystack does not serialise.
        """
        settings = self._engine.settings
        if settings is None:
            raise SettingsError(
                "A BGERanker that was made with reranker= has no settings to write; make it with "
                "model= instead."
            )
        usual = EngineSettings().to_dict()
        changed = {
            name: value for name, value in settings.to_dict().items() if value != usual[name]
        }
        return default_to_dict(
            self,
            **{"model": settings.model} | changed,
            top_k=self.top_k,
            score_threshold=self.score_threshold,
            meta_fields_to_embed=self.meta_fields_to_embed,
            token=self._token.to_dict() if self._token else None,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "BGERanker":
        """Return the ranker that `to_dict` has written."""
        deserialize_secrets_inplace(data.get("init_parameters", {}), keys=["token"])
        made: BGERanker = default_from_dict(cls, data)
        return made

    def _checked(
        self, query: object, documents: object, top_k: object, score_threshold: object
    ) -> tuple[str, list[Document], dict[str, Any]]:
        limits = Limits(
            self.top_k if top_k is None else top_k,  # type: ignore[arg-type]
            self.score_threshold if score_threshold is None else score_threshold,  # type: ignore[arg-type]
        )
        return check_query(query), _checked_documents(documents), limits.to_dict()

    def _text(self, document: Document) -> str:
        return with_metadata(str(document.content), document.meta, names=self.meta_fields_to_embed)


def _checked_documents(documents: object) -> list[Document]:
    found = check_host_documents(
        documents, Document, host="Haystack", advice="make it one with Document(content=...)"
    )
    for index, document in enumerate(found):
        if not isinstance(document.content, str):
            raise InputTypeError(
                f"documents[{index}] has no text to be scored: its content is "
                f"{type(document.content).__name__}; leave it out before."
            )
    return found


def _with_score(document: Document, ranked: RankedDocument) -> Document:
    meta = copied(
        lambda: copy.deepcopy(document.meta),
        name=f"documents[{ranked.index}]",
        metadata=document.meta,
    )
    # An earlier reranking of the same document may have left these.
    for mark, cut in (
        ("relevance_truncated", ranked.truncated),
        ("relevance_query_truncated", getattr(ranked, "query_truncated", False)),
    ):
        meta.pop(mark, None)
        if cut:
            meta[mark] = True
    return replace(document, meta=meta, score=float(ranked.score))


def _checked_token(token: object) -> Secret | None:
    if not isinstance(token, Secret | None):
        raise SettingsError(
            f"token must be a Secret or None, got a {type(token).__name__}; give "
            'Secret.from_env_var("HF_TOKEN").'
        )
    return token


def _value(token: Secret | None) -> str | None:
    value = token.resolve_value() if token else None
    return value if value is None else str(value)
