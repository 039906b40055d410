"""Dropout masks are pure functions of seed, layer, epoch and sample."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data import rng
from orchestrator.models.config import GoogLeNetConfig
from orchestrator.models.registry import create_model
from orchestrator.training.train_step import _splitmix64, make_dropout_mask, make_dropout_masks

bases = st.integers(0, 2**64 - 1)
ids = st.lists(st.integers(0, 2**62), min_size=1, max_size=20)
MANY = torch.arange(2000)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1))
def test_the_mixer_is_that_of_the_data_plane(values: list[int]) -> None:
    signed = np.array(values, dtype=np.int64)
    assert np.array_equal(
        _splitmix64(torch.from_numpy(signed)).numpy().view(np.uint64), rng.mix_bits(signed.view(np.uint64))
    )


@given(bases, ids, st.integers(1, 9))
def test_masks_are_the_data_planes_hash_of_base_and_id(base: int, chosen: list[int], units: int) -> None:
    rows = rng.mix_bits(np.array(chosen, dtype=np.uint64) ^ np.uint64(base))
    gamma = 0x9E3779B97F4A7C15
    counters = [[(int(row) + unit * gamma) % 2**64 for unit in range(units)] for row in rows]
    low = rng.mix_bits(np.array(counters, dtype=np.uint64)) & np.uint64(2**24 - 1)
    expected = np.where(low.astype(np.float64) / 2**24 >= 0.4, np.float32(1 / 0.6), np.float32(0))
    assert np.array_equal(make_dropout_mask(base, torch.tensor(chosen), units, 0.4).numpy(), expected)


def test_masks_never_change() -> None:
    """Another mask for the same sample would end every run's exact resume: it needs a new recipe version."""
    found = make_dropout_mask(rng.derive_key(1409, "dropout/main", 4), torch.tensor([0, 4842]), 12, 0.4)
    assert (found > 0).int().tolist() == [
        [0, 1, 1, 1, 1, 1, 0, 1, 1, 0, 0, 0],
        [0, 0, 1, 0, 1, 1, 1, 1, 0, 0, 0, 0],
    ]


@given(bases, ids, st.randoms())
def test_a_samples_mask_does_not_depend_on_its_batch(base: int, chosen: list[int], random: object) -> None:
    together = make_dropout_mask(base, torch.tensor(chosen), 16, 0.5)
    for row, one in zip(together, chosen, strict=True):
        assert torch.equal(row, make_dropout_mask(base, torch.tensor([one]), 16, 0.5)[0])
    backwards = make_dropout_mask(base, torch.tensor(chosen[::-1]), 16, 0.5)
    assert torch.equal(together.flip(0), backwards)


@pytest.mark.parametrize("probability", [0.0, 0.4, 0.7])
def test_the_share_and_the_scale(probability: float) -> None:
    found = make_dropout_mask(rng.derive_key(0, "test"), MANY, 100, probability)
    kept = torch.tensor(1 / (1 - probability), dtype=torch.float32)
    assert ((found == 0) | (found == kept)).all()
    # 200,000 draws: a standard deviation of at most 0.0011.
    assert float((found == 0).float().mean()) == pytest.approx(probability, abs=0.005)
    assert float((found == 0).float().mean(dim=0).max()) <= probability + 0.06, "no unit is preferred"
    assert float(found.mean()) == pytest.approx(1.0, abs=0.01)


def test_units_and_samples_are_uncorrelated() -> None:
    found = make_dropout_mask(rng.derive_key(0, "test"), MANY, 64, 0.5).numpy()
    for other in (np.roll(found, 1, axis=0), np.roll(found, 1, axis=1)):
        assert abs(np.corrcoef(found.ravel(), other.ravel())[0, 1]) < 0.012


def test_an_empty_batch_has_empty_masks() -> None:
    assert make_dropout_mask(1, torch.zeros(0, dtype=torch.int64), 5, 0.4).shape == (0, 5)


def test_every_place_that_drops_has_a_mask_of_its_own() -> None:
    model = create_model(GoogLeNetConfig(image_size=32, width=0.25), 10, 0)
    found = make_dropout_masks(model, 3, 1, MANY)
    assert found.keys() == {"main", "4a", "4d"}
    assert {name: tuple(one.shape) for name, one in found.items()} == {
        name: (len(MANY), units) for name, (units, _) in model.get_dropout_units().items()
    }
    # Section 5: 40% before the classifier, 70% in the auxiliary heads.
    for name, share in (("main", 0.4), ("4a", 0.7), ("4d", 0.7)):
        assert float((found[name] == 0).float().mean()) == pytest.approx(share, abs=0.01)
    assert not torch.equal(found["4a"], found["4d"])
    for other in (make_dropout_masks(model, 4, 1, MANY), make_dropout_masks(model, 3, 2, MANY)):
        assert not torch.equal(found["main"], other["main"]), "seed and epoch count"
    assert torch.equal(found["main"], make_dropout_masks(model, 3, 1, MANY)["main"])
