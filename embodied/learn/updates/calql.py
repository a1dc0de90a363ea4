"""The regulariser of calibrated Q-learning.

Nakamoto et al. 2023 (arXiv:2303.05479), as policy-agnostic RL has it (Mark et al. 2024,
arXiv:2412.06685). Shapes: E members, B batch, n random chunks, p of the policy's, M all.
"""

import math

import torch


def calibrated(
    q_EB: torch.Tensor,
    q_random_EBn: torch.Tensor,
    q_policy_EBp: torch.Tensor,
    bound_B: torch.Tensor,
    *,
    copies: int,
) -> torch.Tensor:
    """R [E, B] = log Σ_j exp(q̃_j − log M) − Q(s, a of the data): how far other actions are thought
    better than the recorded one.

    j goes over the random chunks, `copies` of each of the policy's, and the recorded one: with
    n = copies = 10 and p = 2 published, M = 31. q̃ of the policy's chunks is no less than bound_B,
    a return to go: what was earned in fact is not pushed below, and has no gradient.
    """
    lowest_EBp = torch.maximum(q_policy_EBp, bound_B[:, None])
    weighted_EBp = lowest_EBp + math.log(copies)
    terms_EBj = torch.cat([q_random_EBn, weighted_EBp, q_EB[..., None]], dim=-1)
    count = q_random_EBn.shape[-1] + copies * q_policy_EBp.shape[-1] + 1
    return terms_EBj.logsumexp(dim=-1) - math.log(count) - q_EB
