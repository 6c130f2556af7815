"""A decoding step's operations on Triton kernels; imported only by whoever chose them, on a CUDA machine.

Each kernel's constants stand in its module, to be tuned on a device: none is tuned at run time, which a captured graph
could not hold. Shapes and the parts of a call are compiled in, positions and beginnings of rows are read on the device.
The first operation of a captured graph should follow a kernel; where it follows a copy there is no early start.
"""

from functools import partial

import torch

from pipeline.ops import step_argmax, step_attention, step_mixer, step_project
from pipeline.ops.stepping import StepOps

# The first capability with programmatic dependent launch.
HOPPER = (9, 0)


def kernels(pdl: bool | None = None) -> StepOps:
    """The kernels; with programmatic dependent launch where the device has it, unless told."""
    if pdl is None:
        pdl = torch.cuda.is_available() and torch.cuda.get_device_capability() >= HOPPER
    return StepOps(
        attend=partial(step_attention.attend, pdl=pdl),
        mix=partial(step_mixer.mix, pdl=pdl),
        project=partial(step_project.project, pdl=pdl),
        advance=partial(step_project.advance, pdl=pdl),
        argmax=partial(step_argmax.argmax, pdl=pdl),
    )
