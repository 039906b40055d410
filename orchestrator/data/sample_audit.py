"""Proof of what a run was trained on: a sum of hashes of the samples that step() received, compared with the plan.

A sample's hash is mix(key(epoch, step) ^ id), and hashes are added modulo 2^64: the sum over ranks, and over the parts
of an epoch that several attempts trained, is the same for any number of workers and any cut. It is kept with the
weights, so that it rolls back with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field

from orchestrator.config.base import Config
from orchestrator.config.errors import ConfigError
from orchestrator.data import rng
from orchestrator.data.data_errors import DataError
from orchestrator.data.dataset import Sample
from orchestrator.data.sampler import EpochOrder, Int64Array

MIN_BAD_LIMIT = 10  # few broken images are no reason to stop, however small the epoch
CHUNK_POSITIONS = 1 << 17  # that are planned in one call: few calls, little memory
MAX_CHARACTERS = 1000  # of what is kept of a bad sample's key, source or reason
_HASH_PIECES, _PIECE_BITS = 4, 16
_MODULUS = 1 << 64


class BadEntry(Config):
    """A sample that cannot be decoded: it has weight 0."""

    id: int = Field(ge=0, description="whole number in the manifest's order")
    key: str
    source: str
    offset: int = Field(ge=0)
    reason: str


def describe_bad_sample(id: int, sample: Sample, reason: str) -> BadEntry:
    """Return the entry of a sample, its texts bounded and without lone surrogates of names in an unknown encoding."""
    texts = {"key": sample.key, "source": sample.source, "reason": reason}
    printable = {name: text[:MAX_CHARACTERS].encode(errors="backslashreplace").decode() for name, text in texts.items()}
    return BadEntry(id=id, offset=sample.offset, **printable)


class EpochAudit(Config):
    """Samples delivered in one epoch: hash in hexadecimal, number, and the ids of those that had weight 0."""

    epoch: int = Field(ge=0)
    hash: str = Field("0" * 16, pattern="^[0-9a-f]{16}$")
    samples: int = Field(0, ge=0)
    bad: tuple[int, ...] = ()


class AuditRecord(Config):
    """Samples that a run was trained on so far: its epochs in their order, and each bad sample once."""

    epochs: tuple[EpochAudit, ...] = ()
    bad: tuple[BadEntry, ...] = ()

    def get_epoch(self, epoch: int) -> EpochAudit:
        """Return what was delivered of an epoch; nothing when it has not begun."""
        return next((audit for audit in self.epochs if audit.epoch == epoch), EpochAudit(epoch=epoch))

    def add_delivery(self, epoch: int, total: int, samples: int, bad: Sequence[BadEntry]) -> AuditRecord:
        """Return the record after more of an epoch, the last one or the next, was delivered by all ranks together."""
        before = self.get_epoch(epoch)
        after = EpochAudit(
            epoch=epoch,
            hash=_format_hash(int(before.hash, 16) + total),
            samples=before.samples + samples,
            bad=(*before.bad, *(entry.id for entry in bad)),
        )
        others = tuple(audit for audit in self.epochs if audit.epoch != epoch)
        return AuditRecord(epochs=(*others, after), bad=(*self.bad, *self.select_new(bad)))

    def select_new(self, bad: Sequence[BadEntry]) -> list[BadEntry]:
        """Return those that were not found bad in an earlier epoch."""
        known = {entry.id for entry in self.bad}
        return [entry for entry in bad if entry.id not in known]


def parse_record(raw: Any, where: str) -> AuditRecord:
    """Return the record that `to_dict` returned. Raises DataError naming `where` when it is none."""
    try:
        return AuditRecord.from_dict(raw)
    except ConfigError as error:
        raise DataError(f"{where}: no record of what was delivered, or a damaged one: {error}") from None


class DeliveryHash:
    """Samples that one rank received since the last synchronization: a sum of hashes and a number."""

    def __init__(self) -> None:
        self.hash, self.samples = 0, 0

    def add(self, epoch: int, step: int, ids: Int64Array) -> None:
        """Add the rank's samples of a global batch of an epoch (N int64) that step() received."""
        base = np.uint64(rng.derive_key(0, "audit", epoch, step))
        total = rng.mix_bits(ids.view(np.uint64) ^ base).sum(dtype=np.uint64)
        self.hash = (self.hash + int(total)) % _MODULUS
        self.samples += len(ids)


def split_hash(value: int) -> list[float]:
    """Return a 64-bit number in 16-bit pieces, whose float64 sums over up to 2^37 ranks are exact."""
    return [float(value >> _PIECE_BITS * place & 0xFFFF) for place in range(_HASH_PIECES)]


def join_hash(sums: Sequence[float]) -> int:
    """Return the sum modulo 2^64 of the numbers whose pieces were summed."""
    return sum(int(value) << _PIECE_BITS * place for place, value in enumerate(sums)) % _MODULUS


class PlanHash(NamedTuple):
    """Samples of the first steps of an epoch by plan: sum of hashes, number, and how many of them differ."""

    hash: int
    samples: int
    distinct: int


def hash_plan(order: EpochOrder, batch_size: int, steps: int) -> PlanHash:
    """Return the plan of the first `steps` steps of an epoch, computed anew; takes a byte of memory for each sample."""
    delivered = DeliveryHash()
    seen = np.zeros(order.samples, dtype=np.bool_)
    chunk_steps = max(1, CHUNK_POSITIONS // batch_size)
    for first in range(0, steps, chunk_steps):
        past = min(first + chunk_steps, steps)
        ids = order.get_sample_ids(*order.locate(np.arange(first * batch_size, past * batch_size, dtype=np.int64)))
        seen[ids] = True
        for step, batch in enumerate(ids.reshape(-1, batch_size), first):
            delivered.add(order.epoch, step, batch)
    return PlanHash(delivered.hash, delivered.samples, int(np.count_nonzero(seen)))


class EpochVerdict(NamedTuple):
    """Comparison of an epoch's record with its plan; no `problems` means that what was planned was delivered, once."""

    epoch: int
    planned: int
    delivered: int
    exactly_once: int  # samples proven to be delivered exactly as planned; 0 when there are problems
    left_out: int  # samples that the plan does not give: the ragged tail, and what an unfinished epoch has left
    bad: int
    problems: tuple[str, ...]


def compare_with_plan(audit: EpochAudit, order: EpochOrder, batch_size: int, steps: int) -> EpochVerdict:
    """Compare the record of an epoch, of which `steps` steps were made, with its plan."""
    plan = hash_plan(order, batch_size, steps)
    problems = tuple(_find_problems(audit, plan, order))
    proven, left_out = 0 if problems else plan.samples, order.samples - plan.distinct
    return EpochVerdict(audit.epoch, plan.samples, audit.samples, proven, left_out, len(audit.bad), problems)


def _find_problems(audit: EpochAudit, plan: PlanHash, order: EpochOrder) -> Iterator[str]:
    repeats = order.labels is not None  # a class-balanced epoch repeats samples of rare classes
    if plan.distinct != plan.samples and not repeats:
        yield f"the plan gives {plan.samples} samples, only {plan.distinct} different ones"
    if audit.samples < plan.samples:
        yield f"{plan.samples - audit.samples} samples were never delivered"
    elif audit.samples > plan.samples:
        yield f"{audit.samples - plan.samples} samples were delivered too often"
    elif int(audit.hash, 16) != plan.hash:
        yield f"other samples were delivered than planned: hash {audit.hash}, planned {_format_hash(plan.hash)}"
    if (len(set(audit.bad)) != len(audit.bad) and not repeats) or any(id >= order.samples for id in audit.bad):
        yield f"its bad samples repeat or are none of the split's {order.samples}"


def compute_bad_limit(share: float, samples: int) -> int:
    """Return how many of an epoch's samples may be unreadable."""
    return max(MIN_BAD_LIMIT, math.floor(share * samples))


def _format_hash(value: int) -> str:
    return f"{value % _MODULUS:016x}"
