"""Triton kernels compiled for a GPU that is not there: what the compiler makes of a launch, without it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}
_OPTIONS = ("num_warps", "num_stages")


@dataclass
class _Compiler:
    """In a kernel's place: a launch compiles it for compute capability 9.0 and runs nothing."""

    kernel: Any

    def __getitem__(self, grid: object) -> Any:
        return self._compile

    def _compile(self, *args: Any, **kwargs: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget

        names = list(inspect.signature(self.kernel.fn).parameters)
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        values = dict(zip(names, args, strict=False)) | kwargs
        constants = {parameter.name for parameter in self.kernel.params if parameter.is_constexpr}
        constants |= {
            name for name, value in values.items() if value is None or (type(value) is int and value == 1)
        }
        signature = {
            name: "constexpr" if name in constants else _type(value) for name, value in values.items()
        }
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if name not in constants and _is_aligned(values[name])
        }
        source = triton.compiler.ASTSource(
            fn=self.kernel,
            signature={name: signature[name] for name in names},
            constexprs={name: values[name] for name in names if name in constants},
            attrs=aligned,
        )
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def compile_launches(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each launch of a kernel of `module` compile it, and do nothing else, for the rest of a test."""
    import triton

    for name, kernel in inspect.getmembers(module, lambda member: isinstance(member, triton.JITFunction)):
        if name.endswith("_kernel"):  # the others are called by these
            monkeypatch.setattr(module, name, _Compiler(kernel))


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _is_aligned(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0
