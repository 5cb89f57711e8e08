"""Environment variables that others put there: which of them to pass over, which to warn of, which to remove."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Iterable, Mapping

_PREFIX = "FORKVM_"
#: What Kubernetes sets in each pod for a Service that is called forkvm or forkvm-something (and docker for a link):
#: https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
_SERVICE = re.compile(
    r"FORKVM_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SERVICE_PORT = re.compile(r"FORKVM_(\w+_)?PORT")
_SERVICE_PORT_VALUE = re.compile(r"(tcp|udp|sctp)://.*", re.DOTALL)
#: What docker-compose.yml itself reads.
_COMPOSE = frozenset(("FORKVM_GUESTS", "FORKVM_USER"))

#: What Celery 5.7, kombu and billiard read beside variables that begin with CELERY_ or KOMBU_ (celery/bin/celery.py,
#: app/base.py, app/utils.py, loaders, fixups/django.py, worker/state.py, worker/autoscale.py, billiard). Another
#: application's would decide which Redis a fork goes to, or end the program. Of the others that they read, NO_COLOR is
#: everybody's, C_FORCE_ROOT and REMAP_SIGTERM are an administrator's word to this very worker.
_CELERYS = frozenset(
    (
        *("APP", "BROKER_URL", "RESULT_BACKEND", "LOADER", "CONFIG_MODULE", "SKIP_CHECKS"),
        *("DJANGO_SETTINGS_MODULE", "FORKED_BY_MULTIPROCESSING", "MP_MAIN_FILE", "MP_LOG"),
        *("C_STRICT_APP", "C_WARN_APP", "C_WNOCONF", "C_BENCH", "C_BENCH_EVERY", "C_FAKEFORK", "C_IMPDEBUG"),
        *("C_REMDEBUG", "AUTOSCALE_KEEPALIVE", "PICKLE_PROTOCOL", "DISABLE_TRACEBACKS", "TIMER_DEBUG"),
    )
)
_CELERYS_PREFIXES = ("CELERY_", "KOMBU_", "_MP_FORK_")

_warned: set[str] = set()


def remove_celery_variables() -> None:
    """Remove from this process's environment what Celery would let decide in place of FORKVM_*.

    To be called before Celery reads them: some when it is imported, the URLs each time they are asked for.
    """
    for name in list(os.environ):
        if name in _CELERYS or name.startswith(_CELERYS_PREFIXES):
            del os.environ[name]


def unknown_variables(environment: Mapping[str, str], known: Collection[str]) -> list[str]:
    """Warnings, one a variable `FORKVM_*` that has a value, is not `known`, and is not another program's."""
    warnings = []
    endings = [one.removeprefix(_PREFIX) for one in known]  # the prefix would make everything similar
    for name, value in environment.items():
        if name.startswith(_PREFIX) and value and name not in known and not _is_of_others(name, value):
            similar = difflib.get_close_matches(name.removeprefix(_PREFIX), endings, 1)
            meant = f"; {_PREFIX}{similar[0]} may be meant" if similar else ""
            warnings.append(f"{name} is no setting and is ignored{meant}")
    return warnings


def new_warnings(warnings: Iterable[str]) -> list[str]:
    """Those of `warnings` that were not asked for before in this process."""
    new = [warning for warning in warnings if warning not in _warned]
    _warned.update(new)
    return new


def _is_of_others(name: str, value: str) -> bool:
    if name in _COMPOSE or _SERVICE.fullmatch(name):
        return True
    return bool(_SERVICE_PORT.fullmatch(name) and _SERVICE_PORT_VALUE.fullmatch(value))
