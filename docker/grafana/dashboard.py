"""Grafana's dashboard of the service, written from code: `make dashboard` makes dashboards/lamamba.json.

Every expression is of metrics that service/metrics.py exports, or of what prometheus/lamamba.rules.yml
records of them; the row of runbooks is made from the alerts there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from string import ascii_uppercase
from typing import Final

import yaml
from grafana_foundation_sdk.builders import dashboard, heatmap, prometheus, stat, text, timeseries
from grafana_foundation_sdk.builders.common import ReduceDataOptions, StackingConfig, VizLegendOptions
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, StackingMode
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef, VariableRefresh
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from grafana_foundation_sdk.models.text import TextMode

from service.metrics import STAGES

_RULES: Final = Path(__file__).parents[1] / "prometheus" / "lamamba.rules.yml"
_SOURCE: Final = DataSourceRef(type_val="prometheus", uid="${datasource}")
_WIDTH: Final = 24  # of a row, in Grafana's grid
_HEIGHT: Final = 8

_HERE: Final = '{job="$job", instance=~"$instance"}'
_RATE: Final = f"{_HERE}[$__rate_interval]"
_Panel = timeseries.Panel | heatmap.Panel | stat.Panel | text.Panel


def service_dashboard() -> str:
    """The dashboard as Grafana's JSON."""
    board = (
        dashboard.Dashboard("LaMamba")
        .uid("lamamba")
        .description("Traffic, latency, queue, batches, GPUs and errors of LaMamba's servers.")
        .tags(["lamamba"])
        .readonly()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("30s")
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_variable("job", "label_values(lamamba_build_info, job)"))
        .with_variable(
            _variable("instance", 'label_values(lamamba_build_info{job="$job"}, instance)')
            .multi(True)
            .include_all(True)
            .all_value(".*")
        )
        .with_variable(
            dashboard.TextBoxVariable("runbooks").label("Runbooks").default_value("docs/operations.md")
        )
    )
    ids = count(1)
    for title, panels in _rows():
        board = board.with_row(dashboard.Row(title).id(next(ids)))
        for panel in panels:
            board = board.with_panel(panel.id(next(ids)).span(_WIDTH // len(panels)).height(_HEIGHT))
    return JSONEncoder(sort_keys=True, indent=2).encode(board.build()) + "\n"


def _rows() -> Iterator[tuple[str, Sequence[_Panel]]]:
    yield "Now", _numbers()
    yield (
        "Traffic",
        (
            _lines(
                "Requests",
                "reqps",
                ("{{route}} {{status}}", f"sum by (route, status) (rate(lamamba_requests_total{_RATE}))"),
            ).stacking(StackingConfig().mode(StackingMode.NORMAL)),
            _lines("Images", "short", ("images/s", f"sum(rate(lamamba_images_total{_RATE}))")).description(
                "Images finished a second."
            ),
            _lines(
                "Requests by their end",
                "reqps",
                (
                    "{{finished_reason}}",
                    f"sum by (finished_reason) (rate(lamamba_request_success_total{_RATE}))",
                ),
            ),
        ),
    )
    yield "Latency of each stage", [_heatmap(stage) for stage in STAGES]
    yield (
        "Latency",
        (
            _quantiles("Request, from arrival to answer", "lamamba_e2e_request_latency_seconds"),
            _quantiles("Wait for the first step", "lamamba_request_queue_time_seconds"),
            _quantiles("Wait for the first preview", "lamamba_time_to_first_preview_seconds"),
        ),
    )
    yield (
        "Queue",
        (
            _lines(
                "Requests",
                "short",
                ("waiting", f"sum(lamamba_num_requests_waiting{_HERE})"),
                ("running", f"sum(lamamba_num_requests_running{_HERE})"),
            ),
            _lines(
                "Images",
                "short",
                ("waiting", f"sum(lamamba_queue_images{_HERE})"),
                ("in slots", f"sum(lamamba_active_slots{_HERE})"),
            ),
            _lines(
                "Estimated wait", "s", ("wait", 'job:lamamba_queue_wait_seconds:estimate{job="$job"}')
            ).description(
                "Images that wait, over the images that were finished a second: LaMambaSaturated looks at it."
            ),
        ),
    )
    yield (
        "Batches",
        (
            _lines(
                "Occupancy and padding",
                "percentunit",
                ("occupancy", _mean("lamamba_batch_occupancy")),
                (
                    "padding",
                    f"sum(rate(lamamba_padded_rows_total{_RATE})) / (sum(rate(lamamba_rows_total{_RATE}))"
                    f" + sum(rate(lamamba_padded_rows_total{_RATE})))",
                ),
            ).description(
                "Rows of a step as a share of max_rows, and the computed ones that are no image's."
            ),
            _lines(
                "Steps",
                "short",
                ("steps/s", f"sum(rate(lamamba_denoising_steps_total{_RATE}))"),
                ("rows a step", _mean("lamamba_step_rows")),
            ),
            _lines(
                "Time of a step, p95 by its rows",
                "s",
                (
                    "{{rows}} rows",
                    _quantile(0.95, "lamamba_step_latency_seconds", by="rows, le"),
                ),
            ),
        ),
    )
    yield (
        "GPUs",
        (
            _lines(
                "Memory",
                "bytes",
                ("{{instance}} {{device}} {{kind}}", f"lamamba_gpu_memory_bytes{_HERE}"),
            ).description("Allocated and reserved by the server, and total. Nothing where it runs on a CPU."),
            _lines(
                "Steps that ran out of memory",
                "short",
                (
                    "{{instance}} {{device}}",
                    f"sum by (instance, device) (increase(lamamba_out_of_memory_recoveries_total{_RATE}))",
                ),
            ).description("Each was taken again with fewer rows."),
            _lines(
                "Most rows of a step",
                "short",
                ("{{instance}} {{device}}", f"lamamba_row_limit{_HERE}"),
            ),
            _lines(
                "Images in slots by device",
                "short",
                ("{{instance}} {{device}}", f"lamamba_active_slots{_HERE}"),
            ),
        ),
    )
    yield (
        "Errors",
        (
            _lines(
                "Faults of the server",
                "reqps",
                ("{{code}}", f"sum by (code) (rate(lamamba_errors_total{_RATE}))"),
            ),
            _lines(
                "Turned away", "reqps", ("{{code}}", f"sum by (code) (rate(lamamba_rejections_total{_RATE}))")
            ),
            _lines(
                "Given up",
                "reqps",
                ("failed in {{stage}}", f"sum by (stage) (rate(lamamba_failures_total{_RATE}))"),
                ("too late in {{stage}}", f"sum by (stage) (rate(lamamba_deadline_exceeded_total{_RATE}))"),
                ("client left", f"sum(rate(lamamba_cancellations_total{_RATE}))"),
            ),
            _lines(
                "Budgets: how many times too fast",
                "short",
                ("errors, 5 min", 'job:lamamba_request_errors:ratio_rate5m{job="$job"} / 0.01'),
                ("errors, 1 h", 'job:lamamba_request_errors:ratio_rate1h{job="$job"} / 0.01'),
                ("latency, 5 min", 'job:lamamba_slow_requests:ratio_rate5m{job="$job"} / 0.05'),
                ("latency, 1 h", 'job:lamamba_slow_requests:ratio_rate1h{job="$job"} / 0.05'),
            ),
        ),
    )
    yield "Runbooks", [text.Panel().title("Alerts").mode(TextMode.MARKDOWN).content(_runbooks())]


def _numbers() -> list[_Panel]:
    return [
        _number("Servers", "short", f"sum(up{_HERE})"),
        _number("Models loaded", "short", f"sum(lamamba_model_loaded{_HERE})"),
        _number("Images a second", "short", f"sum(lamamba_images_per_second{_HERE})"),
        _number("Latency, p95", "s", _quantile(0.95, "lamamba_e2e_request_latency_seconds")),
        _number(
            "Failed requests, 5 min", "percentunit", 'job:lamamba_request_errors:ratio_rate5m{job="$job"}'
        ),
        _number("Alerts", "short", 'count(ALERTS{alertname=~"LaMamba.*", alertstate="firing"}) or vector(0)'),
    ]


def _runbooks() -> str:
    alerts = {
        rule["alert"]: rule
        for group in yaml.safe_load(_RULES.read_text(encoding="utf-8"))["groups"]
        for rule in group["rules"]
        if "alert" in rule
    }
    links = (
        f"[{name}](${{runbooks}}#{rule['annotations']['runbook'].split('#')[1]})"
        for name, rule in alerts.items()
    )
    return "What to do about " + " · ".join(links) + "\n"


def _variable(name: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(name.capitalize())
        .query(query)
        .datasource(_SOURCE)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
    )


def _mean(histogram: str) -> str:
    return f"sum(rate({histogram}_sum{_RATE})) / sum(rate({histogram}_count{_RATE}))"


def _quantile(share: float, histogram: str, *, by: str = "le") -> str:
    return f"histogram_quantile({share}, sum by ({by}) (rate({histogram}_bucket{_RATE})))"


def _lines(title: str, unit: str, *series: tuple[str, str]) -> timeseries.Panel:
    """A panel of lines over time; each series is a legend and an expression."""
    panel = (
        timeseries.Panel()
        .title(title)
        .unit(unit)
        .min(0)
        .fill_opacity(10)
        .datasource(_SOURCE)
        .legend(
            VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
        )
    )
    for letter, (legend, expression) in zip(ascii_uppercase, series, strict=False):
        query = prometheus.Dataquery().expr(expression).legend_format(legend).range()
        panel = panel.with_target(query.ref_id(letter))
    return panel


def _quantiles(title: str, histogram: str) -> timeseries.Panel:
    shares = (0.5, 0.95, 0.99)
    return _lines(title, "s", *((f"p{share * 100:g}", _quantile(share, histogram)) for share in shares))


def _heatmap(stage: str) -> heatmap.Panel:
    selected = f'{{job="$job", instance=~"$instance", stage="{stage}"}}[$__rate_interval]'
    return (
        heatmap.Panel()
        .title(stage.capitalize())
        .datasource(_SOURCE)
        .calculate(False)
        .color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges"))
        .y_axis(heatmap.YAxisConfig().unit("s"))
        .with_target(
            prometheus.Dataquery()
            .expr(f"sum by (le) (increase(lamamba_stage_latency_seconds_bucket{selected}))")
            .ref_id("A")
            .legend_format("{{le}}")
            .format(PromQueryFormat.HEATMAP)
            .range()
        )
    )


def _number(title: str, unit: str, expression: str) -> stat.Panel:
    return (
        stat.Panel()
        .title(title)
        .unit(unit)
        .datasource(_SOURCE)
        .reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
        .with_target(prometheus.Dataquery().ref_id("A").expr(expression).instant())
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(service_dashboard(), encoding="utf-8")
