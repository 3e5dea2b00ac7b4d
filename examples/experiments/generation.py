"""Generation for E2E: texts of the merged model, scored against all references of an MR."""

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import sacrebleu
from nltk.translate.nist_score import corpus_nist
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from transformers import PreTrainedTokenizerBase

from examples.experiments.decoding import generate
from examples.experiments.task import Metrics
from examples.shared.text import load_rows


def score(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    setting: dict[str, Any],
    data: Path | None,
) -> Metrics:
    """Let a merged model write a text for MRs of the test split; return the metrics."""
    references = defaultdict(list)
    for mr, reference in load_rows("e2e", "test", None if data is None else data / "e2e"):
        references[mr].append(reference)
    chosen = random.Random(0).sample(sorted(references), setting["generate"])
    texts = generate(model.eval(), tokenizer, chosen, setting)
    return metrics(texts, [references[mr] for mr in chosen])


def metrics(texts: list[str], references: list[list[str]]) -> Metrics:
    """Return BLEU, NIST, ROUGE-L and chrF with several references a text.

    BLEU (4-grams) and NIST (5-grams) are of the whole corpus, on mteval's 13a tokens in lower case;
    ROUGE-L is the mean over texts of the best F1 over references; chrF is chrF2 of the corpus.
    The E2E challenge's own scripts differ in NIST (n-grams clipped by all references together; nltk
    takes the best one) and ROUGE-L (their F weighs recall by 1.2): compare within a table only.
    """
    most = max(map(len, references))
    streams = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    bleu = sacrebleu.corpus_bleu(texts, streams, lowercase=True).score
    chrf = sacrebleu.corpus_chrf(texts, streams).score
    split = Tokenizer13a()
    tokens = [split(text.lower()).split() for text in texts]
    of_references = [[split(r.lower()).split() for r in group] for group in references]
    longest = max(map(len, tokens))  # without a 5-gram nltk divides by zero
    nist = float(corpus_nist(of_references, tokens, n=5)) if longest >= 5 else 0.0
    scorer = RougeScorer(["rougeL"])
    rouge = [
        scorer.score_multi(group, text)["rougeL"].fmeasure
        for group, text in zip(references, texts, strict=True)
    ]
    return {"bleu": bleu, "nist": nist, "rouge_l": sum(rouge) / len(rouge), "chrf": chrf}
