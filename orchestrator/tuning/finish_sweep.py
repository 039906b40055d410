"""The results of a sweep: the ranking and its report, the winner as a recipe file, the sweep's run in the tracker."""

from __future__ import annotations

import hashlib
import itertools
import math
import subprocess
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

from orchestrator.config import redaction
from orchestrator.config.errors import format_command
from orchestrator.config.overrides import apply_overrides
from orchestrator.ray_backend.run_lookup import SWEEP_FILE
from orchestrator.ray_backend.run_spec import RunSpec, choose_default_data
from orchestrator.ray_backend.session import Session
from orchestrator.recipe.config import Recipe, pin_code
from orchestrator.recipe.recipe_file import Provenance, RecipeFile
from orchestrator.scheduler import multi_run
from orchestrator.storage import file_io, urls
from orchestrator.tracking.tracker import MetricPoint, Tracker, log_run_folder
from orchestrator.tuning import ranking, sweep_report
from orchestrator.tuning.ranking import SeedComparison
from orchestrator.tuning.run_sweep import SweepPlan, SweepResult
from orchestrator.tuning.sweep_report import SweepReport
from orchestrator.tuning.trial import Trial

WINNER_FILE = "winner.json"
MAX_SHOWN_ROWS = 10  # of the ranking on the screen; the report has all rows
REPO_ROOT = Path(__file__).resolve().parents[2]
GIT_SECONDS = 10.0
PREVIEW_TRIALS = 5  # in a dry run


def rank_and_publish(session: Session, explored: SweepResult) -> tuple[Trial | None, list[str]]:
    """Rank the trials, repeat the winner if requested, write the report and the winner's recipe.

    Return the winner, if any, and the lines to print.
    """
    job, metric = explored.plan.job, explored.plan.metric
    best = ranking.find_winner(explored.trials, metric)
    ranked = ranking.rank_trials(explored.trials, metric)
    lines = ["", ranking.render_text(ranked, metric, MAX_SHOWN_ROWS)]
    if len(ranked) > MAX_SHOWN_ROWS:
        lines.append(f"and {len(ranked) - MAX_SHOWN_ROWS} more, in the report")
    lines.append(describe_spent(explored))
    noise = None
    if best is not None and job.repeats > 0:
        noise = _measure_seed_noise(session, explored, best)
        if session.interruption.event.is_set():
            return best, lines
        lines.append(noise.verdict)
    if best is not None:
        winner = _build_winner_file(session, explored, best, noise)
        url = file_io.join(explored.folder, WINNER_FILE)
        file_io.write_bytes(url, winner.to_json().encode())
        flags = session.destination.to_flags(choose_default_data(winner))
        if job.weights:
            flags += ["--weights", redaction.redact(urls.require_absolute(job.weights, "weights"))]
        lines.append(f"winner:  {best.name}; {format_command('train-ensemble', [redaction.redact(url), *flags])}")
    about = _describe_sweep(session, explored)
    SweepReport(about, explored.trials, metric, explored.plan.base, noise).write(explored.folder)
    lines.append(f"report:  {redaction.redact(file_io.join(explored.folder, sweep_report.HTML_FILE))}")
    session.recorder.replayer.submit(partial(_log_ranking, session, explored, best), required_key=explored.key)
    return best, lines


def describe_spent(explored: SweepResult) -> str:
    """Return how much was trained, and which flag a sweep that used up its budget needs for more."""
    trials, plan = explored.trials, explored.plan
    left, most, rest = sum(not trial.is_terminal for trial in trials), plan.job.budget.trials, ""
    if left and explored.stop_reason:
        rest = f"; {left} can resume: {explored.stop_reason}"
    elif not left and len(trials) >= most:
        rest = f"; --budget.trials {most} is used up; set a larger one to try what is left of the space"
    trained = sum(trial.trained_epochs for trial in trials)
    share = f"{100 * trained / max(1, plan.base.epochs * len(trials)):.0f}%"
    return f"{len(trials)} trials, {trained} epochs: {share} of what all of them whole would take{rest}"


def _measure_seed_noise(session: Session, explored: SweepResult, best: Trial) -> SeedComparison:
    """Train preset and winner again, all epochs, with other seeds (the initial weights' included), and compare."""
    plan, repeats = explored.plan, explored.plan.job.repeats

    def make_specs(recipe: Recipe, label: str) -> list[RunSpec]:
        specs = []
        for number in range(1, repeats + 1):
            seeds = recipe.seeds.model_copy(update={kind: value + number for kind, value in recipe.seeds})
            name = f"{plan.base.name}-{label}-r{number}"
            reseeded = pin_code(recipe.model_copy(update={"name": name, "seeds": seeds}))
            specs.append(plan.make_spec(session, explored.folder, reseeded))
        return specs

    base_specs, best_specs = make_specs(plan.base, "preset"), make_specs(best.recipe, "winner")
    session.print_line(f"repeats: preset and winner {best.name}, {repeats} seeds each")
    trained = multi_run.train_runs(session, [*base_specs, *best_specs], explored.key)

    def get_scores(specs: Sequence[RunSpec]) -> list[float]:
        outcomes = [trained.results[spec.name].outcome for spec in specs]
        scores = [None if outcome is None else plan.metric.find_score(outcome.metrics) for outcome in outcomes]
        return [math.nan if score is None else score for score in scores]  # NaN: a lost run

    return ranking.compare_seeds(get_scores(base_specs), get_scores(best_specs), plan.metric)


def _build_winner_file(
    session: Session, explored: SweepResult, best: Trial, noise: SeedComparison | None
) -> RecipeFile:
    plan = explored.plan
    return RecipeFile(
        recipe=best.recipe.model_copy(update={"name": f"{plan.base.name}-tuned"}),
        provenance=Provenance(
            sweep=plan.name,
            trial=best.name,
            assignment=dict(best.assignment),
            base=plan.base.name,
            seed=plan.job.search.seed,
            dataset=session.manifest.name,
            dataset_digest=plan.dataset_digest,
            metric=plan.job.search.metric,
            score=best.get_score(plan.metric),
            commit=get_code_version(),
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            repeats=noise.verdict if noise is not None else "",
        ),
    )


def _describe_sweep(session: Session, explored: SweepResult) -> dict[str, object]:
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


def _log_ranking(session: Session, explored: SweepResult, best: Trial | None, tracker: Tracker) -> None:
    run_id, metric = session.recorder.replayer.wait_for_run_id(explored.key, 0.0), explored.plan.metric
    step = sum(trial.trained_epochs for trial in explored.trials)  # a resumed sweep has a later one
    points = {"sweep/trials": float(len(explored.trials)), "sweep/epochs": float(step)}
    if best is not None:
        points[f"sweep/best_{metric.name}"] = best.get_score(metric) or 0.0
    tracker.log_metrics(run_id, [MetricPoint(name, value, step, time.time()) for name, value in points.items()])
    ranked = ranking.rank_trials(explored.trials, metric)
    head, rows = ranking.build_columns(ranked, metric)
    tracker.log_table(run_id, "ranking.json", {name: [row[column] for row in rows] for column, name in enumerate(head)})
    tracker.set_tags(run_id, {"mlflow.note.content": ranking.render_markdown(ranked, metric, MAX_SHOWN_ROWS)})
    files = [sweep_report.HTML_FILE, sweep_report.MARKDOWN_FILE, SWEEP_FILE, *([WINNER_FILE] if best else [])]
    log_run_folder(tracker, run_id, explored.folder, files)


def format_plan(plan: SweepPlan) -> list[str]:
    """Return the lines of a dry run."""
    job, search, epochs = plan.job, plan.job.search, plan.base.epochs
    sampler = plan.make_sampler()
    trials: list[Trial] = []
    while len(trials) < min(PREVIEW_TRIALS, job.budget.trials):
        assignment = sampler.suggest(trials)
        if assignment is None:
            break
        trials.append(Trial(len(trials) + 1, assignment, apply_overrides(plan.base, assignment)))
    lines = [
        f"preset:    {job.recipe.name}, {epochs} epochs a trial",
        f"space:     {search.space}: {', '.join(plan.space.dimensions)}",
        f"trials:    at most {job.budget.trials}, chosen by {search.sampler} (seed {search.seed})",
        f"scheduler: {search.scheduler}"
        + (f", rungs at epochs {_list_rungs(plan)}" if search.scheduler == "asha" else ""),
        f"budget:    at most {job.budget.trials * epochs} epochs"
        + (f", {job.budget.epochs:g} in all" if job.budget.epochs else "")
        + (f", {job.budget.hours:g} hours" if job.budget.hours else ""),
        f"each:      {job.placement.workers} worker(s) of {job.placement.cpus_per_worker} CPU",
        "first trials:",
    ]
    return lines + [f"  {trial.name}: {dict(trial.assignment)}" for trial in trials]


def _list_rungs(plan: SweepPlan) -> list[int]:
    grace, reduction = plan.job.search.get_grace_epochs(plan.base), plan.job.search.reduction
    rungs = (math.ceil(grace * reduction**number) for number in itertools.count())
    return list(itertools.takewhile(lambda rung: rung < plan.base.epochs, rungs))


def get_code_version(root: Path = REPO_ROOT) -> str:
    """Return the commit of a checkout, else `sha256:` and a digest of the package's sources.

    A submitted job runs from a copy without history (.rayignore). The commit has a mark when files differ from it.
    """
    if not (root / ".git").exists():  # git would search the folders above
        return compute_source_digest(root)
    run = partial(subprocess.check_output, cwd=root, stderr=subprocess.DEVNULL, text=True, timeout=GIT_SECONDS)
    try:
        commit = run(["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=, changed"]).strip()
    except (OSError, subprocess.SubprocessError):
        return compute_source_digest(root)
    return f"{commit}: {compute_source_digest(root)}" if commit.endswith(", changed") else commit


def compute_source_digest(root: Path = REPO_ROOT) -> str:
    """Return a digest of the names and contents of the package's Python files."""
    digest, package = hashlib.sha256(), root / "orchestrator"
    for path in sorted(package.rglob("*.py"), key=lambda path: path.relative_to(package).as_posix()):
        text = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(text)}\n".encode() + text)
    return f"sha256:{digest.hexdigest()}"
