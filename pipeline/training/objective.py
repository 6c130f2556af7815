"""What a step minimises: one module a phase, whose forward is the loss of a micro-batch, so that engines see one call.

Losses are sums over the micro-batch, divided by counts over the whole step: micro-batches and workers add up.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.divergences import Term, gold_term, target_term
from pipeline.losses import head_loss, layer_loss, top1_agreement
from pipeline.mixer import Mamba2Mixer
from pipeline.models import body, head, logits_head
from pipeline.training.batch import Batch, TapBatch
from pipeline.training.recompute import TeacherLayers
from schemas.recipe import DistillConfig, LossWeights

Metrics = dict[str, Tensor]


class LayerObjective(nn.Module):
    """The teacher-forced layer loss: each mixer on the teacher's input, against the attention's output."""

    def __init__(
        self,
        mixers: dict[int, Mamba2Mixer],
        recipe: DistillConfig,
        power: dict[int, float],
        teacher: TeacherLayers | None,
    ) -> None:
        """``power`` is the mean squared norm a token of each layer's target."""
        super().__init__()
        self.teacher = teacher
        self.mixers = nn.ModuleDict({str(i): m for i, m in mixers.items()})
        self.recipe = recipe
        self.power = power

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Sum over layers of the mean layer loss: a token for ``mse``, a sample for ``frobenius`` or ``reference``."""
        assert batch.taps is not None, "such a phase goes over tapped rows only"
        kind = self.recipe.layer_loss
        by_token = kind == "mse" and self.recipe.reduction == "token_mean"
        count = batch.totals.tap_tokens if by_token else batch.totals.tapped
        metrics: Metrics = {}
        for name, mixer in self.mixers.items():
            value_in, value_out = batch.taps.layers[int(name)]
            output, _ = mixer(value_in.wide(next(mixer.parameters()).dtype))
            target = value_out.wide() if value_out else self._recomputed(int(name), batch.taps)
            metrics[f"layer_{name}"] = layer_loss(output, target, batch.taps.mask, kind, self.power[int(name)]) / count
        return torch.stack(list(metrics.values())).sum(), metrics

    def _recomputed(self, layer: int, taps: TapBatch) -> Tensor:
        assert self.teacher is not None, "a cache without outputs needs the teacher's layers"
        return self.teacher.output(layer, taps.layers[layer][0].wide(), taps.mask).float()


class DistillObjective(nn.Module):
    """α KL + β layer loss + γ cross-entropy of the whole student.

    With several teachers' targets the divergence is the sum of each one's, by shares w that sum to 1. At one
    temperature its gradient is that to the teachers' mixture, since Σ w KL(p ‖ q) and KL(Σ w p ‖ q) differ by what q
    does not change: how far the teachers are from their mixture, below which the sum cannot fall.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layer: LayerObjective,
        weights: LossWeights,
        teachers: Sequence[tuple[float, float]],
        recipe: DistillConfig,
    ) -> None:
        """``teachers`` are the share and the temperature of each one's targets, those of the run's own cache first."""
        super().__init__()
        self.model, self.layer, self.weights, self.teachers, self.recipe = model, layer, weights, teachers, recipe

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The weighted loss; divergence and cross-entropy as means over the step's positions or samples.

        Of a batch that is held out the loss is the summed divergence, and the metrics are what ``held_out`` gives.
        """
        if batch.held_out:
            found = self.held_out(batch)
            return found["kl"], found
        hidden_PD = predicting_states(self.model, batch)
        divergences = self._divergences(batch) if self.weights.kl else []
        terms = [(self.weights.kl / self._count(batch) * share, term) for share, term in divergences]
        if self.weights.ce:
            assert batch.gold is not None
            terms.append((self.weights.ce, gold_term(batch.gold, self._gold_weights(batch))))
        loss, values = head_loss(hidden_PD, logits_head(self.model), terms)
        metrics: Metrics = {"ce": values[-1]} if self.weights.ce else {}
        if divergences:
            each = values[: len(divergences)] / self._count(batch)
            metrics["kl"] = torch.stack([share * kl for (share, _), kl in zip(divergences, each, strict=True)]).sum()
            metrics |= {name: each[number] for number, name in enumerate(kl_names(len(each)))}
        if self.weights.layer and batch.taps is not None:
            layer, found = self.layer(batch)
            loss = loss + self.weights.layer * layer
            metrics |= found
        return loss, metrics

    @torch.no_grad()
    def held_out(self, batch: Batch) -> Metrics:
        """Sums over the micro-batch's positions: ``kl``, the divergence, and ``top1``, agreements with the teacher."""
        assert batch.targets is not None
        hidden_PD, output = predicting_states(self.model, batch), logits_head(self.model)
        kl, _ = head_loss(hidden_PD, output, self._divergences(batch))
        return {"kl": kl.double(), "top1": top1_agreement(hidden_PD, output, batch.targets).double()}

    def _divergences(self, batch: Batch) -> list[tuple[float, Term]]:
        """Each teacher's share and divergence."""
        assert batch.targets is not None
        output, divergence = logits_head(self.model), self.recipe.divergence
        return [
            (share, target_term(output, targets, temperature, divergence))
            for (share, temperature), targets in zip(self.teachers, (batch.targets, *batch.others), strict=True)
        ]

    def _count(self, batch: Batch) -> int:
        return batch.totals.positions if self.recipe.reduction == "token_mean" else batch.totals.samples

    def _gold_weights(self, batch: Batch) -> Tensor:
        """[P]: what each position's cross-entropy counts; ``reference``: the mean of samples' means."""
        assert batch.supervised is not None
        assert batch.positions is not None
        supervised_P = batch.supervised.float()
        if self.recipe.reduction == "token_mean":
            return supervised_P / batch.totals.supervised
        row_P = batch.positions[:, 0]
        # not `bincount`, which asks the device for the largest row
        count_B = supervised_P.new_zeros(len(batch.items)).index_add_(0, row_P, supervised_P).clamp(min=1)
        return supervised_P / (count_B[row_P].float() * batch.totals.samples)


def predicting_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The model's states [P, D] at the positions that have a target."""
    assert batch.positions is not None
    dtype = head(model).weight.dtype  # the frozen body's; pixels come in float32
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.inputs.items()}
    hidden_BLD = body(model)(**inputs, use_cache=False).last_hidden_state
    return hidden_BLD[batch.positions[:, 0], batch.positions[:, 1]]


def kl_names(teachers: int) -> list[str]:
    """What each teacher's divergence is called in the metrics; that of a single one is ``kl`` itself."""
    return [f"kl_{number}" for number in range(teachers)] if teachers > 1 else []
