"""How near each initialisation starts to the teacher: ``python -m tests.bench.initialisation RUN.yaml [--set a.b=c]``.

Caches taps of every layer, then prints for each layer the relative error ``||mixer(u) - a|| / ||a||`` on samples that
did not set the gains, averaged over seeds where the start is random. Zero output would have the error 1.
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from jobs.sources import sources_of
from jobs.stages import layer_plan, open_store, run_named
from pipeline.data.processors import load_processor
from pipeline.initialise import initialise, match_gain
from pipeline.mixer import Mamba2Mixer
from pipeline.models import decoder, head, load_model
from pipeline.student import has_bias
from pipeline.surgery import mixer_dims
from pipeline.training.batches import CachedBatches
from pipeline.training.loop import CALIBRATION_SAMPLES
from schemas.runfile import load_run
from schemas.sections import Init
from tests.bench.result import Result, add_json, command

SETTINGS = (
    "student.layers={ratio: 1.0}",
    "cache.taps={layers: all, fraction: 1.0}",
    "cache.artifact=bench-initialisation@1",
)
SEEDS, MEASURED = 3, 64
COLUMNS: dict[str, tuple[Init, bool]] = {
    "random": ("random", False),
    "matvlm": ("matvlm", False),
    "mimic, weights alone": ("mimic", False),
    "mimic, gains from taps": ("mimic", True),
}
Pairs = list[tuple[Tensor, Tensor]]


@torch.no_grad()
def error(attention: torch.nn.Module, init: Init, seed: int, fit: Pairs, held_out: Pairs) -> float:
    """The relative error of one fresh mixer; its gains are fitted to ``fit`` where there is any."""
    mixer = Mamba2Mixer(mixer_dims(attention, bias=has_bias(init)), 0)
    initialise(mixer, attention, init, torch.Generator().manual_seed(seed))
    if fit:
        match_gain(mixer, fit)
    missed = sum(float((mixer(u[None])[0][0] - a).square().sum()) for u, a in held_out)
    return (missed / sum(float(a.square().sum()) for _, a in held_out)) ** 0.5


def main(given: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    add_json(parser)
    arguments = parser.parse_args(given)
    run = load_run(arguments.run_file, [*arguments.overrides, *SETTINGS])
    for stage in ("prepare", "cache"):
        run_named(stage, run, Console(file=io.StringIO()))
    teacher = load_model(run.teacher, torch.float32, torch.device("cpu"))
    layers = layer_plan(run).replaced
    processor = load_processor(run.teacher)
    batches = CachedBatches(
        open_store(run), run.ref("prepare"), sources_of(run), layers, processor, head(teacher).out_features
    )
    taps = batches.first_taps(CALIBRATION_SAMPLES + MEASURED)
    print(f"| layer | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    sides: dict[str, dict[str, float]] = {name: {} for name in COLUMNS}
    for layer in layers:
        pairs = [(sample[layer][0].float(), sample[layer][1].float()) for sample in taps]
        fit, held_out = pairs[:CALIBRATION_SAMPLES], pairs[CALIBRATION_SAMPLES:]
        attention = decoder(teacher).layers[layer].self_attn  # type: ignore[index, union-attr]
        for name, (init, fitted) in COLUMNS.items():
            values = [error(attention, init, seed, fit if fitted else [], held_out) for seed in range(SEEDS)]
            sides[name][f"layer {layer}"] = sum(values) / len(values)
        cells = [f"{errors[f'layer {layer}']:.3f}" for errors in sides.values()]
        print(f"| {layer} | {' | '.join(cells)} |")
    means = {name: sum(errors.values()) / len(errors) for name, errors in sides.items()}
    ratios = {f"{name} / random": mean / means["random"] for name, mean in means.items() if name != "random"}
    Result("initialisation", command("initialisation", given), sides, ratios).write(arguments.json)


if __name__ == "__main__":
    main()
