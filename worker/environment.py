"""Environment variables of other programs: which are ignored, which cause a warning, and which are removed."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Iterable, Mapping

_PREFIX = "FORKVM_"
#: Set by Kubernetes in each pod for a Service named forkvm or forkvm-NAME, and by docker for a link:
#: https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
_SERVICE = re.compile(
    r"FORKVM_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SERVICE_PORT = re.compile(r"FORKVM_(\w+_)?PORT")
_SERVICE_PORT_VALUE = re.compile(r"(tcp|udp|sctp)://.*", re.DOTALL)
#: Read by docker-compose.yml.
_COMPOSE = frozenset(("FORKVM_GUESTS", "FORKVM_USER"))

#: Read by Celery 5.7, kombu and billiard, with those that begin with CELERY_ or KOMBU_ (celery/bin/celery.py,
#: app/base.py, app/utils.py, loaders, fixups/django.py, worker/state.py, worker/autoscale.py, billiard). Set for
#: another application, they could send a fork to a different Redis, or end the program. Three more are kept: NO_COLOR
#: is for all programs, and administrators set C_FORCE_ROOT and REMAP_SIGTERM for this worker.
_CELERY_VARIABLES = frozenset(
    (
        *("APP", "BROKER_URL", "RESULT_BACKEND", "LOADER", "CONFIG_MODULE", "SKIP_CHECKS"),
        *("DJANGO_SETTINGS_MODULE", "FORKED_BY_MULTIPROCESSING", "MP_MAIN_FILE", "MP_LOG"),
        *("C_STRICT_APP", "C_WARN_APP", "C_WNOCONF", "C_BENCH", "C_BENCH_EVERY", "C_FAKEFORK", "C_IMPDEBUG"),
        *("C_REMDEBUG", "AUTOSCALE_KEEPALIVE", "PICKLE_PROTOCOL", "DISABLE_TRACEBACKS", "TIMER_DEBUG"),
    )
)
_CELERY_PREFIXES = ("CELERY_", "KOMBU_", "_MP_FORK_")

_warned: set[str] = set()


def remove_celery_variables() -> None:
    """Remove the variables from this process's environment with which Celery would override the settings.

    Call it before Celery is imported: some variables are read then, and the URLs on each use.
    """
    for name in list(os.environ):
        if name in _CELERY_VARIABLES or name.startswith(_CELERY_PREFIXES):
            del os.environ[name]


def unknown_variables(environment: Mapping[str, str], known: Collection[str]) -> list[str]:
    """A warning for each variable `FORKVM_*` that is set, is not `known`, and does not belong to another program."""
    warnings = []
    endings = [one.removeprefix(_PREFIX) for one in known]  # the prefix would make everything similar
    for name, value in environment.items():
        if name.startswith(_PREFIX) and value and name not in known and not _is_of_another_program(name, value):
            similar = difflib.get_close_matches(name.removeprefix(_PREFIX), endings, 1)
            meant = f"; did you mean {_PREFIX}{similar[0]}?" if similar else ""
            warnings.append(f"{name} is not a setting and is ignored{meant}")
    return warnings


def new_warnings(warnings: Iterable[str]) -> list[str]:
    """Those of `warnings` that this function has not returned before in this process."""
    new = [warning for warning in warnings if warning not in _warned]
    _warned.update(new)
    return new


def _is_of_another_program(name: str, value: str) -> bool:
    if name in _COMPOSE or _SERVICE.fullmatch(name):
        return True
    return bool(_SERVICE_PORT.fullmatch(name) and _SERVICE_PORT_VALUE.fullmatch(value))
