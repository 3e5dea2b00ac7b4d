"""The lines of an experiment: one JSON object for each evaluation, of finished cells only."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Line = dict[str, Any]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep a second runner from the same file, and cut off a line that a kill left torn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"{path} is being written by another run: wait for it") from None
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        yield


def append(path: Path, lines: list[Line]) -> None:
    """Write all lines of a finished cell; its last line says that they are all."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
        file.flush()


def read(folder: Path) -> dict[str, list[Line]]:
    """Return the lines of every finished cell by its key, whichever experiment ran it."""
    cells: dict[str, list[Line]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            if line["event"] == "start":  # what stood there before was not finished
                cells[line["cell"]] = []
            cells[line["cell"]].append(line)
    return {key: lines for key, lines in cells.items() if lines[-1]["event"] == "end"}


def scores(cells: dict[str, list[Line]]) -> dict[str, float]:
    """Return the best loss on dev of each cell; inf where it diverged."""
    return {
        key: min((x["loss"] for x in lines if x["event"] == "dev"), default=float("inf"))
        for key, lines in cells.items()
    }
