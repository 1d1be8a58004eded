"""Forwards of the networks from (x, t, y), each as every variant says, at one shape after another.

At a shape all variants are made ready first: their first call (with the compilation), their agreement with
the first variant, their memory. Then they are timed in turn. What fails is a row with its reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from model.benchmark.config import BenchConfig, Shape, Variant, architecture, dit_architecture
from model.benchmark.energy import energy_counter, joules
from model.benchmark.kernels import profile_kernels
from model.benchmark.networks import (
    DTYPES,
    EmbeddedOnce,
    build_dit,
    build_lamamba,
    optimize,
    twin,
)
from model.benchmark.timing import interleaved, milliseconds, percentiles, release
from model.cuda_graph import CapturedStep
from model.messages import one_line
from model.network.dit import dit_macs
from model.network.macs import count_macs
from model.network.scan import resolve_scan_backend

__all__ = ["AGREEMENT", "DisagreementError", "Forwards", "peer_name", "relative_rms"]

AGREEMENT = {
    "bf16": 2e-2,  # sums in another order, rounded to 2**-8 in each of 22 blocks: 5e-3 was measured
    "fp32": 1e-4,  # the same with 2**-24, and room for TF32 where a library takes it
}
"""Relative RMS by which a variant of ours may differ from the first one."""


class DisagreementError(Exception):
    """A variant of ours computes something else than the first one: no time of it is worth anything."""


@dataclass
class _Ready:
    """A variant that has run once at the present shape."""

    run: Callable[[], Tensor]
    facts: dict[str, Any] = field(default_factory=dict)


class Forwards:
    """Measures shape by shape; networks of one side are kept until a shape of another side comes."""

    def __init__(self, config: BenchConfig, device: torch.device, *, matmul_tflops: float) -> None:
        self.config, self.device = config, device
        self.dtype = DTYPES[config.numerics]
        self.matmul_tflops = matmul_tflops
        self.profiles: list[dict[str, Any]] = []
        """Of the configured variant, one a shape."""
        self._networks: dict[tuple[str, int], nn.Module] = {}
        self._energy = energy_counter(device) if config.energy_seconds else None

    def measure(self, shape: Shape, deadline: float) -> list[dict[str, Any]]:
        """One row for each variant. Raises DisagreementError for one of ours that differs."""
        self._forget_other_sides(shape.side)
        ready: dict[Variant, _Ready] = {}
        skipped: dict[Variant, str] = {}
        self._prepare(shape, deadline, ready, skipped)
        samples, failures = interleaved(
            {_key(variant): state.run for variant, state in ready.items()},
            milliseconds(self.device),
            repeats=self.config.repeats,
            variant_limit_s=self.config.variant_limit_s,
            deadline=deadline,
        )
        rows = []
        for variant in self.config.selected_variants():
            row = self._identity(variant, shape)
            reason = skipped.get(variant) or failures.get(_key(variant))
            if reason is not None:
                rows.append(row | {"skipped": reason})
                continue
            timed = samples[_key(variant)]
            row |= percentiles(timed.ms) | {"repeats": len(timed.ms), "calls": timed.calls}
            rows.append(row | ready[variant].facts | self._efficiency(variant, shape, row["ms"]))
        self._add_energy(rows, ready, deadline)
        self._add_profile(shape, ready)
        ready.clear()
        torch.compiler.reset()
        release(self.device)
        return rows

    def not_run(self, shape: Shape, reason: str) -> list[dict[str, Any]]:
        """The rows of a shape that time did not suffice for."""
        return [
            self._identity(variant, shape) | {"skipped": reason}
            for variant in self.config.selected_variants()
        ]

    def _prepare(
        self, shape: Shape, deadline: float, ready: dict[Variant, _Ready], skipped: dict[Variant, str]
    ) -> None:
        inputs = self._inputs(shape)
        captured: CapturedStep[Tensor] | None = None
        calls: dict[Variant, _Ready] = {}
        expected: dict[str, tuple[str, Tensor]] = {}
        for variant in self.config.selected_variants():
            if time.monotonic() > deadline:
                skipped[variant] = "not run: the time was over"
                continue
            plain = Variant(variant.provider, variant.form, variant.level, graph=False)
            try:
                if plain in skipped:
                    raise RuntimeError(skipped[plain])
                if plain not in calls:
                    calls[plain] = self._first_call(plain, shape, inputs)
                state = calls[plain]
                if variant.graph:
                    captured = self._captured(state, captured)
                    state = _Ready(captured, dict(state.facts))
                sample = self._fresh_sample(state.run, overwritten=variant.graph)
            except Exception as error:  # out of memory, or whatever a kernel or a compiler fails with
                skipped[variant] = one_line(error)
                if plain not in calls:
                    skipped[plain] = skipped[variant]
                captured = None  # a capture that failed may have left the shared memory unusable
                release(self.device)
                continue
            first, reference = expected.setdefault(variant.provider, (variant.name, sample))
            error_rms = relative_rms(sample, reference)
            if variant.provider == "lamamba" and not error_rms <= AGREEMENT[self.config.numerics]:
                raise DisagreementError(
                    f"{variant.name} differs from {first} at {shape} by {error_rms:.2e} (relative RMS)"
                )
            state.facts["relative_rms"] = round(error_rms, 7)
            ready[variant] = state

    def _first_call(self, variant: Variant, shape: Shape, inputs: tuple[Tensor, Tensor, Tensor]) -> _Ready:
        network = self._optimized(variant, shape.side)
        x, t, y = inputs

        def run() -> Tensor:
            return network(x, timestep=t, class_labels=y).sample

        started = time.perf_counter()
        run()
        self._wait()
        seconds = time.perf_counter() - started
        before = self._reset_peak()
        run()
        weights = sum(parameter.nbytes for parameter in network.parameters())
        facts: dict[str, Any] = self._peak_memory(before, weights)
        if variant.level != "eager":
            facts["compile_s"] = round(seconds, 2)
        return _Ready(run, facts)

    def _captured(self, state: _Ready, beside: CapturedStep[Tensor] | None) -> CapturedStep[Tensor]:
        """Its memory is what a call needs, once for all graphs of a shape: none needs the others' results."""
        if self.device.type != "cuda":
            raise RuntimeError("a CUDA graph needs a CUDA device")
        release(self.device)
        return CapturedStep(state.run, (), beside=beside)

    def _fresh_sample(self, run: Callable[[], Tensor], *, overwritten: bool) -> Tensor:
        sample = run()
        if overwritten:
            sample.fill_(torch.nan)  # a replay that writes nothing must not pass for right
            sample = run()
        return sample.float()

    def _optimized(self, variant: Variant, side: int) -> Any:
        network = twin(self._network(variant.provider, side))
        if variant.provider == "lamamba":
            network.use_scan_backend(resolve_scan_backend(variant.form, self.device))
        elif variant.form == "one-embedding":
            network = EmbeddedOnce(network)
        optimize(network, variant.level)
        return network

    def _network(self, provider: str, side: int) -> nn.Module:
        key = (provider, side)
        if key not in self._networks:
            preset, device, dtype = self.config.preset, self.device, self.dtype
            self._networks[key] = (
                build_lamamba(preset, side, d_state=self.config.d_state, device=device, dtype=dtype)
                if provider == "lamamba"
                else build_dit(preset, side, device=device, dtype=dtype)
            )
        return self._networks[key]

    def _forget_other_sides(self, side: int) -> None:
        self._networks = {key: network for key, network in self._networks.items() if key[1] == side}
        release(self.device)

    def _inputs(self, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
        """x (rows, 4, side, side), t and y (rows,)."""
        generator = torch.Generator(self.device).manual_seed(shape.rows)
        config = architecture(self.config.preset, shape.side, d_state=self.config.d_state)
        x = torch.randn(
            *(shape.rows, config.in_channels, shape.side, shape.side),
            generator=generator,
            device=self.device,
        )
        t = torch.randint(1000, (shape.rows,), generator=generator, device=self.device)
        y = torch.randint(config.num_classes, (shape.rows,), generator=generator, device=self.device)
        return x.to(self.dtype), t, y

    def _identity(self, variant: Variant, shape: Shape) -> dict[str, Any]:
        own = variant.provider == "lamamba"
        return {
            "provider": "lamamba" if own else peer_name(self.config.preset),
            "preset": self.config.preset,
            "variant": variant.name,
            "scan_backend": variant.form if own else None,
            "level": variant.level,
            "cuda_graph": variant.graph,
            "numerics": self.config.numerics,
            "scope": "forward",
            "rows": shape.rows,
            "side": shape.side,
        } | ({"d_state": self.config.d_state} if own else {})

    def _efficiency(self, variant: Variant, shape: Shape, ms: float) -> dict[str, float]:
        macs, attention = _macs(variant.provider, self.config.preset, shape.side, self.config.d_state)
        tflops = 2 * macs * shape.rows / (max(ms, 1e-4) * 1e9)
        return {
            "ms_per_row": round(ms / shape.rows, 5),
            "gmacs_per_row": round(macs / 1e9, 5),
            "attention_share_of_macs": round(attention / macs, 4),
            "tflops": round(tflops, 3),
            "share_of_matmul_ceiling": round(tflops / self.matmul_tflops, 4),
        }

    def _add_energy(self, rows: list[dict[str, Any]], ready: dict[Variant, _Ready], deadline: float) -> None:
        if self._energy is None:
            return
        for provider in {variant.provider for variant in ready}:
            measured = [
                (row["ms"], variant, row)
                for variant, row in zip(self.config.selected_variants(), rows, strict=True)
                if variant.provider == provider and "ms" in row
            ]
            if not measured or time.monotonic() > deadline:
                continue
            ms, variant, row = min(measured, key=lambda entry: entry[0])
            try:
                used = joules(
                    ready[variant].run, self._energy, seconds=self.config.energy_seconds, call_ms=ms
                )
            except Exception as error:  # the times are there, with or without the energy
                row["joules_skipped"] = one_line(error)
                continue
            row["joules_per_forward"] = round(used, 4)
            row["watts"] = round(used / (ms / 1e3), 1)

    def _add_profile(self, shape: Shape, ready: dict[Variant, _Ready]) -> None:
        for variant, state in ready.items():
            if variant.name == self.config.profile:
                facts = self._identity(variant, shape) | profile_kernels(state.run, self.device)
                self.profiles.append(facts)

    def _reset_peak(self) -> int:
        if self.device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def _peak_memory(self, before: int, weights: int) -> dict[str, int]:
        """What the network needs alone on the card: its weights, and what a call takes on top of them."""
        if self.device.type != "cuda":
            return {}
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated(self.device) - before + weights}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def peer_name(preset: str) -> str:
    """The provider's name in results."""
    return f"dit-{preset.lower()}-2"


def relative_rms(value: Tensor, reference: Tensor) -> float:
    """|value - reference| / |reference|, NaN where either has one."""
    return float((value.float() - reference.float()).norm() / reference.float().norm())


@cache
def _macs(provider: str, preset: str, side: int, d_state: int) -> tuple[int, int]:
    """Multiply-adds of a row, and of them attention's products of tokens."""
    if provider == "dit":
        counts = dit_macs(dit_architecture(preset, side))
        return counts["total"], counts["attention"]
    count = count_macs(architecture(preset, side, d_state=d_state))
    return count.total, count.attention


def _key(variant: Variant) -> str:
    return f"{variant.provider} {variant.name}"
