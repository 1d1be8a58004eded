"""Where a request goes, whatever stands before its path at a reverse proxy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import Scope

__all__ = ["route_path"]


def route_path(scope: Scope) -> str:
    """The path that routes are matched against: without the root path, where the proxy left it in."""
    path: str = scope["path"]
    root = scope.get("root_path", "")
    if not root or not f"{path}/".startswith(f"{root}/"):
        return path
    return path.removeprefix(root) or "/"
