"""The step's benchmark: its peer is the same network, and a difference between the two shows."""

from collections.abc import Iterator

import pytest
import torch

from benchmarks import step
from orchestrator.models.config import GoogLeNetConfig
from orchestrator.recipe import presets
from orchestrator.recipe.config import Recipe
from tests.support.runs import first_optimizer_step


@pytest.fixture(scope="module", autouse=True)
def _torch_is_warm() -> None:
    first_optimizer_step()


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(step, "CLASSES", 10)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in tests/models: two that wait for a busy core lose much
    yield
    torch.set_num_threads(before)


def small(side: int = 32) -> Recipe:
    model = GoogLeNetConfig(image_size=side, width=0.1)
    return presets.googlenet_digits().model_copy(update={"model": model})


@pytest.mark.parametrize("side", [32, 64, 224])
@pytest.mark.parametrize("lrn", [True, False])
def test_the_peer_has_the_same_outputs_and_gradients(side: int, lrn: bool) -> None:
    outputs, gradients = step.differences(*step.pair(small(side), 2, lrn, torch.float64))
    assert outputs < 1e-12
    assert gradients < 1e-6, "the loss itself is float32"


def test_both_infer_the_same_without_heads() -> None:
    ours, peer = step.pair(small(), 2, dtype=torch.float64)
    (got,), (wanted,) = ours.infer(), peer.infer()
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["stages.3a.reduce5.conv.weight", "heads.4d.hidden.weight"])
def test_other_weights_show(name: str) -> None:
    ours, peer = step.pair(small(), 2, dtype=torch.float64)
    with torch.no_grad():
        peer.network.get_parameter(name).mul_(1.01)
    outputs, gradients = step.differences(ours, peer)
    assert outputs > 1e-6
    assert gradients > 1e-3


def test_a_left_out_norm_shows() -> None:
    with_norm, _ = step.pair(small(), 2)
    _, without = step.pair(small(), 2, lrn=False)
    assert step.differences(with_norm, without)[1] > 1e-3


def test_a_step_updates_the_weights() -> None:
    for steps in step.pair(small(), 2):
        before = [parameter.detach().clone() for parameter in steps.network.parameters()]
        steps.train()
        assert any(not torch.equal(old, new) for old, new in zip(before, steps.network.parameters(), strict=True))


def test_a_step_has_the_same_bits_each_time() -> None:
    first, _ = step.pair(small(64), 3)
    second, _ = step.pair(small(64), 3)
    assert all(map(torch.equal, first.backward(), second.backward()))
    for (name, parameter), twin in zip(first.network.named_parameters(), second.network.parameters(), strict=True):
        assert parameter.grad is not None and twin.grad is not None
        assert torch.equal(parameter.grad, twin.grad), name
