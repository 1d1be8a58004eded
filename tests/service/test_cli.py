"""The `lamamba` command: if this fails, users meet traces instead of one line, or wait for imports they do
not need.

`serve` and `sample` run here on a tiny model folder with random weights, as an installed command would.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from model.images import read_metadata
from model.pipeline import LaMambaPipeline
from service.cli import app
from tests.tiny_model import save_tiny_model

TIMEOUT_S = 180.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def run(*arguments: str) -> tuple[int, str]:
    """Exit code and output of a command, in this process."""
    threads, root = torch.get_num_threads(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    result = CliRunner().invoke(app, [*arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})
    torch.set_num_threads(threads)
    root.handlers[:] = handlers
    root.setLevel(level)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def sample(folder: Path, out: Path, *arguments: str) -> tuple[int, str]:
    return run(
        "sample", "--model", str(folder), "--device", "cpu", "--out", str(out), "--steps", "2", *arguments
    )


def test_help_and_version_load_neither_torch_nor_the_server() -> None:
    code = (
        "import sys\n"
        "from service.cli import app\n"
        "from typer.testing import CliRunner\n"
        "for arguments in (['--help'], ['--version'], ['serve', '--help'], ['sample', '--help'], "
        "['bench', 'model', '--help'], ['bench', 'serve', '--help'], ['bench', 'batching', '--help']):\n"
        "    assert CliRunner().invoke(app, arguments).exit_code == 0, arguments\n"
        "print(sorted({'torch', 'diffusers', 'fastapi', 'uvicorn', 'numpy'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_version_and_commands() -> None:
    code, output = run("--version")
    assert code == 0
    assert re.fullmatch(r"lamamba \d+\.\d+\.\d+\n", output)
    code, output = run("--help")
    assert code == 0
    for command in ("serve", "sample", "train", "info", "bench"):
        assert command in output


def test_sample_writes_one_picture_that_says_how_it_was_made(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "one.png"
    guidance = ["--cfg-scale", "3", "--guidance-interval", "0", "600"]
    code, output = sample(folder, out, "--class", "Blue House", "--seed", "7", *guidance)
    assert code == 0, output
    assert "1 of tiny, seed 7" in output
    metadata = read_metadata(out.read_bytes())
    assert (metadata["class"], metadata["seed"], metadata["cfg"], metadata["steps"]) == (
        "blue house",
        "7",
        "3",
        "2",
    )
    assert metadata["cfg_interval"] == "0-600"
    assert (metadata["sampler"], len(metadata["weights"])) == ("dpm++", 12)
    pipeline = LaMambaPipeline.load(folder, device="cpu")
    expected = pipeline.generate(
        [1], seeds=[7], guidance_scale=3.0, guidance_interval=(0, 600), num_inference_steps=2
    )[0].numpy()
    with Image.open(out) as image:
        np.testing.assert_array_equal(np.asarray(image), expected)


def test_sample_writes_a_grid_of_all_classes_in_turn(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid.webp"
    code, output = sample(folder, out, "--num", "5", "--columns", "3", "--batch-size", "2")
    assert code == 0, output
    with Image.open(out) as image:
        assert image.size == (48, 32)


def test_sample_writes_a_folder_of_images_each_the_same_alone(folder: Path, tmp_path: Path) -> None:
    code, output = sample(folder, tmp_path / "many", "--num", "3", "--seed", "4", "--batch-size", "2")
    assert code == 0, output
    files = sorted((tmp_path / "many").iterdir())
    assert [file.name for file in files] == ["00000.png", "00001.png", "00002.png"]
    assert [read_metadata(file.read_bytes())["image_index"] for file in files] == ["0", "1", "2"]
    pipeline = LaMambaPipeline.load(folder, device="cpu")
    alone = pipeline.generate([2], seeds=[4], image_indices=[2], num_inference_steps=2)[0].numpy()
    with Image.open(files[2]) as image:
        assert np.abs(np.asarray(image).astype(int) - alone.astype(int)).max() <= 1


def test_sample_writes_an_array(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples.npz"
    code, output = sample(folder, out, "--num", "4", "--seed", "1", "--sampler", "ddpm")
    assert code == 0, output
    with np.load(out) as arrays:
        assert arrays["arr_0"].shape == (4, 16, 16, 3)
        assert arrays["arr_0"].dtype == np.uint8
        assert arrays["class_labels"].tolist() == [0, 1, 2, 0]
        assert arrays["seeds"].tolist() == [1] * 4
        assert arrays["image_indices"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--class", "blue hose"], "'blue house'", id="class"),
        pytest.param(["--class", "3"], "class_id: 3 given; this model accepts 0 to 2", id="class-id"),
        pytest.param(["--cfg-scale", "0.5"], "cfg_scale: 0.5 given; 1 to 20 is accepted", id="cfg"),
        pytest.param(["--cfg-scale", "nan"], "cfg_scale: nan given", id="cfg-nan"),
        pytest.param(
            ["--guidance-interval", "9", "8"],
            "guidance_interval: 9 to 8 given; timesteps from 0 to 999, the lower one first",
            id="interval",
        ),
        pytest.param(["--steps", "5000"], "steps: 5000 given; tiny accepts 1 to 1000", id="steps"),
        pytest.param(
            ["--sampler", "euler"], "sampler: euler given; accepted are ddpm, ddim, dpm++", id="sampler"
        ),
        pytest.param(["--num", "0"], "num: 0 given", id="num"),
        pytest.param(["--columns", "0"], "columns: 0 given", id="columns"),
        pytest.param(["--seed", "-1"], "seed: -1 given", id="seed"),
        pytest.param(["--resolution", "512"], "resolution: 512 given; tiny makes 16", id="resolution"),
        pytest.param(["--out", "x.gif"], "out: x.gif given; .png", id="suffix"),
        pytest.param(["--model", "./nowhere"], "./nowhere: no such model folder", id="model"),
        pytest.param(["--device", "tpu9"], "device: 'tpu9' given; cpu, cuda or cuda:N", id="device"),
        pytest.param(["--device", "cuda:99"], "device: 'cuda:99' given; this machine offers cpu", id="cuda"),
    ],
)
def test_sample_refuses_bad_input_in_one_line(
    folder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, output = sample(folder, tmp_path / "out.png", *arguments)
    assert code == 2, output
    assert message in output
    assert output.count("\n") == 1
    assert output.startswith("lamamba: ")


def test_serve_answers_a_picture_and_ends_with_0_on_sigterm(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "service.cli", "serve", "--models", str(folder), "--port", "0", "--log-json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stderr is not None
        records = (json.loads(line) for line in process.stderr)
        port = next(
            found.group(1)
            for record in records
            if (found := re.search(r"listening on http://127\.0\.0\.1:(\d+)", record["message"]))
        )
        ready = next(
            record for record in records if record["message"].startswith(("ready after", "cannot start"))
        )
        assert ready["message"].startswith("ready after"), ready
        answer = httpx.post(
            f"http://127.0.0.1:{port}/generate",
            json={"class_id": "green hill", "steps": 2, "seed": 3},
            headers={"Accept": "image/png"},
            timeout=TIMEOUT_S,
        )
        assert answer.status_code == 200, answer.text
        with Image.open(io.BytesIO(answer.content)) as image:
            made = np.asarray(image).astype(int)
        pipeline = LaMambaPipeline.load(folder, device="cpu")
        expected = pipeline.generate([2], seeds=[3], num_inference_steps=2)[0].numpy().astype(int)
        assert np.abs(made - expected).max() <= 1
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


def corrupt(folder: Path, root: Path) -> Path:
    """A copy of the folder whose weights are cut in half."""
    copy = root / "cut"
    for file in folder.rglob("*"):
        if file.is_file():
            (copy / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            content = file.read_bytes()
            cut = file.parent.name == "transformer" and file.suffix == ".safetensors"
            (copy / file.relative_to(folder)).write_bytes(content[: len(content) // 2] if cut else content)
    return copy


@pytest.mark.parametrize("option", ["--models", "--model-repository"])
def test_serve_stops_with_one_line_and_2_on_corrupt_weights(
    folder: Path, tmp_path: Path, option: str
) -> None:
    cut = corrupt(folder, tmp_path)
    given = cut if option == "--models" else tmp_path
    code, output = run("serve", option, str(given), "--port", "0", "--log-level", "error")
    assert code == 2
    line = (
        f"lamamba: {cut}/transformer: the network cannot be loaded: diffusion_pytorch_model.safetensors is "
    )
    assert output.startswith(line)
    assert "header" in output
    assert output.count("\n") == 1


def test_serve_stops_with_one_line_and_2_on_a_taken_port(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, output = run("serve", "--models", str(folder), "--port", str(taken.getsockname()[1]))
    assert code == 2
    assert output.startswith("lamamba: port: cannot listen on 127.0.0.1:")
    assert output.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "variable", "message"),
    [
        pytest.param(["--port", "99999"], {}, "lamamba: port: 99999 given", id="option"),
        pytest.param(["--batch-size", "4"], {}, "batch_size: 4 given; batching is continuous", id="unused"),
        pytest.param(
            [], {"LAMAMBA_BATCH_WAIT_MS": "5"}, 'LAMAMBA_BATCH_WAIT_MS: "5" given', id="unused-variable"
        ),
        pytest.param([], {"LAMAMBA_MAX_ROW": "4"}, "LAMAMBA_MAX_ROW: no such setting", id="unknown-variable"),
        pytest.param([], {"LAMAMBA_DTYPE": "int4"}, 'LAMAMBA_DTYPE: "int4" given', id="wrong-variable"),
    ],
)
def test_serve_refuses_wrong_settings_in_one_line(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], variable: dict[str, str], message: str
) -> None:
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    code, output = run("serve", *arguments)
    assert code == 2
    assert message in output
    assert output.count("\n") == 1
