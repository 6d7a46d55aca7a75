"""What all steps of the set-up share: messages, the log, and running commands. Standard library only."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.append(str(REPOSITORY))
from job.ranks import mpi as mpi_names  # noqa: E402, F401  the other modules import it from here

STEP_SECONDS = 3600  # time limit of one pip or compiler run
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
TAIL_LINES = 25  # lines of the log that are shown when a step fails

START = time.time()  # main() sets both
LOG = pathlib.Path(os.devnull)

NO_NETWORK = re.compile(
    "NewConnectionError|name resolution|Name or service not known|Failed to establish a new connection|ConnectTimeout|"
    "Network is unreachable|ProxyError|Read timed out|No route to host|Connection refused|Max retries exceeded|"
    r"\(from versions: none\)"  # the index lists no version: it was not reached, or it is an incomplete mirror
)


class Missing(Exception):
    """The machine lacks something. The message is one line: what is missing, and what to install or load."""


class Failed(Exception):
    """A step failed; the log has the details."""


def say(text: str) -> None:
    print(f"[{time.time() - START:4.0f} s] {text}", flush=True)


def run(command: list[str], what: str, *, env: dict | None = None, cwd: pathlib.Path | None = None) -> None:
    """Run one command; its output goes to the log.

    Raises:
        Missing: pip had no network.
        Failed: the command failed otherwise; the end of its output is printed.
    """
    with open(LOG, "ab") as log:
        log.write(f"\n$ {' '.join(command)}\n".encode())
        log.flush()
        begin = log.tell()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, cwd=cwd, start_new_session=True
        )
        code = wait(process, STEP_SECONDS)
    if code == 0:
        return
    text = LOG.read_bytes()[begin:].decode(errors="replace")
    if "pip" in command and (line := next((line for line in text.splitlines() if NO_NETWORK.search(line)), None)):
        raise Missing(
            f"no network: could not {what} ({line.strip()[:160]}); run this where the package index can be reached (a "
            "login node), or name a mirror or proxy with PIP_INDEX_URL or HTTPS_PROXY"
        )
    print("\n".join(tail(text)), file=sys.stderr)
    ended = f"not done after {STEP_SECONDS} s" if code == 124 else f"exit code {code}"
    raise Failed(f"could not {what} ({ended}); the lines above end the log {LOG}")


def tail(text: str) -> list[str]:
    """The last lines of a log, without the traceback of setup.py that follows the compiler's error."""
    return re.sub(r"\nTraceback \(most recent call last\):\n(?:[ \t].*\n)+", "\n", text).splitlines()[-TAIL_LINES:]


def wait(process: subprocess.Popen, seconds: float) -> int:
    """Exit code of a process that leads its own session, or 124 after `seconds`. The session ends if we are stopped."""
    try:
        return process.wait(seconds)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return 124
        raise


def pip(*arguments: str, what: str) -> None:
    """Run pip of this environment; `what` completes "could not ..."."""
    run([*PIP, *arguments], what)


def ask_python(code: str) -> tuple[dict | None, str]:
    """Run `code` in a new Python. Returns the JSON object that its last line holds, or None and the reason."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
            cwd=tempfile.gettempdir(),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, "no answer in 120 s"
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1]), ""
    reason = [line for line in done.stderr.splitlines() if line.strip()]
    return None, reason[-1].strip() if reason else f"exit code {done.returncode}"


def on_path(name: str, outside: str = "") -> str:
    """First executable `name` on PATH whose folder is not `outside`, or an empty string."""
    folders = os.environ["PATH"].split(os.pathsep)
    return (
        shutil.which(name, path=os.pathsep.join(f for f in folders if f and not (outside and same(f, outside)))) or ""
    )


def same(one: str, other: str) -> bool:
    """Whether two paths name the same file or folder."""
    return os.path.realpath(one) == os.path.realpath(other)
