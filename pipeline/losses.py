"""The losses on cached targets, without ever holding [positions × vocabulary] logits.

Shapes: P positions, D hidden size, V vocabulary, E drawn (position, id) pairs, L length.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.targets import SparseTargets, Targets, TopTargets

# Rows of logits held at once: 512 × 51,200 in float32 is 0.1 GB.
HEAD_CHUNK = 512
# Probabilities below this are rounding in float32.
TINY = 1e-7


def _chunked(hidden_PD: Tensor, chunk: int, term: Callable[[Tensor, int, int], Tensor]) -> Tensor:
    """Sum of ``term(hidden[start:stop], start, stop)``; each chunk's logits are made again in the backward pass."""
    total = hidden_PD.new_zeros((), dtype=torch.float32)
    for start in range(0, hidden_PD.shape[0], chunk):
        stop = min(start + chunk, hidden_PD.shape[0])
        total = total + checkpoint(term, hidden_PD[start:stop], start, stop, use_reentrant=False)
    return total


def target_kl(
    hidden_PD: Tensor, head: nn.Module, targets: Targets, temperature: float, chunk: int = HEAD_CHUNK
) -> Tensor:
    """Sum over positions of KL(teacher ‖ student), in nats, times temperature², as the kind of targets gives it.

    Estimated from ``sampled`` draws; a lower bound from ``top_k``; exact from ``final_hidden``, through the head that
    teacher and student share.
    """
    if isinstance(targets, SparseTargets):
        return sampled_kl(hidden_PD, head, targets, temperature, chunk)
    term = _top_kl if isinstance(targets, TopTargets) else _hidden_kl

    def part(hidden: Tensor, start: int, stop: int) -> Tensor:
        return term(head, hidden, targets, slice(start, stop), temperature)

    return temperature**2 * _chunked(hidden_PD, chunk, part)


def _top_kl(head: nn.Module, hidden_PD: Tensor, targets: Any, rows: slice, temperature: float) -> Tensor:
    """KL over k + 1 outcomes, the kept tokens and all others as one: nothing is renormalised away."""
    logq_PV = torch.log_softmax(head(hidden_PD).float() / temperature, -1)
    logp_PK, logq_PK = targets.logprobs[rows], logq_PV.gather(1, targets.ids[rows])
    rest_p, rest_q = (1 - x.exp().sum(-1) for x in (logp_PK, logq_PK))
    kept = (logp_PK.exp() * (logp_PK - logq_PK)).sum()
    # where rounding or certainty leaves nothing over, the rest says nothing
    rest = rest_p.clamp(min=0) * (rest_p.clamp(min=TINY).log() - rest_q.clamp(min=TINY).log())
    return kept + rest.sum()


def _hidden_kl(head: nn.Module, hidden_PD: Tensor, targets: Any, rows: slice, temperature: float) -> Tensor:
    with torch.no_grad():
        teacher = head(targets.hidden.tokens(rows).wide(hidden_PD.dtype)).float() / temperature
    return full_kl(teacher, head(hidden_PD).float() / temperature).sum()


def sampled_kl(
    hidden_PD: Tensor, head: nn.Module, targets: SparseTargets, temperature: float, chunk: int = HEAD_CHUNK
) -> Tensor:
    """Sum over positions of the estimated KL(teacher ‖ student), in nats, times temperature².

    The cross-entropy to the draws estimates that to the teacher's distribution without bias (arXiv 2503.16870); the
    teacher's exact entropy, a constant, is taken off so that 0 means equal distributions in expectation.
    """

    def term(part: Tensor, start: int, stop: int) -> Tensor:
        low, high = torch.searchsorted(targets.row, torch.tensor([start, stop], device=targets.row.device)).tolist()
        logq = torch.log_softmax(head(part).float() / temperature, -1)
        return -(targets.share[low:high] * logq[targets.row[low:high] - start, targets.ids[low:high]]).sum()

    cross_entropy = _chunked(hidden_PD, chunk, term)
    return temperature**2 * (cross_entropy - targets.entropy.sum())


def gold_cross_entropy(hidden_PD: Tensor, head: nn.Module, gold_P: Tensor, chunk: int = HEAD_CHUNK) -> Tensor:
    """Sum over positions of the cross-entropy to the token that follows, in nats."""

    def term(part: Tensor, start: int, stop: int) -> Tensor:
        return nn.functional.cross_entropy(head(part).float(), gold_P[start:stop], reduction="sum")

    return _chunked(hidden_PD, chunk, term)


def layer_loss(
    output_BLD: Tensor, target_BLD: Tensor, mask_BL: Tensor, kind: Literal["mse", "frobenius"], power: float
) -> Tensor:
    """How far a mixer's output is from the attention's, over real tokens, summed over samples.

    ``mse``: the squared differences over ``power``, the mean squared norm of the targets a token, so that 1 a token is
    what an output of zero would give. ``frobenius``: each sample's unsquared norm, which is the reference's loss at its
    batch of one (MaTVLM, arXiv 2503.13440).
    """
    difference = (output_BLD.float() - target_BLD.float()) * mask_BL[..., None]
    squares_B = difference.square().sum((1, 2))
    # the clamp keeps the square root's gradient finite where the outputs agree
    return squares_B.sum() / power if kind == "mse" else squares_B.clamp(min=1e-24).sqrt().sum()


def full_kl(teacher_logits_PV: Tensor, student_logits_PV: Tensor) -> Tensor:
    """KL(teacher ‖ student) at each position [P], in nats, over the whole vocabulary."""
    logp = torch.log_softmax(teacher_logits_PV.float(), -1)
    logq = torch.log_softmax(student_logits_PV.float(), -1)
    return (logp.exp() * (logp - logq)).sum(-1)
