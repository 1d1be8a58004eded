"""GET / and /web/...: the page, from the files of `service/web`, with the headers that keep it to itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from fastapi import Request, Response
from starlette.staticfiles import StaticFiles

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["add_page"]

_FOLDER: Final = Path(__file__).resolve().parent.parent / "web"
_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked for again by ETag: an upgraded server must not get an old script
}


def add_page(app: FastAPI) -> None:
    """Serve the page at `/` and its files under `/web/`."""
    files = StaticFiles(directory=_FOLDER)

    # Routes and not a mount: a wrong method is then answered as everywhere, and metrics name the template.
    async def show_page(request: Request) -> Response:
        return await show_file("index.html", request)

    async def show_file(path: str, request: Request) -> Response:
        response = await files.get_response(path, request.scope)
        response.headers.update(_HEADERS)
        return response

    app.add_api_route("/", show_page, methods=["GET", "HEAD"], include_in_schema=False)
    app.add_api_route("/web/{path:path}", show_file, methods=["GET", "HEAD"], include_in_schema=False)
