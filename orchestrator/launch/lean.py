"""Ray Train's trainer without the processes that our runs have no use for."""

from __future__ import annotations

from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.callback import RayTrainCallback
from ray.train.v2.torch.torch_trainer import TorchTrainer

from orchestrator.launch.environment import is_submitted


class LeanTrainer(TorchTrainer):
    """Each process costs a start two to four seconds of a core.

    Left out: the manager of Ray Data's datasets, of which we have none; and on a private cluster, which ends with its
    driver, the cleaner of what a lost controller leaves reserved.
    """

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        without: tuple[type[RayTrainCallback], ...] = (DatasetsCallback,)
        if not is_submitted():
            without = (*without, PlacementGroupCleanerCallback)
        return [one for one in super()._create_default_callbacks() if not isinstance(one, without)]
