"""What a request for images may ask of any model, by HTTP or on the command line; its folder gives the
other limits.

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

__all__ = ["DEFAULT_STEPS", "GUIDANCE_SCALE_RANGE", "MAX_IMAGE_INDEX", "MAX_PREVIEWS", "MAX_SEED"]

GUIDANCE_SCALE_RANGE: Final = (1.0, 20.0)
"""Least (no guidance) and greatest scale."""

DEFAULT_STEPS: Final[Mapping[str, int]] = {"ddpm": 250, "ddim": 50, "dpm++": 20}
"""Denoising steps by sampler, where none are given."""

MAX_SEED: Final = 2**63 - 1
MAX_IMAGE_INDEX: Final = 2**31 - 1
MAX_PREVIEWS: Final = 50
"""Previews of each image of a request."""
