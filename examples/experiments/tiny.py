"""Every experiment in a few steps, on data and models made here: does it still run?"""

import json
import random
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from examples.experiments import corpora, plan

MODELS = {"smollm2": "tiny:llama", "minilm": "tiny:bert"}
WORDS = ["the", "place", "river", "cafe", "near", "serves", "good", "food", "for", "guests", "why"]


def shrink(experiment: plan.Experiment) -> plan.Experiment:
    """Return the experiment with tiny models, at most two ranks a method, and a few steps."""
    setting = {**experiment.setting, "steps": 4, "tune_steps": 2, "eval_every": 2, "warmup": 1}
    setting["rows"] = dict.fromkeys(setting["rows"], 60)
    setting["batch"] = 4
    if "model" in setting:
        model = setting["model"]
        setting["model"] = MODELS.get(model, "base:tiny")
    if "generate" in setting:
        setting |= {"generate": 3, "beams": min(2, setting["beams"])}
    if "widths" in setting:
        setting |= {"widths": [40, 30, 26], "batch": 20}
    at_most = {
        m.name: [n.rank for n in experiment.methods if n.name == m.name] for m in experiment.methods
    }
    kept = {
        m: m._replace(every=min(m.every, 2), rewarm=min(m.rewarm, 1), begin=min(m.begin, 1))
        for m in experiment.methods
        if m.rank in (at_most[m.name][0], at_most[m.name][-1])
    }
    rates = experiment.rates[:1] if len(experiment.rates) == 1 else [1e-3, 2e-3]
    return experiment._replace(
        setting=setting,
        seeds=[0],
        rounds=1,
        rates=rates,
        methods=list(kept.values()),
        start=dict.fromkeys(kept.values(), rates[0]),
        like={kept[m]: kept[of] for m, of in experiment.like.items() if m in kept and of in kept},
        times={kept[m]: factor for m, factor in experiment.times.items() if m in kept},
    )


def make(folder: Path) -> None:
    """Write data sets of the form of the real ones, a tokenizer, and two models."""
    source = random.Random(0)

    def text() -> str:
        return " ".join(source.choices(WORDS, k=12)).capitalize() + "."

    def write(path: str, rows: list[dict[str, object]]) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("".join(json.dumps(row) + "\n" for row in rows))

    for split in ("train", "dev", "test"):
        mrs = [f"name[{name}], food[{food}]" for name in "abcdef" for food in "wxyz"]
        write(f"e2e/{split}.jsonl", [{"mr": mr, "ref": text()} for mr in mrs for _ in range(3)])
        rows = [{"question": text(), "answer": f"{text()} {text()}"} for _ in range(80)]
        write(f"eli5/{split}.jsonl", rows)
    for split in ("train", "test"):
        sums = [f"{text()} {n} + {n} = {2 * n}\n#### {2 * n}" for n in range(80)]
        write(f"gsm8k/{split}.jsonl", [{"question": text(), "answer": sum} for sum in sums])
    for task in ("CoLA", "SST-2", "MRPC", "STS-B"):
        for split in ("train", "dev"):
            labels = [source.random() * 5 if task == "STS-B" else i % 2 for i in range(70)]
            fields = ("sentence",) if task in ("CoLA", "SST-2") else ("sentence1", "sentence2")
            rows = [{"label": label} | {f: text() for f in fields} for label in labels]
            write(f"glue/{task}/{split}.jsonl", rows)
    texts = [text() for _ in range(200)]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, 420, show_progress=False)
    bpe.add_special_tokens([corpora.END])
    (folder / "gpt2_tokenizer").mkdir()
    bpe.save(str(folder / "gpt2_tokenizer" / "tokenizer.json"))
    _models(folder, len(bpe.get_vocab()))


def _models(folder: Path, vocabulary: int) -> None:
    """Write an untrained Llama and an untrained BERT, with their tokenizers."""
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"intermediate_size": 64}
    path = str(folder / "gpt2_tokenizer" / "tokenizer.json")
    end = {"eos_token": corpora.END, "pad_token": corpora.END}
    PreTrainedTokenizerFast(tokenizer_file=path, **end).save_pretrained(folder / "llama")
    ids = {"bos_token_id": vocabulary - 1, "eos_token_id": vocabulary - 1}
    (folder / "bert").mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *WORDS]
    (folder / "bert" / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "bert" / "vocab.txt")).save_pretrained(folder / "bert")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        llama = LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, **shape, **ids)
        LlamaForCausalLM(llama).save_pretrained(folder / "llama")
        BertModel(BertConfig(vocab_size=len(words), **shape)).save_pretrained(folder / "bert")
