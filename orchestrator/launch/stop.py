"""Stop runs and ensembles from any machine that sees their storage, by the stop flags of their leases. Needs no Ray."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console

from orchestrator.config.errors import ConfigError
from orchestrator.launch import holder, named
from orchestrator.launch.holder import Holder
from orchestrator.launch.lease import STALE_SECONDS
from orchestrator.launch.named import Named
from orchestrator.launch.screen import FAILED
from orchestrator.storage import files
from orchestrator.training import attempts
from orchestrator.training.job import outcome_of

POLL_SECONDS = 0.5
NO_CHECKPOINT = json.dumps({"save": False}).encode()


@dataclass
class _Awaited:
    """A lease whose release is waited for."""

    one: Named
    folder: str
    held: Holder
    heard: float = field(default_factory=time.monotonic)  # when its heartbeat was last seen to change

    def over(self) -> str | None:
        """How it ended; None while its owner is at it. A failed query ends nothing."""
        try:
            now = holder.look(self.folder)
        except OSError:
            self.heard = time.monotonic()  # not to know is not to be dead
            return None
        if now is None or now.number != self.held.number:
            return "another driver has taken it over since" if now else "its lease is gone"
        if now.released:
            return "ended"
        if now.beat != self.held.beat:
            self.held, self.heard = now, time.monotonic()
        if now.gone:
            return f"its driver died without releasing its lease ({now.owner})"
        if time.monotonic() - self.heard > STALE_SECONDS:
            return f"its owner has not been heard of for {STALE_SECONDS:g} s and counts as gone ({now.owner})"
        return None


def run(names: Sequence[str], storage: str, save: bool, wait: float, screen: Console) -> int:
    """Stop runs and ensembles; the exit status: 0 when nobody runs any of them, 1 when one still runs after `wait`.

    names: of runs or ensembles in `storage` (empty: the default one), or URLs of their folders. save: with a
    checkpoint. wait: seconds until they have to be stopped; 0 to ask only. Raises ConfigError when one is unknown.
    """
    if not names:
        raise ConfigError("runs: give the name of at least one run or ensemble, or the URL of its folder")
    found = named.find(names, storage)  # all of them, before one is stopped
    awaited = {one.name: _asked(one, save, screen) for one in found}
    deadline = time.monotonic() + wait
    if wait and any(awaited.values()):
        with screen.status("waiting for them to save and end" if save else "waiting for them to end"):
            _wait(awaited, deadline, screen)
    for name, left in awaited.items():
        if left and wait:
            _say(
                screen,
                f"{name}: still run by {left[0].held.owner} after {wait:g} s: it was asked and will stop when it can; "
                "wait longer with --wait, or end that process",
            )
        elif left:
            _say(screen, f"{name}: asked to stop; not waited for")
    return FAILED if wait and any(awaited.values()) else 0


def _asked(one: Named, save: bool, screen: Console) -> list[_Awaited]:
    """Ask all who run it to stop; whom to wait for."""
    asked = []
    # Members first: what is said to the ensemble is said again to them by its driver, and the first word counts.
    for folder in reversed(one.folders):
        held = holder.look(folder)
        if held is None or held.released:
            continue
        files.write_bytes(held.stop_flag, b"" if save else NO_CHECKPOINT)
        asked.append(_Awaited(one, folder, held))
    if not asked:
        _say(screen, f"{one.name}: nobody runs it; {_stand(one)}")
        return []
    asked.reverse()
    held = asked[0].held
    heard = "" if math.isnan(held.age) else f", last heard of {held.age:.0f} s ago"
    _say(screen, f"{one.name}: run by {held.owner}{heard}: asked to stop")
    return asked


def _wait(awaited: dict[str, list[_Awaited]], deadline: float, screen: Console) -> None:
    """Until all have ended, or the deadline (monotonic seconds); tells each end."""
    while True:
        for name, left in awaited.items():
            for each in list(left):
                if (how := each.over()) is None:
                    continue
                left.remove(each)
                if not left:
                    _say(screen, f"{name}: {how}; {_stand(each.one)}")
        if not any(awaited.values()) or time.monotonic() >= deadline:
            return
        time.sleep(POLL_SECONDS)


def _stand(one: Named) -> str:
    """Where something stands that nobody runs."""
    if one.trouble:
        return f"whether its members run is not known: {one.trouble}"
    if one.members is not None:
        return "the same command goes on with it, if there is anything left to do"
    status = _status(one.folder)
    if status == "finished":
        return "it is finished"
    ended = f"its last attempt ended as {status!r}; " if status else ""
    return f"{ended}{_progress(one.folder)}the same command goes on with it"


def _progress(folder: str) -> str:
    newest = next(iter(attempts.committed(folder)), None)
    return f"its newest checkpoint is at {newest.samples} samples; " if newest is not None else ""


def _status(folder: str) -> str:
    return str(files.read_record(outcome_of(folder)).get("status", ""))


def _say(screen: Console, text: str) -> None:
    screen.print(text, highlight=False, soft_wrap=True, markup=False)
