"""Experts, and what else is no layer of peft, as an adapter's `target_parameters`, and back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tensordict import TensorDict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import rosa_func
from models import MOE_BUILDERS, MOE_NAMES, ModelCall, randn, seeded, stock_model, stock_moe
from modules import Experts
from references import model_snapshot, perturbed
from rosa_func import export

# peft warns about names that it or transformers changed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

EXPERTS = ["*experts.gate_up_proj", "*experts.down_proj"]
ROUTERS = {"gpt-oss": "*mlp.router.weight", "deepseek-v3": "*1.mlp.gate.weight"}


def logits(model: Any, case: ModelCall) -> Tensor:
    with torch.no_grad():
        return model(*case.args, **case.kwargs).logits


def called(case: ModelCall, state: TensorDict) -> Tensor:
    return rosa_func.call(case.model, state, *case.args, **case.kwargs).logits.detach()


def trained(model: nn.Module, r: Any, **options: Any) -> TensorDict:
    """Return a state that was moved, resampled, and moved again."""
    state = perturbed(rosa_func.init(model, r, **options), 0.02)
    return perturbed(rosa_func.resample(state, 1), 0.02, seed=1)


def assert_near(found: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max().clamp_min(1.0))
    assert float((found - expected).abs().max()) <= 1e-5 * scale


class TestToPeft:
    @pytest.mark.parametrize("name", MOE_NAMES)
    @pytest.mark.parametrize("state_of", [trained, rosa_func.init], ids=["trained", "first"])
    def test_stock_peft_computes_what_call_computes(
        self, tmp_path: Path, name: str, state_of: Any, recwarn: pytest.WarningsRecorder
    ):
        case = stock_moe(name)
        state = perturbed(state_of(case.model, 2), 0.02)
        before = model_snapshot(case.model)
        errors = export.to_peft(tmp_path, case.model, state)
        assert model_snapshot(case.model) == before
        assert errors.keys() == set(state["input_dim"].keys())
        assert any(key.endswith("experts.gate_up_proj") for key in errors)
        assert any("attn" in key for key in errors)
        expected = called(case, state)
        assert not torch.allclose(logits(case.model, case), expected, atol=1e-2)
        adapted = PeftModel.from_pretrained(stock_moe(name).model, tmp_path)
        assert not [w for w in recwarn if "match" in str(w.message)]  # names of the config
        assert_near(logits(adapted, case), expected)
        assert_near(logits(adapted.merge_and_unload(), case), expected)

    @pytest.mark.parametrize("name", MOE_NAMES)
    @pytest.mark.parametrize(
        ("targets", "r"),
        [
            (["*experts.down_proj"], 2),
            (["*1.mlp.experts.gate_up_proj"], 3),
            ([*EXPERTS, "*.q*_proj.weight"], {"*.q*": 1, "*.down_proj": 2, "*": 3}),
            ([*EXPERTS, "o_proj", "router"], {"*.down_proj": 1, "*": 2}),
        ],
        ids=["one", "one layer", "several ranks", "routers"],
    )
    def test_stock_peft_computes_what_call_computes_of_some_targets_and_several_ranks(
        self, tmp_path: Path, name: str, targets: list[str], r: Any
    ):
        case = stock_moe(name)
        router = ROUTERS.get(name, "*mlp.gate.weight")
        targets = [router if target == "router" else target for target in targets]
        state = trained(case.model, r, targets=targets)
        export.to_peft(tmp_path, case.model, state)
        adapted = PeftModel.from_pretrained(stock_moe(name).model, tmp_path)
        assert_near(logits(adapted, case), called(case, state))
        back = rosa_func.merge(export.from_peft(case.model, tmp_path))
        for key, value in rosa_func.merge(state).items():
            torch.testing.assert_close(back[key], value, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
    def test_an_adapter_does_not_depend_on_how_experts_are_computed(
        self, tmp_path: Path, implementation: str
    ):
        case = stock_moe("gpt-oss", implementation)
        state = trained(case.model, 2)
        export.to_peft(tmp_path, case.model, state)
        adapted = PeftModel.from_pretrained(stock_moe("gpt-oss", implementation).model, tmp_path)
        assert_near(logits(adapted, case), called(case, state))

    def test_dense_and_shared_layers_are_not_taken_for_experts(self, tmp_path: Path):
        case = stock_moe("deepseek-v3")
        state = trained(case.model, 2, targets=["gate_proj", "up_proj", "*shared*down_proj"])
        export.to_peft(tmp_path, case.model, state)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["target_modules"] == []
        assert set(config["target_parameters"]) == set(state["input_dim"].keys())
        adapted = PeftModel.from_pretrained(stock_moe("deepseek-v3").model, tmp_path)
        assert_near(logits(adapted, case), called(case, state))

    def test_an_embedding_that_shifts_its_indices_goes_out_as_a_parameter(self, tmp_path: Path):
        case = stock_model("opt")
        state = trained(case.model, 2, targets=["embed_positions", "q_proj"])
        export.to_peft(tmp_path, case.model, state)
        adapted = PeftModel.from_pretrained(stock_model("opt").model, tmp_path)
        assert_near(logits(adapted, case), called(case, state))

    def test_a_state_that_trains_a_router_in_full_goes_out(self, tmp_path: Path):
        case = stock_moe("qwen3-moe")
        state = trained(case.model, 2, train="*mlp.gate.weight")
        export.to_peft(tmp_path, case.model, state)
        adapted = PeftModel.from_pretrained(stock_moe("qwen3-moe").model, tmp_path)
        assert_near(logits(adapted, case), called(case, state))

    @pytest.mark.parametrize("bias", [True, False])
    def test_a_batch_of_one_expert_goes_out_only_if_it_is_of_out_by_in(
        self, tmp_path: Path, bias: bool
    ):
        name = "gpt-oss" if bias else "mixtral"
        one = {"num_local_experts": 1, "num_experts_per_tok": 1}

        def build() -> nn.Module:
            return seeded(lambda: MOE_BUILDERS[name](**one)).eval()

        case = stock_moe(name)._replace(model=build())
        state = trained(case.model, 2)
        if bias:
            with pytest.raises(ValueError, match=r"experts.gate_up_proj is a batch of one matrix"):
                export.to_peft(tmp_path / "adapter", case.model, state)
            assert not (tmp_path / "adapter").exists()
        else:
            export.to_peft(tmp_path, case.model, state)
            adapted = PeftModel.from_pretrained(build(), tmp_path)
            assert_near(logits(adapted, case), called(case, state))


def _in_two_places() -> nn.Sequential:
    experts = Experts()
    return nn.Sequential(experts, experts)


class TestToPeftRefusals:
    @pytest.mark.parametrize(
        ("build", "targets", "message"),
        [
            (Experts, "weight", "weight belongs to the model itself"),
            (_in_two_places, "*weight", "1 is one module in several places"),
            (
                lambda: nn.Sequential(nn.ParameterList([randn(3, 4, 5)])),
                "*",
                "0.0 belongs to ParameterList",
            ),
            (
                lambda: nn.ModuleDict({"a": Experts(), "b": nn.ModuleDict({"a": Experts()})}),
                lambda name, _: name == "a.weight",
                "would take b.a.weight for a.weight too",
            ),
            (
                lambda: nn.Sequential(Conv1D(4, 6), Experts()),
                "*weight",
                "0.weight belongs to Conv1D and 1.weight to no layer",
            ),
        ],
    )
    def test_to_peft_names_the_batch_that_no_adapter_can_hold(
        self, tmp_path: Path, build: Any, targets: Any, message: str
    ):
        model = seeded(build)
        state = perturbed(rosa_func.init(model, 1, targets=targets))
        with pytest.raises(ValueError, match=message):
            export.to_peft(tmp_path / "adapter", model, state)
        assert not (tmp_path / "adapter").exists()


def write_stock_adapter(folder: Path, name: str, **options: Any) -> Tensor:
    """Write an adapter of experts by peft itself; return its logits."""
    case = stock_moe(name)
    config = LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **options)
    adapted = seeded(lambda: get_peft_model(case.model, config)).eval()
    adapted.save_pretrained(folder)
    return logits(adapted, case)


@pytest.mark.filterwarnings("ignore:.*(rank|alpha)_pattern:RuntimeWarning")  # they do match
class TestFromPeft:
    @pytest.mark.parametrize("name", MOE_NAMES)
    @pytest.mark.parametrize(
        "options",
        [
            {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
            {"target_parameters": ["experts.down_proj"], "target_modules": ["o_proj"]},
            {
                "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
                "target_modules": ["o_proj"],
                "rank_pattern": {"experts.down_proj": 2},
                "alpha_pattern": {"experts.down_proj": 7},
                "use_rslora": True,
            },
        ],
        ids=["experts", "some", "patterns"],
    )
    def test_a_state_from_peft_computes_what_peft_computes_and_goes_on(
        self, tmp_path: Path, name: str, options: dict[str, Any]
    ):
        expected = write_stock_adapter(tmp_path, name, **options)
        case = stock_moe(name)
        before = model_snapshot(case.model)
        state = export.from_peft(case.model, tmp_path)
        assert model_snapshot(case.model) == before
        assert_near(called(case, state), expected)
        assert not torch.allclose(logits(case.model, case), expected, atol=1e-2)
        down = next(key for key in state["input_dim"].keys() if key.endswith("experts.down_proj"))
        rank = options.get("rank_pattern", {}).get("experts.down_proj", 3)
        assert state["trainable", down, "A"].shape[::2] == (4, rank)
        torch.testing.assert_close(
            called(case, rosa_func.resample(state, 1)), expected, rtol=1e-4, atol=1e-4
        )

    def test_an_adapter_of_the_old_names_of_experts_that_peft_converted_is_read(
        self, tmp_path: Path
    ):
        targets = ["gate_proj", "up_proj", "down_proj", "q_proj"]
        expected = write_stock_adapter(tmp_path, "qwen3-moe", target_modules=targets)
        case = stock_moe("qwen3-moe")
        state = export.from_peft(case.model, tmp_path)
        assert_near(called(case, state), expected)

    def test_what_fills_a_rank_up_is_not_read_as_a_rank(self, tmp_path: Path):
        case = stock_moe("mixtral")
        state = perturbed(rosa_func.init(case.model, {"*down_proj": 1, "*": 2}, targets=EXPERTS))
        export.to_peft(tmp_path, case.model, state, tol=1e-5)
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        key = "base_model.model.model.layers.0.mlp.experts"
        assert len(tensors[f"{key}.lora_A.weight"]) == 4 * 4
        back = export.from_peft(case.model, tmp_path)["trainable"]
        assert back["model.layers.0.mlp.experts.down_proj", "A"].shape == (4, 16, 2)
        assert back["model.layers.0.mlp.experts.gate_up_proj", "A"].shape == (4, 48, 4)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"num_local_experts": 8},
                r"gate_up_proj of shape \(4, 48, 16\), and MixtralF.* \(8, 48, 16\)",
            ),
            (
                {"intermediate_size": 32},
                r"gate_up_proj of shape \(4, 48, 16\), and MixtralF.* \(4, 64, 16\)",
            ),
        ],
    )
    def test_from_peft_refuses_experts_of_another_size(
        self, tmp_path: Path, options: dict[str, int], message: str
    ):
        write_stock_adapter(tmp_path, "mixtral", target_parameters=["experts.gate_up_proj"])
        other = seeded(lambda: MOE_BUILDERS["mixtral"](**options))
        with pytest.raises(ValueError, match=message):
            export.from_peft(other, tmp_path)

    def test_from_peft_refuses_factors_that_are_not_of_the_rank_of_the_config(self, tmp_path: Path):
        write_stock_adapter(tmp_path, "mixtral", target_parameters=["experts.gate_up_proj"])
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "r": 5}))
        with pytest.raises(ValueError, match=r"shapes \(12, 16\) and \(48, 12\) .* rank 5"):
            export.from_peft(stock_moe("mixtral").model, tmp_path)
