"""Write records in the TFRecord format, in which TensorBoard reads event files.

TensorBoard has a writer, too, but importing it imports the whole of tensorboard.summary.
"""

from __future__ import annotations

import struct
from typing import IO


def _table() -> list[int]:
    """Return the CRC-32C of each byte; 0x82F63B78 is the polynomial of Castagnoli et al., 1993, bits reversed."""
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return table


TABLE = _table()


def masked_crc(data: bytes) -> int:
    """Return the CRC-32C of data, masked as in TFRecord files: rotated right by 15 bits, plus a constant.

    >>> hex(masked_crc(b"123456789"))
    '0xc78ab0e5'
    """
    crc, table = 0xFFFFFFFF, TABLE  # a local name is read faster
    for byte in data:
        crc = table[crc & 0xFF ^ byte] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return (crc >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF


def write_record(file: IO[bytes], data: bytes) -> None:
    """Append a record: length (8 bytes), its masked CRC, the data, and its masked CRC. Raises OSError."""
    length = struct.pack("<Q", len(data))
    file.write(length + struct.pack("<I", masked_crc(length)) + data + struct.pack("<I", masked_crc(data)))
