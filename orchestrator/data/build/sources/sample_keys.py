"""Keys of samples from the names of files and members; such a name is never used as a path to write to."""

from __future__ import annotations

import re
import unicodedata

from orchestrator.data.data_errors import DataError

# Letters and digits of any script, and what no file system, store or tar reader gives a meaning.
_ODD = re.compile(r"[^\w.\-+=@,()~]")
# Characters without a shape of their own; the two joiners make another letter or emoji of their neighbours.
_SHAPELESS, _JOINERS = frozenset({"Cc", "Cf", "Cn", "Co", "Cs", "Zs", "Zl", "Zp"}), "\u200c\u200d"
_EXTENSION = re.compile(r"(?<=.)\.[A-Za-z0-9]{1,5}$")


def make_key(name: str, keep_marks: bool = False) -> str:
    """The key of a file or tar member: its path without root, ".." and extension, odd characters as "_".

    keep_marks: combining marks, emoji and other symbols beyond ASCII are not odd, and accents are composed.
    """
    if keep_marks:
        name = unicodedata.normalize("NFC", name)
    parts = [
        _ODD.sub(_replace_odd_character if keep_marks else "_", part)
        for part in name.split("/")
        if part not in ("", ".", "..")
    ]
    if not parts:
        return "_"
    # WebDataset cuts names at the first dot of the last component.
    parts[-1] = _EXTENSION.sub("", parts[-1]).replace(".", "_")
    return "/".join(parts)


def _replace_odd_character(odd: re.Match[str]) -> str:
    letter = odd[0]
    is_kept = letter in _JOINERS or not (letter.isascii() or unicodedata.category(letter) in _SHAPELESS)
    return letter if is_kept else "_"


def check_key(key: str) -> None:
    """Raise DataError for a key that would not come back from a tar as it is."""
    parts = key.split("/")
    if "." in parts[-1] or "\0" in key or any(part in ("", ".", "..") for part in parts):
        raise DataError(
            f"sample {key!r}: the key is refused: a relative path is needed, without '..' and with no dot in its last "
            "component"
        )
