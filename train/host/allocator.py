"""Keep freed memory in the process: half of a CPU training step can otherwise be page faults.

XLA:CPU frees its temporaries after every call.  glibc hands such large blocks straight back to the system, so
the next call faults every page in again.  XLA's threads have heaps of their own, which hold no block above 64 MiB
(malloc's HEAP_MAX_SIZE) and would map each of those anew, so here all threads share the main heap.  This belongs to
a program, never to a library: it changes the whole process, and has to come before other threads ask for memory.
"""

import ctypes
import platform

# glibc's malloc.h; mallopt takes a C int.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc to keep one heap, to grow it in large steps, never to shrink it, and not to map large blocks.

    Returns:
      Whether it took effect.  False where the C library is not glibc, where nothing is changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = (
        (_M_ARENA_MAX, 1),
        (_M_MMAP_MAX, 0),
        (_M_TRIM_THRESHOLD, _LARGEST_INT),
        (_M_TOP_PAD, 256 * 2**20),
    )
    return all(libc.mallopt(name, value) == 1 for name, value in settings)
