"""Elastic training: when a host dies, the other ranks continue without a restart, and take it back when it returns.

In: train, which can be called again in the same process, and the state that it commits every few steps. Out: a run
whose ranks come and go under `horovodrun --host-discovery-script`; the global batches do not depend on the ranks.
"""

import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable

import horovod.torch as hvd
from horovod.common.elastic import notification_manager
from horovod.common.exceptions import HorovodInternalError, HostsUpdatedInterrupt
from torch import Tensor

from job.config import Config
from job.ranks import heartbeat
from job.ranks.process import Failed, Stopped, leave, stop_signals
from job.run.checkpoint import CheckpointWriter, RunState, snapshot
from shards.errors import InputError, positive_number

# Attempts of the ranks to find each other again: another host may vanish meanwhile.
ATTEMPTS = 3
# After so many losses in a row without a commit in between, no host is to blame: the job would lose ranks for ever.
MOST_LOSSES = 5
# Seconds that ranks wait for hosts to come or go while their number does not divide the global batch.
WAIT_SECONDS = positive_number("HOROVOD_ELASTIC_TIMEOUT", 600)


class Memory:
    """The state that training resumes from when the ranks have changed: a copy in this process's own memory.

    Attributes:
        reason: why training goes on with other ranks; "" in a process that has just started.
        state: the last copy, or None.
        losses: times in a row that ranks were lost without a commit in between.
        error: the message of the last loss.
    """

    def __init__(self, every: int):
        self.reason = ""
        self.state: RunState | None = None
        self._every = every if heartbeat.ELASTIC else 0
        self._kept: dict[str, Tensor] = {}
        self._since = 0.0
        self._hosts_changed = False
        self.losses, self._lost_at, self.error = 0, -1, ""

    @property
    def step(self) -> int:
        """Steps of the copy; 0 where there is none."""
        return self.state.step if self.state else 0

    def due(self, step: int, first_step: int) -> bool:
        """Whether to commit after `step` steps; `first_step` is where this call of train has begun."""
        return bool(self._every) and (step == first_step or step % self._every == 0)

    def commit(self, state: RunState) -> None:
        """Copy the state. All ranks together. Raises HostsUpdatedInterrupt when hosts have come or gone."""
        self.state, self._since = snapshot(state, self._kept), time.time()
        self.check_hosts()

    def check_hosts(self) -> None:
        """All ranks together: raise HostsUpdatedInterrupt when hosts have come or gone."""
        # horovodrun informs rank 0 only.
        if hvd.broadcast_object(self._hosts_changed, name="hosts_changed"):
            raise HostsUpdatedInterrupt(False)

    def on_hosts_updated(self, timestamp: float, update: int) -> None:
        """Called by Horovod's own thread."""
        self._hosts_changed = True

    def ranks_changed(self, reason: str, lost: bool = False) -> None:
        """Note why training is called again; `lost`: a rank was lost."""
        self.reason, self._hosts_changed = reason, False
        if lost:
            self.losses = self.losses + 1 if self.step == self._lost_at else 1
            self._lost_at = self.step

    def resume(self) -> RunState | None:
        """The state to start from, or None where nothing was committed."""
        if self.state is None:
            return None
        # A copy: the next commit writes over the tensors, after training has loaded them.
        return dataclasses.replace(self.state, wall_seconds=self.state.wall_seconds + time.time() - self._since)


def run_elastic(train: Callable[[Config, Memory], None], config: Config) -> None:
    """Call `train`, under horovodrun's elastic mode again after each change of the ranks, until it returns."""
    # The state of the ranks can be copied only where they are equal.
    each = config.average_every if config.parallel == "weights" else 1
    memory = Memory(math.ceil(config.commit_every / each) * each)
    if not heartbeat.ELASTIC:
        return train(config, memory)
    if config.parallel not in ("gradients", "weights"):
        raise InputError(f"--parallel {config.parallel} cannot be elastic: no rank has the whole state")
    notification_manager.init()
    notification_manager.register_listener(memory)
    while True:
        try:
            _give_up_after(memory)
            _await_fitting(config, memory)
            return train(config, memory)
        except HorovodInternalError as error:
            memory.ranks_changed("a rank was lost", lost=True)
            memory.error = str(error)
        except HostsUpdatedInterrupt:
            memory.ranks_changed("hosts have come or gone")
        # After the `except` blocks: whatever train has built is freed by now.
        heartbeat.forget()
        _find_each_other()


def _find_each_other() -> None:
    """Leave the old ranks and join the new ones; this waits until there are at least horovodrun's --min-np."""
    for _ in range(ATTEMPTS):
        hvd.shutdown()
        try:
            return hvd.init()
        except (ValueError, HorovodInternalError):
            time.sleep(1)
    print(f"{heartbeat.here()}: no longer one of the job's hosts, or the others cannot be reached", file=sys.stderr)
    leave(1)


def _give_up_after(memory: Memory) -> None:
    """Raise Failed, on all ranks, when the ranks are lost again and again at the same place."""
    losses, error = hvd.broadcast_object((memory.losses, memory.error), name="losses")
    if losses >= MOST_LOSSES:
        reason = " ".join(error.split())[:200]
        raise Failed(f"ranks were lost {losses} times after step {memory.step}, without getting on: {reason}")


def _await_fitting(config: Config, memory: Memory) -> None:
    """Wait while the number of ranks does not divide the global batch. (A job that begins like that is refused.)"""
    batch, size = config.global_batch, hvd.size()
    if batch % size == 0 or not hvd.broadcast_object(memory.reason, name="going_on"):
        return
    problem = f"{size} ranks are left, among which --global-batch {batch} cannot be divided"
    if hvd.rank() == 0:
        print(f"warning: {problem}; waiting for hosts to come or go", file=sys.stderr, flush=True)
        if memory.state:  # the wait may be in vain
            writer = CheckpointWriter(os.path.join(config.out, "checkpoints"), config.checkpoint_keep, print)
            writer.save(memory.state, best=False)
            writer.wait()
    end = time.monotonic() + WAIT_SECONDS
    while True:
        time.sleep(1)
        memory.check_hosts()
        if any(hvd.allgather_object(bool(stop_signals().requested), name="stop")):
            raise Stopped
        if hvd.broadcast_object(time.monotonic() > end, name="patience"):
            raise Failed(f"{problem}; waited {WAIT_SECONDS:.0f} s (HOROVOD_ELASTIC_TIMEOUT) for others; run it again")
