"""Sweeps that were never run, with results that depend on what was searched as in life."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orchestrator.recipe.config import Recipe
from orchestrator.recipe.lr_schedule import CosineDecay, PolynomialDecay, StepDecay
from orchestrator.recipe.presets import googlenet_digits
from orchestrator.tuning.trial import EpochResult, State, Trial


def trial(
    number: int,
    errors: Sequence[float],
    state: State = "finished",
    assignment: Mapping[str, Any] | None = None,
    recipe: Recipe | None = None,
    reason: str = "",
    epochs: Sequence[Mapping[str, float]] | None = None,
) -> Trial:
    """Return a trial with these top-1 errors, or with these values, one an epoch, of ten seconds each."""
    if epochs is None:
        epochs = [{"validation/raw_top1_error": error, "validation/raw_top5_error": error / 4} for error in errors]
    results = tuple(EpochResult(epoch, values, 10.0 * epoch) for epoch, values in enumerate(epochs, 1))
    return Trial(number, assignment or {}, recipe or googlenet_digits(), state, reason, results)


def sweep(count: int, seed: int = 0, epochs: int = 26) -> list[Trial]:
    """Trials that a halving scheduler thins out: the rate matters most; rates above 0.3 diverge."""
    random = np.random.default_rng(seed)
    drawn = [_drawn(random) for _ in range(count)]
    finals = [_final(assignment) for assignment in drawn]
    made = []
    for number, (assignment, final) in enumerate(zip(drawn, finals, strict=True), 1):
        place = sum(other < final for other in finals) / count
        lasts = epochs if place < 0.25 else 9 if place < 0.5 else 3
        noise = random.normal(0.0, 0.15, epochs)
        errors = [final + (88.0 - final) * math.exp(-epoch / 2.5) + noise[epoch - 1] for epoch in range(1, lasts + 1)]
        state: State = "finished" if lasts == epochs else "pruned"
        reason = "" if state == "finished" else f"not among the better half at epoch {lasts}"
        if assignment["schedule.base_rate"] > 0.3:
            errors, state, reason = [89.0, math.nan], "diverged", "the loss of epoch 2 is not finite"
        made.append(trial(number, errors, state, assignment, _recipe(assignment, epochs), reason))
    return made


def _drawn(random: np.random.Generator) -> dict[str, Any]:
    kind = str(random.choice(["polynomial", "cosine", "step"]))
    found: dict[str, Any] = {"schedule.kind": kind, "schedule.base_rate": float(10 ** random.uniform(-3.5, -0.2))}
    if kind == "polynomial":
        found["schedule.power"] = float(random.uniform(0.3, 2.0))
    if kind == "step":
        found["schedule.decay_factor"] = float(random.uniform(0.5, 0.97))
    found["schedule.warmup_epochs"] = int(random.integers(0, 5))
    found["loss.label_smoothing"] = float(random.choice([0.0, 0.05, 0.1]))
    found["optimizer.weight_decay"] = float(10 ** random.uniform(-5, -2.5))
    found["augmentation.mirror"] = bool(random.integers(0, 2))
    found["augmentation.area"] = [[0.08, 1.0], [0.4, 1.0]][random.integers(0, 2)]
    return found


def _final(assignment: Mapping[str, Any]) -> float:
    """The error in percent after all epochs, but for noise."""
    off = math.log10(assignment["schedule.base_rate"] / 0.03)
    area = 3.0 if assignment["augmentation.area"][0] < 0.1 else 0.0
    mirrored = 1.5 if assignment["augmentation.mirror"] else 0.0
    return float(min(88.0, 4.0 + 14.0 * off**2 + area + mirrored))


def _recipe(assignment: Mapping[str, Any], epochs: int) -> Recipe:
    common = {"base_rate": assignment["schedule.base_rate"], "warmup_epochs": assignment["schedule.warmup_epochs"]}
    match assignment["schedule.kind"]:
        case "polynomial":
            schedule: Any = PolynomialDecay(power=assignment["schedule.power"], **common)
        case "cosine":
            schedule = CosineDecay(**common)
        case _:
            schedule = StepDecay(decay_factor=assignment["schedule.decay_factor"], decay_epochs=2.0, **common)
    return googlenet_digits().model_copy(update={"schedule": schedule, "epochs": epochs})
