"""If this fails, a device that is not there is a traceback, or a machine's GPU is left idle."""

from __future__ import annotations

import pytest
import torch

from model.device import make_current, resolve_device


def offer(monkeypatch: pytest.MonkeyPatch, num_gpus: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)


@pytest.mark.parametrize(
    ("num_gpus", "name", "expected"),
    [
        (0, None, "cpu"),
        (2, None, "cuda"),
        (2, "cpu", "cpu"),
        (2, "cuda", "cuda"),
        (2, "cuda:1", "cuda:1"),
        (2, torch.device("cuda", 1), "cuda:1"),
    ],
    ids=str,
)
def test_resolve_device_takes_what_the_machine_offers(
    monkeypatch: pytest.MonkeyPatch, num_gpus: int, name: str | None, expected: str
) -> None:
    offer(monkeypatch, num_gpus)
    assert resolve_device(name) == torch.device(expected)


@pytest.mark.parametrize(
    ("num_gpus", "name", "message"),
    [
        (0, "bogus", "device: 'bogus' given; cpu, cuda or cuda:N is accepted"),
        (0, "", "device: '' given; cpu, cuda or cuda:N is accepted"),
        (2, "cuda:-1", "device: 'cuda:-1' given; cpu, cuda or cuda:N is accepted"),
        (0, "cuda", "device: 'cuda' given; this machine offers cpu"),
        (2, "cuda:2", "device: 'cuda:2' given; this machine offers cpu, cuda:0, cuda:1"),
    ],
    ids=str,
)
def test_resolve_device_refuses_with_what_is_accepted(
    monkeypatch: pytest.MonkeyPatch, num_gpus: int, name: str, message: str
) -> None:
    offer(monkeypatch, num_gpus)
    with pytest.raises(ValueError, match=f"{message}$"):
        resolve_device(name)


@pytest.mark.parametrize(
    ("name", "chosen"), [("cpu", []), ("cuda", []), ("cuda:1", [torch.device("cuda:1")])], ids=str
)
def test_make_current_leaves_the_current_device_to_a_name_without_number(
    monkeypatch: pytest.MonkeyPatch, name: str, chosen: list[torch.device]
) -> None:
    calls: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)

    make_current(torch.device(name))

    assert calls == chosen
