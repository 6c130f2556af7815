"""What each kind of target does to the gradient, on the demo's teacher: ``python -m tests.bench.targets``.

For response and text positions: bytes a position of the distribution's columns, and angle and norm ratio between the
gradient of the cached loss and that of the KL to the whole distribution, for the trained parameters (one batch of all
samples) and for the student's logits (position by position, so that nothing averages out).
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.demo.data import write_split
from pipeline.data.collate import image_features, model_inputs, pad_tokens, target_positions
from pipeline.data.conversations import read_conversations
from pipeline.data.encoding import Encoder
from pipeline.data.images import read_images
from pipeline.data.processors import load_processor
from pipeline.losses import full_kl, target_kl
from pipeline.models import body, head, load_model
from pipeline.ops.opset import TORCH
from pipeline.store import Store
from pipeline.student import build_student
from pipeline.surgery import trainable_names
from pipeline.targets import SparseTargets, Targets, TopTargets, decode, encode, entropy, extract, logprobs, uniforms
from schemas.config import FinalHiddenTargets, SampledTargets, TargetsConfig, TopKTargets
from schemas.layers import LayerPlan
from schemas.sections import Positions
from tests.bench.result import Result, add_json, command

TEACHER, CPU = "jobs/demo/teacher", torch.device("cpu")
BATCH = 32


def angle(got: Tensor, exact: Tensor) -> tuple[float, float]:
    """Degrees between two gradients, and the ratio of their norms."""
    cosine = torch.nn.functional.cosine_similarity(got.double(), exact.double(), dim=0).clamp(-1, 1)
    return float(torch.rad2deg(torch.arccos(cosine))), float(got.norm() / exact.norm())


def renormalised(targets: TopTargets) -> SparseTargets:
    """What top-k without a tail amounts to: the kept probabilities made to sum to one."""
    share = targets.logprobs.softmax(-1)
    count, k = share.shape
    rows = torch.arange(count).repeat_interleave(k)
    return SparseTargets(targets.ids.flatten(), share.flatten(), rows, torch.zeros(count), k * torch.arange(count + 1))


class Chosen:
    """One choice of positions over all samples: states, gradients and the cached kinds."""

    def __init__(self, kind: Positions, samples: list[Any], processor: Any) -> None:
        image = processor.image_token_id
        self.places = [target_positions(kind, s.spans, s.input_ids, image) for s in samples]
        self.samples = samples
        self.rows = torch.tensor([i for i, p in enumerate(self.places) for _ in p])
        self.columns = torch.from_numpy(np.concatenate(self.places))

    def take(self, hidden_BLD: Tensor) -> Tensor:
        """[P, D] of [B, L, D]."""
        return hidden_BLD[self.rows, self.columns]

    def cached(self, config: TargetsConfig, logits: Tensor, hidden: Tensor) -> tuple[Targets, float]:
        """The targets as they come back from the columns, and their bytes a position."""
        chance = np.concatenate(
            [uniforms(s.sample_id, 0, len(s.input_ids), 50)[p] for s, p in zip(self.samples, self.places, strict=True)]
        )
        own = logprobs(logits, config.temperature)
        kept = extract(config, own, hidden, torch.from_numpy(chance))
        row = {**encode(config, kept, logits.shape[1]), "positions": len(logits)}
        size = sum(len(v) for k, v in row.items() if isinstance(v, bytes))
        row["entropy"] = entropy(own).numpy().astype("<f2").tobytes()
        return decode(config, [row]), size / len(logits)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=128)
    add_json(parser)
    given = parser.parse_args(arguments)
    count, sides = given.samples, dict[str, dict[str, float]]()
    processor = load_processor(TEACHER)
    with tempfile.TemporaryDirectory() as folder:
        write_split(Path(folder) / "train.json", "train", count, 0)
        encoder = Encoder(processor, 128)
        samples = [
            encoder.encode(c, read_images(c, Store(folder), truncated="refuse"))
            for c in read_conversations(f"{folder}/train.json")
        ]
    ids, mask = pad_tokens([s.input_ids for s in samples], 0)
    features = [image_features(processor, s.images) for s in samples]
    inputs = model_inputs(ids, features, processor.image_token_id) | {"attention_mask": mask}
    teacher = load_model(TEACHER, torch.float32, CPU)
    student = build_student(TEACHER, LayerPlan(8, (0, 4)), "mimic", 0, torch.float32, CPU, TORCH)
    parameters = [student.get_parameter(n).requires_grad_() for n in trainable_names(student)]
    output = head(teacher)
    print("| positions | targets | bytes a position | parameters: angle, norm | logits: angle, norm |")
    print("|---|---|---|---|---|")
    for kind in ("response", "text"):
        at = Chosen(kind, samples, processor)  # type: ignore[arg-type]
        with torch.no_grad():
            theirs = at.take(body(teacher)(**inputs, use_cache=False).last_hidden_state)
            z = output(theirs)
        ours = at.take(body(student)(**inputs, use_cache=False).last_hidden_state)
        logits = output(ours)

        def gradients(loss: Tensor, wrt: Tensor, ours: Tensor = ours) -> tuple[Tensor, Tensor]:
            (by_logits,) = torch.autograd.grad(loss, wrt, retain_graph=True)
            found = torch.autograd.grad(output(ours), parameters, by_logits, retain_graph=True)
            return torch.cat([f.flatten() for f in found]), by_logits.flatten()

        leaf = logits.detach().requires_grad_()
        exact = gradients(full_kl(z, leaf).sum(), leaf)
        sampled, size = at.cached(SampledTargets(), z, theirs)
        k = max(1, round(size / 4))
        top, top_size = at.cached(TopKTargets(kind="top_k", k=k), z, theirs)
        assert isinstance(top, TopTargets)
        fp8, fp8_size = at.cached(FinalHiddenTargets(kind="final_hidden", dtype="fp8_e4m3"), z, theirs)
        bf16, bf16_size = at.cached(FinalHiddenTargets(kind="final_hidden"), z, theirs)
        identity = torch.nn.Identity()
        rows: list[tuple[str, float, Tensor]] = [
            ("sampled, N = 50", size, target_kl(leaf, identity, sampled, 1.0)),
            (f"top_k, k = {k}, with tail", top_size, target_kl(leaf, identity, top, 1.0)),
            (f"top_k, k = {k}, renormalised", top_size, target_kl(leaf, identity, renormalised(top), 1.0)),
            ("final_hidden bfloat16", bf16_size, full_kl(output(bf16.hidden.wide()), leaf).sum()),  # type: ignore[union-attr]
            ("final_hidden fp8", fp8_size, full_kl(output(fp8.hidden.wide()), leaf).sum()),  # type: ignore[union-attr]
        ]
        for name, bytes_, loss in rows:
            cells = [angle(g, e) for g, e in zip(gradients(loss, leaf), exact, strict=True)]
            shown = " | ".join(f"{degrees:.2f}°, {ratio:.3f}" for degrees, ratio in cells)
            print(f"| {kind} ({len(z)}) | {name} | {bytes_:.1f} | {shown} |", flush=True)
            (by_parameters, norm), (by_logits, logits_norm) = cells
            sides[f"{kind}: {name}"] = {
                "bytes a position": bytes_,
                "degrees, parameters": by_parameters,
                "norm, parameters": norm,
                "degrees, logits": by_logits,
                "norm, logits": logits_norm,
            }
    ratios = {f"{name}: norm / exact": figures["norm, parameters"] for name, figures in sides.items()}
    Result("targets", command("targets", arguments), sides, ratios).write(given.json)


if __name__ == "__main__":
    main()
