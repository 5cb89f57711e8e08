"""POSIX ACLs in extended attributes, and the mode of a file that loses its ACL.

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
    """The mode of a clone of a file with this `mode` and `acl`, if the clone has no ACL. Nobody gains a permission.

    With an ACL, the group bits of the mode are the ACL's mask, which may allow more than the owning group has. Without
    it, the users and groups that it names get the bits of the group or of others. So these bits allow only what each of
    them had. For an invalid ACL, only the owner's bits remain.
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
    """The tag and the permissions of each entry. Raises ValueError, struct.error."""
    if acl[: len(_VERSION)] != _VERSION:
        raise ValueError("unknown version of the ACL format")
    entries = [(tag, bits) for tag, bits, _ in _ENTRY.iter_unpack(acl[len(_VERSION) :])]
    if not {_GROUP_OBJ, _OTHER} <= {tag for tag, _ in entries}:
        raise ValueError("the ACL is incomplete")
    return entries
