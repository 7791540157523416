"""How a run spends its time: clock, learning rate, forecast, and what evaluations may take."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from support.toy_target import make_toy_target
from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.training import pace
from vllm_specformer.training.pace import Clock, Work, factor, forecast
from vllm_specformer.training.settings import COSINE_FLOOR, DECAY_SHARE

STEPS, WARMUP = 100, 10


class Time:
    """Stands for the time module: it moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(pace, "time", time)
    return time


def test_the_clock_goes_on_where_it_was_stopped(time: Time) -> None:
    clock = Clock(100.0)
    time.now += 500  # what loading takes does not count
    clock.start(before=30.0, evaluated=5.0)
    time.now += 20
    assert clock.seconds == 50
    assert clock.advance() == clock.reached == 0.5
    assert not clock.over
    clock.evaluation_took(10.0)
    assert clock.evaluated == 15
    time.now += 39
    assert clock.advance() == pytest.approx(0.99)  # 10 s are kept for the last evaluation
    time.now += 1
    clock.advance()
    assert clock.over


def test_without_a_limit_nothing_is_ever_over(time: Time) -> None:
    clock = Clock(None)
    clock.start(0, 0)
    time.now += 1e9
    assert clock.advance() == 0
    assert not clock.over


def test_evaluations_leave_room_for_the_last_one(time: Time) -> None:
    clock = Clock(1000.0)
    clock.start(0, 0)
    assert clock.may_evaluate(50.0)  # this one and the last: a tenth
    assert not clock.may_evaluate(51.0)
    clock.evaluation_took(20.0)
    assert clock.may_evaluate(51.0)  # it has been timed: 20 + 2 x 20
    clock.evaluation_took(20.0)
    clock.evaluation_took(20.0)
    assert clock.may_evaluate(0.0)
    clock.evaluation_took(20.0)
    assert not clock.may_evaluate(0.0)


def test_all_processes_go_by_one_number(time: Time) -> None:
    clock = Clock(100.0, agree=lambda number: 0.25)
    clock.start(0, 0)
    time.now += 90
    assert clock.advance() == 0.25


@pytest.mark.parametrize(
    ("shape", "name", "arguments"),
    [
        ("trapezoid", "warmup_stable_decay", {"num_decay_steps": int(STEPS * DECAY_SHARE)}),
        ("cosine", "cosine_with_min_lr", {"min_lr_rate": COSINE_FLOOR}),
        ("linear", "linear", {}),
        ("constant", "constant_with_warmup", {}),
    ],
)
def test_the_rate_by_the_clock_is_the_one_by_steps(
    shape: str, name: str, arguments: dict[str, float]
) -> None:
    """Of a run that needs the same time for every step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_scheduler(name, optimizer, WARMUP, STEPS, scheduler_specific_kwargs=arguments)
    for step in range(STEPS + 1):
        expected = scheduler.get_last_lr()[0]
        assert factor(shape, step / STEPS, WARMUP / STEPS) == pytest.approx(expected, abs=1e-9)
        optimizer.step()
        scheduler.step()


def test_a_rate_without_warm_up_begins_at_its_highest() -> None:
    assert factor("trapezoid", 0.0, 0.0) == factor("cosine", 0.0, 0.0) == 1.0
    assert factor("trapezoid", 1.2, 0.0) == 0.0  # past the end


def test_forecast(time: Time) -> None:
    clock = Clock(None)
    clock.start(0, 0)
    line = forecast(100, 3000, 2.0, clock, evaluates=True)
    assert line == (
        "forecast: 2,900 steps to go at 2 s each: 1.6 hours, and up to a tenth more for evaluations"
    )
    assert forecast(0, 20, 2.0, clock, evaluates=False).endswith("each: 40 seconds")
    clock = Clock(3600.0)
    clock.start(0, 0)
    time.now += 100
    line = forecast(50, 3000, 2.0, clock, evaluates=False)
    assert "about 1,800 of 3,000 fit into --max-hours" in line
    assert line.endswith("done in 58 minutes")
    assert "fit into" not in forecast(50, 1000, 2.0, clock, evaluates=True)


def test_texts_that_may_be_evaluated() -> None:
    """A tenth of the work of the steps between two evaluations, counted in multiplications."""
    config = SpecFormerConfig.preset("default", make_toy_target().config, "t", num_draft_slots=4)
    work = Work.of(
        config,
        1000,
        tokens=20,
        texts=8,
        anchors=15,
        trained_anchors=10,
        slots=2.5,
        scored=30,
        budgets=(2, 4),
    )
    layer = 4 * 16 * 16 + 3 * 16 * 24
    slot = layer + 16 * 40
    assert work.step == 8 * (20 * 1000 + 10 * 2.5 * 3 * (layer + 16 * 30))
    assert work.evaluated_text == 20 * 1000 + 15 * 6 * slot
    assert work.most_texts(100) == int(0.1 * 100 * work.step / work.evaluated_text) > 1
    assert work.most_texts(1) == 1
