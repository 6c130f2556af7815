"""Every engine makes the same steps: of one optimizer over the whole batch, whoever holds what."""

import json
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.headers import metadata_of
from pipeline.training import zero
from pipeline.training.engine import Engine, OptimizerRecipe, Worker, make_engine, moment_key
from schemas.sections import Strategy
from tests.tolerances import BFLOAT16_ENGINES, FLOAT32_ENGINES

STEPS, SAVED = 6, 3
CPU = torch.device("cpu")
ALONE = Worker(0, 1, CPU)
RECIPE = OptimizerRecipe(betas=(0.9, 0.95), weight_decay=0.1, clip=0.4)
RATE, HIDDEN, VOCABULARY, CHUNK = 0.02, 13, 24, 5


@dataclass(frozen=True)
class Case:
    """An engine and how the parameters that do not train are held."""

    strategy: Strategy
    offload: bool = False
    bf16: bool = False

    def __str__(self) -> str:
        return self.strategy + "+offload" * self.offload + "+bf16" * self.bf16


ZERO: tuple[Strategy, ...] = ("zero1", "zero2", "zero3")
ENGINES = [Case("ddp"), *(Case(s, offload) for s in ZERO for offload in (False, True))]
HALVES = [Case("ddp", bf16=True), *(Case(s, bf16=True) for s in ZERO)]
# Each takes over from itself, from the engine before it in the list, and some from one worker alone.
HANDOVERS = [(case, before) for case, before in zip(ENGINES, [ENGINES[-1], *ENGINES[:-1]], strict=True)]


class HeadLoss(torch.autograd.Function):
    """A cross-entropy that calls the head on chunks and differentiates each at once, as losses over vocabularies do."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: nn.Module, gold: Tensor) -> Tensor:
        total, gradients = hidden.new_zeros((), dtype=torch.float32), []
        for part, target in zip(hidden.split(CHUNK), gold.split(CHUNK), strict=True):
            with torch.enable_grad():
                chunk = part.detach().requires_grad_()
                loss = nn.functional.cross_entropy(head(chunk).float(), target, reduction="sum")
                gradients += torch.autograd.grad(loss, chunk)
            total += loss.detach()
        ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] * ctx.saved_tensors[0], None, None


class Mixer(nn.Module):
    """Trains; reads a child's weight without calling the child, and has a parameter that no step reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(HIDDEN, HIDDEN), nn.RMSNorm(HIDDEN)
        self.outer = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.idle = nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x)) * self.norm.weight)


class Layer(nn.Module):
    """A mixer beside a frozen feed-forward part."""

    def __init__(self, kind: torch.dtype) -> None:
        super().__init__()
        self.mixer, self.mlp = Mixer(), nn.Linear(HIDDEN, HIDDEN, dtype=kind).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(x).to(x.dtype)
        return x + self.mlp(x)


class Objective(nn.Module):
    """Frozen body and head around trained mixers, and a connector and a term that only batches with images reach."""

    def __init__(self, bf16: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        kind = torch.bfloat16 if bf16 else torch.float32
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN, dtype=kind).requires_grad_(False)
        self.layers = nn.ModuleList(Layer(kind) for _ in range(2))
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False, dtype=kind).requires_grad_(False)
        self.connector = nn.Linear(3, HIDDEN)
        self.eval()
        self.bf16 = bf16

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            return self.losses(batch)

    def losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = self.embedding(batch["tokens"])
        if "images" in batch:
            hidden = hidden + self.connector(batch["images"])[:, None].to(hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden)
        kl = HeadLoss.apply(hidden.flatten(0, 1), self.head, batch["gold"].flatten()) / batch["count"]
        if "images" not in batch:
            return kl, {"kl": kl}
        # a second call, as of a layer loss
        size = self.layers[0].mixer(hidden.detach()).square().sum() / batch["count"]
        return kl + 0.1 * size, {"kl": kl, "size": size}


def trained_of(objective: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in objective.named_parameters() if p.requires_grad}


def engine_of(case: Case, objective: Objective, worker: Worker) -> Engine:
    return make_engine(case.strategy, case.offload, objective, trained_of(objective), RECIPE, worker, objective.layers)


def micro_batches(step: int) -> list[dict[str, Tensor]]:
    """Four of a step, two of every other; the first and third have images, but for one step."""
    generator = torch.Generator().manual_seed(step)
    found: list[dict[str, Tensor]] = []
    for index in range(4):
        tokens = torch.randint(VOCABULARY, (2, 4 + index), generator=generator)
        found.append({"tokens": tokens, "gold": tokens.roll(1, 1), "count": torch.tensor(44.0)})
        images = torch.randn(2, 3, generator=generator)
        if index % 2 == 0 and step != 2:
            found[-1]["images"] = images
    return found[::3] if step % 2 else found


def share(case: Case, batches: list[Any], worker: Worker) -> list[Any]:
    """What a worker takes: images go to the first of two alone, and other numbers where the engine can."""
    if worker.world == 1:
        return batches
    if case.strategy == "zero3":
        return batches[worker.rank :: 2]
    return batches[:-1] if worker.rank == 0 else batches[-1:]


def steps(engine: Engine, case: Case, worker: Worker, start: int, stop: int) -> list[list[float]]:
    """Loss, KL and norm of each step, over all workers."""
    curve = []
    for step in range(start, stop):
        batches = share(case, micro_batches(step), worker)
        sums = torch.zeros(2)
        for index, batch in enumerate(batches):
            metrics = engine.accumulate(batch, last=index == len(batches) - 1)
            assert not any(value.requires_grad for value in metrics.values())
            sums += torch.stack([metrics["loss"], metrics["kl"]]).float()
        if worker.world > 1:
            dist.all_reduce(sums)
        curve.append([*sums.tolist(), engine.step(RATE / (step + 1))])
    return curve


def keep(path: Path, engine: Engine, curve: list[list[float]], worker: Worker) -> None:
    tensors = engine.tensors()
    assert bool(tensors) == (worker.rank == 0)
    if worker.rank == 0:
        save_file(tensors, path, {"curve": json.dumps(curve)})
    if worker.world > 1:
        dist.barrier()


def read(path: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors and curve [steps, 3]."""
    return load_file(path), torch.tensor(json.loads(metadata_of(path.read_bytes())["curve"]))


def train(case: Case, worker: Worker, folder: Path) -> None:
    """Trains to the end and leaves curve and tensors; a checkpoint and what followed a step of NaN on the way."""
    objective = Objective(case.bf16)
    engine = engine_of(case, objective, worker)
    curve = steps(engine, case, worker, 0, SAVED)
    keep(folder / f"{worker.world}-{case}.saved", engine, curve, worker)
    if not case.bf16:
        batch = {**micro_batches(0)[0], "images": torch.full((2, 3), math.nan)}
        norm = [engine.accumulate(batch, last=True)["loss"].tolist(), 0.0, engine.step(RATE)]
        keep(folder / f"{worker.world}-{case}.nan", engine, [norm], worker)
    curve += steps(engine, case, worker, SAVED, STEPS)
    keep(folder / f"{worker.world}-{case}", engine, curve, worker)
    engine.close()


def resume(case: Case, worker: Worker, folder: Path, since: str) -> None:
    """Goes on from another run's checkpoint, with an engine that has made a step before."""
    engine = engine_of(case, Objective(case.bf16), worker)
    steps(engine, case, worker, 0, 1)
    engine.restore(load_file(folder / f"{since}.saved"))
    curve = steps(engine, case, worker, SAVED, STEPS)
    keep(folder / f"{worker.world}-{case} after {since}", engine, curve, worker)
    engine.close()


def phases(case: Case, worker: Worker, folder: Path) -> None:
    """An engine, the objective by itself, and a second engine on the same objective."""
    objective = Objective(case.bf16)
    first = engine_of(case, objective, worker)
    steps(first, case, worker, 0, 2)
    first.close()
    assert nn.functional.linear.__module__ == "torch._C._nn"
    assert all(p.grad is None for p in objective.parameters())
    between = float(objective(micro_batches(0)[0])[0].detach())
    second = engine_of(case, objective, worker)
    curve = steps(second, case, worker, 0, 2)
    keep(folder / f"{worker.world}-{case}.phases", second, [[between] * 3, *curve], worker)
    second.close()


def prepare_process(rank: int, world: int, folder: Path) -> Worker:
    """Sockets on the loopback, memory poisoned, and warnings as errors; nothing too small to be sharded."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)  # in a module of torch that DeepSpeed imports
    zero.WHOLE, zero.BUCKET = 0, 400
    if rank == 0 and world == 2:
        train(Case("ddp"), ALONE, folder)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group-{world}", rank=rank, world_size=world)
    return Worker(rank, world, CPU)


def two_workers(rank: int, folder: Path) -> None:
    worker = prepare_process(rank, 2, folder)
    for case in ENGINES + HALVES:
        train(case, worker, folder)
    for case, before in HANDOVERS:
        for since in (f"2-{case}", f"2-{before}", *([] if case.offload else ["1-ddp"])):
            resume(case, worker, folder, since)
    for case in (Case("ddp"), Case("zero1"), Case("zero3")):
        phases(case, worker, folder)
    dist.destroy_process_group()
    if rank == 0:
        for case in ENGINES:
            resume(Case("ddp"), ALONE, folder, f"2-{case}")


def one_worker(rank: int, folder: Path) -> None:
    worker = prepare_process(rank, 1, folder)
    for case in ENGINES[1:]:
        train(case, worker, folder)
        resume(case, worker, folder, f"2-{case}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two workers left, and one of them alone."""
    folder = tmp_path_factory.mktemp("engines")
    mp.spawn(two_workers, (folder,), nprocs=2)
    return folder


def assert_same_run(folder: Path, name: str, expected: str) -> None:
    tensors, curve = read(folder / name)
    others, wanted = read(folder / expected)
    assert set(tensors) == set(others)
    torch.testing.assert_close(curve, wanted[-len(curve) :], rtol=FLOAT32_ENGINES, atol=0)
    for key, value in tensors.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(
            value, others[key], rtol=FLOAT32_ENGINES, atol=FLOAT32_ENGINES, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_ddp_alone_makes_the_steps_of_one_optimizer_over_the_whole_batch() -> None:
    objective, plain = Objective(bf16=False), Objective(bf16=False)
    engine = engine_of(Case("ddp"), objective, ALONE)
    weights = [p for p in trained_of(plain).values() if p.dim() > 1]
    vectors = [p for p in trained_of(plain).values() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": RECIPE.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=RECIPE.betas,
    )
    curve = steps(engine, Case("ddp"), ALONE, 0, STEPS)
    assert min(norm for *_, norm in curve) < RECIPE.clip < max(norm for *_, norm in curve)
    for step, (loss, _, norm) in enumerate(curve):
        optimizer.zero_grad(set_to_none=False)
        total = torch.stack([plain(batch)[0] for batch in micro_batches(step)]).sum()
        total.backward()
        for parameter in weights + vectors:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(weights + vectors, RECIPE.clip)), FLOAT32_ENGINES)
        assert loss == pytest.approx(float(total.detach()), FLOAT32_ENGINES)
        for group in optimizer.param_groups:
            group["lr"] = RATE / (step + 1)
        optimizer.step()
    for name, parameter in trained_of(plain).items():
        torch.testing.assert_close(trained_of(objective)[name], parameter, rtol=FLOAT32_ENGINES, atol=FLOAT32_ENGINES)


def test_only_weights_of_two_dimensions_decay() -> None:
    objective = Objective(bf16=False)
    engine = engine_of(Case("ddp"), objective, ALONE)
    before = {name: p.detach().clone() for name, p in trained_of(objective).items()}
    engine.accumulate(micro_batches(0)[0], last=True)
    engine.step(RATE)
    idle = "layers.0.mixer.idle."  # the gradient is 0, so that decay alone moves it
    after = trained_of(objective)
    assert torch.equal(after[idle + "bias"], before[idle + "bias"])
    torch.testing.assert_close(after[idle + "weight"], before[idle + "weight"] * (1 - RATE * RECIPE.weight_decay))
    assert not torch.equal(after[idle + "weight"], before[idle + "weight"])


@pytest.mark.parametrize("case", ENGINES, ids=str)
def test_every_engine_on_two_workers_trains_as_one_worker_alone(folder: Path, case: Case) -> None:
    assert_same_run(folder, f"2-{case}", "1-ddp")


@pytest.mark.parametrize("case", HALVES[1:], ids=str)
def test_every_engine_trains_beside_a_bfloat16_body_as_ddp(folder: Path, case: Case) -> None:
    # not their parameters: Adam makes a whole step of a gradient of which rounding alone decides the sign
    curve, wanted = (read(folder / name)[1] for name in (f"2-{case}", "2-ddp+bf16"))
    torch.testing.assert_close(curve, wanted, rtol=BFLOAT16_ENGINES, atol=0)


@pytest.mark.parametrize("case", ENGINES, ids=str)
def test_same_engine_resumes_to_identical_bits(folder: Path, case: Case) -> None:
    (tensors, curve), (whole, wanted) = (read(folder / f"2-{n}") for n in (f"{case} after 2-{case}", str(case)))
    assert torch.equal(curve, wanted[SAVED:])
    assert all(torch.equal(value, whole[key]) for key, value in tensors.items())
    assert {float(v) for k, v in tensors.items() if k.endswith(".step")} == {float(STEPS)}


@pytest.mark.parametrize(("case", "before"), HANDOVERS, ids=str)
def test_engine_resumes_from_another_and_from_another_number_of_workers(folder: Path, case: Case, before: Case) -> None:
    alone = [] if case.offload else [f"2-{case} after 1-ddp"]
    for name in (f"2-{case} after 2-{before}", f"1-ddp after 2-{case}", *alone):
        assert_same_run(folder, name, "1-ddp")


@pytest.mark.parametrize("case", ENGINES, ids=str)
def test_gradients_that_are_not_finite_change_nothing(folder: Path, case: Case) -> None:
    (before, _), (after, curve) = (read(folder / f"2-{case}.{kind}") for kind in ("saved", "nan"))
    assert not math.isfinite(curve[0, 0])
    assert not math.isfinite(curve[0, 2])
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_closed_engine_leaves_the_objective_to_itself_and_to_the_next(folder: Path, strategy: str) -> None:
    assert_same_run(folder, f"2-{strategy}.phases", "2-ddp.phases")
    assert moment_key("connector.weight", "step") in read(folder / "2-ddp.phases")[0]


@pytest.mark.slow
def test_zero_alone_trains_and_resumes_as_ddp_alone(folder: Path) -> None:
    mp.spawn(one_worker, (folder,), nprocs=1)
    for case in ENGINES[1:]:
        assert_same_run(folder, f"1-{case}", "1-ddp")
        assert_same_run(folder, f"1-{case} after 2-{case}", "1-ddp")
