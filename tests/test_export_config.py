"""What an adapter says of its model and its task; what it can say of a tied weight."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import rosa_func
from models import seeded, stock_model, tiny_gpt2, token_ids
from references import main_output, perturbed
from rosa_func import export

# peft warns about tied weights, and about names that it or transformers changed.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class TestCard:
    def test_the_config_and_the_card_name_the_base_model_and_the_task(self, tmp_path: Path):
        model = seeded(tiny_gpt2)
        model.name_or_path = "someone/tiny-gpt2"
        state = perturbed(rosa_func.init(model, 2, train="ln_f"), 0.02)
        export.to_peft(tmp_path, model, state, rank=3)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "someone/tiny-gpt2"
        assert config["task_type"] == "CAUSAL_LM"
        card = ModelCard.load(tmp_path / "README.md")
        data = card.data.to_dict()
        assert data.pop("tags") == [
            *("base_model:adapter:someone/tiny-gpt2", "lora", "rosa", "transformers")
        ]
        assert data == {
            "base_model": "someone/tiny-gpt2",
            "library_name": "peft",
            "pipeline_tag": "text-generation",
        }
        assert "The change of 8 weights of GPT2LMHeadModel" in card.text
        assert "products of rank 3 at most, and 1 of its modules whole" in card.text
        assert 'GPT2LMHeadModel.from_pretrained("someone/tiny-gpt2")' in card.text

    def test_a_card_names_no_folder_and_one_that_is_there_stays(self, tmp_path: Path):
        seeded(tiny_gpt2).save_pretrained(tmp_path / "base")
        model = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
        state = rosa_func.init(model, 2)
        export.to_peft(tmp_path / "adapter", model, state)
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tmp_path / "base")
        file = tmp_path / "adapter" / "README.md"
        assert str(tmp_path) not in file.read_text()
        assert "base_model" not in file.read_text()
        file.write_text("mine")
        export.to_peft(tmp_path / "adapter", model, state)
        assert file.read_text() == "mine"

    @pytest.mark.parametrize(
        ("name", "task"),
        [("t5", "SEQ_2_SEQ_LM"), ("llama", "CAUSAL_LM"), ("bert", None), ("vit", None)],
    )
    def test_the_task_is_that_of_the_class(self, tmp_path: Path, name: str, task: str | None):
        case = stock_model(name)
        state = perturbed(rosa_func.init(case.model, 2), 0.02)
        export.to_peft(tmp_path, case.model, state)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["task_type"] == task
        adapted = PeftModel.from_pretrained(stock_model(name).model, tmp_path)
        expected = rosa_func.call(case.model, state, *case.args, **case.kwargs)[0]
        found = main_output(adapted(*case.args, **case.kwargs))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_the_task_of_a_backbone_is_to_extract_features(self, tmp_path: Path):
        model, ids = seeded(lambda: GPT2Model(tiny_gpt2().config)).eval(), token_ids(2, 5)
        state = perturbed(rosa_func.init(model, 2), 0.02)
        export.to_peft(tmp_path, model, state)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["task_type"] == "FEATURE_EXTRACTION"
        expected = rosa_func.call(model, state, ids)[0]
        adapted = PeftModel.from_pretrained(model, tmp_path)
        torch.testing.assert_close(adapted(ids)[0], expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        ("kind", "config", "options", "task", "saved"),
        [
            (BertForSequenceClassification, BertConfig, {"train": "head"}, "SEQ_CLS", "classifier"),
            (BertForSequenceClassification, BertConfig, {}, "SEQ_CLS", "classifier"),
            (
                RobertaForSequenceClassification,
                RobertaConfig,
                {"train": "head"},
                "SEQ_CLS",
                "classifier",
            ),
            (
                RobertaForSequenceClassification,
                RobertaConfig,
                {"targets": ["query", "dense"], "train": "out_proj"},
                None,
                "classifier.out_proj",
            ),
        ],
    )
    def test_peft_gets_the_head_of_a_task_whole_or_is_not_told_of_the_task(
        self, tmp_path: Path, kind: Any, config: Any, options: Any, task: Any, saved: str
    ):
        def build() -> Any:
            sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
            sizes |= {"vocab_size": 31, "intermediate_size": 16, "max_position_embeddings": 12}
            return kind(config(num_labels=3, **sizes)).eval()

        model, ids = seeded(build), token_ids(2, 5)
        state = perturbed(rosa_func.init(model, 2, **options))
        export.to_peft(tmp_path, model, state)
        written = json.loads((tmp_path / "adapter_config.json").read_text())
        assert (written["task_type"], written["modules_to_save"]) == (task, [saved])
        expected = rosa_func.call(model, state, ids).logits
        adapted = PeftModel.from_pretrained(seeded(build), tmp_path)
        torch.testing.assert_close(adapted(ids).logits, expected, rtol=1e-5, atol=1e-5)


def _tied_llama() -> Any:
    config = stock_model("llama").model.config
    config.tie_word_embeddings = True
    return seeded(lambda: LlamaForCausalLM(config)).eval()


class TestTiesSavedWhole:
    """A tied weight in `modules_to_save`: peft unties it, so both of its copies must be the same.

    `saved` names the modules that peft saves; `shift` is added to the head's weight alone.
    """

    def write(self, folder: Path, saved: list[str] | None, shift: float = 0.0, **how: Any) -> Any:
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved)
        adapted = seeded(lambda: get_peft_model(_tied_llama(), config)).eval()
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "modules_to_save" in name:
                    parameter.add_(0.1 + shift * ("lm_head" in name))
        adapted.save_pretrained(folder, **how)
        return adapted

    @pytest.mark.parametrize(
        ("saved", "shift", "message"),
        [
            (["embed_tokens"], 0.0, "embed_tokens.weight alone: untie"),
            (["lm_head"], 0.0, "lm_head.weight alone: untie"),
            (["embed_tokens", "lm_head"], 0.1, "differently: untie"),
        ],
    )
    def test_from_peft_refuses_what_a_tied_weight_cannot_be(
        self, tmp_path: Path, saved: list[str], shift: float, message: str
    ):
        self.write(tmp_path, saved, shift)
        with pytest.raises(ValueError, match=rf"are one tied weight, .*{message}"):
            export.from_peft(_tied_llama(), tmp_path)

    @pytest.mark.parametrize("saved", [["embed_tokens", "lm_head"], None])
    def test_from_peft_reads_a_tied_weight_that_stays_one(
        self, tmp_path: Path, saved: list[str] | None
    ):
        adapted = self.write(tmp_path, saved, save_embedding_layers=saved is None)
        state, ids = export.from_peft(_tied_llama(), tmp_path), token_ids(2, 5)
        assert "model.embed_tokens.weight" in state["trainable"].keys()
        called = rosa_func.call(_tied_llama(), state, ids).logits
        torch.testing.assert_close(called, adapted(ids).logits, rtol=1e-5, atol=1e-5)
