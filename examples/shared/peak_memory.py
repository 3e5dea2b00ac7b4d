"""The peak resident memory of a process."""

import ctypes
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_memory_of_this_process() -> float:
    """Return the peak resident memory of this process in MiB."""
    if STATUS.exists():
        # On Linux ru_maxrss counts the parent's peak too: it survives fork and exec.
        return _in_status("VmHWM")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def memory_of_this_process() -> float:
    """Return the resident memory of this process in MiB, NaN where the system does not say."""
    return _in_status("VmRSS") if STATUS.exists() else float("nan")


def _in_status(key: str) -> float:
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines[key].split()[0]) / 2**10


def give_back_freed_memory() -> None:
    """Let malloc return to the system what it keeps of freed memory (glibc's can)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def reset_peak_memory() -> None:
    """Let the peak start from what is held now, where the system can (Linux)."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
