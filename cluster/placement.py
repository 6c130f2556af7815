"""Checks a placement against the cluster before any work, so that nothing waits for resources that will never come."""

from schemas.config import WorkerPlacement
from schemas.errors import ConfigInvalid


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
    for name, amount in wanted.items():
        if amount > have.get(name, 0.0) + 1e-9:
            raise ConfigInvalid(
                f"placement.{stage}: {placement.workers} workers need {amount:g} {name}, "
                f"this cluster has {have.get(name, 0.0):g}; ask for fewer workers or less per worker"
            )
