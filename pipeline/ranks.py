"""The other processes of a teacher whose every matrix is cut over several devices, a process for each.

This process is rank 0. The others do what it does, in the same order, because every forward has collective operations;
they keep nothing. They end with this process, however it ends, because each reads a pipe that closes with it, and what
this process waits for ends with them.
"""

import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from socket import create_server
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from schemas.errors import DecantError, TeacherLost

LOOPBACK = "127.0.0.1"
# One rank's first collective operation waits for the slowest to load its part of hundreds of gigabytes. Ranks that end
# are noticed in another way.
PATIENCE = timedelta(hours=1)
# The end of one rank ends the others' collective operations; so long until all have said what became of them.
SETTLE = 1.0
# For a rank to notice that nothing more comes, and to leave the group; CUDA's own clearing up takes a second.
FAREWELL = 10.0

Follow = Callable[[int], Callable[[Any], object]]


class Ranks:
    """The group of ranks as its first member sees it; of one rank it is no group at all.

    A rank that ends is noticed by its pipe: what the others wait for is ended with it, and ``check`` and ``together``
    say what became of it.
    """

    def __init__(self, count: int, device: str, follow: Follow) -> None:
        """Starts the others and forms the group.

        ``follow``, which is sent to them, gives for a rank what that does with each thing it is handed.

        Raises:
            TeacherLost: another process ended before it joined.
        """
        self.device, self.ending, self.lost = device, False, ""
        self.gone = threading.Event()
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        if count == 1:
            return
        listening = create_server((LOOPBACK, 0))
        port = int(listening.getsockname()[1])
        store = TCPStore(
            LOOPBACK, port, count, True, PATIENCE, wait_for_workers=False, master_listen_fd=listening.detach()
        )
        self._start(count, port, follow)
        _join(store, 0, count, device)

    def _start(self, count: int, port: int, follow: Follow) -> None:
        context = get_context("spawn")
        for rank in range(1, count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, count, self.device, port, follow), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        for pipe in self.pipes:
            if not pipe.poll(PATIENCE.total_seconds()) or (words := self._heard(pipe)):
                self._kill()
                raise self._error(words)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        """Waits for the end of any of the others, and ends what this process waits for because of it."""
        wait(self.pipes)
        if self.ending:
            return
        time.sleep(SETTLE)
        self.lost = "; ".join(self._heard(pipe) for pipe in self.pipes if pipe.poll())
        self._abort()
        self.gone.set()  # last: a process that ends while its group is being aborted is itself aborted

    def _heard(self, pipe: Connection) -> str:
        """What a rank says, or how it ended where it says nothing more."""
        try:
            return str(pipe.recv())
        except (EOFError, OSError):
            process = self.processes[self.pipes.index(pipe)]
            process.join(SETTLE)
            return f"process {process.pid} (rank {self.pipes.index(pipe) + 1}) ended with exit code {process.exitcode}"

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what all ranks do: if it fails because another rank ended, the error says so.

        Whatever fails, the ranks are in step no more, and the others end.

        Raises:
            TeacherLost: another rank ended, now or before.
        """
        self.check()
        try:
            yield
        except Exception as error:
            if not self.processes:
                raise
            # news of another's end may come a moment after what it made fail here; what users can mend fails on all
            if not isinstance(error, DecantError) and self.gone.wait(SETTLE + FAREWELL):
                raise self._error(self.lost) from error
            self.ending, self.lost = True, "after an error of the first all were ended"
            self.gone.set()
            self._kill()
            self._abort()
            raise

    def hand(self, thing: Any) -> None:
        """Gives the others the next thing to do something with."""
        for pipe in self.pipes:
            pipe.send(thing)

    def check(self) -> None:
        """Raises TeacherLost where another rank has ended: what comes from the devices after that means nothing."""
        if self.gone.is_set():
            raise self._error(self.lost)

    def close(self) -> None:
        """Ends the others and the group."""
        self.ending = True
        with suppress(OSError):
            self.hand(None)
        if self.pipes and dist.is_initialized():
            dist.destroy_process_group()
        for process in self.processes:
            process.join(FAREWELL)
        self._kill()

    def _abort(self) -> None:
        """Ends NCCL's operations, which would spin for ever for a rank that is no more; gloo's end by themselves."""
        if self.device == "cuda" and dist.is_initialized():
            dist.distributed_c10d._abort_process_group()

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def _error(self, words: str) -> TeacherLost:
        return TeacherLost(
            f"placement.cache.split: `tensor`: one of the {len(self.processes) + 1} processes of a teacher ended: "
            f"{words}; see that memory suffices, then run the same command again: it goes on with what is missing"
        )


def _join(store: TCPStore, rank: int, count: int, device: str) -> None:
    # what the ranks open to each other is for this machine alone; transformers chooses a rank's device by the third
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "LOCAL_RANK": str(rank)}
    own = torch.device("cuda", rank) if device == "cuda" else None
    if own:
        torch.cuda.set_device(own)
    backend = "nccl" if own else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE, device_id=own)


def _serve(pipe: Connection, rank: int, count: int, device: str, port: int, follow: Follow) -> None:
    """A process of another rank, from beginning to end."""
    handed: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, handed), daemon=True).start()
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    try:
        pipe.send("")
        _join(TCPStore(LOOPBACK, port, count, False, PATIENCE), rank, count, device)
        do = follow(rank)
        while (thing := handed.get()) is not None:
            do(thing)
        dist.destroy_process_group()
    except Exception as error:
        traceback.print_exc()
        with suppress(OSError):
            pipe.send(f"rank {rank}: {traceback.format_exception_only(error)[-1].strip()}")
        os._exit(1)  # the group cannot be left in order


def _receive(pipe: Connection, handed: "SimpleQueue[Any]") -> None:
    """Takes what comes for the rank; when rank 0 is no more, ends the process, whatever it waits for."""
    try:
        while (thing := pipe.recv()) is not None:
            handed.put(thing)
    except (EOFError, OSError):
        os._exit(0)
    handed.put(None)
