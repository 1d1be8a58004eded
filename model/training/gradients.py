"""The gradients of replicated parameters, summed over the ranks in few large messages.

Not DistributedDataParallel, whose hooks send from within the backward pass: a step on CUDA is then two
graphs, the gradients and the update, with the messages between them, launched as ever. So a small network,
whose kernels a host launches slower than the device runs them, keeps its speed. The messages still go out
under way: where its last gradient is made, a bucket is one tensor and has an event in the first graph, which
the message waits for on a stream of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")

__all__ = ["GradientBuckets", "in_buckets"]

_BUCKET_NUMBERS = 2**26  # 256 MB each: large enough for the full bandwidth, small beside the whole


def in_buckets(items: Sequence[Item], numel: Callable[[Item], int]) -> list[list[Item]]:
    """Items in their order, so many in each bucket that it makes one message; an item that is larger than a
    message is a bucket of its own.
    """
    buckets: list[list[Item]] = []
    room = 0
    for item in items:
        if not buckets or numel(item) > room:
            buckets.append([])
            room = max(_BUCKET_NUMBERS, numel(item))
        buckets[-1].append(item)
        room -= numel(item)
    return buckets


class GradientBuckets:
    """Parameters in buckets, the last ones first, as the backward pass comes to them: `clear` before it,
    `gather` their gradients, `sum_over_ranks`, and `scatter` them back.
    """

    def __init__(self, parameters: Sequence[Tensor], *, passes: int) -> None:
        """`passes`: backward passes that add up to the gradients of a step."""
        self._buckets = in_buckets(list(reversed(parameters)), torch.Tensor.numel)
        self._passes = passes
        self._flat: dict[int, Tensor] = {}
        self._arrived = Counter[int]()
        device = parameters[0].device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._made = [torch.cuda.Event(external=True) for _ in self._buckets] if self._stream else []
        for number, bucket in enumerate(self._buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(partial(self._arrive, number))

    def _arrive(self, number: int, _: Tensor) -> None:
        self._arrived[number] += 1
        if self._arrived[number] == self._passes * len(self._buckets[number]):
            self._make(number)

    def _make(self, number: int) -> None:
        bucket = self._buckets[number]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        self._flat[number] = torch.cat([gradient.flatten() for gradient in gradients])
        for parameter in bucket:
            parameter.grad = None
        if self._made:
            self._made[number].record()

    def clear(self) -> None:
        """Forget what a backward pass that failed has left, which would count as this one's."""
        self._flat.clear()
        self._arrived.clear()

    def gather(self) -> list[Tensor]:
        """The gradients as one tensor a bucket; the parameters' own are freed."""
        for number in range(len(self._buckets)):
            if number not in self._flat:  # a parameter of it had no part in the loss
                self._make(number)
        flat = [self._flat[number] for number in range(len(self._buckets))]
        self.clear()
        return flat

    def sum_over_ranks(self, flat: Sequence[Tensor]) -> None:
        """In place, each as soon as the device has made it, the host waiting for none."""
        with torch.cuda.stream(self._stream):
            works = []
            for number, tensor in enumerate(flat):
                if self._stream:
                    self._stream.wait_event(self._made[number])
                works.append(dist.all_reduce(tensor, async_op=True))
        for work in works:
            work.wait()

    def scatter(self, flat: Sequence[Tensor]) -> None:
        """Give the parameters their parts of `flat` as gradients."""
        for bucket, tensor in zip(self._buckets, flat, strict=True):
            parts = tensor.split([parameter.numel() for parameter in bucket])
            for parameter, part in zip(bucket, parts, strict=True):
                parameter.grad = part.view_as(parameter)
