"""What Ray calls the job that this process is the driver of."""

import json
import os

# Set by Ray's job server for the drivers that it starts; holds secrets as well, of which nothing is taken.
VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def submission_id() -> str | None:
    """The id under which this process was submitted to a cluster, None where it was not."""
    metadata = json.loads(os.environ.get(VARIABLE, "{}")).get("metadata", {})
    found: str | None = metadata.get("job_submission_id")
    return found
