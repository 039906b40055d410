import pytest

from orchestrator.config.errors import ConfigError
from orchestrator.ensemble.config import TrainEnsembleConfig
from tests.support.launched import recipe


def test_an_ensemble_has_a_fixed_number_of_workers() -> None:
    fixed = {"recipe": recipe().to_dict(), "placement": {"workers": 2}}
    assert TrainEnsembleConfig.from_dict(fixed).placement.fewest_workers == 2
    with pytest.raises(
        ConfigError, match=r"placement\.min_workers must not be set for an ensemble, got 1: only a run alone"
    ):
        TrainEnsembleConfig.from_dict({**fixed, "placement": {"workers": 2, "min_workers": 1}})
