"""The memory that this process holds. Standard library only."""

import ctypes
import sys


def give_back_memory() -> None:
    """Returns to the system what is free: glibc keeps a thread's blocks of up to 32 MB, in time gigabytes of them."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # musl has none
        trim(0)
