"""Ranks a request: checks its options, scores its texts, and applies its limits."""

from collections.abc import Sequence

from fastapi import Request

from bge_rerank_adapters.calls.ranked_document import RankedDocument
from bge_rerank_adapters.calls.ranking import Ranking
from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.serve.refusals import Refusal, unknown_fields
from bge_rerank_adapters.serve.schemas.requests import RerankRequest, TeiRerankRequest
from bge_rerank_adapters.serve.service import Service
from bge_rerank_adapters.settings import EngineSettings

_MAX_SHOWN = 5


async def rank(
    request: Request, body: RerankRequest | TeiRerankRequest, texts: Sequence[str]
) -> Ranking:
    """Return the results of a request, with the usage of all its texts.

    Raises:
        Refusal: It has a field that cannot be honoured.
        RerankError: As for `Service.rank`.
    """
    service: Service = request.app.state.service
    if body.ignored:
        if service.settings.strict:
            raise unknown_fields(body.ignored)
        request.app.state.metrics.ignored.count(body.ignored)
    if isinstance(body, RerankRequest):
        _check_chunks(body.max_chunks_per_doc, service.engine.settings, texts)
    try:
        ranking = await service.rank(
            request.receive, body.query, texts, token_limits=body.token_limits
        )
    except SettingsError as error:  # too few tokens for a query and a document
        raise Refusal(422, str(error)) from error
    request.app.state.tracing.scored(ranking.usage, documents=len(texts))
    if body.truncation_direction == "left":
        if service.settings.engine.query_truncation_side != "left":
            _refuse_cut_query(ranking, "only the end of a text can be cut off here; shorten it")
        _refuse_cuts(ranking, "only the end of a text can be cut off here; send it in parts")
    if isinstance(body, TeiRerankRequest) and body.truncate is False:
        _refuse_cut_query(ranking, "shorten it, or send truncate: true")
        _refuse_cuts(ranking, "send them in parts, or with truncate: true")
    least = 0.0 if body.score_threshold is None else body.score_threshold
    kept = Ranking([each for each in ranking if each.score >= least][: body.top_n])
    kept.usage = ranking.usage
    return kept


def shown_score(body: RerankRequest | TeiRerankRequest, result: RankedDocument) -> float | None:
    """Return a result's score or logit, as the request wants."""
    return result.logit if body.wants_logits else result.score


def _check_chunks(max_chunks: int | None, settings: EngineSettings, texts: Sequence[str]) -> None:
    """Refuse a limit on windows that a text may exceed, since all windows are read.

    Raises:
        Refusal: A text may exceed it.
    """
    if max_chunks is None or settings.long_documents != "window":
        return
    # Tokens between the starts of neighbouring windows, which are at least as many characters.
    window = settings.window_tokens or settings.max_length // 8
    overlap = settings.window_overlap_tokens
    step = max(1, window - (window // 4 if overlap is None else overlap))
    longest = max(map(len, texts), default=0)
    if longest > max_chunks * step:
        raise Refusal(
            422,
            f"max_chunks_per_doc={max_chunks} cannot be honoured: all windows of a long document "
            "are read here; leave it out.",
        )


def _refuse_cut_query(ranking: Sequence[RankedDocument], advice: str) -> None:
    if any(each.query_truncated for each in ranking):
        raise Refusal(413, f"The query is longer than the model reads; {advice}.")


def _refuse_cuts(ranking: Sequence[RankedDocument], advice: str) -> None:
    cut = sorted(each.index for each in ranking if each.truncated)
    if cut:
        shown = ", ".join(map(str, cut[:_MAX_SHOWN])) + (", ..." if len(cut) > _MAX_SHOWN else "")
        raise Refusal(413, f"These texts are longer than the model reads: {shown}; {advice}.")
