"""The processes that share an evaluation: this one alone, or those that torchrun started.

They exchange little (lists of parts, sums of features), so it travels by gloo, from and to the CPU, whatever
the devices. Files are exchanged through the folder of the outputs, which all ranks must see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from model.device import make_current, resolve_device
from model.launched import launched_local_rank, launched_world_size

__all__ = ["Ranks"]

T = TypeVar("T")

_LONGEST_WAIT = timedelta(hours=6)  # rank 0 alone trains a judge, writes archives and takes roots of matrices


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's place among them."""

    rank: int = 0
    size: int = 1

    @classmethod
    @contextmanager
    def joined(cls) -> Iterator[Ranks]:
        """The ranks while the block runs; one without torchrun."""
        if launched_world_size() == 1:
            yield cls()
            return
        dist.init_process_group("gloo", timeout=_LONGEST_WAIT)
        try:
            yield cls(rank=dist.get_rank(), size=dist.get_world_size())
        finally:
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this rank writes and logs."""
        return self.rank == 0

    def device(self, given: str | None) -> torch.device:
        """`given` as `resolve_device` reads it; several ranks on CUDA take the card of their number each."""
        device = resolve_device(given)
        if self.size > 1 and device.type == "cuda":
            device = resolve_device(f"cuda:{launched_local_rank()}")
        make_current(device)
        return device

    def share(self, num: int) -> range:
        """This rank's share of the numbers 0 to `num` - 1: all shares in the ranks' order are all numbers."""
        return range(num * self.rank // self.size, num * (self.rank + 1) // self.size)

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, which alone calls it, on every rank; a ValueError of it likewise."""
        if self.size == 1:
            return make()
        answers: list[Any] = [None]
        if self.is_main:
            try:
                answers = [make()]
            except ValueError as error:
                answers = [error]
        dist.broadcast_object_list(answers)
        if isinstance(answers[0], ValueError):
            raise answers[0]
        return cast("T", answers[0])

    def gathered(self, value: T) -> list[T]:
        """On rank 0 the values of all ranks in their order; on the others nothing."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, values)
        return cast("list[T]", values or [])

    def wait(self) -> None:
        """For all ranks to come here."""
        if self.size > 1:
            dist.barrier()
