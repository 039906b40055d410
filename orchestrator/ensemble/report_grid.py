"""The parts that a report's sections are made of."""

from __future__ import annotations

from dataclasses import dataclass

Row = tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """A table of text: `head` names its columns, of which the first `words` hold words, the others numbers."""

    caption: str
    head: Row
    rows: tuple[Row, ...]
    words: int = 1
    strong: int | None = None  # the row that matters most


@dataclass(frozen=True)
class Card:
    """A picture with a caption; `picture` is its data URI, empty when there is none."""

    title: str
    text: str
    picture: str


@dataclass(frozen=True)
class Section:
    """A part of the report under a title. `plots` are names of plots, shown where there is such a plot."""

    name: str
    title: str
    text: tuple[str, ...] = ()
    plots: tuple[str, ...] = ()
    grids: tuple[Grid, ...] = ()
    cards: tuple[Card, ...] = ()
