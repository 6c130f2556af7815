"""How fast a shard becomes tensors on one core: ``python -m tests.bench.reading``; the floor is a copy of the bytes.

A shard of 64 samples of 256 tokens: 50 draws at every position, and taps of two layers 2,560 wide, in both types.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.activations import decode_activation, encode_activation, pack
from pipeline.shards import fold_manifest, read_shard, rows_of, write_shard
from pipeline.store import Store
from pipeline.targets import decode, encode_draws
from schemas.artifacts import ArtifactRef
from schemas.config import CacheConfig, TapsConfig
from schemas.sections import ActivationType
from schemas.tables import STATISTICS, targets_table
from tests.bench.result import Result, add_json, command, print_table

SAMPLES, TOKENS, WIDTH, VOCABULARY, LAYERS = 64, 256, 2560, 51200, (0, 4)
COPIED, REPEATS = 2**28, 5


def columns(cache: CacheConfig, samples: int) -> dict[str, list[object]]:
    """Random rows of the table; ids fall off as a power law, which gives about twelve distinct ones of fifty."""
    generator = np.random.default_rng(0)
    rows = []
    for sample in range(samples):
        ids = np.minimum(generator.zipf(1.6, (TOKENS, 50)), VOCABULARY) - 1
        row: dict[str, Any] = {"sample_id": str(sample), "positions": TOKENS, **encode_draws(ids, VOCABULARY)}
        row |= {name: generator.random(TOKENS).astype(t).tobytes() for name, t in STATISTICS.items()}
        for layer in LAYERS:
            for part in ("input", "output"):
                value = torch.from_numpy(generator.standard_normal((TOKENS, WIDTH), np.float32))
                row |= encode_activation(f"tap_{layer}_{part}", pack(value, cache.taps.dtype))
        rows.append(row)
    return {name: [row[name] for row in rows] for name in rows[0]}


def seconds(work: Callable[[], object]) -> float:
    """The median time of the repeats."""
    times = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return sorted(times[1:])[REPEATS // 2]


def measure(dtype: ActivationType, samples: int) -> dict[str, dict[str, float]]:
    """Payload and speed of the draws, the taps, and the whole of one shard."""
    cache = CacheConfig(taps=TapsConfig(dtype=dtype))
    table, ref = targets_table(cache, LAYERS), ArtifactRef("cache", "bench", 1)
    taps = [c.name for c in table.columns if c.name.startswith("tap_")]
    found, draws = {}, ["positions", "ids", "ids_dtype", "counts", "n_unique", "entropy"]
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        write_shard(store, ref, table, 0, columns(cache, samples), "f" * 32)
        (info,) = fold_manifest(store, ref, table, 1, "f" * 32).shards

        def read(names: list[str]) -> None:
            rows = rows_of(read_shard(store, ref, table, info, names))
            if "ids" in names:
                decode(cache.targets, rows)
            for name in (t for t in names if t in taps and not t.endswith("_scale")):
                for row in rows:
                    decode_activation(name, row, TOKENS, dtype)

        for name, chosen in {"draws": draws, "taps": taps, "both": draws + taps}.items():
            size = read_shard(store, ref, table, info, chosen).nbytes
            rate = size / seconds(partial(read, chosen)) / 1e9
            found[f"{name}, taps in {dtype}"] = {"MB": size / 1e6, "GB/s": rate}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints GB a second of each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of the shard")
    parser.add_argument(
        "--copied", type=int, default=COPIED, help="bytes of the block for the floor, beyond all caches"
    )
    add_json(parser)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    block = np.ones(given.copied, np.uint8)
    floor = block.nbytes / seconds(block.copy) / 1e9
    sides = {"a copy": {"MB": block.nbytes / 1e6, "GB/s": floor}}
    sides |= measure("bfloat16", given.samples) | measure("fp8_e4m3", given.samples)
    ratios = {f"{name} / a copy": figures["GB/s"] / floor for name, figures in sides.items() if name != "a copy"}
    print_table({n: {**f, "of a copy": f["GB/s"] / floor} for n, f in sides.items()})
    Result("reading", command("reading", arguments), sides, ratios, "a copy").write(given.json)


if __name__ == "__main__":
    main()
