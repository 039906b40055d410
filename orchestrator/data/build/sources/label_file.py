"""Labels of a flat folder of images, from the lists that people have: lines, CSV, TSV, LOC_val_solution.csv."""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Mapping, Sequence

from orchestrator.config import redaction
from orchestrator.data.build.label_format import map_names_to_labels, normalize_name, read_text
from orchestrator.data.data_errors import DataError
from orchestrator.storage import file_io

MAX_FILE_BYTES = 2**30
# Column titles by which a label's column is known when several could be it.
_TITLES = ("label", "class", "target", "predictionstring")
# A class and a box's four numbers, as LOC_val_solution.csv has them.
_BOX = re.compile(r"(\S.*?)(?:\s+-?[0-9]+(?:\.[0-9]+)?){4}(?:\s+|$)")

LabelRow = tuple[int, list[str]]  # number of its line, columns


def read_labels(url: str, classes: Sequence[str], images: Collection[str]) -> dict[str, int]:
    """Return the label of each file that a list names, with or without extension, accents composed.

    A label is the whole name of a class, alone or before boxes of that class; nothing is taken for a class because it
    begins like one. Of more than two columns the one with names of `images` and the one with classes count. Raises
    DataError naming the line.
    """
    where = f"source.labels: {redaction.redact(url)}"
    numbers = map_names_to_labels(classes)
    if file_io.exists(url) and file_io.get_size(url) > MAX_FILE_BYTES:
        raise DataError(f"{where}: over {MAX_FILE_BYTES} bytes: no list of labels")
    text = read_text(url, where)
    rows = _parse_lines(text, numbers, images)
    if rows is None:
        rows = _parse_columns(text, numbers, images, where)
    labels: dict[str, int] = {}
    for line, name, label in rows:
        number = _find_label(label, numbers)
        if number is None:
            raise DataError(f"{where}: line {line}: {label!r} is no class of the training images")
        if labels.setdefault(normalize_name(name), number) != number:
            raise DataError(f"{where}: line {line}: a second label for {name!r}")
    return labels


def _parse_lines(text: str, numbers: Mapping[str, int], images: Collection[str]) -> list[tuple[int, str, str]] | None:
    """Return line, name and label of each "NAME LABEL" or "NAME,LABEL", None when there are more columns."""
    has_columns = "\t" in text or "," in text
    pairs: list[tuple[int, str, str]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        parts = (
            line.split("\t") if "\t" in line else line.split(",", 1) if "," in line else _split_at_space(line, images)
        )
        name, label = parts[0].strip(), parts[1].strip() if len(parts) > 1 else ""
        if _find_label(label, numbers) is None:
            if number == 1 and not _is_image(name, images):
                continue  # the titles of the columns
            if has_columns:
                return None
        pairs.append((number, name, label))
    return pairs


def _split_at_space(line: str, images: Collection[str]) -> list[str]:
    parts = line.split(None, 1)
    return parts if parts[0] in images else line.rsplit(None, 1)


def _parse_columns(
    text: str, numbers: Mapping[str, int], images: Collection[str], where: str
) -> list[tuple[int, str, str]]:
    """Return line, name and label of each row of a CSV or TSV, with quotes and further columns."""
    head = text.split("\n", 1)[0]
    reader = csv.reader(text.splitlines(), delimiter="\t" if "\t" in head else ",", skipinitialspace=True)
    rows: list[LabelRow] = []
    try:
        for columns in reader:
            if any(column.strip() for column in columns):
                rows.append((reader.line_num, [column.strip() for column in columns]))
    except csv.Error as error:
        raise DataError(f"{where}: line {reader.line_num}: {error}") from None
    width = max((len(columns) for _, columns in rows), default=0)
    if width < 2:
        return [(line, columns[0], "") for line, columns in rows]
    hits = [sum(_is_image(_get_cell(row, at), images) for row in rows) for at in range(width)]
    name_at = hits.index(max(hits))
    titles: list[str] = []
    if not _is_image(_get_cell(rows[0], name_at), images):
        titles, rows = rows[0][1], rows[1:]
    label_at = _find_label_column(rows, titles, name_at, width, numbers, where)
    return [(row[0], _get_cell(row, name_at), _get_cell(row, label_at)) for row in rows]


def _find_label_column(
    rows: Sequence[LabelRow], titles: Sequence[str], name_at: int, width: int, numbers: Mapping[str, int], where: str
) -> int:
    fitting = [
        at
        for at in range(width)
        if at != name_at and all(_find_label(_get_cell(row, at), numbers) is not None for row in rows)
    ]
    titled = [at for at in fitting if at < len(titles) and titles[at].lower() in _TITLES]
    if len(fitting) > 1 and len(titled) != 1:
        named = " and ".join(str(at + 1) for at in fitting)
        raise DataError(f"{where}: columns {named} all hold names of classes; keep one beside the files")
    by_title = [at for at, title in enumerate(titles) if title.lower() in _TITLES and at != name_at]
    return (titled or fitting or by_title or [name_at + 1 if name_at + 1 < width else 0])[0]


def _find_label(label: str, numbers: Mapping[str, int]) -> int | None:
    """Return the class that a label names, alone or in front of each of its boxes; None when it names none."""
    if (name := normalize_name(label)) in numbers:
        return numbers[name]
    boxes = list(_BOX.finditer(name))
    if not boxes or "".join(box[0] for box in boxes) != name or len({box[1] for box in boxes}) > 1:
        return None
    return numbers.get(boxes[0][1])


def _is_image(name: str, images: Collection[str]) -> bool:
    return normalize_name(name) in images


def _get_cell(row: LabelRow, at: int) -> str:
    return row[1][at] if at < len(row[1]) else ""
