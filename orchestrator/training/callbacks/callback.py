"""The base class of callbacks, and the errors of the user's own.

The trainer calls the callbacks of every rank in this order: watchdog, stop monitor, profiler, checkpointer, best
checkpoint, the user's own as listed, journal logger, which so records metrics that a user's callback adds. `on_end`
runs in the reverse order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestrator.config.errors import ConfigError
from orchestrator.config.plugins import create_plugin, format_failure
from orchestrator.training.config import CallbackPlugin

if TYPE_CHECKING:  # trainer imports this module
    from orchestrator.training.config import Outcome
    from orchestrator.training.rank_sync import SyncResult
    from orchestrator.training.trainer import Trainer


class Callback:
    """Hooks of the training loop; each does nothing unless it is overridden.

    A hook runs in the training thread and must not change the weights. A hook that uses collectives must do so on
    every rank. The trainer's attributes that a callback may read are listed in Trainer.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Act before the first step of an attempt, after the state was built or restored; on every rank."""

    def on_step_end(self, trainer: Trainer) -> None:
        """Act after every step; on every rank."""

    def on_sync(self, trainer: Trainer, sync: SyncResult) -> None:
        """Act after the ranks agreed on loss, stop requests and bad samples, every few steps; on every rank."""

    def on_epoch_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Act after an epoch and its validation; on every rank. Metrics that are added on rank 0 are recorded."""

    def on_checkpoint(self, trainer: Trainer) -> None:
        """Act after the state was copied for a checkpoint, which a thread is writing; on rank 0."""

    def on_end(self, trainer: Trainer, outcome: Outcome | None) -> None:
        """Act at the end of an attempt, after its outcome was written; None when an exception ended it."""


class CallbackError(RuntimeError):
    """A user's callback raised; the message is one line with its name and file."""


def create_user_callbacks(plugins: Sequence[CallbackPlugin]) -> list[Callback]:
    """Create the user's callbacks. Raises ConfigError when one cannot be loaded, or is no Callback."""
    callbacks = [create_plugin(plugin.what, plugin.kind, plugin.args) for plugin in plugins]
    for plugin, callback in zip(plugins, callbacks, strict=True):
        if not isinstance(callback, Callback):
            raise ConfigError(
                f"callback {plugin.kind!r} must be a Callback, got {type(callback).__name__}; derive the class from "
                f"{Callback.__module__}.Callback"
            )
    return callbacks


def call_hook(callback: Callback, hook: str, *arguments: object) -> None:
    """Call one hook. Raises CallbackError for what a user's callback raises; errors of built-in ones pass unchanged."""
    try:
        getattr(callback, hook)(*arguments)
    except Exception as error:  # the user's own code may raise anything
        kind = type(callback)
        if kind.__module__.startswith(f"{__name__.partition('.')[0]}."):
            raise
        name = f"{kind.__module__}:{kind.__qualname__}"
        raise CallbackError(f"callback {name} failed in {hook}{format_failure(error)}") from error
