"""The figures of ``pipeline.distribution`` again: one sample, one position and one token at a time."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from jobs.stages import layer_plan, open_store
from pipeline.data.collate import image_features
from pipeline.data.processors import load_processor
from pipeline.data.samples import images_of
from pipeline.distribution import measure
from pipeline.models import head
from pipeline.ops.opset import TORCH
from pipeline.shards import Row, read_manifest, read_shard, rows_of
from pipeline.stage import require
from pipeline.student import build_student
from pipeline.training.index import is_held_out
from schemas.config import RunConfig
from schemas.evaluation import BINS, DistributionConfig
from schemas.tables import SAMPLES, recorded_cache, targets_table
from tests.conftest import tiny_settings

CPU = torch.device("cpu")
HELD_OUT = 0.4


def settings_of(teacher: Path, scenes: Path, store: Path) -> dict[str, Any]:
    """A run whose student, two random mixers among four layers, is far from the teacher."""
    settings = tiny_settings(teacher, scenes, store)
    settings["student"] = {"layers": {"list": [1, 3]}, "init": "random"}
    settings["distill"]["validation"] = {"fraction": HELD_OUT, "every": 100}
    return settings


def changed(run: RunConfig, **sections: Any) -> RunConfig:
    return RunConfig.model_validate({**run.model_dump(mode="json"), **sections})


def student_of(run: RunConfig, replaced: dict[int, nn.Module] | None = None) -> PreTrainedModel:
    return build_student(run.teacher, layer_plan(run), run.student.init, 0, torch.float32, CPU, TORCH, None, replaced)


def measured(run: RunConfig, model: PreTrainedModel | None = None, **more: Any) -> dict[str, Any]:
    attention = more.pop("attention", None)
    config, processor = DistributionConfig(**more), load_processor(run.teacher)
    return measure(open_store(run), run, config, model or student_of(run), processor, attention)


def own_rows(run: RunConfig) -> list[Row]:
    """Each held-out sample's columns of both tables."""
    store, found = open_store(run), []
    cache, tapped = recorded_cache(require(store, run.ref("cache")))
    for ref, table in ((run.ref("prepare"), SAMPLES), (run.ref("cache"), targets_table(cache, tapped))):
        shards = read_manifest(store, ref).shards
        found.append([row for info in shards for row in rows_of(read_shard(store, ref, table, info))])
    both = [{**sample, **targets} for sample, targets in zip(*found, strict=True)]
    held = [row for row in both if is_held_out(row["sample_id"], HELD_OUT)]
    assert 8 <= len(held) <= 32
    return held


def logprobs(logits_V: Tensor, temperature: float = 1.0) -> list[float]:
    return torch.log_softmax(logits_V.double() / temperature, -1).tolist()


def activation(row: Row, name: str) -> Tensor:
    """[tokens, hidden size] of its bytes."""
    if f"{name}_scale" not in row:
        return torch.from_numpy(np.frombuffer(row[name], "<i2").copy()).view(torch.bfloat16).float().view(-1, 32)
    bits = torch.from_numpy(np.frombuffer(row[name], "u1").copy()).view(torch.float8_e4m3fn).float().view(-1, 32)
    return bits * torch.from_numpy(np.frombuffer(row[f"{name}_scale"], "<f4").copy())[:, None]


class Restated:
    """The figures as sums over single tokens, each with both models' distributions as lists of the whole vocabulary."""

    def __init__(self, run: RunConfig, model: PreTrainedModel) -> None:
        self.run, self.model, self.processor = run, model, load_processor(run.teacher)
        self.kl = self.agrees = self.expected = 0.0
        self.ours: list[tuple[float, bool]] = []
        self.theirs: list[tuple[float, bool]] = []
        self.tokens = 0
        for row in own_rows(run):
            self.sample(row)

    @torch.no_grad()
    def sample(self, row: Row) -> None:
        ids = np.frombuffer(row["input_ids"], "<i4")
        pixels = torch.from_numpy(image_features(self.processor, images_of(row))["pixel_values"])
        tokens = torch.from_numpy(ids.astype(np.int64))[None]
        logits = self.model(input_ids=tokens, pixel_values=pixels, use_cache=False).logits[0]
        spans = np.frombuffer(row["spans"], "<i4").reshape(-1, 2).tolist()
        answers = {t - 1 for start, stop in spans for t in range(start, stop)}
        chosen = range(len(ids)) if self.run.cache.positions == "all" else sorted(answers)
        for number, position in enumerate(chosen):
            self.tokens += 1
            self.token(row, number, logits[position], int(ids[position + 1]) if position in answers else None)

    def token(self, row: Row, number: int, logits_V: Tensor, gold: int | None) -> None:
        q = logprobs(logits_V)
        top = max(range(len(q)), key=q.__getitem__)
        kl, theirs, expected, certain = getattr(self, self.run.cache.targets.kind)(row, number, logits_V, top)
        self.kl, self.agrees, self.expected = self.kl + kl, self.agrees + (theirs == top), self.expected + expected
        if gold is not None:
            self.ours.append((math.exp(q[top]), top == gold))
            self.theirs.append((certain, theirs == gold))

    def sampled(self, row: Row, number: int, logits_V: Tensor, top: int) -> tuple[float, int, float, float]:
        unique = np.frombuffer(row["n_unique"], "u1").astype(int)
        part = slice(unique[:number].sum(), unique[: number + 1].sum())
        ids = np.frombuffer(row["ids"], row["ids_dtype"])[part].tolist()
        drawn = Counter(dict(zip(ids, np.frombuffer(row["counts"], "u1")[part].tolist(), strict=True)))
        q = logprobs(logits_V, self.run.cache.targets.temperature)
        entropy = float(np.frombuffer(row["entropy"], "<f2")[number])
        kl = -sum(count / drawn.total() * q[token] for token, count in drawn.items()) - entropy
        mode = min(token for token, count in drawn.items() if count == max(drawn.values()))
        return kl, mode, drawn[top] / drawn.total(), math.nan

    def top_k(self, row: Row, number: int, logits_V: Tensor, top: int) -> tuple[float, int, float, float]:
        part = slice(8 * number, 8 * number + 8)
        ids = np.frombuffer(row["ids"], row["ids_dtype"])[part].tolist()
        p = np.exp(np.frombuffer(row["logprobs"], "<f2")[part].astype(float)).tolist()
        q = [math.exp(logprobs(logits_V, self.run.cache.targets.temperature)[token]) for token in ids]
        rest_p, rest_q = max(0.0, 1 - sum(p)), 1 - sum(q)
        kl = sum(a * math.log(a / b) for a, b in [*zip(p, q, strict=True), (rest_p, rest_q)] if a)
        certain = p[0] if self.run.cache.targets.temperature == 1 else math.nan
        return kl, ids[0], dict(zip(ids, p, strict=True)).get(top, 0.0), certain

    @torch.no_grad()
    def final_hidden(self, row: Row, number: int, logits_V: Tensor, top: int) -> tuple[float, int, float, float]:
        p, q = logprobs(head(self.model)(activation(row, "hidden")[number])), logprobs(logits_V)
        theirs = max(range(len(p)), key=p.__getitem__)
        kl = sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
        return kl, theirs, math.exp(p[top]), math.exp(p[theirs])


def restated_error(tokens: list[tuple[float, bool]]) -> float:
    total = 0.0
    for number in range(BINS):
        inside = [(c, right) for c, right in tokens if number / BINS < c <= (number + 1) / BINS]
        if inside:
            accuracy, confidence = (sum(column) / len(inside) for column in list(zip(*inside, strict=True))[::-1])
            total += len(inside) / len(tokens) * abs(accuracy - confidence)
    return total
