"""Networks as frozen configurations. Importable without torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from orchestrator.config.base import Config
from orchestrator.config.plugins import KindDiscriminator, Plugin

KINDS = "googlenet | lenet-5 | alexnet | zfnet | nin | vgg-16 | spp-net | package.module:attribute"


def _size(default: int, least: int, source: str = "") -> Any:
    return Field(default, ge=least, le=1024, description=f"side of the square input in pixels{source}")


def _dropout(source: str) -> Any:
    return Field(0.5, ge=0, lt=1, description=f"share of units dropped {source}")


class GoogLeNetConfig(Config):
    """GoogLeNet (arXiv 1409.4842, section 5): size, regularisation and ablations."""

    kind: Literal["googlenet"] = Field("googlenet", description=KINDS)
    image_size: int = _size(224, 15, " (section 5: 224)")
    width: float = Field(
        1.0, gt=0, le=8, description="multiplier on every filter count; the paper gives no factor for its wider model"
    )
    module: Literal["reduced", "naive"] = Field(
        "reduced", description="Inception with 1x1 reductions (Figure 2b) or naive without them (Figure 2a)"
    )
    stem: Literal["plain", "separable"] = Field(
        "plain", description="first row: the 7x7 convolution that Table 1 names, or the separable one that it counts"
    )
    auxiliary: bool = Field(True, description="two auxiliary heads while training (section 5)")
    dropout: float = Field(0.4, ge=0, lt=1, description="share of units dropped before the classifier (section 5: 40%)")
    auxiliary_dropout: float = Field(0.7, ge=0, lt=1, description="the same in the auxiliary heads (section 5: 70%)")
    lrn: bool = Field(True, description="local response normalisation after pool1 and conv2 (Figure 3)")
    batch_norm: bool = Field(
        False,
        description="batch norm after every convolution, which then has no bias; not the paper's (arXiv 1502.03167)",
    )


class LeNet5Config(Config):
    """LeNet-5 (LeCun et al. 1998) in its common form, on greyscale: 61,706 parameters for 10 classes."""

    kind: Literal["lenet-5"] = Field("lenet-5", description=KINDS)
    image_size: int = _size(32, 16, " (section II.B: 32)")


class AlexNetConfig(Config):
    """AlexNet (Krizhevsky et al. 2012), whose groups are the halves on its two GPUs."""

    kind: Literal["alexnet"] = Field("alexnet", description=KINDS)
    image_size: int = _size(227, 11, " (its arithmetic needs 227, not 224)")
    dropout: float = _dropout("in fc6 and fc7 (section 4.2: 0.5)")
    lrn: bool = Field(True, description="local response normalisation after conv1 and conv2 (section 3.3)")


class ZFNetConfig(Config):
    """ZFNet (Zeiler and Fergus, arXiv 1311.2901, Figure 3), whose company Clarifai won in 2013."""

    kind: Literal["zfnet"] = Field("zfnet", description=KINDS)
    image_size: int = _size(224, 23, " (Figure 3: 224)")
    dropout: float = _dropout("in fc6 and fc7 (section 3: 0.5)")
    lrn: bool = Field(True, description="contrast normalisation across maps after pool1 and pool2 (Figure 3)")


class NINConfig(Config):
    """Network in Network (Lin et al., arXiv 1312.4400), its authors' ImageNet form in Caffe's model zoo."""

    kind: Literal["nin"] = Field("nin", description=KINDS)
    image_size: int = _size(224, 11, " (model zoo: 224)")
    dropout: float = _dropout("before conv4 (model zoo: 0.5)")


class VGG16Config(Config):
    """VGG-16 (Simonyan and Zisserman, arXiv 1409.1556, Table 1, column D)."""

    kind: Literal["vgg-16"] = Field("vgg-16", description=KINDS)
    image_size: int = _size(224, 15, " (section 2.1: 224)")
    dropout: float = _dropout("in fc6 and fc7 (section 3.1: 0.5)")


class SPPNetConfig(Config):
    """SPP-net, MSRA's (He et al., arXiv 1406.4729): spatial pyramid pooling over the body ZF-5."""

    kind: Literal["spp-net"] = Field("spp-net", description=KINDS)
    image_size: int = _size(224, 15, " (section 3.1: 224); weights fit any")
    dropout: float = _dropout("in fc6 and fc7 (section 3.1: 50%)")
    lrn: bool = Field(True, description="local response normalisation before pool1 and pool2 (Table 1)")


class ModelPlugin(Plugin):
    """A network of one's own: any callable that takes num_classes= and returns a torch.nn.Module of N x classes logits.

    timm:create_model with args {"model_name": "resnet18"}, torchvision.models:resnet18, or a class of the user's.
    """

    what: ClassVar[str] = "model"

    image_size: int = _size(224, 1)
    channels_last: bool = Field(
        False,
        description="train in channels_last memory: often faster, but activations then cannot be reshaped by view()",
    )


BaselineConfig = LeNet5Config | AlexNetConfig | ZFNetConfig | NINConfig | VGG16Config | SPPNetConfig
AnyModelConfig = GoogLeNetConfig | BaselineConfig | ModelPlugin
ModelConfig = Annotated[AnyModelConfig, KindDiscriminator()]
NETWORKS: tuple[AnyModelConfig, ...] = (
    GoogLeNetConfig(), LeNet5Config(), AlexNetConfig(), ZFNetConfig(), NINConfig(), VGG16Config(), SPPNetConfig(),
)  # fmt: skip


class CostConfig(Config):
    """Options of `orchestrator cost`."""

    model: ModelConfig = GoogLeNetConfig()
    classes: int = Field(1000, ge=2, description="classes of the last layer")


def format_label(config: AnyModelConfig) -> str:
    """Return a network in a few letters: its kind, and for GoogLeNet its width and what is not the paper's."""
    if isinstance(config, ModelPlugin):
        texts = [value for value in config.args.values() if isinstance(value, str)]
        return " ".join([config.kind, *texts[:1]])
    if not isinstance(config, GoogLeNetConfig):
        return config.kind
    marks = {"naive": config.module == "naive", "separable": config.stem == "separable", "bn": config.batch_norm}
    return " ".join([config.kind, f"x{config.width:g}", *(mark for mark, is_set in marks.items() if is_set)])


def has_batch_norm(config: AnyModelConfig) -> bool:
    """Return whether losses depend on the number of workers. Raises ConfigError for a plug-in that cannot be built."""
    if isinstance(config, ModelPlugin):
        from orchestrator.models import plugin_model  # torch takes two seconds to import

        return plugin_model.has_batch_norm(config)
    return isinstance(config, GoogLeNetConfig) and config.batch_norm
