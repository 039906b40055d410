"""The jobs about ensembles: train one, evaluate one that is trained."""

from __future__ import annotations

from orchestrator.config.errors import ConfigError
from orchestrator.ensemble import aggregate, members, results, stored
from orchestrator.ensemble.aggregate import EnsembleResult, Task
from orchestrator.ensemble.config import Evaluate, TrainEnsemble
from orchestrator.fleet import dryrun
from orchestrator.launch import preflight
from orchestrator.launch.command import FAILED, console, starting_recipe
from orchestrator.launch.session import Session, opened


def train_ensemble(config: TrainEnsemble) -> int:
    """Train, score and record the ensemble; the exit status."""
    screen = console()
    recipes = members.recipes(starting_recipe(config), config.ensemble)
    destination = config.destination.resolved()
    # What was asked is checked before anything is started.
    included = stored.runs(destination.storage, config.include, "include").runs
    if config.dry_run:
        dryrun.show(config, [*recipes, *(spec.recipe for spec in included)], config.plan, screen)
        preflight.check_places(config.destination, recipes, config.placement.workers)
        return 0
    with opened(config.destination, config.placement, screen) as session:
        digest = session.manifest.digest()
        runs = [config.spec(recipe, session.destination, digest) for recipe in recipes]
        preflight.check_trainable(session.manifest, session.destination.data, recipes, config.placement.workers)
        taken = [stored.placed(session, spec, "include") for spec in included]
        if twice := {spec.name for spec in runs} & {spec.name for spec in taken}:
            raise ConfigError(f"include: {min(twice)}: is a member already; leave it out")
        result = aggregate.run(session, Task((*runs, *taken), config.reporting, plan=config.plan))
        return _conclude(session, result, config.reporting.allow_partial)


def evaluate(config: Evaluate) -> int:
    """Score finished runs, or the members of ensembles, as one ensemble; the exit status."""
    if not config.runs:
        raise ConfigError("runs: give the name of at least one finished run or ensemble")
    storage, partial = config.places.resolved().storage, config.reporting.allow_partial
    found = stored.runs(storage, config.runs, "runs", config.members, partial)
    screen = console()
    for name in found.unfinished:
        screen.print(f"{name}: is not trained to its end: left out", highlight=False, soft_wrap=True)
    if config.dry_run:
        for spec in found.runs:
            screen.print(f"{spec.name}: {spec.folder}", highlight=False, soft_wrap=True)
        preflight.check_places(stored.data_of(found.runs, config.destination))
        return 0
    with opened(stored.data_of(found.runs, config.destination), config.placement, screen) as session:
        runs = tuple(stored.placed(session, spec, "runs", other_data=True) for spec in found.runs)
        digest = session.manifest.digest()
        other_data = digest if any(spec.dataset_digest != digest for spec in runs) else ""
        if other_data:
            if config.reporting.registered:
                raise ConfigError("registered: needs the dataset that the runs were trained on; leave out --data")
            session.say(f"scoring on another dataset than the runs were trained on: {session.manifest.name} {digest}")
        task = Task(
            runs, config.reporting, config.kind, left_out=len(found.unfinished), trains=False, other_data=other_data
        )
        result = aggregate.run(session, task)
        return _conclude(session, result, config.reporting.allow_partial)


def _conclude(session: Session, result: EnsembleResult, allow_partial: bool) -> int:
    if session.interruption.event.is_set():
        session.say("stopped; the same command goes on where it was")
        return session.interruption.exit_status
    if result.table is not None:
        session.say("")
        session.say(results.text(result.table))
        members_scored = f"{result.finished} of {result.members} models"
        session.say(f"{members_scored}, {result.table.images} images; 1 model: the mean over the single models")
        if result.table.bad_images:
            session.say(f"{result.table.bad_images} images could not be decoded and are not counted")
        if result.table.unlabelled:
            session.say(f"{result.table.unlabelled} images have no label: they are scored, and not counted")
        if not result.table.of_ilsvrc:
            session.say(results.PAPERS)
        session.say(f"report:  {result.report}")
    session.tell_places(result.folder, result.key)
    if not result.whole:
        session.say(f"PARTIAL: {result.finished} of {result.members} models finished")
        return 0 if allow_partial and result.table is not None else FAILED
    return 0
