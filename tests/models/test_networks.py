"""The networks before GoogLeNet, and what all networks have in common."""

import pytest
import torch
from torch import Tensor, nn

from orchestrator.config.errors import ConfigError
from orchestrator.models.baselines import SpatialPyramidPooling
from orchestrator.models.config import (
    AlexNetConfig,
    AnyModelConfig,
    GoogLeNetConfig,
    LeNet5Config,
    NINConfig,
    SPPNetConfig,
    VGG16Config,
    ZFNetConfig,
    format_label,
    has_batch_norm,
)
from orchestrator.models.network import Network
from orchestrator.models.registry import create_model, create_uninitialized_model

# The smallest image that each takes. Only shapes are computed, on the meta device, which LRN does not know.
SMALLEST: list[AnyModelConfig] = [
    LeNet5Config(image_size=16),
    AlexNetConfig(image_size=11, lrn=False),
    ZFNetConfig(image_size=23, lrn=False),
    NINConfig(image_size=11),
    VGG16Config(image_size=15),
    SPPNetConfig(image_size=15, lrn=False),
    GoogLeNetConfig(image_size=15, lrn=False),
    GoogLeNetConfig(image_size=15, lrn=False, module="naive", stem="separable"),
    GoogLeNetConfig(image_size=15, lrn=False, batch_norm=True),
]
EVERY: list[AnyModelConfig] = [
    LeNet5Config(),
    AlexNetConfig(image_size=64),
    NINConfig(image_size=64),
    GoogLeNetConfig(image_size=32, width=0.25),
    GoogLeNetConfig(image_size=32, width=0.25, stem="separable"),
    GoogLeNetConfig(image_size=32, width=0.25, batch_norm=True, lrn=False),
]
# Built as AlexNet is, from other rows: what holds for it holds for them.
LARGE: list[AnyModelConfig] = [ZFNetConfig(image_size=32), VGG16Config(image_size=32), SPPNetConfig(image_size=32)]
every = pytest.mark.parametrize("config", EVERY, ids=lambda config: f"{config.kind}-{EVERY.index(config)}")


def outline(config: AnyModelConfig, classes: int) -> Network:
    """The network without the memory of its weights."""
    with torch.device("meta"):
        return create_uninitialized_model(config, classes)


def num_params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def images_for(config: AnyModelConfig, number: int = 3) -> Tensor:
    side = config.image_size
    drawn = torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(1))
    return drawn.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("config", "classes", "params"),
    [
        # The usual count of its common form.
        (LeNet5Config(), 10, 61_706),
        # Caffe's bvlc_alexnet.
        (AlexNetConfig(lrn=False), 1000, 60_965_224),
        # 14,208 + 614,656 + 885,120 + 1,327,488 + 884,992 in convolutions; 37,752,832 + 16,781,312 + 4,097,000.
        (ZFNetConfig(lrn=False), 1000, 62_357_608),
        # Caffe's nin_imagenet: 7.6 million, 29 MB.
        (NINConfig(), 1000, 7_595_176),
        # arXiv 1409.1556, table 2: 138 million.
        (VGG16Config(), 1000, 138_357_544),
        # ZF-5's convolutions, 3,726,464; then 50 x 256 x 4096 + 4096, 16,781,312 and 4,097,000.
        (SPPNetConfig(lrn=False), 1000, 3_726_464 + 52_432_896 + 16_781_312 + 4_097_000),
    ],
)
def test_parameters_are_as_many_as_published(config: AnyModelConfig, classes: int, params: int) -> None:
    assert num_params(outline(config, classes)) == params


def test_sides_of_the_maps_are_the_papers() -> None:
    sides: dict[str, list[int]] = {}
    for config in (AlexNetConfig(lrn=False), ZFNetConfig(lrn=False), NINConfig(), SPPNetConfig(lrn=False)):
        model = outline(config, 1000).eval()
        for path, part in model.named_modules():
            if path.startswith(("body.conv", "body.pool", "last.conv")) and not path.endswith(".conv"):

                def note(_m: nn.Module, _i: object, out: Tensor, kind: str = config.kind) -> None:
                    sides.setdefault(kind, []).append(out.shape[-1])

                part.register_forward_hook(note)
        with torch.no_grad():
            model(torch.empty(1, 3, config.image_size, config.image_size, device="meta"))
    assert sides == {
        "alexnet": [55, 27, 27, 13, 13, 13, 13, 6],  # Figure 2, and Caffe
        "zfnet": [110, 55, 26, 13, 13, 13, 13, 6],  # Figure 3
        "nin": [54, 27, 27, 13, 13, 6, 6],  # Caffe
        "spp-net": [110, 55, 27, 13, 13, 13, 13],  # Table 1
    }


# ------------------------------------------------------------------ what holds for all
@pytest.mark.parametrize("config", [*EVERY, *LARGE], ids=lambda config: config.kind)
def test_gradients_reach_every_layer(config: AnyModelConfig) -> None:
    model = create_model(config, 10, 0).train()
    units = model.get_dropout_units()
    keep = torch.Generator().manual_seed(2)
    masks = {place: (torch.rand(3, n, generator=keep) >= p).float() / (1 - p) for place, (n, p) in units.items()}
    logits = model(images_for(config), masks)
    assert all(out.shape == (3, 10) for out in (logits.main, *logits.auxiliary))
    labels = torch.tensor([1, 2, 3])
    losses = [nn.functional.cross_entropy(out, labels) for out in (logits.main, *logits.auxiliary)]
    torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A branch of a narrow GoogLeNet has a handful of ReLUs, which may all be closed.
        assert parameter.grad.any() or isinstance(config, GoogLeNetConfig), name


@pytest.mark.parametrize("config", SMALLEST, ids=lambda config: f"{config.kind}-{SMALLEST.index(config)}")
def test_the_smallest_images_pass_and_smaller_ones_are_errors(config: AnyModelConfig) -> None:
    side = config.image_size
    logits = outline(config, 10).train()(torch.empty(3, 3, side, side, device="meta"))
    assert all(out.shape == (3, 10) for out in (logits.main, *logits.auxiliary))
    below = {"kind": config.kind, "image_size": config.image_size - 1}
    with pytest.raises(ConfigError, match=r"image_size: must be at least"):
        type(config).from_dict(below)


@every
def test_masks_act_at_every_place_and_none_means_nothing_dropped(config: AnyModelConfig) -> None:
    model, images = create_model(config, 10, 0).eval(), images_for(config)
    with torch.no_grad():
        plain = model(images).main
        units = {place: n for place, (n, _) in model.get_dropout_units().items()}
        ones = {place: torch.ones(3, n) for place, n in units.items()}
        assert torch.allclose(model(images, ones).main, plain, atol=1e-6)
        for place in units.keys() - {"4a", "4d"}:  # those act on the auxiliary scores
            closed = {**ones, place: torch.zeros_like(ones[place])}
            assert not torch.allclose(model(images, closed).main, plain, atol=1e-6), place


def test_where_and_how_much_is_dropped() -> None:
    assert outline(AlexNetConfig(lrn=False), 1000).get_dropout_units() == {"fc6": (4096, 0.5), "fc7": (4096, 0.5)}
    assert outline(NINConfig(dropout=0.25), 1000).get_dropout_units() == {"main": (384 * 6 * 6, 0.25)}
    assert outline(LeNet5Config(), 10).get_dropout_units() == {}


@every
def test_classifiers_are_what_depends_on_the_classes(config: AnyModelConfig) -> None:
    ten, twelve = create_model(config, 10, 0), create_model(config, 12, 0)
    other = twelve.state_dict()
    differing = {
        name.rpartition(".")[0] for name, value in ten.state_dict().items() if value.shape != other[name].shape
    }
    assert differing == set(ten.get_classifiers())
    assert all(ten.get_submodule(name) is layer for name, layer in ten.get_classifiers().items())
    assert set(ten.state_dict()) == set(other)


@every
def test_weights_depend_on_the_seed_alone_and_no_layer_is_left_out(config: AnyModelConfig) -> None:
    torch.manual_seed(1)
    first = create_model(config, 10, 3).state_dict()
    torch.manual_seed(2)
    again, other = create_model(config, 10, 3).state_dict(), create_model(config, 10, 4).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    drawn = [name for name, value in first.items() if value.ndim > 1]
    assert drawn
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


@every
def test_scores_at_the_start_are_neither_flat_nor_huge(config: AnyModelConfig) -> None:
    with torch.no_grad():
        logits = create_model(config, 100, 0).train()(images_for(config, 8)).main
    assert 0.02 < logits.std() < 5


@every
def test_inference_needs_no_auxiliary_weights(config: AnyModelConfig) -> None:
    model, images = create_model(config, 10, 0).eval(), images_for(config)
    only_training = model.get_auxiliary_names()
    assert bool(only_training) == isinstance(config, GoogLeNetConfig)
    before = model(images).main
    model.drop_auxiliary()
    assert not model.get_auxiliary_names()
    assert not only_training & model.state_dict().keys()
    assert torch.equal(model(images).main, before)


def test_one_class_is_an_error() -> None:
    for config in EVERY:
        with pytest.raises(ValueError, match="classes must be at least 2, got 1"):
            create_uninitialized_model(config, 1)


def test_labels() -> None:
    assert [format_label(config) for config in (VGG16Config(), GoogLeNetConfig(width=0.25))] == [
        "vgg-16",
        "googlenet x0.25",
    ]
    assert (
        format_label(GoogLeNetConfig(module="naive", stem="separable", batch_norm=True))
        == "googlenet x1 naive separable bn"
    )


@every
def test_a_config_says_whether_its_network_has_batch_norms(config: AnyModelConfig) -> None:
    assert has_batch_norm(config) == create_model(config, 10, 0).has_batch_norm


# ------------------------------------------------------------------ peculiarities
def test_lenet_sees_grey() -> None:
    model, images = create_model(LeNet5Config(), 10, 0), images_for(LeNet5Config())
    grey = images.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    assert torch.allclose(model(images).main, model(grey).main, atol=1e-6)


def test_alexnets_halves_see_their_own_maps() -> None:
    model = create_model(AlexNetConfig(image_size=64, lrn=False), 10, 0)
    conv2, x = (
        model.get_submodule("body.conv2"),
        torch.randn(1, 96, 5, 5, generator=torch.Generator().manual_seed(1)).abs(),
    )
    with torch.no_grad():
        before, changed = conv2(x), conv2(torch.cat((x[:, :48] + 1, x[:, 48:]), dim=1))
    assert torch.equal(before[:, 128:], changed[:, 128:])
    assert not torch.equal(before[:, :128], changed[:, :128])


def test_a_pyramids_cells_cover_the_map_and_its_weights_fit_any_image() -> None:
    x = torch.arange(2 * 13 * 13.0).view(1, 2, 13, 13)
    pooled = SpatialPyramidPooling((6, 3, 2, 1))(x).view(-1)
    assert len(pooled) == 2 * 50
    assert pooled[:36].max() == x[0, 0].max() == pooled[35], "the last cell ends in the corner"
    # Appendix A: cell 2 of 3 in 13 pixels goes from floor(13 / 3) to ceil(26 / 3).
    assert pooled[72 + 4] == x[0, 0, 4:9, 4:9].max()
    model = create_model(SPPNetConfig(image_size=48), 10, 0).eval()
    for side in (48, 64, 57):
        assert model(torch.zeros(1, 3, side, side)).main.shape == (1, 10)


def test_no_score_of_nin_is_below_zero() -> None:
    config = NINConfig(image_size=64)
    assert bool((create_model(config, 10, 0)(images_for(config)).main >= 0).all())


# ------------------------------------------------------------------ GoogLeNet's variants
def test_batch_norm_follows_every_convolution_and_is_used() -> None:
    config = GoogLeNetConfig(image_size=32, width=0.1, batch_norm=True, lrn=False)
    model = create_model(config, 10, 0).train()
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    # 3 in the first two rows, 6 in each of 9 modules, one in each head.
    assert len(norms) == len(convolutions) == 59
    assert all(conv.bias is None for conv in convolutions)
    model(images_for(config))
    for name, norm in norms.items():
        assert norm.running_mean is not None
        assert norm.running_mean.any(), name
    assert model.has_batch_norm
    assert not create_model(GoogLeNetConfig(image_size=32, width=0.1), 10, 0).has_batch_norm


def test_a_batch_normed_network_is_another_while_training_with_another_batch() -> None:
    config = GoogLeNetConfig(image_size=32, width=0.1, batch_norm=True, lrn=False)
    model, images = create_model(config, 10, 0), images_for(config, 8)
    alone, together = model.train()(images[:4]).main, model(images).main[:4]
    assert not torch.allclose(alone, together, atol=1e-3)
    model.eval()
    assert torch.allclose(model(images[:4]).main, model(images).main[:4], atol=1e-5)


def test_its_1x1_convolutions_are_convolutions_and_have_gradients_of_plain_strides() -> None:
    # On CPU they are computed as matrix products; DDP wants the strides of weights and gradients to agree.
    config = GoogLeNetConfig(image_size=32, width=0.1, batch_norm=True, lrn=False)
    model = create_model(config, 10, 0).eval()
    part = model.get_submodule("stages.3a.conv1")
    x = torch.randn(2, 19, 4, 4, generator=torch.Generator().manual_seed(1)).contiguous(
        memory_format=torch.channels_last
    )
    conv = part.get_submodule("conv")
    wanted = nn.functional.relu(part.get_submodule("norm")(conv(x)))
    got = part(x)
    assert torch.allclose(got, wanted, atol=1e-6)
    got.sum().backward()
    assert isinstance(conv.weight, Tensor)
    assert conv.weight.grad is not None
    assert conv.weight.grad.is_contiguous()


def test_the_separable_stem_keeps_the_maps() -> None:
    plain, separable = (
        create_model(GoogLeNetConfig(image_size=64, width=0.5, stem=stem), 10, 0) for stem in ("plain", "separable")
    )
    x = images_for(GoogLeNetConfig(image_size=64))
    assert (
        plain.get_submodule("stages.conv1")(x).shape
        == separable.get_submodule("stages.conv1")(x).shape
        == (3, 32, 32, 32)
    )
    depthwise = separable.get_submodule("stages.conv1.depthwise")
    assert isinstance(depthwise, nn.Conv2d)
    # 8 for each colour; here 32 // 3, of which no more than 8.
    assert (depthwise.out_channels, depthwise.groups) == (24, 3)
