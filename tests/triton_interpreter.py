"""Triton kernels on the CPU, in Triton's interpreter, for the tests of every module that has some."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import pytest


def interpret_kernels(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the kernels of `module` interpreted for the rest of a test.

    Triton decides on its interpreter (TRITON_INTERPRET) while it is imported, and by the time that a test
    is, some other import may have done so. So the kernels are handed over one by one, as `triton.jit` would.
    """
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    for name, kernel in inspect.getmembers(module, lambda member: isinstance(member, triton.JITFunction)):
        monkeypatch.setattr(module, name, interpreter.InterpretedFunction(kernel.fn))
    dot = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *others: dot(self, _widened(self, a), _widened(self, b), *others),
    )
    if isinstance(tl.sum, triton.JITFunction):
        add, maximum = tl.standard._sum_combine, tl.standard._elementwise_max
        monkeypatch.setattr(tl, "sum", lambda x, axis: tl.reduce(x, axis, add))
        monkeypatch.setattr(tl, "max", lambda x, axis: tl.reduce(x, axis, maximum))
        monkeypatch.setattr(tl, "zeros", lambda shape, dtype: tl.full(shape, 0, dtype))


def _widened(builder: Any, operand: Any) -> Any:
    """An operand of a matrix product in fp32: the interpreter would multiply bfloat16 bits as integers."""
    import triton.language as tl

    return operand if operand.dtype.scalar == tl.float32 else builder.create_fp_ext(operand, tl.float32)
