"""Every network through steps of training, into final weights and out of them again."""

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from orchestrator.data.dataloader import Batch
from orchestrator.models.config import AlexNetConfig, AnyModelConfig, GoogLeNetConfig, LeNet5Config, NINConfig
from orchestrator.models.registry import create_model
from orchestrator.recipe.config import Recipe
from orchestrator.training import train_state as states
from orchestrator.training.distributed import DistributedContext
from orchestrator.training.train_state import TrainState
from orchestrator.training.train_step import TrainStep
from tests.support.ranks import Ranks
from tests.support.runs import ALONE, CPU, recipe

CLASSES = 3
# The others are AlexNet with other rows (see tests/models/test_networks.py).
NETWORKS: list[AnyModelConfig] = [
    LeNet5Config(),
    AlexNetConfig(image_size=32),
    NINConfig(image_size=32),
    GoogLeNetConfig(image_size=32, width=0.1, module="naive", stem="separable"),
    GoogLeNetConfig(image_size=32, width=0.1, batch_norm=True, lrn=False),
]
networks = pytest.mark.parametrize("config", NETWORKS, ids=lambda config: f"{config.kind}-{NETWORKS.index(config)}")


def batch(first: int = 0, images: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(first)
    pixels = torch.randint(0, 256, (images, 32, 32, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
    ids = torch.arange(first, first + images)
    return Batch(pixels, ids % CLASSES, torch.ones(images), ids)


def of(config: AnyModelConfig) -> Recipe:
    base = recipe()
    averaging = base.averaging.model_copy(update={"start": 0.0})
    return base.model_copy(update={"model": config, "averaging": averaging})


def trained(config: AnyModelConfig, world: DistributedContext = ALONE) -> tuple[TrainState, list[float]]:
    """Three steps on batches of 8, of which each rank has its share."""
    state = states.create_initial_state(of(config), CLASSES, 6, CPU)
    step = TrainStep(of(config), state, states.wrap_in_ddp(state.model, world.workers), world)
    own = slice(world.rank * 8 // world.workers, (world.rank + 1) * 8 // world.workers)
    losses = []
    for first in (0, 8, 16):
        whole = batch(first)
        losses.append(float(step(Batch(whole.images[own], whole.labels[own], whole.weights[own], whole.ids[own])).loss))
    return state, losses


@networks
def test_final_weights_are_those_of_a_network_for_inference(config: AnyModelConfig) -> None:
    before = create_model(config, CLASSES, 0).state_dict()
    state, losses = trained(config)
    assert all(0 < loss < 1000 for loss in losses)
    averaged, raw = state.copy_final_weights()
    assert averaged.keys() == raw.keys()
    model = create_model(config, CLASSES, 1)
    model.drop_auxiliary()
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    # Validation puts the mean over the model's own weights; inference loads final weights.
    with torch.inference_mode():
        for weights, override in ((averaged, state.average.mean), (raw, {})):
            model.load_state_dict(weights)
            wanted = functional_call(state.model.eval(), override, (x,)).main
            assert torch.allclose(model.eval()(x).main, wanted, atol=1e-5)
    moved = [name for name, value in raw.items() if not torch.equal(value, before[name])]
    assert len(moved) > 0.8 * len(raw)


def test_the_mean_of_a_batch_normed_network_has_the_mean_of_its_statistics() -> None:
    config = NETWORKS[-1]
    state = states.create_initial_state(of(config), CLASSES, 6, CPU)
    step = TrainStep(of(config), state, state.model, ALONE)
    seen: list[dict[str, Tensor]] = []
    for first in (0, 8):
        step(batch(first))
        seen.append({name: value.clone() for name, value in state.model.state_dict().items()})
    averaged, raw = state.copy_final_weights()
    statistics = [name for name in raw if name.endswith(("running_mean", "running_var"))]
    assert len(statistics) == 2 * 57
    for name in statistics:
        assert torch.allclose(averaged[name], (seen[0][name] + seen[1][name]) / 2, atol=1e-6), name
        assert not torch.equal(averaged[name], raw[name]), name


def _ranked(rank: int, workers: int, config: AnyModelConfig) -> dict[str, Tensor]:
    return trained(config, DistributedContext(rank, workers, CPU))[0].copy_final_weights()[1]


@pytest.mark.process
def test_masks_of_a_whole_map_are_the_same_on_two_ranks(ranks: Ranks) -> None:
    config = NINConfig(image_size=32)
    alone = trained(config)[0].copy_final_weights()[1]
    for found in ranks.run(_ranked, 2, config):
        assert not isinstance(found, Exception), found
        assert max(float((found[name] - alone[name]).abs().max()) for name in alone) < 1e-5
