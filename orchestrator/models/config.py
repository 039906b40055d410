"""What a network is, as a frozen config; importable without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from orchestrator.config.base import Config


class GoogLeNetConfig(Config):
    """GoogLeNet (arXiv 1409.4842, section 5): size, regularisation and ablations."""

    image_size: int = Field(224, ge=15, le=1024, description="side of the square input in pixels (section 5: 224)")
    width: float = Field(
        1.0,
        gt=0,
        le=8,
        description="multiplier on every filter count; the paper gives no factor for its wider model",
    )
    module: Literal["reduced", "naive"] = Field(
        "reduced", description="Inception with 1x1 reductions (Figure 2b) or naive without them (Figure 2a)"
    )
    auxiliary: bool = Field(True, description="two auxiliary heads while training (section 5)")
    dropout: float = Field(0.4, ge=0, lt=1, description="share of units dropped before the classifier (section 5: 40%)")
    auxiliary_dropout: float = Field(0.7, ge=0, lt=1, description="the same in the auxiliary heads (section 5: 70%)")
    lrn: bool = Field(True, description="local response normalisation after pool1 and conv2 (Figure 3)")
