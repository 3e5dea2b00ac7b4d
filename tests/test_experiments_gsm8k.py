"""GSM8k in the harness: its parts, its loss, and the answers that count as right."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from examples.experiments import decoding, gsm8k, tasks
from examples.experiments import tiny as small

SETTING = {"task": "gsm8k", "model": "tiny:llama", "length": 64, "batch": 4, "generate": 5}
SETTING |= {"beams": 1, "rows": {"train": 0, "dev": 6, "test": 5}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    small.make(folder)
    return folder


class TestParts:
    def test_dev_is_a_part_of_train_that_is_not_trained_on(self, data):
        lines = (data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
        every = sorted((row["question"], row["answer"]) for row in map(json.loads, lines))
        train, dev = (gsm8k.rows(split, data) for split in ("train", "dev"))
        assert sorted(train + dev) == every
        assert len(dev) == 8

    def test_it_needs_a_folder(self):
        with pytest.raises(SystemExit, match="gsm8k is read from --data"):
            gsm8k.rows("train", None)


class TestLoss:
    def test_it_is_of_the_answer_and_its_end_alone(self, data):
        """A model that knows the answers and nothing of the questions has no loss."""
        made = tasks.load(SETTING, 0, data, data)
        batch = next(made.batches(0))
        labels = batch["labels"]

        def forward(input_ids: Tensor, **_: Any) -> Any:
            logits = torch.zeros(*input_ids.shape, 512)
            return type("Output", (), {"logits": logits.scatter(2, labels.clamp(0)[..., None], 99)})

        assert made.loss(forward, batch).item() < 1e-6
        tokenizer = AutoTokenizer.from_pretrained(data / "llama")
        answers = {answer for _, answer in gsm8k.rows("train", data)}
        for row in labels:
            text = tokenizer.decode(row[row != -100])
            assert text.endswith("<|endoftext|>")
            assert text.removesuffix("<|endoftext|>") in answers


class TestExactMatch:
    @pytest.mark.parametrize(
        ("text", "number"),
        [
            ("so 3 + 4 = <<3+4=7>>7\n#### 7", Fraction(7)),
            ("#### 1,234", Fraction(1234)),
            ("#### $12.50 each", Fraction(25, 2)),
            ("#### -5.", Fraction(-5)),
            ("#### 7\nmore\n#### 8", Fraction(7)),
            ("the answer is 7", None),
            ("#### none", None),
            ("#### ,", None),
        ],
    )
    def test_the_number_after_the_first_marks_counts(self, text, number):
        assert gsm8k.final_number(text) == number

    def test_it_is_the_part_of_texts_with_the_number_of_the_answer(self):
        answers = ["a\n#### 7", "b\n#### 1,000", "c\n#### 3", "d\n#### 4"]
        texts = ["other words\n#### 7.0", "#### 1000", "3", "#### 5"]
        assert gsm8k.exact_match(texts, answers) == 0.5

    def test_the_first_rows_of_test_are_asked_as_in_training(self, data, monkeypatch):
        """With the line's end, the question cut where training cuts it, no beams."""
        seen: list[tuple[list[str], dict[str, Any]]] = []

        class Model:
            def eval(self) -> "Model":
                return self

            def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
                ids = zip(input_ids, attention_mask.bool(), strict=True)
                seen.append(([tokenizer.decode(row[kept]) for row, kept in ids], options))
                answers = [answer for _, answer in gsm8k.rows("test", data)[:5]]
                right = tokenizer([*answers[:3], "#### 1", "no"], padding=True).input_ids
                return torch.cat([input_ids, torch.tensor(right)], 1)

        tokenizer = AutoTokenizer.from_pretrained(data / "llama")
        found = gsm8k.score(Model(), tokenizer, SETTING, data)
        assert found == {"exact_match": 0.6}
        [(prompts, options)] = seen
        questions = [question for question, _ in gsm8k.rows("test", data)[:5]]
        assert prompts == [f"{question}\n" for question in questions]
        assert options["num_beams"] == 1 and not options["do_sample"]
        assert options["max_new_tokens"] == 32

    def test_a_prompt_is_cut_as_in_training(self, data):
        made = tasks.load({**SETTING, "length": 16}, 0, data, data)
        trained = next(made.batches(0))
        first = trained["labels"].ne(-100).int().argmax(1) + 1  # the length of each prompt
        assert int(first.max()) == 8
        lengths: list[int] = []

        class Model:
            def generate(self, input_ids: Tensor, **_: Any) -> Tensor:
                lengths.append(input_ids.shape[1])
                return input_ids

        tokenizer = AutoTokenizer.from_pretrained(data / "llama")
        decoding.generate(
            Model(), tokenizer, ["the place near the river " * 9], {**SETTING, "length": 16}
        )
        assert lengths == [8]
