"""Scores on test, and the draws along the gradient."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import BertModel

import rosa_func
from examples.experiments import draws, generation, glue, text
from examples.experiments import tiny as small
from models import randn
from rosa_func import samplers


class TestScores:
    def test_nll_weighs_tokens_alike(self):
        """Not the mean over batches: with 20 rows of growing length the two differ."""
        logits = randn(50, 7, seed=1)

        def forward(input_ids: Tensor, **_: Any) -> Any:
            return type(
                "Output",
                (),
                {"logits": logits[: input_ids.shape[1]].expand(len(input_ids), -1, -1)},
            )

        rows = [([1] * (1 + n % 3), [n % 7] * (1 + n)) for n in range(20)]
        found = text.evaluate(forward, rows)
        log_p = logits.log_softmax(1)
        terms = [
            -log_p[len(prompt) - 1 + i, token].item()
            for prompt, reference in rows
            for i, token in enumerate(reference)
        ]
        assert found["loss"] == pytest.approx(sum(terms) / len(terms), rel=1e-5)
        assert found["ppl"] == pytest.approx(math.exp(sum(terms) / len(terms)), rel=1e-5)
        assert found["bits"] == pytest.approx(found["loss"] / math.log(2))

    def test_a_text_that_equals_any_of_its_references_scores_in_full(self):
        references = [
            ["one two three four five six", "a b c d e f g"],
            ["what is that over there now"],
        ]
        best = generation.metrics(["a b c d e f g", "What is that over there now"], references)
        assert best["bleu"] == pytest.approx(100)
        assert best["rouge_l"] == pytest.approx(1)
        worse = generation.metrics(["a b c x e f g", "what is that over here now"], references)
        assert all(worse[name] < best[name] for name in best)

    def test_the_digest_of_glue_depends_on_the_encoder_but_not_on_the_seed_of_the_head(
        self, tmp_path
    ):
        small.make(tmp_path)
        setting = {"model": "tiny:bert", "length": 32, "rows": {"train": 60}, "batch": 4}
        digests = [glue.load("CoLA", setting, seed, tmp_path).digest for seed in (0, 1)]
        encoder = BertModel.from_pretrained(tmp_path / "bert")
        encoder.embeddings.LayerNorm.bias.data += 1.0
        encoder.save_pretrained(tmp_path / "bert")
        other = glue.load("CoLA", setting, 0, tmp_path).digest
        assert digests[0] == digests[1] != other

    def test_glue_chooses_on_a_tenth_of_train_and_reports_dev(self, tmp_path):
        small.make(tmp_path)
        setting = {"model": "tiny:bert", "length": 32, "rows": {"train": 60}, "batch": 4}
        made = glue.load("CoLA", setting, 0, tmp_path)
        sizes: dict[str, int] = {}
        for split in ("dev", "test"):
            rows: list[int] = []

            def forward(rows: list[int] = rows, **batch: Tensor) -> Any:
                rows.append(len(batch["input_ids"]))
                return type("Output", (), {"logits": torch.zeros(len(batch["input_ids"]), 2)})

            made.evaluate(forward, split)
            sizes[split] = sum(rows)
        assert sizes == {"dev": 6, "test": 70}
        trained: set[tuple[int, ...]] = set()
        chosen: set[tuple[int, ...]] = set()

        def note(into: set[tuple[int, ...]], **batch: Tensor) -> Any:
            into.update(tuple(row) for row in batch["input_ids"].tolist())
            return type("Output", (), {"logits": torch.zeros(len(batch["input_ids"]), 2)})

        stream = made.batches(0)
        for _ in range(3 * 54 // 4):
            made.loss(lambda **batch: note(trained, **batch), next(stream))
        made.evaluate(lambda **batch: note(chosen, **batch), "dev")
        assert len(trained) == 54 and len(chosen) == 6
        assert not trained & chosen
        head = [n for n, p in made.model.named_parameters() if n.startswith("classifier")]
        state = rosa_func.init(made.model, 2, train=made.train)
        assert set(head) <= set(rosa_func.named_parameters(state))


class TestDraws:
    def site(self, name: str = "w", dim: int = 0) -> samplers.Site:
        return samplers.Site(name, dim, torch.Generator().manual_seed(0))

    @pytest.mark.parametrize("dim", [0, 1])
    def test_aligned_takes_the_side_of_the_most_gradient(self, dim):
        W, G = randn(8, 6), randn(8, 6, seed=1)
        A, B = draws.aligned({"w": G})(W, 3, self.site(dim=dim))
        assert not (A @ B).any()
        kept = A.T @ G if dim == 0 else G @ B.T
        best = torch.linalg.svdvals(G)[:3].square().sum()
        assert kept.square().sum().item() == pytest.approx(best.item(), rel=1e-5)

    def test_importance_draws_singular_terms_where_the_gradient_is(self):
        W = randn(8, 6, dtype=torch.float64)
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        G = U[:, [1, 4]] @ randn(2, 6, seed=1, dtype=torch.float64)
        G = G @ Vh[[1, 4]].T @ Vh[[1, 4]]
        A, B = draws.importance({"w": G})(W, 2, self.site())
        expected = U[:, [1, 4]] * S[[1, 4]] @ Vh[[1, 4]]
        assert torch.allclose(A @ B, expected, atol=1e-12)

    def test_importance_draws_by_both_sides_of_the_gradient(self):
        """One direction drawn: in proportion to |u^T G|^2 + |G v|^2, within 4 sigma."""
        W = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
        G = randn(4, 4, seed=3)
        energy = G.square().sum(1) + G.square().sum(0)
        sampler, generator = draws.importance({"w": G}), torch.Generator().manual_seed(0)
        site, n = self.site()._replace(generator=generator), 2000
        drawn = torch.stack([sampler(W, 1, site)[0][:, 0].abs() > 0 for _ in range(n)]).sum(0)
        p = energy / energy.sum()
        assert ((drawn - n * p).abs() < 4 * (n * p * (1 - p)).sqrt()).all()

    @given(st.floats(0, 1), st.integers(0, 1))
    def test_a_share_moves_norm_between_the_sides_and_keeps_the_product(self, share, dim):
        W = randn(8, 6, dtype=torch.float64)
        A, B = samplers.top(W, 3, self.site())
        A2, B2 = draws.shared(samplers.top, share)(W, 3, self.site(dim=dim))
        assert torch.allclose(A2 @ B2, A @ B)
        S = torch.linalg.svdvals(W)[:3].flip(0)
        side = A2.norm(dim=0) if dim == 0 else B2.norm(dim=1)
        assert torch.allclose(side, S**share)

    def test_random_directions_have_singular_values_of_the_weight_shared_equally(self):
        W = randn(8, 6, dtype=torch.float64)
        A, B = draws.haar(W, 3, self.site())
        S, found = torch.linalg.svdvals(W), torch.linalg.svdvals(A @ B)[:3]
        chosen = [(S - value).abs().argmin() for value in found]
        assert len({int(i) for i in chosen}) == 3
        assert torch.allclose(S[torch.stack(chosen)], found)
        assert torch.allclose(A.norm(dim=0), B.norm(dim=1))
        U = torch.linalg.svd(W)[0]
        assert ((U.T @ A).abs() > 1e-3).all()  # and none of its directions

    def test_both_signs_have_the_norms_of_random_and_no_product(self):
        W = randn(8, 6)
        A, B = draws.antisymmetric(W, 4, self.site())
        C, D = samplers.random(W, 2, self.site())
        assert (A @ B).abs().max() < 4 * torch.finfo(W.dtype).eps * W.norm()
        assert torch.equal(A.norm(dim=0), C.norm(dim=0).repeat(2))
        assert torch.equal(B.norm(dim=1), D.norm(dim=1).repeat(2))
