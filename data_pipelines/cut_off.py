"""Files whose end is missing: recorders that were killed leave them, and so do copies that were cut short."""

import os
from pathlib import Path

COPY = "copy it again"
_METADATA = frozenset(("meta", "manifest"))  # folders whose files describe all episodes
_CUT_OFF = (
    "its end is missing: copy it again if the original is longer; if the recording itself was cut off, leave its "
    "episodes out (rynnvla data validate SOURCE --fix OUT.json with this run's keys of cameras, then "
    "--config.data.exclude=OUT.json)"
)
_BOXES = 1000  # of an mp4 that are looked at: a fragmented one has many


def remedy(path: Path | str) -> str:
    """What to do about an mp4, Parquet or HDF5 file that cannot be read."""
    if not _METADATA.isdisjoint(folder.name for folder in Path(path).parents[:3]):
        return COPY
    try:
        return _CUT_OFF if _cut_off(Path(path)) else COPY
    except (OSError, ValueError):  # a name that no file can have
        return COPY


def _cut_off(path: Path) -> bool:
    size = os.path.getsize(path)
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] == b"PAR1":
            file.seek(max(4, size - 4))
            return file.read(4) != b"PAR1"
        if head[:8] == b"\x89HDF\r\n\x1a\n":
            file.seek(0)
            return _hdf5_end(file.read(64)) > size
        if head[4:8] != b"ftyp":
            return False
        at = 0
        for _ in range(_BOXES):  # the index ("moov") is written last, or first where the file was made for streaming
            file.seek(at)
            header = file.read(16)
            if len(header) < 8:
                return True  # no index in the whole file
            length = int.from_bytes(header[:4], "big")
            if length == 1:
                length = int.from_bytes(header[8:16], "big")
            if header[4:8] == b"moov":
                return at + length > size
            if length < 8:  # to the end of the file
                return True
            at += length
    return False


def _hdf5_end(head: bytes) -> int:
    """The size that the superblock of an HDF5 file states; 0 for versions that are not known."""
    version = head[8]
    if version in (0, 1) and head[13] == 8:
        at = 24 + 4 * (version == 1) + 2 * 8
    elif version in (2, 3) and head[9] == 8:
        at = 12 + 2 * 8
    else:
        return 0
    return int.from_bytes(head[at : at + 8], "little")
