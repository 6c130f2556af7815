"""How far the student's distribution is from the teacher's, and the gradient: closed forms over one chunk of logits.

A term gets the student's logits [C, V] in float32, which it may overwrite, and the chunk's rows among all positions;
it gives the sum over the rows and its gradient [C, V]. Closed forms hold two or three arrays where autograd holds ten.

With q = softmax(z / T): KL(p ‖ q) has the gradient (q − p) / T; any divergence Σ f(q) has q (f′ − Σ q f′) / T, which
gives KL(q ‖ p) and the Jensen-Shannon divergence ½ KL(p ‖ m) + ½ KL(q ‖ m), m = (p + q) / 2 (Lin 1991). All are in nats
and multiplied by T², which keeps the gradient's size (Hinton et al. 2015, arXiv 1503.02531).

Shapes: P positions, C of them in a chunk, V vocabulary, K kept tokens, E drawn (position, id) pairs.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.targets import HiddenTargets, SparseTargets, Targets, TopTargets
from schemas.errors import ConfigInvalid
from schemas.sections import Divergence

Term = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
# Probabilities below this are rounding in float32.
TINY = 1e-7
UNDETERMINED = {
    "sampled": "draws say what the teacher says often, not how unlikely it finds what only the student says",
    "top_k": "the teacher's probability of a token that was not kept is unknown",
}


def refuse_undetermined(kind: str, divergence: Divergence) -> None:
    """Raises ConfigInvalid where that kind of target does not determine the divergence."""
    if divergence != "forward_kl" and kind in UNDETERMINED:
        raise ConfigInvalid(
            f"distill.divergence: `{kind}` targets cannot give `{divergence}`: {UNDETERMINED[kind]}. "
            "Use `forward_kl`, or a cache with `cache.targets.kind: final_hidden`"
        )


def target_term(head: nn.Module, targets: Targets, temperature: float, divergence: Divergence = "forward_kl") -> Term:
    """The divergence from cached targets: estimated from draws, a lower bound from ``top_k``, else exact.

    Raises:
        ConfigInvalid: the targets do not determine it.
    """
    if isinstance(targets, SparseTargets):
        refuse_undetermined("sampled", divergence)
        return _sampled(targets, temperature)
    if isinstance(targets, TopTargets):
        refuse_undetermined("top_k", divergence)
        return _top_k(targets, temperature)
    return _full(head, targets, temperature, divergence)


def _sampled(targets: SparseTargets, temperature: float) -> Term:
    """The cross-entropy to the draws estimates that to the teacher's distribution without bias (arXiv 2503.16870).

    The teacher's exact entropy, a constant, is taken off, so that 0 in expectation means equal distributions.
    """

    def term(logits_CV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        chosen = slice(int(targets.offsets[rows.start]), int(targets.offsets[rows.stop]))
        value, gradient_CV = _sparse(
            logits_CV, temperature, targets.row[chosen] - rows.start, targets.ids[chosen], targets.share[chosen]
        )
        return temperature**2 * (value - targets.entropy[rows].sum()), temperature**2 * gradient_CV

    return term


def gold_term(gold_P: Tensor, weight_P: Tensor) -> Term:
    """Weighted cross-entropy to the token that follows each position."""

    def term(logits_CV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        row_C = torch.arange(logits_CV.shape[0], device=logits_CV.device)
        return _sparse(logits_CV, 1.0, row_C, gold_P[rows], weight_P[rows])

    return term


def _sparse(z_CV: Tensor, temperature: float, row_E: Tensor, ids_E: Tensor, share_E: Tensor) -> tuple[Tensor, Tensor]:
    """``-Σ share log q`` over distinct (row, id) pairs, and its gradient; a row's shares need not sum to one."""
    z_CV = z_CV.div_(temperature)
    lse_C = z_CV.logsumexp(-1)
    total_C = torch.zeros_like(lse_C).index_add_(0, row_E, share_E)
    value = (total_C * lse_C).sum() - (share_E * z_CV[row_E, ids_E]).sum()
    gradient_CV = z_CV.sub_(lse_C[:, None]).exp_().mul_(total_C[:, None])
    gradient_CV[row_E, ids_E] = gradient_CV[row_E, ids_E] - share_E
    return value, gradient_CV.div_(temperature)


def _top_k(targets: TopTargets, temperature: float) -> Term:
    """KL over k + 1 outcomes, the kept tokens and all others as one: nothing is renormalised away."""

    def term(logits_CV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        ids_CK, logp_CK = targets.ids[rows], targets.logprobs[rows]
        logq_CV = _log_softmax(logits_CV, temperature)
        logq_CK, p_CK = logq_CV.gather(1, ids_CK), logp_CK.exp()
        q_CK = logq_CK.exp()
        # where rounding or certainty leaves nothing over, the rest says nothing
        rest_p = (1 - p_CK.sum(-1)).clamp(min=0)
        rest_q = (1 - q_CK.sum(-1)).clamp(min=TINY)
        value = (p_CK * (logp_CK - logq_CK)).sum() + (rest_p * (rest_p.clamp(min=TINY).log() - rest_q.log())).sum()
        ratio_C = rest_p / rest_q
        scale_C = p_CK.sum(-1) - ratio_C * q_CK.sum(-1)
        gradient_CV = logq_CV.exp_().mul_(scale_C[:, None])
        gradient_CV.scatter_add_(1, ids_CK, ratio_C[:, None] * q_CK - p_CK)
        return temperature**2 * value, temperature * gradient_CV

    return term


def _full(head: nn.Module, targets: HiddenTargets, temperature: float, divergence: Divergence) -> Term:
    gradient_of = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jensen_shannon}[divergence]

    def term(logits_CV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            teacher_CV = head(targets.hidden.tokens(rows).wide(_type(head))).float()
        value, gradient_CV = gradient_of(_log_softmax(teacher_CV, temperature), _log_softmax(logits_CV, temperature))
        return temperature**2 * value, gradient_CV.mul_(temperature)

    return term


def _type(head: nn.Module) -> torch.dtype:
    return next((p.dtype for p in head.parameters()), torch.float32)


def _log_softmax(z_CV: Tensor, temperature: float) -> Tensor:
    """In place."""
    z_CV = z_CV.div_(temperature)
    return z_CV.sub_(z_CV.logsumexp(-1, keepdim=True))


def _forward_kl(logp_CV: Tensor, logq_CV: Tensor) -> tuple[Tensor, Tensor]:
    p_CV = logp_CV.exp()
    value = torch.linalg.vecdot(p_CV, logp_CV.sub_(logq_CV)).sum()
    return value, logq_CV.exp_().sub_(p_CV)


def _reverse_kl(logp_CV: Tensor, logq_CV: Tensor) -> tuple[Tensor, Tensor]:
    q_CV = logq_CV.exp()
    difference_CV = logq_CV.sub_(logp_CV)
    value_C = torch.linalg.vecdot(q_CV, difference_CV)
    return value_C.sum(), difference_CV.sub_(value_C[:, None]).mul_(q_CV)


def _jensen_shannon(logp_CV: Tensor, logq_CV: Tensor) -> tuple[Tensor, Tensor]:
    logm_CV = torch.logaddexp(logp_CV, logq_CV).sub_(math.log(2))
    from_p_C = torch.linalg.vecdot(logp_CV.exp(), logp_CV.sub_(logm_CV))
    q_CV = logq_CV.exp()
    difference_CV = logq_CV.sub_(logm_CV)
    from_q_C = torch.linalg.vecdot(q_CV, difference_CV)
    gradient_CV = difference_CV.sub_(from_q_C[:, None]).mul_(q_CV)
    return 0.5 * (from_p_C + from_q_C).sum(), gradient_CV.mul_(0.5)
