"""The network against Table 1, its heads, its widths and its initial weights."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.models import googlenet
from orchestrator.models.config import GoogLeNetConfig
from orchestrator.models.googlenet import GoogLeNet, Inception, scale_filters
from orchestrator.models.registry import create_model

# Section 5, Table 1: output sizes, H x W x C.
TABLE_1 = {
    "conv1": (112, 112, 64),
    "pool1": (56, 56, 64),
    "conv2": (56, 56, 192),
    "pool2": (28, 28, 192),
    "3a": (28, 28, 256),
    "3b": (28, 28, 480),
    "pool3": (14, 14, 480),
    "4a": (14, 14, 512),
    "4b": (14, 14, 512),
    "4c": (14, 14, 512),
    "4d": (14, 14, 528),
    "4e": (14, 14, 832),
    "pool4": (7, 7, 832),
    "5a": (7, 7, 832),
    "5b": (7, 7, 1024),
}
TINY: dict[str, Any] = {"image_size": 32, "width": 0.1}


def tiny(seed: int = 0, **changes: Any) -> GoogLeNet:
    return built(GoogLeNetConfig(**(TINY | changes)), 10, seed)


def built(config: GoogLeNetConfig, classes: int, seed: int) -> GoogLeNet:
    model = create_model(config, classes, seed)
    assert isinstance(model, GoogLeNet)
    return model


def num_params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def stage_shapes(model: GoogLeNet, images: Tensor) -> dict[str, tuple[int, int, int]]:
    shapes: dict[str, tuple[int, int, int]] = {}
    for name, stage in model.stages.items():

        def note(_module: nn.Module, _inputs: object, out: Tensor, name: str = name) -> None:
            shapes[name] = (out.shape[2], out.shape[3], out.shape[1])

        stage.register_forward_hook(note)
    model(images)
    return shapes


@pytest.fixture(scope="module")
def full() -> GoogLeNet:
    return built(GoogLeNetConfig(), 1000, 0)


def test_every_stage_has_table_1s_size_and_the_heads_the_papers(full: GoogLeNet) -> None:
    pooled = {}
    for name, head in full.heads.items():
        conv = head.get_submodule("conv")
        conv.register_forward_hook(lambda _m, inputs, _out, name=name: pooled.update({name: tuple(inputs[0].shape)}))
    with torch.no_grad():
        logits = full.train()(torch.zeros(1, 3, 224, 224))
        shapes = stage_shapes(full, torch.zeros(1, 3, 224, 224))
    assert shapes == TABLE_1
    assert list(shapes) == list(TABLE_1), "in this order"
    assert pooled == {"4a": (1, 512, 4, 4), "4d": (1, 528, 4, 4)}, "section 5: 4x4x512 and 4x4x528"
    assert [tuple(out.shape) for out in (logits.main, *logits.auxiliary)] == [(1, 1000)] * 3


def test_parameters_are_exactly_the_published_totals(full: GoogLeNet) -> None:
    assert num_params(full) == 13_378_280
    assert num_params(full) - num_params(full.heads) == 6_998_552
    assert num_params(GoogLeNet(GoogLeNetConfig(auxiliary=False), 1000)) == 6_998_552


def test_it_is_22_layers_deep(full: GoogLeNet) -> None:
    # Section 5: 22 layers with parameters, 27 with the pools: an Inception module is two deep, conv2 too.
    depth = {googlenet.ConvolutionRow: 1, googlenet.InceptionRow: 2, googlenet.MaxPoolRow: 0}
    layers = 1 + sum(
        depth[type(row)] + (isinstance(row, googlenet.ConvolutionRow) and row.reduce > 0) for row in googlenet.TABLE_1
    )
    pools = 1 + sum(isinstance(row, googlenet.MaxPoolRow) for row in googlenet.TABLE_1)
    assert (layers, layers + pools) == (22, 27)


def test_no_batch_normalisation_and_two_lrn(full: GoogLeNet) -> None:
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in full.modules())
    assert list(full.norms) == ["pool1", "conv2"]
    assert not GoogLeNet(GoogLeNetConfig(**TINY, lrn=False), 10).norms


# ------------------------------------------------------------------ auxiliary heads
def test_heads_are_silent_at_inference() -> None:
    model = tiny()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert len(model.train()(images).auxiliary) == 2
    assert model.eval()(images).auxiliary == ()
    assert torch.equal(model(images).main, model.train()(images).main), "without masks the mode changes nothing else"


def test_dropped_heads_leave_the_state_dict_too() -> None:
    model = tiny()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    before = model.eval()(images).main
    assert model.get_auxiliary_names() == {name for name in model.state_dict() if name.startswith("heads.")} != set()
    model.drop_auxiliary()
    assert not any(name.startswith("heads.") for name in model.state_dict())
    assert torch.equal(model(images).main, before)
    assert model.train()(images).auxiliary == ()
    assert set(model.get_dropout_units()) == {"main"}
    assert not model.get_auxiliary_names()
    inference = GoogLeNet(GoogLeNetConfig(**TINY, auxiliary=False), 10)
    inference.load_state_dict(model.state_dict())
    assert torch.equal(inference.eval()(images).main, before)


def test_get_dropout_units() -> None:
    assert GoogLeNet(GoogLeNetConfig(), 1000).get_dropout_units() == {
        "main": (1024, 0.4),
        "4a": (1024, 0.7),
        "4d": (1024, 0.7),
    }
    small = tiny(width=0.25, dropout=0.5, auxiliary_dropout=0.0)
    assert small.get_dropout_units() == {"main": (256, 0.5), "4a": (256, 0.0), "4d": (256, 0.0)}


def test_masks_multiply_the_units_of_their_place() -> None:
    model = tiny().train()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    ones = {name: torch.ones(3, units) for name, (units, _) in model.get_dropout_units().items()}
    plain, masked = model(images), model(images, ones)
    assert all(map(torch.equal, (plain.main, *plain.auxiliary), (masked.main, *masked.auxiliary)))
    for number, place in enumerate(("main", "4a", "4d")):
        out = model(images, {**ones, place: torch.zeros_like(ones[place])})
        for other, (got, before) in enumerate(
            zip((out.main, *out.auxiliary), (plain.main, *plain.auxiliary), strict=True)
        ):
            # Nothing but zero biases is left behind a closed mask.
            assert torch.equal(got, torch.zeros_like(got) if other == number else before)


# ------------------------------------------------------------------ sizes and widths
@pytest.mark.parametrize("side", [15, 30, 31, 32, 64, 97, 224])
@pytest.mark.parametrize("module", ["reduced", "naive"])
def test_image_sizes_forward_and_backward(side: int, module: str) -> None:
    model = tiny(image_size=side, module=module).train()
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    logits = model(images)
    outputs = (logits.main, *logits.auxiliary)
    assert [out.shape for out in outputs] == [(2, 10)] * 3
    torch.stack([out.square().sum() for out in outputs]).sum().backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("width", [0.25, 1.5])
def test_width_multiplies_every_filter_count(width: float) -> None:
    model = GoogLeNet(GoogLeNetConfig(width=width, image_size=64), 10)
    shapes = stage_shapes(model.eval(), torch.zeros(1, 3, 64, 64))
    # All of the paper's counts are multiples of 8: none is rounded at these widths.
    assert {name: channels for name, (_, _, channels) in shapes.items()} == {
        name: channels * width for name, (_, _, channels) in TABLE_1.items()
    }
    convolutions = [m for m in model.stages.modules() if isinstance(m, nn.Conv2d)]
    wanted: list[int] = []
    for row in googlenet.TABLE_1:
        if isinstance(row, googlenet.ConvolutionRow):
            wanted += [row.reduce, row.filters] if row.reduce else [row.filters]
        elif isinstance(row, googlenet.InceptionRow):
            wanted += [row.conv1, row.reduce3, row.conv3, row.reduce5, row.conv5, row.pool_proj]
    assert [conv.out_channels for conv in convolutions] == [filters * width for filters in wanted]
    assert model.get_dropout_units()["4a"][0] == 1024 * width


def test_a_tiny_width_leaves_at_least_one_filter() -> None:
    assert scale_filters(16, 0.01) == 1
    model = tiny(width=0.001)
    assert model.eval()(torch.zeros(1, 3, 32, 32)).main.shape == (1, 10)


def test_one_class_is_an_error() -> None:
    with pytest.raises(ValueError, match="classes must be at least 2, got 1"):
        GoogLeNet(GoogLeNetConfig(**TINY), 1)


def test_branches_are_concatenated_in_the_order_of_table_1() -> None:
    # Weights of other implementations carry over only so: 1x1, 3x3, 5x5, pool projection.
    module = Inception(6, googlenet.InceptionRow("x", 1, 2, 2, 1, 3, 4))
    x = torch.randn(1, 6, 5, 5, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        branches = (
            module.conv1(x), module.conv3(module.reduce3(x)), module.conv5(module.reduce5(x)),
            module.pool_proj(functional.max_pool2d(x, 3, 1, 1)),
        )  # fmt: skip
        assert [branch.shape[1] for branch in branches] == [1, 2, 3, 4]
        assert torch.equal(module(x), torch.cat(branches, dim=1))


def test_naive_module_only_ever_grows() -> None:
    model = GoogLeNet(GoogLeNetConfig(module="naive", image_size=64, width=0.25), 10)
    shapes = stage_shapes(model.eval(), torch.zeros(1, 3, 64, 64))
    # Figure 2a: 1x1, 3x3 and 5x5 filters beside the pooled input itself: (64 + 128 + 32 + 192) / 4.
    assert shapes["3a"] == (8, 8, 104)
    assert shapes["3b"] == (8, 8, 104 + (128 + 192 + 96) // 4)
    assert not any("reduce" in name or "pool_proj" in name for name in model.stages.state_dict() if "conv2" not in name)


# ------------------------------------------------------------------ initial weights
def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = weights_of(tiny(seed=3))
    torch.manual_seed(2)
    assert same(first, weights_of(tiny(seed=3)))
    other = weights_of(tiny(seed=4))
    assert all(not torch.equal(first[name], other[name]) for name in first if name.endswith("weight"))


def test_the_global_generator_is_left_as_it_was() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    tiny(seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_six_members_share_their_initial_weights_and_the_wider_one_cannot() -> None:
    # Section 7: the same initial weights; members differ in sampling and order, and dropout is no weight either.
    members = [weights_of(tiny(seed=9, dropout=dropout)) for dropout in (0.4, 0.3, 0.4, 0.5, 0.4, 0.4)]
    assert all(same(members[0], member) for member in members)
    wider = weights_of(tiny(seed=9, width=0.15))
    assert wider["stages.3a.conv1.conv.weight"].shape != members[0]["stages.3a.conv1.conv.weight"].shape


def test_initial_variance_is_hes_and_biases_are_zero(full: GoogLeNet) -> None:
    for name, module in full.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        assert module.bias is not None
        assert not module.bias.any()
        gain = 1.0 if name.endswith("classifier") else 2.0
        numbers = module.weight.numel()
        got = module.weight.detach().double().var().item() * module.weight[0].numel() / gain
        assert got == pytest.approx(1.0, abs=6 * (2 / numbers) ** 0.5), name


def test_signals_neither_die_nor_explode_at_the_start() -> None:
    model = built(GoogLeNetConfig(image_size=64), 10, 0).train()
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(images)
    for out in (logits.main, *logits.auxiliary):
        assert 0.05 < out.std() < 5
