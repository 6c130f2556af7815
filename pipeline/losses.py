"""The losses of a step: the head without logits, the layer loss, and agreement with the teacher.

Shapes: P positions, D hidden size, V vocabulary, B batch, L length.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.divergences import Term, target_term
from pipeline.targets import HiddenTargets, SparseTargets, Targets, TopTargets
from schemas.sections import Divergence

# Float32 bytes of one chunk's logits. A term holds at most five such arrays at once (both models' logits,
# probabilities, a product, the gradient): 8 % of 8,192 positions of 51,200 logits.
CHUNK_BYTES = 28 * 2**20
# Fewer rows would read the head's weights more often than they are worth.
MIN_ROWS = 32


def chunks(positions: int, vocabulary: int, rows: int | None = None) -> Iterator[slice]:
    """The positions in parts whose logits may be held at once, of ``rows`` each where that is given."""
    rows = rows or max(MIN_ROWS, CHUNK_BYTES // (4 * vocabulary) // MIN_ROWS * MIN_ROWS)
    for start in range(0, positions, rows):
        yield slice(start, min(start + rows, positions))


def _vocabulary(head: nn.Module, hidden_PD: Tensor) -> int:
    return int(getattr(head, "out_features", hidden_PD.shape[-1]))


class _HeadLoss(torch.autograd.Function):
    """Makes each chunk's logits once: loss and gradient come from the same pass, and nothing is kept but the latter."""

    @staticmethod
    def forward(
        ctx: Any, hidden_PD: Tensor, head: nn.Module, terms: Sequence[tuple[float, Term]], rows: int | None
    ) -> tuple[Tensor, Tensor]:
        gradient_PD = torch.empty_like(hidden_PD) if ctx.needs_input_grad[0] else None
        values = torch.zeros(len(terms), dtype=torch.float32, device=hidden_PD.device)
        for chunk in chunks(len(hidden_PD), _vocabulary(head, hidden_PD), rows):
            with torch.set_grad_enabled(gradient_PD is not None):
                leaf = hidden_PD[chunk].detach().requires_grad_(gradient_PD is not None)
                part = leaf.view_as(leaf)  # modules' hooks may look for gradients of their inputs, not of leaves
                logits_CV = head(part).float()
            total_CV = None
            for i, (weight, term) in enumerate(terms):
                own = logits_CV.detach().clone() if i + 1 < len(terms) or logits_CV is part else logits_CV.detach()
                value, gradient_CV = term(own, chunk)
                values[i] += value
                gradient_CV = gradient_CV.mul_(weight)
                total_CV = gradient_CV if total_CV is None else total_CV.add_(gradient_CV)
            if gradient_PD is not None:
                (gradient_PD[chunk],) = torch.autograd.grad(logits_CV, part, total_CV)
        ctx.gradient_PD = gradient_PD
        ctx.mark_non_differentiable(values)
        # not by a tensor of the weights, whose copy to the device would wait for all that it has to do
        return torch.stack([weight * values[i] for i, (weight, _) in enumerate(terms)]).sum(), values

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, None, None, None]:
        # in place, and given away: a second copy would be half of what the loss holds
        gradient_PD, ctx.gradient_PD = ctx.gradient_PD, None
        assert gradient_PD is not None, "the loss is differentiated once"
        return gradient_PD.mul_(gradients[0]), None, None, None


def head_loss(
    hidden_PD: Tensor, head: nn.Module, terms: Sequence[tuple[float, Term]], rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """The weighted sum of terms of the frozen head's logits, and each term's own value [terms], unweighted.

    The gradient reaches ``hidden_PD`` alone. [P, V] logits are never held: at most ``rows`` of them at once.
    """
    total, values = _HeadLoss.apply(hidden_PD, head, terms, rows)
    return total, values


def target_kl(
    hidden_PD: Tensor,
    head: nn.Module,
    targets: Targets,
    temperature: float,
    divergence: Divergence = "forward_kl",
    rows: int | None = None,
) -> Tensor:
    """Sum over positions of the divergence from cached targets, in nats, times temperature²."""
    return head_loss(hidden_PD, head, [(1.0, target_term(head, targets, temperature, divergence))], rows)[0]


@torch.no_grad()
def top1_agreement(hidden_PD: Tensor, head: nn.Module, targets: Targets) -> Tensor:
    """At how many positions the student's most probable token is the teacher's.

    Of ``sampled`` targets the teacher's is the token drawn most often (of equals the first).
    """
    found = torch.zeros((), dtype=torch.int64, device=hidden_PD.device)
    theirs_P = None if isinstance(targets, HiddenTargets) else kept_top1(targets, len(hidden_PD))
    for chunk in chunks(len(hidden_PD), _vocabulary(head, hidden_PD), None):
        if theirs_P is None:
            assert isinstance(targets, HiddenTargets)
            theirs = head(targets.hidden.tokens(chunk).wide(hidden_PD.dtype)).argmax(-1)
        else:
            theirs = theirs_P[chunk]
        found += (head(hidden_PD[chunk]).argmax(-1) == theirs).sum()
    return found


def kept_top1(targets: SparseTargets | TopTargets, positions: int) -> Tensor:
    """The teacher's most probable token [P]: the first kept one, or that drawn most often (of equals the first)."""
    if isinstance(targets, TopTargets):
        return targets.ids[:, 0]
    most_P = torch.zeros(positions, device=targets.share.device)
    most_P.scatter_reduce_(0, targets.row, targets.share, "amax")
    best_E = targets.share == most_P[targets.row]
    ids_P = torch.full((positions,), torch.iinfo(torch.int64).max, device=targets.ids.device)
    return ids_P.scatter_reduce_(0, targets.row[best_E], targets.ids[best_E], "amin")


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
