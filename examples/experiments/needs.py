"""What experiments read from --data, looked for before a model is read or a cell is started."""

from pathlib import Path
from typing import Any

from examples.experiments import base, plan


def check(experiments: list[plan.Experiment], data: Path | None) -> None:
    """Refuse a folder that is not there, or that lacks what one of the experiments reads."""
    needed = [
        (path, f"{experiment.name}: {reason}")
        for experiment in experiments
        for path, reason in files(experiment.setting).items()
    ]
    if data is None:
        lacking = [f"{path} ({of})" for path, of in needed if path.startswith("gsm8k")]
        head = "without --data DIR the Hub is read, which has no"
    else:
        lacking = [f"{data / path} ({of})" for path, of in needed if not (data / path).is_file()]
        head = f"--data {data}: there is no"
        if not data.is_dir():
            raise SystemExit("\n  ".join([f"{head} such folder; expected:", *lacking]))
    if lacking:
        raise SystemExit("\n  ".join([head, *lacking]))


def files(setting: dict[str, Any]) -> dict[str, str]:
    """Return the files that a setting reads, by their paths in the folder, and what for."""
    kind, _, name = setting["task"].partition("/")
    model, _, of = setting.get("model", "").partition(":")
    found = {}
    if model == "base":
        for corpus in base.settings(of)["corpora"]:
            if corpus in ("eli5", "gsm8k"):  # the others are Python's own
                found[f"{corpus}/train.jsonl"] = f"its base model, {of}, is trained on it"
        found["gpt2_tokenizer/tokenizer.json"] = f"its base model, {of}, has a part of it"
    splits = {"glue": ("train", "dev"), "gsm8k": ("train", "test")}
    splits |= dict.fromkeys(("e2e", "eli5"), tuple(setting["rows"]))
    folder = f"glue/{name}" if kind == "glue" else kind
    return found | {f"{folder}/{split}.jsonl": "its data" for split in splits.get(kind, ())}
