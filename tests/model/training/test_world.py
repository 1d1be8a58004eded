"""If this fails, a run on several processes ends without a word, or waits for one that is gone."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from model.training.world import RankLost, World


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


class ThreadWorld(World):
    """A rank in a thread, whose messages are lost after half a second."""

    def largest_of_each(self, values: list[int]) -> list[int]:
        barrier, board = self.control
        board[self.rank] = values
        barrier.wait(0.5)
        largest = [max(column) for column in zip(*board, strict=True)]
        barrier.wait(0.5)
        return largest


@pytest.mark.parametrize("fails", [False, True], ids=["works", "fails"])
def test_others_wait_for_the_main_rank_longer_than_for_a_message(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    monkeypatch.setattr("model.training.world._ANSWER_EVERY_S", 0.05)
    control = threading.Barrier(2), [[0], [0]]
    order: list[int] = []

    def rank(number: int) -> None:
        world = ThreadWorld(device=torch.device("cpu"), rank=number, size=2, control=control)
        with world.main_rank_first():
            if number == 0:
                time.sleep(1.0)
            order.append(number)
            if fails and number == 0:
                raise ValueError("no places")
        world.barrier()

    with ThreadPoolExecutor(2) as pool:
        main, other = pool.submit(rank, 0), pool.submit(rank, 1)
    assert order == [0, 1]
    if fails:
        with pytest.raises(ValueError, match="no places"):
            main.result()
        with pytest.raises(threading.BrokenBarrierError):
            other.result()
    else:
        main.result()
        other.result()
