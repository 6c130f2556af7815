"""Losses through the frozen head against dense losses and autograd over the whole vocabulary."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pipeline.activations import Activation
from pipeline.divergences import gold_term, target_term
from pipeline.losses import CHUNK_BYTES, full_kl, head_loss, layer_loss, target_kl, top1_agreement
from pipeline.targets import HiddenTargets, SparseTargets, Targets, TopTargets
from schemas.errors import ConfigInvalid
from tests.tolerances import FLOAT32_GRADIENT

P, D, V, K, DRAWS = 10, 6, 23, 4, 50


def random(*shape: int, seed: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def frozen_head() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(D, V).requires_grad_(False)


def sparse_targets(p_PV: Tensor) -> SparseTargets:
    drawn = torch.multinomial(p_PV, DRAWS, replacement=True, generator=torch.Generator().manual_seed(5))
    share = torch.zeros_like(p_PV).scatter_add_(1, drawn, torch.full(drawn.shape, 1 / DRAWS))
    row, ids = share.nonzero(as_tuple=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(row, minlength=P).cumsum(0)])
    return SparseTargets(ids, share[row, ids], row, -(p_PV * p_PV.log()).sum(-1), offsets)


def targets_of(kind: str, temperature: float) -> tuple[Targets, Callable[[Tensor], Tensor]]:
    """Targets of a random teacher, and the dense forward KL of them to student logits, summed over positions."""
    head, state = frozen_head(), random(P, D, seed=1).to(torch.bfloat16)
    logp = torch.log_softmax(head(state.float()) / temperature, -1)
    if kind == "final_hidden":
        return HiddenTargets(Activation(state)), lambda z: full_kl(
            head(state.float()) / temperature, z / temperature
        ).sum()
    if kind == "top_k":
        kept = logp.topk(K)

        def lumped(z: Tensor) -> Tensor:
            p, q = kept.values.exp(), torch.softmax(z / temperature, -1).gather(1, kept.indices)
            p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
            return (p * (p / q).log()).sum()

        return TopTargets(kept.indices, kept.values), lumped
    found = sparse_targets(logp.exp())

    def drawn(z: Tensor) -> Tensor:
        logq = torch.log_softmax(z / temperature, -1)
        return -(found.share * logq[found.row, found.ids]).sum() - found.entropy.sum()

    return found, drawn


@pytest.mark.parametrize("rows", [1, 3, None])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["sampled", "top_k", "final_hidden"])
def test_forward_kl_and_its_gradient_are_the_dense_ones(kind: str, temperature: float, rows: int | None) -> None:
    targets, dense = targets_of(kind, temperature)
    head, hidden = frozen_head(), random(P, D, seed=2).requires_grad_()
    loss = target_kl(hidden, head, targets, temperature, rows=rows)
    assert_same(hidden, loss, temperature**2 * dense(head(hidden)))


def assert_same(hidden: Tensor, loss: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(loss, expected)
    got, right = (torch.autograd.grad(3 * value, hidden)[0] for value in (loss, expected))
    torch.testing.assert_close(got, right, rtol=FLOAT32_GRADIENT, atol=FLOAT32_GRADIENT)
    assert float(right.norm()) > 0.1


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_other_divergences_and_their_gradients_are_the_dense_ones(divergence: str, temperature: float) -> None:
    targets, _ = targets_of("final_hidden", temperature)
    assert isinstance(targets, HiddenTargets)
    head, hidden = frozen_head(), random(P, D, seed=2).requires_grad_()
    p = torch.softmax(head(targets.hidden.wide()) / temperature, -1)
    q = torch.softmax(head(hidden) / temperature, -1)
    m = (p + q) / 2
    dense = {
        "reverse_kl": (q * (q / p).log()).sum(),
        "jsd": 0.5 * (p * (p / m).log()).sum() + 0.5 * (q * (q / m).log()).sum(),
    }[divergence]
    loss = target_kl(hidden, head, targets, temperature, divergence, 3)  # type: ignore[arg-type]
    assert_same(hidden, loss, temperature**2 * dense)


def test_jensen_shannon_of_disjoint_distributions_is_log_two() -> None:
    """The mixture as target, as MaTVLM has it, gives 24 nats here; the divergence is bounded."""
    certain = torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    targets = HiddenTargets(Activation(certain.flip(1)))
    loss = target_kl(certain.clone(), nn.Identity(), targets, 1.0, "jsd")
    assert float(loss) / 2 == pytest.approx(math.log(2), rel=1e-5)


@pytest.mark.parametrize("kind", ["sampled", "top_k"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_divergence_that_the_targets_do_not_determine_is_refused(kind: str, divergence: str) -> None:
    targets, _ = targets_of(kind, 1.0)
    with pytest.raises(ConfigInvalid, match=rf"`{kind}` targets cannot give `{divergence}`.*final_hidden"):
        target_term(frozen_head(), targets, 1.0, divergence)  # type: ignore[arg-type]


def test_several_terms_share_one_pass_and_weigh_as_told() -> None:
    targets, dense = targets_of("sampled", 1.0)
    head, hidden = frozen_head(), random(P, D, seed=2).requires_grad_()
    gold, weight = torch.arange(P) % V, torch.linspace(0, 1, P)
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    terms = [(0.5, target_term(head, targets, 1.0)), (2.0, gold_term(gold, weight))]
    loss, values = head_loss(hidden, head, terms, 4)
    assert len(calls) == 3
    ce = (weight * nn.functional.cross_entropy(head(hidden), gold, reduction="none")).sum()
    torch.testing.assert_close(values, torch.stack([dense(head(hidden)), ce]).detach())
    assert_same(hidden, loss, 0.5 * dense(head(hidden)) + 2 * ce)


@pytest.mark.parametrize("kind", ["sampled", "top_k", "final_hidden"])
def test_bfloat16_head_gives_the_float32_loss_up_to_rounding(kind: str) -> None:
    targets, dense = targets_of(kind, 1.0)
    head, hidden = frozen_head(), random(P, D, seed=2)
    loss = target_kl(hidden.bfloat16(), head.bfloat16(), targets, 1.0)
    assert float(loss) == pytest.approx(float(dense(frozen_head()(hidden))), rel=0.05)


def test_agreement_counts_the_positions_where_both_say_the_same() -> None:
    z = random(P, V, seed=3)
    best = z.argmax(-1)
    hidden = nn.functional.one_hot(best, V).float()
    hidden[:3] = hidden[:3].roll(1, dims=1)
    identity = nn.Identity()
    top = TopTargets(z.topk(3).indices, z.log_softmax(-1).topk(3).values)
    assert int(top1_agreement(hidden, identity, top)) == P - 3
    assert int(top1_agreement(hidden, identity, HiddenTargets(Activation(z)))) == P - 3
    row = torch.arange(P).repeat_interleave(2)
    ids = torch.stack([best, (best + 5) % V], 1).flatten()
    share = torch.tensor([0.6, 0.4]).repeat(P)
    drawn = SparseTargets(ids, share, row, torch.zeros(P), 2 * torch.arange(P + 1))
    assert int(top1_agreement(hidden, identity, drawn)) == P - 3


@pytest.mark.parametrize("kind", ["sampled", "final_hidden"])
def test_the_loss_holds_a_tenth_of_the_logits_at_most(kind: str) -> None:
    """As it is cut for 8,192 positions of 51,200 logits (1.7 GB), at a sixteenth of the vocabulary."""
    positions, vocabulary, width = 8192, 3200, 16
    share = CHUNK_BYTES / (4 * positions * 51200)
    rows = int(share * positions)
    head = nn.Linear(width, vocabulary).requires_grad_(False)
    hidden = random(positions, width, seed=0).requires_grad_()
    if kind == "final_hidden":
        targets: Targets = HiddenTargets(Activation(random(positions, width, seed=1)))
    else:
        row = torch.arange(positions).repeat_interleave(12)
        ids = torch.arange(12).repeat(positions)
        offsets = 12 * torch.arange(positions + 1)
        targets = SparseTargets(ids, torch.full((len(ids),), 1 / 12), row, torch.zeros(positions), offsets)
    with torch.profiler.profile(profile_memory=True) as profile:
        target_kl(hidden, head, targets, 1.0, rows=rows).backward()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak <= 0.1 * positions * vocabulary * 4 + 2 * hidden.numel() * 4


def test_full_kl_is_zero_for_equal_logits_and_torchs_otherwise() -> None:
    a, b = random(4, V, seed=0), random(4, V, seed=1)
    assert torch.equal(full_kl(a, a), torch.zeros(4))
    expected = nn.functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), reduction="none", log_target=True)
    torch.testing.assert_close(full_kl(a, b), expected.sum(-1))


def test_layer_loss_ignores_padding_and_is_one_a_token_for_an_output_of_zero() -> None:
    target = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    power = float((target.square().sum(-1) * mask).sum() / mask.sum())
    poisoned = torch.where(mask[..., None], 0.0, 1e6)
    assert float(layer_loss(poisoned, target, mask, "mse", power)) == pytest.approx(5.0)
    expected = sum(float(sample.norm()) for sample in target * mask[..., None])
    assert float(layer_loss(poisoned, target, mask, "frobenius", power)) == pytest.approx(expected)
