"""Train several runs in a session: plan, supervise, show, record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from orchestrator.fleet import forecast, plan
from orchestrator.fleet.board import Board
from orchestrator.fleet.config import PlanConfig
from orchestrator.fleet.figures import duration
from orchestrator.fleet.forecast import Durations
from orchestrator.fleet.plan import Pace, Plan
from orchestrator.fleet.progress import Progress
from orchestrator.fleet.supervisor import Ended, Replan, RunStatus, Tail, supervise
from orchestrator.fleet.supply import Supply, looking
from orchestrator.launch import cluster, preflight
from orchestrator.launch.config import RunSpec
from orchestrator.launch.session import Session
from orchestrator.tracking.tracker import FinalStatus
from orchestrator.training.outcome import finished

_STATUS: dict[RunStatus, FinalStatus] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


@dataclass(frozen=True)
class FleetResult:
    """How each run ended, by name, in the order asked; and what was seen of it."""

    ended: dict[str, Ended]
    board: Board

    def of(self, status: RunStatus) -> list[str]:
        """Names of the runs that ended so."""
        return [name for name, end in self.ended.items() if end.status == status]


def train(
    session: Session,
    specs: Sequence[RunSpec],
    parent: str | None = None,
    config: PlanConfig | None = None,
    stop_run: Callable[[RunSpec], None] | None = None,
    scored_images: int = 0,
) -> FleetResult:
    """Train every run that is not finished; each is recorded under the run of key `parent`.

    Returns when all ended, however they did. A run's failure is in the result, never raised.
    stop_run: asks one run to save and stop, the session going on; without it no run under way gets more workers.
    scored_images: of each run afterwards, on all crops, which the time left includes.
    """
    config = config or PlanConfig()
    done = {spec.name: outcome for spec in specs if (outcome := finished(spec.folder)) is not None}
    todo = [spec for spec in specs if spec.name not in done]
    board = Board(specs, scored_images)
    ended: dict[str, Ended] = {}
    for spec in specs:
        if spec.name in done:
            session.closing(session.follow(spec, parent), "FINISHED")
            board.change(spec, "finished", "before")
            ended[spec.name] = Ended("finished", "", done[spec.name])
    board.poll(waiting=True)  # what earlier jobs did is known, and not told as news
    if done:
        session.say(f"{len(done)} of {len(specs)} models are trained already")
    if todo:
        planned, replan = _planned(session, specs, todo, board, config)
        tail = None
        if stop_run is not None and config.most_workers is not None:
            tail = Tail(board.seconds_left, board.start_seconds, stop_run)
        ended |= _train(session, planned, board, parent, tail, replan)
    return FleetResult({spec.name: ended[spec.name] for spec in specs}, board)


def _planned(
    session: Session, specs: Sequence[RunSpec], todo: Sequence[RunSpec], board: Board, config: PlanConfig
) -> tuple[Plan, Replan]:
    """The plan of what is to be done, told; the board expects it. And how to plan again for other nodes."""
    expected = forecast.durations(specs, board.seen(), session.manifest, config)
    pace = forecast.pace(config, expected.in_seconds)
    by_name = {spec.name: value for spec, value in zip(specs, expected.values, strict=True)}
    planned = plan.plan(todo, session.capacity, session.gpus, [by_name[spec.name] for spec in todo], pace)
    in_order = Durations(tuple(by_name[spec.name] for spec in planned.order), expected.in_seconds)
    board.expect(planned.order, in_order, forecast.pace(config))
    waves = f" in {planned.waves} waves" if planned.waves > 1 else ""
    takes = f", about {duration(planned.makespan)}" if expected.in_seconds else ""
    session.say(f"training {len(planned.runs)} models, {planned.at_once} at once{waves}{takes}")
    return planned, partial(_planned_again, {spec.name: spec for spec in todo}, by_name, pace)


def _planned_again(
    asked: Mapping[str, RunSpec], durations: Mapping[str, float], pace: Pace, runs: Sequence[RunSpec], slots: int
) -> Sequence[RunSpec]:
    """The order, and the workers, of runs that have not begun, on a cluster that holds so many workers now."""
    own = [asked[spec.name] for spec in runs]  # with the workers that their placement has
    return plan.for_slots(own, slots, [durations[spec.name] for spec in runs], pace).order


def _train(
    session: Session, planned: Plan, board: Board, parent: str | None, tail: Tail | None, replan: Replan
) -> dict[str, Ended]:
    def on_change(spec: RunSpec, status: RunStatus, message: str) -> None:
        board.change(spec, status, message)
        if status in _STATUS:
            session.closing(session.run_key(spec, parent), _STATUS[status])
        if message:
            session.say(f"{spec.name}: {status}: {message}")

    first = planned.order[0]
    warnings = (
        first.moved,
        preflight.mixing(first.destination.data, session.manifest, first.recipe),
        preflight.unguarded(first.destination),
    )
    for warning in filter(None, warnings):
        session.say(f"warning: {warning}")
    # A run alone takes what nodes there are by itself.
    look = looking(cluster.capacity, first.placement, session.gpus) if len(planned.runs) > 1 else None

    def on_capacity(before: int, now: int) -> None:
        session.say(f"the cluster holds {now} workers now, {before} before")

    with Supply(planned.slots, look, on_capacity) as supply, Progress(board, lambda: supply.slots, session.console):
        return supervise(
            planned,
            lambda spec: session.train(spec, parent),
            on_change,
            session.interruption.event,
            supply,
            tail,
            replan,
        )
