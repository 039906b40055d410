"""Bounds on zip archives in memory before anything unpacks them."""

from __future__ import annotations

import io
import zipfile


def check_stored(data: bytes) -> None:
    """Raise ValueError unless the bytes are a zip whose entries are stored as they are and no larger than the archive.

    torch.save and numpy.savez write nothing else; a compressed entry of a megabyte may unpack to gigabytes.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, UnicodeError) as error:
        raise ValueError(f"no zip archive ({error})") from None
    packed = next((entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise ValueError(f"its entry {packed!r} is compressed, which it never is")
    if (total := sum(entry.file_size for entry in entries)) > len(data):
        raise ValueError(f"its entries have {total} bytes by its directory, the archive {len(data)}")
