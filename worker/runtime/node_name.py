"""The name of a worker process among Celery's nodes: `name@host`, different for each worker of a host."""

from __future__ import annotations

import os
import socket
import uuid

#: The socket that holds the name until this process ends.
_claims: list[socket.socket] = []


def node_name(name: str, host: str) -> str:
    """`name@host` for the first worker of the host with that name, `name-<random>@host` for the others.

    Without a name it is `forkvm-<random>@host`. Two nodes with the same name would both execute commands for one.
    """
    suffix = uuid.uuid4().hex[:8]
    if not name:
        return f"forkvm-{suffix}@{host}"
    return f"{name}@{host}" if _claim(name) else f"{name}-{suffix}@{host}"


def _claim(name: str) -> bool:
    """Take `name` if no other worker of this host has it. The kernel frees an abstract socket when its process ends."""
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0forkvm.node.{name}")
    except OSError:
        claim.close()
        return False
    _claims.append(claim)
    # A pool process that outlives its worker for a moment must not keep the name.
    os.register_at_fork(after_in_child=claim.close)
    return True
