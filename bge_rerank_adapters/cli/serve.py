"""`bge-rerank serve`: a reranking server in this process."""

import ipaddress
import os
import signal
import socket
from contextlib import ExitStack, closing, suppress
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from bge_rerank_adapters.cli import options
from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.settings.parsing import ONE_OR_MORE

EXAMPLES = """
Examples:

    bge-rerank serve --model tiny

    BGE_RERANK_API_KEY=... bge-rerank serve --host 0.0.0.0

Settings that are not given here are taken from the environment,
BGE_RERANK_MODEL for --model and so on; the API key only from there. On SIGINT
or SIGTERM it answers the requests that it has, and ends.
"""


def _option(help_text: str, **limits: Any) -> Any:
    return typer.Option(help=help_text, show_default=False, **limits)


def _engine_option(name: str) -> Any:
    return _option(options.help_or_default(options.ENGINE_ROWS[name]))


# The server's own options are written out, since importing their table needs the extra. A test
# compares them with the table.


@options.with_engine_options
def serve(
    model: Annotated[str | None, _engine_option("model")] = None,
    device: Annotated[str | None, _engine_option("device")] = None,
    dtype: Annotated[str | None, _engine_option("dtype")] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Its port.", min=0, max=65535)] = 8000,
    served_model: Annotated[
        str | None,
        _option(
            "The model's name in requests and answers, or several of them, of which the first is "
            'in answers; "*" among them lets requests name any; else the engine\'s model, of a '
            "folder its last part.",
            metavar="NAME[,NAME...]",
        ),
    ] = None,
    max_documents: Annotated[
        int | None, _option("Maximum documents of a request; else 1000.", min=1)
    ] = None,
    max_characters: Annotated[
        int | None,
        _option("Maximum characters of a document, and of the query; else 100000.", min=1),
    ] = None,
    max_body_bytes: Annotated[
        int | None, _option("Maximum bytes of a request's body; else 4194304.", min=1)
    ] = None,
    max_concurrent_requests: Annotated[
        int | None,
        _option("Maximum requests for scores that are served at a time; else 256.", min=1),
    ] = None,
    timeout_s: Annotated[
        float | None, _option("Seconds that scoring a request may take; else 60.0.")
    ] = None,
    access_log: Annotated[
        bool, typer.Option("--access-log", help="Log a line for each request.")
    ] = False,
    *,
    engine: options.Given,
) -> None:
    """Serve the model over HTTP: the rerank APIs of Cohere, Jina and text-embeddings-inference."""
    from bge_rerank_adapters.serve import ServerSettings

    own: options.Given = {
        "model": model,
        "device": options.read("device", device),
        "dtype": dtype,
        "served_model": served_model and ONE_OR_MORE.read(served_model),
        "max_documents": max_documents,
        "max_characters": max_characters,
        "max_body_bytes": max_body_bytes,
        "max_concurrent_requests": max_concurrent_requests,
        "timeout_s": timeout_s,
    }
    given = engine | {name: value for name, value in own.items() if value is not None}
    settings = ServerSettings.from_environment(given=given)
    with closing(_bind(host, port)) as listener:
        _serve(settings, listener, access_log=access_log)


def _serve(settings: Any, listener: socket.socket, *, access_log: bool) -> None:
    from bge_rerank_adapters.calls.extras import require

    require("uvicorn", of="serve", extra="serve")
    from bge_rerank_adapters.engine.reranker import Reranker
    from bge_rerank_adapters.serve import create_app, tracing
    from bge_rerank_adapters.serve.transport.server import server_of

    _keep_to_quota()
    # Uvicorn raises the signal that ended it again, to end the program too.
    signal.signal(signal.SIGTERM, _end)
    # Loaded here and not by the app, so that a missing model is reported in one line.
    with ExitStack() as stack:
        if tracing.is_requested():
            stack.callback(tracing.export())
        _say(f"Loading {settings.engine.model}; nothing listens before it is loaded")
        engine = stack.enter_context(Reranker.from_settings(settings.engine))
        engine.warm_up()
        server = server_of(create_app(settings, engine=engine), access_log=access_log)
        _warn_if_open(settings, listener)
        address = _address(listener)
        _say(
            f"Serving {settings.model_name}: try it on {address}/, all routes are on {address}/docs"
        )
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


def _say(message: str) -> None:
    Console(stderr=True).print(escape(message), highlight=False, soft_wrap=True)


def _keep_to_quota() -> None:
    """Limit threads to the container's CPU quota."""
    from bge_rerank_adapters.engine.models.cpu.threads import use_at_most
    from bge_rerank_adapters.serve.container import cpu_quota, whole_cpus

    quota = cpu_quota()
    # A number that the user has set is kept.
    if quota is not None and "OMP_NUM_THREADS" not in os.environ:
        use_at_most(whole_cpus(quota))


def _warn_if_open(settings: Any, listener: socket.socket) -> None:
    host = listener.getsockname()[0]
    if settings.api_key is None and not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        warned = (
            f"Whoever reaches {_address(listener)} can use this server, since it has no API key: "
            "set BGE_RERANK_API_KEY, or leave out --host to listen on this machine alone."
        )
        Console(stderr=True).print(escape(warned), style="yellow", highlight=False, soft_wrap=True)


def _bind(host: str, port: int) -> socket.socket:
    """Return a bound socket; binding comes before loading, which takes long."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise SettingsError(
            f"Port {port} of {host!r} cannot be listened on: {error.strerror or error}; choose "
            "another --port, or a --host of this machine."
        ) from error
    return listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _end(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)
