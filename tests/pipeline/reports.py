"""Made-up figures in the layouts that the report reads: a run with everything, a bench and a sweep."""

import itertools
import math
import random
from typing import Any

WHO = {"teacher": 0.96, "student": 0.93, "student_untrained": 0.16}
STAGES = ("prepare", "cache", "distill", "evaluate", "export")


def estimate(value: float, n: int, scale: float = 1.0) -> dict[str, Any]:
    half = scale * math.sqrt(max(value / scale * (1 - value / scale), 1e-4) / n)
    return {"value": value, "n": n, "ci95": [max(0.0, value - half), min(scale, value + half)], "scale": scale}


def tasks(level: float, chance: random.Random) -> dict[str, Any]:
    def near(top: float = 1.0, n: int = 400) -> dict[str, Any]:
        return estimate(top * min(1.0, level * chance.uniform(0.7, 1.0)), n, top)

    subtasks = (
        "existence",
        "count",
        "position",
        "colour",
        "posters",
        "celebrity",
        "scene",
        "landmark",
        "artwork",
        "OCR",
    )
    lengths = (256, 512, 1024, 4096)
    return {
        "mme": {"perception": near(2000), "cognition": near(800), **{name: near(200, 60) for name in subtasks}},
        "pope": {"f1": near(), **{f"{s} f1": near() for s in ("adversarial", "popular", "random")}},
        "gqa": {"exact match": near(n=12578)},
        "textvqa": {"accuracy": near(n=5000)},
        "scienceqa-img": {"accuracy": near(), "overall": near()},
        "mm-vet": {},
        "mqar": {"accuracy": near(), **{f"accuracy {n}": near() for n in lengths}},
        "needle": {
            "accuracy": near(),
            **{f"accuracy {n}, depth {d} %": near() for n, d in itertools.product(lengths, (0, 25, 50, 75, 100))},
        },
    }


def curve(layers: int, steps: tuple[int, int] = (400, 60)) -> list[dict[str, Any]]:
    chance, entries = random.Random(1), []
    for phase, (kind, total) in enumerate(zip(("align", "distill"), steps, strict=True)):
        for step in range(1, total + 1, 10 if phase == 0 else 5):
            fall = math.exp(-3 * step / total)
            entry = {f"layer_{i}": 0.04 + fall * (0.5 + 0.03 * i) * chance.uniform(0.9, 1.1) for i in range(layers)}
            if kind == "distill":
                entry |= {"kl": 0.02 + 0.4 * fall, "held_out_kl": 0.03 + 0.4 * fall, "held_out_top1": 0.97 - 0.3 * fall}
            speed = {
                "tokens_per_second": 4803.8,
                "padding_share": 0.0389,
                "waiting_share": 0.0053,
                "memory_bytes": 9 * 10**8,
            }
            entries.append({"loss": fall, **entry, **speed, "phase": phase, "kind": kind, "step": step, "steps": total})
    return entries


def stage(name: str) -> dict[str, Any]:
    lost = {"lost": [{"at": 1795403900.0, "reason": "a worker was lost (OutOfMemoryError: killed)"}]}
    command = {"started": 1795403854.3, "seconds": 260.5, "hosts": ["node-1", "node-2"], "workers": 2}
    commands = [{**command, "outcome": "killed"}, {**command, "outcome": "done", **(lost if name == "distill" else {})}]
    return {
        "artifact": f"{name}/full@1",
        "fingerprint": f"{STAGES.index(name)}a1b2c3d4e5f60718293a4b5c6d7e8f9",
        "python": "3.11.7",
        "machine": "x86_64",
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "ray": "2.60.0"},
        "started": 1795403854.261,
        "seconds": 37.25 + 100 * STAGES.index(name),
        "history": {"commands": commands, "shards_begun_again": {"shard-000003.parquet": 2} if name == "cache" else {}},
    }


def planned() -> dict[str, Any]:
    def signal(group: str, name: str, size: float, own: bool, answer: str) -> dict[str, Any]:
        rates = {"pass_seconds": 14.2, "dollars_per_month": size / 1e9 * 0.023, "break_even_passes": 0.41}
        return {"group": group, "name": name, "bytes": size, "bytes_per_sample": size / 3072, "own": own, **rates} | {
            "answer": answer
        }

    return {
        "accelerator": {"name": "h100"},
        "cache": {"bytes": 182_400_000.0, "shards": 24},
        "data": {"samples": 3072, "seen": 3072},
        "measured": None,
        "signals": [
            signal("targets at response positions", "sampled, 50 draws", 141_000.0, True, "cache"),
            signal("targets at response positions", "full logits bfloat16", 1_211_000.0, False, "cache"),
            signal("inputs and outputs, bfloat16", "2 layers, 50 % of samples", 182_259_000.0, True, "bounded slice"),
        ],
    }


def distribution(layers: int) -> dict[str, Any]:
    bins = [
        {"confidence": (i + 0.5) / 15, "accuracy": min(1.0, (i + 0.2) / 15), "share": 2.0**-i / 2} for i in range(15)
    ]
    return {
        "samples": 310,
        "tokens": 755,
        "estimate": "unbiased",
        "kl": {"value": 0.0371, "ci95": [0.0312, 0.0433]},
        "top1_agreement": {"value": 0.9583, "ci95": [0.9411, 0.9702]},
        "ece": 0.01873,
        "teacher_ece": None,
        "notes": {"teacher_ece": "draws do not tell the teacher's most probable token"},
        "bins": [*bins, {"confidence": None, "accuracy": None, "share": 0.0}],
        "layers": {str(i): 0.031 + 0.007 * i for i in range(layers)},
    }


def full_run(layers: int = 4) -> dict[str, Any]:
    chance = random.Random(0)
    groups = ("overall", "colour", "counting", "largest", "neighbour", "reading", "sum")
    found: dict[str, Any] = {
        who: {
            "exact_match": {g: estimate(level * chance.uniform(0.9, 1.0), 100) for g in groups},
            "tasks": tasks(level, chance),
        }
        for who, level in WHO.items()
    }
    found["student"]["held_out_kl"], found["student_untrained"]["held_out_kl"] = 0.0372, 3.586
    return {
        "run": {
            "name": "full",
            "teacher": "jobs/demo/teacher",
            "replaced_layers": list(range(layers)),
            "decoder_layers": 2 * layers,
            "init": "mimic",
        },
        **found,
        "recovery": 0.9713,
        "recoveries": {
            task: {figure: {"value": 0.5 + 0.01 * i, "ci95": [0.49, 0.99]} for i, figure in enumerate(figures)}
            for task, figures in found["student"]["tasks"].items()
        },
        "distribution": distribution(layers),
        "cache": {
            "samples": 3072,
            "shards": 24,
            "response_tokens": 7479,
            "bytes": 181_901_593,
            "target_bytes": 132_375,
            "tap_bytes": 181_703_816,
            "bytes_per_response_token": 17.7,
            "full_logits_bytes_per_response_token": 162,
            "vocabulary": 81,
        },
        "stages": {name: stage(name) for name in STAGES},
        "unfinished": [],
        "curve": curve(layers),
        "versions": stage("distill")["versions"],
        "planned": planned(),
        "bench": bench(),
    }


def bench() -> dict[str, Any]:
    """Points of a 5.6 GB model that reads 327,680 B a token of context, and a student that reads half of it."""
    points, bandwidth = [], 4.3e12
    for engine, batch, context, who in itertools.product(
        ("decant", "generate"), (1, 8), (1024, 4096, 16384, 65536), ("teacher", "student")
    ):
        read = 5.6e9 + batch * context * 327_680 * (0.5 if who == "student" else 1.0)
        lost = read > 100e9
        rate = batch * bandwidth / read * (0.7 if engine == "decant" else 0.2)
        measured = {"seconds_to_first_token": context / 2e5, "tokens_per_second": rate, "peak_bytes": 1.1 * read}
        points.append(
            {"model": who, "engine": engine, "batch": batch, "context": context, "new_tokens": 128}
            | (dict.fromkeys(measured) if lost else measured)
            | {"roofline_tokens_per_second": batch * bandwidth / read, "roofline_share": None if lost else 0.7}
            | {"formula_bytes": read, "error": "out of memory" if lost else None}
        )
    models = {
        who: {"weights_bytes": 5.6e9, "kv_bytes_per_token": 327_680.0, "attention": "sdpa", "replaced": [0, 4]}
        for who in ("teacher", "student")
    }
    return {
        "device": {"name": "H200", "memory_bytes": 150e9, "versions": {"torch": "2.13.0"}},
        "bandwidth_bytes_per_second": bandwidth,
        "models": models,
        "points": points,
    }


def sweep(axes: dict[str, list[str]] | None = None, seeds: int = 3) -> dict[str, Any]:
    """A sweep of which every seventh trial failed and the last is still to run."""
    axes = axes or {"losses": ["KL + layer", "KL", "layer", "CE"], "ratio": ["12.5 %", "25 %", "50 %"]}
    chance, trials, arms = random.Random(2), [], []
    figures = {"exact_match": {"better": "higher", "unit": "share"}, "held_out_kl": {"better": "lower", "unit": "nats"}}
    combinations = [dict(zip(axes, names, strict=True)) for names in itertools.product(*axes.values())]
    for number, settings in enumerate(combinations):
        level = 0.95 - 0.4 * number / len(combinations)
        done = []
        for seed in range(seeds):
            got = {
                "exact_match": level + chance.gauss(0, 0.01),
                "held_out_kl": 0.5 * (1 - level) + chance.uniform(0, 0.01),
            }
            state = "failed" if len(trials) % 7 == 6 else "done"
            done += [got] if state == "done" else []
            name = "-".join(settings.values())
            trial = {"settings": settings, "seed": seed, "run": f"losses-{name}-s{seed}@1", "state": state}
            error = (
                "TrainingDiverged: step 31: the loss is no number; lower distill.phases.0.lr"
                if state == "failed"
                else None
            )
            trials.append({**trial, "seconds": 83.0, "figures": got if state == "done" else {}, "error": error})
        arms.append(
            {
                "settings": settings,
                "n": len(done),
                "figures": {f: spread([d[f] for d in done]) for f in figures if done},
            }
        )
    return {"name": "losses", "axes": axes, "figures": figures, "trials": trials, "arms": arms}


def spread(values: list[float]) -> dict[str, Any]:
    mean = sum(values) / len(values)
    if len(values) < 2:
        return {"mean": mean, "sd": None, "ci95": None}
    sd = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return {"mean": mean, "sd": sd, "ci95": [mean - 2 * sd, mean + 2 * sd]}
