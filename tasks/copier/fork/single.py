"""One file cloned alone, with the same ladder, the same checks and the same metadata as in a fork."""

from __future__ import annotations

import os
import secrets
import stat

from tasks.copier.clone.attributes import drop_inherited_acls
from tasks.copier.clone.file import Cloner, DirectoryPair
from tasks.copier.endpoints import destination_exists
from tasks.copier.errors import Code, ForkError, from_oserror
from tasks.copier.kernel import syscalls, trees
from tasks.copier.options import Options
from tasks.copier.progress import Beat, Ticker
from tasks.copier.report import FileResult
from tasks.copier.roots import Roots, normal_path
from tasks.copier.source.walk import Entry, Kind, entry_of, file_type
from tasks.copier.staging.control_directory import control_name
from tasks.copier.staging.proof import open_directory
from tasks.copier.staging.publishing import require_noreplace


def clone_file(source: str, destination: str, options: Options, roots: Roots, beat: Beat) -> FileResult:
    """Clone the regular file `source` to `destination`, which must not exist and appears whole, by one rename.

    `beat` is called about four times a second while bytes are copied, and raises ForkError to end it. Raises
    ForkError: invalid_request, source_not_found, unsupported_file_type, destination_exists, reflink_unsupported,
    source_changed, no_space, io_error …; then nothing is left.
    """
    source, destination = normal_path(source, "source"), normal_path(destination, "destination")
    src_fd = roots.open_source(os.path.dirname(source))
    try:
        parent_fd, _ = roots.open_parent(destination)
        try:
            return _clone(src_fd, source, parent_fd, destination, options, beat)
        finally:
            os.close(parent_fd)
    finally:
        os.close(src_fd)


def _clone(src_fd: int, source: str, parent_fd: int, destination: str, options: Options, beat: Beat) -> FileResult:
    src_dir, name = os.path.split(source)
    entry = _entry(src_fd, source)
    # The name of a tree without a control directory: what is left of it after a crash, gc removes.
    staging = f"{control_name(secrets.token_hex(16))}.{secrets.token_hex(4)}"
    sync = options.durability == "sync"
    try:
        os.mkdir(staging, 0o700, dir_fd=parent_fd)
        try:
            staging_fd = open_directory(parent_fd, staging)
            try:
                require_noreplace(staging_fd, destination)
                drop_inherited_acls(staging_fd)
                dst_dev = os.fstat(staging_fd).st_dev
                place = DirectoryPair(src_fd, staging_fd, dst_dev, "", src_dir, os.path.dirname(destination))
                result = Cloner(options, {}, Ticker(beat).step).file(place, entry)
                if sync:
                    syscalls.syncfs(staging_fd)
                syscalls.rename_noreplace(staging_fd, name, parent_fd, os.path.basename(destination))
                if sync:
                    os.fsync(parent_fd)
                return result
            finally:
                os.close(staging_fd)
        finally:
            trees.remove(parent_fd, staging)
    except FileExistsError:
        raise destination_exists(destination) from None
    except OSError as error:
        raise from_oserror(error, "making the clone", destination) from None


def _entry(src_fd: int, source: str) -> Entry:
    try:
        status = os.stat(os.path.basename(source), dir_fd=src_fd, follow_symlinks=False)
    except FileNotFoundError as error:
        raise ForkError(Code.SOURCE_NOT_FOUND, "the source does not exist", source, error.errno) from None
    except OSError as error:
        raise from_oserror(error, "reading its status", source) from None
    if not stat.S_ISREG(status.st_mode):
        message = f"a {file_type(status.st_mode)} is not a file to be cloned alone"
        raise ForkError(Code.UNSUPPORTED_FILE_TYPE, message, source)
    return entry_of(os.path.basename(source), "", Kind.FILE, status)
