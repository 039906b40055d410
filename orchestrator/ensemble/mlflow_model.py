"""The ensemble as a model from code: MLflow stores this file with the model and runs it to load the model.

Nothing is pickled: code is text, weights are safetensors files. The project's code is stored with the model, too.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import simplejpeg
from mlflow.exceptions import MlflowException
from mlflow.models import infer_signature, set_model
from mlflow.pyfunc.model import PythonModel

from orchestrator.evaluation.scoring_task import DEFAULT_CROPS, DEFAULT_TOP_K

if TYPE_CHECKING:
    DataFrame = Any
else:
    # MLflow passes a pandas table, and checks the annotation of `predict` for it.
    DataFrame = import_module("pandas").DataFrame

TITLES_ARTIFACT = "titles"
WEIGHTS_ARTIFACT = "weights"
SIGNATURE = infer_signature(
    [{"image": ""}],
    [{"predictions": [{"label": 0, "class_name": "", "probability": 0.5}]}],
    {"crops": DEFAULT_CROPS, "top": DEFAULT_TOP_K, "members": ""},  # "1,3"; all by default
)


class EnsembleModel(PythonModel):
    """A model that returns the likeliest classes of JPEG or PNG images in base64."""

    def load_context(self, context: Any) -> None:
        """Load the networks from the artifacts: a folder of weights, in the order of their names, and the titles."""
        # Registering a model imports this file, and needs no torch.
        from orchestrator.evaluation.classifier import Classifier

        finals = sorted(str(path) for path in Path(context.artifacts[WEIGHTS_ARTIFACT]).glob("*.safetensors"))
        self._classifier = Classifier(
            finals, json.loads(Path(context.artifacts[TITLES_ARTIFACT]).read_text(encoding="utf-8"))
        )

    def predict(
        self, context: Any, model_input: DataFrame, params: Mapping[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Return for each row its `predictions`: label, class name and probability of each class, likeliest first.

        model_input: a table with the column `image`. Raises MlflowException, which a server answers with status 400.
        """
        options = {"crops": DEFAULT_CROPS, "top": DEFAULT_TOP_K, "members": "", **(params or {})}
        # MLflow's Python interface turns a dictionary of columns into one row, with all images in one cell.
        texts = [text for cell in model_input["image"] for text in (cell if isinstance(cell, list) else [cell])]
        images = [_decode_image(number, text) for number, text in enumerate(texts)]
        try:
            members = [int(number) for number in str(options["members"]).split(",") if number.strip()]
            results = self._classifier.classify(images, int(options["crops"]), int(options["top"]), members)
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        answers: list[dict[str, Any]] = []
        for number, predictions in enumerate(results):
            if isinstance(predictions, Exception):
                raise MlflowException.invalid_parameter_value(f"image {number}: {predictions}")
            answers.append({"predictions": [asdict(prediction) for prediction in predictions]})
        return answers


def make_input_example() -> dict[str, list[str]]:
    """Return the content of a request: a grey JPEG of 32 x 32 pixels."""
    grey = simplejpeg.encode_jpeg(np.full((32, 32, 3), 128, dtype=np.uint8))
    return {"image": [base64.b64encode(grey).decode()]}


def _decode_image(number: int, text: object) -> bytes:
    try:
        return base64.b64decode(str(text).encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise MlflowException.invalid_parameter_value(
            f"image {number} must be base64: {error}; send a JPEG or PNG file in base64"
        ) from None


set_model(EnsembleModel())
