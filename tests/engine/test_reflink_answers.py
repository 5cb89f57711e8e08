"""The table of FICLONE's errnos (design, section 4), and the request number of the ioctl."""

from __future__ import annotations

import errno

import pytest

from tasks.copier.clone.reflinker import NOT_ASKED_FOR, Refusal
from tasks.copier.kernel import syscalls
from tasks.copier.kernel.reflink import Answer, meaning
from tests.support.engine.reflink_errnos import ERRNOS_OF_ANSWERS


@pytest.mark.parametrize(
    ("name", "answer"), [(name, answer) for answer, names in ERRNOS_OF_ANSWERS.items() for name in names]
)
def test_each_errno_means_what_the_table_says(name: str, answer: Answer) -> None:
    assert meaning(getattr(errno, name)) is answer


def test_an_errno_that_the_table_does_not_know_is_an_error() -> None:
    known = {getattr(errno, name) for names in ERRNOS_OF_ANSWERS.values() for name in names}

    assert {meaning(number) for number in errno.errorcode if number not in known} == {Answer.ERROR}
    assert meaning(0) is Answer.ERROR


def test_the_number_of_ficlone_is_the_kernels() -> None:
    """A wrong number returns ENOTTY and would silently turn every reflink into a full copy."""
    assert syscalls.FICLONE == 0x40049409


def test_reasons_name_the_errno_and_its_scope() -> None:
    assert Refusal(errno.EOPNOTSUPP).reason == "EOPNOTSUPP: this pair of filesystems cannot reflink"
    assert Refusal(errno.EXDEV, asked=False).reason == "EXDEV: this pair of filesystems refused a reflink before"
    assert Refusal(errno.EINVAL).reason == "EINVAL: this file cannot be reflinked"
    assert NOT_ASKED_FOR.reason == "reflink=never"
