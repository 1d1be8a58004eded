"""`lamamba bench` on a CPU with tiny networks: if this fails, a long run on a GPU ends without results."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from model.benchmark import forward, plot
from model.cli import app
from model.network.scan import ScanBackend, resolve_scan_backend

MODEL = ("model", "--device", "cpu", "--preset", "tiny", "--repeats", "2")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bench(*arguments: str) -> tuple[int, str]:
    """Exit code and output."""
    result = CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def results(folder: Path, name: str = "model-cpu") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return content


def test_a_run_writes_every_variant_with_its_times_or_its_reason(tmp_path: Path) -> None:
    options = ("--backends", "triton,vectorized,reference", "--variants", "*eager,*eager+graph")
    code, output = bench(
        *(*MODEL, "--shapes", "1x8,2x8", *options, "--output-dir", str(tmp_path)),
        *("--profile", "vectorized/eager"),
    )
    assert code == 0, output
    content = results(tmp_path)
    facts = content["environment"]
    assert {"date", "command", "commit", "packages", "compile_cache"} <= facts.keys()
    assert facts["ceilings"]["matmul_tflops"] > 0
    rows = content["results"]
    assert {(row["scope"], row["rows"], row["side"]) for row in rows} == {
        (scope, *shape) for scope in ("forward", "scan") for shape in ((1, 8), (2, 8))
    }
    timed = {
        (row["provider"], row["variant"])
        for row in rows
        if (row["scope"], row["rows"]) == ("forward", 2) and "ms" in row
    }
    assert timed == {
        ("lamamba", "vectorized/eager"),
        ("lamamba", "reference/eager"),
        ("dit-tiny-2", "eager"),
        ("dit-tiny-2", "one-embedding/eager"),
    }
    row = next(row for row in rows if row["variant"] == "reference/eager")
    assert row["ms_p20"] <= row["ms"] <= row["ms_p80"]
    assert row["numerics"] == "fp32"
    assert 0 < row["relative_rms"] < 1e-4
    assert row["ms_per_row"] == pytest.approx(row["ms"] / row["rows"], abs=1e-4)
    reasons = {row["variant"]: row["skipped"] for row in rows if "skipped" in row}
    assert reasons["vectorized/eager+graph"] == "a CUDA graph needs a CUDA device"
    assert "triton" in reasons["triton/eager"]
    assert "mamba-ssm" in reasons["selective_scan_fn"]
    scans = [row for row in rows if (row["scope"], row["variant"], row["rows"]) == ("scan", "vectorized", 2)]
    assert [(row["length"], row["d_inner"]) for row in scans] == [(64, 16), (16, 32), (4, 64)]
    assert [entry["rows"] for entry in content["summary"]["comparison"]] == [1, 2]
    profile = results(tmp_path, "model-cpu-profile-vectorized-eager-1x8")
    assert sum(kernel["share"] for kernel in profile["kernels"]) == pytest.approx(1, abs=0.05)
    assert "reference/eager" in output


def test_time_that_is_over_leaves_shapes_as_not_run(tmp_path: Path) -> None:
    options = ("--scopes", "forward", "--backends", "vectorized", "--variants", "*/eager,eager")
    code, output = bench(
        *MODEL, "--shapes", "1x8,2x8", *options, "--max-seconds", "1e-9", "--output-dir", str(tmp_path)
    )
    assert code == 0, output
    rows = results(tmp_path)["results"]
    assert len(rows) == 6
    assert all(row["skipped"].startswith("not run") for row in rows)


def wrong_scan(factor: float) -> ScanBackend:
    """The vectorized scan with its tokens in the wrong order, times `factor`."""
    scan = resolve_scan_backend("vectorized").selective_scan

    def selective_scan(*arguments: Tensor) -> Tensor:
        return factor * scan(*arguments).flip(1)

    return ScanBackend("vectorized", selective_scan)


@pytest.mark.parametrize("factor", [1.0, math.nan], ids=["wrong", "nan"])
def test_variants_that_disagree_fail_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    def resolve(name: str, device: object) -> ScanBackend:
        return wrong_scan(factor) if name == "vectorized" else resolve_scan_backend(name)

    monkeypatch.setattr(forward, "resolve_scan_backend", resolve)
    options = ("--scopes", "forward", "--backends", "reference,vectorized", "--variants", "*/eager")
    code, output = bench(*MODEL, "--shapes", "1x8", *options, "--output-dir", str(tmp_path))
    assert code == 1
    assert "differs from" in output
    assert not (tmp_path / "model-cpu.json").exists()


def test_a_variant_that_fails_is_a_row_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class TooLarge(Exception):
        """Not a RuntimeError, as Triton's errors are not."""

    def resolve(name: str, device: object) -> ScanBackend:
        if name == "triton":
            raise TooLarge("out of resources")
        return resolve_scan_backend(name)

    monkeypatch.setattr(forward, "resolve_scan_backend", resolve)
    options = ("--scopes", "forward", "--backends", "triton,vectorized", "--variants", "*/eager*")
    code, output = bench(
        *MODEL, "--shapes", "1x8", "--providers", "lamamba", *options, "--output-dir", str(tmp_path)
    )
    assert code == 0, output
    outcomes = {row["variant"]: row.get("skipped") for row in results(tmp_path)["results"]}
    assert outcomes == {
        "triton/eager": "out of resources",
        "triton/eager+graph": "out of resources",
        "vectorized/eager": None,
        "vectorized/eager+graph": "a CUDA graph needs a CUDA device",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model", "--shapes", "32"), "shapes: '32' given"),
        (("model", "--shapes", "1x30"), "sample_size: 30 given"),
        (("model", "--preset", "M"), "preset: 'M' given"),
        (("model", "--variants", "fast"), "variants: 'fast' given"),
        (("model", "--device", "tpu"), "device: 'tpu' given"),
        (("model", "--max-seconds", "-1"), "max_seconds: -1 given"),
        (("images", "--device", "cpu", "--steps", "5000"), "num_inference_steps: 5000 given"),
        (("images", "--device", "cpu", "--scan-backend", "fast"), "scan_backend: 'fast' given"),
        (("images", "--device", "cpu", "--level", "fast"), "level: 'fast' given"),
        (("report", "nowhere.json"), "file: nowhere.json given"),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, tuple) else "",
)
def test_bad_arguments_are_one_line_and_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    code, output = bench(*arguments)
    assert code == 2, output
    assert message in output
    assert output.startswith("lamamba: ")
    assert output.count("\n") == 1


def test_report_joins_files(tmp_path: Path) -> None:
    for side in (8, 16):
        code, output = bench(
            *(*MODEL, "--scopes", "forward", "--backends", "vectorized", "--variants", "*/eager,eager"),
            *("--shapes", f"1x{side}", "--output-dir", str(tmp_path), "--name", f"part-{side}"),
        )
        assert code == 0, output
    parts = [str(tmp_path / f"part-{side}.json") for side in (8, 16)]
    code, output = bench("report", *parts)
    assert code == 2
    assert "out: none given for 2 files" in output
    code, output = bench("report", *parts, "--out", str(tmp_path / "joined.json"))
    assert code == 0, output
    content = results(tmp_path, "joined")
    assert {(row["side"], row["run"]) for row in content["results"]} == {(8, 0), (16, 1)}
    assert {fit["provider"] for fit in content["summary"]["fits"]} == {"lamamba", "dit"}
    assert "grows as L^" in output


def test_the_plot_is_drawn_from_the_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {"provider": provider, "preset": "XL", "variant": "eager", "scope": "forward", "numerics": "bf16"}
        | {"rows": rows, "side": side, "ms": 1e-3 * side**2 * rows, "gmacs_per_row": 1.0}
        for provider in ("lamamba", "dit-xl-2")
        for rows in (1, 8)
        for side in (32, 64)
    ]
    path = plot.plot_forwards({"environment": {"cpu": "x"}, "results": rows}, tmp_path / "plot.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_images_of_both_networks(tmp_path: Path) -> None:
    arguments = ("--device", "cpu", "--preset", "tiny", "--shapes", "2x8", "--steps", "3", "--repeats", "1")
    code, output = bench("images", *arguments, "--output-dir", str(tmp_path))
    assert code == 0, output
    rows = results(tmp_path, "images-cpu")["results"]
    assert [(row["provider"], row["variant"]) for row in rows] == [
        ("lamamba", "vectorized/eager"),
        ("dit-tiny-2", "one-embedding/eager"),
    ]
    for row in rows:
        assert row["resolution"] == 64
        assert row["rows"] == 4
        assert row["finite"]
        total = row["denoise_s"] + row["decode_s"]
        assert row["images_per_s"] == pytest.approx(2 / total, rel=0.05)
