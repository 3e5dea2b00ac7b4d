"""The tasks by name; each imports what it needs when it is loaded."""

from pathlib import Path
from typing import Any

from examples.experiments.task import Task


def modules(setting: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of the modules beside this one that the task of an experiment imports."""
    kind = setting["task"].partition("/")[0]
    return (kind,) if kind in ("regression", "glue") else ("text", "generation")


def load(setting: dict[str, Any], seed: int, data: Path | None, cache: Path) -> Task:
    """Return the task of an experiment; the seed is that of a new head."""
    kind, _, name = setting["task"].partition("/")
    if kind == "regression":
        from examples.experiments import regression

        return regression.load(name, setting, seed)
    if kind == "glue":
        from examples.experiments import glue

        return glue.load(name, setting, seed, data)
    from examples.experiments import text

    return text.load(kind, setting, data, cache)
