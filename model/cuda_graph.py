"""One launch for a function of many kernels: a CUDA graph, captured after calls whose effects are undone.

A training step of a small network is 1,500 to 2,400 kernels, which a host launches in 90 to 150 ms and a GPU
runs in 15 to 50. A graph holds all of them, with the addresses of their tensors, and replays them in one
launch. So a captured function takes no arguments and asks the host nothing: what changes from call to call
lies in tensors that it reads, and what it changes, it changes in place.

Random numbers come from the device's default generator. Each replay reads the generator's seed and offset
at that moment: torch.manual_seed before a replay gives the numbers that it gives before the function itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["CapturedStep", "Captures", "capture_order", "restored"]

Result = TypeVar("Result")

# The first call compiles and tunes kernels and makes the libraries' workspaces; torch's notes advise a few.
_WARMUP_CALLS = 3


class CapturedStep(Generic[Result]):
    """`step` as one launch. Each call returns the same tensors, overwritten by the next."""

    def __init__(
        self,
        step: Callable[[], Result],
        state: Sequence[Tensor],
        *,
        beside: CapturedStep[Any] | None = None,
    ) -> None:
        """Call `step` a few times, put `state` back, and capture it; capturing runs no kernel.

        Args:
            step: the function; gradients that it makes, it must also free.
            state: every tensor that outlives a call and that `step` changes. None of them may be replaced by
                another tensor as long as the captured step is in use.
            beside: another captured step to share memory with. The two then take turns: what one returned
                must be read before the other is called.
        """
        # The stream of the warm-up is the stream of the capture: what autograd and cuBLAS keep for each
        # stream is then made before the capture. Memory can be shared within a stream alone.
        self._stream: torch.cuda.Stream = torch.cuda.Stream() if beside is None else beside._stream
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), restored(state):
            for _ in range(_WARMUP_CALLS):
                step()
        self._graph = torch.cuda.CUDAGraph()
        pool = None if beside is None else beside._graph.pool()
        try:
            with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self._result = step()
        except BaseException as error:
            self.close()
            # Other streams that were at work then may be what ending the capture complains of instead.
            if isinstance(error.__context__, torch.OutOfMemoryError):
                raise error.__context__ from None
            raise

    def __call__(self) -> Result:
        self._graph.replay()
        return self._result

    def close(self) -> None:
        """Free the graph, whoever still refers to this: it cannot be called again.

        The end of an NCCL group waits for all graphs that hold its messages, those that a traceback keeps
        included.
        """
        self._graph.reset()


def capture_order(sizes: Sequence[int], most: int) -> list[int]:
    """Of ascending sizes those up to the one that holds `most`, the largest first: the others share its
    memory.
    """
    smaller = [size for size in sizes if size < most]
    return [*sizes[len(smaller) : len(smaller) + 1], *reversed(smaller)]


class Captures:
    """Captured functions that share their memory: what one returned is read before another is called."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._first: CapturedStep[Any] | None = None

    def capture(self, step: Callable[[], Result]) -> Callable[[], Result]:
        """`step`, which changes nothing that outlives a call, as one launch on the device."""
        with torch.cuda.device(self._device):
            captured = CapturedStep(step, state=(), beside=self._first)
        self._first = self._first or captured
        return captured


@contextmanager
def restored(state: Sequence[Tensor]) -> Iterator[None]:
    """Give `state` its present values back at the end, in place. The copies lie in the host's memory."""
    saved = [tensor.detach().to("cpu", copy=True) for tensor in state]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(state, saved, strict=True):
                tensor.copy_(value)
