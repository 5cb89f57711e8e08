"""POSIX ACLs as the kernel shows them in extended attributes, and the mode of a file that loses one.

Sources: acl(5) for how access is decided, <linux/posix_acl_xattr.h> for the format.
"""

from __future__ import annotations

import struct

ACCESS_ACL = "system.posix_acl_access"
DEFAULT_ACL = "system.posix_acl_default"
ACLS = (ACCESS_ACL, DEFAULT_ACL)

_VERSION = struct.pack("<I", 2)
#: Tag, permissions, id.
_ENTRY = struct.Struct("<HHI")
_USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 0x02, 0x04, 0x08, 0x10, 0x20
_ALL = 0o7


def mode_without_acl(mode: int, acl: bytes) -> int:
    """The mode of a file of this `mode` that is to be without its access ACL: nobody gets a right by the loss.

    With an ACL, the group bits of the mode are its mask, which may be more than the owning group has. Who is named in
    the ACL is judged by the bits of the group or of the others without it: these are no more than each of them had.
    Of an ACL that cannot be read, only the owner's bits are left.
    """
    try:
        entries = _parsed(acl)
    except (ValueError, struct.error):
        return mode & ~0o077
    mask = next((bits for tag, bits in entries if tag == _MASK), _ALL)
    group = other = _ALL
    for tag, bits in entries:
        if tag == _OTHER:
            other &= bits
        elif tag == _GROUP_OBJ:
            group &= bits & mask
        elif tag == _USER:
            group &= bits & mask
            other &= bits & mask
        elif tag == _GROUP:
            other &= bits & mask
    return mode & (~0o077 | group << 3 | other)


def _parsed(acl: bytes) -> list[tuple[int, int]]:
    """Tag and permissions of each entry. Raises ValueError, struct.error."""
    if acl[: len(_VERSION)] != _VERSION:
        raise ValueError("another version of ACLs")
    entries = [(tag, bits) for tag, bits, _ in _ENTRY.iter_unpack(acl[len(_VERSION) :])]
    if not {_GROUP_OBJ, _OTHER} <= {tag for tag, _ in entries}:
        raise ValueError("no whole ACL")
    return entries
