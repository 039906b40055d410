"""Errors of data."""

from __future__ import annotations


class DataError(ValueError):
    """A dataset, shard or index is missing, damaged or unfit; the message names it and the fix."""


class BadSampleError(ValueError):
    """One image cannot be decoded; it gets weight 0 and goes to the ledger."""
