"""What a virtual machine's host does to the figures."""

from __future__ import annotations

from pathlib import Path

#: VIRTIO_BALLOON_F_REPORTING, the number of a bit (<linux/virtio_balloon.h>).
_REPORTING = 5
#: The largest blocks that the kernel's allocator has are of this order: of larger ones there is none to report.
_MAX_PAGE_ORDER = 10

WARNING = (
    "this machine hands free memory back to its host (free page reporting), and what writes gigabytes waits in some "
    "rounds for it to be there again; docs/performance.md tells more under ext4 `big`"
)


def takes_memory_back(sysfs: Path = Path("/sys")) -> bool:
    """Whether the host gets this machine's free memory, and backs it anew at its next use."""
    try:
        order = int((sysfs / "module/page_reporting/parameters/page_reporting_order").read_text())
        features = [path.read_text() for path in (sysfs / "bus/virtio/drivers/virtio_balloon").glob("virtio*/features")]
    except (OSError, ValueError):
        return False
    return order <= _MAX_PAGE_ORDER and any(bits[_REPORTING : _REPORTING + 1] == "1" for bits in features)
