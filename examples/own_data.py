"""From a text file of your own to a folder with a tuned model, which needs no rosa_func.

    python -m examples.own_data --data FILE [--model NAME] [--short] [--cache DIR] [--out DIR]

NAME is a model of the Hub or a folder. Without it the model is the small GPT-2 of the quickstart.
Without a FILE the text is a module of Python. The tuned model is loaded as any other:

    model = AutoModelForCausalLM.from_pretrained("runs/own_data/tuned")
    tokenizer = AutoTokenizer.from_pretrained("runs/own_data/tuned")

The state, beside it, is for training on:

    state, extra = rosa_func.checkpoint.load("runs/own_data/state.safetensors")
"""

import argparse

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import rosa_func
from examples.shared.options import folder, text_file
from examples.shared.small_gpt2 import SHORT, Base, cached_base
from examples.shared.text import in_blocks

BLOCK, BATCH, RANK, RATE = 64, 8, 8, 1e-2  # with a model of the Hub begin at a rate of 1e-3


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean over all tokens but the first of each row."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def tune(model: PreTrainedModel, blocks: Tensor, steps: int) -> TensorDict:
    """Train on random blocks. The model is only read: what is learnt is in the state."""
    state = rosa_func.init(model, RANK, key=0)
    optimizer = torch.optim.AdamW(rosa_func.parameters(state), lr=RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = blocks[torch.randint(len(blocks), (BATCH,), generator=generator)]
        loss = next_token_loss(rosa_func.call(model, state, ids, use_cache=False).logits, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return state.detach()


@torch.no_grad()
def evaluate(model: PreTrainedModel, blocks: Tensor) -> float:
    """Return the mean loss of a stock model; all blocks have the same number of tokens."""
    losses = [next_token_loss(model(ids).logits, ids) * len(ids) for ids in blocks.split(BATCH)]
    return sum(losses).item() / len(blocks)


def main() -> None:
    """Read the file, train on its first nine tenths, show the loss of the rest, and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=text_file, default=argparse.__file__, help="a text file, UTF-8")
    add("--model", help="a model of the Hub or a folder; else the quickstart's")
    add("--short", action="store_true", help="a tiny model and a few dozen steps")
    add("--cache", type=folder, default="runs/quickstart", help="the base model's")
    add("--out", type=folder, default="runs/own_data", help="for the tuned model and the state")
    args = parser.parse_args()

    name = args.model or cached_base(SHORT[0] if args.short else Base(), args.cache)
    model = AutoModelForCausalLM.from_pretrained(name)  # in eval mode; .train() for dropout
    tokenizer = AutoTokenizer.from_pretrained(name)
    text = args.data.read_text(encoding="utf-8")
    blocks = in_blocks([tokenizer(text, add_special_tokens=False).input_ids], BLOCK)
    if len(blocks) < 10:
        raise SystemExit(f"{args.data} has {len(blocks)} blocks of {BLOCK} tokens: expected ten")
    training, held_out = blocks.tensor_split([len(blocks) * 9 // 10])

    state = tune(model, training, steps=40 if args.short else 200)
    tuned = rosa_func.export.to_module(model, state)  # a stock model
    before, after = evaluate(model, held_out), evaluate(tuned, held_out)
    print(f"held-out loss {before:.3f} before, {after:.3f} after")
    tuned.save_pretrained(args.out / "tuned")
    tokenizer.save_pretrained(args.out / "tuned")
    rosa_func.checkpoint.save(args.out / "state.safetensors", state)
    print(f"the tuned model is in {args.out / 'tuned'}, the state beside it")


if __name__ == "__main__":
    main()
