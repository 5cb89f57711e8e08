"""The names that files in a control directory may have. A directory with any other file is not staging."""

from __future__ import annotations

import os
import re

#: `source` and `clone` are made by `self_test`; the last two are open files that were unlinked on FUSE and NFS.
_KNOWN_NAME = re.compile(
    r"(lock|journal|manifest|closing|stop|copied|destinations|source|clone|(mode|rename)-[0-9a-f]+(\.done)?"
    r"|(chunk|settled)-\d+|report-(plan|\d+)|batch-\d+-\d+)(\.new)?|snapshot[.0-9a-z-]*"
    r"|\.fuse_hidden[0-9a-f]+|\.nfs[0-9a-f]+",
    re.ASCII,
)


def is_known(name: str) -> bool:
    """Whether a control directory may hold a file of this name."""
    return _KNOWN_NAME.fullmatch(name) is not None


def holds_only_staging(fd: int) -> bool:
    """Whether the open directory `fd` holds only files that a control directory may hold. Raises OSError."""
    return all(map(is_known, os.listdir(fd)))
