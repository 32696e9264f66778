"""What the file of a built library says of itself where it can't be loaded, or must not be."""

from __future__ import annotations

import re
import struct
from pathlib import Path

_RECORD = re.compile(rb"softmax_ext build record: ([ -~]+)")  # csrc/build_record.cpp


def built_as(path: str) -> str:
    """The versions of softmax_ext and torch that the library was built of and with."""
    try:
        found = _RECORD.search(Path(path).read_bytes())
    except OSError:
        return "unknown versions (it can't be read)"
    return found[1].decode() if found else "unknown versions (it is damaged, or another library)"


def is_cut_short(path: str) -> bool:
    """Whether an ELF file ends before it should, as after a full disk: the loader would die of SIGBUS.

    The table that its header points to stands at the end.
    """
    with Path(path).open("rb") as file:
        header = file.read(64)
        size = file.seek(0, 2)
    if not header.startswith(b"\x7fELF\x02\x01"):  # of 64 bits, little-endian
        return False
    if len(header) < 64:
        return True
    (table,) = struct.unpack_from("<Q", header, 40)
    entry_size, entries = struct.unpack_from("<2H", header, 58)
    return bool(size < table + entry_size * entries)
