"""What the ``evaluate`` section asks for beyond questions and answers."""

from pydantic import Field

from schemas.artifacts import ArtifactRef
from schemas.sections import ARTIFACT, Section

# As in Guo et al. 2017, whose figures others compare with.
BINS = 15


class DistributionConfig(Section):
    """How far the student's distribution is from the teacher's cached one, on samples that no training saw.

    These are the run's own that ``distill.validation.fraction`` holds out, or those of a finished ``cache``
    (``name@version``) that the same teacher made of other samples. At most ``samples`` of them, chosen by
    ``sample_id``. ``bins`` divide the confidences of the calibration error.
    """

    cache: str | None = Field(None, pattern=ARTIFACT)
    samples: int | None = Field(None, ge=1)
    bins: int = Field(BINS, ge=1)

    def other(self) -> ArtifactRef | None:
        """The cache of other samples; None where the run's own is measured on."""
        return ArtifactRef.named("cache", self.cache) if self.cache else None
