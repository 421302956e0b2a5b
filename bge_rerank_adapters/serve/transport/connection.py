"""The parser of one connection: h11, stricter about lengths and heads, deaf to upgrades."""

from typing import Any

import h11

# Of a whole request head; cookies and tokens of proxies rarely pass 8 KiB.
MOST_HEAD_BYTES = 32 * 1024
_MOST_HEADERS = 100
_UPGRADE = (b"upgrade", b"http2-settings")


class StrictConnection(h11.Connection):
    """A server's side of h11.

    Attributes:
        refusal: Status and reason for which the last request was refused; `None` while there is
            none.
    """

    def __init__(self) -> None:
        """Wait for a request."""
        super().__init__(h11.SERVER, MOST_HEAD_BYTES)
        self.refusal: tuple[int, str] | None = None

    def next_event(self) -> Any:
        """Return the next event.

        Raises:
            h11.RemoteProtocolError: What came is no request, or one that is not answered.
        """
        try:
            event = super().next_event()
            return _checked(event) if isinstance(event, h11.Request) else event
        except h11.RemoteProtocolError as error:
            self.refusal = error.error_status_hint, str(error)
            raise


def _checked(request: h11.Request) -> h11.Request:
    names = [name for name, _ in request.headers]
    if b"transfer-encoding" in names and b"content-length" in names:
        # Proxies disagree about which of them counts, so one could hide a request in the other.
        raise h11.RemoteProtocolError("Transfer-Encoding and Content-Length are both there", 400)
    size = len(request.target) + sum(len(name) + len(value) for name, value in request.headers)
    if size > MOST_HEAD_BYTES or len(names) > _MOST_HEADERS:
        raise h11.RemoteProtocolError("The head of the request is too large", 431)
    return _without_upgrade(request) if b"upgrade" in names else request


def _without_upgrade(request: h11.Request) -> h11.Request:
    """Return a request as if it did not offer another protocol, which servers may ignore.

    A JDK's client offers HTTP/2 with its first request on each connection.
    """
    headers = []
    for name, value in request.headers:
        if name == b"connection":
            kept = [each for each in value.split(b",") if each.strip().lower() not in _UPGRADE]
            headers.append((name, b",".join(kept).strip() or b"keep-alive"))
        elif name not in _UPGRADE:
            headers.append((name, value))
    return h11.Request(
        method=request.method,
        target=request.target,
        headers=headers,
        http_version=request.http_version,
    )
