"""A measurement in a process of its own, whose memory is no other's."""

import json
import os
import subprocess
import sys
from pathlib import Path

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
