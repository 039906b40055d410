"""Train several runs in a session: plan, supervise, show, record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.fleet.board import Board
from orchestrator.fleet.plan import Plan, plan
from orchestrator.fleet.progress import Progress
from orchestrator.fleet.supervisor import Ended, RunStatus, supervise
from orchestrator.launch import preflight
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


def train(session: Session, specs: Sequence[RunSpec], parent: str | None = None) -> FleetResult:
    """Train every run that is not finished; each is recorded under the run of key `parent`.

    Returns when all ended, however they did. A run's failure is in the result, never raised.
    """
    done = {spec.name: outcome for spec in specs if (outcome := finished(spec.folder)) is not None}
    todo = [spec for spec in specs if spec.name not in done]
    board = Board(specs)
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
        ended |= _train(session, plan(todo, session.capacity, session.gpus), board, parent)
    return FleetResult({spec.name: ended[spec.name] for spec in specs}, board)


def _train(session: Session, planned: Plan, board: Board, parent: str | None) -> dict[str, Ended]:
    def on_change(spec: RunSpec, status: RunStatus, message: str) -> None:
        board.change(spec, status, message)
        if status in _STATUS:
            session.closing(session.key(spec.name, parent or ""), _STATUS[status])
        if message:
            session.say(f"{spec.name}: {status}: {message}")

    first = planned.order[0]
    if (warning := preflight.mixing(first.destination.data, session.manifest, first.recipe)) is not None:
        session.say(f"warning: {warning}")
    session.say(f"training {len(planned.order)} models, {planned.at_once} at once")
    with Progress(board, planned.at_once, session.console):
        return supervise(planned, lambda spec: session.train(spec, parent), on_change, session.interruption.event)
