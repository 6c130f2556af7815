"""A frozen vision tower's forward as CUDA graphs, one for each of the first shapes that come back.

A compiled layer takes the host longer to start than the device to run, which a replayed graph does not. No gradient
flows through a tower that is frozen, so that nothing of it is left for a backward pass.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

# Shapes with a graph. A training's batches have one or two; Llava-Next's, by their numbers of tiles, any.
GRAPHS = 4
# Runs on the capture's own stream, in which compiled layers find their programs and libraries their workspaces.
WARM_UPS = 2
# Records a work without arguments on a device; what replays it, and its output, which each replay writes anew.
Record = Callable[[Callable[[], Any], torch.device], tuple[Callable[[], None], Any]]


class Recorder:
    """Records works as CUDA graphs in one memory: none is read by another, if outputs are copied after each replay."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, work: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        """See `Record`."""
        stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                work()
            # threads that read batches, and NCCL's, call CUDA meanwhile: only this one must do what can be captured
            with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
                output = work()
        torch.cuda.current_stream(device).wait_stream(stream)
        self.pool = graph.pool()
        return graph.replay, output


@dataclass(frozen=True)
class Recorded:
    """A recorded forward: the input that it reads, what runs it, and the output that it writes."""

    pixel_values: Tensor
    replay: Callable[[], None]
    output: Any

    def __call__(self, pixel_values: Tensor) -> Any:
        """A copy of the output for these pixels.

        A copy, since the connector keeps its input for the backward pass, and autograd would not see a later replay
        change it; and an object of its own, since transformers puts the connector's output into the tower's.
        """
        self.pixel_values.copy_(pixel_values)
        self.replay()
        return tree_map_only(Tensor, Tensor.clone, self.output)


class Graphed:
    """Stands for the forward of a tower, whose weights stay where they are once its input is on the device.

    A call whose shape, type and settings were seen before is recorded and from then on replayed; all others, and all
    while something in the tower or its input requires gradients, run as they are.
    """

    def __init__(self, tower: nn.Module, device: str = "cuda", record: Record | None = None) -> None:
        """``device`` is the type of device on which calls are recorded, by ``record``."""
        self.forward, self.weights = tower.forward, tuple(tower.parameters())
        self.device, self.record = device, record or Recorder()
        self.seen: set[Any] = set()
        self.recorded: dict[Any, Recorded] = {}

    def __call__(self, pixel_values: Tensor, **settings: Any) -> Any:
        """What the tower's forward gives: of images [images, channels, height, width] and settings of no tensors."""
        trains = pixel_values.requires_grad or any(weight.requires_grad for weight in self.weights)
        if trains or pixel_values.device.type != self.device:
            return self.forward(pixel_values, **settings)
        key = (pixel_values.shape, pixel_values.dtype, repr(sorted(settings.items())))
        with torch.no_grad():
            if key in self.seen and key not in self.recorded and len(self.recorded) < GRAPHS:
                self.recorded[key] = self._recorded(pixel_values, settings)
            self.seen.add(key)
            if key in self.recorded:
                return self.recorded[key](pixel_values)
            return self.forward(pixel_values, **settings)

    def _recorded(self, pixel_values: Tensor, settings: dict[str, Any]) -> Recorded:
        own = pixel_values.clone()
        return Recorded(own, *self.record(lambda: self.forward(own, **settings), own.device))
