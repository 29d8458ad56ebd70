"""How far a student's next token is from the teacher's, by what is kept of the teacher's.

Of each place the teacher's k likeliest tokens are kept with their log probabilities, and the mass
of all others as one more *bin*. The divergence is that of the k + 1 bins: 0 where they agree, and
never more than the divergence over the whole vocabulary, as bins lose what differs within the last.
"""

from __future__ import annotations

import torch
from torch import Tensor


def log_bins(logits: Tensor, ids: Tensor) -> Tensor:
    """Log probabilities of some tokens, and of all others together.

    Args:
        logits: `[N, V]`.
        ids: `[N, k]` int64, different tokens in each row; k < V.

    Returns:
        `[N, k + 1]` float32.
    """
    logits = logits.float()
    # Not one minus the others: what is left of a sure model's mass is below float32's rounding.
    rest = logits.scatter(1, ids, -torch.inf).logsumexp(dim=1, keepdim=True)
    found = torch.cat([logits.gather(1, ids), rest], dim=1)
    return found - logits.logsumexp(dim=1, keepdim=True)


def divergence(teacher: Tensor, student: Tensor, temperatures: Tensor | float = 1.0) -> Tensor:
    """KL(teacher || student) over bins, in nats.

    With a temperature T both are softened, bins to the power of 1/T, and the result is multiplied
    by T squared, which keeps the size of gradients (arXiv 1503.02531).

    Args:
        teacher: `[N, k + 1]`, log probabilities of the bins; minus infinity counts as none.
        student: the same of the student.
        temperatures: of all rows, or `[N]`.

    Returns:
        `[N]` float32.
    """
    soft = torch.as_tensor(temperatures, dtype=torch.float32, device=student.device).reshape(-1, 1)
    wanted = torch.log_softmax(teacher / soft, dim=1)
    found = torch.log_softmax(student / soft, dim=1)
    share = wanted.exp()
    terms = torch.where(share > 0, share * (wanted - found), 0.0)
    return terms.sum(dim=1) * soft.flatten() ** 2
