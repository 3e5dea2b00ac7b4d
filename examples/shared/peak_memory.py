"""The peak resident memory of a process."""

import sys
from pathlib import Path


def memory_of_this_process() -> float:
    """Return the resident memory of this process in MiB, or its peak (not Linux)."""
    return _status("VmRSS")


def peak_memory_of_this_process() -> float:
    """Return the peak resident memory of this process in MiB."""
    return _status("VmHWM")


def _status(entry: str) -> float:
    status = Path("/proc/self/status")
    if status.exists():
        # On Linux ru_maxrss counts the parent's peak too: it survives fork and exec.
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines[entry].split()[0]) / 2**10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def reset_peak_memory() -> None:
    """Let the peak start from what is held now, where the system can (Linux)."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
