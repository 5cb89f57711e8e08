"""TLS to Redis. The server's certificate and host name are always verified."""

from __future__ import annotations

import ssl
import sys
from typing import Any, NoReturn

from celery import Celery
from kombu.exceptions import OperationalError

from worker.exit_codes import NO_BROKER
from worker.redis_url import RedisUrl


def tls_options(url: RedisUrl, ca: str) -> dict[str, Any] | None:
    """redis-py's options for a TLS connection to `url`; None for a URL without TLS.

    `ca` is a PEM file of trusted authorities; "" means those of the system.
    """
    if not url.is_tls:
        return None
    options: dict[str, Any] = {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_check_hostname": True}
    return options | ({"ssl_ca_certs": ca} if ca else {}) | dict(url.tls_files)


def is_untrusted(error: BaseException | None) -> bool:
    """Whether a connection failed because the server's certificate is not trusted or belongs to another host."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


def refuse_untrusted(app: Celery, url: RedisUrl) -> None:
    """End the worker if its broker cannot be verified. An unreachable broker is waited for; this one is not."""
    if not url.is_tls:
        return
    try:
        with app.connection_for_read() as connection:
            connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
    except (OperationalError, OSError) as error:
        if is_untrusted(error):
            _refuse(f"the broker at {url.shown()} cannot be trusted: {error}")


def _refuse(message: str) -> NoReturn:
    print(f"forkvm: {message}", file=sys.stderr)
    sys.exit(NO_BROKER)
