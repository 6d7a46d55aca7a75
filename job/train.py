"""Train AlexNet data-parallel with Horovod: `horovodrun -np 8 python -m job.train --recipe paper --data DIR`.

In: a recipe, options, shards. Out: a run directory with config.yaml, metrics.jsonl, checkpoints/, tensorboard/ and
summary.json. Read `train` from top to bottom: it is in the order in which the job happens.
"""

import hashlib
import math
import os
import platform
import time

from job import config as settings
from shards.command import run
from shards.errors import InputError

DESCRIPTION = "Train AlexNet with ring allreduce over MPI, NCCL or Gloo, reading WebDataset shards."


def train(config: settings.Config, memory) -> None:
    """One rank's part of a training run. Raises InputError, Stopped (checkpoint written) or Failed.

    `memory` (elastic.Memory): the state to go on from when ranks have come or gone, and this function is called again.
    """
    import horovod.torch as hvd
    import torch

    from job.batches import synthetic as synthetic_data
    from job.batches.device import load_mean, to_device
    from job.batches.loader import Loader
    from job.evaluate import match_size, validate
    from job.network.alexnet import build
    from job.network.sgd import learning_rate
    from job.ranks import heartbeat
    from job.ranks.agree import agree, split_facts
    from job.ranks.average import make_strategy
    from job.ranks.process import Failed, Stopped, stop_signals
    from job.run.checkpoint import CheckpointWriter
    from job.run.log import RunLog
    from job.run.progress import Progress
    from job.run.resume import content, find_resume, fingerprint, leave_behind, restore
    from job.run.step import make_optimizer, make_pass, set_determinism, set_precision
    from job.run.timing import COMPUTE, EXPOSED, UPDATE, LateLoss, StepTimer, Trace
    from job.run.timings import run_profile
    from shards.format.split import load_split

    began = time.time()
    rank, world_size = hvd.rank(), hvd.size()
    stop = stop_signals()
    stop.orderly = True

    synthetic = config.data == synthetic_data.NAME

    def open_data():
        """The splits for training and validation; what all ranks must see alike."""
        split = synthetic_data.synthetic_split(config.model.classes) if synthetic else load_split(config.data, "train")
        val_split = load_split(config.data, "val") if config.eval_every and not synthetic else None
        check_data(config, split, val_split, world_size)
        facts = {} if synthetic else split_facts(split, val_split)
        return (split, val_split), facts | {"classes": str(config.model.classes or len(split.classes))}

    # The data; and Horovod: pin this rank to its GPU.
    agreed = agree(settings.to_flat(config), open_data)
    device, kernels, (split, val_split) = agreed.device, agreed.kernels, agreed.found
    config.model.classes = config.model.classes or len(split.classes)
    mean = load_mean(split, device)
    centre_mean = mean_crop(mean, config.image_size)
    batch, nsamples = config.global_batch, split.nsamples
    total_steps = math.ceil(config.epochs * nsamples / batch)
    last_step = min(total_steps, config.max_steps or total_steps)

    # The run directory; and where to go on, when it holds a run that was cut off.
    log = RunLog(config.out, active=rank == 0)
    found = (memory.start() or find_resume(config, split, centre_mean, log)) if rank == 0 else None
    resumed = hvd.broadcast_object(found, name="resume")
    first_step, wall_before = resumed["step"], resumed["wall_seconds"]
    if first_step >= last_step and not resumed["owed"]:
        log.say(already_finished(config, first_step, last_step))
        return
    if rank == 0:
        leave_behind(resumed, config, log)
    best = resumed["best"]
    log.open(first_step)
    about = {"world_size": world_size, "last_step": last_step, "slurm_job": os.environ.get("SLURM_JOB_ID")}
    if memory.reason:
        about["after"] = memory.reason
    log.write("event", first_step, first_step * batch // nsamples, event="start", **about)
    if config.timeline:
        hvd.start_timeline(log.path("timeline.json"))

    # The network, its optimizer and the way in which ranks act together.
    model = build(config).to(device)
    computed_by = f"{kernels} kernels on {device.type}"
    if rank == 0 and resumed["by"] not in ("", computed_by):
        log.warn(
            f"the first {first_step} steps were computed by {resumed['by']}, the next are by {computed_by}: dropout "
            "draws other units there, and sums are rounded differently"
        )
    set_determinism(config.deterministic)
    set_precision(config.precision)
    optimizer = make_optimizer(config, model, kernels)
    strategy = make_strategy(config, model, optimizer, autograd=kernels == "plain")
    optimizer = strategy.optimizer
    if rank == 0 and resumed["path"]:
        restore(resumed["path"], model, optimizer)
    elif rank == 0:
        memory.restore(model, optimizer)
    # Horovod: begin with the same state on all ranks.
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_parameters([(n, optimizer.velocity(p)) for n, p in model.named_parameters()], root_rank=0)

    # Readers of this rank's part of every batch.
    workers, bad = None if config.workers < 0 else config.workers, config.stream.max_bad_fraction
    shared = dict(rank=rank, world_size=world_size, crop=config.image_size, workers=workers, pin=device.type == "cuda")
    if synthetic:
        loader = synthetic_data.SyntheticLoader(split, **shared, global_batch=batch, start_step=first_step)
    else:
        loader = Loader(
            split,
            **shared,
            global_batch=batch,
            seed=config.seed,
            start_step=first_step,
            mirror=config.stream.mirror,
            random_crop=config.stream.random_crop,
            window=config.stream.window,
            streams=config.stream.streams,
            max_bad_fraction=bad,
        )
    val_loader = (
        Loader(val_split, **shared, global_batch=batch, train=False, max_bad_fraction=bad) if val_split else None
    )
    this_pass = make_pass(config, model, strategy, mean, kernels, batch // world_size)

    checkpoints = CheckpointWriter(log.path("checkpoints"), config.checkpoint_keep, log.warn)
    losses, timer = LateLoss(device), StepTimer(device)
    progress = Progress(config, log, split, range(first_step, last_step), timer, device)
    traced = min(config.profile, last_step - first_step) if rank == 0 else 0
    trace = Trace(log.path("profile.json"), first_step, traced, log.attempt)
    flat = settings.to_flat(config)
    seconds = {"validation": 0.0, "checkpoints": 0.0}  # besides the sections of a step
    validation: dict[str, float] = {}
    saved_step = kept_step = step = first_step  # kept_step: after which what was due has been done
    owed = False  # a validation, because the run was asked to stop
    epoch = first_step * batch // nsamples

    # From here on a rank that stands still ends the job.
    heartbeat.watch(
        lambda: step + loader.rows_read + (val_loader.rows_read if val_loader else 0),
        lambda reason: log.hang(step, epoch, reason),
    )
    if memory.reason:
        log.say(f"{memory.reason}: going on behind step {first_step} with {world_size} ranks")
    if rank == 0 and val_split and (warning := match_size(val_split, config.image_size, (split.height, split.width))):
        log.warn(warning)
    log.say(describe(config, split, val_split, world_size, device, first_step, last_step))
    model.train()

    def validate_now() -> bool:
        """Validate behind the last step of an epoch. Returns whether this is the best result so far.

        A request to stop ends it, and `progress.stop` is set: then it is owed.
        """
        nonlocal validation, best
        started = time.perf_counter()
        log.line.clear()
        strategy.equalise()
        found = validate(model, val_loader, centre_mean, device, config.precision, lambda: bool(stop.requested))
        seconds["validation"] += time.perf_counter() - started
        if found is None:
            progress.stop = True
            return False
        validation = found
        before, best = best, max(best, validation["top1"])
        ended = max(0, step - strategy.every) * batch // nsamples
        log.write("val", step, ended, **validation)
        log.say(
            f"epoch {ended + 1}/{config.epochs}  validation: top-1 {validation['top1']:.2%}  "
            f"top-5 {validation['top5']:.2%}  loss {validation['loss']:.4f}"
        )
        return best > before

    def whole_state(owed: bool) -> dict:
        """All that a run goes on from; `owed`: whoever resumes from it is to validate first."""
        return {
            "model": model.state_dict(),
            "velocity": {name: optimizer.velocity(p) for name, p in model.named_parameters()},
            "config": flat,
            "data": fingerprint(split),
            "content": content(split),
            "image": [split.height, split.width],
            "by": computed_by,
            "classes": list(split.classes),
            "mean": centre_mean,
            "best": best,
            "owed": owed,
            "wall_seconds": wall_before + time.time() - began,
            "versions": versions(),
        }

    def save(best_now: bool, owed: bool) -> None:
        """Write a checkpoint behind the scenes."""
        before = time.perf_counter()
        strategy.equalise()
        if rank == 0:
            checkpoints.save(step, whole_state(owed), best_now)
        # The others would wait for rank 0 in the next allreduce, and that would count as communication.
        hvd.barrier()
        seconds["checkpoints"] += time.perf_counter() - before

    try:
        start_up = time.time() - began
        if resumed["owed"]:  # the run was stopped at the end of an epoch
            best_now = validate_now()
            owed = progress.stop
            save(best_now, owed)
        progress.restart_clock()
        going_on = step < last_step and not progress.stop
        for item, images, labels in to_device(loader, device, this_pass.prepare) if going_on else ():
            if memory.due(step, first_step):  # elastic training: what the others go on from when a rank is lost
                progress.collect()
                strategy.equalise()
                memory.commit(step, whole_state(owed=False))
            rate = learning_rate(config.optim, step, batch, nsamples, total_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            trace.before(step)
            timer.start(item.wait_seconds)
            # Dropout from (seed, step, rank) alone: a resumed run draws what the undisturbed one would have drawn.
            # Hybrid ranks compute parts of one network, and draw together.
            drawing = 0 if config.parallel == "hybrid" else rank
            loss = this_pass.run(images, labels, random_seed(config.seed, step, drawing))
            timer.mark(COMPUTE)
            strategy.communicate()
            timer.mark(EXPOSED)
            strategy.update()
            timer.mark(UPDATE)
            strategy.after_update(step)
            timer.mark(EXPOSED)

            progress.exchange(step, rate, losses.exchange(loss), item.wait_seconds, item.bad, bool(stop.requested))
            step += 1
            timer.end()

            # At the end of an epoch: validate, and keep the state. Between two averages of `parallel weights` there is
            # no common state to keep: then at the next average.
            now = step * batch // nsamples
            finished = step >= last_step
            due = config.checkpoint_every and step // config.checkpoint_every > kept_step // config.checkpoint_every
            if finished or (now > epoch or due or progress.stop) and step % strategy.every == 0:
                progress.collect()
                validation_due = val_loader and (finished or now // config.eval_every > epoch // config.eval_every)
                best_now = validate_now() if validation_due and not progress.stop else False
                if progress.stop:
                    log.say(f"asked to stop: writing a checkpoint of step {step:,}")
                if validation_due or finished or due or progress.stop or not config.checkpoint_every:
                    owed = bool(validation_due and progress.stop)
                    save(best_now, owed)
                    saved_step = step
                epoch, kept_step = now, step
                timer.pause()
                progress.restart_clock()
                if finished or progress.stop:
                    break
    finally:
        log.close()
        trace.close()
        loader.close()
        if val_loader:
            val_loader.close()
        started = time.perf_counter()
        checkpoints.wait()
        seconds["checkpoints"] += time.perf_counter() - started
    assert saved_step == step  # the loop leaves only behind a checkpoint

    stopped = progress.stop and (step < last_step or owed)
    sections = timer.finish()
    wall = time.time() - began
    used = progress.steady if progress.steady.steps else progress.whole
    summary = {
        "status": "stopped" if stopped else "done",
        "top1": validation.get("top1"),
        "top5": validation.get("top5"),
        "loss": validation.get("loss"),
        "best_top1": best if best >= 0 else None,
        "epochs": step * batch / nsamples,
        "steps": step,
        "samples": step * batch,
        "images_per_second": batch * used.steps / used.seconds if used.seconds else None,
        "data_wait_fraction": used.wait / used.seconds if used.seconds else None,
        "bad_samples": round(progress.whole.bad * world_size),
        "world_size": world_size,
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "wall_seconds": wall_before + wall,
        "checkpoint_failures": checkpoints.failures,
        "seconds": {"start-up": start_up, **sections, **seconds},
        "versions": versions(),
    }
    log.write("event", step, epoch, event=summary["status"], signal=stop.requested)
    log.summary(summary)
    log.timings(run_profile(config, split, timer, progress.warmup, device))
    log.say(table(summary, wall, config.out))
    # Rank 0 alone knows what could not be written; all ranks leave with the same exit code.
    unwritten = [(checkpoints.failures, "checkpoints"), (log.failures, "lines or files of metrics")]
    unwritten = ", ".join(f"{count} {what}" for count, what in unwritten if count)
    lost, unwritten = hvd.broadcast_object((checkpoints.last_failed, unwritten), name="unwritten")
    if stopped and not lost:
        log.say(f"stopped on {stop.requested or 'request'}; the same command goes on at step {step + 1}")
        raise Stopped
    if unwritten:
        raise Failed(f"{unwritten} could not be written to {config.out} (warnings above); make room, and run it again")


def check_data(config: settings.Config, split, val_split, world_size: int) -> None:
    """Raise InputError when settings and shards do not fit together."""
    from job.evaluate import match_size
    from shards.format.split import load_labels

    if config.global_batch % world_size:
        below = config.global_batch // world_size * world_size
        fitting = f"{below} or {below + world_size}" if below else f"{world_size}"
        raise InputError(
            f"--global-batch {config.global_batch} cannot be divided among {world_size} ranks; use {fitting}"
        )
    if config.model.batch_norm and config.global_batch < 2 * world_size:
        raise InputError(
            f"--global-batch {config.global_batch} is one image a rank; batch normalisation needs two or more"
        )
    named = len(split.classes)
    if not named and not config.model.classes:
        raise InputError(f"{config.data} names no classes; give their number with --model.classes")
    if config.model.classes and config.model.classes < named:
        raise InputError(f"--model.classes is {config.model.classes}, but {config.data} has {named} classes")
    if val_split and named and val_split.classes and val_split.classes != split.classes:
        raise InputError(f"the splits train and val of {config.data} do not have the same classes; pack them together")
    classes = config.model.classes or named
    for part in filter(None, (split, val_split)):
        match_size(part, config.image_size)
        if not part.classes and (largest := int(load_labels(part).max())) >= classes:
            raise InputError(f"{part.name} of {part.root} has the label {largest}, but there are {classes} classes")
    if config.parallel == "hybrid" and classes < world_size:
        raise InputError(
            f"--parallel hybrid splits the {classes} classes among {world_size} ranks: one of them would have none; "
            f"use at most {classes} ranks, or --parallel gradients"
        )


def mean_crop(mean, size: int):
    """Mean image of centre crops, float32 (3, size, size) on the CPU: what a network's user must subtract."""
    import torch

    if mean is None:
        return torch.zeros(3, size, size)
    top, left = ((side - size) // 2 if side > 1 else 0 for side in mean.shape[:2])
    crop = mean[top : top + size, left : left + size].permute(2, 0, 1)
    return crop.expand(3, size, size).to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)


def random_seed(seed: int, step: int, rank: int) -> int:
    """Seed of a rank's random numbers in one step."""
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def versions() -> dict[str, str]:
    import horovod
    import torch

    return {"python": platform.python_version(), "torch": str(torch.__version__), "horovod": horovod.__version__}


def already_finished(config: settings.Config, step: int, last_step: int) -> str:
    """What is said of a run that has nothing left to do. Raises InputError when it was to start anew."""
    if config.resume == "none":
        raise InputError(
            f"{config.out} holds a finished run already: --resume none does not delete it; choose another --out"
        )
    longer = "--max-steps" if last_step == config.max_steps else "--epochs"
    if longer == "--epochs" and config.optim.schedule in settings.SCHEDULES_TO_THE_END:
        return f"{config.out} is finished: {step} steps of {last_step}. Choose another --out for another run."
    return f"{config.out} is finished: {step} steps of {last_step}. Ask for more {longer} or another --out."


def describe(config, split, val_split, world_size, device, first_step, last_step) -> str:
    """The first lines of a run."""
    start = f"from step {first_step + 1} " if first_step else ""
    validation = f", {val_split.nsamples:,} for validation" if val_split else ""
    return (
        f"recipe {config.recipe}: AlexNet at {config.image_size} px, {config.model.classes} classes, "
        f"{config.precision} on {world_size} x {device.type}, parallel {config.parallel}\n"
        f"data {config.data}: {split.nsamples:,} training images in {len(split.shards)} shards{validation}\n"
        f"run {config.out}: {start}to step {last_step}, {config.global_batch} images a step over all ranks"
    )


def table(summary: dict, wall: float, out: str) -> str:
    """Closing table: accuracy, speed, and where this process's wall time went."""
    rows = []
    if summary["top1"] is not None:
        rows.append(("validation top-1", f"{summary['top1']:.2%}"))
        rows.append(("validation top-5", f"{summary['top5']:.2%}"))
        rows.append(("validation loss", f"{summary['loss']:.4f}"))
    if summary["images_per_second"]:
        rows.append(("images/s, all ranks", f"{summary['images_per_second']:,.1f}"))
    rows.append(("epochs, steps", f"{summary['epochs']:.2f}, {summary['steps']}"))
    rows.append(("wall time", f"{wall:.1f} s"))
    other = wall - sum(summary["seconds"].values())
    for name, value in [*summary["seconds"].items(), ("other", other)]:
        rows.append((f"  {name}", f"{value:.1f} s  {value / wall:4.0%}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows) + f"\nrun directory: {out}"


def main() -> None:
    config = settings.parse(None, "python -m job.train", DESCRIPTION)
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
