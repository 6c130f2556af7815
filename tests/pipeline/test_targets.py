import numpy as np
import pytest
import torch

from pipeline.activations import decode_activation, encode_activation, pack
from pipeline.data.collate import next_tokens, target_positions
from pipeline.losses import target_kl
from pipeline.taps import is_tapped
from pipeline.targets import (
    SparseTargets,
    Targets,
    decode,
    draw,
    encode,
    encode_draws,
    entropy,
    extract,
    logprobs,
    uniforms,
)
from schemas.config import SampledTargets, TargetsConfig, TopKTargets
from tests.tolerances import BFLOAT16_RELATIVE, FLOAT16_LOGPROB, FP8_NORM, FP8_RELATIVE, SIGMAS


def logits(positions: int = 3, vocabulary: int = 11, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(positions, vocabulary, generator=torch.Generator().manual_seed(seed))


def targets_of(z: torch.Tensor, draws: int, temperature: float = 1.0, seed: int = 0) -> SparseTargets:
    u = np.concatenate([uniforms(f"s{i}", seed, 1, draws) for i in range(len(z))])
    ids = draw(logprobs(z, temperature), torch.from_numpy(u))
    row = {
        **encode_draws(ids.numpy(), z.shape[1]),
        "entropy": entropy(logprobs(z, temperature)).numpy().astype("<f2").tobytes(),
    }
    found = decode(SampledTargets(draws=min(draws, 255)), [row])
    assert isinstance(found, SparseTargets)
    return found


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_teachers_distribution(temperature: float) -> None:
    z, n = logits(), 40_000
    u = torch.from_numpy(np.random.default_rng(0).random((3, n)))
    ids = draw(logprobs(z, temperature), u)
    p = torch.softmax(z / temperature, -1)
    for row in range(3):
        share = torch.bincount(ids[row], minlength=11) / n
        assert ((share - p[row]).abs() <= SIGMAS * (p[row] * (1 - p[row]) / n).sqrt()).all()
    torch.testing.assert_close(entropy(logprobs(z, temperature)), -(p * p.log()).sum(-1))


def test_draws_depend_on_sample_position_and_seed_only() -> None:
    long, short = uniforms("a", 0, 10, 50), uniforms("a", 0, 4, 50)
    assert np.array_equal(long[:4], short)
    assert not np.array_equal(uniforms("a", 1, 4, 50), short)
    assert not np.array_equal(uniforms("b", 0, 4, 50), short)


@pytest.mark.parametrize("vocabulary", [65536, 65537])
def test_encoded_draws_decode_to_their_counts(vocabulary: int) -> None:
    ids = np.array([[5, 5, 7, 5], [vocabulary - 1, 0, 0, vocabulary - 1], [3, 3, 3, 3]])
    row = {**encode_draws(ids, vocabulary), "entropy": np.array([1, 2, 0], "<f2").tobytes()}
    assert row["ids_dtype"] == ("uint16" if vocabulary == 65536 else "uint32")
    assert len(row["counts"]) == 5
    found = decode(SampledTargets(draws=4), [row, row])
    assert isinstance(found, SparseTargets)
    assert found.row.tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 4, 5]
    assert found.ids.tolist() == [5, 7, 0, vocabulary - 1, 3] * 2
    assert found.share.tolist() == [0.75, 0.25, 0.5, 0.5, 1.0] * 2
    assert found.entropy.tolist() == [1, 2, 0, 1, 2, 0]


def test_sampled_gradient_is_unbiased_for_the_full_distribution() -> None:
    z, repeats, n = logits(1, 9), 400, 50
    student = torch.randn(1, 9, generator=torch.Generator().manual_seed(3))
    p, q = torch.softmax(z, -1)[0], torch.softmax(student, -1)[0]
    total = torch.zeros(9)
    for seed in range(repeats):
        targets = targets_of(z, n, seed=seed)
        hidden = student.clone().requires_grad_()
        target_kl(hidden, torch.nn.Identity(), targets, 1.0).backward()
        total += hidden.grad[0]  # type: ignore[index]
    # the gradient is q - count / N, so its mean has the binomial deviation of repeats x n draws
    bound = SIGMAS * (p * (1 - p) / (n * repeats)).sqrt()
    assert ((total / repeats - (q - p)).abs() <= bound).all()


def spiked(tokens: int = 6, width: int = 256) -> torch.Tensor:
    """Activations with a token of zeros and one with a channel a thousand times the rest."""
    value = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))
    value[1] = 0
    value[2, 5] = 1500
    return value


def test_bfloat16_activations_keep_eight_bits() -> None:
    value = spiked()
    row = encode_activation("tap", pack(value, "bfloat16"))
    assert {k: len(v) for k, v in row.items()} == {"tap": 6 * 256 * 2}
    back = decode_activation("tap", row, 6, "bfloat16")
    assert torch.equal(back.values, value.to(torch.bfloat16))
    torch.testing.assert_close(back.wide(), value, rtol=BFLOAT16_RELATIVE, atol=0)


def test_float8_activations_survive_spikes_zeros_and_tiny_tokens() -> None:
    value = torch.cat([spiked(), 1e-20 * spiked()])
    row = encode_activation("tap", pack(value, "fp8_e4m3"))
    assert {k: len(v) for k, v in row.items()} == {"tap": 12 * 256, "tap_scale": 12 * 4}
    back = decode_activation("tap", row, 12, "fp8_e4m3").wide()
    assert torch.equal(back[1], torch.zeros(256))
    for got, token in zip(back, value, strict=True):
        # normal numbers keep four bits; below 2^-6 of the scale's unit the step is constant, 2^-9 of it
        step = token.abs().max() / 448 * 2.0**-10
        assert ((got - token).abs() <= FP8_RELATIVE * token.abs() + step).all()
    ordinary = [0, 3, 4, 5]
    assert float((back[ordinary] - value[ordinary]).norm() / value[ordinary].norm()) <= FP8_NORM


@pytest.mark.parametrize("vocabulary", [40, 70_000])
def test_top_k_keeps_the_most_probable_tokens_unnormalised(vocabulary: int) -> None:
    z = logits(5, vocabulary)
    config = TopKTargets(kind="top_k", k=12, temperature=2.0)
    found = roundtrip(config, z)
    expected = torch.log_softmax(z / 2.0, -1).topk(12)
    assert torch.equal(found.ids, expected.indices.repeat(2, 1))  # type: ignore[union-attr]
    torch.testing.assert_close(found.logprobs, expected.values.repeat(2, 1), rtol=FLOAT16_LOGPROB, atol=0)  # type: ignore[union-attr]
    assert (found.logprobs.exp().sum(-1) < 1).all()  # type: ignore[union-attr]


def roundtrip(config: TargetsConfig, z: torch.Tensor, hidden: torch.Tensor | None = None) -> Targets:
    """Targets of the same positions twice, as two rows of the table."""
    kept = extract(config, logprobs(z, config.temperature), torch.zeros(len(z), 4) if hidden is None else hidden, None)
    row = {**encode(config, kept, z.shape[1]), "positions": len(z)}
    return decode(config, [row, row])


def test_positions_with_a_target() -> None:
    spans, ids = np.array([[3, 5], [8, 9]]), np.array([1, 7, 7, 4, 5, 2, 7, 3, 6])
    assert target_positions("response", spans, ids, 7).tolist() == [2, 3, 7]
    assert target_positions("text", spans, ids, 7).tolist() == [2, 3, 4, 6, 7]
    assert target_positions("all", spans, ids, 7).tolist() == list(range(9))
    assert next_tokens(ids).tolist() == [7, 7, 4, 5, 2, 7, 3, 6, 6]


def test_taps_choose_samples_by_themselves() -> None:
    ids = [f"{i:032x}" for i in range(4000)]
    chosen = [i for i in ids if is_tapped(i, 0.25, 0)]
    assert abs(len(chosen) / 4000 - 0.25) <= SIGMAS * (0.25 * 0.75 / 4000) ** 0.5
    assert set(chosen) <= {i for i in ids if is_tapped(i, 0.5, 0)}
    assert not any(is_tapped(i, 0.0, 0) for i in ids)
    assert all(is_tapped(i, 1.0, 0) for i in ids)
