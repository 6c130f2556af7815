"""What models do to their logits after the head: caps and scales, in losses as in the models themselves."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from pipeline.activations import Activation
from pipeline.evaluation import held_out_kl
from pipeline.losses import full_kl, target_kl
from pipeline.models import body, check_logits, head, logits_head
from pipeline.targets import HiddenTargets
from schemas.errors import ConfigInvalid
from tests.decoders import COMMON, FAMILIES, WITH_IMAGES, build, image_prompt, randomise, tokens
from tests.tolerances import FLOAT32_GRADIENT, FLOAT32_LOGITS

# Much less than the random models' logits, so that it matters.
CAP = 2.0


def of(model: PreTrainedModel) -> PreTrainedModel:
    randomise(model, 0)
    return model.eval().requires_grad_(False)


SCALED = {
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**COMMON, head_dim=16, final_logit_softcapping=CAP)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**COMMON, logits_scaling=6.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**COMMON, logit_scale=0.3)),
}


def states_of(model: PreTrainedModel, **inputs: Any) -> Tensor:
    return body(model)(**inputs, use_cache=False).last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_of_every_family_are_its_own_forwards(family: str) -> None:
    model = build(family)
    (text,) = tokens(11)
    inputs = image_prompt(family, text) if family in WITH_IMAGES else {"input_ids": text[None]}
    found = logits_head(model)(states_of(model, **inputs))
    torch.testing.assert_close(found, model(**inputs).logits, rtol=FLOAT32_LOGITS, atol=FLOAT32_LOGITS)
    check_logits(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", SCALED)
@torch.no_grad()
def test_capped_and_scaled_logits_are_the_models_own(kind: str, dtype: torch.dtype) -> None:
    model = of(SCALED[kind]()).to(dtype)
    ids = torch.stack(tokens(11, 11))
    expected, states = model(input_ids=ids).logits, states_of(model, input_ids=ids)
    # a product instead of a quotient rounds once more
    rounding = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(logits_head(model)(states), expected, rtol=rounding, atol=rounding)
    assert float((head(model)(states) - expected).abs().max()) > 0.5
    check_logits(model)


def own_logits(model: PreTrainedModel, states: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What the model's own forward makes of last hidden states [P, D]."""
    with monkeypatch.context() as patch:
        patch.setattr(body(model), "forward", lambda **_: BaseModelOutputWithPast(last_hidden_state=states[None]))
        return model(input_ids=torch.ones(1, len(states), dtype=torch.int64)).logits[0]


@pytest.mark.parametrize("kind", SCALED)
def test_divergence_from_cached_states_is_that_of_the_models_own_logits(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = of(SCALED[kind]())
    with torch.no_grad():
        cached = states_of(model, input_ids=tokens(11)[0][None])[0].to(torch.bfloat16)
    theirs = own_logits(model, cached.float(), monkeypatch)
    hidden = cached + torch.randn(cached.shape, generator=torch.Generator().manual_seed(1))
    hidden.requires_grad_()
    dense = full_kl(theirs, own_logits(model, hidden, monkeypatch)).sum()
    loss = target_kl(hidden, logits_head(model), HiddenTargets(Activation(cached)), 1.0, rows=4)
    (found,), (expected,) = (torch.autograd.grad(value, hidden) for value in (loss, dense))
    loss, dense = loss.detach(), dense.detach()
    assert float(loss) == pytest.approx(float(dense), rel=FLOAT32_LOGITS)
    torch.testing.assert_close(found, expected, rtol=FLOAT32_GRADIENT, atol=FLOAT32_GRADIENT)
    mean = held_out_kl(model, cached.float().numpy(), hidden.detach().numpy())
    assert mean == pytest.approx(float(dense) / len(hidden), rel=FLOAT32_LOGITS)


def test_a_model_that_does_something_else_to_its_logits_is_refused_by_name() -> None:
    class Shifted(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            found = super().forward(*args, **kwargs)
            found.logits = found.logits - 0.1 * found.logits.square()
            return found

    with pytest.raises(ConfigInvalid, match=r"teacher\.path: Shifted does more to its logits"):
        check_logits(of(Shifted(LlamaConfig(**COMMON))))
