"""The memory of this process. Standard library only."""

import ctypes
import sys


def give_back_memory() -> None:
    """Returns memory that was freed to the operating system, where the C library can (glibc).

    glibc keeps freed blocks of up to 32 MB for each thread. Over a long run that adds up to gigabytes.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # musl has none
        trim(0)
