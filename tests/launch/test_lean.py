"""The trainer without processes that our runs have no use for."""

import pytest
from ray.train.v2._internal.callbacks import BackendSetupCallback, DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.torch.torch_trainer import TorchTrainer

from orchestrator.launch.lean import LeanTrainer


def kinds(trainer: TorchTrainer) -> set[type]:
    return {type(one) for one in trainer._create_default_callbacks()}


@pytest.mark.parametrize("given", [False, True])
def test_only_what_is_of_no_use_is_left_out(given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if given:
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    usual, lean = kinds(TorchTrainer(lambda: None)), kinds(LeanTrainer(lambda: None))
    assert BackendSetupCallback in lean
    # On a cluster that outlives the job somebody must give back what a lost controller had reserved.
    assert usual - lean == ({DatasetsCallback} if given else {DatasetsCallback, PlacementGroupCleanerCallback})
