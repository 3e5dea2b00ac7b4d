"""The small GPT-2 that quickstart, trainer and ddp adapt, from prose to source code.

All of it comes with Python: the prose is its own help, the code is its standard library.
"""

import hashlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data import topics
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from examples.shared.caching import made_once
from examples.shared.text import in_blocks

END = "<|endoftext|>"  # between two documents
SEED, BATCH = 0, 8
# Whole modules are held out, so that no line of them is trained on.
TRAINED_ON = ("argparse", "subprocess", "tarfile", "inspect", "typing", "configparser", "pdb")
HELD_OUT = ("difflib", "shutil", "threading", "statistics")
# Every matrix but the positions; "wte" are the embeddings, which are the output layer as well.
TARGETS = ("wte", "c_attn", "c_proj", "c_fc")

Logits = Callable[[Tensor], Tensor]


class Base(NamedTuple):
    """What the base model is made from; the cache is keyed by it."""

    layers: int = 4
    width: int = 192
    heads: int = 4
    vocabulary: int = 2048
    block: int = 128
    documents: int = 1000  # all of them
    epochs: int = 4
    rate: float = 2e-3
    initializer_range: float = 0.07  # with GPT-2's 0.02 so narrow a model is slow to start


class Budget(NamedTuple):
    """What each method may spend on the adaptation."""

    rank: int = 8
    train_blocks: int = 320
    held_out_blocks: int = 96
    epochs: int = 4


class Data(NamedTuple):
    """What is equal for all methods: the tokens, (blocks, block), and the passes over them."""

    train: Tensor
    held_out: Tensor
    epochs: int


SHORT = Base(2, 64, 2, 512, 64, 12, 1), Budget(4, 64, 16, 3)


def base_and_data(base: Base, budget: Budget, cache: Path) -> tuple[Path, GPT2LMHeadModel, Data]:
    """Return the directory of the base model, the model, and the code it is to be adapted to."""
    directory = cached_base(base, cache)
    model = GPT2LMHeadModel.from_pretrained(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    train, held_out = (blocks(code(of), tokenizer, base.block) for of in (TRAINED_ON, HELD_OUT))
    train, held_out = spread(train, budget.train_blocks), spread(held_out, budget.held_out_blocks)
    return directory, model, Data(train, held_out, budget.epochs)


def cached_base(base: Base, cache: Path) -> Path:
    """Return the directory of the base model and its tokenizer; make it if it is not there."""
    texts = prose(base.documents)
    settings = {**base._asdict(), "prose": hashlib.sha256(END.join(texts).encode()).hexdigest()}
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    directory = cache / f"base-{key}"
    if directory.exists():
        print(f"base model: cached in {directory}")
        return directory
    print(f"base model: training on {sum(map(len, texts)):,} characters of prose")

    def make(content: Path) -> None:
        tokenizer = ByteLevelBPETokenizer()  # of GPT-2's kind: no text is unknown to it
        tokenizer.train_from_iterator(
            texts, base.vocabulary, special_tokens=[END], show_progress=False
        )
        pretrain(base, tokenizer, blocks(texts, tokenizer, base.block)).save_pretrained(content)
        tokenizer.save(str(content / "tokenizer.json"))
        (content / "settings.json").write_text(json.dumps(settings, indent=2))

    return made_once(directory, make)


def pretrain(base: Base, tokenizer: Tokenizer, prose: Tensor) -> GPT2LMHeadModel:
    """Train a stock GPT-2 from scratch; the last twentieth of the prose is held out."""
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=base.block,
        n_embd=base.width,
        n_layer=base.layers,
        n_head=base.heads,
        initializer_range=base.initializer_range,
        # Without dropout train() and eval() are the same, and no step draws a random number.
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.token_to_id(END)),
    )
    with torch.random.fork_rng(devices=[]):  # the constructor draws from the global generator
        torch.manual_seed(SEED)
        model = GPT2LMHeadModel(config).eval()
    cut = len(prose) * 19 // 20
    data = Data(prose[:cut], prose[cut:], base.epochs)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)

    def logits(ids: Tensor) -> Tensor:
        return model(ids, use_cache=False).logits

    before = perplexity(logits, data.held_out)
    with progress("base", data) as bar:
        for ids, rate in (batch for epoch in schedule(data, base.rate) for batch in epoch):
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = total_nll(logits(ids), ids) / ids[:, 1:].numel()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", rate=f"{rate:.1e}", refresh=False)
            bar.update(ids.numel())
    after = perplexity(logits, data.held_out)
    print(f"base model: perplexity on held-out prose {before:.0f} -> {after:.1f}")
    return model


def prose(documents: int) -> list[str]:
    """Return the topics of Python's own help, which is about the language, in prose."""
    return [text for _, text in sorted(topics.topics.items())][:documents]


def code(modules: tuple[str, ...]) -> list[str]:
    """Return the source code of modules of the standard library, without importing them."""
    specs = [importlib.util.find_spec(name) for name in modules]
    texts = [spec and spec.loader.get_source(spec.name) for spec in specs]
    if missing := [name for name, text in zip(modules, texts, strict=True) if not text]:
        raise SystemExit(f"this Python has no source code of {missing}; use one that has")
    return texts


def blocks(texts: list[str], tokenizer: Tokenizer, block: int) -> Tensor:
    """Return the tokens of all texts in blocks, an end after each text."""
    encoded = tokenizer.encode_batch([text + END for text in texts])
    return in_blocks([row.ids for row in encoded], block)


def spread(blocks: Tensor, number: int) -> Tensor:
    """Return that many of the blocks, evenly spread over all of them."""
    return blocks[torch.arange(number) * len(blocks) // number]


def schedule(data: Data, rate: float) -> Iterator[list[tuple[Tensor, float]]]:
    """Yield for each epoch its batches and rates: one order for all, one linear decay."""
    generator = torch.Generator().manual_seed(SEED)
    steps = len(data.train) // BATCH
    for epoch in range(data.epochs):
        order = torch.randperm(len(data.train), generator=generator)[: steps * BATCH]
        yield [
            (data.train[rows], rate * (1 - (epoch * steps + step) / (data.epochs * steps)))
            for step, rows in enumerate(order.split(BATCH))
        ]


def progress(name: str, data: Data, hidden: bool = False) -> tqdm:
    """Return a bar that counts tokens, so that its rate is tokens per second."""
    tokens = data.train[: len(data.train) // BATCH * BATCH].numel() * data.epochs
    options = {"unit": "tok", "unit_scale": True, "dynamic_ncols": True}
    return tqdm(total=tokens, desc=name, disable=hidden, **options)


def total_nll(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the sum over all tokens of -log p(token | those before it in its block)."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


@torch.no_grad()
def perplexity(logits: Logits, blocks: Tensor) -> float:
    """Return exp of the total NLL over the total number of tokens."""
    nll = sum(total_nll(logits(ids), ids).item() for ids in blocks.split(2 * BATCH))
    return math.exp(nll / blocks[:, 1:].numel())
