"""Plans hold every text once within their budget, and depend on the seed and the step alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.training_texts import make_texts
from vllm_specformer.training.packing import Batches, Budget, collate, plan_all, plan_epoch

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=120).map(np.array)
BUDGETS = st.builds(
    Budget, st.integers(1, 300), st.one_of(st.none(), st.integers(1, 9)), st.booleans()
)
QUICK = settings(derandomize=True, deadline=None, max_examples=60)


def size(row: list[int], lengths: np.ndarray) -> int:
    return int(lengths[row].sum())


@QUICK
@given(lengths=LENGTHS, budget=BUDGETS)
def test_plans_keep_the_budget(lengths: np.ndarray, budget: Budget) -> None:
    for batches in (plan_epoch(lengths, budget, 0, 0), plan_all(lengths, budget)):
        used = [index for batch in batches for row in batch for index in row]
        assert len(used) == len(set(used))
        for batch in batches:
            width = max(size(row, lengths) for row in batch)
            assert width == max(lengths[row].max() for row in batch)
            if budget.texts:
                assert len(batch) <= budget.texts
            else:
                assert width * len(batch) <= budget.tokens or len(batch) == 1
            if budget.texts or not budget.packed:
                assert all(len(row) == 1 for row in batch)


@QUICK
@given(lengths=LENGTHS, budget=BUDGETS)
def test_little_is_left_over(lengths: np.ndarray, budget: Budget) -> None:
    """All texts are evaluated; an epoch lacks at most a part of one batch."""
    everything = [i for batch in plan_all(lengths, budget) for row in batch for i in row]
    assert sorted(everything) == list(range(len(lengths)))
    used = {i for batch in plan_epoch(lengths, budget, 0, 0) for row in batch for i in row}
    missing = [i for i in range(len(lengths)) if i not in used]
    assert size(missing, lengths) <= budget.tokens if not budget.texts else True
    assert len(missing) < budget.texts if budget.texts else True


def test_packing_leaves_little_padding() -> None:
    lengths = np.random.default_rng(0).integers(20, 300, 2000)
    batches = plan_epoch(lengths, Budget(4096), 0, 0)
    area = sum(len(batch) * max(size(row, lengths) for row in batch) for batch in batches)
    assert sum(size(row, lengths) for batch in batches for row in batch) > 0.95 * area


def test_epochs_and_seeds_differ() -> None:
    lengths = make_texts(60, 40).lengths
    plans = [plan_epoch(lengths, Budget(100), *key) for key in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]
    assert plans[0] != plans[3]


def test_collate() -> None:
    texts = make_texts(6, 40)
    made = collate(texts, [[0, 2], [1]], None, None)
    long = int(texts.lengths[0])
    width = max(long + int(texts.lengths[2]), int(texts.lengths[1]))
    assert made["input_ids"].shape == (2, width)
    assert made["input_ids"][0, :long].tolist() == texts.input_ids(0).tolist()
    assert made["input_ids"][0, long : long + 3].tolist() == texts.input_ids(2)[:3].tolist()
    assert made["position_ids"][0, long : long + 3].tolist() == [0, 1, 2]
    assert made["segments"][0].unique().tolist() in ([0, 1], [0, 1, 2])
    padding = made["segments"][1, int(texts.lengths[1]) :]
    assert (padding == 1).all()
    first, second = texts.anchors(0)[0], texts.anchors(2)[0]
    expected = [*first.tolist(), *(second + long).tolist()]
    assert made["anchors"][0, : len(expected)].tolist() == expected
    assert (made["ends"][0, len(expected) :] == 0).all()


def test_anchors_are_drawn_without_repetition() -> None:
    texts = make_texts(1, 40, shortest=24)
    every = texts.anchors(0)[0].tolist()
    seen = set()
    for seed in range(30):
        drawn = collate(texts, [[0]], 4, np.random.default_rng(seed))["anchors"][0].tolist()
        assert drawn == sorted(set(drawn))
        assert len(drawn) == 4
        seen.update(drawn)
    assert seen == set(every)


@pytest.mark.parametrize("per_step", [1, 4])
def test_items_depend_on_their_number_alone(per_step: int) -> None:
    def made() -> Batches:
        texts = make_texts(40, 40)
        return Batches(
            texts,
            np.arange(40),
            Budget(100),
            per_text=3,
            slot_counts=(1, 2, 3),
            seed=5,
            per_step=per_step,
            steps=30,
            epochs=1,
        )

    forwards = made()
    items = [forwards[number] for number in range(len(forwards))]
    assert len(items) == 30 * per_step
    again = made()  # asked for in another order, as after a kill
    for number in (len(items) - 1, 3):
        item = again[number]
        for name, value in items[number].items():
            assert torch.equal(torch.as_tensor(item[name]), torch.as_tensor(value)), name
    for step in range(30):
        of_step = items[step * per_step : (step + 1) * per_step]
        assert len({item["num_slots"] for item in of_step}) == 1
    assert {item["num_slots"] for item in items} == {1, 2, 3}


def test_steps_follow_from_epochs() -> None:
    texts = make_texts(40, 40)
    options = {"per_text": None, "slot_counts": (2,), "seed": 0}
    one = Batches(texts, np.arange(40), Budget(100), per_step=1, steps=None, epochs=1, **options)
    three = Batches(texts, np.arange(40), Budget(100), per_step=2, steps=None, epochs=3, **options)
    assert one.steps == len(plan_epoch(texts.lengths, Budget(100), 0, 0))
    assert three.steps == pytest.approx(1.5 * one.steps, abs=2)
    used = [i for number in range(len(one)) for row in one.batch(number) for i in row]
    assert len(used) == len(set(used))
