"""Loaded into a worker (`celery worker -I`): each of its processes logs how many objects a collection leaves out."""

from __future__ import annotations

import gc
import logging
from typing import Any

from celery import signals


@signals.worker_process_init.connect
def _log_frozen(**_: Any) -> None:
    logging.getLogger(__name__).warning("frozen objects: %d", gc.get_freeze_count())
