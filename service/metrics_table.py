"""docs/metrics.md from the Metrics class: `make docs` writes it, a test keeps the two equal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from service.metrics import Metrics

if TYPE_CHECKING:
    from service.metrics import MetricDefinition

__all__ = ["metrics_page"]

_HEAD: Final = """# Metrics

Written by `make docs` from `service/metrics.py`. `GET /metrics` answers in Prometheus' text format, under
vLLM's names with the prefix `lamamba_` where vLLM has such a metric. Times are in seconds. The samples of a
histogram have `_bucket`, `_sum` or `_count` after its name. Values of labels come from fixed sets and from
the operator, so that no client adds any. A scrape also has the `_created` time of each counter and histogram.

| name | type | labels | |
|---|---|---|---|
"""


def metrics_page() -> str:
    """The page, in Markdown."""
    return _HEAD + "".join(_row(definition) for definition in Metrics().definitions)


def _row(definition: MetricDefinition) -> str:
    labels = ", ".join(f"`{label}`" for label in definition.labels)
    cells = (f"`{definition.name}`", definition.kind, labels, definition.text.replace("|", "\\|"))
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(metrics_page(), encoding="utf-8")
