"""Archives are bounded before anything unpacks them."""

import io
import struct
import zipfile

import numpy as np
import pytest
import torch

from orchestrator.storage import commit


def zipped(method: int, size: int = 2**20) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("archive/data/0", bytes(size))
    return buffer.getvalue()


def is_accepted(data: bytes) -> bool:
    try:
        commit.check_zip_uncompressed(data)
    except ValueError:
        return False
    return True


def test_archives_of_torch_and_numpy_are_accepted() -> None:
    state, arrays, compressed = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.zeros(3)}, state)
    np.savez(arrays, a=np.zeros(3))
    np.savez_compressed(compressed, a=np.zeros(3))
    assert [is_accepted(archive.getvalue()) for archive in (state, arrays, compressed)] == [True, True, False]


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_entry_is_named(method: int) -> None:
    with pytest.raises(ValueError, match="'archive/data/0' is compressed"):
        commit.check_zip_uncompressed(zipped(method))


def test_an_entry_larger_than_the_archive() -> None:
    data = zipped(zipfile.ZIP_STORED, 100)
    at = data.index(b"PK\1\2") + 20  # of the directory: both sizes
    with pytest.raises(ValueError, match=f"{2**31} by its directory"):
        commit.check_zip_uncompressed(data[:at] + struct.pack("<II", 2**31, 2**31) + data[at + 8 :])


@pytest.mark.parametrize("data", [b"", b"PK", b"\x80\2}q\0.", zipped(zipfile.ZIP_STORED)[:-30]])
def test_no_archive(data: bytes) -> None:
    with pytest.raises(ValueError, match="must be a zip archive"):
        commit.check_zip_uncompressed(data)
