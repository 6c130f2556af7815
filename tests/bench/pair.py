"""A teacher and its student in one memory, and batches for them: what the benchmarks of training steps share.

The student's frozen parameters are the teacher's own tensors. That changes no side's work, and what models of their own
would add to memory is counted (``Pair.shared``, ``Pair.spare``).
"""

import argparse
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForImageTextToText

from pipeline.initialise import initialise
from pipeline.models import body, connector, decoder, fuse_activations
from pipeline.ops.backends import resolve
from pipeline.student import has_bias
from pipeline.surgery import DEFAULT_PARTS, mixers, replace_layers, trainable_names
from pipeline.training.batch import Batch, Totals
from pipeline.training.engine import OptimizerRecipe, Worker, make_engine
from pipeline.training.execution import compile_layers, frozen_layers, mix_precision, run_ahead
from pipeline.training.objective import DistillObjective, LayerObjective
from schemas.layers import LayersConfig, Placement, plan_layers
from schemas.recipe import DistillConfig, LossWeights
from schemas.sections import Part, Strategy
from tests.bench.capture import config

# As many as give every placement of a quarter a prefix or a suffix of its own.
SMALL_LAYERS = 8
RATIO, INIT = 0.25, "mimic"
TEMPERATURE = 1.0
RECIPE = DistillConfig.model_validate({"phases": [{"kind": "distill", "steps": 1}]})
# Text before the image, which every sample has in the middle.
PROMPT = 16
# Ids of text, none of which stands for an image.
TEXT_IDS = (10, 80)


@dataclass(frozen=True)
class Sizes:
    """Of a step: samples, tokens a sample of which the last ``response`` have targets, and what goes with them."""

    batch: int
    tokens: int
    response: int
    image: bool
    small: bool

    @property
    def a_step(self) -> int:
        """Tokens a step."""
        return self.batch * self.tokens


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """The options that ``sizes_of`` reads."""
    parser.add_argument("--small", action="store_true", help="a tiny model on the CPU, to see that it runs")
    parser.add_argument("--batch", type=int, help="samples a step and device (8; small: 2)")
    parser.add_argument("--tokens", type=int, help="tokens a sample (1,024; small: 48)")
    parser.add_argument("--response", type=int, help="the last of them, which have targets (200; small: 8)")
    parser.add_argument("--no-image", action="store_true", help="text alone")


def sizes_of(given: argparse.Namespace) -> Sizes:
    """The sizes asked for."""
    usual = (2, 48, 8) if given.small else (8, 1024, 200)
    batch, tokens, response = (g or u for g, u in zip((given.batch, given.tokens, given.response), usual, strict=True))
    return Sizes(batch, tokens, response, not given.no_image, given.small)


class Pair:
    """The models, the student's objective and its engine; the learning rate is 0, so that no step changes another's.

    Frozen weights are bfloat16, trained ones float32 under autocast.
    """

    def __init__(
        self,
        sizes: Sizes,
        worker: Worker,
        placement: Placement = "even",
        parts: tuple[Part, ...] = DEFAULT_PARTS,
        strategy: Strategy = "ddp",
    ) -> None:
        """``placement`` says which quarter of the layers is replaced, ``parts`` what trains."""
        self.parts = parts
        self.sizes, self.device = sizes, (device := worker.device)
        self.made = config(small=sizes.small)
        if sizes.small:
            self.made.text_config.num_hidden_layers = SMALL_LAYERS
        # as the reference selects: all patches but the first, 728 of 729
        self.made.vision_feature_select_strategy = "default"
        torch.manual_seed(0)
        with device:
            teacher = AutoModelForImageTextToText.from_config(self.made, dtype=torch.bfloat16)
        fuse_activations(teacher)
        self.teacher = teacher.eval().requires_grad_(False)
        self.plan = plan_layers(LayersConfig(ratio=RATIO, placement=placement), len(decoder(teacher).layers))
        run_ahead(self.teacher)  # and its copy
        self.ops = resolve("auto", device)
        self.student = self._student()
        found = mixers(self.student)
        layer = LayerObjective(found, RECIPE, dict.fromkeys(found, 1.0), None)
        self.objective = DistillObjective(self.student, layer, LossWeights(), [(1.0, TEMPERATURE)], RECIPE)
        self.trained = self._train()
        mix_precision(self.student, parts, device)
        how = OptimizerRecipe(RECIPE.betas, RECIPE.weight_decay, RECIPE.clip)
        # one engine for all sides: whoever adds gradients, it clips and steps
        self.engine = make_engine(strategy, False, self.objective, self.trained, how, worker)

    def _student(self) -> Any:
        own = {id(p) for p in connector(self.teacher).parameters()}
        frozen = [t for t in (*self.teacher.parameters(), *self.teacher.buffers()) if id(t) not in own]
        student = copy.deepcopy(self.teacher, {id(t): t for t in frozen})
        generator = torch.Generator().manual_seed(0)
        for index, attention in replace_layers(student, self.plan, bias=has_bias(INIT), ops=self.ops).items():
            initialise(mixers(student)[index], attention, INIT, generator)
        return student.eval().requires_grad_(False)

    def _train(self) -> dict[str, nn.Parameter]:
        parameters = dict(self.student.named_parameters())
        chosen = {n: parameters[n] for n in trainable_names(self.student, self.parts)}
        for parameter in chosen.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        return chosen

    def moved(self, batch: Batch) -> Batch:
        """The batch on the device."""
        return batch.map(lambda tensor: tensor.to(self.device))

    @contextmanager
    def checkpointed(self) -> Iterator[None]:
        """While open, the stock layers keep no activations but run again in the backward pass."""
        before = {layer: layer.forward for layer in frozen_layers(self.student)}
        for layer, forward in before.items():
            layer.forward = partial(checkpoint, forward, use_reentrant=False)
        try:
            yield
        finally:
            for layer, forward in before.items():
                layer.forward = forward

    def compile(self) -> None:
        """Compiles both models as the training loop compiles a student."""
        for model in (self.teacher, self.student):
            compile_layers(model)

    @contextmanager
    def eager(self) -> Iterator[None]:
        """While open, both models run as they are written: no program, and no graph of a vision tower."""
        towers: list[Any] = [body(model).vision_tower for model in (self.teacher, self.student)]
        before = {tower: vars(tower).pop("forward") for tower in towers if "forward" in vars(tower)}
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            for tower, forward in before.items():
                tower.forward = forward

    @property
    def spare(self) -> int:
        """Bytes of the teacher that a student alone does not hold: replaced attention, the connector's start."""
        mine = {id(p) for p in self.student.parameters()}
        return _bytes(p for p in self.teacher.parameters() if id(p) not in mine)

    @property
    def shared(self) -> int:
        """Bytes that a teacher of its own would add."""
        mine = {id(p) for p in self.student.parameters()}
        return _bytes(p for p in self.teacher.parameters() if id(p) in mine)

    def draw_batch(self, tapped: int, seed: int) -> Batch:
        """A batch on the host without the teacher's part, whose first ``tapped`` samples are to have taps."""
        sizes, generator = self.sizes, torch.Generator().manual_seed(seed)
        ids = torch.randint(*TEXT_IDS, (sizes.batch, sizes.tokens), generator=generator)
        inputs = {"input_ids": ids}
        if sizes.image:
            vision = self.made.vision_config
            image = (vision.image_size // vision.patch_size) ** 2 - 1
            ids[:, PROMPT : PROMPT + image] = self.made.image_token_id
            shape = (sizes.batch, 3, vision.image_size, vision.image_size)
            inputs["pixel_values"] = torch.randn(shape, generator=generator)
        rows = torch.arange(sizes.batch).repeat_interleave(sizes.response)
        places = torch.arange(sizes.tokens - sizes.response - 1, sizes.tokens - 1).repeat(sizes.batch)
        count = len(rows)
        totals = Totals(sizes.batch, count, count, tapped, tapped * sizes.tokens, sizes.a_step)
        items = np.stack([np.zeros(sizes.batch, np.int64), np.arange(sizes.batch)], 1)
        return Batch(
            items,
            last=True,
            totals=totals,
            inputs=inputs,
            positions=torch.stack([rows, places], 1),
            gold=ids[rows, places + 1],
            supervised=torch.ones(count, dtype=torch.bool),
        )


def _bytes(tensors: Iterator[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
