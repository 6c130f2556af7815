"""Capture against the bare teacher forward, at TinyLLaVA-Phi-2's size: ``python -m tests.bench.capture`` on a GPU.

Random weights in bfloat16, JPEG pictures of 640 × 480 that become 729 positions, 106 to 640 text tokens a sample of
which a third to a half is answer. The bare forward runs the same batches from pixels that lie on the host, and keeps
nothing: once as the model is called (head over all positions) and once without the head, which is the floor.
``process`` is a teacher worker's own work as Ray calls it, pixels at hand: several calls at once on one device, shards
written to local disk, from the first shard's commit to the last one's. ``stage`` is all of it through Ray Data
(tests/bench/through.py): pictures decoded by CPU tasks while the teacher computes, which is loaded anew for each round.
``sampled`` keeps no taps; ``taps`` those of every fourth layer for 5 % of the samples as well.
Every shard has the same lengths, so that what a run of thousands of shards does once a length does not count. Rounds
take turns; medians. ``--small`` is for a machine without a GPU, to see that it runs.
"""

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import LlavaConfig, LlavaForConditionalGeneration, PhiConfig, SiglipVisionConfig

from cluster.session import session
from jobs.cache import CALLS, CacheJob, TeacherActor, features_row
from jobs.demo import teacher_model
from pipeline.capture import PreparedSample, Teacher
from pipeline.data.collate import image_features
from pipeline.data.encoding import EncodedSample
from pipeline.data.processors import load_processor
from pipeline.data.samples import sample_columns
from pipeline.models import body
from pipeline.shards import fold_manifest, write_shard
from pipeline.store import Store
from schemas.artifacts import ArtifactRef
from schemas.config import CacheConfig, StoreConfig, TapsConfig, TeacherConfig
from schemas.placement import CachePlacement
from schemas.tables import SAMPLES
from tests.bench.result import Result, add_json, command, print_table
from tests.bench.through import WARM, through
from tests.decoders import tinyllava

LAYERS = tuple(range(0, 32, 4))
VARIANTS = {"sampled": TapsConfig(fraction=0), "taps": TapsConfig(layers=LAYERS, fraction=0.05)}
FLOOR, BARE = "bare, no head", "bare"
ROUNDS = 3
# As many as show the bare forwards' rate, of which nothing is written.
BARE_SHARDS = 8
SOURCE = ArtifactRef("prepare", "bench", 1)
# Pixels of a picture, as most of LLaVA's training pictures have them.
PICTURE = (640, 480)
Figures = dict[str, float]


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
    """Writes a model of random weights with the demo's processor, for pictures of the model's size."""
    torch.set_default_dtype(torch.bfloat16)
    with device:
        LlavaForConditionalGeneration(made).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    processor = teacher_model.build_processor()
    side = made.vision_config.image_size
    processor.image_processor.size = {"height": side, "width": side}
    processor.save_pretrained(folder)


def draw_pictures(count: int) -> list[bytes]:
    """JPEG files of clouds with some grain, of about the size of photographs."""
    generator, found = np.random.default_rng(0), []
    for _ in range(count):
        clouds = Image.fromarray(generator.integers(0, 256, (12, 16, 3), np.uint8)).resize(PICTURE)
        grain = np.asarray(clouds, np.float32) + generator.normal(0, 8, (*PICTURE[::-1], 3))
        sink = io.BytesIO()
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(sink, "JPEG", quality=90)
        found.append(sink.getvalue())
    return found


def draw_samples(shard: int, pictures: list[bytes], made: LlavaConfig, most: int) -> list[EncodedSample]:
    """A shard's samples of at ``most`` so many random tokens around an image; every shard has the same lengths."""
    lengths, generator = np.random.default_rng(0), np.random.default_rng(shard)
    vision = made.vision_config
    image = np.full((vision.image_size // vision.patch_size) ** 2, made.image_token_index, np.int32)
    samples = []
    for i, picture in enumerate(pictures):
        text = generator.integers(10, 80, lengths.integers(most // 6, most + 1), dtype=np.int32)
        ids = np.concatenate([text[:40], image, text[40:]])
        start = len(ids) - int(len(text) * lengths.uniform(1 / 3, 1 / 2))
        spans = np.array([[start, len(ids)]], np.int32)
        samples.append(EncodedSample(f"{shard:016x}{i:016x}", str(i), ids, spans, (picture,)))
    return samples


class Bench:
    """A teacher's folder and its samples in a temporary store, and what runs over them."""

    def __init__(self, folder: str, given: argparse.Namespace, workers: int = 1) -> None:
        """Samples for so many ``workers`` of the stage."""
        self.folder, self.given, self.numbers = folder, given, count(1)
        self.made, self.device = config(small=given.small), "cpu" if given.small else "cuda"
        teacher_folder(Path(folder) / "teacher", self.made, torch.device(self.device))
        pictures, store = draw_pictures(given.shard_rows), Store(folder)
        shards = workers * (given.shards + WARM)
        for shard in range(shards):
            columns = sample_columns(draw_samples(shard, pictures, self.made, given.text))
            write_shard(store, SOURCE, SAMPLES, shard, columns, "f")
        fold_manifest(store, SOURCE, SAMPLES, shards, "f")
        processor = load_processor(f"{folder}/teacher")
        self.features = [image_features(processor, (picture,)) for picture in pictures]
        self.samples = draw_samples(0, pictures, self.made, given.text)
        self.tokens = sum(len(s.input_ids) for s in self.samples)

    def job(self, taps: TapsConfig, place: CachePlacement, threads: int) -> CacheJob:
        """A cache of its own."""
        return CacheJob(
            store=StoreConfig(url=self.folder),
            samples=SOURCE,
            targets=ArtifactRef("cache", "bench", next(self.numbers)),
            teacher=TeacherConfig(path=f"{self.folder}/teacher"),
            config=CacheConfig(taps=taps, dtype="float32" if self.given.small else "bfloat16"),
            tapped=LAYERS if taps.fraction else (),
            fingerprint="f",
            device="cpu" if self.given.small else "cuda",
            place=place,
            threads=threads,
        )

    def actor(self, taps: TapsConfig) -> TeacherActor:
        """A teacher worker in this process."""
        return TeacherActor(self.job(taps, CachePlacement(batch=self.given.batch), torch.get_num_threads()))

    def captured(self, actor: TeacherActor) -> Figures:
        """All shards through one worker, as Ray calls it; tokens a second between the first commit and the last."""
        rows = [features_row(i, self.features) for i in range(self.given.shards)]

        def commit(index: int) -> float:
            actor(rows[index])
            return time.perf_counter()

        with ThreadPoolExecutor(CALLS) as pool:
            first, *rest = sorted(pool.map(commit, range(self.given.shards)))
        return {"tokens/s": len(rest) * self.tokens / (rest[-1] - first)}

    def staged(self, taps: TapsConfig, workers: int = 1) -> Figures:
        """All shards through the stage, in the session that is running."""
        # of two cores, two teachers are to leave one for the decoders
        cpus, gpus = (0.5, 0) if self.given.small else (1, 1)
        place = CachePlacement(
            batch=self.given.batch,
            workers=workers,
            cpus_per_worker=cpus,
            gpus_per_worker=gpus,
            decoders=workers * self.given.decoders,
        )
        seen = through(self.job(taps, place, threads=1), self.given.shards, self.tokens)
        return seen.figures(self.given.shard_rows)

    def bare(self, teacher: Teacher, run: Callable[..., Any]) -> Figures:
        """As many forwards without keeping anything; tokens a second."""
        prepared = [PreparedSample(s, f) for s, f in zip(self.samples, self.features, strict=True)]
        prepared.sort(key=lambda p: len(p.sample.input_ids))
        shards = min(self.given.shards, BARE_SHARDS)
        started = time.perf_counter()
        with torch.no_grad():
            for _ in range(shards):
                for at in range(0, len(prepared), teacher.batch):
                    run(**teacher.inputs(prepared[at : at + teacher.batch]), use_cache=False)
        if teacher.device.type == "cuda":
            torch.cuda.synchronize()
        return {"tokens/s": shards * self.tokens / (time.perf_counter() - started)}


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """The options that ``Bench`` reads."""
    parser.add_argument("--small", action="store_true", help="a tiny model on the CPU, to see that it runs")
    parser.add_argument("--shards", type=int, default=16, help="that count, of each worker")
    parser.add_argument("--shard-rows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--text", type=int, default=640, help="the most tokens of text a sample, the least a sixth of it"
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--decoders", type=int, default=CachePlacement().decoders, help="CPU workers a teacher")


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_sizes(parser)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--sides", nargs="+", choices=("process", "stage"), default=("process", "stage"))
    add_json(parser)
    given = parser.parse_args(arguments)
    variants = {name: VARIANTS[name] for name in given.variants}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        bench = Bench(folder, given)
        actors = {name: bench.actor(taps) for name, taps in variants.items()}
        teacher = next(iter(actors.values())).teacher
        works: dict[str, Callable[[], Figures]] = {
            FLOOR: partial(bench.bare, teacher, body(teacher.model)),
            BARE: partial(bench.bare, teacher, teacher.model),
        }
        if "process" in given.sides:
            works |= {f"process: {name}": partial(bench.captured, actor) for name, actor in actors.items()}
        if "stage" in given.sides:
            stack.enter_context(session())
            works |= {f"stage: {name}": partial(bench.staged, taps) for name, taps in variants.items()}
        sides = in_turns(works, given.rounds)
    print_table(sides)
    Result("capture", command("capture", arguments), sides, ratios(sides), FLOOR).write(given.json)


def in_turns(works: dict[str, Callable[[], Figures]], rounds: int) -> dict[str, Figures]:
    """Medians of all figures; the first round warms up, but for the stage, whose every round does so by itself."""
    found: dict[str, list[Figures]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            if number or not name.startswith("stage"):
                found[name].append(work())
                print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)
    sides: dict[str, Figures] = {}
    for name, seen in found.items():
        seen = seen[-rounds:]
        rates = [figures["tokens/s"] for figures in seen]
        middle = {figure: statistics.median(figures[figure] for figures in seen) for figure in seen[0]}
        sides[name] = {**middle, "slowest": min(rates), "fastest": max(rates)}
    return sides


def ratios(sides: dict[str, Figures]) -> Figures:
    """Each side's rate over the bare forwards', and how busy the stage's devices were."""
    found = {
        f"{name} / {other}": figures["tokens/s"] / sides[other]["tokens/s"]
        for name, figures in sides.items()
        for other in (BARE, FLOOR)
        if name != other
    }
    busy = {f"{name}: device busy": f["device busy"] for name, f in sides.items() if "device busy" in f}
    return found | busy


if __name__ == "__main__":
    main()
