"""What an XFS filesystem says of itself: ioctl_xfs_fsgeometry(2)."""

from __future__ import annotations

import fcntl
import struct
from typing import NamedTuple

#: _IOR('X', 100, struct xfs_fsop_geom_v1) of fs/xfs/libxfs/xfs_fs.h.
_FSGEOMETRY_V1 = 0x80705864
#: struct xfs_fsop_geom_v1. Only blocksize, logblocks and flags are read.
_GEOMETRY = struct.Struct("=I12xI72xI16x")
_REFLINK = 1 << 20
_EXCHANGE_RANGE = 1 << 24


class Geometry(NamedTuple):
    """A part of the geometry."""

    log_bytes: int
    has_reflink: bool
    #: The optional feature `exchange` (exchange of file ranges).
    has_exchange: bool


def geometry(fd: int) -> Geometry:
    """The geometry of the XFS filesystem of `fd`. Raises OSError."""
    data = fcntl.ioctl(fd, _FSGEOMETRY_V1, bytes(_GEOMETRY.size))
    block, log_blocks, flags = _GEOMETRY.unpack(data)
    return Geometry(block * log_blocks, bool(flags & _REFLINK), bool(flags & _EXCHANGE_RANGE))
