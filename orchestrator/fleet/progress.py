"""What people see while a fleet runs: a live table in a terminal, a line per epoch in a log."""

from __future__ import annotations

import math
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from orchestrator.fleet.board import Board, Row
from orchestrator.fleet.figures import duration, moment, of_epoch, shown
from orchestrator.fleet.shown import Shown
from orchestrator.launch.environment import submission_id
from orchestrator.tracking.events import Event


class Progress(Shown):
    """Shows a board in the background while its `with` block runs."""

    def __init__(self, board: Board, slots: Callable[[], int], console: Console) -> None:
        """slots: workers that the cluster holds now."""
        super().__init__(console, "progress")
        self._board, self._slots = board, slots
        self._told_waiting: set[str] = set()

    def last(self) -> None:
        """The table as it stands at the end."""
        self._console.print(self.table())

    def table(self) -> Table:
        """The board as a table that fits 100 columns."""
        table = Table(title=self._headline(), title_justify="left", box=None, pad_edge=False)
        columns = ("model", "state", "epoch", "loss", "top-1 %", "top-5 %", "images/s", "restarts")
        for name in columns:
            table.add_column(name, justify="left" if name in ("model", "state") else "right", no_wrap=True)
        for row in self._board.rows.values():
            table.add_row(*_cells(row))
        return table

    def _headline(self) -> str:
        """How far all runs together are."""
        rows = self._board.rows.values()
        placement = next(iter(rows)).spec.placement
        most = placement.at_once or len(rows)
        at_once = max(1, min(self._slots() // placement.least, most, len(rows)))
        ended = sum(row.status not in ("waiting", "running") for row in rows)
        waves = math.ceil(len(rows) / at_once)
        training, scoring = self._board.eta_seconds(self._slots()), self._board.scoring_seconds(self._slots())
        eta = _whole(training, scoring)
        scores = f", scoring up to {duration(scoring)} of it" if scoring else ""
        wave = f"wave {min(waves, ended // at_once + 1)} of {waves}, " if waves > 1 else ""
        return f"{wave}{at_once} at once, {duration(eta)} left{scores}, done at about {moment(eta)}"

    def _all_done(self) -> str:
        """When everything is done."""
        training, scoring = self._board.eta_seconds(self._slots()), self._board.scoring_seconds(self._slots())
        if scoring == 0:
            return f"all done in about {duration(training)}, at {moment(training)}"
        whole = _whole(training, scoring)
        return (
            f"all trained in about {duration(training)}, at {moment(training)}, and scored up to {duration(scoring)} "
            f"later, at {moment(whole)}"
        )

    def show(self) -> None:
        """The table, or a line for each event since the last look."""
        news = self._board.poll()
        if self._live is not None:
            for row, event in news:
                if event.kind == "weights":
                    self._console.print(f"{row.spec.name}: {_line(row, event)}", highlight=False, markup=False)
            self._live.update(self.table(), refresh=True)
            return
        for row in self._board.rows.values():
            if row.state == "WAITING" and row.spec.name not in self._told_waiting:
                self._told_waiting.add(row.spec.name)
                own = ", or this job's own --entrypoint-num-cpus or -gpus hold them" if submission_id() else ""
                text = f"{row.spec.name}: WAITING for workers: others use the cluster, or it lost nodes{own}"
                self._console.print(text, highlight=False, markup=False)
        for row, event in news:
            if (line := _line(row, event)) is not None:
                done = self._all_done()
                self._console.print(f"{row.spec.name}: {line}, {done}", highlight=False, markup=False)


def _whole(training: float | None, scoring: float | None) -> float | None:
    return None if training is None or scoring is None else training + scoring


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.spec.recipe.name,
        row.state,
        f"{row.figures.epoch}/{row.spec.recipe.epochs}",
        shown(row.figures.loss, ".3f"),
        shown(row.figures.top1_error, ".2f"),
        shown(row.figures.top5_error, ".2f"),
        shown(row.figures.images_per_second, ".0f"),
        str(row.restarts),
    )


def _line(row: Row, event: Event) -> str | None:
    if event.kind == "epoch":
        at = of_epoch(event)
        return (
            f"epoch {at.epoch}/{row.spec.recipe.epochs}, loss {shown(at.loss, '.3f')}, "
            f"top-1 error {shown(at.top1_error, '.2f')}%, {shown(at.images_per_second, '.0f')} images/s"
        )
    if event.kind == "incident":
        return f"RESTARTED: {event.values.get('cause')}; {event.values.get('samples_replayed')} samples to replay"
    if event.kind == "weights":
        return str(event.values.get("loaded"))
    if event.kind == "started" and event.values.get("resumed"):
        return f"resumed after {event.samples} samples"
    return None
