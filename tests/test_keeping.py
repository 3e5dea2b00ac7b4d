"""Where a compensation is kept: beside the weights, on the host, or mapped in a folder."""

import gc
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from transformers import GPT2LMHeadModel

import rosa_func
from models import seeded, tiny_gpt2, token_ids
from references import perturbed, state_bytes, storage_pointers
from rosa_func import samplers, sparse
from rosa_func.checkpoint import digest
from rosa_func.module import RosaModule
from rosa_func.weight import read
from rosa_func.weight.dense import Dense
from rosa_func.weight.keeping import Kept, kept_as
from rosa_func.weight.layout import entries


def model_in_16_bit() -> GPT2LMHeadModel:
    return seeded(tiny_gpt2).to(torch.bfloat16)


def losses(state: TensorDict) -> list[Tensor]:
    return list(state["compensation"].values())


def are_in(folder: Path | str, state: TensorDict) -> bool:
    """Return whether every compensation is mapped to a file that was in the folder."""
    names = [lost.untyped_storage().filename for lost in losses(state)]
    return all(name is not None and Path(name).parent == Path(folder) for name in names)


def are_in_memory(state: TensorDict) -> bool:
    return all(lost.untyped_storage().filename is None for lost in losses(state))


def saved(folder: Path) -> Path:
    model_in_16_bit().save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


class TestInAFolder:
    """It took as much memory as it has bytes, though no forward pass reads it."""

    @pytest.mark.parametrize("exact", [None, True])
    def test_init_and_all_after_it_keep_it_there_with_the_same_bits(self, place, exact):
        model = model_in_16_bit()
        state = rosa_func.init(model, 2, exact=exact, compensation=place)
        expected = rosa_func.init(model, 2, exact=exact)
        for function in (
            lambda state: state,
            lambda state: perturbed(state, 1e-2),
            lambda state: rosa_func.resample(state, 1),
            lambda state: sparse.add(state, sparse.support_random(state, 0.1, 0)),
            lambda state: perturbed(state, 1e-2),
            sparse.remove,
            lambda state: rosa_func.distributed.resample(state, 2),
        ):
            state, expected = function(state), function(expected)
            assert digest(state) == digest(expected)
            assert are_in(place, state) and are_in_memory(expected)
            assert all(lost.numel() for lost in losses(state))
        merged, weights = rosa_func.merge(state), rosa_func.merge(expected)
        assert all(torch.equal(merged[name], W) for name, W in weights.items())
        assert digest(rosa_func.checkpoint.delta(state, model)) == digest(
            rosa_func.checkpoint.delta(expected, model)
        )

    def test_init_from_and_a_method_put_it_there(self, place, tmp_path):
        folder = saved(tmp_path)
        _, state = rosa_func.init_from(folder, 2, compensation=str(place))
        assert are_in(place, state)
        state = rosa_func.method(2, compensation=place).init(model_in_16_bit())
        assert are_in(place, state)

    def test_what_is_lost_later_is_kept_there_too(self, place):
        """With LoRA nothing is lost before the first merge."""
        state = rosa_func.init(model_in_16_bit(), 2, sampler=samplers.lora, compensation=place)
        assert not any(lost.numel() for lost in losses(state))
        state = rosa_func.resample(perturbed(state, 1e-2), 1)
        assert all(lost.numel() for lost in losses(state)) and are_in(place, state)

    def test_a_relative_folder_is_that_of_the_start(self, place, monkeypatch):
        monkeypatch.chdir(place.parent)
        state = rosa_func.init(model_in_16_bit(), 2, compensation="place")
        monkeypatch.chdir("/")
        assert are_in(place, rosa_func.resample(state, 1))

    def test_old_and_new_states_live_side_by_side(self, place):
        old = rosa_func.init(model_in_16_bit(), 2, compensation=place)
        before = state_bytes(old)
        new = rosa_func.resample(old, 1)
        assert not storage_pointers(losses(old)) & storage_pointers(losses(new))
        assert state_bytes(old) == before

    def test_nothing_is_left_in_the_folder(self, place):
        """Not even by a run that is killed: a file has no name while it is used."""
        state = rosa_func.init(model_in_16_bit(), 2, compensation=place)
        state = rosa_func.resample(state, 1)
        assert not list(place.iterdir())

    @pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux lists what is mapped")
    def test_its_space_is_given_back_with_the_state(self, place):
        def mapped() -> int:
            return Path("/proc/self/maps").read_text().count(str(place))

        state = rosa_func.init(model_in_16_bit(), 2, compensation=place)
        assert mapped() == len(losses(state))
        new = rosa_func.resample(state, 1)
        del state
        gc.collect()
        assert mapped() == len(losses(new))
        del new
        gc.collect()
        assert not mapped()


class TestMoved:
    def test_a_loaded_state_has_it_in_memory_until_it_is_moved(self, place, tmp_path):
        state = rosa_func.init(model_in_16_bit(), 2, compensation=place)
        rosa_func.checkpoint.save(tmp_path / "state.safetensors", state)
        loaded, _ = rosa_func.checkpoint.load(tmp_path / "state.safetensors")
        assert are_in_memory(loaded)
        back = rosa_func.keep_compensation(loaded, place)
        assert are_in(place, back) and are_in(place, rosa_func.resample(back, 1))
        in_memory = rosa_func.keep_compensation(back, None)
        assert are_in_memory(in_memory)
        assert digest(state) == digest(loaded) == digest(back) == digest(in_memory)
        own = {path: t for path, t in entries(back).items() if path[0] != "compensation"}
        assert all(t is entries(loaded)[path] for path, t in own.items())

    def test_a_state_that_keeps_none_stays_as_it_is(self, place):
        state = rosa_func.init(seeded(tiny_gpt2), 2, compensation=place)
        assert "compensation" not in state.keys()
        assert digest(rosa_func.keep_compensation(state, place)) == digest(state)

    def test_on_the_host_it_stays_there_where_the_weights_are_elsewhere(self):
        """Here the weights are on the meta device; with a GPU it has not been tried."""
        lost, R = torch.ones(4, 6, dtype=torch.int8), torch.empty(4, 6, device="meta")
        (w,) = read(rosa_func.init(torch.nn.Linear(6, 4).bfloat16(), 1)).adapted().values()
        kept = kept_as(w._replace(base=Dense(R), lost=lost))
        assert kept == Kept(torch.int8, "cpu")
        assert kept.keep(lost).device.type == "cpu"
        assert kept_as(w) == Kept(torch.int8, None)


class TestRosaModule:
    def test_a_module_keeps_it_in_the_folder(self, place):
        model = model_in_16_bit()
        state = rosa_func.init(model, 2, compensation=place)
        module, expected = RosaModule(model, state), RosaModule(model, rosa_func.init(model, 2))
        for change in (
            lambda module: module,
            lambda module: module.resample(1),
            lambda module: module.to("cpu"),
            lambda module: module.state_dict(),
            lambda module: module.load_state_dict(module.state_dict()),
            lambda module: module.resample(2),
        ):
            change(module), change(expected)
            assert are_in(place, module.state) and are_in_memory(expected.state)
            assert digest(module.state) == digest(expected.state)
        handed_out = {n: t for n, t in module.state_dict().items() if n.startswith("compensation")}
        assert not storage_pointers(handed_out.values()) & storage_pointers(losses(state))

    def test_what_moves_a_module_leaves_it_there(self, place):
        model = model_in_16_bit()
        module = RosaModule(model, rosa_func.init(model, 2, compensation=place))
        module._apply(lambda t: t.clone())
        assert are_in(place, module.state)

    def test_a_state_with_none_lost_yet_is_loaded_into_the_folder(self, place):
        model, options = model_in_16_bit(), {"sampler": samplers.lora}
        trained = RosaModule(model, perturbed(rosa_func.init(model, 2, **options), 1e-2))
        trained.resample(1)
        module = RosaModule(model, rosa_func.init(model, 2, **options, compensation=place))
        module.load_state_dict(trained.state_dict())
        assert digest(module.state) == digest(trained.state) and are_in(place, module.state)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let writes to longer files fail, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


USES: dict[str, Callable[[TensorDict], Any]] = {
    "resample": lambda state: rosa_func.resample(state, 1),
    "remove": sparse.remove,
    "keep_compensation": lambda state: rosa_func.keep_compensation(
        rosa_func.keep_compensation(state, None),
        Path(losses(state)[0].untyped_storage().filename).parent,
    ),
}


class TestRefusals:
    @pytest.mark.parametrize("given", [0, True, torch.device("cpu"), b"folder"], ids=str)
    def test_what_is_no_place_is_named(self, given, tmp_path):
        model = model_in_16_bit()
        with pytest.raises(TypeError, match="compensation is None, 'cpu' or a folder, got"):
            rosa_func.init(model, 2, compensation=given)
        with pytest.raises(TypeError, match="compensation is None, 'cpu' or a folder, got"):
            rosa_func.init_from(saved(tmp_path), 2, compensation=given)
        with pytest.raises(TypeError, match="compensation is None, 'cpu' or a folder, got"):
            rosa_func.keep_compensation(rosa_func.init(model, 2), given)

    def test_a_folder_that_is_not_there_is_named_before_any_work(self, place, tmp_path):
        def never(*_: Any) -> Any:
            raise AssertionError

        model = model_in_16_bit()
        with pytest.raises(FileNotFoundError, match=r"kept in .*missing.*Make the folder"):
            rosa_func.init(model, 2, sampler=never, compensation=place / "missing")
        (place / "file").touch()
        with pytest.raises(NotADirectoryError, match=r"kept in .*file"):
            rosa_func.init(model, 2, sampler=never, compensation=place / "file")
        if os.geteuid():  # root writes everywhere
            place.chmod(0o500)
            with pytest.raises(PermissionError, match="kept in"):
                rosa_func.init(model, 2, sampler=never, compensation=place)

    @pytest.mark.parametrize("use", USES)
    def test_a_folder_that_is_gone_loses_nothing(self, use, place, tmp_path):
        state = rosa_func.init(model_in_16_bit(), 2, compensation=place)
        state = perturbed(sparse.add(state, sparse.support_random(state, 0.1, 0)), 1e-2)
        before, merged = state_bytes(state), rosa_func.merge(state)
        shutil.rmtree(place)
        with pytest.raises(FileNotFoundError, match=r"kept in .*place.*keep_compensation"):
            USES[use](state)
        assert state_bytes(state) == before
        assert all(torch.equal(merged[n], W) for n, W in rosa_func.merge(state).items())
        other = rosa_func.keep_compensation(state, tmp_path)
        assert are_in(tmp_path, rosa_func.resample(other, 1))

    @pytest.mark.parametrize("use", USES)
    def test_a_full_folder_loses_nothing(self, use, place):
        """A write to mapped memory on a full disk would end the process."""
        state = rosa_func.init(model_in_16_bit(), 2, compensation=place)
        state = perturbed(sparse.add(state, sparse.support_random(state, 0.1, 0)), 1e-2)
        before = state_bytes(state)
        with files_of_at_most(100), pytest.raises(OSError, match=r"bytes cannot be kept in .*room"):
            USES[use](state)
        assert not list(place.iterdir()) and state_bytes(state) == before
        assert are_in(place, rosa_func.resample(state, 1))

    def test_a_full_folder_is_named_by_a_module_that_stays_as_it_was(self, place):
        model = model_in_16_bit()
        module = RosaModule(model, rosa_func.init(model, 2, compensation=place))
        before, out = state_bytes(module.state.detach()), module(token_ids(2, 3)).logits
        with files_of_at_most(100), pytest.raises(OSError, match="cannot be kept in"):
            module.resample(1)
        assert state_bytes(module.state.detach()) == before
        assert torch.equal(module(token_ids(2, 3)).logits, out)
