"""The noise schedule: betas, what follows from them, and which of the steps a sampler keeps.

q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I) with abar_t = prod_{s<=t} (1 - beta_s): DDPM (arXiv
2006.11239), section 2; the posterior q(x_{t-1} | x_t, x_0) is its equation 7. Respacing is "Improved DDPM"
(arXiv 2102.09672), section 4.

Letters: T number of training steps; t the step number that the network is shown, 0 (nearly clean) to T - 1
(pure noise); abar the cumulative product of 1 - beta.

All tables are float64 numpy arrays; what runs on a device picks from them and rounds once (samplers.py,
loss.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import numpy.typing as npt

__all__ = ["Float64Array", "NoiseSchedule", "respaced_timesteps"]

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """A process of len(timesteps) steps: equal and hashed by value, so that tables made from it can be
    cached.

    Entry i of every table belongs to the i-th kept step, counted from the clean end.
    """

    beta_values: tuple[float, ...]
    """beta of each kept step relative to the kept step below it, each in (0, 1)."""
    timesteps: tuple[int, ...]
    """The step number of the full process that the network is shown at each kept step, ascending."""

    def __hash__(self) -> int:
        """Made once: tables are looked up for each image at each step."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.beta_values, self.timesteps))

    def __post_init__(self) -> None:
        if not self.beta_values or len(self.beta_values) != len(self.timesteps):
            raise ValueError(
                f"beta_values: {len(self.beta_values)} given for {len(self.timesteps)} timesteps; "
                "one for each, and at least one, is accepted"
            )
        if not all(0.0 < beta < 1.0 for beta in self.beta_values):
            raise ValueError(
                f"beta_values: {min(self.beta_values)} to {max(self.beta_values)} given; "
                "values above 0 and below 1 are accepted"
            )

    @staticmethod
    def linear(
        num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> NoiseSchedule:
        """Betas evenly spaced from `beta_start` to `beta_end`, both included; by default the authors'.

        The same object for the same arguments.
        """
        return _linear_schedule(num_train_timesteps, beta_start, beta_end)

    def respaced(self, timesteps: Sequence[int]) -> NoiseSchedule:
        """The process that visits only these steps of this one (ascending indices into it).

        New betas are 1 - abar_t / abar_prev over the kept steps, and every table follows from them.
        """
        kept = np.asarray(timesteps, dtype=np.int64)
        ascending = bool((np.diff(kept) > 0).all())
        if not len(kept) or not ascending or kept[0] < 0 or kept[-1] >= self.num_timesteps:
            raise ValueError(
                f"timesteps: {list(timesteps)} given; strictly ascending numbers "
                f"from 0 to {self.num_timesteps - 1} are accepted"
            )
        abar = self.alphas_cumprod[kept]
        betas = 1.0 - abar / np.append(1.0, abar[:-1])
        return NoiseSchedule(
            beta_values=tuple(betas.tolist()), timesteps=tuple(self.timesteps[i] for i in kept.tolist())
        )

    @property
    def num_timesteps(self) -> int:
        """Number of steps kept."""
        return len(self.timesteps)

    @cached_property
    def betas(self) -> Float64Array:
        return _read_only(np.asarray(self.beta_values, dtype=np.float64))

    @cached_property
    def log_betas(self) -> Float64Array:
        """Upper end of the learned log-variance range."""
        return _read_only(np.log(self.betas))

    @cached_property
    def alphas_cumprod(self) -> Float64Array:
        """abar_t."""
        return _read_only(np.cumprod(1.0 - self.betas, dtype=np.float64))

    @cached_property
    def alphas_cumprod_prev(self) -> Float64Array:
        """abar one kept step nearer to the clean end; 1 at index 0."""
        return _read_only(np.append(1.0, self.alphas_cumprod[:-1]))

    @cached_property
    def posterior_variance(self) -> Float64Array:
        """Variance of q(x_{t-1} | x_t, x_0); 0 at index 0."""
        return _read_only(self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod))

    @cached_property
    def posterior_log_variance_clipped(self) -> Float64Array:
        """Lower end of the learned log-variance range: entry 0, which would be log 0, repeats entry 1.

        A process of a single step has no entry 1; its beta stands in, and no sampler adds noise there.
        """
        variance = self.posterior_variance.copy()
        variance[0] = variance[1] if len(variance) > 1 else self.betas[0]
        return _read_only(np.log(variance))

    @cached_property
    def posterior_mean_coef1(self) -> Float64Array:
        """Weight of x_0 in the posterior mean."""
        weight = self.betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        return _read_only(weight)

    @cached_property
    def posterior_mean_coef2(self) -> Float64Array:
        """Weight of x_t in the posterior mean."""
        remaining = (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        return _read_only(remaining * np.sqrt(1.0 - self.betas))


def respaced_timesteps(spacing: str, num_train_timesteps: int = 1000) -> tuple[int, ...]:
    """The steps that a spacing string keeps, ascending: "n", "n1,n2,.." or "ddimN" (the ADM/DiT convention).

    "n1,n2,.." cuts the process into as many equal sections (the first ones longer by a step where it does
    not divide) and spreads n_i steps over section i, its two ends included; "n" is one section. "ddimN"
    keeps 0, s, 2s, .. for the smallest integer stride s that gives N of them.
    """
    if spacing.startswith("ddim"):
        return _strided(spacing, num_train_timesteps)
    counts = [_count(text, spacing) for text in spacing.split(",")]
    quotient, remainder = divmod(num_train_timesteps, len(counts))
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        size = quotient + (section < remainder)
        if count > size:
            raise ValueError(
                f"spacing: {spacing!r} given; section {section + 1} of {len(counts)} has {size} steps "
                f"and accepts 1 to {size}"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0  # summed, not multiplied: the authors' rounding of halves depends on it
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += size
    return tuple(kept)


def _strided(spacing: str, num_train_timesteps: int) -> tuple[int, ...]:
    count = _count(spacing.removeprefix("ddim"), spacing)
    for stride in range(1, num_train_timesteps):
        if len(range(0, num_train_timesteps, stride)) == count:
            return tuple(range(0, num_train_timesteps, stride))
    raise ValueError(
        f"spacing: {spacing!r} given; no integer stride takes {count} of {num_train_timesteps} steps, "
        "a divisor of that number is always accepted"
    )


def _count(text: str, spacing: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(
            f"spacing: {spacing!r} given; 'n', 'n1,n2,..' or 'ddimN' with counts of at least 1 is accepted"
        )
    return int(text)


def _read_only(table: Float64Array) -> Float64Array:
    table.setflags(write=False)
    return table


@cache
def _linear_schedule(num_train_timesteps: int, beta_start: float, beta_end: float) -> NoiseSchedule:
    if num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps: {num_train_timesteps} given; at least 1 is accepted")
    betas = np.linspace(beta_start, beta_end, num_train_timesteps, dtype=np.float64)
    return NoiseSchedule(beta_values=tuple(betas.tolist()), timesteps=tuple(range(num_train_timesteps)))
