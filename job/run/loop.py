"""The loop over the training steps of a rank; at the end of an epoch it validates and writes a checkpoint.

In: what job.train has assembled. Out: a run directory that is complete up to the last step, and the run's summary.
"""

import dataclasses
import functools
import math
import time
from typing import Any

import horovod.torch as hvd
import torch

from job.batches.data import Data, match_size
from job.batches.device import to_device
from job.batches.loader import Batch, Loader
from job.batches.synthetic import SyntheticLoader
from job.config import Config
from job.network.sgd import learning_rate
from job.ranks.elastic import Memory
from job.ranks.process import Failed, Stopped, StopSignals
from job.run.breakdown import breakdown
from job.run.checkpoint import CheckpointWriter, RunState
from job.run.log import RunLog
from job.run.progress import Progress
from job.run.step import Step
from job.run.timing import LateLoss, StepTimer, Trace
from job.run.validation import validate
from job.usage import JOULES, words
from job.usage import memory as usage_memory
from job.usage.energy import Energy
from job.usage.flops import Flops
from job.usage.ranges import each, make_range


@dataclasses.dataclass(frozen=True)
class Extent:
    """How long a run is. Steps are counted from 0 over the whole run, whatever its starts."""

    batch: int  # images per step, over all ranks
    nsamples: int  # images per epoch
    total: int  # steps of all epochs: the learning rate depends on it
    last: int  # stop after so many steps

    @classmethod
    def of(cls, config: Config, nsamples: int) -> "Extent":
        """The extent that the settings ask for."""
        total = math.ceil(config.epochs * nsamples / config.global_batch)
        return cls(config.global_batch, nsamples, total, min(total, config.max_steps or total))

    def epoch(self, step: int) -> int:
        """The epoch, from 0, in which `step` begins."""
        return step * self.batch // self.nsamples


class Loop:
    """Trains from `start` to the last step, or until a request to stop. All ranks call its methods together.

    Args:
        began: time.time() at the start of this call of train.
        new: the state of the run before its first step; see `job.run.resume.new_state`.
        start: where this call of train starts, without tensors.
        grams_co2: per kWh; NaN: not known.

    Attributes:
        number: steps made so far, over the whole run.
        epoch: the epoch, from 0, as of the last time that a validation or a checkpoint was due.
        stopped: the run was asked to stop, and ended before its last step or before a validation that was due.
    """

    def __init__(
        self,
        *,
        began: float,
        config: Config,
        extent: Extent,
        data: Data,
        device: torch.device,
        step: Step,
        loader: Loader | SyntheticLoader,
        val_loader: Loader | None,
        log: RunLog,
        memory: Memory,
        stop: StopSignals,
        new: RunState,
        start: RunState,
        grams_co2: float,
    ):
        self.config, self.extent, self.data, self.device, self.step = config, extent, data, device, step
        self.loader, self.val_loader, self.log, self.memory, self.stop = loader, val_loader, log, memory, stop
        self.new, self.start, self.best = new, start, start.best
        self.number = start.step
        self.epoch = extent.epoch(start.step)
        self.stopped = False
        self.checkpoints = CheckpointWriter(log.path("checkpoints"), config.checkpoint_keep, log.warn)
        self._losses, self._timer = LateLoss(device), StepTimer(device)
        steps = range(start.step, extent.last)
        self._energy = Energy(device, log.joules, grams_co2)
        self._flops, self._host_memory = Flops(step.model if log.active else None, device, config.precision), (0.0, 0.0)
        rate = functools.partial(self._flops.rate, ranks=hvd.size())
        self._progress = Progress(config, log, data.train, steps, self._timer, device, self._energy, rate)
        self._trace = Trace(
            log.path("profile.json"), start.step, min(config.profile, len(steps)) if log.active else 0, log.attempt
        )
        self._kept = self._saved = start.step  # step of the last validation or checkpoint; of the last checkpoint
        self._gave_up = False  # a request to stop has ended a validation
        self._owed = False  # a validation was due, and a request to stop prevented it
        self._validation: dict[str, float] = {}
        self._began, self._start_up = began, 0.0
        self._seconds = {"validation": 0.0, "checkpoints": 0.0}  # besides the sections of a step

    def signs_of_life(self) -> int:
        """A number that grows while this rank makes progress. Another thread may ask for it."""
        return self.number + self.loader.rows_read + (self.val_loader.rows_read if self.val_loader else 0)

    @property
    def _stopping(self) -> bool:
        """The ranks know that one of them was asked to stop."""
        return self._progress.stop or self._gave_up

    def say_start(self) -> None:
        """Print the first lines of the run."""
        config, train, val, first = self.config, self.data.train, self.data.val, self.start.step
        if self.memory.reason:
            self.log.say(f"{self.memory.reason}: going on after step {first} with {hvd.size()} ranks")
        if val and (warning := match_size(val, config.image_size, (train.height, train.width))):
            self.log.warn(warning)
        resumed = f"from step {first + 1} " if first else ""
        validation = f", {val.nsamples:,} for validation" if val else ""
        self.log.say(
            f"recipe {config.recipe}: AlexNet at {config.image_size} px, {config.model.classes} classes, "
            f"{config.precision} on {hvd.size()} x {self.device.type}, parallel {config.parallel}\n"
            f"data {config.data}: {train.nsamples:,} training images in {len(train.shards)} shards{validation}\n"
            f"run {config.out}: {resumed}to step {self.extent.last}, {config.global_batch} images per step over all "
            f"ranks"
        )

    def run(self) -> None:
        """Train. Afterwards the last state is on disk, or `checkpoints.last_failed`."""
        try:
            self._start_up = time.time() - self._began
            if self.start.owed:  # the run was stopped before the validation at the end of an epoch
                best_now = self._validate()
                self._owed = self._stopping
                self._save(best_now, self._owed)
            self._progress.restart_clock()
            if self.number < self.extent.last and not self._stopping:
                batches = to_device(self.loader, self.device, self.step.prepare)
                named = make_range(self.config.profile_nvtx, self.device)
                for batch, images, labels in each(batches, named, "data"):
                    self._one_step(batch, images, labels)
                    if self._ends_here():
                        break
        except BaseException:
            self.log.close()
            self._energy.close()
            raise
        finally:
            self.log.line.clear()
            self._trace.close()
            self._host_memory = usage_memory.host_peak()  # while the readers still run
            self.loader.close()
            if self.val_loader:
                self.val_loader.close()
            started = time.perf_counter()
            self.checkpoints.wait()
            self._seconds["checkpoints"] += time.perf_counter() - started
        assert self._saved == self.number  # the loop ends only after a checkpoint
        self.stopped = self._stopping and (self.number < self.extent.last or self._owed)

    def _one_step(self, batch: Batch, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Train on a batch and report it. In elastic training, first commit the state when that is due."""
        number, extent, timer = self.number, self.extent, self._timer
        if self.memory.due(number, self.start.step):
            self._progress.collect()
            self.step.make_equal()
            self.memory.commit(self._state(owed=False))
        rate = learning_rate(self.config.optim, number, extent.batch, extent.nsamples, extent.total)
        self.step.set_rate(rate)
        self._trace.before(number)
        timer.start(batch.wait_seconds)
        loss = self.step.run(images, labels, number, timer.mark)
        losses = self._losses.exchange(loss, self.step.right)
        self._progress.exchange(number, rate, losses, batch.wait_seconds, batch.bad, bool(self.stop.requested))
        self.number += 1
        timer.end()

    def _ends_here(self) -> bool:
        """At the end of an epoch, or when it is due, validate and save the state. Returns whether training is over.

        Between two averages of `--parallel weights` the ranks have no common state: then at the next average.
        """
        config, number, now = self.config, self.number, self.extent.epoch(self.number)
        finished = number >= self.extent.last
        due = config.checkpoint_every and number // config.checkpoint_every > self._kept // config.checkpoint_every
        equal = number % self.step.every == 0
        if not finished and not (equal and (now > self.epoch or due or self._stopping)):
            return False
        self._progress.collect()
        validation_due = self.val_loader and (finished or now // config.eval_every > self.epoch // config.eval_every)
        best_now = self._validate() if validation_due and not self._stopping else False
        if self._stopping:
            self.log.say(f"asked to stop: writing a checkpoint of step {number:,}")
        if validation_due or finished or due or self._stopping or not config.checkpoint_every:
            self._owed = bool(validation_due and self._stopping)
            self._save(best_now, self._owed)
            self._saved = number
        self.epoch, self._kept = now, number
        self._timer.pause()
        self._progress.restart_clock()
        return finished or self._stopping

    def _validate(self) -> bool:
        """Validate after the last step of an epoch. Returns whether this is the best result so far.

        A request to stop ends it: then `_gave_up` is set, and the validation is owed.
        """
        started = time.perf_counter()
        self.log.line.clear()
        self.step.make_equal()
        found = validate(
            self.step.model,
            self.val_loader,
            self.new.mean,
            self.device,
            self.config.precision,
            lambda: bool(self.stop.requested),
        )
        self._seconds["validation"] += time.perf_counter() - started
        if found is None:
            self._gave_up = True
            return False
        self._validation = found
        before, self.best = self.best, max(self.best, found["top1"])
        ended = self.extent.epoch(max(0, self.number - self.step.every))
        self.log.write("val", self.number, ended, **found)
        self.log.say(
            f"epoch {ended + 1}/{self.config.epochs}  validation: top-1 {found['top1']:.2%}  "
            f"top-5 {found['top5']:.2%}  loss {found['loss']:.4f}"
        )
        return self.best > before

    def _state(self, owed: bool) -> RunState:
        """What the run can be resumed from after this step; `owed`: it must validate first."""
        return dataclasses.replace(
            self.new,
            **self.step.state(),
            step=self.number,
            best=self.best,
            owed=owed,
            wall_seconds=self._wall_seconds(),
        )

    def _wall_seconds(self) -> float:
        """Seconds of all starts of the run together."""
        return self.start.wall_seconds + time.time() - self._began

    def _save(self, best_now: bool, owed: bool) -> None:
        """Write a checkpoint in the background."""
        before = time.perf_counter()
        self.step.make_equal()
        if self.log.active:
            self.checkpoints.save(self._state(owed), best_now)
        # Without it the others would wait for rank 0 in the next allreduce, and that would count as communication.
        hvd.barrier()
        self._seconds["checkpoints"] += time.perf_counter() - before

    def report(self) -> None:
        """Write summary.json and timings.json, and print the closing table. All ranks together, after `run`."""
        sections = self._timer.finish()
        wall = time.time() - self._began
        own = [*usage_memory.peak(self.device, self._host_memory), *self._energy.read()]
        ranks = hvd.allgather(torch.tensor([own], dtype=torch.float64), name="closing").tolist()
        self._energy.close()
        summary = self._summary({"start-up": self._start_up, **sections, **self._seconds}, ranks)
        joules = {name: summary["energy"][name] for name in JOULES}
        self.log.write("event", self.number, self.epoch, event=summary["status"], signal=self.stop.requested, **joules)
        self.log.summary(summary)
        timings = breakdown(self.config, self.data.train, self._timer, self._progress.warmup, self.device)
        self.log.timings(timings | {"energy": summary["energy"]})
        if self.log.active:
            self.log.say(table(summary, wall, self.config.out))
        self.log.close(summary["status"])

    def end(self) -> None:
        """Raise Stopped or Failed, on all ranks alike, if the run is not done or a file could not be written."""
        # Only rank 0 knows what could not be written; all ranks leave with the same exit code.
        counts = [(self.checkpoints.failures, "checkpoints"), (self.log.failures, "lines or files of metrics")]
        unwritten = ", ".join(f"{count} {what}" for count, what in counts if count)
        lost, unwritten = hvd.broadcast_object((self.checkpoints.last_failed, unwritten), name="unwritten")
        if self.stopped and not lost:
            signal = self.stop.requested or "request"
            self.log.say(f"stopped on {signal}; the same command goes on at step {self.number + 1}")
            raise Stopped
        if unwritten:
            raise Failed(
                f"{unwritten} could not be written to {self.config.out} (warnings above); make room, and run it again"
            )

    def _summary(self, seconds: dict[str, float], ranks: list[list[float]]) -> dict[str, Any]:
        """The contents of summary.json.

        Args:
            seconds: where the wall time of this start went.
            ranks: peaks of memory and joules of each rank.
        """
        whole, samples = self._progress.whole, self.number * self.extent.batch
        used = self._progress.steady if self._progress.steady.steps else whole
        speed = self.extent.batch * used.steps / used.seconds if used.seconds else None
        return {
            "status": "stopped" if self.stopped else "done",
            "top1": self._validation.get("top1"),
            "top5": self._validation.get("top5"),
            "loss": self._validation.get("loss"),
            "best_top1": self.best if self.best >= 0 else None,
            "epochs": samples / self.extent.nsamples,
            "steps": self.number,
            "samples": samples,
            "images_per_second": speed,
            **self._flops.rate(speed, hvd.size()),
            "data_wait_fraction": used.wait / used.seconds if used.seconds else None,
            "bad_samples": round(whole.bad * hvd.size()),
            "world_size": hvd.size(),
            "device": str(self.device) if self.device.type == "cpu" else torch.cuda.get_device_name(self.device),
            "wall_seconds": self._wall_seconds(),
            "checkpoint_failures": self.checkpoints.failures,
            "seconds": seconds,
            "memory": usage_memory.largest([usage_memory.Peak(*rank[:4]) for rank in ranks]),
            "energy": self._energy.summary([rank[4:] for rank in ranks], self.extent.batch),
            "versions": self.new.versions,
        }


def table(summary: dict[str, Any], wall: float, out: str) -> str:
    """The closing table: accuracy, speed, memory, energy, and where the `wall` seconds of this process went."""
    rows = []
    if summary["top1"] is not None:
        rows.append(("validation top-1", f"{summary['top1']:.2%}"))
        rows.append(("validation top-5", f"{summary['top5']:.2%}"))
        rows.append(("validation loss", f"{summary['loss']:.4f}"))
    if summary["images_per_second"]:
        rows.append(("images/s, all ranks", f"{summary['images_per_second']:,.1f}"))
        rows.append(("FLOP rate, all ranks", words.flops(summary)))
    rows.append(("memory, largest rank", words.memory(summary["memory"])))
    rows.append(("energy", words.energy(summary["energy"])))
    rows.append(("epochs, steps", f"{summary['epochs']:.2f}, {summary['steps']}"))
    rows.append(("wall time", f"{wall:.1f} s"))
    other = wall - sum(summary["seconds"].values())
    for name, value in [*summary["seconds"].items(), ("other", other)]:
        rows.append((f"  {name}", f"{value:.1f} s  {value / wall:4.0%}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows) + f"\nrun directory: {out}"
