"""The network's blocks through torch.compile: each kind of block once for all blocks of it.

A block's kind is its width, grid and shift, and how the kernels cut a batch of its size: six kinds of XL's 22
blocks, each compiled for a few ranges of batch sizes, which takes minutes. The compiler keeps its results in
TORCHINDUCTOR_CACHE_DIR: with a folder that lasts, the next start is several times faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from model.network.kinds import DiffusionNetwork

__all__ = ["with_compiled_blocks"]

# Of all models of a program: torch stops one that compiles a function more than 8 times. Two XL networks, for
# 256 and 512 px, come to 74.
_MAX_COMPILED_KINDS = 256

Function = TypeVar("Function", bound=Callable[..., object])


def with_compiled_blocks(
    network: DiffusionNetwork,
    function: Function,
    *,
    dynamic: bool | None = None,
    inside_hooks: bool = False,
) -> Function:
    """Have the blocks of `network` compiled at their first call, and `function`, which runs it, allow that.

    `dynamic`: False compiles each batch size by itself; None, from the second size on, once for all others.
    `inside_hooks`: leave the modules' hooks, e.g. those of FSDP, outside of what is compiled.
    """
    from torch._dynamo import config as dynamo_config  # seconds to import, like all of the compiler

    if inside_hooks:
        for block in network.modules():
            if any(name in network._repeated_blocks for name in _class_names(block)):
                block.forward = torch.compile(block.forward, dynamic=dynamic, fullgraph=True)
    else:
        network.compile_repeated_blocks(dynamic=dynamic, fullgraph=True)
    patched: Function = dynamo_config.patch(
        recompile_limit=_MAX_COMPILED_KINDS, accumulated_recompile_limit=4 * _MAX_COMPILED_KINDS
    )(function)
    return patched


def _class_names(module: nn.Module) -> list[str]:
    """With those that it inherits from: FSDP makes a class of its own of a module's."""
    return [kind.__name__ for kind in type(module).__mro__]
