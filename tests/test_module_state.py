"""RosaModule: what it keeps of forward passes, in its state dict, and in copies of it."""

import copy
import gc
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as torch_checkpoint

import rosa_func
from models import (
    gpt2_and_rosa_module,
    randn,
    seeded,
    tiny_gpt2,
    token_ids,
)
from references import model_snapshot, state_bytes, storage_pointers
from rosa_func import samplers
from rosa_func._torch import version
from rosa_func.module import RosaModule


class TestBuffers:
    """BatchNorm kept no statistics under a RosaModule: 0.0, stock 0.97."""

    def stock_and_module(self) -> tuple[nn.Module, nn.Module, Any, RosaModule]:
        build = lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))  # noqa: E731
        stock, model = seeded(build), seeded(build)
        state = rosa_func.init(model, 2)
        return stock, model, state, RosaModule(model, state)

    def test_the_statistics_of_a_forward_pass_in_training_are_kept_in_the_module_alone(self):
        stock, model, state, module = self.stock_and_module()
        before, bits = model_snapshot(model), state_bytes(state)
        for seed in range(3):
            x = randn(50, 6, seed=seed) + 2
            module(x).sum().backward()
            stock(x)
        module.eval()(x)
        stock.eval()(x)
        kept = rosa_func.merge(module.state)
        assert stock[1].running_mean.abs().max() > 0.1
        for name, buffer in stock.named_buffers():
            torch.testing.assert_close(kept[name], buffer)
        torch.testing.assert_close(module(x), stock(x))
        assert model_snapshot(model) == before
        assert state_bytes(state) == bits

    def test_statistics_of_inference_mode_can_be_written_to_afterwards(self):
        stock, _, _, module = self.stock_and_module()
        x = randn(50, 6)
        with torch.inference_mode():
            module(x)
            stock(x)
        module.load_state_dict(module.state_dict())
        torch.testing.assert_close(
            rosa_func.merge(module.state)["1.running_mean"], stock[1].running_mean
        )

    def test_buffers_that_no_state_holds_are_dropped_with_the_attributes_beside_them(self):
        """A rotary embedding that was grown for a long input kept half of what it had set."""

        class Growing(nn.Linear):
            def __init__(self) -> None:
                super().__init__(6, 4)
                self.longest = 2
                self.register_buffer("scale", torch.ones(()), persistent=False)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                if len(x) > self.longest:
                    self.longest = len(x)
                    self.register_buffer("scale", torch.tensor(3.0), persistent=False)
                return super().forward(x) * self.scale

        model = seeded(Growing)
        module, x = RosaModule(model, rosa_func.init(model, 2)), randn(2, 6)
        first = module(x)
        module(randn(5, 6))
        assert torch.equal(module(x), first)
        assert (model.longest, model.scale.item()) == (2, 1.0)


class TestStateDict:
    @pytest.mark.filterwarnings("ignore")  # about torch.distributed.checkpoint without processes
    @pytest.mark.parametrize("sampler", [samplers.random, samplers.lora])
    def test_a_state_dict_that_is_loaded_in_place_writes_to_the_module_alone(
        self, tmp_path: Path, sampler: Any
    ):
        """The caller's state became 0.40 off, and with `lora` the model's weight by 0.27."""
        model = seeded(tiny_gpt2)
        state = rosa_func.init(model, 2, sampler=sampler, train="ln_f")
        before, bits = model_snapshot(model), state_bytes(state)
        module = RosaModule(model, state)
        others = {key: torch.ones_like(value) for key, value in module.state_dict().items()}
        torch_checkpoint.save({"m": others}, checkpoint_id=tmp_path)
        torch_checkpoint.load({"m": module.state_dict()}, checkpoint_id=tmp_path)
        assert all(torch.equal(value, others[key]) for key, value in module.state_dict().items())
        assert model_snapshot(model) == before
        assert state_bytes(state) == bits

    def test_a_state_dict_takes_no_second_copy_of_what_the_module_alone_has(self):
        model, module = gpt2_and_rosa_module()
        before = storage_pointers(module.buffers())
        assert before & storage_pointers(model.parameters())
        module(token_ids(2, 8))
        assert storage_pointers(module.buffers()) == before  # none is copied for its own sake
        first = storage_pointers(module.state_dict().values())
        assert not first & storage_pointers(model.parameters())
        assert storage_pointers(module.state_dict().values()) == first


class TestCopies:
    """A RosaModule could not be pickled: its class had no name to be found by."""

    @pytest.mark.parametrize("how", ["pickle", "torch.save", "deepcopy"])
    def test_a_copy_computes_the_same_and_is_its_own(self, how: str):
        _, module = gpt2_and_rosa_module()
        file, ids = io.BytesIO(), token_ids(2, 8)
        if how == "pickle":
            twin = pickle.loads(pickle.dumps(module))
        elif how == "torch.save":
            torch.save(module, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        else:
            twin = copy.deepcopy(module)
        assert type(twin) is type(module)
        expected = module(ids).logits
        assert torch.equal(twin(ids).logits, expected)
        twin.resample(1)
        with torch.no_grad():
            next(twin.parameters()).add_(1.0)
        assert not torch.equal(twin(ids).logits, expected)
        assert torch.equal(module(ids).logits, expected)
        module.load_state_dict(twin.state_dict())
        assert torch.equal(twin(ids).logits, module(ids).logits)


class TestAverages:
    """AveragedModel mixed the factors of two subspaces after a resample, silently: 0.26 off."""

    def trained(self, module: RosaModule, seed: int) -> None:
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        module(token_ids(2, 8, seed=seed)).logits.square().mean().backward()
        optimizer.step()

    @pytest.mark.parametrize("use_buffers", [False, True])
    def test_a_resample_warns_once_an_average_has_begun(self, use_buffers: bool):
        _, module = gpt2_and_rosa_module()
        ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
        average = torch.optim.swa_utils.AveragedModel(
            module, multi_avg_fn=ema, use_buffers=use_buffers
        )
        self.trained(module, 0)
        module.resample(1)  # before the first update, which copies
        self.trained(module, 1)
        average.update_parameters(module)
        before, ids = state_bytes(module.state.detach()), token_ids(2, 8)
        assert torch.equal(average(ids).logits, module(ids).logits)
        with pytest.raises(UserWarning, match=r"AveragedModel.*export\.to_module"):
            module.resample(2)
        assert state_bytes(module.state.detach()) == before
        del average
        gc.collect()
        module.resample(2)

    def test_a_resample_does_not_warn_of_other_copies(self):
        _, module = gpt2_and_rosa_module()
        reference, twin = copy.deepcopy(module), copy.deepcopy(module)
        for one in (module, twin):
            self.trained(one, 0)
            one.resample(1)
        self.trained(twin, 1)
        module.resample(2)
        assert not any(version(p) for p in reference.parameters())
