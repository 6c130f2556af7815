"""What a student and cached targets say at the same positions: divergence, most probable tokens and confidences.

Logits of a chunk are all that is held of [P, V].

Shapes: P positions, C of a chunk, D hidden size, V vocabulary, K kept tokens, E drawn (position, id) pairs.
"""

import torch
from torch import Tensor, nn

from pipeline.divergences import target_term
from pipeline.losses import chunks, kept_top1
from pipeline.targets import HiddenTargets, SparseTargets, Targets, TopTargets

# What is known of each position: whether both find the same token most probable; the teacher's probability of the
# student's; the student's confidence and whether it is right; and the teacher's, NaN where the targets do not tell it.
COLUMNS = ("agrees", "expected", "confidence", "right", "teacher_confidence", "teacher_right")


@torch.no_grad()
def compare(
    output: nn.Module,
    states_PD: Tensor,
    targets: Targets,
    gold_P: Tensor,
    temperature: float = 1.0,
    rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """KL(teacher ‖ student) summed over the positions, in nats, and [P, COLUMNS] in float32.

    ``output`` makes logits of states and has ``out_features``; ``temperature`` is that of the targets, at which the
    divergence is. At most ``rows`` logits are held at once.
    """
    kl, values = torch.zeros((), dtype=torch.float64, device=states_PD.device), []
    for chunk in chunks(len(states_PD), int(output.out_features), rows):  # type: ignore[arg-type]
        logits_CV, part = output(states_PD[chunk]).float(), part_of(targets, chunk)
        values.append(_values(logits_CV, output, part, gold_P[chunk], temperature))
        # overwrites the logits
        kl += target_term(output, part, temperature)(logits_CV, slice(0, len(logits_CV)))[0] / temperature**2
    return kl, torch.cat(values)


def part_of(targets: Targets, rows: slice) -> Targets:
    """The targets of some positions, from ``rows.start`` to ``rows.stop``, alone."""
    if isinstance(targets, HiddenTargets):
        return HiddenTargets(targets.hidden.tokens(rows))
    if isinstance(targets, TopTargets):
        return TopTargets(targets.ids[rows], targets.logprobs[rows])
    offsets = targets.offsets[rows.start : rows.stop + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    pairs = slice(first, last)
    row_E = targets.row[pairs] - rows.start
    return SparseTargets(targets.ids[pairs], targets.share[pairs], row_E, targets.entropy[rows], offsets - first)


def _values(logits_CV: Tensor, output: nn.Module, targets: Targets, gold_C: Tensor, temperature: float) -> Tensor:
    """[C, COLUMNS] in float32."""
    confidence_C, ours_C = logits_CV.softmax(-1).max(-1)
    theirs_C, expected_C, certain_C = _teacher(targets, output, ours_C)
    if temperature != 1:  # confidence is that in use
        certain_C = torch.full_like(certain_C, torch.nan)
    columns = (theirs_C == ours_C, expected_C, confidence_C, ours_C == gold_C, certain_C, theirs_C == gold_C)
    return torch.stack([column.float() for column in columns], 1)


def _teacher(targets: Targets, output: nn.Module, ours_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's most probable token, its probability of the tokens ``ours``, and that of its own, each [C]."""
    if isinstance(targets, HiddenTargets):
        p_CV = output(targets.hidden.wide(next(output.parameters()).dtype)).float().softmax(-1)
        certain_C, theirs_C = p_CV.max(-1)
        return theirs_C, p_CV.gather(1, ours_C[:, None])[:, 0], certain_C
    theirs_C = kept_top1(targets, len(ours_C))
    if isinstance(targets, TopTargets):
        p_CK = targets.logprobs.exp()
        return theirs_C, (p_CK * (targets.ids == ours_C[:, None])).sum(-1), p_CK[:, 0]
    drawn_E = targets.share * (targets.ids == ours_C[targets.row])
    expected_C = torch.zeros(len(ours_C), device=ours_C.device).index_add_(0, targets.row, drawn_E)
    return theirs_C, expected_C, torch.full_like(expected_C, torch.nan)
