"""What files hold, whatever their names say: encodings of text, and packed data."""

from __future__ import annotations

import codecs
import io
import zipfile
import zlib
from typing import IO, Any

ZIP_FAULTS = (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError)
"""Errors that reading a zip archive raises: it is none, damaged, cut, has a password, or is packed in a rare way."""
# UTF-32's mark of little endians begins with UTF-16's.
_WIDE = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_PACKED = {
    b"\x1f\x8b": "gzip data; unpack it (gunzip)",
    b"PK\x03\x04": "a zip archive or an office document; unpack it, or turn it into text",
    b"\x28\xb5\x2f\xfd": "zstd data; unpack it (unzstd)",
    b"\xfd7zXZ": "xz data; unpack it (unxz)",
    b"BZh": "bzip2 data; unpack it (bunzip2)",
    b"%PDF-": "a PDF file; turn it into text",
    b"PAR1": "a parquet file; let its name end in .parquet",
    b"\x89HDF": "an HDF5 file; turn it into parquet",
}


def printable(text: object) -> str:
    """Text, or the name of a file, in UTF-8: what it cannot hold is escaped.

    JSON that a model wrote can hold half a surrogate pair, and the bytes of a name need not be UTF-8.
    """
    return str(text).encode("utf-8", "backslashreplace").decode()


def utf8(data: bytes) -> bytes:
    """The content of a text file as UTF-8 if its byte order mark says that it is UTF-16 or UTF-32, or else as it is."""
    for mark, encoding in _WIDE.items():
        if data.startswith(mark):
            text = data.decode(encoding, "replace")
            if text.count("\ufffd") <= 1 + len(text) // 100:  # or else the mark is chance
                return text.encode()
    return data


def packed(data: bytes) -> str:
    """What the first bytes of a file say that it is instead of text; "" if nothing."""
    return next((what for start, what in _PACKED.items() if data.startswith(start)), "")


def utf8_stream(file: Any) -> IO[bytes]:
    """A file that is open for reading bytes (and can `peek`), or its content as `utf8`.

    Raises:
        ValueError: it is `packed`; the message says what it is.
    """
    start = file.peek(8)[:8]
    if what := packed(start):
        raise ValueError(f"this is {what}")
    return io.BytesIO(utf8(file.read())) if start.startswith(tuple(_WIDE)) else file
