"""Capture against the bare teacher forward, at TinyLLaVA-Phi-2's size: ``python -m tests.bench.capture`` on a GPU.

Random weights in bfloat16, 729 image positions, 100 to 640 text tokens a sample of which a third to a half is answer.
The bare forward runs the same batches from pixels that lie on the host, and keeps nothing: once as the model is called
(head over all positions) and once without the head, which is the floor. Capture is a teacher worker's own work as it
runs under Ray: several calls at once on one device, shards written to local disk; from the first shard's commit to the
last one's, so that what a run of thousands of shards does once does not count. Rounds take turns; medians of tokens a
second. ``--small`` is for a machine without a GPU, to see that it runs.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, PhiConfig, SiglipVisionConfig

from jobs.cache import CALLS, CacheJob, TeacherActor, features_row
from jobs.demo import teacher_model
from pipeline.capture import PreparedSample, Teacher
from pipeline.data.encoding import EncodedSample
from pipeline.data.samples import sample_columns
from pipeline.models import body
from pipeline.shards import fold_manifest, write_shard
from pipeline.store import Store
from schemas.artifacts import ArtifactRef
from schemas.config import CacheConfig, StoreConfig, TapsConfig, TeacherConfig
from schemas.placement import CachePlacement
from schemas.tables import SAMPLES
from tests.decoders import tinyllava

LAYERS = tuple(range(0, 32, 4))
VARIANTS = {
    "sampled": TapsConfig(fraction=0),
    "sampled, 8 layers' taps of 5 %": TapsConfig(layers=LAYERS, fraction=0.05),
}
ROUNDS = 3
SOURCE = ArtifactRef("prepare", "bench", 1)


def config(*, small: bool) -> LlavaConfig:
    """Phi-2 and SigLIP so400m at 384 pixels, or something tiny."""
    settings = {
        "image_token_index": teacher_model.build_tokenizer().convert_tokens_to_ids("<image>"),
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -2,
    }
    if not small:
        return tinyllava(**settings)
    text = PhiConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=32, num_attention_heads=2)
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14
    )
    return LlavaConfig(vision_config=vision, text_config=text, **settings)


def teacher_folder(folder: Path, made: LlavaConfig, device: torch.device) -> None:
    """Writes a model of random weights with the demo's processor."""
    torch.set_default_dtype(torch.bfloat16)
    with device:
        LlavaForConditionalGeneration(made).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    teacher_model.build_processor().save_pretrained(folder)


def draw_samples(count: int, made: LlavaConfig) -> list[EncodedSample]:
    """Samples of random text around an image."""
    generator = np.random.default_rng(0)
    vision = made.vision_config
    image = np.full((vision.image_size // vision.patch_size) ** 2, made.image_token_index, np.int32)
    samples = []
    for i in range(count):
        text = generator.integers(10, 80, generator.integers(100, 641), dtype=np.int32)
        ids = np.concatenate([text[:40], image, text[40:]])
        start = len(ids) - int(len(text) * generator.uniform(1 / 3, 1 / 2))
        samples.append(EncodedSample(f"{i:032x}", str(i), ids, np.array([[start, len(ids)]], np.int32), (b"-",)))
    return samples


class Bench:
    """A teacher's folder and its samples in a temporary store, and what runs over them."""

    def __init__(self, folder: str, given: argparse.Namespace) -> None:
        self.folder, self.given = folder, given
        self.made, self.device = config(small=given.small), "cpu" if given.small else "cuda"
        teacher_folder(Path(folder) / "teacher", self.made, torch.device(self.device))
        self.samples = draw_samples(given.shards * given.shard_rows, self.made)
        side = self.made.vision_config.image_size
        self.pixels = np.random.default_rng(0).standard_normal((given.shard_rows, 3, side, side), np.float32)
        store = Store(folder)
        for shard, rows in enumerate(self.shards()):
            write_shard(store, SOURCE, SAMPLES, shard, sample_columns(rows), "f")
        fold_manifest(store, SOURCE, SAMPLES, given.shards, "f")

    def shards(self) -> list[list[EncodedSample]]:
        """The samples of each shard."""
        rows = self.given.shard_rows
        return [self.samples[at : at + rows] for at in range(0, len(self.samples), rows)]

    def actor(self, number: int, taps: TapsConfig) -> TeacherActor:
        """A teacher worker with a cache of its own."""
        cache = CacheConfig(taps=taps, dtype="float32" if self.given.small else "bfloat16")
        job = CacheJob(
            store=StoreConfig(url=self.folder),
            samples=SOURCE,
            targets=ArtifactRef("cache", "bench", number),
            teacher=TeacherConfig(path=f"{self.folder}/teacher"),
            config=cache,
            tapped=LAYERS if taps.fraction else (),
            fingerprint="f",
            device="cpu" if self.given.small else "cuda",
            place=CachePlacement(batch=self.given.batch),
            threads=torch.get_num_threads(),
        )
        return TeacherActor(job)

    def captured(self, actor: TeacherActor) -> float:
        """All shards through one worker, as Ray calls it; tokens a second between the first commit and the last."""
        features = [{"pixel_values": image[None]} for image in self.pixels]
        rows = [features_row(i, features) for i in range(self.given.shards)]

        def commit(index: int) -> tuple[float, int]:
            actor(rows[index])
            return time.perf_counter(), sum(len(s.input_ids) for s in self.shards()[index])

        with ThreadPoolExecutor(CALLS) as pool:
            (first, _), *rest = sorted(pool.map(commit, range(self.given.shards)))
        return sum(tokens for _, tokens in rest) / (rest[-1][0] - first)

    def bare(self, teacher: Teacher, run: Callable[..., Any]) -> float:
        """All shards' forwards without keeping anything; tokens a second."""
        started = time.perf_counter()
        for shard in self.shards():
            prepared = [PreparedSample(s, {"pixel_values": p[None]}) for s, p in zip(shard, self.pixels, strict=True)]
            prepared.sort(key=lambda p: len(p.sample.input_ids))
            with torch.no_grad():
                for at in range(0, len(prepared), teacher.batch):
                    run(**teacher.inputs(prepared[at : at + teacher.batch]), use_cache=False)
        if teacher.device.type == "cuda":
            torch.cuda.synchronize()
        return sum(len(s.input_ids) for s in self.samples) / (time.perf_counter() - started)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--shard-rows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(folder, given)
        actors = {name: bench.actor(number, taps) for number, (name, taps) in enumerate(VARIANTS.items(), 1)}
        teacher = next(iter(actors.values())).teacher
        works: dict[str, Callable[[], float]] = {
            "bare, no head": partial(bench.bare, teacher, body(teacher.model)),
            "bare": partial(bench.bare, teacher, teacher.model),
            **{name: partial(bench.captured, actor) for name, actor in actors.items()},
        }
        report(works)


def report(works: dict[str, Callable[[], float]]) -> None:
    """Runs all in turns and prints tokens a second and the share of the bare forward's."""
    rates: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS + 1):  # the first warms up
        for name, work in works.items():
            rates[name].append(work())
            print(f"{name}: {rates[name][-1]:,.0f} tokens/s", file=sys.stderr, flush=True)
    print("| | tokens/s (range) | of bare | of bare without head |\n|---|---|---|---|")
    middle = {name: statistics.median(found[1:]) for name, found in rates.items()}
    for name, found in rates.items():
        shares = " | ".join(f"{middle[name] / middle[floor]:.3f}" for floor in ("bare", "bare, no head"))
        print(f"| {name} | {middle[name]:,.0f} ({min(found[1:]):,.0f}–{max(found[1:]):,.0f}) | {shares} |")


if __name__ == "__main__":
    main()
