"""The texts of the experiments: prose, source code, and the GPT-2 tokenizer, whole or cut short."""

import ast
import hashlib
import json
import sysconfig
from pathlib import Path
from pydoc_data import topics
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from examples.shared.text import load_rows

END = "<|endoftext|>"  # between two documents


def prose(names: list[str], data: Path | None) -> list[str]:
    """Return the documents of the named corpora: eli5, gsm8k, topics, docstrings."""
    texts: list[str] = []
    for name in names:
        if name == "eli5":
            texts += [answer for _, answer in load_rows("eli5", "train", _folder(data, "eli5"))]
        elif name == "gsm8k":
            path = (data or Path()) / "gsm8k" / "train.jsonl"
            if data is None or not path.is_file():
                raise SystemExit(f"the corpus gsm8k is read from --data DIR/gsm8k, got {data}")
            lines = path.read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines]
            texts += [f"{row['question']}\n{row['answer']}" for row in rows]
        elif name == "topics":
            texts += [text for _, text in sorted(topics.topics.items())]
        elif name == "docstrings":
            texts += docstrings()
        else:
            raise SystemExit(f"no corpus {name!r}; there are eli5, gsm8k, topics and docstrings")
    return texts


def docstrings() -> list[str]:
    """Return the longer docstrings of the standard library."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = []
    for path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        found += [text for text in texts if text and len(text) > 80]
    return found


def source(split: str) -> list[str]:
    """Return source code of the standard library; whole modules are dev (1 in 8) or test."""

    def of(path: Path) -> str:
        eighth = hashlib.sha256(path.name.encode()).digest()[0] % 8
        return {0: "dev", 1: "test"}.get(eighth, "train")

    return [path.read_text(encoding="utf-8") for path in modules() if of(path) == split]


def modules() -> list[Path]:
    """Return the top-level modules of the standard library, in the order of their names."""
    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py"))


def tokenizer(vocabulary: int, data: Path | None) -> PreTrainedTokenizerFast:
    """Return GPT-2's tokenizer with only its first merges, so that a small model can have it.

    No text is unknown to it: what a missing merge would have joined stays in shorter pieces.
    """
    if data is None:
        whole = Tokenizer.from_pretrained("openai-community/gpt2")
    else:
        whole = Tokenizer.from_file(str(data / "gpt2_tokenizer" / "tokenizer.json"))
    parts: dict[str, Any] = json.loads(whole.to_str())
    model = parts["model"]
    last = min(vocabulary, len(model["vocab"])) - 1  # the end of a text keeps the last place
    model["merges"] = model["merges"][: last - 256]
    kept = {token: i for token, i in model["vocab"].items() if i < last and token != END}
    model["vocab"] = kept | {END: last}
    parts["added_tokens"] = [
        {**token, "id": last} for token in parts["added_tokens"] if token["content"] == END
    ]
    short = Tokenizer.from_str(json.dumps(parts))
    return PreTrainedTokenizerFast(tokenizer_object=short, eos_token=END, pad_token=END)


def _folder(data: Path | None, name: str) -> Path | None:
    return None if data is None else data / name
