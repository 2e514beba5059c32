"""Memory of a test process: compiled programs stay until JAX is told to let them go."""

import contextlib
import ctypes
import gc
import os
import sys
from pathlib import Path

import jax

# A worker of the tests stays under 3 GB: this much, and what one test adds.
BOUND = 2 << 30
# Programs that were just let go are compiled again if a test needs them, so not too
# often.
STEP = 1 << 28


def resident_bytes() -> int:
    """The physical memory of this process, or 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def release() -> int:
    """Let compiled programs go; return the memory that is left."""
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # glibc keeps what is freed
    return resident_bytes()


class Watch:
    """Releases memory above a bound, and again when it has grown by a step."""

    def __init__(self, bound: int = BOUND, step: int = STEP):
        self.bound = self.next = bound
        self.step = step
        self.releases: list[tuple[int, int]] = []  # bytes before and after

    def look(self) -> None:
        """Release if there is too much."""
        before = resident_bytes()
        if before > self.next:
            after = release()
            self.releases.append((before, after))
            self.next = max(self.bound, after + self.step)
