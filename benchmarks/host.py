"""Whether the host of this virtual machine disturbs the figures."""

from __future__ import annotations

from pathlib import Path

#: VIRTIO_BALLOON_F_REPORTING, the number of a bit (<linux/virtio_balloon.h>).
_REPORTING = 5
#: The largest order of the kernel's page allocator: a higher reporting order reports nothing.
_MAX_PAGE_ORDER = 10

WARNING = (
    "this machine returns free memory to its host (free page reporting), so a round that writes gigabytes may wait for "
    "memory; see ext4 `big` in docs/performance.md"
)


def takes_memory_back(sysfs: Path = Path("/sys")) -> bool:
    """Whether the host reclaims free memory, which then has to be allocated again at its next use."""
    try:
        order = int((sysfs / "module/page_reporting/parameters/page_reporting_order").read_text())
        features = [path.read_text() for path in (sysfs / "bus/virtio/drivers/virtio_balloon").glob("virtio*/features")]
    except (OSError, ValueError):
        return False
    return order <= _MAX_PAGE_ORDER and any(bits[_REPORTING : _REPORTING + 1] == "1" for bits in features)
