"""Networks of the user's: what the project sees of them, and what each mistake says."""

import importlib.util
from typing import Any

import pytest
import torch

from orchestrator.config.errors import ConfigError
from orchestrator.models.config import ModelPlugin, format_label, has_batch_norm
from orchestrator.models.cost import measure_cost
from orchestrator.models.plugin_model import PluginNetwork, check_model
from orchestrator.models.registry import create_model
from tests.support import plugin_models

SUPPORT = plugin_models.__name__


def plugin(name: str, **args: Any) -> ModelPlugin:
    return ModelPlugin(kind=f"{SUPPORT}:{name}", args=args, image_size=8)


def test_a_plain_module_is_trained_like_a_built_in_network() -> None:
    model = create_model(plugin("Flat", bottleneck=12), 5, 0).train()
    logits = model(torch.ones(2, 3, 8, 8))
    assert logits.main.shape == (2, 5)
    assert logits.auxiliary == ()
    assert model.get_dropout_units() == {}
    assert model.get_auxiliary_names() == frozenset()
    assert model.has_stock_randomness
    assert not model.has_batch_norm
    logits.main.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_names_of_weights_are_the_modules_own() -> None:
    model, plain = create_model(plugin("Flat"), 5, 0), plugin_models.Flat(5)
    assert list(model.state_dict()) == list(plain.state_dict()) == [name for name, _ in plain.named_parameters()]
    assert dict(model.named_parameters()).keys() == dict(plain.named_parameters()).keys()
    plain.load_state_dict(model.state_dict())
    images = torch.rand(3, 3, 8, 8)
    assert torch.equal(plain(images), model(images).main)
    model.load_state_dict({name: torch.zeros_like(value) for name, value in model.state_dict().items()})
    assert not model(images).main.any()
    assert model.double()(images.double()).main.dtype == torch.float64, "conversions reach the module"


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = create_model(plugin("Flat"), 5, 3).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = create_model(plugin("Flat"), 5, 3).state_dict(), create_model(plugin("Flat"), 5, 4).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_classifier_layers_are_those_whose_shape_depends_on_the_classes() -> None:
    # The hidden layer has as many units as there are classes.
    model = create_model(plugin("Flat", bottleneck=10), 10, 0)
    assert set(model.get_classifiers()) == {"", "head"}
    assert set(create_model(ModelPlugin(kind="examples.small_cnn:SmallCNN"), 10, 0).get_classifiers()) == {"classifier"}


def test_modes_reach_the_module() -> None:
    model = create_model(plugin("Dropping"), 5, 0)
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(model.eval()(images).main, model(images).main)
    model.train()
    torch.manual_seed(1)
    first = model(images).main
    assert not torch.equal(first, model(images).main)
    torch.manual_seed(1)
    assert torch.equal(first, model(images).main)


def test_batch_norms_are_found() -> None:
    assert has_batch_norm(plugin("Flat", norm=True))
    assert not has_batch_norm(plugin("Flat"))
    assert create_model(plugin("Flat", norm=True), 5, 0).has_batch_norm


@pytest.mark.parametrize("name", ["Flat", "LooksAtNumbers"])
def test_costs_are_measured(name: str) -> None:
    params = 192 * 16 + 16 + 16 * 10 + 10 + 10
    assert measure_cost(plugin(name, bottleneck=16), 10) == (params, 192 * 16 + 16 * 10)


def test_labels_are_short() -> None:
    assert format_label(ModelPlugin(kind="timm:create_model", args={"model_name": "resnet18"})) == (
        "timm:create_model resnet18"
    )


@pytest.mark.parametrize(
    "config",
    [
        plugin("Flat"),
        plugin("Dropping"),
        plugin("Flat", norm=True),
        ModelPlugin(kind="examples.small_cnn:SmallCNN", image_size=32, channels_last=False),
    ],
    ids=lambda config: config.kind,
)
def test_a_good_network_is_run_twice_in_each_mode(config: ModelPlugin, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[tuple[bool, torch.Size]] = []
    forward = PluginNetwork.forward

    def record(network: PluginNetwork, images: torch.Tensor) -> Any:
        logits = forward(network, images)
        passes.append((network.training, logits.main.shape))
        return logits

    monkeypatch.setattr(PluginNetwork, "forward", record)
    check_model(config, 10)
    assert passes == [(training, (4, 10)) for training in (False, False, True, True)]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelPlugin(kind="no_such_module:Net"), "no module no_such_module"),
        (plugin("NoSuchName"), "has no attribute 'NoSuchName'"),
        (plugin("takes_classes"), r"does not take these arguments: .*; it takes: classes. .* called with num_classes"),
        (plugin("Flat", widht=3), "unexpected keyword argument 'widht'"),
        (plugin("no_module"), r"must return a torch.nn.Module, got int"),
        (plugin("no_parameters"), "must have parameters to train, got none"),
        (plugin("FixedClasses"), r"must return float logits of shape \(4, 10\) \(N x classes\), got .*\(4, 7\)"),
        (plugin("ReturnsPair"), r"must return float logits of shape \(4, 10\) .*, got tuple"),
        (plugin("Fails"), r"in eval mode failed on images of 8 x 8 pixels at .*plugin_models.py:\d+: Runtime"),
        (plugin("PythonRandomWeights"), "initial weights differ between two networks made from the same seed"),
        (plugin("PythonRandomForward"), "two forward passes in eval mode from the same seed differ"),
        (plugin("PythonRandomTraining"), "two forward passes in train mode from the same seed differ"),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)  # fmt: skip
def test_a_bad_network_says_why_in_a_line(config: ModelPlugin, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_model(config, 10)
    assert repr(config.kind) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fewer_than_two_classes_are_an_error() -> None:
    with pytest.raises(ValueError, match="classes must be at least 2, got 1"):
        PluginNetwork(plugin("Flat"), 1)


@pytest.mark.parametrize(
    ("kind", "args"), [("timm:create_model", {"model_name": "resnet18"}), ("torchvision.models:resnet18", {})]
)
def test_networks_of_common_libraries_work_as_they_are(kind: str, args: dict[str, Any]) -> None:
    library = kind.partition(":")[0].partition(".")[0]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    config = ModelPlugin(kind=kind, args=args, image_size=64)
    check_model(config, 10)
    assert has_batch_norm(config)
    assert set(create_model(config, 10, 0).get_classifiers()) == {"fc"}
