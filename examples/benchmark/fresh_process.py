"""A measurement in a process of its own, whose memory is no other's."""

import json
import os
import subprocess
import sys
from pathlib import Path

# For the environment of a process whose peak is to be what was in use. glibc else keeps freed
# tensors of up to 32 MiB for others that may not fit: two layers that train nothing had a peak of
# 164 MiB by that, and used 87.
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536"}

ROOT = Path(__file__).parents[2]


def in_a_process(module: str, *arguments: str, **variables: str) -> dict[str, float]:
    """Run a module as a command; return the JSON object that it prints last.

    Args:
        module: the module.
        arguments: of the command.
        variables: of the environment, beside those of this process.
    """
    command = [sys.executable, "-m", module, *arguments]
    environment = os.environ | variables
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode:
        said = " ".join(["python", *command[1:]])
        raise SystemExit(f"{said} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
