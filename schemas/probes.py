"""Probes of what hybrids are weak at: which ones an evaluation asks, how long, how many, and from which seed."""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from schemas.sections import Section

ProbeKind = Literal["mqar", "needle", "phone_book", "copying", "reading"]


class ProbeConfig(Section):
    """One probe, made from its seed alone: ``questions`` of each of the ``lengths``.

    A length is the prompt's, in the teacher's own tokens (within 5 %); for ``reading``, where the picture's positions
    are the vision tower's choice, it is the number of words on the picture.
    """

    kind: ProbeKind
    lengths: tuple[PositiveInt, ...] = Field(min_length=1)
    questions: int = Field(100, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _differ(self) -> "ProbeConfig":
        if twice := sorted({n for n in self.lengths if self.lengths.count(n) > 1}):
            raise ValueError(f"lengths names {', '.join(map(str, twice))} more than once; give each length once")
        return self
