"""Checks of a run after its drill: bits, deliveries, journal, tracker."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mlflow.tracking import MlflowClient

from orchestrator.checkpoint import checkpoint
from orchestrator.checkpoint.checkpoint import FinalWeights
from orchestrator.tracking.events import Event
from orchestrator.training.run_dir import get_final_weights_dir
from tests.drills.faults import Hit
from tests.drills.stage import Run
from tests.support import launched
from tests.support.runs import identical

AUDIT_SECONDS = 120
SHOWN_CHARS = 2000  # of a driver's output, in a problem


@dataclass
class Report:
    """One line of the drills' output."""

    name: str
    seconds: float | None = None  # from the fault to a new step
    replayed: int | None = None  # samples
    problems: list[str] = field(default_factory=list)

    def line(self) -> str:
        """Return "DRILL SECONDS REPLAYED PASS|FAIL", with - for a figure that does not apply."""
        seconds = "-" if self.seconds is None else f"{self.seconds:.1f}"
        replayed = "-" if self.replayed is None else str(self.replayed)
        return f"{self.name} {seconds} {replayed} {'FAIL' if self.problems else 'PASS'}"


def final(run: Run) -> FinalWeights:
    """Return the final weights of a finished run, verified."""
    return checkpoint.load_final_weights(get_final_weights_dir(str(run.folder)))


def recovered(run: Run, hit: Hit, name: str) -> Report:
    """Wait until steps are taken again; report one fault, with a problem for each gap in its incident."""
    step = run.await_steps_after(hit.time)
    report = Report(name, step.time - hit.time)
    incidents = [event for event in run.events("incident") if event.time > hit.time]
    if len(incidents) != hit.incidents:
        report.problems.append(f"{len(incidents)} incidents in the journal, {hit.incidents} expected")
    for incident in incidents:
        report.replayed = (report.replayed or 0) + int(str(incident.values.get("samples_replayed", -1)))
        report.problems += _cause_of(incident)
        passed = str(incident.values.get("checkpoints_passed_over"))
        if hit.caught and Path(hit.caught).name not in passed:
            report.problems.append(f"the half-written {Path(hit.caught).name} is not named as passed over: {passed}")
    return report


def _cause_of(incident: Event) -> list[str]:
    cause = incident.values.get("cause")
    return [] if isinstance(cause, str) and cause.strip() else [f"an incident without a cause: {incident.values}"]


def whole(run: Run, expected: FinalWeights, incidents: int) -> list[str]:
    """Return the problems of a run that must have finished as if undisturbed, with this many incidents."""
    ended = run.ended()
    if ended.status != 0:
        return [f"the driver ended with {ended.status}: {ended.out.strip()[-SHOWN_CHARS:]}"]
    problems = [] if identical(final(run), expected) else ["its final weights are not those of the undisturbed run"]
    events = run.events("incident")
    if len(events) != incidents:
        causes = "; ".join(str(event.values.get("cause")) for event in events)
        problems.append(f"{len(events)} incidents in the journal, {incidents} faults injected: {causes}")
    return [*problems, *audited(run), *tracked(run)]


def audited(run: Run) -> list[str]:
    """Return the problems that the exactly-once audit reports."""
    ended = launched.job("audit.py", run.folder.name, runs=run.storage, seconds=AUDIT_SECONDS)
    return [] if ended.status == 0 else [f"audit.py: {ended.status}: {ended.out[-400:]}{ended.err[-400:]}"]


def tracked(run: Run) -> list[str]:
    """Return the problems in MLflow: the run must be there once, FINISHED."""
    client = MlflowClient(f"sqlite:///{run.storage / 'mlflow.db'}")
    experiments = [one.experiment_id for one in client.search_experiments()]
    runs = [one for one in client.search_runs(experiments) if one.info.run_name == run.folder.name]
    statuses = [one.info.status for one in runs]
    return [] if statuses == ["FINISHED"] else [f"MLflow has the run as {statuses}, ['FINISHED'] expected"]
