"""A network in calls of one and the same number of rows, so that a row's output depends on nothing else.

Libraries choose kernels, and so the order of sums, by a product's shape: a row of a batch of 6 differs in its
last bits from the same row of a batch of 8, and some 20 denoising steps make more of it. Where every call has
the same shape, a row is computed in the same way whatever stands in the others. That needs kernels without
atomic additions, which `prepare_process` also asks of torch's.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.cuda_graph import CapturedStep

if TYPE_CHECKING:
    from model.diffusion.step import DenoisingNetwork, DenoisingOutput

__all__ = ["FixedRows", "prepare_process"]


def prepare_process() -> None:
    """Have torch use kernels alone that give the same bits each time.

    For programs, not for libraries: call it once, before the first work on a GPU.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS' own condition
    torch.use_deterministic_algorithms(True)
    # It would cost time, and nothing reads it. (The module makes the attribute by replacing its own class.)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


class FixedRows:
    """`network` in calls of `num_rows` rows: what is missing is filled up, what is more is another call."""

    def __init__(self, network: DenoisingNetwork, *, num_rows: int, captured: bool = False) -> None:
        """`captured`: on CUDA, as one CUDA graph, captured at the first call."""
        if num_rows < 1:
            raise ValueError(f"num_rows: {num_rows} given; 1 or more is accepted")
        self.num_rows = num_rows
        self._network = network
        self._captured = captured
        self._lock = threading.Lock()  # of the graph and its inputs
        self._inputs: tuple[Tensor, ...] = ()
        self._graph: CapturedStep[Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The network's."""
        return self._network.dtype

    def num_computed(self, num_rows: int) -> int:
        """Rows that are computed for so many, those that fill up included."""
        return -(-num_rows // self.num_rows) * self.num_rows

    def __call__(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> DenoisingOutput:
        outputs: list[Tensor] = []
        for part in zip(
            *(x.split(self.num_rows) for x in (hidden_states, timestep, class_labels)), strict=True
        ):
            filled = tuple(_filled_up(x, self.num_rows) for x in part)
            sample = self._sample_captured(filled) if self._captured else self._sample(filled)
            outputs.append(sample[: len(part[0])])
        return _Output(torch.cat(outputs))

    def _sample(self, inputs: tuple[Tensor, ...]) -> Tensor:
        hidden_states, timestep, class_labels = inputs
        return self._network(hidden_states, timestep=timestep, class_labels=class_labels).sample

    def _sample_captured(self, inputs: tuple[Tensor, ...]) -> Tensor:
        with self._lock:
            if self._graph is None:
                self._inputs = tuple(x.clone() for x in inputs)
                with torch.cuda.device(inputs[0].device):
                    self._graph = CapturedStep(lambda: self._sample(self._inputs), state=())
            for held, given in zip(self._inputs, inputs, strict=True):
                held.copy_(given)
            return self._graph().clone()


@dataclass(frozen=True)
class _Output:
    sample: Tensor


def _filled_up(x: Tensor, num_rows: int) -> Tensor:
    """(num_rows, ..): the rows of `x`, the last one repeated."""
    missing = num_rows - len(x)
    return torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) if missing else x
