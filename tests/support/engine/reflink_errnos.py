"""The meaning of each errno of FICLONE (design, section 4)."""

from __future__ import annotations

from tasks.copier.kernel.reflink import Answer

ERRNOS_OF_ANSWERS = {
    Answer.PAIR_CANNOT: ("EOPNOTSUPP", "ENOTTY", "ENOSYS", "EXDEV"),
    Answer.FILE_CANNOT: ("EINVAL", "ETXTBSY", "EPERM", "EACCES"),
    Answer.NOT_YET: ("EAGAIN", "EINTR"),
    Answer.ERROR: ("EIO", "ENOMEM", "ENOSPC", "EDQUOT", "EROFS", "EFBIG", "ESTALE", "EISDIR", "EBADF"),
}
