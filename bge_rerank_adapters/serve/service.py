"""The engine behind the routes, with the limits of the server."""

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from starlette.types import Receive

from bge_rerank_adapters.calls.ranking import Ranking
from bge_rerank_adapters.errors import ClosedError
from bge_rerank_adapters.serve.refusals import CLIENT_GONE, Refusal, unavailable
from bge_rerank_adapters.serve.settings import ANY_MODEL, ServerSettings, variable
from bge_rerank_adapters.settings.token_limits import TokenLimits

if TYPE_CHECKING:
    from bge_rerank_adapters.engine.reranker import Reranker


class Service:
    """An engine with the limits of a server.

    Attributes:
        settings: The server's settings.
        started: When it was made, in seconds since 1970.
    """

    def __init__(self, settings: ServerSettings, engine: "Reranker | None") -> None:
        """Take a ready engine, or `None` for one that `load` loads."""
        self.settings = settings
        self.started = int(time.time())
        self._engine = engine
        self._own = engine is None

    @property
    def engine(self) -> "Reranker":
        """The engine.

        Raises:
            Refusal: It is not loaded yet, or is closed.
        """
        if self._engine is None:
            raise unavailable("The model is not loaded yet.")
        if self._engine.closed:
            raise unavailable("The server is closing; send the request to another.")
        return self._engine

    @property
    def loaded(self) -> "Reranker | None":
        """The engine, if there is one."""
        return self._engine

    def check_alive(self) -> None:
        """Raise if the engine has been closed.

        Raises:
            ClosedError: It has been closed.
        """
        if self._engine is not None and self._engine.closed:
            raise ClosedError("The engine of this server is closed; start another.")

    def load(self) -> None:
        """Load the model and run it once, unless the engine was given.

        Raises:
            RerankError: The model cannot be loaded.
        """
        if not self._own:
            return
        # Imported here, since torch takes seconds.
        from bge_rerank_adapters.engine.reranker import Reranker

        engine = Reranker.from_settings(self.settings.engine)
        engine.warm_up()
        self._engine = engine

    def close(self) -> None:
        """Free the model, unless the engine was given: its owner closes it."""
        if self._own and self._engine is not None:
            self._engine.close()

    def check_model(self, name: str | None) -> None:
        """Refuse a request for another model.

        Raises:
            Refusal: The name is not one of this model's.
        """
        names = self.settings.model_names
        if not name or name in names or name == self.settings.engine.model or ANY_MODEL in names:
            return
        shown = ", ".join(repr(each) for each in names)
        raise Refusal(
            404,
            f"The model {name[:100]!r} is not served here; served is {shown}. Send that, or start "
            f"the server with {variable('served_model')}={names[0]},{name[:100]} so that it goes "
            "by both names, or with * among them to let requests name any.",
        )

    async def rank(
        self, receive: Receive, query: str, texts: Sequence[str], *, token_limits: TokenLimits
    ) -> Ranking:
        """Return the ranking of all of a request's texts.

        Args:
            receive: The request's channel, after its body has been read. It reports when the client
                disconnects, and scoring is cancelled then.
            query: The query.
            texts: n texts.
            token_limits: How many tokens of them are read.

        Raises:
            Refusal: A text is too long, or the client has disconnected.
            RerankError: As for `Reranker.arerank`.
        """
        self._check_lengths(query, texts)
        scoring = self.engine.arerank(
            query,
            texts,
            timeout_s=self.settings.timeout_s,
            max_document_tokens=token_limits.max_document_tokens,
            max_query_tokens=token_limits.max_query_tokens,
            max_pair_tokens=token_limits.max_pair_tokens,
        )
        call, gone = asyncio.ensure_future(scoring), asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait((call, gone), return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                raise Refusal(CLIENT_GONE, "The client has gone.")
            return call.result()
        finally:
            call.cancel()
            gone.cancel()
            # Retrieve both results, or the event loop would log them as never retrieved.
            await asyncio.gather(call, gone, return_exceptions=True)

    def _check_lengths(self, query: str, texts: Sequence[str]) -> None:
        limit = self.settings.max_characters
        if len(query) > limit:
            raise Refusal(413, f"The query has {len(query)} characters, at most {limit} are read.")
        for index, text in enumerate(texts):
            if len(text) > limit:
                raise Refusal(
                    413,
                    f"Text {index} has {len(text)} characters, at most {limit} are read; send it "
                    "in parts.",
                )


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
