from __future__ import annotations

import pytest
import torch

from megaclass.classifier import Monitors
from megaclass.observe.metrics import StepMeter


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def add(
    meter: StepMeter, loss: float = 2.0, *, samples: int = 5, wait: float = 0.1, seconds: float = 0.5,
    head: float = 0.0, monitors: Monitors | None = None,
) -> None:  # fmt: skip
    meter.add(
        loss=torch.tensor(loss, dtype=torch.float64, requires_grad=True),
        intra=torch.tensor(0.75),
        inter=torch.tensor(1.25),
        positive_cosine=torch.tensor([0.25, 0.5, 0.75]),
        samples=samples,
        data_wait_seconds=wait,
        step_seconds=seconds,
        head_cpu_seconds=head,
        monitors=monitors,
    )


def monitors(value: float) -> Monitors:
    return Monitors(*(torch.tensor(number) for number in (-value, value, 1 + value, 0.5, 7.0)))


def test_snapshot_holds_the_newest_step_and_the_window() -> None:
    clock = Clock()
    meter = StepMeter(num_steps=10, clock=clock)
    for loss in (9.0, 8.0, 1 / 3):
        add(meter, loss)
        clock.now += 0.6
    snapshot = meter.snapshot()
    assert snapshot.loss == 1 / 3  # every digit of float64
    assert (snapshot.intra, snapshot.inter, snapshot.positive_cosine) == (0.75, 1.25, 0.5)
    assert snapshot.grad_norm is None
    assert snapshot.samples == 15
    assert snapshot.samples_per_second == pytest.approx(15 / 1.5)
    assert snapshot.step_seconds == pytest.approx(0.5)
    assert snapshot.data_wait_seconds == pytest.approx(0.3)
    assert snapshot.data_wait_share == pytest.approx(0.2)
    assert snapshot.eta_seconds == pytest.approx(7 * 0.6)  # at the pace of the clock, evaluations included


def test_monitors_are_those_of_the_newest_step_by_name() -> None:
    meter = StepMeter(num_steps=10, clock=Clock())
    add(meter, monitors=monitors(0.125))
    add(meter, monitors=monitors(0.25))
    assert meter.snapshot().monitors == {
        "negative_cosine_mean": -0.25,
        "negative_cosine_max": 0.25,
        "end_point": 1.25,
        "past_end_point": 0.5,
        "rows_touched": 7.0,
    }
    add(meter, monitors=monitors(0.125))
    add(meter)  # was not asked for any
    assert meter.snapshot().monitors == {}


def test_monitors_do_not_shift_the_numbers_before_them() -> None:
    meter = StepMeter(num_steps=10, clock=Clock())
    for norm in (None, torch.tensor(3.5)):
        meter.add(
            loss=torch.tensor(2.0), intra=torch.tensor(0.75), inter=torch.tensor(1.25),
            positive_cosine=torch.tensor(0.5), samples=5, data_wait_seconds=0.0, step_seconds=0.1, grad_norm=norm,
            monitors=monitors(0.25),
        )  # fmt: skip
        snapshot = meter.snapshot()
        assert (snapshot.loss, snapshot.positive_cosine) == (2.0, 0.5)
        assert snapshot.grad_norm == (None if norm is None else 3.5)
        assert snapshot.monitors["negative_cosine_mean"] == -0.25
        assert snapshot.monitors["rows_touched"] == 7.0


def test_time_of_the_class_layer_is_the_mean_over_the_window() -> None:
    meter = StepMeter(num_steps=10, clock=Clock())
    for head in (0.25, 0.75):
        add(meter, head=head)
    assert meter.snapshot().head_cpu_seconds == 0.5
    add(meter, head=0.125)
    assert meter.snapshot().head_cpu_seconds == 0.125


def test_a_window_begins_after_every_snapshot() -> None:
    meter = StepMeter(num_steps=10, clock=Clock())
    add(meter, samples=5, seconds=10.0)
    meter.snapshot()
    add(meter, samples=7, seconds=0.5, wait=0.0)
    snapshot = meter.snapshot()
    assert snapshot.samples == 12
    assert snapshot.samples_per_second == pytest.approx(14.0)
    assert snapshot.data_wait_seconds == 0.0
    with pytest.raises(AssertionError, match="needs a step"):
        meter.snapshot()


def test_nothing_is_read_from_the_device_before_the_snapshot() -> None:
    # A tensor of the meta device has no values: reading one raises.
    nothing = torch.empty((), device="meta")
    meter = StepMeter(num_steps=2)
    meter.add(
        loss=nothing,
        intra=nothing,
        inter=nothing,
        positive_cosine=nothing,
        samples=5,
        data_wait_seconds=0.0,
        step_seconds=0.1,
        grad_norm=nothing,
        monitors=Monitors(*[nothing] * 5),
    )
    with pytest.raises((RuntimeError, NotImplementedError)):
        meter.snapshot()


def test_no_figure_is_negative_or_infinite_when_clocks_stand_still() -> None:
    clock = Clock()
    meter = StepMeter(num_steps=1, clock=clock)
    add(meter, seconds=0.0, wait=0.0)
    add(meter, seconds=0.0, wait=0.0)  # a step more than announced
    clock.now -= 50.0
    snapshot = meter.snapshot()
    assert (snapshot.samples_per_second, snapshot.data_wait_share, snapshot.eta_seconds) == (0.0, 0.0, 0.0)
