"""Training steps that run the teacher themselves: the tightest that we can write, and one as the reference's.

``OnlineStep`` computes exactly what the cache would have held and nothing twice. ``ReferenceStep`` does what MaTVLM's
training does with a sample (arXiv 2503.13440); its optimizer runs on the device here, where the reference offloads it
to the CPU, which is slower, and its trained weights are float32 under autocast like the others'.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.activations import Activation
from pipeline.capture import HEAD_CHUNK
from pipeline.models import body, connector, decoder, head
from pipeline.taps import recorded
from pipeline.targets import SparseTargets, draw, entropy, logprobs
from pipeline.training.batch import Batch, TapBatch
from pipeline.vision import placed
from tests.bench.pair import TEMPERATURE, Pair

DRAWS = 50


class OnlineStep:
    """One step in which the teacher answers for the batch, in the same process and type, before the student learns."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair

    def __call__(self, batch: Batch) -> Tensor:
        """The loss, after the update."""
        features = self.features(batch)
        known = self.answered(batch, features)
        embeds = self._embeds(self.pair.student, batch, features)
        metrics = self.pair.engine.accumulate(replace(known, inputs={"inputs_embeds": embeds}), last=True)
        self.pair.engine.step(0.0)
        return metrics["loss"]

    @torch.no_grad()
    def features(self, batch: Batch) -> Tensor | None:
        """What the frozen vision tower, one for both models, makes of the images, before any connector."""
        if "pixel_values" not in batch.inputs:
            return None
        layer = self.pair.made.vision_feature_layer
        tower = body(self.pair.teacher).vision_tower
        return tower(batch.inputs["pixel_values"], output_hidden_states=layer).hidden_states[layer][:, 1:]

    @torch.no_grad()
    def answered(self, batch: Batch, features: Tensor | None) -> Batch:
        """The batch with the teacher's targets and taps; one on the device."""
        model, layers = self.pair.teacher, self.pair.plan.replaced if batch.totals.tapped else ()
        with recorded(decoder(model).layers, layers) as found:
            embeds = self._embeds(model, batch, features)
            hidden_BLD = body(model)(inputs_embeds=embeds, use_cache=False).last_hidden_state
        hidden_PD = hidden_BLD[batch.positions[:, 0], batch.positions[:, 1]]
        return replace(batch, targets=self._targets(hidden_PD), taps=self._taps(found, batch.totals.tapped))

    def _embeds(self, model: torch.nn.Module, batch: Batch, features: Tensor | None) -> Tensor:
        ids = batch.inputs["input_ids"]
        embeds = model.get_input_embeddings()(ids)
        if features is None:
            return embeds
        return placed(embeds, ids == self.pair.made.image_token_id, connector(model)(features).flatten(0, 1))

    def _targets(self, hidden_PD: Tensor) -> SparseTargets:
        drawn, entropies = [], []
        # anew each time, so that a batch always gets the draws that its cache holds
        generator = torch.Generator(hidden_PD.device).manual_seed(0)
        for part in hidden_PD.split(HEAD_CHUNK):
            own = logprobs(head(self.pair.teacher)(part), TEMPERATURE)
            chance = torch.rand(len(part), DRAWS, dtype=torch.float64, device=part.device, generator=generator)
            drawn.append(draw(own, chance))
            entropies.append(entropy(own))
        ids, vocabulary = torch.cat(drawn).long(), head(self.pair.teacher).out_features
        keys = ids + vocabulary * torch.arange(len(ids), device=ids.device)[:, None]
        distinct, counts = keys.unique(return_counts=True)
        row = distinct // vocabulary
        offsets = torch.cat([row.new_zeros(1), torch.bincount(row, minlength=len(ids)).cumsum(0)]).cpu()
        return SparseTargets(distinct % vocabulary, counts / DRAWS, row, torch.cat(entropies), offsets)

    def _taps(self, found: dict[int, tuple[Tensor, Tensor]], tapped: int) -> TapBatch | None:
        if not tapped:
            return None
        layers = {i: (Activation(u[:tapped]), Activation(a[:tapped])) for i, (u, a) in found.items()}
        return TapBatch(layers, torch.ones(tapped, self.pair.sizes.tokens, dtype=torch.bool, device=self.pair.device))


class ReferenceStep:
    """One step of micro-batches of one sample, each with the losses over all positions and all layers.

    A sample: the teacher's forward with all hidden states; the student's, stock layers checkpointed; every student
    layer once more on the teacher's states, also those whose result nobody reads; both models' logits in float32 at
    every position. The losses are the summed KL and, a replaced layer, the unsquared norm of the difference.
    """

    def __init__(self, pair: Pair) -> None:
        self.pair = pair

    def __call__(self, batch: Batch) -> Tensor:
        """The mean loss a sample, after the update."""
        count = self.pair.sizes.batch
        losses = []
        with self.pair.checkpointed():
            for row in range(count):
                loss = self._loss({k: v[row : row + 1] for k, v in batch.inputs.items()}) / count
                loss.backward()
                losses.append(loss.detach())
        self.pair.engine.step(0.0)
        return torch.stack(losses).sum()

    def _loss(self, inputs: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            said = self.pair.teacher(**inputs, output_hidden_states=True, use_cache=False)
        own = self.pair.student(**inputs, output_hidden_states=True, use_cache=False)
        theirs = (said.logits.float() / TEMPERATURE).softmax(-1)
        kl = functional.kl_div((own.logits.float() / TEMPERATURE).log_softmax(-1), theirs, reduction="batchmean")
        return kl + self._layers(said.hidden_states)

    def _layers(self, hidden: tuple[Tensor, ...]) -> Tensor:
        inner = decoder(self.pair.student)
        positions = torch.arange(hidden[0].shape[1], device=self.pair.device)[None]
        rotary = inner.rotary_emb(hidden[0], position_ids=positions)
        # every layer runs, read or not
        outputs = [layer(value, position_embeddings=rotary) for layer, value in zip(inner.layers, hidden, strict=False)]
        return torch.stack([(outputs[i] - hidden[i + 1]).norm() for i in self.pair.plan.replaced]).sum()
