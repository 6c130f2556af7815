"""The teacher's side: one forward a sample, leaving the columns of the ``targets`` table."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.activations import encode_activation
from pipeline.data.collate import pad_id_of, pad_tokens, target_positions
from pipeline.data.encoding import EncodedSample, image_token_of
from pipeline.models import body, decoder, head, load_model, load_processor, pick_device
from pipeline.taps import is_tapped, recorded
from pipeline.targets import encode, entropy, extract, uniforms
from schemas.config import CacheConfig, Device
from schemas.tables import targets_table

# Rows of logits held at once: 1,024 × 51,200 in float64 is 0.4 GB.
HEAD_CHUNK = 1024


@dataclass(frozen=True)
class PreparedSample:
    """A sample with its pixel values [pixels of one image], decoded where there is no GPU to wait."""

    sample: EncodedSample
    pixels: np.ndarray | None


def paired(samples: Sequence[EncodedSample], pixels: Iterable[np.ndarray]) -> list[PreparedSample]:
    """The samples with their pixel values, of which there is one [pixels] for each that has an image, in order."""
    images = iter(pixels)
    return [PreparedSample(s, None if s.image is None else next(images)) for s in samples]


class Teacher:
    """The frozen teacher of one worker."""

    def __init__(self, path: str, config: CacheConfig, tapped: tuple[int, ...], device: Device, batch: int) -> None:
        self.config, self.tapped, self.batch = config, tapped, batch
        self.device = pick_device(device)
        self.model: PreTrainedModel = load_model(path, getattr(torch, config.dtype), self.device)
        processor = load_processor(path)
        self.pad_id = pad_id_of(getattr(processor, "tokenizer", processor))
        self.image_token_id = image_token_of(processor)
        self.table = targets_table(config, tapped)

    @torch.no_grad()
    def capture(self, samples: Sequence[PreparedSample]) -> dict[str, list[object]]:
        """The columns of the samples' ``targets`` rows, in their order.

        Samples of similar length share a forward. A sample's draws do not depend on its neighbours beyond the
        rounding of the logits.
        """
        rows: dict[int, dict[str, object]] = {}
        order = sorted(range(len(samples)), key=lambda i: (len(samples[i].sample.input_ids), i))
        for at in range(0, len(order), self.batch):
            chosen = order[at : at + self.batch]
            for i, row in zip(chosen, self._batch([samples[i] for i in chosen]), strict=True):
                rows[i] = row
        return {c.name: [rows[i].get(c.name) for i in range(len(samples))] for c in self.table.columns}

    def _batch(self, samples: list[PreparedSample]) -> list[dict[str, object]]:
        ids, mask = pad_tokens([s.sample.input_ids for s in samples], self.pad_id)
        inputs: dict[str, Any] = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        images = [s.pixels for s in samples if s.pixels is not None]
        if images:
            inputs["pixel_values"] = torch.from_numpy(np.stack(images)).to(self.device, self.model.dtype)
        taps = [is_tapped(s.sample.sample_id, self.config.taps.fraction, self.config.seed) for s in samples]
        with recorded(decoder(self.model).layers, self.tapped if any(taps) else ()) as found:
            hidden_BLD = body(self.model)(**inputs, use_cache=False).last_hidden_state
        rows = []
        for i, prepared in enumerate(samples):
            row = self._targets(prepared.sample, hidden_BLD[i])
            if taps[i]:
                tokens = len(prepared.sample.input_ids)
                for layer, (value_in, value_out) in found.items():
                    row |= encode_activation(f"tap_{layer}_input", value_in[i, :tokens], self.config.taps.dtype)
                    if self.config.taps.targets == "stored":
                        row |= encode_activation(f"tap_{layer}_output", value_out[i, :tokens], self.config.taps.dtype)
            rows.append(row)
        return rows

    def _targets(self, sample: EncodedSample, hidden_LD: Tensor) -> dict[str, object]:
        config = self.config.targets
        positions = target_positions(self.config.positions, sample.spans, sample.input_ids, self.image_token_id)
        drawn = None
        if config.kind == "sampled":
            drawn = uniforms(sample.sample_id, self.config.seed, len(sample.input_ids), config.draws)[positions]
        gold = torch.from_numpy(sample.input_ids[positions + 1].astype(np.int64)).to(self.device)
        parts: list[tuple[Tensor, ...]] = []
        for at in range(0, len(positions), HEAD_CHUNK):
            hidden = hidden_LD[torch.from_numpy(positions[at : at + HEAD_CHUNK]).to(self.device)]
            logits = head(self.model)(hidden).float()
            chance = None if drawn is None else torch.from_numpy(drawn[at : at + HEAD_CHUNK]).to(self.device)
            lse = logits.logsumexp(-1)
            gold_logit = logits.gather(1, gold[at : at + HEAD_CHUNK, None])[:, 0]
            stats = (lse, gold_logit - lse, entropy(logits, config.temperature))
            parts.append((*stats, *extract(config, logits, hidden, chance)))
        all_lse, all_gold, all_entropy, *kept = (torch.cat(p).cpu() for p in zip(*parts, strict=True))
        return {
            "sample_id": sample.sample_id,
            "positions": len(positions),
            **encode(config, kept, head(self.model).out_features),
            "lse": all_lse.numpy().astype("<f4").tobytes(),
            "gold_logprob": all_gold.numpy().astype("<f2").tobytes(),
            "entropy": all_entropy.numpy().astype("<f2").tobytes(),
        }
