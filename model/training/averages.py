"""Power-function averages of the weights, and the choice of their length after training.

After step t, such an average weights the parameters after step tau by (gamma + 1) tau^gamma / t^(gamma + 1).
Its length is a constant share of the training so far, `sigma_rel` its standard deviation as a share (Karras
et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv 2312.02696, section 3).

Two averages of different length are kept while training, and written down now and then. Averages of any
length in between, and somewhat beyond, at any time before the last, are combinations of those snapshots: the
least-squares fit of the wanted profile by theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["PowerAverage", "gamma_of", "snapshot_weights", "track_name"]


def gamma_of(sigma_rel: float) -> float:
    """The exponent whose profile has this standard deviation, a share of the training's length.

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)): above 0, up to 1 / sqrt(12), which is the plain
    mean of all weights, gamma = 0. ValueError for what no such exponent has.
    """
    if not 0 < sigma_rel <= 12**-0.5:
        raise ValueError(f"sigma_rel: {sigma_rel} given; above 0, up to {12**-0.5:.4f} is accepted")
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def track_name(sigma_rel: float) -> str:
    """What the average is called in saved states and snapshots."""
    return f"ema-{sigma_rel:g}"


class PowerAverage:
    """One average of `parameters`, beginning with their present values."""

    def __init__(self, parameters: Sequence[Tensor], sigma_rel: float) -> None:
        self.name, self.gamma = track_name(sigma_rel), gamma_of(sigma_rel)
        self._parameters = [parameter.detach() for parameter in parameters]
        self.average = [parameter.clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self, step: int, *, interval: int) -> None:
        """Take in the parameters after `step` steps in all, of which `interval` since the last time."""
        weight = 1 - max(0.0, 1 - interval / step) ** (self.gamma + 1)
        torch._foreach_lerp_(self.average, self._parameters, weight)


def snapshot_weights(
    snapshots: Sequence[tuple[float, float]], *, time: float, sigma_rel: float
) -> NDArray[np.float64]:
    """How much of each snapshot (time, sigma_rel) makes the average of length `sigma_rel` at `time`.

    Times are images or steps, above 0. The weights sum to 1.
    """
    times = np.array([taken for taken, _ in snapshots]) / time
    gammas = np.array([gamma_of(sigma) for _, sigma in snapshots])
    wanted_time, wanted_gamma = np.array([1.0]), np.array([gamma_of(sigma_rel)])
    products = _inner_products(times, gammas, times, gammas)  # (n, n)
    wanted = _inner_products(times, gammas, wanted_time, wanted_gamma)[:, 0]  # (n,)
    # The best fit among those whose profile has the wanted one's sum, 1.
    size = len(snapshots)
    system = np.ones((size + 1, size + 1))
    system[:size, :size], system[size, size] = products, 0.0
    solution = np.linalg.lstsq(system, np.append(wanted, 1.0), rcond=None)[0]
    return np.asarray(solution[:size])


def _inner_products(
    times_a: NDArray[np.float64],
    gammas_a: NDArray[np.float64],
    times_b: NDArray[np.float64],
    gammas_b: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Integrals of the products of profiles (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t], (a, b).

    (gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1) / max(t) times (min(t) / max(t))^gamma of the later.
    """
    t_a, t_b = times_a[:, None], times_b[None]
    g_a, g_b = gammas_a[:, None], gammas_b[None]
    ratio = np.minimum(t_a, t_b) / np.maximum(t_a, t_b)
    later = np.where(t_a > t_b, g_a, g_b)
    return (g_a + 1) * (g_b + 1) / (g_a + g_b + 1) / np.maximum(t_a, t_b) * ratio**later
