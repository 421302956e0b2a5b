"""The routes of the two pages, with their content and headers."""

import base64
import hashlib
from collections.abc import Awaitable, Callable
from importlib import resources

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

_HERE = __package__ or ""


def page_router() -> APIRouter:
    """Return a router with both pages. They need no key; the requests that they send do."""
    router = APIRouter(include_in_schema=False)
    for path, name in (("/", "index"), ("/docs", "docs")):
        router.add_api_route(path, _answer(name), methods=["GET", "HEAD"], name=f"{name} page")
    return router


def _answer(name: str) -> Callable[[], Awaitable[HTMLResponse]]:
    style, script = _read("style.css"), _read(f"{name}.js")
    page = _read(f"{name}.html").replace("/*style*/", style).replace("/*script*/", script)
    headers = {
        "Content-Security-Policy": _policy(style, script),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    async def answer() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)

    return answer


def _policy(style: str, script: str) -> str:
    return "; ".join(
        (
            "default-src 'none'",
            f"style-src '{_hash(style)}'",
            f"script-src '{_hash(script)}'",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()


def _read(name: str) -> str:
    return resources.files(_HERE).joinpath(name).read_text("utf-8")
