"""The engine on real filesystems: no Celery, no Redis."""
