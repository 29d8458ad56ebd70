"""The divergence from what is kept of a teacher."""

from __future__ import annotations

import math

import torch

from vllm_pedro.distill.divergence import divergence, log_bins


def logits(seed: int, rows: int = 6, tokens: int = 50) -> torch.Tensor:
    return 3 * torch.randn(rows, tokens, generator=torch.Generator().manual_seed(seed))


def test_bins_are_probabilities_of_the_tokens_and_of_all_others() -> None:
    scores = logits(0)
    ids = scores.topk(4).indices
    probabilities = scores.double().softmax(1)
    found = log_bins(scores, ids).double().exp()
    assert torch.allclose(found[:, :4], probabilities.gather(1, ids), atol=1e-6)
    assert torch.allclose(found.sum(1), torch.ones(6).double(), atol=1e-6)


def test_what_is_left_of_a_sure_model_is_not_rounded_away() -> None:
    scores = torch.zeros(1, 50)
    scores[0, 3] = 40.0
    rest = log_bins(scores, torch.tensor([[3]]))[0, 1]
    assert math.isclose(float(rest), math.log(49) - 40.0, rel_tol=1e-5)


def test_it_is_the_divergence_over_the_vocabulary_where_the_bins_are_all_of_it() -> None:
    teacher, student = logits(0), logits(1)
    ids = teacher.topk(49).indices
    found = divergence(log_bins(teacher, ids), log_bins(student, ids))
    p, q = teacher.log_softmax(1), student.log_softmax(1)
    want = (p.exp() * (p - q)).sum(1)
    assert torch.allclose(found, want, rtol=1e-4, atol=1e-5)
    few = teacher.topk(4).indices
    assert bool((divergence(log_bins(teacher, few), log_bins(student, few)) < want + 1e-5).all())
    assert float(divergence(log_bins(teacher, few), log_bins(teacher, few)).abs().max()) == 0


def test_from_what_is_sure_it_is_cross_entropy() -> None:
    student, labels = logits(1), torch.tensor([3, 1, 4, 1, 5, 9])
    ids = (labels[:, None] + torch.arange(3)) % 50
    sure = torch.full((6, 4), -torch.inf)
    sure[:, 0] = 0.0
    student.requires_grad_()
    found = divergence(sure, log_bins(student, ids))
    want = torch.nn.functional.cross_entropy(student, labels, reduction="none")
    assert torch.allclose(found, want, atol=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert bool(gradient.isfinite().all())


def test_a_temperature_softens_each_row_by_its_own() -> None:
    teacher, student = logits(0), logits(1)
    ids = teacher.topk(49).indices
    bins = log_bins(teacher, ids), log_bins(student, ids)
    found = divergence(*bins, torch.tensor([1.0, 1.0, 1.0, 4.0, 4.0, 4.0]))
    assert torch.allclose(found[:3], divergence(*bins)[:3])
    p, q = (teacher / 4).log_softmax(1), (student / 4).log_softmax(1)
    want = 16 * (p.exp() * (p - q)).sum(1)
    assert torch.allclose(found[3:], want[3:], rtol=1e-3)
