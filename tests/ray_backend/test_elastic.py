import pytest

from orchestrator.config.errors import ConfigError
from orchestrator.ray_backend import cluster
from orchestrator.ray_backend.cluster import ClusterCapacity, Node, wait_for_capacity
from orchestrator.ray_backend.launch_errors import ClusterError
from orchestrator.ray_backend.ray_trainer import _choose_num_workers
from orchestrator.ray_backend.run_spec import Placement


def test_a_run_has_a_fixed_number_of_workers_unless_it_names_a_least() -> None:
    fixed, changing, same = (
        Placement(workers=3),
        Placement(workers=3, min_workers=2),
        Placement(workers=3, min_workers=3),
    )
    assert [(one.fewest_workers, one.is_elastic) for one in (fixed, changing, same)] == [
        (3, False),
        (2, True),
        (3, False),
    ]
    assert [_choose_num_workers(one) for one in (fixed, changing, same)] == [3, (2, 3), 3]


def test_a_least_above_the_most_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"min_workers 4 is refused: more than workers \(3\)"):
        Placement.from_dict({"workers": 3, "min_workers": 4})


def test_only_the_least_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    two = ClusterCapacity((Node(1, 0), Node(1, 0)))
    monkeypatch.setattr(cluster, "get_capacity", lambda: two)
    assert wait_for_capacity(Placement(workers=3, min_workers=2), print) is two
    with pytest.raises(ClusterError, match="3 to 4 workers of 1 CPU"):
        wait_for_capacity(Placement(workers=4, min_workers=3), print)
