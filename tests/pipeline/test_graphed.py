"""A frozen vision tower is recorded when a shape comes back, and replayed; the rest runs as it is."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.models import body
from pipeline.surgery import DEFAULT_PARTS, trainable_names
from pipeline.training.execution import compile_layers
from pipeline.training.graphed import GRAPHS, Graphed
from tests.decoders import build, hybrid, image_prompt, tokens

# torch hides its own warning by another way of showing warnings, which does not hold where they are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
LAYER = {"output_hidden_states": -2, "return_dict": True}


class Recordings:
    """Records as a graph would: the work runs once, its output stays, and a replay writes into that."""

    def __init__(self) -> None:
        self.made, self.replays = 0, 0

    def __call__(self, work: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        assert not torch.is_grad_enabled()
        output, self.made = work(), self.made + 1

        def replay() -> None:
            self.replays += 1
            for kept, new in zip(tensors(output), tensors(work()), strict=True):
                kept.copy_(new)

        return replay, output


def tensors(output: Any) -> list[Tensor]:
    """A tower's output: its last states, and those of the layers that were recorded."""
    return [output.last_hidden_state, *(state for state in output.hidden_states if state is not None)]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether they are equal bit for bit."""
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def pixels(images: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(images, 3, 28, 28, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tower_of(model: PreTrainedModel) -> Any:
    return body(model).vision_tower


def made() -> tuple[Any, Callable[..., Any], Recordings]:
    """A tower that is graphed on the CPU, its own forward, and what is recorded of it."""
    tower, recordings = tower_of(build("llava")), Recordings()
    own = tower.forward
    tower.forward = Graphed(tower, "cpu", recordings)
    return tower, own, recordings


def test_a_shape_is_recorded_when_it_comes_back_and_replayed_from_then_on() -> None:
    tower, own, recordings = made()
    counts = []
    for seed in range(4):
        given = pixels(2, seed)
        assert same(tensors(tower(given, **LAYER)), tensors(own(given, **LAYER)))
        counts.append((recordings.made, recordings.replays))
    assert counts == [(0, 0), (1, 1), (1, 2), (1, 3)]


def test_other_shapes_types_and_settings_have_recordings_of_their_own() -> None:
    tower, own, recordings = made()
    calls = [
        (pixels(2), LAYER),
        (pixels(3), LAYER),
        (pixels(2, dtype=torch.float64), LAYER),
        (pixels(2), {"output_hidden_states": [-2, -1]}),
    ]
    for number in range(3):
        for given, settings in calls:
            found, expected = tensors(tower(given, **settings)), tensors(own(given, **settings))
            assert same(found, expected)
        assert recordings.made == (len(calls) if number else 0)


def test_no_more_shapes_are_recorded_than_there_is_room_for() -> None:
    tower, own, recordings = made()
    for images in [*range(1, GRAPHS + 3)] * 3:
        given = pixels(images)
        assert torch.equal(tower(given, **LAYER).last_hidden_state, own(given, **LAYER).last_hidden_state)
    assert (recordings.made, recordings.replays) == (GRAPHS, 2 * GRAPHS)


def test_what_trains_or_is_differentiated_runs_as_it_is_and_gets_its_gradients() -> None:
    tower, _, recordings = made()
    for _ in range(3):
        tower(given := pixels(1).requires_grad_(), **LAYER).last_hidden_state.sum().backward()
        assert given.grad is not None
    weight = tower.embeddings.patch_embedding.weight.requires_grad_()
    for _ in range(3):
        tower(pixels(1), **LAYER).last_hidden_state.sum().backward()
        with torch.no_grad():
            tower(pixels(1), **LAYER)
    assert weight.grad is not None
    assert recordings.made == 0


def test_inputs_on_another_device_are_not_recorded() -> None:
    tower = tower_of(build("llava"))
    recordings = Recordings()
    tower.forward = Graphed(tower, "cuda", recordings)
    for _ in range(3):
        tower(pixels(1), **LAYER)
    assert recordings.made == 0


def test_an_output_stays_as_it_was_when_the_next_is_computed_and_can_be_changed() -> None:
    tower, own, _ = made()
    for _ in range(2):
        tower(pixels(2), **LAYER)
    first = tower(pixels(2, 1), **LAYER)
    first.pooler_output = None  # as the model does, which puts the connector's output there
    second = tower(pixels(2, 2), **LAYER)
    assert same(tensors(first), tensors(own(pixels(2, 1), **LAYER)))
    assert same(tensors(second), tensors(own(pixels(2, 2), **LAYER)))
    assert second.pooler_output is not None


def student(device: str, dtype: torch.dtype) -> PreTrainedModel:
    model = hybrid(build("llava"), (2,)).to(device, dtype)
    for name in trainable_names(model, DEFAULT_PARTS):
        model.get_parameter(name).requires_grad_(True)
    return model


def step(model: PreTrainedModel, seed: int, images: int = 1) -> list[Tensor]:
    """A loss of two micro-batches, whose backward passes come after both forward passes, and its gradients."""
    trained, total = [p for p in model.parameters() if p.requires_grad], torch.zeros((), device=model.device)
    for number in range(2):
        prompt = image_prompt("llava", *tokens(5, seed=seed + number))
        inputs = {name: value.repeat(images, 1).to(model.device) for name, value in prompt.items() if value.dim() == 2}
        seen = pixels(images, seed + number).to(model.device, model.dtype)
        total = total + body(model)(**inputs, pixel_values=seen, use_cache=False).last_hidden_state.square().sum()
    return [total.detach(), *torch.autograd.grad(total, trained)]


def test_a_steps_loss_and_gradients_are_those_without_recordings() -> None:
    plain, graphed = (student("cpu", torch.float32) for _ in range(2))
    tower, recordings = tower_of(graphed), Recordings()
    tower.forward = Graphed(tower, "cpu", recordings)
    for seed in (0, 10):
        assert same(step(graphed, seed), step(plain, seed))
    assert recordings.replays == 3


def test_compiled_students_tower_is_graphed_and_those_of_images_of_any_size_are_not() -> None:
    for family, expected in (("llava", True), ("qwen2-vl", False)):
        model = hybrid(build(family), (1,))
        compile_layers(model, "eager")
        assert any(isinstance(vars(m).get("forward"), Graphed) for m in model.modules()) == expected


@pytest.fixture
def compiled() -> Iterator[tuple[PreTrainedModel, Graphed]]:
    """A student on the GPU, compiled, and its tower."""
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    model = student("cuda", torch.bfloat16)
    compile_layers(model)
    yield model, tower_of(model).forward
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


@pytest.mark.gpu
def test_a_graphs_outputs_are_those_of_compiled_layers_for_two_shapes_in_turns(
    compiled: tuple[PreTrainedModel, Graphed],
) -> None:
    tower, graphed = tower_of(compiled[0]), compiled[1]
    for seed in range(4):
        for images in (2, 3):
            given = pixels(images, seed).to("cuda", torch.bfloat16)
            found = tensors(tower(given, **LAYER))
            with torch.no_grad():
                expected = tensors(graphed.forward(given, **LAYER))
            assert same(found, expected)
    assert len(graphed.recorded) == 2


@pytest.mark.gpu
def test_a_graphs_step_has_the_loss_and_the_gradients_of_one_without(
    compiled: tuple[PreTrainedModel, Graphed],
) -> None:
    (model, graphed), tower = compiled, tower_of(compiled[0])
    for seed in (0, 10, 20):
        # both as micro-batches of two images, whose second backward pass reads what the first forward pass left
        found = step(model, seed, images=2)
        tower.forward = lambda given, **settings: torch.no_grad()(graphed.forward)(given, **settings)
        expected = step(model, seed, images=2)
        tower.forward = graphed
        assert same(found, expected)
    assert len(graphed.recorded) == 1
