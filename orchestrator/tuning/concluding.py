"""What a sweep leaves behind: a ranking with its report, the winner as a recipe in a file, its run in the tracker."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

from orchestrator.fleet import fleet
from orchestrator.launch import artifacts
from orchestrator.launch.config import Destination, RunSpec, data_of, job_command
from orchestrator.launch.named import SWEEP
from orchestrator.launch.session import Session
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.frozen import Frozen, Provenance
from orchestrator.storage import files, urls
from orchestrator.tracking.tracker import Point, Tracker
from orchestrator.tuning import ranking, report, source
from orchestrator.tuning.config import TuneJob
from orchestrator.tuning.explore import Explored, unfinished
from orchestrator.tuning.ranking import Noise
from orchestrator.tuning.samplers import Sampler
from orchestrator.tuning.space import Space, grid, recipe_of
from orchestrator.tuning.trials import Epoch, Trial

WINNER = "winner.json"
SHOWN = 10  # rows of the ranking on the screen; the report has all
PREVIEWED = 5  # trials of a plan


@dataclass(frozen=True)
class Concluded:
    """What to tell."""

    winner: Trial | None
    lines: tuple[str, ...]


def conclude(session: Session, explored: Explored) -> Concluded:
    """Rank, repeat if that was asked for, report, hand over."""
    job, metric = explored.plan.job, explored.plan.job.search.metric
    best = ranking.winner(explored.trials, metric)
    ranked = ranking.rank(explored.trials, metric)
    lines = ["", ranking.text(ranked[:SHOWN], metric)]
    if len(ranked) > SHOWN:
        lines.append(f"and {len(ranked) - SHOWN} more, in the report")
    lines.append(describe_spent(explored))
    noise = None
    if best is not None and job.repeats > 0:
        noise = _noise(session, explored, best)
        if session.interruption.event.is_set():
            return Concluded(best, tuple(lines))
        lines.append(noise.verdict)
    if best is not None:
        frozen = _frozen(session, explored, best, noise)
        url = files.join(explored.folder, WINNER)
        files.write_bytes(url, frozen.to_json().encode())
        lines.append(f"winner:  {best.name}; {next_command(session.destination, job.weights, frozen, url)}")
    report.write(explored.folder, _about(session, explored, best), explored.trials, metric, explored.plan.base, noise)
    lines.append(f"report:  {urls.redact(files.join(explored.folder, report.HTML))}")
    session.replayer.submit(partial(_log, session, explored, best), needs=explored.key)
    return Concluded(best, tuple(lines))


def next_command(destination: Destination, weights: str, winner: Frozen, url: str) -> str:
    """Return the command that trains the winner at `url` as an ensemble, on the data that it was tuned on."""
    flags = destination.flags(data_of(winner))
    if weights:
        flags += ["--weights", urls.redact(urls.absolute(weights, "weights"))]
    return job_command("train_ensemble.py", [urls.redact(url), *flags])


def describe_spent(explored: Explored) -> str:
    """Return how much was trained, and which flag a sweep that used up its budget needs for more."""
    trials, epochs = explored.trials, explored.plan.base.epochs
    trained = sum(trial.own_epochs for trial in trials)
    left = unfinished(trials)
    rest = f"; {len(left)} can resume: {explored.enough}" if left and explored.enough else ""
    if not left and _has_more(explored):
        rest = f"; --budget.trials {explored.plan.job.budget.trials} is used up; set a larger one to try more"
    share = f"{100 * trained / max(1, epochs * len(trials)):.0f}%"
    return f"{len(trials)} trials, {trained} epochs: {share} of what all of them whole would take{rest}"


def _has_more(explored: Explored) -> bool:
    """Return whether a larger budget of trials would try more; a population keeps its size."""
    plan, search, most = explored.plan, explored.plan.job.search, explored.plan.job.budget.trials
    if search.scheduler == "pbt" or len(explored.trials) < most:
        return False
    return search.sampler != "grid" or len(grid(plan.space, plan.base)) > most


def _noise(session: Session, explored: Explored, best: Trial) -> Noise:
    """Train preset and winner anew with other seeds, whole, and compare."""
    plan, job = explored.plan, explored.plan.job
    destination = session.destination.model_copy(update={"storage": explored.folder})

    def specs(recipe: Recipe, kind: str) -> list[RunSpec]:
        return [
            RunSpec(
                recipe=_reseeded(recipe, f"{plan.base.name}-{kind}-r{number}", number),
                placement=job.placement,
                destination=destination,
                cadence=job.cadence,
                dataset_digest=plan.dataset_digest,
                weights=job.weights and urls.absolute(job.weights, "weights"),
            )
            for number in range(1, job.repeats + 1)
        ]

    of_base, of_best = specs(plan.base, "preset"), specs(best.recipe, "winner")
    session.say(f"repeats: preset and winner {best.name}, {job.repeats} seeds each")
    trained = fleet.train(session, [*of_base, *of_best], explored.key)

    def scores(of: Sequence[RunSpec]) -> list[float]:
        outcomes = [trained.ended[spec.name].outcome for spec in of]
        found = [Epoch(1, one.metrics if one is not None else {}, 0.0).score(job.search.metric) for one in outcomes]
        return [math.nan if score is None else score for score in found]  # a lost one is counted as such

    return ranking.noise(scores(of_base), scores(of_best))


def _reseeded(recipe: Recipe, name: str, number: int) -> Recipe:
    """The recipe with seeds of its own: all of them, the initial weights' too."""
    seeds = recipe.seeds.model_copy(update={kind: value + number for kind, value in recipe.seeds})
    return recipe.model_copy(update={"name": name, "seeds": seeds})


def _frozen(session: Session, explored: Explored, best: Trial, noise: Noise | None) -> Frozen:
    plan = explored.plan
    recipe = best.recipe.model_copy(update={"name": f"{plan.base.name}-tuned"})
    return Frozen(
        recipe=recipe,
        provenance=Provenance(
            sweep=plan.name,
            trial=best.name,
            assignment=dict(best.assignment),
            base=plan.base.name,
            seed=plan.job.search.seed,
            dataset=session.manifest.name,
            dataset_digest=plan.dataset_digest,
            metric=plan.job.search.metric,
            score=best.score(plan.job.search.metric),
            commit=source.version(),
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            repeats=noise.verdict if noise is not None else "",
        ),
    )


def _about(session: Session, explored: Explored, best: Trial | None) -> dict[str, object]:
    plan, job = explored.plan, explored.plan.job
    return {
        "sweep": plan.name,
        "preset": plan.base.name,
        "dataset": f"{session.manifest.name} {plan.dataset_digest}",
        "space": job.search.space,
        "sampler": job.search.sampler,
        "scheduler": job.search.scheduler,
        "budget_trials": job.budget.trials,
        "budget_epochs": job.budget.epochs,
        "budget_seconds": None if job.budget.hours is None else 3600 * job.budget.hours,
        "seed": job.search.seed,
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "versions": {name: version(name) for name in ("googlenet-orchestrator", "ray", "optuna")},
    }


def _log(session: Session, explored: Explored, best: Trial | None, tracker: Tracker) -> None:
    """The ranking in the tracker: as metrics, as a table, as text, as pictures."""
    run_id, metric = session.replayer.run_id(explored.key, 0.0), explored.plan.job.search.metric
    now, score = time.time(), best.score(metric) if best is not None else None
    points = {"sweep/trials": float(len(explored.trials))}
    points["sweep/epochs"] = float(sum(trial.own_epochs for trial in explored.trials))
    if score is not None:
        points[f"sweep/best_{metric}"] = score
    step = int(points["sweep/epochs"])  # a sweep that goes on has a later one
    tracker.log(run_id, [Point(name, value, step, now) for name, value in points.items()])
    ranked = ranking.rank(explored.trials, metric)
    head, rows = ranking.columns(ranked, metric)
    tracker.log_table(run_id, "ranking.json", {name: [row[at] for row in rows] for at, name in enumerate(head)})
    tracker.set_tags(run_id, {"mlflow.note.content": ranking.markdown(ranked[:SHOWN], metric)})
    texts = [report.HTML, report.MARKDOWN, SWEEP, *([WINNER] if best is not None else [])]
    artifacts.log(tracker, run_id, explored.folder, texts)


def plan_lines(job: TuneJob, space: Space, sampler: Sampler) -> list[str]:
    """What a sweep would do, in lines."""
    search, epochs = job.search, job.recipe.epochs
    trials: list[Trial] = []
    while len(trials) < min(PREVIEWED, job.budget.trials):
        assignment = sampler.suggest(trials)
        if assignment is None:
            break
        trials.append(Trial(len(trials) + 1, assignment, recipe_of(job.recipe, assignment)))
    most = job.budget.trials * epochs
    lines = [
        f"preset:    {job.recipe.name}, {epochs} epochs a trial",
        f"space:     {search.space}: {', '.join(space.dimensions)}",
        f"trials:    at most {job.budget.trials}, chosen by {search.sampler} (seed {search.seed})",
        f"scheduler: {search.scheduler}" + (f", rungs at epochs {job.rungs}" if search.scheduler == "asha" else ""),
        f"budget:    at most {most} epochs"
        + (f", {job.budget.epochs:g} in all" if job.budget.epochs else "")
        + (f", {job.budget.hours:g} hours" if job.budget.hours else ""),
        f"each:      {job.placement.workers} worker(s) of {job.placement.cpus_per_worker} CPU",
        "first trials:",
    ]
    return lines + [f"  {trial.name}: {dict(trial.assignment)}" for trial in trials]
