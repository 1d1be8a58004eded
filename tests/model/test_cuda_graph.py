"""If this fails, capturing a step changes the run, or its replays are not what the step would have done."""

from __future__ import annotations

import pytest
import torch

from model.cuda_graph import CapturedStep, restored

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_restored_gives_values_back_in_place() -> None:
    parameter = torch.nn.Parameter(torch.arange(4.0))
    convolution = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    state, before = [parameter, convolution], [parameter.detach().clone(), convolution.clone()]
    addresses = [tensor.data_ptr() for tensor in state]
    with restored(state), torch.no_grad():
        parameter.add_(1)
        convolution.mul_(torch.nan)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
    assert [tensor.data_ptr() for tensor in state] == addresses
    assert convolution.is_contiguous(memory_format=torch.channels_last)


def test_restored_gives_values_back_after_an_error() -> None:
    counter = torch.zeros(())

    def fails() -> None:
        counter.add_(1)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"), restored([counter]):
        fails()
    assert counter == 0


class _Step:
    """Adds a device scalar and a random number to `total`; counts how often its Python runs."""

    def __init__(self) -> None:
        self.total, self.increment = torch.zeros((), device="cuda"), torch.zeros((), device="cuda")
        self.calls = 0

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        self.total += self.increment + torch.rand((), device="cuda")
        return self.total * 2


@pytest.mark.gpu
@needs_cuda
def test_captured_step_leaves_state_and_follows_its_inputs_and_seeds() -> None:
    step, expected = _Step(), torch.zeros((), device="cuda")
    captured = CapturedStep(step, [step.total])
    calls = step.calls
    assert step.total == 0
    for seed in (3, 4, 3):
        step.increment.fill_(seed)
        torch.manual_seed(seed)
        result = captured()
        torch.manual_seed(seed)
        expected += seed + torch.rand((), device="cuda")
        assert step.total == expected
        assert result == 2 * expected
    assert step.calls == calls


@pytest.mark.gpu
@needs_cuda
def test_steps_that_share_memory_are_right_in_turn() -> None:
    x = torch.randn(256, 256, device="cuda")
    steps = [lambda factor=factor: (x @ x).mul(factor).sin() for factor in (1.0, 2.0, 3.0)]
    first = CapturedStep(steps[0], [])
    captured = [first, *(CapturedStep(step, [], beside=first) for step in steps[1:])]
    for _ in range(2):
        for step, replay in zip(steps, captured, strict=True):
            torch.testing.assert_close(replay().clone(), step(), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@needs_cuda
def test_another_stream_waits_for_an_event_within_the_newest_replay() -> None:
    # What the sums of gradients rest on: waiting after a replay is waiting for that replay's record.
    numbers, seen = torch.zeros(1 << 20, device="cuda"), []
    made = torch.cuda.Event(external=True)

    def step() -> torch.Tensor:
        torch.cuda._sleep(20_000_000)  # 10 ms, so that who does not wait is early
        numbers.add_(1)
        made.record()
        torch.cuda._sleep(20_000_000)
        return numbers

    captured, beside = CapturedStep(step, [numbers]), torch.cuda.Stream()
    for _ in range(5):
        ended = torch.cuda.Event()
        captured()
        ended.record()
        with torch.cuda.stream(beside):
            beside.wait_event(made)
            seen.append(numbers.clone())
        beside.synchronize()
        assert not ended.query()  # in the middle of the replay, not at its end
        torch.cuda.current_stream().wait_stream(beside)
    assert [values.unique().tolist() for values in seen] == [[n] for n in (1.0, 2.0, 3.0, 4.0, 5.0)]
