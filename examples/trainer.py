"""ROSA with the transformers `Trainer`: resampled by a callback, resumable, exported.

    python -m examples.trainer [--short] [--every STEPS] [--resume] [--cache DIR] [--out DIR]

Adapts the base model of the quickstart (trained once, and cached) to source code.
"""

import argparse
import importlib.util
import math
import sys
from typing import Any

import torch
from torch import Tensor
from transformers import ProgressCallback, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import rosa_func
from examples.quickstart import RATES
from examples.shared.options import folder, positive
from examples.shared.small_gpt2 import BATCH, SHORT, TARGETS, Base, Budget, base_and_data
from rosa_func.module import RosaModule
from rosa_func.trainer import ResampleCallback


def rows(blocks: Tensor) -> list[dict[str, Tensor]]:
    """Return blocks of tokens as Trainer takes them; the model shifts the labels itself.

    No token comes before the first, and Trainer divides the loss by the number of labels.
    """
    labels = blocks.clone()
    labels[:, 0] = -100
    return [{"input_ids": i, "labels": j} for i, j in zip(blocks, labels, strict=True)]


class Bar(ProgressCallback):
    """Trainer's progress bar, with the loss, the rate, tokens a second and the cycle."""

    def __init__(self, tokens_a_step: int, every: int) -> None:
        """Remember what a step is made of."""
        super().__init__()
        self.tokens_a_step, self.every = tokens_a_step, every

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show what was logged beside the bar."""
        if self.training_bar is not None and logs and "loss" in logs:
            steps_a_second = self.training_bar.format_dict["rate"] or 0.0
            self.training_bar.set_postfix(
                loss=f"{float(logs['loss']):.3f}",
                rate=f"{float(logs['learning_rate']):.1e}",
                tokens_s=f"{steps_a_second * self.tokens_a_step:.0f}",
                cycle=(state.global_step - 1) // self.every,
            )


def train(args: argparse.Namespace, checkpoint: str | None) -> None:
    """Train, evaluate, export."""
    base, budget = SHORT if args.short else (Base(), Budget())
    _, model, data = base_and_data(base, budget, args.cache)

    state = rosa_func.init(model, budget.rank, targets=TARGETS)
    module = RosaModule(model, state)
    has_tensorboard = importlib.util.find_spec("tensorboard") is not None
    arguments = TrainingArguments(
        str(args.out),
        per_device_train_batch_size=BATCH,
        num_train_epochs=budget.epochs,
        learning_rate=RATES["rosa"],
        weight_decay=0.0,  # on A and B it would decay pretrained content
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_steps=10,
        report_to="tensorboard" if has_tensorboard else "none",
        dataloader_pin_memory=torch.accelerator.is_available(),  # else torch warns
    )
    trainer = Trainer(
        module,
        arguments,
        train_dataset=rows(data.train),
        eval_dataset=rows(data.held_out),
        callbacks=[ResampleCallback(args.every)],
    )
    trainer.remove_callback(ProgressCallback)
    every = args.every or math.ceil(len(data.train) / BATCH)
    trainer.add_callback(Bar(BATCH * base.block, every))
    trainer.train(resume_from_checkpoint=checkpoint)
    loss = trainer.evaluate()["eval_loss"]
    merged = rosa_func.export.to_module(model, module.state)
    merged.save_pretrained(args.out / "merged")
    print(f"held-out perplexity {math.exp(loss):.2f}; merged model in {args.out / 'merged'}")


def main() -> None:
    """Read the command line; an interruption is no error to be traced."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--short", action="store_true", help="a tiny model and a few dozen steps")
    add("--every", type=positive, help="steps between two resamples; else each epoch")
    add("--resume", action="store_true", help="from the last checkpoint in --out")
    add("--cache", type=folder, default="runs/quickstart", help="the base model's")
    add("--out", type=folder, default="runs/trainer", help="for checkpoints and the merged model")
    args = parser.parse_args()
    checkpoint = get_last_checkpoint(args.out) if args.resume and args.out.exists() else None
    if args.resume and checkpoint is None:
        print(f"there is no checkpoint in {args.out}: the run starts anew")
    try:
        train(args, checkpoint)
    except KeyboardInterrupt:
        print(
            "interrupted: --resume goes on from the last epoch that was finished", file=sys.stderr
        )
        sys.exit(130)


if __name__ == "__main__":
    main()
