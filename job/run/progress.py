"""The reports of all ranks on their steps, added up: lines of metrics, the progress line, slow ranks, when to stop.

In: a few numbers of every step from every rank. Out: `train` lines of the run's metrics, a Prometheus text file if
wanted, `stop` when a rank was asked to stop, sums for the run's summary. A report is read one step late, so that no
rank waits for it.
"""

import math
import socket
import statistics
import time
from collections.abc import Callable

import horovod.torch as hvd
import torch

from job.batches.loader import too_many_bad
from job.config import Config
from job.ranks.process import Failed, StepReports
from job.run.log import COMPUTE, UPDATE, RunLog, write_textfile
from job.run.timing import StepTimer
from job.usage.energy import Energy
from job.usage.gpu import gpu_use
from shards.errors import InputError
from shards.format.split import Split
from shards.machine.progress import duration

# First steps of a process, in which buffers are made and readers start: images_per_second leaves them out.
WARMUP_STEPS = 10
# At most this share of a short run counts as warm-up.
WARMUP_SHARE = 0.2
# Steps over which the rate on a terminal is averaged, where the line is rewritten several times per second.
RATE_STEPS = 20
# A rank is slow if it takes this many times the median of the others, over at least so many steps and seconds.
SLOW, SLOW_STEPS, SLOW_SECONDS = 1.2, 5, 1.0


class Sums:
    """Sums over steps after the first `skip`: loss, top-1, seconds, seconds of waiting for data (means over ranks)."""

    def __init__(self, skip: int):
        self.skip = skip
        self.reset()

    def reset(self) -> None:
        """Start over at 0, without skipping steps again."""
        self.steps = 0
        self.seconds = self.wait = self.bad = self._loss = self._right = self._count = 0.0

    def add(self, loss: float, right: float, count: float, wait: float, seconds: float, bad: float) -> None:
        """Add a step: `loss` and `right` are sums of `count` losses and top-1s, or 0 where `count` is 0."""
        if self.skip:
            self.skip -= 1
            return
        self.steps += 1
        self.seconds += seconds
        self.wait += wait
        self.bad += bad
        self._loss += loss
        self._right += right
        self._count += count

    @property
    def loss(self) -> float:
        """Mean loss; NaN where none is known."""
        return self._loss / self._count if self._count else float("nan")

    @property
    def top1(self) -> float:
        """Mean top-1 of the training batches, with dropout and random crops; NaN where none is known."""
        return self._right / self._count if self._count else float("nan")


class Progress:
    """Adds up every step of every rank. All ranks call its methods together.

    Args:
        steps: those of this start of the run.
        rate: fields with the FLOP rate for a number of images/s.

    Attributes:
        stop: a rank was asked to stop, and all ranks know it.
        warmup: number of steps that `steady` leaves out.
        steady, whole: sums without and with the warm-up.
    """

    def __init__(
        self,
        config: Config,
        log: RunLog,
        split: Split,
        steps: range,
        timer: StepTimer,
        device: torch.device,
        energy: Energy,
        rate: Callable[[float], dict[str, float | None]],
    ):
        self.config, self.log, self.split, self.steps = config, log, split, steps
        self.nsamples = split.nsamples
        self.stop = False
        self.warmup = min(WARMUP_STEPS, int(WARMUP_SHARE * len(steps)))
        self.steady, self.whole = Sums(self.warmup), Sums(0)
        self._recent = Sums(0)  # since the last line of metrics
        self._shown = Sums(1)  # since the last line on the screen; the first step compiles, and would spoil the rate
        self._rate = ""  # as the line on the screen says it
        self._first = None  # time at the end of the first step: the ETA counts from there
        self._timer, self._device, self._energy, self._flop_rate = timer, device, energy, rate
        self._reports, self._ranks = StepReports(), None
        self._bad_epoch, self._bad = -1, 0  # invalid samples of that epoch, of all ranks
        self._own_before = 0.0, 0.0  # seconds of computing and of waiting for data of this rank, at the last line
        self._wait = 0.0
        self._hosts = hvd.allgather_object(socket.gethostname(), name="progress_hosts")
        self._slow: set[int] = set()
        self._since = time.perf_counter()

    def restart_clock(self) -> None:
        """Do not count the time since the last step (a validation, a checkpoint) as part of the next."""
        self._since = time.perf_counter()

    def exchange(
        self, step: int, rate: float, losses: list[tuple[float, float]], wait: float, bad: int, stop: bool
    ) -> None:
        """Report a step of this rank, and receive the reports of all ranks on the step before.

        Args:
            rate: learning rate.
            losses: (loss, top-1) that are known by now: none, or those of an earlier step.
            wait: seconds of waiting for data.
            bad: invalid samples that were replaced.
            stop: this rank was asked to stop.
        """
        now = time.perf_counter()
        elapsed, self._since = now - self._since, now
        self._wait += wait
        values = [sum(loss for loss, _ in losses), sum(right for _, right in losses), len(losses)]
        values += [wait, elapsed, bad, stop]
        before, ranks = self._reports.exchange((step, rate), values), self._collect_ranks()
        if self._due(step):
            totals = self._timer.totals
            own = totals[COMPUTE] + totals[UPDATE], self._wait
            figures = [own[0] - self._own_before[0], own[1] - self._own_before[1], *gpu_use(self._device)]
            figures += self._energy.read()
            self._own_before = own
            self._ranks = hvd.allgather_async(torch.tensor([figures], dtype=torch.float64), name="rank_figures")
        self._note(before, ranks)

    def collect(self) -> None:
        """Receive the reports that are still on their way."""
        self._note(self._reports.collect(), self._collect_ranks())

    def _collect_ranks(self) -> list[list[float]]:
        handle, self._ranks = self._ranks, None
        return [] if handle is None else hvd.synchronize(handle).tolist()

    def _due(self, step: int) -> bool:
        return (step + 1) % self.config.log_every == 0 or step in (self.steps[0], self.steps[-1])

    def _note(self, report, ranks: list[list[float]]) -> None:
        if report is None:
            return
        (step, rate), (loss, right, count, wait, elapsed, bad, asked) = report
        epoch = step * self.config.global_batch // self.nsamples
        if count and not math.isfinite(loss):
            self.log.write("event", step + 1, epoch, event="diverged")
            raise Failed(
                f"the loss is {loss / count} at step {step + 1} (epoch {epoch}); {self.config.out} keeps its "
                f"checkpoints; train anew with a lower --optim.lr or a longer --optim.warmup-epochs in another --out"
            )
        self._count_bad(epoch, round(bad * len(self._hosts)))
        for sums in (self.steady, self.whole, self._recent, self._shown):
            sums.add(loss, right, count, wait, elapsed, bad)
        self.stop = asked > 0
        self._show(step, epoch, *((loss / count, right / count) if count else (math.nan, math.nan)))
        if self._due(step):
            self._line(step, epoch, rate, ranks)
            self._recent.reset()

    def _count_bad(self, epoch: int, bad: int) -> None:
        """Raise InputError, on all ranks, when too many samples are invalid.

        Within an epoch each sample comes once, so the number of replacements is that of invalid samples.
        """
        if epoch != self._bad_epoch:
            self._bad_epoch, self._bad = epoch, 0
        self._bad += bad
        if self._bad > self.config.stream.max_bad_fraction * self.split.nsamples:
            raise InputError(too_many_bad(self._bad, self.split, self.config.stream.max_bad_fraction))

    def _show(self, step: int, epoch: int, loss: float, top1: float) -> None:
        """Show the progress on the screen: of the first and the last step, and now and then in between."""
        now, last, shown = time.perf_counter(), self.steps[-1] + 1, self._shown
        self._first = self._first or now
        if not self.log.line.due() and step not in (self.steps[0], self.steps[-1]):
            return
        text = f"epoch {epoch + 1}/{self.config.epochs} step {step + 1:,}/{last:,}"
        if shown.steps >= (RATE_STEPS if self.log.line.terminal and self._rate else 1):
            rate = self.config.global_batch * shown.steps / shown.seconds
            self._rate = f" {rate:,.0f} images/s, data wait {shown.wait / shown.seconds:.0%}"
            loss, top1 = shown.loss, shown.top1
            shown.reset()
        if math.isfinite(loss):  # that of a GPU comes two steps late
            text += f" loss {loss:.4f} top-1 {top1:.1%}"
        if self._rate:  # the ETA counts validations and checkpoints, too, as soon as there was one
            pace = (now - self._first) / (step - self.steps[0])
            text += f"{self._rate} ETA {duration((last - step - 1) * pace)}"
        self.log.progress(text)

    def _line(self, step: int, epoch: int, rate: float, ranks: list[list[float]]) -> None:
        recent = self._recent
        speed = self.config.global_batch * recent.steps / recent.seconds
        figures = {
            "loss": recent.loss,
            "top1": recent.top1,
            "lr": rate,
            "images_per_second": speed,
            "data_wait_fraction": recent.wait / recent.seconds,
            "bad_samples": round(recent.bad * len(self._hosts)),
            **self._compare(step, epoch, ranks),
            **self._flop_rate(speed),
            **self._energy.line([rank[4:] for rank in ranks], step + 1, self.config.global_batch),
        }
        self.log.write("train", step + 1, epoch, **figures)
        if self.config.metrics.textfile and self.log.active:
            values = {
                "step": step + 1,
                "steps": self.steps[-1] + 1,
                "epoch": epoch,
                "ranks": len(self._hosts),
                **figures,
            }
            self.log.attempt(
                self.config.metrics.textfile,
                lambda: write_textfile(self.config.metrics.textfile, values, self.config.out),
            )

    def _compare(self, step: int, epoch: int, ranks: list[list[float]]) -> dict[str, float]:
        """The slowest rank of the last steps, as fields of a line; a rank that has become slow is reported.

        Args:
            ranks: seconds of computing and of waiting, GPU memory in bytes, GPU utilisation (-1: unknown), and more, of
                each rank.
        """
        busy = [compute + wait for compute, wait, *_ in ranks]
        # Each rank is compared with the others only: with two ranks, the slower one would move the median of both.
        medians = [statistics.median(busy[:rank] + busy[rank + 1 :] or busy) for rank in range(len(busy))]
        slowest = max(range(len(busy)), key=busy.__getitem__)
        factor = busy[slowest] / medians[slowest] if medians[slowest] else 1.0
        found = {"slowest_rank": slowest, "slowest_factor": round(factor, 3)}
        memory, use = max(r[2] for r in ranks), [r[3] for r in ranks if r[3] >= 0]
        if memory:
            found["gpu_memory_bytes"] = int(memory)
        if use:
            found["gpu_utilisation"] = statistics.mean(use)
        slow: set[int] = set()
        if self._recent.steps >= SLOW_STEPS:
            both = enumerate(zip(busy, medians, strict=True))
            slow = {rank for rank, (own, others) in both if own >= SLOW_SECONDS and own > SLOW * others}
        for rank in sorted(slow - self._slow):
            compute, wait = ranks[rank][:2]
            share = busy[rank] / medians[rank] - 1
            self.log.warn(
                f"rank {rank} on {self._hosts[rank]} is {share:.0%} slower than the median of the other ranks over the "
                f"last {self._recent.steps} steps: computing {compute:.1f} s, waiting for data {wait:.1f} s; median "
                f"{medians[rank]:.1f} s"
            )
            about = {"rank": rank, "host": self._hosts[rank], "slower": round(share, 3)}
            self.log.write("event", step + 1, epoch, event="slow rank", **about)
        self._slow = slow
        return found
