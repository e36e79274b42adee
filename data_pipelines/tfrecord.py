"""Random access to TFRecord files without TensorFlow.

A record is its length (uint64), a checksum of the length (uint32), the bytes, and a checksum of the bytes (uint32), all
little-endian. The checksum is a masked CRC-32C.

Source: TensorFlow, tensorflow/core/lib/io/record_writer.h and tensorflow/core/lib/hash/crc32c.h.
"""

import struct
from pathlib import Path

import google_crc32c

from data_pipelines.episode import DataError
from rynnvla_jax.storage import files

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")


def offsets(path: Path) -> list[tuple[int, int]]:
    """(offset, length) of the bytes of every record; reads the lengths only.

    Raises DataError naming a file that is missing, no TFRecord or truncated.
    """
    found: list[tuple[int, int]] = []
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            at = 0
            while at < size:
                file.seek(at)
                header = file.read(_HEADER.size)
                if len(header) < _HEADER.size:
                    raise DataError(f"{path} is truncated in record {len(found)}; copy it again")
                length, checksum = _HEADER.unpack(header)
                if checksum != masked_crc(header[:8]):
                    reason = f"is no TFRecord file, or damaged at record {len(found)}; copy it again"
                    raise DataError(files.damage(path, reason))
                if at + _HEADER.size + length + _FOOTER.size > size:
                    raise DataError(f"{path} is truncated in record {len(found)}; copy it again")
                found.append((at + _HEADER.size, length))
                at += _HEADER.size + length + _FOOTER.size
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); copy it again") from None
    return found


def read(path: Path, offset: int, length: int) -> bytes:
    """The bytes of one record, which `offsets` found. Raises DataError where they do not match their checksum."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(length + _FOOTER.size)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); copy it again") from None
    data, footer = content[:length], content[length:]
    if len(footer) < _FOOTER.size or _FOOTER.unpack(footer)[0] != masked_crc(data):
        raise DataError(f"{path} is damaged: the record at byte {offset} does not match its checksum; copy it again")
    return data


def masked_crc(data: bytes) -> int:
    """The checksum of a TFRecord file. It is masked, because a CRC of bytes that contain their CRC says little."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
