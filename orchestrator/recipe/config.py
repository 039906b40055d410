"""Recipe: everything that changes the result of a training run, and nothing else. Importable without torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from orchestrator.config.base import Config
from orchestrator.config.errors import ConfigError
from orchestrator.config.flags import Flag
from orchestrator.config.introspection import KIND
from orchestrator.config.plugins import KindDiscriminator, Plugin, compute_source_digest
from orchestrator.data.config import AugmentationConfig, OrderConfig, PreprocessingConfig, check_batch_stages
from orchestrator.models.config import GoogLeNetConfig, ModelConfig, ModelPlugin
from orchestrator.recipe.lr_schedule import Schedule, SchedulePlugin, StepDecay, compute_lr

# Bumped when the meaning of a recipe changes, so that old runs are not taken for new ones.
# 2: the average takes in the statistics of batch norms, and has kinds; photometric distortions.
RECIPE_VERSION = 2

_OPTIMIZER_KINDS = "sgd | adamw | package.module:attribute"


class _OptimizerBase(Config):
    own_fields: ClassVar[tuple[str, ...]] = ("weight_decay",)  # SGD's adds to the gradient, AdamW's shrinks the weights

    clip_norm: float | None = Field(
        None, gt=0, description="most that the gradient's norm over all parameters may be; off by default"
    )


class SGDConfig(_OptimizerBase):
    """SGD with momentum (arXiv 1409.4842, section 6: 0.9)."""

    # Left out of JSON, as in recipes from before there were other kinds: fingerprints stay the same.
    kind: Literal["sgd"] = Field("sgd", description=_OPTIMIZER_KINDS, exclude_if=lambda kind: kind == "sgd")
    momentum: float = Field(0.9, ge=0, lt=1, description="section 6: 0.9")
    weight_decay: float = Field(2e-4, ge=0, lt=1, description="the Caffe replication's 0.0002; not on biases")


class AdamWConfig(_OptimizerBase):
    """Adam with decoupled weight decay (arXiv 1711.05101), by torch.optim.AdamW."""

    kind: Literal["adamw"] = Field("adamw", description=_OPTIMIZER_KINDS)
    weight_decay: float = Field(
        0.01, ge=0, lt=1, description="times the rate; not on biases; torch's 0.01, never SGD's"
    )
    betas: tuple[float, float] = Field((0.9, 0.999), description="of the running means of gradient and square")
    epsilon: float = Field(1e-8, gt=0, description="added to the root of the mean square")


class OptimizerPlugin(Plugin, _OptimizerBase):
    """An optimizer as torch.optim's: called with parameter groups, lr= and args.

    torch.optim:RMSprop with args {"alpha": 0.9}, or a class of the user's. A weight_decay in args spares biases.
    """

    what: ClassVar[str] = "optimizer"


AnyOptimizer = SGDConfig | AdamWConfig | OptimizerPlugin
OptimizerConfig = Annotated[AnyOptimizer, KindDiscriminator("sgd")]


class LossConfig(Config):
    """Softmax cross-entropy of the classifier and of the auxiliary heads."""

    auxiliary_weight: float = Field(0.3, ge=0, le=10, description="weight of each auxiliary loss (section 5: 0.3)")
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of each label spread over all classes (arXiv 1512.00567: 0.1); 0 is off"
    )
    class_weights: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        (),
        description="factor on the loss of each class's images, in the order of the classes; by default 1 for all",
        exclude_if=lambda weights: not weights,
    )


class MetricPlugin(Plugin):
    """A metric of validation by name: a class as recipe.metrics.Metric, made with num_classes= and args.

    It changes nothing that is trained, so it belongs to a job and not to a recipe.
    """

    what: ClassVar[str] = "metric"


class _AveragingBase(Config):
    start: float = Field(0.6, ge=0, lt=1, description="share of training after which weights are averaged")


class RunningMean(_AveragingBase):
    """Polyak averaging: the weights used at inference (section 6) are the mean over the last part of training."""

    kind: Literal["running"] = Field("running", description="running | exponential")


class ExponentialAverage(_AveragingBase):
    """A mean in which weights a half-life ago count half. The first steps count in full, not towards 0."""

    kind: Literal["exponential"] = Field("exponential", description="running | exponential")
    half_life_epochs: float = Field(
        1.0, gt=0, le=100_000, description="in epochs, so that the batch size does not change what is averaged"
    )


AnyAveraging = RunningMean | ExponentialAverage
Averaging = Annotated[AnyAveraging, Field(discriminator="kind")]


class Seeds(Config):
    """Separate seeds; members of an ensemble share `weights` and differ in the others (section 7)."""

    weights: int = Field(0, ge=0, description="initial weights")
    order: int = Field(0, ge=0, description="order in which the images are seen")
    augmentation: int = Field(0, ge=0, description="crops, interpolation and mirroring")
    dropout: int = Field(0, ge=0, description="dropout masks")


class Recipe(Config):
    """One training run as the paper describes it: sections 5 (network), 6 (training)."""

    unknown_is_error: ClassVar[bool] = True

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=128, description="begins the names of its runs")
    version: int = Field(RECIPE_VERSION, ge=RECIPE_VERSION, le=RECIPE_VERSION, description="of the recipe's meaning")
    epochs: int = Field(250, ge=1, le=100_000, description="passes over the training split (Caffe replication: 250)")
    batch_size: int = Field(32, ge=1, le=1_000_000, description="images of a global batch, over all workers together")
    model: ModelConfig = GoogLeNetConfig()
    preprocessing: PreprocessingConfig = PreprocessingConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    order: OrderConfig = OrderConfig()
    schedule: Schedule = StepDecay()
    optimizer: OptimizerConfig = SGDConfig()
    loss: LossConfig = LossConfig()
    averaging: Averaging = RunningMean()
    seeds: Seeds = Seeds()
    max_bad_share: float = Field(
        0.001, ge=0, le=1, description="share of an epoch's images that may be unreadable; 10 are always allowed"
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the network's arithmetic; weights, loss and average stay float32; float16: GPU only"
    )
    initial_weights: str = Field(
        "", pattern=r"^([0-9a-f]{16})?$", description="digest of the weights to start from; by default seeds.weights"
    )

    code: Annotated[dict[str, str], Flag(settable=False)] = Field(
        {},
        description="digest of the code of each plug-in, by its kind; filled in when a run is planned",
        exclude_if=lambda digests: not digests,
    )

    def __hash__(self) -> int:
        """Hash the JSON text, because `code` is a mapping."""
        return hash(self.to_json())

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        check_batch_stages(self.augmentation, self.order, self.batch_size)
        schedule, epochs = self.schedule, self.epochs
        if schedule.warmup_epochs >= epochs:
            raise ValueError(
                f"schedule.warmup_epochs must be below epochs ({epochs}), got {schedule.warmup_epochs:g}: the warm-up "
                "never ends; shorten it or train longer"
            )
        if isinstance(schedule, StepDecay) and schedule.decay_factor < 1 and schedule.decay_epochs >= epochs:
            raise ValueError(
                f"schedule.decay_epochs must be below epochs ({epochs}), got {schedule.decay_epochs:g}: the first step "
                "is never reached; shorten it, or set schedule.decay_factor 1 for a constant rate"
            )
        return self


def pin_code(recipe: Recipe, values: Any = ()) -> Recipe:
    """Return the recipe with the digests of its plug-ins' code as it is now; a recipe without plug-ins as it is.

    Changed code is another run. values: of a sweep's space, as in the JSON form of a recipe, whose plug-ins count, too.
    Raises ConfigError for a plug-in whose module cannot be found.
    """
    code = collect_code(recipe, values=values)
    return recipe if code == recipe.code else recipe.model_copy(update={"code": code})


def collect_code(*configs: Config, values: Any = ()) -> dict[str, str]:
    """Return the digests of the code of all plug-ins in some configs and values as it is now. Raises as `pin_code`."""
    kinds = {*_iter_kinds([config.to_dict() for config in configs]), *_iter_kinds(values)}
    digests = {kind: compute_source_digest(kind) for kind in sorted(kinds)}
    return {kind: digest for kind, digest in digests.items() if digest is not None}


def is_same_but_for_code(recipe: Recipe, other: Recipe) -> bool:
    """Return whether two recipes differ in nothing but the code of their plug-ins."""
    return recipe.model_copy(update={"code": {}}) == other.model_copy(update={"code": {}})


def check_plugins(recipe: Recipe, num_classes: int) -> None:
    """Build and try the recipe's plug-ins on CPU, before anything is started. Raises ConfigError, a line.

    Transforms are checked with the data.
    """
    if recipe.loss.class_weights and len(recipe.loss.class_weights) != num_classes:
        raise ConfigError(
            f"loss.class_weights must have {num_classes} numbers, one for each class, got "
            f"{len(recipe.loss.class_weights)}"
        )
    if isinstance(recipe.schedule, SchedulePlugin):
        for epochs_done in (0.0, recipe.epochs / 2, float(recipe.epochs)):
            compute_lr(recipe.schedule, epochs_done, 1.0, recipe.epochs)
    if isinstance(recipe.model, ModelPlugin):
        from orchestrator.models import plugin_model  # torch takes two seconds to import

        plugin_model.check_model(recipe.model, num_classes)
    if isinstance(recipe.optimizer, OptimizerPlugin):
        from orchestrator.recipe import optimizer  # torch takes two seconds to import

        optimizer.check_optimizer(recipe.optimizer)


def _iter_kinds(data: Any, above: str = "") -> Iterator[str]:
    """Yield the text of every `kind`, and of every transform, in the JSON form of a recipe."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _iter_kinds(value, key)
    elif isinstance(data, list | tuple):
        for value in data:
            yield from _iter_kinds(value, above)
    elif isinstance(data, str) and above in (KIND, "stages", "batch_stages"):
        yield data
