"""The state of a run and its step: noise, network, loss, AdamW, EMA (paper section 4.1, DiT's recipe).

The random numbers of a sample, and which image it shows, are functions of (seed, number of the sample in the
run) alone, so a resumed run continues exactly without stored generator states, on as many ranks as it likes.
Parameters, averages and scan state are fp32; the network runs under bf16 autocast on CUDA. A step whose
gradients are not finite changes nothing, the EMA included, and is counted.

On CUDA a whole step, from drawing latents to the EMA, is one CUDA graph, and the blocks are compiled; with
fsdp the messages that gather parameters and share out gradients are in it, with ddp it is two graphs, and
gradients are summed from within the first on. The compiler keeps its results in TORCHINDUCTOR_CACHE_DIR: with
a folder that lasts, or one copied from another machine of the same kind, the next run starts several times
faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from model.averaged_adamw import AveragedAdamW
from model.cuda_graph import CapturedStep, restored
from model.network.compiled_blocks import with_compiled_blocks
from model.training.averages import PowerAverage
from model.training.config import TrainConfig
from model.training.draws import SampleDraws
from model.training.gradients import GradientBuckets
from model.training.network import TrainedNetwork
from model.training.objective import Losses, Objective
from model.training.source import Source
from model.training.world import World, local_shard, shard_network, sharded_like, sum_over_ranks

__all__ = ["Trainer"]


class Trainer:
    """The state of a run and its step.

    Attributes:
        images_seen: samples of the run that are done.
        window: sums since they were last taken, over steps with finite gradients: their number, then loss,
            mse, vb and the gradients' norm; (5,) fp32.
    """

    def __init__(self, config: TrainConfig, source: Source, network: TrainedNetwork, world: World) -> None:
        self.config, self.source, self.network, self.world = config, source, network, world
        self.device = world.device
        self.images_seen = 0
        self.window = torch.zeros(5, device=self.device)
        self._on_cuda = self.device.type == "cuda"
        self._rows = config.rank_batch_size(world.size)
        self._micro_rows = min(config.micro_batch_size or self._rows, self._rows)
        self._first_sample = torch.zeros((), dtype=torch.int64, device=self.device)
        self._objective = Objective(config, self.device)
        if world.mesh is not None:
            shard_network(network.module, world.mesh)
        self._graphs: list[CapturedStep[Any]] = []
        self.capture(config.cuda_graph)
        self.parameters: dict[str, Tensor] = dict(network.module.named_parameters())
        self.ema = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        # What this rank holds: under fsdp a shard of each, else the parameters themselves.
        held = [
            local_shard(parameter.detach()) if world.mesh is not None else parameter
            for parameter in self.parameters.values()
        ]
        self.tracks = [PowerAverage(held, sigma_rel) for sigma_rel in config.ema_tracks]
        self.optimizer = AveragedAdamW(
            held,
            [local_shard(average) for average in self.ema.values()],
            betas=config.adam_betas,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            average_decay=config.ema_decay,
            captured=self._captures,
            sum_over_shards=None if world.mesh is None else sum_over_ranks,
        )
        passes = len(range(0, self._rows, self._micro_rows))
        self._buckets = GradientBuckets(held, passes=passes) if world.parallel == "ddp" else None
        self._grad_norm = torch.zeros((), device=self.device)
        self._loss = self._compiled_loss()

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.images_seen // self.config.batch_size

    def train_step(self) -> Losses:
        """One optimizer step; returns this rank's losses, which the next step may overwrite."""
        self.source.prepare(self.images_seen)
        self.optimizer.schedule(learning_rate=self._learning_rate(), step=self.step)
        if self._launch is None:
            self.prepare()
        assert self._launch is not None
        losses = self._launch()
        self.images_seen += self.config.batch_size
        if self.step % self.config.ema_track_interval == 0:
            for track in self.tracks:
                track.update(self.step, interval=self.config.ema_track_interval)
        return losses

    def capture(self, captured: bool) -> None:
        """Launch the next steps as graphs, or call by call. What was captured is freed, which must come
        before the end of the world that it sends messages in.
        """
        for graph in self._graphs:
            graph.close()
        self._graphs.clear()
        self._captures = captured and self._on_cuda
        self._launch: Callable[[], Losses] | None = None

    def prepare(self) -> None:
        """Compile and, where it is captured, capture the step; the state stays as it is."""
        if self._launch is None:
            self._launch = self._ready_step()
            if self._on_cuda and not self._captures:
                with restored(self._changed()):
                    self._launch()

    def _ready_step(self) -> Callable[[], Losses]:
        """A function that takes a step, captured if it is to be."""
        buckets = self._buckets
        if buckets is None:
            if not self._captures:
                return self._whole_step
            whole = CapturedStep(self._whole_step, self._changed())
            self._graphs.append(whole)
            return whole

        def backward() -> tuple[Losses, list[Tensor]]:
            return self._backward(), buckets.gather()

        def update(flat: list[Tensor], losses: Losses) -> None:
            buckets.scatter(flat)
            self._update(losses)

        if not self._captures:

            def called() -> Losses:
                losses, flat = backward()
                buckets.sum_over_ranks(flat)
                update(flat, losses)
                return losses

            return called
        first = CapturedStep(backward, ())  # gradients change nothing that outlives the step
        self._graphs.append(first)
        losses, flat = first()  # a replay: the capture itself computes nothing
        second = CapturedStep(lambda: update(flat, losses), self._changed(), beside=first)
        self._graphs.append(second)

        def captured() -> Losses:
            first()
            buckets.sum_over_ranks(flat)
            second()
            return losses

        return captured

    def _whole_step(self) -> Losses:
        losses = self._backward()
        self._update(losses)
        return losses

    def _backward(self) -> Losses:
        """Gradients of the mean loss over the batch, and this rank's mean losses.

        Those of a step that failed midway, e.g. for memory, are not counted again.
        """
        self.network.module.zero_grad(set_to_none=True)
        if self._buckets is not None:
            self._buckets.clear()
        # ddp sums the ranks' gradients, fsdp averages them.
        denominator = self.config.batch_size if self._buckets is not None else self._rows
        totals = torch.zeros(len(Losses._fields), device=self.device)
        for start in range(0, self._rows, self._micro_rows):
            part = slice(start, min(start + self._micro_rows, self._rows))
            count = part.stop - part.start
            if isinstance(self.network.module, FSDPModule):  # gathered once a step, not for each micro-batch
                self.network.module.set_reshard_after_backward(part.stop == self._rows)
            losses = self._losses(part)
            (losses.loss * (count / denominator)).backward()
            totals += torch.stack([value.detach() for value in losses]) * (count / self._rows)
        return Losses(*totals.unbind())

    def _losses(self, part: slice) -> Losses:
        moments, labels = self.source.rows(part)
        offset = self.world.rank * self._rows + part.start
        numbers = self._first_sample + offset + torch.arange(part.stop - part.start, device=self.device)
        shape = (moments.shape[1] // 2, moments.shape[2], moments.shape[3])
        draws = SampleDraws.of(numbers, self.config.seed, shape)
        x0 = self.source.autoencoder.latents(moments, draws.posterior)
        # The one place where labels are dropped.
        labels = labels.masked_fill(draws.dropout < self.network.label_dropout, self.network.null_label)
        return self._loss(x0, labels, self._objective.timesteps(draws.timestep), draws.noise)

    def _mean_losses(self, x0: Tensor, labels: Tensor, t: Tensor, noise: Tensor) -> Losses:
        x_t = self._objective.noised(x0, noise, t)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._on_cuda):
            output = self.network.module(x_t, timestep=t, class_labels=labels).sample
        return self._objective.losses(output, x0, x_t, noise, t)

    def _update(self, losses: Losses) -> None:
        """Move parameters and EMA along the gradients, and count."""
        if self.world.mesh is not None:
            for shard, parameter in zip(self.optimizer.parameters, self.parameters.values(), strict=True):
                shard.grad = None if parameter.grad is None else local_shard(parameter.grad)
                parameter.grad = None
        self._grad_norm.copy_(self.optimizer.step())
        values = torch.stack([torch.ones_like(self._grad_norm), *losses, self._grad_norm])
        self.window += torch.where(self.optimizer.skipped > 0, 0.0, values)
        self._first_sample += self.config.batch_size

    def _compiled_loss(self) -> Callable[..., Losses]:
        if self.config.compile == "none" or not self._on_cuda:
            return self._mean_losses
        if self.world.mesh is not None:
            return with_compiled_blocks(
                self.network.module, self._mean_losses, dynamic=False, inside_hooks=True
            )
        if self.config.compile == "full":
            return torch.compile(self._mean_losses, dynamic=False, fullgraph=True)
        return with_compiled_blocks(self.network.module, self._mean_losses, dynamic=False)

    def _learning_rate(self) -> float:
        peak, seen = self.config.learning_rate, self.images_seen + self.config.batch_size
        if seen < self.config.warmup_images:
            return peak * seen / self.config.warmup_images
        if self.config.learning_rate_schedule == "constant":
            return peak
        progress = (seen - self.config.warmup_images) / (self.config.num_images - self.config.warmup_images)
        return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    def _changed(self) -> list[Tensor]:
        """Every tensor that a step changes in place."""
        return [*self.optimizer.state(), self.window, self._grad_norm, self._first_sample]

    def tensors(self) -> dict[str, Tensor]:
        """All that a saved state holds, by name, as it is now: writing to them is loading."""
        names, parameters = list(self.parameters), list(self.parameters.values())

        def named(kind: str, held: list[Tensor]) -> dict[str, Tensor]:
            shared = [sharded_like(tensor, like) for tensor, like in zip(held, parameters, strict=True)]
            return {f"{kind}/{name}": tensor for name, tensor in zip(names, shared, strict=True)}

        tensors = {f"network/{name}": parameter.detach() for name, parameter in self.parameters.items()}
        tensors |= {f"ema/{name}": average for name, average in self.ema.items()}
        for kind in ("exp_avg", "exp_avg_sq"):
            tensors |= named(kind, self.optimizer.moments(kind))
        for track in self.tracks:
            tensors |= named(track.name, track.average)
        counts = {"updates": self.optimizer.moments("step")[0], "window": self.window}
        return tensors | counts | {"skipped_steps": self.optimizer.skipped_steps}

    def go_on_from(self, images_seen: int) -> None:
        """Continue with sample `images_seen`, after `tensors` were loaded."""
        for updates in self.optimizer.moments("step")[1:]:
            updates.copy_(self.optimizer.moments("step")[0])
        self.optimizer.skipped_in_a_row.zero_()
        self.images_seen = images_seen
        self._first_sample.fill_(images_seen)
