"""How a student is computed: compiled layers share their programs, and what nothing below trains is left alone."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedModel, masking_utils

from pipeline.models import body, decoder
from pipeline.surgery import DEFAULT_PARTS, mixers, trainable_names
from pipeline.training.execution import UNMASKED, checkpoint_layers, compile_layers, mix_precision, run_ahead
from schemas.sections import Part
from tests.decoders import FAMILIES, WITH_IMAGES, build, hybrid, image_prompt, tokens

CPU = torch.device("cpu")
# torch hides its own warning by another way of showing warnings, which does not hold where they are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def _no_programs() -> Iterator[None]:
    """No test finds another's programs, or leaves the limit changed."""
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


def student(family: str, replaced: tuple[int, ...], parts: tuple[Part, ...] = DEFAULT_PARTS) -> PreTrainedModel:
    torch.manual_seed(0)
    model = hybrid(build(family), replaced, "mimic").eval().requires_grad_(False)
    for name in trainable_names(model, parts):
        model.get_parameter(name).requires_grad_(True)
    return model


def states(model: PreTrainedModel, length: int, rows: int = 2) -> Tensor:
    """The last states of some tokens, the same for the same length."""
    ids = torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(length))
    found: Tensor = body(model)(input_ids=ids, use_cache=False).last_hidden_state
    return found


def gradients(model: PreTrainedModel, length: int) -> list[Tensor]:
    found = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(states(model, length).square().sum(), found))


@pytest.mark.slow  # compiles each layer twice; that compiled layers compute the same is tested below
def test_layers_share_programs_and_the_second_length_makes_those_of_all_lengths() -> None:
    model = student("phi", (0, 1, 2))
    mix_precision(model, DEFAULT_PARTS, CPU)
    programs = CompileCounterWithBackend("eager")
    compile_layers(model, programs)
    made = []
    for length in (8, 9, 11):
        states(model, length).float().sum().backward()
        made.append(programs.frame_count)
    # before and after a mixer, with and without a gradient of the input, and a stock layer: not one a layer
    assert made == [5, 10, 10]


def test_compiled_layers_that_are_checkpointed_compute_what_the_layers_do() -> None:
    model = student("phi", (1, 3))
    expected = gradients(model, 8)
    compile_layers(model, "eager")
    checkpoint_layers(model)
    assert len(expected) == sum(p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, 8), expected, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_model_whose_host_runs_ahead_computes_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (text,) = hybrid(build(family), (1,)), tokens(12)
    inputs = image_prompt(family, text) if family in WITH_IMAGES else {"input_ids": text[None]}
    inputs.pop("attention_mask", None)
    trained = [model.get_parameter(name).requires_grad_(True) for name in trainable_names(model)]

    def computed() -> list[Tensor]:
        found: Tensor = body(model)(**inputs, use_cache=False).last_hidden_state
        return [found, *torch.autograd.grad(found.square().sum(), trained)]

    expected = computed()
    run_ahead(model)
    config: Any = decoder(model).config
    assert (config._attn_implementation == UNMASKED) == (family != "gemma2"), "which has sliding windows"
    if config._attn_implementation == UNMASKED:
        monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", None)
    if family == "llava":
        monkeypatch.setattr(Tensor, "masked_scatter", None, raising=False)
    assert all(torch.equal(a, b) for a, b in zip(computed(), expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["phi", "llava"])
def test_the_host_of_a_pass_waits_for_no_device(family: str) -> None:
    model, (text,) = hybrid(build(family), (1,)).to("cuda"), tokens(12)
    inputs = image_prompt(family, text) if family in WITH_IMAGES else {"input_ids": text[None]}
    on_device = {name: tensor.to("cuda") for name, tensor in inputs.items() if name != "attention_mask"}
    trained = [model.get_parameter(name).requires_grad_(True) for name in trainable_names(model)]
    run_ahead(model)

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(body(model)(**on_device, use_cache=False).last_hidden_state.sum(), trained)

    run()  # what is made once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("taken", [0, 2], ids=["one token too few", "one token too many"])
def test_llava_whose_host_runs_ahead_refuses_features_that_are_not_as_many_as_their_tokens(taken: int) -> None:
    model = build("llava")
    run_ahead(model)
    inputs = image_prompt("llava", tokens(12)[0])
    ids = torch.cat([inputs["input_ids"][:, :1]] * taken + [inputs["input_ids"][:, 1:]], 1)
    with pytest.raises(RuntimeError, match="the image tokens are not as many as the image features"):
        body(model)(input_ids=ids, pixel_values=inputs["pixel_values"], use_cache=False)


def test_layers_below_the_first_that_trains_keep_nothing_and_see_no_backward_pass() -> None:
    model = student("phi", (2, 3), ("mixers",))
    kept: dict[int, int] = dict.fromkeys(range(4), 0)
    reached: list[int] = []

    def watch(index: int, layer: Any) -> None:
        forward = layer.forward

        def counted(*args: Any, **kwargs: Any) -> Tensor:
            def keep(tensor: Tensor) -> Tensor:
                kept[index] += 1
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                out: Tensor = forward(*args, **kwargs)
            if out.requires_grad:
                out.register_hook(lambda _: reached.append(index))
            return out

        layer.forward = counted

    layers: Any = decoder(model).layers
    for index, layer in enumerate(layers):
        watch(index, layer)
    states(model, 8).sum().backward()
    assert kept[0] == kept[1] == 0 < min(kept[2], kept[3])
    assert reached == [3, 2]
    assert all(p.grad is not None for m in mixers(model).values() for n, p in m.named_parameters() if "in_proj" in n)
