"""A recipe in a file: all of its values, and where it comes from when a sweep found it.

A run's own recipe.json is one, too: the bare values.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from orchestrator.config import redaction
from orchestrator.config.base import Config
from orchestrator.config.errors import ConfigError
from orchestrator.config.json_text import parse_object
from orchestrator.recipe.config import Recipe
from orchestrator.storage import file_io, urls

EXPECTED_FILE_HINT = "give a run's recipe.json, or the file that a sweep handed over"


class Provenance(Config):
    """The sweep and the trial that found a recipe. No training depends on it."""

    sweep: str = Field("", description="name of the sweep")
    trial: str = Field("", description="name of the trial that had this recipe")
    assignment: dict[str, Any] = Field({}, description="what the trial set: dotted path of the recipe to value")
    base: str = Field("", description="preset that the sweep started from")
    seed: int = Field(0, ge=0, description="of the sweep's own choices")
    dataset: str = Field("", description="name of the dataset that it was tuned on; 'digits' for the embedded one")
    dataset_digest: str = Field("", description="digest of that dataset's manifest")
    metric: str = Field("", description="what trials were compared by")
    score: float | None = Field(None, description="the trial's, in percent")
    repeats: str = Field("", description="what training the best ones again with other seeds said of the score")
    commit: str = Field("", description="of the code that tuned it")
    created: str = Field("", description="when it was handed over")


class RecipeFile(Config):
    """A recipe and its provenance; None when the file has none."""

    recipe: Recipe
    provenance: Provenance | None = None


def load_recipe(url: str) -> RecipeFile:
    """Return the recipe in the file at a URL or path, with its provenance if it has one.

    Raises ConfigError, naming the file, when it is not there, cannot be read or is no such file.
    """
    try:
        data = parse_object(file_io.read_bytes(url))
        # A recipe has no field of that name, so its values alone are never taken for the other form.
        return RecipeFile.from_dict(data) if "recipe" in data else RecipeFile(recipe=Recipe.from_dict(data))
    except FileNotFoundError:
        reason = f"nothing there; {EXPECTED_FILE_HINT}"
        if urls.is_in_submitted_job() and urls.is_local(url) and not url.startswith("/"):
            reason += (
                ". A submitted job has a copy of the working directory without what git ignores, such as runs/: give "
                "the absolute path on the cluster's nodes, or a URL"
            )
    except ConfigError as error:
        reason = str(error)
    except (OSError, ValueError) as error:  # also a folder, or storage that does not answer
        reason = f"cannot be read: {error}; {EXPECTED_FILE_HINT}"
    raise ConfigError(f"{redaction.redact(url)}: {reason}")
