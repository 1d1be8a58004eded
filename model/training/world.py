"""The processes of a run: one, or those that torchrun started, on any number of nodes.

Two ways to share a batch: `ddp` keeps everything on every rank and sums the gradients, `fsdp` (FSDP2) gives
each rank a shard of parameters, moments and averages. Tensors travel by NCCL on CUDA and by gloo on the CPU.
What the ranks agree on (signals, ends, failures) travels by a gloo group of its own, which never waits for a
device, and which gives up on a silent rank after `rank_timeout_s`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from threading import Event
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from model.device import make_current, resolve_device
from model.launched import launched_local_rank, launched_rank, launched_world_size
from model.training.gradients import in_buckets

Value = TypeVar("Value")

__all__ = [
    "RankLost",
    "World",
    "local_shard",
    "shard_network",
    "sharded_like",
    "sum_over_ranks",
    "whole_tensor",
]

logger = logging.getLogger(__name__)

_ANSWER_EVERY_S = 1.0


class RankLost(RuntimeError):
    """Another process of the run ended or fell silent; one line for people."""


@dataclass(frozen=True, kw_only=True, eq=False)
class World:
    """This process among those of the run."""

    device: torch.device
    rank: int = 0
    size: int = 1
    parallel: str = "none"
    """none, ddp or fsdp."""
    mesh: DeviceMesh | None = None
    """The ranks as FSDP shards over them."""
    control: Any = None
    """The gloo group; None in a run of one process without torchrun."""
    saving: Any = None
    """Another, for saved states, which a thread may write."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes and logs."""
        return self.rank == 0

    @classmethod
    @contextmanager
    def joined(
        cls, parallel: str, *, device: torch.device | str | None = None, rank_timeout_s: float = 600.0
    ) -> Iterator[World]:
        """The world while the block runs. `parallel`: auto (ddp where torchrun started several processes),
        none, ddp or fsdp. `device` is for a single process; ranks take the CUDA device of their number.

        Raises ValueError where `parallel` does not fit how the process was started, and RankLost for the
        messages of the block that another rank did not answer in time.
        """
        size = launched_world_size()
        if parallel == "auto":
            parallel = "ddp" if size > 1 else "none"
        if parallel == "none":
            if size > 1:
                raise ValueError(
                    f"parallel: 'none' given to {size} processes of torchrun; auto, ddp or fsdp is accepted"
                )
            device = resolve_device(device)
            make_current(device)
            yield cls(device=device)
            return
        if "RANK" not in os.environ:
            raise ValueError(
                f"parallel: {parallel!r} given without torchrun; start it as "
                "`torchrun --nproc-per-node N -m model.cli train ...`, or leave parallel=auto"
            )
        rank, local_rank = launched_rank(), launched_local_rank()
        on_cuda = torch.cuda.is_available() and str(device) != "cpu"
        device = resolve_device(f"cuda:{local_rank}" if on_cuda else "cpu")
        make_current(device)
        timeout = timedelta(seconds=rank_timeout_s)
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=timeout)
        failed = True
        try:
            control, saving = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
            mesh = init_device_mesh(device.type, (size,)) if parallel == "fsdp" else None
            if on_cuda:
                sum_over_ranks(torch.zeros((), device=device))  # NCCL connects before minutes of compiling
            yield cls(
                device=device,
                rank=rank,
                size=size,
                parallel=parallel,
                mesh=mesh,
                control=control,
                saving=saving,
            )
            failed = False
        except SystemExit:  # which all ranks agreed on
            failed = False
            raise
        except RuntimeError as error:
            # gloo raises no class of its own, but names its file.
            if isinstance(error, dist.DistError) or "gloo" in str(error):
                lost = RankLost(
                    f"rank {rank} of {size}: another rank is gone, or was silent for {rank_timeout_s:g} s "
                    "(rank_timeout_s); its log says why. The same command goes on from the newest saved state"
                )
                logger.error("%s", lost)  # now: ending a group can take as long as its timeout
                raise lost from error
            raise
        finally:
            if failed and on_cuda:
                # Its end would wait for messages under way, which nobody may answer; those of a graph have no
                # timeout.
                dist.distributed_c10d._abort_process_group()
            else:
                dist.destroy_process_group()

    def largest(self, value: int) -> int:
        """The largest of the ranks' numbers, on every rank."""
        return self.largest_of_each([value])[0]

    def largest_of_each(self, values: list[int]) -> list[int]:
        """The largest of the ranks' numbers at each place of the list, on every rank, by one message."""
        if self.control is None:
            return values
        numbers = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self.control)
        return numbers.tolist()

    def shared(self, value: Value) -> Value:
        """The main rank's value, on every rank."""
        if self.control is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def mean(self, values: Tensor) -> Tensor:
        """Means over the ranks, of a tensor on the device or on the host."""
        if self.size == 1:
            return values
        summed = values.clone()
        dist.all_reduce(summed)
        return summed / self.size

    @contextmanager
    def main_rank_first(self) -> Iterator[None]:
        """The block on the main rank, then on the others, who wait for as long as that takes.

        A barrier would give up on the main rank after `rank_timeout_s`. Here a thread of it goes on answering
        the others, who so notice when it is gone. The block must send no messages.
        """
        if self.control is None:
            yield
            return
        if not self.is_main:
            while not self.largest(0):
                pass
            yield
            return
        done = Event()

        def answer() -> None:
            while not done.wait(_ANSWER_EVERY_S):
                self.largest(0)
            self.largest(1)

        with ThreadPoolExecutor(1) as pool:
            answers = pool.submit(answer)
            try:
                yield
            finally:
                done.set()
        answers.result()

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.largest(0)


def shard_network(network: nn.Module, mesh: DeviceMesh) -> None:
    """FSDP2: the parameters of `network` as shards over the ranks of `mesh`, gathered some blocks at a time.

    Groups are as large as the messages of ddp, for the bandwidth, and since each costs a host that launches
    call by call milliseconds. They stay whole from the forward pass to the end of the last backward one: the
    parameters are one of five tensors of their size; gradients, two moments and the EMA stay in shards. The
    blocks' maps of the conditioning are one group, since the network runs them all before its first block
    (`LaMambaDiff.conditioning`).
    """
    shard = partial(fully_shard, mesh=mesh, reshard_after_forward=False)
    repeated = tuple(getattr(network, "_repeated_blocks", None) or ())
    blocks = [module for module in network.modules() if type(module).__name__ in repeated]
    maps = [getattr(block, name, None) for block in blocks for name in ("conditioning_proj", "modulation")]
    linears: list[nn.Module] = [module for module in maps if isinstance(module, nn.Linear)]
    if linears:
        shard(linears)
    grouped = {id(parameter) for module in linears for parameter in module.parameters()}

    def numel(block: nn.Module) -> int:
        return sum(parameter.numel() for parameter in block.parameters() if id(parameter) not in grouped)

    for group in in_buckets(blocks, numel):
        shard(group)
    shard(network)


def local_shard(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: all of it, or its shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(shard: Tensor, like: Tensor) -> Tensor:
    """`shard` as this rank's part of a tensor that is shared out as `like` is."""
    if not isinstance(like, DTensor):
        return shard
    return DTensor.from_local(
        shard, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def sum_over_ranks(tensor: Tensor) -> None:
    """In place."""
    dist.all_reduce(tensor)


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor on every rank, all of which must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
