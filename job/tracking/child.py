"""The process of one tracker: `python -m job.tracking.child NAME OUT ID`, started by `job.tracking.apart`.

In: a JSON list per line on stdin, a method of `Tracker` and its arguments. Out: a JSON object per line on stdout:
{"ready", "id"} after the start, {"problem"} where the tracker cannot be used, {"failed"} when it failed.
At the end of its input, when rank 0 has ended without a word, it records the run as failed.
"""

import contextlib
import json
import os
import signal
import sys

from job.tracking.tracker import Tracker, TrackerError
from shards.errors import short


def make(name: str, out: str, known: str) -> Tracker:
    """The tracker of that name. Loads its package only when it starts."""
    if name == "wandb":
        from job.tracking.to_wandb import WandB

        return WandB(out, known)
    from job.tracking.to_mlflow import MLflow

    return MLflow(out, known)


def main() -> None:
    """Obey until the input ends."""
    name, out, known = sys.argv[1:]
    # Requests to stop are for the training; this process ends after it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a package prints is no answer

    def answer(**fields: str) -> None:
        with contextlib.suppress(OSError):
            print(json.dumps(fields), file=answers, flush=True)

    tracker, open_ = make(name, out, known), False
    try:
        for line in sys.stdin:
            method, *arguments = json.loads(line)
            where = getattr(tracker, method)(*arguments)
            if method == "start":
                open_ = True
                answer(ready=where, id=tracker.id)
            elif method == "close":
                return
        if open_:
            tracker.close("failed")
    except TrackerError as error:
        answer(problem=str(error))
    except Exception as error:
        answer(failed=short(f"{type(error).__name__}: {' '.join(str(error).split())}", 250))


if __name__ == "__main__":
    main()
