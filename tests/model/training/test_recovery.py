"""If this fails, a run on several processes learns something else than on one, or a killed one loses work.

One straight run of one process is what all others are held against: those of two ranks, by ddp and by fsdp,
those that were preempted or killed and went on, and those that went on on another number of ranks.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader

from model.autoencoder import Autoencoder
from model.training.config import TrainConfig
from model.training.run import train
from model.training.states import FACTS_FILE, load_tensors, read_state, state_folders
from service.benchmark.server import free_port
from tests.latents_cache import save_latents
from tests.model.training.runs import outcome, replays, start_runs

KINDS = ("network", "ema", "ema-0.1", "exp_avg", "exp_avg_sq")
# Relative: of the log, and RMS of all that a state holds of a kind. Sums over the batch in another order.
TOLERANCES = dict.fromkeys(("log", *KINDS), 1e-4)
# On CUDA the network runs in bf16, and rounds micro-batches differently, by 0.003 of moments. An average that
# is never moved is 0.006 away, one whose gradients are halved 0.1.
BF16_TOLERANCES = {
    "log": 1e-2,
    "network": 1e-3,
    "ema": 1e-3,
    "ema-0.1": 1e-3,
    "exp_avg": 2e-2,
    "exp_avg_sq": 2e-2,
}
NUM_IMAGES, BATCH = 64, 8


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As the processes of `start_runs` have: on the number of threads the order of sums depends."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of 8 steps on a latents cache of 20 images: three epochs and a bit."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(folder / "vae")
    weights_hash = Autoencoder.load(folder / "vae").weights_hash
    save_latents(folder / "latents", (9, 11), side=8, autoencoder=weights_hash)
    return {
        "name": "tiny",
        "output_dir": str(folder / "straight"),
        "data": str(folder / "latents"),
        "autoencoder": str(folder / "vae"),
        "resolution": 16,
        "network": {
            "layout": "isotropic",  # the fewest parameters, each a record of every state
            "hidden_size": 8,
            "num_heads": 2,
            "depths": [2],
            "bottleneck_depth": 0,
        },
        "num_images": NUM_IMAGES,
        "batch_size": BATCH,
        "learning_rate": 1e-3,
        "max_grad_norm": 1.0,
        "ema_tracks": [0.1],
        "ema_track_interval": 1,
        "log_every": 1,
        "keep_states": 9,
        "state_every_s": 1e-9,
        "tensorboard": False,
    }


@pytest.fixture(scope="module")
def straight(fields: dict[str, Any]) -> Path:
    train(TrainConfig.from_dict(fields), device="cpu")
    return Path(fields["output_dir"])


def losses(run: Path) -> list[list[float]]:
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [record["images"] for record in records] == [BATCH * (i + 1) for i in range(len(records))]
    return [[record[name] for name in ("loss", "mse", "vb", "grad_norm")] for record in records]


def tensors(run: Path, images_seen: int) -> dict[str, Tensor]:
    """All that a state holds, but for the sums of a log line that is not yet told."""
    state = read_state(run / "states" / f"state-{images_seen:012d}")
    assert state is not None
    entries = FileSystemReader(state.folder).read_metadata().state_dict_metadata
    filled = {name: torch.zeros(entry.size) for name, entry in entries.items() if name != "window"}
    load_tensors(state, filled)
    return filled


def assert_near(
    run: Path, straight: Path, images_seen: int, *, tolerances: Mapping[str, float] = TOLERANCES
) -> None:
    torch.testing.assert_close(
        torch.tensor(losses(run)),
        torch.tensor(losses(straight)[: images_seen // BATCH]),
        rtol=tolerances["log"],
        atol=1e-5,  # the log's last digit
    )
    given, expected = tensors(run, images_seen), tensors(straight, images_seen)
    assert given.keys() == expected.keys()
    for kind in KINDS:
        ours, theirs = (
            torch.cat([tensor.flatten() for name, tensor in state.items() if name.startswith(f"{kind}/")])
            for state in (given, expected)
        )
        assert float((ours - theirs).norm() / theirs.norm()) < tolerances[kind], kind


def assert_same(run: Path, straight: Path, images_seen: int = NUM_IMAGES) -> None:
    assert losses(run) == losses(straight)[: images_seen // BATCH]
    given, expected = tensors(run, images_seen), tensors(straight, images_seen)
    assert all(torch.equal(given[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def two_ranks(fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs of two ranks, one after the other in the same two processes."""
    folder = tmp_path_factory.mktemp("two-ranks")

    def entry(run: str, *, trouble: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        config = fields | {"output_dir": str(folder / run)} | changes
        return {"config": config, "port": free_port()} | (trouble or {})

    ddp = {"parallel": "ddp", "micro_batch_size": 2, "num_images": 40, "state_every_s": 60}
    start_runs(
        folder,
        [
            entry("ddp", **ddp),
            entry("fsdp", **ddp | {"parallel": "fsdp", "activation_checkpointing": True}),
            entry("preempted", trouble={"signal": [1, 16]}, **ddp),
            entry("preempted", **ddp, async_save=True),
            entry("ddp", parallel="fsdp", num_images=48),
            entry("lost", trouble={"fault": [1, 16]}, **ddp),
        ],
        world_size=2,
    )
    return folder


def test_two_ranks_learn_what_one_process_does(two_ranks: Path, straight: Path) -> None:
    for rank in range(2):
        assert outcome(two_ranks, 0, rank) == str(two_ranks / "ddp" / "model")
        assert outcome(two_ranks, 1, rank) == str(two_ranks / "fsdp" / "model")
    assert_near(two_ranks / "fsdp", straight, 40)
    facts = json.loads((two_ranks / "fsdp" / "states" / "state-000000000040" / FACTS_FILE).read_text())
    assert facts["world_size"] == 2
    assert len(facts["files"]) == 2  # each rank wrote its part


def test_a_signal_to_one_rank_stops_both_at_the_same_step(two_ranks: Path) -> None:
    for rank in range(2):
        assert outcome(two_ranks, 2, rank) == "SystemExit: 138"


def test_two_ranks_resume_to_the_bit(two_ranks: Path) -> None:
    for rank in range(2):
        assert outcome(two_ranks, 3, rank) == str(two_ranks / "preempted" / "model")
    assert losses(two_ranks / "preempted") == losses(two_ranks / "ddp")[:5]
    given, expected = (tensors(two_ranks / run, 40) for run in ("preempted", "ddp"))
    assert all(torch.equal(given[name], expected[name]) for name in expected)


def test_a_ddp_run_goes_on_under_fsdp(two_ranks: Path, straight: Path) -> None:
    assert outcome(two_ranks, 4, 0) == str(two_ranks / "ddp" / "model")
    assert_near(two_ranks / "ddp", straight, 48)


def test_a_run_of_two_ranks_goes_on_on_one(two_ranks: Path, straight: Path, fields: dict[str, Any]) -> None:
    config = TrainConfig.from_dict(fields | {"output_dir": str(two_ranks / "fsdp")})
    assert train(config, device="cpu") is not None
    assert_near(two_ranks / "fsdp", straight, NUM_IMAGES)


def test_a_lost_rank_ends_the_others_with_a_line(two_ranks: Path) -> None:
    assert outcome(two_ranks, 5, 1) == "RuntimeError: a fault"
    assert outcome(two_ranks, 5, 0).startswith(
        "RankLost: rank 0 of 2: another rank is gone, or was silent for"
    )


@pytest.mark.parametrize(
    ("kill", "images", "changes"),
    [("step", 32, {}), ("save", 32, {"async_save": True})],
    ids=["mid-epoch", "mid-save"],
)
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    fields: dict[str, Any], straight: Path, tmp_path: Path, kill: str, images: int, changes: dict[str, Any]
) -> None:
    config = fields | {"output_dir": str(tmp_path / "killed")} | changes
    assert start_runs(tmp_path, [{"config": config, "kill": kill, "images": images}], world_size=1) == [-9]
    newest = state_folders(tmp_path / "killed" / "states")[0]
    assert newest.name == "state-000000000024"
    assert train(TrainConfig.from_dict(config), device="cpu") is not None
    assert_same(tmp_path / "killed", straight)
    assert not list((tmp_path / "killed" / "states").glob(".*"))


def test_a_truncated_newest_state_falls_back(
    fields: dict[str, Any], straight: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = TrainConfig.from_dict(fields | {"output_dir": str(tmp_path / "cut"), "num_images": 24})
    train(config, device="cpu")
    newest = tmp_path / "cut" / "states" / "state-000000000024"
    (file,) = newest.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-100])
    with caplog.at_level(logging.INFO):
        train(config, device="cpu")
    assert f"{newest}: damaged, now state-000000000024.damaged; falling back" in caplog.text
    assert f"resuming from {newest.with_name('state-000000000016')}" in caplog.text
    assert_same(tmp_path / "cut", straight, 24)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices_learn_what_one_does(fields: dict[str, Any], tmp_path: Path) -> None:
    """By ddp and by fsdp, whose messages are in the step's graph, with what comes between the steps: states,
    snapshots, pictures; also a run that was preempted and went on.
    """

    def entry(run: str, **changes: Any) -> dict[str, Any]:
        trouble = {name: changes.pop(name) for name in ("signal", "message") if name in changes}
        config = (
            fields | {"output_dir": str(tmp_path / run), "state_every_s": 60, "compile": "none"} | changes
        )
        return {"config": config, "port": free_port()} | trouble

    start_runs(tmp_path / "one", [entry("straight")], world_size=1, device="cuda")
    assert outcome(tmp_path / "one", 0, 0) == str(tmp_path / "straight" / "model")
    between = {"state_every_s": 1e-9, "snapshot_every": 16, "sample_every": 32}
    fsdp = {"parallel": "fsdp", "micro_batch_size": 2, "message": 2000}
    runs = [
        entry("ddp", parallel="ddp", message=2000),
        entry("fsdp", **fsdp | between),
        entry("compiled", **fsdp | {"compile": "block", "activation_checkpointing": True}),
        entry("preempted", signal=[1, 16], **fsdp),
        entry("preempted", async_save=True, **fsdp),
        entry("called", cuda_graph=False, **fsdp),
    ]
    start_runs(tmp_path / "two", runs, world_size=2, device="cuda", limit_s=400.0)
    steps = NUM_IMAGES // BATCH
    launches = [2 * steps + 1, steps, steps, 2, steps - 2, 0]  # ddp: two a step, and one to see its gradients
    for rank in range(2):
        ends = [outcome(tmp_path / "two", number, rank) for number in range(len(runs))]
        names = ("ddp", "fsdp", "compiled", None, "preempted", "called")
        assert ends == [str(tmp_path / name / "model") if name else "SystemExit: 138" for name in names]
        assert [replays(tmp_path / "two", number, rank) for number in range(len(runs))] == launches
    for name in ("ddp", "fsdp", "compiled", "preempted", "called"):
        assert_near(tmp_path / name, tmp_path / "straight", NUM_IMAGES, tolerances=BF16_TOLERANCES)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_device_alone_in_a_message_is_given_up(
    fields: dict[str, Any], tmp_path: Path, parallel: str
) -> None:
    """Rank 0 has launched a step whose messages rank 1 never sends."""
    config = fields | {"output_dir": str(tmp_path / "lost"), "parallel": parallel, "compile": "none"}
    config |= {"state_every_s": 60, "log_every": 100, "rank_timeout_s": 20.0}
    run = {"config": config, "port": free_port(), "fault": [1, 16]}
    start_runs(tmp_path, [run], world_size=2, device="cuda", limit_s=90.0)
    assert outcome(tmp_path, 0, 1) == "RuntimeError: a fault"
    assert outcome(tmp_path, 0, 0).startswith(
        "RankLost: rank 0 of 2: another rank is gone, or was silent for"
    )
