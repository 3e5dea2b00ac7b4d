"""The README's Python blocks run as written, one after the other, on a tiny GPT-2."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

import rosa_func
from models import seeded, tiny_gpt2, token_ids

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.filterwarnings("ignore::UserWarning")  # from transformers, about tied weights
def test_the_python_blocks_of_the_readme_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    seeded(lambda: tiny_gpt2(6, n_positions=32)).save_pretrained(tmp_path / "folder")
    monkeypatch.setattr(
        GPT2LMHeadModel,
        "from_pretrained",
        lambda name: seeded(lambda: tiny_gpt2(6, n_positions=32)),
    )
    ids = token_ids(2, 6)
    names: dict[str, object] = {
        "model": seeded(lambda: tiny_gpt2(6, n_positions=32)),
        "ids": ids,
        "batches": [ids] * 101,
    }
    names |= {
        "pretrained": seeded(lambda: tiny_gpt2(6, n_positions=32)),
        "folder": tmp_path / "folder",
    }
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert isinstance(names["value"], torch.Tensor)
    assert names["out"].logits.isfinite().all()
    # A step forgets the graph of those before it, also where an optimizer had the leaves.
    step: Any = names["step"]
    names["model"] = model = seeded(lambda: tiny_gpt2(6, n_positions=32))
    state = rosa_func.init(model, 2)
    rosa_func.parameters(state)
    state, _ = step(state, ids)
    assert not any(leaf.requires_grad for leaf in rosa_func.weight.layout.leaves(state).values())
