"""What a step minimises: one module a phase, whose forward is the loss of a batch, so that DDP sees one forward."""

from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.losses import gold_cross_entropy, layer_loss, target_kl
from pipeline.mixer import Mamba2Mixer
from pipeline.models import body, head
from pipeline.training.batches import Batch, TapBatch
from pipeline.training.recompute import TeacherLayers
from schemas.config import LossWeights

Metrics = dict[str, Tensor]


class LayerObjective(nn.Module):
    """The teacher-forced layer loss: each mixer on the teacher's input, against the attention's output."""

    def __init__(
        self,
        mixers: dict[int, Mamba2Mixer],
        kind: Literal["mse", "frobenius"],
        power: dict[int, float],
        teacher: TeacherLayers | None,
    ) -> None:
        super().__init__()
        self.teacher = teacher
        self.mixers = nn.ModuleDict({str(i): m for i, m in mixers.items()})
        self.kind: Literal["mse", "frobenius"] = kind
        self.power = power

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Sum over layers of the mean layer loss: a token for ``mse``, a sample for ``frobenius``."""
        assert batch.taps is not None, "an align step goes over tapped rows only"
        count = batch.global_tap_tokens if self.kind == "mse" else batch.global_tapped
        metrics: Metrics = {}
        for name, mixer in self.mixers.items():
            value_in, value_out = batch.taps.layers[int(name)]
            output, _ = mixer(value_in.wide(next(mixer.parameters()).dtype))
            target = value_out.wide() if value_out else self._recomputed(int(name), batch.taps)
            value = layer_loss(output, target, batch.taps.mask, self.kind, self.power[int(name)])
            metrics[f"layer_{name}"] = value / count
        return torch.stack(list(metrics.values())).sum(), metrics

    def _recomputed(self, layer: int, taps: TapBatch) -> Tensor:
        assert self.teacher is not None, "a cache without outputs needs the teacher's layers"
        return self.teacher.output(layer, taps.layers[layer][0].wide(), taps.mask).float()


class DistillObjective(nn.Module):
    """α KL + β layer loss + γ cross-entropy of the whole student."""

    def __init__(self, model: PreTrainedModel, layer: LayerObjective, weights: LossWeights, temperature: float) -> None:
        super().__init__()
        self.model, self.layer, self.weights, self.temperature = model, layer, weights, temperature

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The weighted loss, KL and cross-entropy as means over all workers' positions."""
        assert batch.positions is not None
        assert batch.targets is not None
        assert batch.gold is not None
        hidden_BLD = body(self.model)(**batch.inputs, use_cache=False).last_hidden_state
        hidden_PD = hidden_BLD[batch.positions[:, 0], batch.positions[:, 1]]
        output = head(self.model)
        metrics = {"kl": target_kl(hidden_PD, output, batch.targets, self.temperature) / batch.global_positions}
        loss = self.weights.kl * metrics["kl"]
        if self.weights.ce:
            metrics["ce"] = gold_cross_entropy(hidden_PD, output, batch.gold) / batch.global_positions
            loss = loss + self.weights.ce * metrics["ce"]
        if self.weights.layer and batch.taps is not None:
            layer, found = self.layer(batch)
            loss = loss + self.weights.layer * layer
            metrics |= found
        return loss, metrics
