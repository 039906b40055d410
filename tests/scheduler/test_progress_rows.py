"""What people see of a fleet in a log."""

import io
from pathlib import Path

from rich.console import Console

from orchestrator.scheduler.progress import ProgressMonitor, ProgressTable
from tests.support import launched
from tests.support.launched import write_journal


def test_causes_are_shown_as_they_are_whatever_brackets_they_have(tmp_path: Path) -> None:
    """Tracebacks of native code hold paths in brackets, which a console may read as closing tags."""
    cause = "rank 1: RuntimeError: [/__w/gloo/pair.cc:547] Connection closed by peer [127.0.0.1]:2024"
    spec = launched.spec(storage=str(tmp_path))
    board, screen = ProgressMonitor([spec]), io.StringIO()
    board.update_phase(spec, "running", "")
    with ProgressTable(board, lambda: 1, Console(file=screen, width=300)):
        write_journal(spec.folder, 1, [("incident", 8, {"cause": cause, "samples_replayed": 8})])
    assert cause in screen.getvalue()
