"""Ends a run on all processes when one of them ends, and says which one and why.

A process that waits for a dead one would wait for as long as its backend does, half an hour by default. Here each process
shows every few seconds that it is there, and tells the others when it fails, in the key-value store by which they found
each other. Launchers that end a job by themselves (torchrun, `srun --kill-on-bad-exit`) are only sometimes faster.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from contextlib import suppress
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from chameleon.errors import BadInput
from chameleon.train.processes import gather, is_lost_connection, is_single_process, num_processes, process_rank

SECONDS_BETWEEN_SIGNS = 2.0
MISSED_SIGNS = 15
"""Looks at which there was no new sign of a process after which it counts as dead: half a minute."""
STORE_TIMEOUT = timedelta(seconds=20)
SECONDS_TO_TELL = timedelta(seconds=3)
FAILURE = "failure"


def key_of(what: str) -> str:
    """Return a key of the store, which outlives an attempt of torchrun where it restarts the processes."""
    return f"chameleon/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{what}"


def sign_of(rank: int) -> str:
    """Return the key under which a process shows that it is there."""
    return key_of(f"sign/{rank}")


class SignCounter:
    """Counts how often in a row a process had not given a new sign when it was looked for.

    Looks are counted, not seconds, so that processes which are all stopped and continued do not take each other for dead.
    """

    def __init__(self) -> None:
        self.latest: dict[int, bytes] = {}
        self.missed: dict[int, int] = {}

    def look(self, signs: dict[int, bytes]) -> int | None:
        """Return a process that counts as dead, or None. signs: rank → what it shows."""
        for rank, sign in signs.items():
            self.missed[rank] = self.missed.get(rank, 0) + 1 if self.latest.get(rank) == sign else 0
            self.latest[rank] = sign
        return next((rank for rank, count in self.missed.items() if count >= MISSED_SIGNS), None)


class ProcessWatch(Callback):
    """Watches the other processes of a run from a thread of its own."""

    def __init__(self) -> None:
        self.is_over = threading.Event()
        self.hosts: list[str] = []
        """The host of each process."""
        self.store: Any = None
        self.num_signs = 0
        """Signs that this process has given."""

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if is_single_process() or num_processes() == 1:
            return
        self.store = self.connect()
        self.store.set(sign_of(process_rank()), "0")
        self.hosts = gather(socket.gethostname())  # from here on every process has given a sign
        threading.Thread(target=self.watch, args=(self.connect(),), daemon=True, name="process watch").start()
        threading.Thread(target=self.watch_the_watch, daemon=True, name="watch of the process watch").start()

    def connect(self) -> Any:
        """Return a connection of its own to the store that the processes met at."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=STORE_TIMEOUT)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.store is not None:
            gather(None)  # one that has less to do at the end is not to be taken for dead
        self.is_over.set()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self.is_over.set()
        is_agreed = isinstance(exception, SystemExit)  # all processes end together
        if self.store is None or is_agreed or is_lost_connection(exception):
            return
        self.tell(self.store, process_rank(), str(exception), code=2 if isinstance(exception, BadInput) else 1)

    def reason_for_lost_connection(self) -> BadInput:
        """Return why this process cannot go on after it lost the connection to another one."""
        reason = "another process has ended"
        if self.store is not None:
            with suppress(distributed.DistError, RuntimeError):  # where it had the store
                self.store.wait([key_of(FAILURE)], SECONDS_TO_TELL)
                reason = self.store.get(key_of(FAILURE)).decode().partition(" ")[2]
        remedy = "if no message says why, it was killed, for example since memory ran out"
        return BadInput(reason, where=f"process {process_rank()}", remedy=remedy)

    def tell(self, store: Any, rank: int, reason: str, code: int = 1) -> None:
        """Tell all processes that one has failed, unless they have been told of another."""
        text = f"{code} process {rank} on {self.hosts[rank]} has ended: {' '.join(reason.split())}"
        try:
            store.compare_set(key_of(FAILURE), "", text)
        except distributed.DistError:  # the process that has the store is the one that ended
            return

    def watch(self, store: Any) -> None:
        """Show that this process is there, and end it when another one has failed."""
        rank, counter = process_rank(), SignCounter()
        # The first process looks at all others, the second one at the first.
        watched = {0: range(1, len(self.hosts)), 1: range(1)}.get(rank, range(0))
        while not self.is_over.wait(SECONDS_BETWEEN_SIGNS):
            try:
                self.num_signs += 1
                store.set(sign_of(rank), str(self.num_signs))
                if store.check([key_of(FAILURE)]):
                    code, _, reason = store.get(key_of(FAILURE)).decode().partition(" ")
                    self.end(reason, int(code))
                keys = [sign_of(other) for other in watched]
                dead = counter.look(dict(zip(watched, store.multi_get(keys), strict=True))) if keys else None
                if dead is not None:
                    self.tell(store, dead, "it gives no sign: killed, out of memory, or its machine is down")
            except (distributed.DistError, RuntimeError) as error:
                self.end(f"the first process, on {self.hosts[0]}, cannot be reached ({str(error).splitlines()[0]})", 1)

    def watch_the_watch(self) -> None:
        """End this process where `watch` hangs, since the machine that has the store does not answer."""
        counter = SignCounter()
        while not self.is_over.wait(SECONDS_BETWEEN_SIGNS):
            if counter.look({0: str(self.num_signs).encode()}) is not None:
                self.end(f"the first process, on {self.hosts[0]}, does not answer", 1)

    def end(self, reason: str, code: int) -> None:
        """End this process with a message; its main thread may be waiting for one that is dead."""
        if self.is_over.is_set():  # it ends by itself
            return
        print(f"process {process_rank()} ends: {reason}", file=sys.stderr, flush=True)
        os._exit(code)
