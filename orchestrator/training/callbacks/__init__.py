"""Callbacks of the training loop: checkpoints, journal, watchdog, profiler."""
