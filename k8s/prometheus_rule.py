"""Writes Prometheus' rules as a PrometheusRule, for Prometheus Operator: `make rules`.

The rules stay as they are written, comments included; only their place in the file is another.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

RULES = Path(__file__).parents[1] / "docker" / "prometheus" / "lamamba.rules.yml"
HEADER = """\
# Written by `make rules` from docker/prometheus/lamamba.rules.yml.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: lamamba
spec:
"""


def main() -> None:
    """Write the PrometheusRule to the path that is the first argument."""
    Path(sys.argv[1]).write_text(HEADER + textwrap.indent(RULES.read_text(), "  "))


if __name__ == "__main__":
    main()
