"""The Python blocks of the README and of the guide run as written, on a tiny GPT-2."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "examples" / "guide"
RUNS_ON = [
    "training",
    "saving",
    "trainer",
    "transforms",
    "robust",
    "quantised",
    "sharding",
    "plan",
]  # from where the README ends
# As torchrun says it to a process that is alone.
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


def blocks(page: Path) -> list[str]:
    """Return the Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where the pages are run, and leave what they write."""
    return tmp_path_factory.mktemp("readme")


@pytest.fixture(scope="module")
def names(folder: Path) -> dict[str, Any]:
    """Run the README, and return the names that it defines."""
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.chdir(folder)
        for block in blocks(ROOT / "README.md"):
            exec(compile(block, "README.md", "exec"), found)
    return found


def test_the_loop_of_the_readme_learns_what_its_comments_say(names: dict[str, Any]):
    assert len(blocks(ROOT / "README.md")) == 2
    with torch.no_grad():
        before = names["loss"](names["rosa_func"].init(names["model"], 8), names["batches"][0])
        assert f"{before:.2f}" == "4.16"
        assert names["loss"](names["state"], names["batches"][0]) < 3.0
    prompt = names["prompt"]
    written = names["tuned"].generate(
        prompt, attention_mask=prompt > 0, max_new_tokens=3, do_sample=False
    )
    assert written.tolist() == [[7, 8, 9, 10, 11, 12]]


@pytest.mark.filterwarnings("ignore::UserWarning")  # from transformers, about tied weights
@pytest.mark.filterwarnings("ignore::FutureWarning")  # gradient_checkpointing_enable has a new name
@pytest.mark.parametrize("page", RUNS_ON)
def test_the_python_blocks_of_the_guide_run_with_what_the_readme_defines(
    page: str, names: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Some had names that no page defined, such as `pretrained` and `folder`."""
    monkeypatch.chdir(folder)
    for name, value in ALONE.items():
        monkeypatch.setenv(name, value)
    own = dict(names)
    found = blocks(GUIDE / f"{page}.md")
    assert found
    for block in found:
        exec(compile(block, f"{page}.md", "exec"), own)


def test_all_pages_of_the_guide_with_code_are_run():
    assert {page.stem for page in GUIDE.glob("*.md") if blocks(page)} == set(RUNS_ON)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted(GUIDE.glob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_readme_can_be_read_in_a_few_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
