"""The loss against numbers computed by hand."""

import math

import pytest
import torch
from torch import Tensor

from orchestrator.models.network import Logits
from orchestrator.recipe import loss
from orchestrator.recipe.config import LossConfig

# Probabilities 1/4 and 3/4.
QUARTER = [0.0, math.log(3.0)]
ONES = torch.ones(2)
LABELS = torch.tensor([1, 0])
BOTH = math.log(4 / 3) + math.log(4)


def scores(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, requires_grad=True)


def test_it_is_the_sum_over_the_samples() -> None:
    total = loss.compute_loss_sum(Logits(scores(QUARTER, QUARTER)), LABELS, ONES, LossConfig())
    assert total.item() == pytest.approx(BOTH)


def test_auxiliary_heads_count_with_their_weight() -> None:
    logits = Logits(scores(QUARTER, QUARTER), (scores(QUARTER, QUARTER), scores([0.0, 0.0], [0.0, 0.0])))
    expected = BOTH + 0.3 * BOTH + 0.3 * 2 * math.log(2)
    assert loss.compute_loss_sum(logits, LABELS, ONES, LossConfig()).item() == pytest.approx(expected)
    without = loss.compute_loss_sum(logits, LABELS, ONES, LossConfig(auxiliary_weight=0.0))
    assert without.item() == pytest.approx(BOTH)


def test_a_sample_of_weight_0_has_no_loss_and_no_gradient() -> None:
    main, head = scores(QUARTER, QUARTER), scores(QUARTER, QUARTER)
    total = loss.compute_loss_sum(Logits(main, (head,)), LABELS, torch.tensor([1.0, 0.0]), LossConfig())
    assert total.item() == pytest.approx(1.3 * math.log(4 / 3))
    total.backward()  # type: ignore[no-untyped-call]
    for one in (main, head):
        assert one.grad is not None
        assert one.grad[0].abs().min() > 0
        assert torch.equal(one.grad[1], torch.zeros(2))


def test_no_sample_at_all_is_a_loss_of_0_with_gradients_of_0() -> None:
    weights = torch.ones(3, 2, requires_grad=True)
    logits = Logits(torch.zeros(0, 3) @ weights)
    total = loss.compute_loss_sum(logits, torch.zeros(0, dtype=torch.int64), torch.zeros(0), LossConfig())
    total.backward()  # type: ignore[no-untyped-call]
    assert total.item() == 0.0
    assert weights.grad is not None
    assert torch.equal(weights.grad, torch.zeros(3, 2))


def test_low_precision_scores_are_summed_in_float32() -> None:
    many = Logits(torch.zeros(5000, 2, dtype=torch.bfloat16))
    total = loss.compute_loss_sum(many, torch.zeros(5000, dtype=torch.int64), torch.ones(5000), LossConfig())
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(5000 * math.log(2), rel=1e-5)


def test_classes_have_weights() -> None:
    logits, config = Logits(scores(QUARTER, QUARTER)), LossConfig(class_weights=(3.0, 0.5))
    expected = 0.5 * math.log(4 / 3) + 3 * math.log(4)
    assert loss.compute_loss_sum(logits, LABELS, ONES, config).item() == pytest.approx(expected)


def test_labels_may_be_shares_of_classes() -> None:
    shares = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    total = loss.compute_loss_sum(Logits(scores(QUARTER, QUARTER)), shares, ONES, LossConfig())
    assert total.item() == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3) + math.log(4))
    hard = torch.nn.functional.one_hot(LABELS, 2).float()
    total = loss.compute_loss_sum(Logits(scores(QUARTER, QUARTER)), hard, ONES, LossConfig())
    assert total.item() == pytest.approx(BOTH)


def test_smoothed_labels_give_a_share_to_every_class() -> None:
    # Two classes: label 1 of the first row is worth 0.9 + 0.1 / 2 = 0.95, the other class 0.05.
    total = loss.compute_loss_sum(Logits(scores(QUARTER)), LABELS[:1], ONES[:1], LossConfig(label_smoothing=0.1))
    assert total.item() == pytest.approx(0.95 * math.log(4 / 3) + 0.05 * math.log(4))
    heads = loss.compute_loss_sum(
        Logits(scores(QUARTER), (scores(QUARTER),)), LABELS[:1], ONES[:1], LossConfig(label_smoothing=0.1)
    )
    assert heads.item() == pytest.approx(1.3 * total.item())
