"""The names of the files of a control directory: a directory that holds other files is not staging."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

#: What a control directory may hold; `source` and `clone` are those of a trial of the filesystem (see `trial`), the
#: last two are open files that were unlinked on FUSE and NFS.
_KNOWN_NAME = re.compile(
    r"(lock|journal|manifest|closing|stop|destinations|source|clone|(mode|rename)-[0-9a-f]+(\.done)?"
    r"|(chunk|settled)-\d+|report-(plan|\d+)|batch-\d+-\d+)(\.new)?|snapshot[.0-9a-z-]*"
    r"|\.fuse_hidden[0-9a-f]+|\.nfs[0-9a-f]+",
    re.ASCII,
)


def unknown_names(fd: int) -> Iterator[str]:
    """What the open directory `fd` holds and no control directory does. Raises OSError."""
    return (name for name in os.listdir(fd) if not _KNOWN_NAME.fullmatch(name))


def holds_only_staging(fd: int) -> bool:
    """Whether the open directory `fd` holds nothing but what a control directory may. Raises OSError."""
    return next(unknown_names(fd), None) is None
