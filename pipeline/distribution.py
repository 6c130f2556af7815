"""How far a trained student's distribution and layers are from the teacher's, on samples that no training saw.

All of the teacher comes from a cache, so that none is run; where the cache left the outputs of the replaced attention
to be recomputed, those layers alone are. The student sees pixels, as in use, also where the cache has vision features.

Shapes: S samples, P positions of a batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from pipeline.benchmarks.task import Score
from pipeline.calibration import bin_sums, calibration_error, reliability
from pipeline.comparison import COLUMNS, compare, part_of
from pipeline.data.processors import Processor
from pipeline.losses import layer_loss
from pipeline.mixer import Mamba2Mixer
from pipeline.models import head, logits_head
from pipeline.store import Store
from pipeline.surgery import mixers
from pipeline.taps import place_of
from pipeline.training.batch import Batch, TapBatch
from pipeline.training.batches import CachedBatches
from pipeline.training.objective import predicting_states
from pipeline.training.order import WINDOW
from pipeline.training.recompute import TeacherLayers
from pipeline.training.sources import Source
from pipeline.unseen import Unseen, unseen
from schemas.config import CacheConfig, RunConfig
from schemas.errors import ConfigInvalid
from schemas.evaluation import DistributionConfig

Estimate = Literal["exact", "unbiased", "coarse"]
ESTIMATES: dict[str, Estimate] = {"final_hidden": "exact", "sampled": "unbiased", "top_k": "coarse"}


def measure(
    store: Store,
    run: RunConfig,
    config: DistributionConfig,
    model: PreTrainedModel,
    processor: Processor,
    attention: TeacherLayers | None = None,
) -> dict[str, Any]:
    """The student's distance from the cached teacher, as JSON values; ``model`` is a student of the run, on its device.

    ``attention`` are the replaced layers, for caches with ``taps.targets: recompute``.

    ``kl`` is KL(teacher ‖ student) a token in nats. By ``estimate`` it is ``exact`` (``final_hidden``); ``unbiased``
    (``sampled``, arXiv 2503.16870), which may be below 0; or ``coarse`` (``top_k``), a lower bound that takes all
    tokens but the kept ones as one. ``top1_agreement`` is the share of positions where both models find the same token
    most probable; from draws the teacher's is that drawn most often, of equals the one with the lowest id.
    ``expected_agreement`` is the teacher's mean probability of the student's most probable token, how often a draw of
    the teacher's would be that token: exact; the share of draws, without bias; or a lower bound that counts tokens not
    kept as 0. Draws and kept tokens are at the ``temperature`` of their capture, and then so is the student in the KL.

    ``ece`` and ``bins`` (see ``pipeline.calibration``) compare the student's confidence, the probability of its most
    probable token, with the token of the answer that follows, at positions that have one; ``teacher_ece`` the
    teacher's. ``layers`` are relative errors of the mixers on the teacher's inputs, over tapped samples: the squared
    error over the target's squared norm, so that 1 is what an output of zero would give. ``notes`` say why something
    is missing. Intervals are over samples.

    Raises:
        ConfigInvalid: every sample was seen in training, or the other cache is of another teacher.
        ArtifactMissing: a cache, its samples or an earlier student is not there.
    """
    found = unseen(store, run, config)
    batches = _batches(store, run, found, model, processor)
    items = _chosen(batches, config, found)
    missing = _without_taps(batches, items, model, found.cache, attention)
    layers = () if "layers" in missing else batches.layers
    tally = Tally.empty(config.bins)
    for window in _windows(items):
        for batch in batches.held_out(0, 1, model.device, even=False, items=window, layers=layers):
            _measure_batch(tally, model, batch, found.cache, attention)
    return {
        "cache": str(found.source.ref),
        "targets": found.cache.targets.kind,
        "positions": found.cache.positions,
        "temperature": _temperature(found.cache),
        "estimate": ESTIMATES[found.cache.targets.kind],
        **tally.figures(),
        "notes": missing | _without_confidence(found.cache),
    }


def _batches(
    store: Store, run: RunConfig, found: Unseen, model: PreTrainedModel, processor: Processor
) -> CachedBatches:
    """The cache's rows, with pixels and the taps of those of the model's mixers that it has."""
    replaced = tuple(layer for layer in mixers(model) if layer in found.tapped)
    pixels = Source(found.source.ref, found.cache.model_copy(update={"vision": "none"}), found.source.table)
    return CachedBatches(
        store,
        found.samples,
        (pixels,),
        replaced,
        processor,
        head(model).out_features,
        micro_batch=run.placement.evaluate.batch,
        held_out=found.fraction,
    )


def _chosen(batches: CachedBatches, config: DistributionConfig, found: Unseen) -> np.ndarray:
    """int64[S, 2]: the places of the samples to measure on, in the cache's order.

    Raises:
        ConfigInvalid: there are none.
    """
    index = batches.index
    items = index.first("held_out", index.samples.rows)
    usable = (index.of(index.positions, items) > 0).nonzero()[0].tolist() if len(items) else []
    ids = batches.sample_ids(items)
    usable = [i for i in usable if ids[i] not in found.trained]
    if not usable:
        raise ConfigInvalid(found.none_left(index.samples.rows))
    # by a number of the sample's own, because data often stand by origin
    usable.sort(key=lambda i: place_of(f"measured:{ids[i]}"))
    return items[sorted(usable[: config.samples])]


def _windows(items: np.ndarray) -> Iterator[np.ndarray]:
    """The items of some shards at a time, so that each shard is read once and batches are still of similar lengths."""
    for _, group in groupby(items.tolist(), key=lambda place: place[0] // WINDOW):
        yield np.array(list(group), np.int64)


def _temperature(cache: CacheConfig) -> float:
    """At which the distributions are compared; where the whole one is known, that which the models are used at."""
    return 1.0 if cache.targets.kind == "final_hidden" else cache.targets.temperature


@dataclass
class Tally:
    """What adds up over batches, in float64.

    ``units`` are arrays [S, 4] of a sample's summed divergence, agreements and expected agreements, and its positions;
    ``student`` and ``teacher`` [bins, 3] their calibration; ``layers`` each layer's squared error and target's power.
    """

    units: list[np.ndarray]
    student: np.ndarray
    teacher: np.ndarray
    layers: dict[int, np.ndarray]
    tapped: int = 0

    @staticmethod
    def empty(bins: int) -> "Tally":
        """Before the first batch."""
        return Tally([], np.zeros((bins, 3)), np.zeros((bins, 3)), {})

    def figures(self) -> dict[str, Any]:
        """The measured figures."""
        units_S4 = np.concatenate(self.units)
        return {
            "samples": len(units_S4),
            "tokens": int(units_S4[:, 3].sum()),
            "kl": _per_token(units_S4, 0),
            "top1_agreement": _per_token(units_S4, 1),
            "expected_agreement": _per_token(units_S4, 2),
            "answer_tokens": int(self.student[:, 0].sum()),
            "ece": calibration_error(self.student),
            "teacher_ece": calibration_error(self.teacher) if self.teacher.any() else None,
            "bins": reliability(self.student),
            "tapped_samples": self.tapped,
            "layers": {str(n): float(error / power) for n, (error, power) in sorted(self.layers.items())},
        }


def _per_token(units_S4: np.ndarray, column: int) -> dict[str, Any]:
    """A sum over samples divided by their positions, with its bootstrap interval over samples."""
    return Score(units_S4[:, [column, 3]], lambda units: float(units[:, 0].sum() / units[:, 1].sum())).estimate()


@torch.no_grad()
def _measure_batch(
    tally: Tally, model: PreTrainedModel, batch: Batch, cache: CacheConfig, attention: TeacherLayers | None
) -> None:
    assert batch.positions is not None
    assert batch.supervised is not None
    assert batch.targets is not None
    assert batch.gold is not None
    states_PD, ends = predicting_states(model, batch), torch.bincount(batch.positions[:, 0]).cumsum(0).tolist()
    parts = [slice(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]
    output, temperature = logits_head(model), _temperature(cache)
    found = [
        compare(output, states_PD[part], part_of(batch.targets, part), batch.gold[part], temperature) for part in parts
    ]
    values = [columns.double().cpu().numpy() for _, columns in found]
    totals = [dict(zip(COLUMNS, columns.sum(0), strict=True)) for columns in values]
    units = zip([float(kl) for kl, _ in found], totals, values, strict=True)
    tally.units.append(np.array([[kl, t["agrees"], t["expected"], len(v)] for kl, t, v in units]))
    answers = dict(zip(COLUMNS, np.concatenate(values)[batch.supervised.cpu().numpy()].T, strict=True))
    tally.student += bin_sums(answers["confidence"], answers["right"], len(tally.student))
    if not np.isnan(answers["teacher_confidence"]).any():
        tally.teacher += bin_sums(answers["teacher_confidence"], answers["teacher_right"], len(tally.teacher))
    if batch.taps:
        tally.tapped += len(batch.taps.mask)
        for layer, sums in _layer_sums(batch.taps, mixers(model), attention).items():
            tally.layers[layer] = tally.layers.get(layer, np.zeros(2)) + sums


def _layer_sums(
    taps: TapBatch, replaced: dict[int, Mamba2Mixer], attention: TeacherLayers | None
) -> dict[int, np.ndarray]:
    """By layer, float64[2]: the mixer's squared error on the teacher's inputs, and its targets' squared norm."""
    found = {}
    for layer, (value_in, value_out) in taps.layers.items():
        mixer = replaced[layer]
        output, _ = mixer(value_in.wide(next(mixer.parameters()).dtype))
        if value_out is None:
            assert attention is not None, "without it the layers are not measured"
            target = attention.output(layer, value_in.wide(), taps.mask).float()
        else:
            target = value_out.wide()
        sums = [layer_loss(o, target, taps.mask, "mse", 1.0) for o in (output, torch.zeros_like(target))]
        found[layer] = torch.stack(sums).double().cpu().numpy()
    return found


def _without_taps(
    batches: CachedBatches,
    items: np.ndarray,
    model: PreTrainedModel,
    cache: CacheConfig,
    attention: TeacherLayers | None,
) -> dict[str, str]:
    """Why no layer is measured, if none is; or why some are not."""
    replaced, lacking = mixers(model), [n for n in mixers(model) if n not in batches.layers]
    if not replaced:
        return {"layers": "the model has no mixers"}
    if not batches.layers:
        return {"layers": f"the cache has no taps of the replaced layers {lacking} (cache.taps)"}
    if cache.taps.targets == "recompute" and attention is None:
        return {
            "layers": "the cache has no outputs (cache.taps.targets: recompute), and no attention to recompute them"
        }
    if not batches.index.of(batches.index.tapped, items).any():
        return {"layers": f"none of the {len(items)} samples is tapped (cache.taps.fraction: {cache.taps.fraction})"}
    return {"other_layers": f"the cache has no taps of the replaced layers {lacking} (cache.taps)"} if lacking else {}


def _without_confidence(cache: CacheConfig) -> dict[str, str]:
    """Why the teacher's calibration is not known, if it is not."""
    kind, temperature = cache.targets.kind, _temperature(cache)
    if kind == "sampled":
        return {
            "teacher_ece": "draws do not tell how probable the teacher finds its most probable token; targets of the "
            "kind `top_k` or `final_hidden` do"
        }
    if temperature != 1:
        return {"teacher_ece": f"the kept probabilities are those at temperature {temperature}, not those in use"}
    return {}
