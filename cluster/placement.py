"""Checks a placement against the cluster before any work, so that nothing waits for resources that will never come."""

from schemas.errors import ConfigInvalid
from schemas.placement import WorkerPlacement

# How Ray names the resource of a kind of accelerator.
ACCELERATOR = "accelerator_type:"


def check_fits(stage: str, placement: WorkerPlacement, *, spare_cpus: float = 0.0) -> None:
    """Raises ConfigInvalid where the running cluster can never hold the stage's workers.

    ``spare_cpus`` is what the stage needs beside its workers.
    """
    import ray

    have = ray.cluster_resources()
    wanted = {
        "CPU": placement.workers * placement.cpus_per_worker + spare_cpus,
        "GPU": placement.workers * placement.gpus_per_worker,
    }
    _check_accelerator(stage, placement.accelerator_type, have)
    for name, amount in wanted.items():
        if amount > have.get(name, 0.0) + 1e-9:
            raise ConfigInvalid(
                f"placement.{stage}: {placement.workers} workers need {amount:g} {name}, "
                f"this cluster has {have.get(name, 0.0):g}; ask for fewer workers or less per worker"
            )


def _check_accelerator(stage: str, wanted: str | None, have: dict[str, float]) -> None:
    found = sorted(name.removeprefix(ACCELERATOR) for name in have if name.startswith(ACCELERATOR))
    if wanted is not None and wanted not in found:
        there = ", ".join(found) or "none at all"
        raise ConfigInvalid(f"placement.{stage}.accelerator_type: this cluster has no {wanted}; it has {there}")
