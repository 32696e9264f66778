"""What the file of a built library says of itself where it can't be loaded, or must not be.

The system's loader believes what it finds: a damaged library ends the process. So setup.py adds a checksum behind the
library's own end, which is compared before the library is loaded. Without one, as strip leaves it, nothing is compared.
"""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

_RECORD = re.compile(rb"softmax_ext build record: ([ -~]+)")  # csrc/build_record.cpp
_SEAL = b"softmax_ext checksum: %08x"
_SEALED = re.compile(_SEAL.replace(b"%08x", rb"([0-9a-f]{8})\Z"))


def built_as(path: str) -> str:
    """The versions of softmax_ext and torch that the library was built of and with."""
    try:
        found = _RECORD.search(Path(path).read_bytes())
    except OSError:
        return "unknown versions (it can't be read)"
    return found[1].decode() if found else "unknown versions (it is damaged, or another library)"


def seal(path: str) -> None:
    """Adds the checksum."""
    with Path(path).open("r+b") as file:
        file.write(_SEAL % zlib.crc32(file.read()))


def check(path: str) -> None:
    """OSError where the loader would die of the file: cut short by a full disk, or damaged."""
    content = Path(path).read_bytes()
    if not content.startswith(b"\x7fELF\x02\x01"):  # of 64 bits, little-endian; the loader refuses what is no library
        return
    if len(content) < 64 or not _has_its_section_table(content):
        raise OSError(f"{path} is cut short")
    sealed = _SEALED.search(content, len(content) - len(_SEAL % 0))
    if sealed and int(sealed[1], 16) != zlib.crc32(memoryview(content)[: sealed.start()]):
        raise OSError(f"{path} is damaged: its checksum is not {sealed[1].decode()}")


def _has_its_section_table(content: bytes) -> bool:
    """The table that the header points to stands behind everything else."""
    (table,) = struct.unpack_from("<Q", content, 40)
    entry_size, entries = struct.unpack_from("<2H", content, 58)
    last = content[table + entry_size * (entries - 1) : table + entry_size * entries]
    return entries == 0 or (len(last) == entry_size and any(last))
