"""The mode of a file that loses its ACL: nobody gains access."""

from __future__ import annotations

import struct

import pytest

from tasks.copier.clone.acl import mode_without_acl

USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20


def acl(*entries: tuple[int, int]) -> bytes:
    """An ACL of tags and permissions, as the kernel writes it."""
    return struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, bits, 1000 if tag in (USER, GROUP) else 0xFFFFFFFF) for tag, bits in entries
    )


@pytest.mark.parametrize(
    ("what", "mode", "entries", "expected"),
    [
        ("no named entries", 0o640, [(USER_OBJ, 6), (GROUP_OBJ, 4), (OTHER, 0)], 0o640),
        ("a group without rights", 0o660, [(USER_OBJ, 6), (USER, 6), (GROUP_OBJ, 0), (MASK, 6), (OTHER, 0)], 0o600),
        ("a group under the mask", 0o740, [(USER_OBJ, 7), (USER, 4), (GROUP_OBJ, 7), (MASK, 4), (OTHER, 0)], 0o740),
        ("a user shut out", 0o674, [(USER_OBJ, 6), (USER, 0), (GROUP_OBJ, 6), (MASK, 7), (OTHER, 4)], 0o600),
        ("a user with less", 0o676, [(USER_OBJ, 6), (USER, 4), (GROUP_OBJ, 6), (MASK, 7), (OTHER, 6)], 0o644),
        ("a group shut out", 0o674, [(USER_OBJ, 6), (GROUP_OBJ, 6), (GROUP, 0), (MASK, 7), (OTHER, 4)], 0o660),
        ("all under the mask", 0o604, [(USER_OBJ, 6), (USER, 6), (GROUP_OBJ, 6), (MASK, 0), (OTHER, 4)], 0o600),
        ("set-id and sticky bits", 0o7771, [(USER_OBJ, 7), (USER, 7), (GROUP_OBJ, 5), (MASK, 7), (OTHER, 1)], 0o7751),
    ],
)
def test_a_mode_without_its_acl_gives_no_class_additional_access(
    what: str, mode: int, entries: list[tuple[int, int]], expected: int
) -> None:
    assert mode_without_acl(mode, acl(*entries)) == expected, what


@pytest.mark.parametrize("value", [b"", b"\1\0\0\0", struct.pack("<I", 2), acl((USER_OBJ, 6), (OTHER, 4))[:-3]])
def test_an_unreadable_acl_leaves_only_the_owners_bits(value: bytes) -> None:
    assert mode_without_acl(0o4674, value) == 0o4600
