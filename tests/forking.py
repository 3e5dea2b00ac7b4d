"""Groups of processes, forked from one that has started: a start of Python costs seconds."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

DEADLINE = 120.0  # seconds, after which the processes of a group are killed

ENDS = 300.0  # seconds, after which a worker is killed

Work = Callable[[int, Path], object]


def run_worker(script: str, folder: Path) -> str:
    """Run a script that calls `in_a_group`, and return what it printed as errors."""
    done = subprocess.run(
        [sys.executable, script, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=ENDS,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def in_a_group(work: Work, folder: Path, name: str, size: int = 2, timeout: float = 20.0) -> None:
    """Do `work(rank, folder)` in forked processes, and wait for their end.

    What it returns is in `name.rank.json`; what it raises is printed.
    """
    gc.freeze()  # what looks at all objects need not look at those of the imports
    children = [_forked(work, folder, name, rank, size, timeout) for rank in range(size)]
    deadline = time.monotonic() + DEADLINE
    for child in children:
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.01)


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _forked(work: Work, folder: Path, name: str, rank: int, size: int, timeout: float) -> int:
    if child := os.fork():
        return child
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / name.replace(' ', '_')}.store",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
        )
        found = work(rank, folder)
        (folder / f"{name}.{rank}.json").write_text(json.dumps(found))
    except BaseException as error:
        print(f"{name}, rank {rank}: {error!r}", file=sys.stderr, flush=True)
    os._exit(0)
