"""The framing of TensorBoard's event files (TFRecord), with a checksum that is quick in NumPy.

TensorBoard's own writer takes the checksum byte by byte in Python, which costs several times what
the rest of a record does.
"""

from __future__ import annotations

import struct
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1024
_POLYNOMIAL = 0x82F63B78  # Castagnoli's, bits reversed


def record(data: bytes) -> bytes:
    """One record: length, its checksum, data, its checksum; little-endian."""
    return b"".join((_header(len(data)), data, _masked(data)))


@lru_cache(maxsize=1024)
def _header(length: int) -> bytes:
    packed = struct.pack("<Q", length)
    return packed + _masked(packed)


def _masked(data: bytes) -> bytes:
    """The checksum as the format stores it: rotated and shifted, for data that holds checksums."""
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def crc32c(data: bytes) -> int:
    """CRC-32C of at least four bytes.

    But for its start value the checksum is linear: that of a block is the exclusive or of what each
    byte contributes at its place, which is looked up, and zeros in front contribute nothing.

    >>> hex(crc32c(b"123456789"))
    '0xe3069283'
    """
    table, places = _table()
    message = np.frombuffer(data, dtype=np.uint8).copy()
    message[:4] ^= 0xFF  # the start value, all ones
    first = len(message) % _BLOCK or _BLOCK
    crc = _linear(table, places[-first:], message[:first])
    for block in message[first:].reshape(-1, _BLOCK):
        before = np.frombuffer(struct.pack("<I", crc), dtype=np.uint8)
        crc = _linear(table, places[:4], before) ^ _linear(table, places, block)
    return crc ^ 0xFFFFFFFF


def _linear(
    table: NDArray[np.uint32], places: NDArray[np.int64], message: NDArray[np.uint8]
) -> int:
    """The checksum, but for its start value, of bytes at these places of a block."""
    return int(np.bitwise_xor.reduce(table.take(places + message)))


@lru_cache(maxsize=1)
def _table() -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """What byte b at place p of a block contributes, at index 256 p + b; and 256 p by p."""
    last: NDArray[np.uint32] = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        last = (last >> np.uint32(1)) ^ (last & np.uint32(1)) * np.uint32(_POLYNOMIAL)
    table = np.empty((_BLOCK, 256), dtype=np.uint32)
    table[-1] = last
    for place in range(_BLOCK - 1, 0, -1):
        table[place - 1] = last[table[place] & 0xFF] ^ (table[place] >> 8)
    return table.ravel(), np.arange(_BLOCK) * 256
