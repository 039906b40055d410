"""The command lines of predict.py and serve.py; importable without torch."""

from __future__ import annotations

from typing import Annotated, Literal

import tyro
from pydantic import Field

from orchestrator.config.base import Config
from orchestrator.evaluation.answer import CROPS, TOP
from orchestrator.launch.config import RUNS_VARIABLE


class Chosen(Config):
    """Which models, and where they are."""

    model: str = Field(
        "",
        description="name of an ensemble or run, URL of its folder, or models:/NAME@ALIAS of MLflow's registry; by "
        "default the registered champion, or where none is registered the newest ensemble that was trained whole",
    )
    members: tuple[int, ...] = Field(
        (), description="numbers of the ensemble's models to use, from 1, such as 1,3; all by default"
    )
    storage: str = Field("", description=f"folder URL of runs; by default ${RUNS_VARIABLE}, else ~/orchestrator-runs")
    tracking: str = Field(
        "", description="MLflow tracking URI of the registry; by default a sqlite database in the storage folder"
    )


class Predict(Config):
    """What the command line of predict.py sets."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional] = Field(
        (), description="JPEG or PNG files, folders of them, or their URLs (s3://, https://, ...)"
    )
    chosen: Annotated[Chosen, tyro.conf.arg(name="")] = Chosen()
    crops: Literal[1, 10, 144] = Field(CROPS, description="crops of each image: dearer ones are a little better")
    top: int = Field(TOP, ge=1, description="classes told of each image")
    json_lines: Annotated[bool, tyro.conf.arg(name="json")] = Field(
        False, description="print a line of JSON for each image instead of a table"
    )


class Serve(Config):
    """What the command line of serve.py sets."""

    chosen: Annotated[Chosen, tyro.conf.arg(name="")] = Chosen()
    crops: Literal[1, 10, 144] = Field(CROPS, description="crops of each image, where a request does not say")
    top: int = Field(TOP, ge=1, description="classes told of each image, where a request does not say")
    host: str = Field("127.0.0.1", description="address to listen on; there is no login: keep it on this machine")
    port: int = Field(8080, ge=0, le=65535, description="port to listen on; 0 takes a free one, and says which")
