"""`init_from`: the state that `init` gives, from a folder, without a model in memory."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Model, ViTConfig, ViTForImageClassification

import rosa_func
from models import MOE_BUILDERS, MOE_NAMES, seeded, stock_model, stock_moe, tiny_gpt2
from references import global_state, main_output, state_bytes

PEAK_MEMORY = """
import sys, torch, rosa_func
from transformers import AutoConfig, GPT2LMHeadModel, MixtralForCausalLM


def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))


torch.linalg.eigh(torch.eye(64))
before = peak()
model, state = rosa_func.init_from(sys.argv[1], r=8)
held = sum(t.nbytes for t in state.values(True, True))
print(peak() - before - held, held)
"""

SHARDS: dict[str, Any] = {"max_shard_size": "8KB"}


def _vit() -> ViTForImageClassification:
    sizes: Any = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    return ViTForImageClassification(
        ViTConfig(image_size=8, patch_size=4, num_hidden_layers=2, **sizes)
    )


def _skip_if_nothing_is_renamed(folder: Path, model: nn.Module) -> None:
    if set(load_file(folder / "model.safetensors")) <= set(model.state_dict()):
        pytest.skip("this transformers stores the names that the model has")


class TestEquality:
    @pytest.mark.parametrize("name", ["gpt2-small", "llama", "opt", "bert", "roberta", "t5"])
    @pytest.mark.parametrize("shards", [False, True])
    def test_init_from_gives_the_state_of_init_and_a_skeleton_that_computes(
        self, tmp_path: Path, name: str, shards: bool
    ):
        case = stock_model(name)
        case.model.save_pretrained(tmp_path, max_shard_size="10KB" if shards else "1GB")
        assert (tmp_path / "model.safetensors.index.json").exists() == shards
        before = global_state()
        model, state = rosa_func.init_from(tmp_path, 2, key=3)
        assert global_state() == before
        assert state_bytes(state) == state_bytes(rosa_func.init(case.model, 2, key=3))
        assert type(model) is type(case.model)
        assert all(p.is_meta for p in model.parameters())
        assert not model.training
        one, other = (
            main_output(rosa_func.call(used, state, *case.args, **case.kwargs))
            for used in (model, case.model)
        )
        assert torch.equal(one, other)

    def test_init_from_takes_the_options_of_init_and_a_dtype(self, tmp_path: Path):
        model = seeded(tiny_gpt2).to(torch.bfloat16)
        model.save_pretrained(tmp_path)
        options: dict[str, Any] = {"targets": ["wte", "c_attn"], "train": "ln_f", "exact": True}
        options["sampler"] = rosa_func.samplers.top
        _, state = rosa_func.init_from(tmp_path, 3, **options)
        assert state_bytes(state) == state_bytes(rosa_func.init(model, 3, **options))
        weightless, state = rosa_func.init_from(tmp_path, 3, dtype=torch.float32, **options)
        expected = rosa_func.init(model.float(), 3, **options)
        assert state_bytes(state) == state_bytes(expected)
        assert {p.dtype for p in weightless.parameters()} == {torch.float32}

    def test_init_from_finds_a_backbone_stored_without_its_prefix(self, tmp_path: Path):
        model = seeded(tiny_gpt2)
        model.save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        tensors = {k.removeprefix("transformer."): t for k, t in load_file(file).items()}
        save_file(tensors, file)
        _, state = rosa_func.init_from(tmp_path, 2)
        assert state_bytes(state) == state_bytes(rosa_func.init(model, 2))


class TestConversions:
    @pytest.mark.parametrize("name", MOE_NAMES)
    @pytest.mark.parametrize("options", [{}, {"save_original_format": False}, SHARDS], ids=str)
    def test_init_from_gives_the_state_of_a_model_whose_experts_are_stored_one_by_one(
        self, tmp_path: Path, name: str, options: dict[str, Any]
    ):
        case = stock_moe(name)
        case.model.save_pretrained(tmp_path, **options)
        model, state = rosa_func.init_from(tmp_path, 1, key=3, train="norm")
        expected = rosa_func.init(case.model, 1, key=3, train="norm")
        assert state_bytes(state) == state_bytes(expected)
        assert all(p.is_meta for p in model.parameters())
        one, other = (
            main_output(rosa_func.call(used, state, *case.args, **case.kwargs))
            for used in (model, case.model)
        )
        assert torch.equal(one, other)
        # Where tensors lie in memory, decompositions may differ in their last bits; W does not.
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        lora = rosa_func.samplers.lora
        _, state = rosa_func.init_from(tmp_path, 1, key=3, sampler=lora)
        assert state_bytes(state) == state_bytes(rosa_func.init(loaded, 1, key=3, sampler=lora))

    def test_init_from_loads_the_backbone_of_a_mixture_as_its_own_class(self, tmp_path: Path):
        model = stock_moe("mixtral").model
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(
            json.dumps({**config, "architectures": ["MixtralModel"]})
        )
        _, state = rosa_func.init_from(tmp_path, 2)
        assert state_bytes(state) == state_bytes(rosa_func.init(model.model, 2))

    def test_init_from_gives_the_state_of_a_model_whose_weights_are_renamed(self, tmp_path: Path):
        model = seeded(_vit).eval()
        model.save_pretrained(tmp_path)
        _skip_if_nothing_is_renamed(tmp_path, model)
        _, state = rosa_func.init_from(tmp_path, 2, train="head")
        assert state_bytes(state) == state_bytes(rosa_func.init(model, 2, train="head"))

    def test_a_device_that_is_none_is_refused_before_anything_is_read(self, tmp_path: Path):
        with pytest.raises(RuntimeError, match="nowhere"):
            rosa_func.init_from(tmp_path, 2, device="nowhere")
        with pytest.raises(ValueError, match=r"meta device holds none: rosa_func\.plan"):
            rosa_func.init_from(tmp_path, 2, device="meta")
        stock_model("gpt2-small").model.save_pretrained(tmp_path)
        on_host, there = (rosa_func.init_from(tmp_path, 2, device=d) for d in (None, "cpu"))
        assert state_bytes(on_host[1]) == state_bytes(there[1])
        assert there[0].device == torch.device("cpu")

    def test_init_from_converts_to_a_dtype(self, tmp_path: Path):
        model = stock_moe("qwen3-moe", dtype=torch.bfloat16).model
        model.save_pretrained(tmp_path)
        _, state = rosa_func.init_from(tmp_path, 2, dtype=torch.float32)
        assert state_bytes(state) == state_bytes(rosa_func.init(model.float(), 2))


def _large_gpt2() -> nn.Module:
    sizes: Any = {"n_embd": 512, "n_head": 8, "n_layer": 12, "vocab_size": 30_000}
    return tiny_gpt2(**{"n_positions": 64, **sizes}, initializer_range=0.02)


def _large_mixtral() -> nn.Module:
    sizes: Any = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 16}
    return MOE_BUILDERS["mixtral"](**sizes, num_local_experts=8)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("build", "allowed"),
    [
        (_large_gpt2, 64 << 20),
        # The 8 experts of a layer, 8 MiB, are held up to three times while they are stacked.
        (_large_mixtral, 128 << 20),
    ],
)
def test_the_peak_memory_of_init_from_is_the_state_and_some_decompositions(
    tmp_path: Path, build: Callable[[], nn.Module], allowed: int
):
    seeded(build).save_pretrained(tmp_path)
    command = [sys.executable, "-c", PEAK_MEMORY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    above, held = map(int, done.stdout.split())
    assert held > 200e6
    assert above <= allowed


def _in_cache(folder: Path, name: str) -> Path:
    """Lay a folder out as a repository of that name in the cache of the Hub."""
    repository = folder / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return repository / "snapshots" / ("0" * 40)


class TestHub:
    """Users passed "openai-community/gpt2": "there is neither openai-community/gpt2/model..."."""

    @pytest.fixture(autouse=True)
    def offline(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.chdir(tmp_path)

    @pytest.mark.parametrize("options", [{}, SHARDS], ids=["one file", "shards"])
    def test_init_from_takes_what_is_in_the_cache(self, tmp_path: Path, options: dict[str, Any]):
        model = seeded(tiny_gpt2)
        model.save_pretrained(_in_cache(tmp_path / "hub", "someone/tiny"), **options)
        _, state = rosa_func.init_from("someone/tiny", 2)
        assert state_bytes(state) == state_bytes(rosa_func.init(model, 2))

    def test_init_from_downloads_what_the_cache_lacks(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        model, calls = seeded(tiny_gpt2), []
        model.save_pretrained(tmp_path / "there", **SHARDS)
        cached = _in_cache(tmp_path / "hub", "tiny")  # of an interrupted download
        shutil.copytree(tmp_path / "there", cached)
        next(cached.glob("model-*")).unlink()

        def snapshot_download(name: str, *, allow_patterns: list[str], **options: Any) -> str:
            calls.append(options)
            if options:
                return str(cached)
            for pattern in allow_patterns:
                for file in (tmp_path / "there").glob(pattern):
                    shutil.copy(file, cached)
            return str(cached)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        for _ in range(2):
            _, state = rosa_func.init_from("tiny", 2)
            assert state_bytes(state) == state_bytes(rosa_func.init(model, 2))
        assert calls == [{"local_files_only": True}, {}, {"local_files_only": True}]

    @pytest.mark.parametrize("name", ["someone/tiny", "tiny"])
    def test_what_is_neither_a_folder_nor_in_the_cache_is_one_clear_line(self, name: str):
        message = rf"^there is no folder {name}, the cache of the Hub lacks .*hf download {name}"
        with pytest.raises(FileNotFoundError, match=message) as caught:
            rosa_func.init_from(name, 2)
        assert "\n" not in str(caught.value)

    def test_a_repository_that_the_hub_does_not_have_is_named(
        self, monkeypatch: pytest.MonkeyPatch
    ):
        class NoRepository(huggingface_hub.errors.RepositoryNotFoundError):
            def __init__(self) -> None:
                pass

        def snapshot_download(name: str, **options: Any) -> str:
            error = huggingface_hub.errors.LocalEntryNotFoundError("not cached")
            raise error if "local_files_only" in options else NoRepository()

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        with pytest.raises(FileNotFoundError, match=r"Hub has no repository someone/tiny .*log in"):
            rosa_func.init_from("someone/tiny", 2)

    def test_without_huggingface_hub_it_is_what_to_install(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(FileNotFoundError, match=r"no folder someone/tiny; .* huggingface_hub"):
            rosa_func.init_from("someone/tiny", 2)

    @pytest.mark.parametrize("path", ["../tiny", "a/b/c", "a//b", "./tiny", "a--b", Path("a/b")])
    def test_what_cannot_be_a_name_is_not_looked_up(
        self, path: Any, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
        with pytest.raises(FileNotFoundError, match=r"there is neither .*model\.safetensors"):
            rosa_func.init_from(path, 2)


class TestRefusals:
    def test_init_from_refuses_a_pickle_and_says_the_way_round(self, tmp_path: Path):
        """It said that there was no model.safetensors, beside a pytorch_model.bin."""
        model = seeded(tiny_gpt2)
        model.save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        message = r"pytorch_model\.bin is not read, since a pickle can .*save_pretrained writes"
        with pytest.raises(FileNotFoundError, match=message):
            rosa_func.init_from(tmp_path, 2)

    def test_init_from_says_that_a_new_head_has_no_weights_yet(self, tmp_path: Path):
        """It said that from_pretrained knew its old name."""
        seeded(tiny_gpt2).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["architectures"] = ["GPT2ForSequenceClassification"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(KeyError, match=r"lack score\.weight .* new head has no weights yet"):
            rosa_func.init_from(tmp_path, 2)

    def test_init_from_refuses_two_values_of_a_tied_weight(self, tmp_path: Path):
        """One of them was taken, logits 1.73 off; transformers unties the two."""
        model, name = seeded(tiny_gpt2), "transformer.wte.weight"
        model.save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        tensors = load_file(file)
        save_file({**tensors, "lm_head.weight": tensors[name].clone()}, file)
        _, state = rosa_func.init_from(tmp_path, 2)
        assert state_bytes(state) == state_bytes(rosa_func.init(model, 2))
        save_file({**tensors, "lm_head.weight": tensors[name] + 1}, file)
        with pytest.raises(ValueError, match=rf"{name} and lm_head.weight are one tied .* untie"):
            rosa_func.init_from(tmp_path, 2)

    def test_init_from_names_what_is_missing(self, tmp_path: Path):
        with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
            rosa_func.init_from(tmp_path, 2)
        model = seeded(tiny_gpt2)
        model.save_pretrained(tmp_path)
        file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
        tensors = load_file(file)
        wrong = {**tensors, "transformer.ln_f.bias": torch.ones(3)}
        save_file(wrong, file)
        with pytest.raises(ValueError, match=r"ln_f.bias has shape \(3,\) .* GPT2LMHeadModel \(12"):
            rosa_func.init_from(tmp_path, 2)
        del tensors["transformer.ln_f.bias"]
        save_file(tensors, file)
        with pytest.raises(KeyError, match=r"lack transformer.ln_f.bias of GPT2LMHeadModel"):
            rosa_func.init_from(tmp_path, 2)
        settings = json.loads(config.read_text())
        config.write_text(json.dumps({**settings, "architectures": ["Nonsense"]}))
        with pytest.raises(ValueError, match=r"architectures \['Nonsense'\]"):
            rosa_func.init_from(tmp_path, 2)
        config.unlink()
        with pytest.raises(FileNotFoundError, match=r"there is no .*config.json"):
            rosa_func.init_from(tmp_path, 2)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e4m3fn])
    def test_init_from_refuses_a_weight_of_a_dtype_that_cannot_be_split(
        self, tmp_path: Path, dtype
    ):
        seeded(tiny_gpt2).save_pretrained(tmp_path)
        file, name = tmp_path / "model.safetensors", "transformer.h.0.attn.c_attn.weight"
        tensors = load_file(file)
        save_file({**tensors, name: tensors[name].to(dtype)}, file)
        with pytest.raises(TypeError, match=rf"{name} is of dtype {dtype}; it must be one of"):
            rosa_func.init_from(tmp_path, 2)
        with pytest.raises(TypeError, match=r"dtype is None or one of .* got 'float32'"):
            rosa_func.init_from(tmp_path, 2, dtype="float32")

    @pytest.mark.parametrize("build", [_vit, MOE_BUILDERS["mixtral"]], ids=["vit", "mixtral"])
    def test_init_from_refuses_old_names_where_transformers_has_no_conversions(
        self, tmp_path: Path, build, monkeypatch
    ):
        model = seeded(build)
        model.save_pretrained(tmp_path)
        _skip_if_nothing_is_renamed(tmp_path, model)
        monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
        with pytest.raises(KeyError, match="from_pretrained, which knows old and new names"):
            rosa_func.init_from(tmp_path, 2)

    def test_init_from_names_the_experts_of_which_one_is_missing(self, tmp_path: Path):
        seeded(MOE_BUILDERS["mixtral"]).save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        tensors = load_file(file)
        expert = "model.layers.1.block_sparse_moe.experts.3"
        del tensors[f"{expert}.w3.weight"]
        save_file(tensors, file)
        with pytest.raises(ValueError, match=r"1.mlp.experts.gate_up_proj .*\.0\.w1.*missing\?"):
            rosa_func.init_from(tmp_path, 2)
        del tensors[f"{expert}.w1.weight"]
        save_file(tensors, file)
        with pytest.raises(ValueError, match=r"made of .* has shape \(3, 48, 16\).*\(4, 48, 16\)"):
            rosa_func.init_from(tmp_path, 2)

    def test_init_from_refuses_what_init_refuses(self, tmp_path: Path):
        seeded(tiny_gpt2).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="larger than min"):
            rosa_func.init_from(tmp_path, 100)
        with pytest.raises(ValueError, match="matches no parameter"):
            rosa_func.init_from(tmp_path, 2, targets="c_atn")

    def test_init_from_loads_a_backbone_as_its_own_class(self, tmp_path: Path):
        seeded(lambda: GPT2Model(tiny_gpt2().config)).save_pretrained(tmp_path)
        model, _ = rosa_func.init_from(tmp_path, 2)
        assert type(model) is GPT2Model
