"""The lines of an experiment: one JSON object for each evaluation, of finished cells only.

A run writes NAME.jsonl. What is published is compressed: `gzip -9nc NAME.jsonl >> NAME.jsonl.gz`.
"""

import fcntl
import gzip
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Line = dict[str, Any]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second runner from the folder, and cut off lines that a kill left torn."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another run writes to {folder}: wait for it") from None
        for path in folder.glob("*.jsonl"):
            with path.open("r+b") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
        yield


def append(path: Path, lines: list[Line]) -> None:
    """Write all lines of a finished cell; its last line says that they are all."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
        file.flush()


def read(folder: Path) -> dict[str, list[Line]]:
    """Return the lines of every finished cell by its key."""
    finished: dict[str, list[Line]] = {}
    for path in sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")]):
        content = path.read_bytes()
        text_of_file = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
        lines: list[Line] = []
        for text in text_of_file.split("\n")[:-1]:  # the last one may be torn
            line = json.loads(text)
            lines = [line] if line["event"] == "start" else [*lines, line]
            if line["event"] == "end":
                finished[line["cell"]] = lines
    return finished


def scores(cells: dict[str, list[Line]]) -> dict[str, float]:
    """Return the best loss on dev of each cell; inf where it diverged."""
    bests = {key: lines[-1]["best"] for key, lines in cells.items()}
    return {key: math.inf if best is None else best for key, best in bests.items()}
