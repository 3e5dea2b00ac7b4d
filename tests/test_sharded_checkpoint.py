"""Sharded states in folders: on other numbers of processes, bit for bit, and after a kill."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import rosa_func
import sharded_files_worker
from forking import run_worker
from models import seeded, tiny_gpt2
from rosa_func import checkpoint
from rosa_func.weight.layout import entries, is_frozen
from sharded_files_worker import READ, STATES, dense

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    run_worker(sharded_files_worker.__file__, folder)
    return folder


def of_rank(folder: Path, name: str, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.{rank}.json").read_text())
    return found


@pytest.mark.parametrize("name", STATES)
class TestOtherNumbersOfProcesses:
    def test_saved_by_four_and_loaded_by_two_it_has_the_same_bits(self, folder: Path, name: str):
        for rank in range(2):
            found = of_rank(folder, "loaded", rank)[name]
            assert found["extra"] == 7
            assert found["digest"] == checkpoint.digest(STATES[name]())
            assert found["sharded"]

    def test_saved_by_four_and_loaded_by_one_it_has_the_same_bits(self, folder: Path, name: str):
        state, extra = checkpoint.load(folder / name)
        assert list(entries(state)) == list(entries(STATES[name]()))
        assert checkpoint.digest(state) == checkpoint.digest(STATES[name]())
        assert extra["step"] == 7
        assert torch.equal(extra["random"], torch.arange(3))

    def test_saved_again_by_two(self, folder: Path, name: str):
        state, extra = checkpoint.load(folder / f"{name} again")
        assert checkpoint.digest(state) == checkpoint.digest(STATES[name]())
        assert extra == {"step": 8}

    def test_each_process_writes_its_rows_alone(self, folder: Path, name: str):
        sizes = [path.stat().st_size for path in (folder / name).glob("shards-*-[0-3].safetensors")]
        assert len(sizes) == 4
        whole = sum(t.nbytes for t in entries(STATES[name]()).values())
        assert max(sizes) < whole / 2  # a quarter, and the names


def test_of_a_hybrid_mesh_one_of_the_processes_with_the_same_rows_writes(folder: Path):
    state, _ = checkpoint.load(folder / "hybrid")
    assert checkpoint.digest(state) == checkpoint.digest(dense())
    index = json.loads(json.loads((folder / "hybrid" / "index.json").read_text())["content"])
    assert {len(pieces) for pieces in index["shards"].values()} == {2}


@pytest.mark.parametrize("victim", [0, 1])
class TestAProcessIsKilledInASave:
    def test_the_old_checkpoint_loads(self, folder: Path, victim: int):
        assert not (folder / f"killed by {victim}.{victim}.json").exists()
        state, extra = checkpoint.load(folder / f"killed {victim}")
        assert extra == {"step": 1}
        assert checkpoint.digest(state) == checkpoint.digest(dense())

    def test_the_other_is_told(self, folder: Path, victim: int):
        found = of_rank(folder, f"killed by {victim}", 1 - victim)
        assert f"could not save on rank {1 - victim}: another process is gone" in found["said"]


def test_a_process_holds_what_the_plan_of_a_rank_says(folder: Path):
    model = seeded(tiny_gpt2)
    plans = {
        "dense": rosa_func.plan(model, 2, dtype=torch.bfloat16, train="ln_f", ranks=2),
        "quantised": rosa_func.plan(model, 2, quantize="nf4_double", master=True, ranks=2),
    }
    for name, plan in plans.items():
        held = of_rank(folder, "loaded", 0)[name]["held"]
        assert held == plan.frozen + plan.compensation


class TestReadIntoShards:
    @pytest.mark.parametrize("name", READ)
    def test_it_is_the_state_of_one_process_bit_for_bit(self, folder: Path, name: str):
        _, state = rosa_func.init_from(folder / "gpt2", 2, **READ[name])
        whole = sum(t.nbytes for path, t in entries(state).items() if is_frozen(path))
        for rank in range(2):
            found = of_rank(folder, "read", rank)
            assert found[name] == checkpoint.digest(state)
            assert found[f"{name}, rows"] <= 0.6 * whole  # rows are whole, so some have one more

    def test_where_one_cannot_split_its_weight_both_say_so(self, folder: Path):
        first, second = (of_rank(folder, "read", rank)["failure"] for rank in range(2))
        assert first.startswith("RuntimeError: rank 1 could not init (ValueError: no draw of ")
        assert second.startswith("ValueError: no draw of ")


class TestRefusals:
    def test_what_cannot_be_saved_is_said_by_both(self, folder: Path):
        first, second = (of_rank(folder, "refused", rank) for rank in range(2))
        assert first["an extra"].startswith("TypeError: extra is of type object")
        assert second["an extra"].startswith(
            "RuntimeError: rank 0 could not save (TypeError: extra"
        )
        assert not (folder / "refused" / "index.json").exists()
        for found in (first, second):
            assert found["no parent"].startswith("FileNotFoundError")

    def test_a_damaged_file_is_said_by_both(self, folder: Path):
        first, second = (of_rank(folder, "refused", rank) for rank in range(2))
        assert first["damaged"].startswith("RuntimeError: rank 1 could not load (ValueError")
        assert second["damaged"].startswith("ValueError: ")
        assert "is not a whole safetensors file" in second["damaged"]

    def test_an_index_that_was_altered(self, folder: Path, tmp_path: Path):
        text = (folder / "dense" / "index.json").read_text()
        (tmp_path / "index.json").write_text(text.replace("shards-", "shards_", 1))
        with pytest.raises(ValueError, match="damaged: it does not have the checksum"):
            checkpoint.load(tmp_path)

    def test_a_folder_in_which_no_save_came_to_its_end(self, tmp_path: Path):
        with pytest.raises(FileNotFoundError, match="no save into this folder has ended"):
            checkpoint.load(tmp_path)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"content": 3, "sha256": ""}'])
    def test_an_index_of_something_else(self, tmp_path: Path, text: str):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(ValueError, match="is not of rosa_func"):
            checkpoint.load(tmp_path)
