"""The framing of TensorBoard's event files (TFRecord).

TensorBoard's own writer takes the checksum byte by byte in Python, which costs several times what
the rest of a record does.
"""

from __future__ import annotations

import struct

from google_crc32c import value as crc32c


def record(data: bytes) -> bytes:
    """One record: length, its checksum, data, its checksum; little-endian."""
    length = struct.pack("<Q", len(data))
    return b"".join((length, _masked(length), data, _masked(data)))


def _masked(data: bytes) -> bytes:
    """CRC-32C as the format stores it: rotated and shifted, for data that holds checksums."""
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
