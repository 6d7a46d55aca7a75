"""Train AlexNet data-parallel with Horovod: `horovodrun -np 8 python -m job.train --recipe paper --data DIR`.

In: a recipe, options, shards. Out: a run directory with config.yaml, metrics.jsonl, checkpoints/, tensorboard/ and
summary.json. Read `train` from top to bottom: it is in the order in which the job happens.
"""

import math
import os
import time
from typing import TYPE_CHECKING

from job import config as settings
from job.config import Config
from shards.command import run
from shards.errors import InputError

if TYPE_CHECKING:
    from job.ranks.elastic import Memory

DESCRIPTION = "Train AlexNet with ring allreduce over MPI, NCCL or Gloo, reading WebDataset shards."


def train(config: Config, memory: "Memory") -> None:
    """One rank's part of a training run.

    Args:
        memory: the state to resume from when ranks have come or gone, and this function is called again.

    Raises:
        InputError: settings and data do not fit together, or with the run directory.
        Stopped: asked to stop, with a checkpoint.
        Failed: the loss diverged, or a file could not be written.
    """
    import horovod.torch as hvd

    from job.batches.data import make_loaders, open_data
    from job.batches.device import load_mean, mean_crop
    from job.network.torchvision import mean_colour
    from job.ranks import heartbeat
    from job.ranks.agree import agree
    from job.ranks.process import stop_signals
    from job.run.log import RunLog
    from job.run.loop import Extent, Loop
    from job.run.resume import find_resume, leave_behind, new_state, remember_start
    from job.run.step import Step
    from job.scaling.cost import EXAMPLE, load_prices

    began, rank, ranks = time.time(), hvd.rank(), hvd.size()
    stop = stop_signals()
    stop.orderly = True

    # Horovod: pin this rank to its GPU. All ranks see the same data and settings.
    agreed = agree(settings.to_flat(config), lambda: open_data(config, ranks))
    device, kernels, data = agreed.device, agreed.kernels, agreed.found
    config = settings.with_classes(config, data.classes)
    mean = mean_colour(device) if config.model.layout == "torchvision" else load_mean(data.train, device)
    extent = Extent.of(config, data.train.nsamples)

    # The run directory; and where to resume, when it holds a run that was interrupted.
    log = RunLog(config.out, active=rank == 0)
    new = new_state(config, data.train, mean_crop(mean, config.image_size), f"{kernels} kernels on {device.type}")
    state = (memory.resume() or find_resume(new, config, data.train, log)) if rank == 0 else new
    remember_start(state, new, config)
    start = hvd.broadcast_object(state.summary(), name="resume")
    if start.step >= extent.last and not start.owed:
        log.say(already_finished(config, start.step, extent.last))
        return
    if rank == 0:
        leave_behind(start, config, log)
    log.open(start.step, config.track, settings.to_flat(config))
    about = {"world_size": ranks, "last_step": extent.last, "slurm_job": os.environ.get("SLURM_JOB_ID")}
    about |= {"after": memory.reason} if memory.reason else {}
    about |= {"init": new.init["file"], "init_sha256": new.init["sha256"]} if new.init else {}
    log.write("event", start.step, extent.epoch(start.step), event="start", **about, **log.joules)
    if config.timeline:
        hvd.start_timeline(log.path("timeline.json"))

    # Readers begin to read this rank's part of every batch. Meanwhile: the network, its optimizer, the ranks' strategy.
    loader, val_loader = make_loaders(config, data, rank, ranks, start.step, pin=device.type == "cuda")
    step = Step(config, device, kernels, config.global_batch // ranks, mean)
    if rank == 0 and start.by not in ("", new.by):
        log.warn(
            f"the first {start.step} steps were computed by {start.by}, the next are by {new.by}: dropout draws other "
            "units there, and sums are rounded differently"
        )
    if state.model:
        step.load(state.model, state.velocity)
    del state
    # Horovod: begin with the same state on all ranks.
    step.share()

    loop = Loop(
        began=began, config=config, extent=extent, data=data, device=device, step=step, loader=loader,
        val_loader=val_loader, log=log, memory=memory, stop=stop, new=new, start=start,
        grams_co2=load_prices(config.metrics.prices or EXAMPLE).grams_co2_per_kwh if rank == 0 else math.nan,
    )  # fmt: skip
    # From here on a rank that stands still ends the job.
    heartbeat.watch(loop.signs_of_life, lambda reason: log.hang(loop.number, loop.epoch, reason))
    loop.say_start()
    loop.run()
    loop.report()
    loop.end()


def already_finished(config: Config, step: int, last_step: int) -> str:
    """The message for a run that has nothing left to do. Raises InputError when it was to start anew."""
    if config.resume == "none":
        raise InputError(
            f"{config.out} holds a finished run already: --resume none does not delete it; choose another --out"
        )
    longer = "--max-steps" if last_step == config.max_steps else "--epochs"
    if longer == "--epochs" and config.optim.schedule in settings.SCHEDULES_TO_THE_END:
        return f"{config.out} is finished: {step} steps of {last_step}. Choose another --out for another run."
    return f"{config.out} is finished: {step} steps of {last_step}. Ask for more {longer} or another --out."


def main() -> None:
    """The command."""
    config = settings.parse(None, "python -m job.train", DESCRIPTION)
    if config.metrics.prices:
        from job.scaling.cost import load_prices  # not at the top: --help works without PyYAML, too

        load_prices(config.metrics.prices)  # a mistake in the file is reported at once
    if config.timeline:
        os.environ["HOROVOD_TIMELINE"] = "DYNAMIC"  # lets a timeline begin once the run directory is there
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
    # Horovod: initialise. Only now, so that --help and wrong options cost nothing.
    from job.ranks.process import run_ranks  # isort: skip  (first: it says so when Horovod cannot be loaded)
    from job.ranks.elastic import run_elastic

    run_ranks(lambda: run_elastic(train, config))


if __name__ == "__main__":
    run(main)
