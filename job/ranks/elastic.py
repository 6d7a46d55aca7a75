"""Elastic training: when a host dies, the other ranks go on without a restart, and take it back when it returns.

In: train, which can be called again in the same process, and the state that it commits every few steps. Out: a run
whose ranks come and go under `horovodrun --host-discovery-script`, with the same global batches whatever the ranks.
"""

import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import torch
from horovod.common.elastic import notification_manager
from horovod.common.exceptions import HorovodInternalError, HostsUpdatedInterrupt

from job.config import Config
from job.ranks import heartbeat
from job.ranks.process import Failed, Stopped, leave, stop_signals
from job.run.checkpoint import CheckpointWriter, snapshot
from job.run.resume import put
from shards.errors import InputError, positive_number

# Times that the ranks try to find each other anew: yet another host may vanish meanwhile.
ATTEMPTS = 3
# Ranks lost in a row without a commit in between from which on it is no host's fault: the job would lose them for ever.
MOST_LOSSES = 5
# Seconds that ranks whose number does not divide the global batch wait for hosts to come or go.
WAIT_SECONDS = positive_number("HOROVOD_ELASTIC_TIMEOUT", 600)


class Memory:
    """The state that training goes on from when the ranks have changed: a copy in this process's own memory.

    Attributes:
        reason: why training goes on with other ranks; empty in a process that has just started.
        step: the step that the copy is of; None: there is none.
        state: the copy, as a checkpoint holds it.
        losses: times in a row that ranks were lost before the next commit; error: what was said of it last.
    """

    def __init__(self, every: int):
        self.reason = ""
        self.step: int | None = None
        self.state: dict[str, Any] = {}
        self._every = every if heartbeat.ELASTIC else 0
        self._kept: dict[str, torch.Tensor] = {}
        self._since = 0.0
        self._hosts_changed = False
        self.losses, self._lost_at, self.error = 0, None, ""

    def due(self, step: int, first_step: int) -> bool:
        """Whether to commit behind `step`; `first_step` is where this call of train has begun."""
        return bool(self._every) and (step == first_step or step % self._every == 0)

    def commit(self, step: int, state: dict[str, Any]) -> None:
        """Copy the state behind `step`. All ranks together. Raises HostsUpdatedInterrupt when hosts came or went."""
        self.state, self.step, self._since = snapshot(state, self._kept), step, time.time()
        self.check_hosts()

    def check_hosts(self) -> None:
        """All ranks together: raise HostsUpdatedInterrupt when hosts have come or gone."""
        # horovodrun tells rank 0 alone.
        if hvd.broadcast_object(self._hosts_changed, name="hosts_changed"):
            raise HostsUpdatedInterrupt(False)

    def on_hosts_updated(self, timestamp: float, update: int) -> None:
        """Called by Horovod's own thread."""
        self._hosts_changed = True

    def ranks_changed(self, reason: str, lost: bool = False) -> None:
        self.reason, self._hosts_changed = reason, False
        if lost:
            self.losses = self.losses + 1 if self.step == self._lost_at else 1
            self._lost_at = self.step

    def start(self) -> dict[str, Any] | None:
        """Where to go on, as resume.find_resume says it; None when nothing was committed."""
        if self.step is None:
            return None
        seconds = self.state["wall_seconds"] + time.time() - self._since
        known = {name: self.state[name] for name in ("best", "by")}
        return {"path": "", "step": self.step, "wall_seconds": seconds, "owed": False, **known}

    def restore(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put what was committed into a model and its optimizer, if anything was."""
        if self.step is not None:
            put(self.state, model, optimizer)


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
        # Outside of `except`: all that train has built is free by now.
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
        raise Failed(f"ranks were lost {losses} times after step {memory.step or 0}, without getting on: {reason}")


def _await_fitting(config: Config, memory: Memory) -> None:
    """Wait while the number of ranks does not divide the global batch; a job that begins so is refused by train."""
    batch, size = config.global_batch, hvd.size()
    if batch % size == 0 or not hvd.broadcast_object(memory.reason, name="going_on"):
        return
    problem = f"{size} ranks are left, among which --global-batch {batch} cannot be divided"
    if hvd.rank() == 0:
        print(f"warning: {problem}; waiting for hosts to come or go", file=sys.stderr, flush=True)
        if memory.step is not None:  # the wait may be in vain
            writer = CheckpointWriter(os.path.join(config.out, "checkpoints"), config.checkpoint_keep, print)
            writer.save(memory.step, memory.state, best=False)
            writer.wait()
    end = time.monotonic() + WAIT_SECONDS
    while True:
        time.sleep(1)
        memory.check_hosts()
        if any(hvd.allgather_object(bool(stop_signals().requested), name="stop")):
            raise Stopped
        if hvd.broadcast_object(time.monotonic() > end, name="patience"):
            raise Failed(f"{problem}; waited {WAIT_SECONDS:.0f} s (HOROVOD_ELASTIC_TIMEOUT) for others; run it again")
