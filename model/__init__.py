"""LaMamba-Diff: the network, its diffusion process, its autoencoder and its training.

The names below load torch, so they resolve at first use: `import model` alone, which every command does, is
quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.config import LaMambaConfig
    from model.network.lamamba import LaMambaDiff
    from model.pretrained import default_model_dir

__all__ = ["LaMambaConfig", "LaMambaDiff", "default_model_dir"]

_HOMES = {
    "LaMambaConfig": "model.config",
    "LaMambaDiff": "model.network.lamamba",
    "default_model_dir": "model.pretrained",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'model' has no attribute {name!r}")
