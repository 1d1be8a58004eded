"""The rows of a denoising step on several CPU threads, each running the network on some of them.

Torch shares single operations among its threads, which meet a thousand times in a step of a small network.
On a machine with nothing else to do that gains little (one 128 px image, two cores: 0.49 s, one thread:
0.43 s), and where anything else runs, each meeting may wait a turn of the scheduler (20 s). Rows do not
depend on each other: threads that take rows meet once a step, and a program that uses this gives torch one
thread an operation (`prepare_process`).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from model.cpu_memory import keep_freed_memory

if TYPE_CHECKING:
    from model.diffusion.step import DenoisingNetwork, DenoisingOutput

__all__ = ["RowThreads", "prepare_process"]

# With fewer latent pixels a thread, Python's own work, which only one thread at a time does, is the larger
# part (measured with the shipped networks on two cores).
_MIN_LATENT_PIXELS: Final = 1024


def prepare_process() -> None:
    """Give torch one thread an operation and keep freed memory, which steps on a CPU are fastest with.

    For programs, not for libraries: call it once, before the first large tensor.
    """
    torch.set_num_threads(1)
    keep_freed_memory()


class RowThreads:
    """A pool of `num_threads` threads for networks on the CPU; inference alone."""

    def __init__(self, num_threads: int) -> None:
        if num_threads < 1:
            raise ValueError(f"num_threads: {num_threads} given; 1 or more is accepted")
        self.num_threads = num_threads
        self._pool = ThreadPoolExecutor(
            num_threads, thread_name_prefix="lamamba-rows", initializer=torch.set_num_threads, initargs=(1,)
        )

    def share(self, network: DenoisingNetwork) -> DenoisingNetwork:
        """`network`, its calls divided among the threads."""
        return _SharedNetwork(network=network, threads=self)

    def num_parts(self, shape: torch.Size) -> int:
        """Into how many calls one with latents of that shape, (rows, C, H, W), is divided."""
        rows, _, height, width = shape
        return max(1, min(self.num_threads, rows, rows * height * width // _MIN_LATENT_PIXELS))

    def run(
        self, network: DenoisingNetwork, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor
    ) -> Tensor:
        """The network's `sample` of all rows. What a part raises is raised here."""
        parts = self.num_parts(hidden_states.shape)
        arguments = zip(
            *(x.tensor_split(parts) for x in (hidden_states, timestep, class_labels)), strict=True
        )
        calls = [self._pool.submit(_sample, network, *part) for part in arguments]
        return torch.cat([call.result() for call in calls])


@dataclass(frozen=True)
class _Output:
    sample: Tensor


@dataclass(frozen=True, kw_only=True)
class _SharedNetwork:
    network: DenoisingNetwork
    threads: RowThreads

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def __call__(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> DenoisingOutput:
        if self.threads.num_parts(hidden_states.shape) == 1:
            return self.network(hidden_states, timestep=timestep, class_labels=class_labels)
        return _Output(self.threads.run(self.network, hidden_states, timestep, class_labels))


@torch.inference_mode()  # a state of each thread
def _sample(
    network: DenoisingNetwork, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor
) -> Tensor:
    return network(hidden_states, timestep=timestep, class_labels=class_labels).sample
