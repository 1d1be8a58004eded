"""If this fails, a run on several processes ends without a word, or waits for one that is gone."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from model.training.world import RankLost, World
from service.benchmark.server import free_port


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that it gives to the only process of a run."""
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (variables | {"MASTER_PORT": str(free_port())}).items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("torchrun")
def test_a_lost_rank_is_told_before_the_group_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Which may block."""
    told: list[str] = []
    end = dist.destroy_process_group

    def ended() -> None:
        told.append(caplog.text)
        end()

    monkeypatch.setattr(dist, "destroy_process_group", ended)
    with pytest.raises(RankLost), World.joined("ddp", device="cpu"):
        raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
    (text,) = told
    assert "rank 0 of 1: another rank is gone, or was silent for 600 s" in text
