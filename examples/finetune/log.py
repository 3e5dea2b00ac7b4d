"""The log of a run."""

import json
from pathlib import Path
from typing import Any


class Log:
    """JSON lines, and TensorBoard scalars where it is installed."""

    def __init__(self, path: Path, step: int) -> None:
        """Keep the lines up to that step, which a resumed run does not repeat."""
        self.path = path
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
        kept = [line for line, r in whole if r["step"] <= step and r["event"] != "test"]
        path.write_text("".join(kept))
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.writer = None
        else:
            self.writer = SummaryWriter(path.with_suffix(""), purge_step=step + 1)

    def __call__(self, event: str, step: int, **fields: Any) -> None:
        """Write a line."""
        with self.path.open("a") as file:
            file.write(json.dumps({"event": event, "step": step, **fields}, default=str) + "\n")
        for name, value in fields.items():
            if self.writer and isinstance(value, float):
                self.writer.add_scalar(f"{event}/{name}", value, step)
