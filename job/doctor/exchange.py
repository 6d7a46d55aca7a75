"""How the ranks of the doctor hear of each other without MPI: through files in a folder that all nodes share.

In: the launcher's variables. Out: on rank 0, what each rank has written; on the others, what rank 0 tells them.

Rank 0 writes `leader.json` anew every half second, with a number that grows: a folder that an earlier doctor left
behind is told by the number that stands still. Each other rank writes one file of its own. Nobody waits for ever: a
rank whose file stands still for SILENT_SECONDS has hung or died.
"""

import contextlib
import json
import os
import shutil
import socket
import struct
import threading
import time
from typing import Any

from shards.errors import InputError
from shards.machine.launcher import job_key, launched_local_rank, launched_rank, launched_size

JOIN_SECONDS = 60.0  # for a rank to appear
SILENT_SECONDS = 100.0  # without news of a rank; a check may take 90 (libraries.PROBE_SECONDS)
POLL_SECONDS = 0.2
BEAT_SECONDS = 0.5
CONNECT_SECONDS = 5.0
PINGS = 10
_CLOCK = struct.Struct("!d")


class Rank:
    """This process among those that the launcher started.

    Args:
        folder: on a file system that all nodes share; a folder of this job's own is made in it.

    Raises:
        InputError: rank 0 cannot write there, or another rank hears nothing of rank 0.
    """

    def __init__(self, folder: str):
        self.rank, self.size, self.local_rank = launched_rank(), launched_size(), launched_local_rank()
        self.host = socket.gethostname()
        self.folder = os.path.join(folder, f".doctor-{job_key()}")
        self.told: dict[str, Any] = {}  # by rank 0, to all
        self._own: dict[str, Any] = {"rank": self.rank, "host": self.host, "local_rank": self.local_rank}
        self._lock = threading.Lock()
        self._heard: dict[int, tuple[dict[str, Any], float]] = {}  # rank -> its file, and since when it is as it is
        self._began = time.monotonic()
        if self.rank == 0:
            self._lead(folder)
        else:
            self._join()

    # ---- All ranks.

    def say(self, **values: Any) -> None:
        """Let rank 0 know."""
        with self._lock:
            self._own |= values
            if self.rank:
                with contextlib.suppress(OSError):  # the folder is gone: rank 0 has ended
                    _write(os.path.join(self.folder, f"rank-{self.rank}.json"), self._own)

    def wait(self, key: str, seconds: float) -> Any:
        """What rank 0 tells all under `key`; None if it does not within `seconds`, or has ended."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            told = _read(os.path.join(self.folder, "leader.json"))
            if key in told:
                return told[key]
            if told.get("token") != self._token:
                return None
            time.sleep(POLL_SECONDS)
        return None

    def is_over(self) -> bool:
        """Whether rank 0 no longer waits for anything, or has ended."""
        told = _read(os.path.join(self.folder, "leader.json"))
        return "done" in told or "failed" in told or told.get("token") != self._token

    # ---- Rank 0.

    def failed(self) -> bool:
        """Whether some rank has failed in the allreduce; all ranks are told."""
        found = any("error" in report.get("allreduce", ()) for report in self.heard().values())
        if found:
            self.tell(failed=True)
        return found

    def tell(self, **values: Any) -> None:
        """Tell all ranks."""
        with self._lock:
            self.told |= values

    def heard(self) -> dict[int, dict[str, Any]]:
        """What each rank that has been heard of has said; silent ones are left out (`silent` names them)."""
        now = time.monotonic()
        for rank in range(1, self.size):
            found = _read(os.path.join(self.folder, f"rank-{rank}.json"))
            if found and (rank not in self._heard or self._heard[rank][0] != found):
                self._heard[rank] = found, now
        return {0: self._own} | {rank: found for rank, (found, _) in self._heard.items()}

    def collect(self, key: str) -> dict[int, dict[str, Any]]:
        """What each rank has said, once all ranks that are not silent have said something under `key`."""
        while True:
            os.listdir(self.folder)  # opening a folder makes NFS look for new files in it
            heard = self.heard()
            if all(key in heard.get(rank, ()) for rank in range(self.size) if not self.silent(rank)):
                return heard
            time.sleep(POLL_SECONDS)

    def silent(self, rank: int) -> bool:
        """Whether nothing was heard of a rank for so long that it must have hung or ended."""
        if rank == 0:
            return False
        if rank not in self._heard:
            return time.monotonic() - self._began > JOIN_SECONDS
        return time.monotonic() - self._heard[rank][1] > SILENT_SECONDS

    def end(self, patience: float = 5.0) -> None:
        """Let the others end, for `patience` seconds, and remove the folder."""
        self.tell(done=True)
        until = time.monotonic() + patience
        while time.monotonic() < until and not all(
            "ended" in found for rank, found in self.heard().items() if rank and not self.silent(rank)
        ):
            time.sleep(POLL_SECONDS)
        self._beating.set()
        self._beat.join(2)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _lead(self, folder: str) -> None:
        self._token = os.urandom(8).hex()
        try:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.makedirs(self.folder, mode=0o700)
            addresses, port = self._serve_clock()
            self.told = {"token": self._token, "host": self.host, "addresses": addresses, "port": port}
            _write(os.path.join(self.folder, "leader.json"), self.told)
        except OSError as error:
            raise InputError(
                f"cannot write {self.folder} ({error.strerror or error}), through which the ranks exchange what they "
                "find; --exchange names a folder that all nodes share"
            ) from None
        self._beating = threading.Event()
        self._beat = threading.Thread(target=self._keep_beating, name="beat", daemon=True)
        self._beat.start()

    def _keep_beating(self) -> None:
        beat = 0
        while not self._beating.wait(BEAT_SECONDS):
            beat += 1
            with self._lock, contextlib.suppress(OSError):
                _write(os.path.join(self.folder, "leader.json"), self.told | {"beat": beat})

    def _serve_clock(self) -> tuple[list[str], int]:
        """Answer each connection that knows the token with the time of this node, for each byte that it sends."""
        named = (os.environ.get("HOROVOD_GLOO_IFACE") or os.environ.get("NCCL_SOCKET_IFNAME") or "").split(",")[0]
        addresses = _addresses(named)
        listener = socket.create_server(("", 0), backlog=max(16, self.size))

        def answer(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                connection.settimeout(CONNECT_SECONDS)
                if connection.recv(len(self._token), socket.MSG_WAITALL).decode("ascii", "replace") == self._token:
                    while connection.recv(1):
                        connection.sendall(_CLOCK.pack(time.time()))

        def accept() -> None:
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, name="clock", daemon=True).start()
        return addresses, listener.getsockname()[1]

    # ---- The others.

    def _join(self) -> None:
        """Wait until rank 0 is there: its number grows."""
        path, before = os.path.join(self.folder, "leader.json"), None
        # Rank 0 gives up earlier and says who is missing; only a rank that rank 0 cannot hear comes to the end of this.
        while time.monotonic() - self._began < 2 * JOIN_SECONDS:
            with contextlib.suppress(OSError):
                os.listdir(self.folder)
            told = _read(path)
            now = (told.get("token"), told.get("beat"))
            if before and told and now[0] == before[0] and now[1] != before[1]:
                self._token, self.told = told["token"], told
                return
            before = now if told else None
            time.sleep(POLL_SECONDS)
        raise InputError(
            f"rank {self.rank} on {self.host} hears nothing of rank 0 in {self.folder}; --exchange names a folder that "
            "all nodes share",
            everywhere=False,
        )

    def clock(self) -> dict[str, Any]:
        """This node's clock beside that of rank 0's node, over the network.

        Returns: `offset`, seconds that rank 0's clock is ahead, `seconds` of a message there and back; or `problem`.
        """
        addresses = ["127.0.0.1"] if self.told["host"] == self.host else self.told["addresses"]
        problem = ""
        for address in addresses:
            try:
                with socket.create_connection((address, self.told["port"]), CONNECT_SECONDS) as connection:
                    connection.sendall(self._token.encode())
                    best = min(_ping(connection) for _ in range(PINGS))
                return {"seconds": best[0], "offset": best[1], "address": address}
            except (OSError, struct.error) as error:
                problem = problem or f"{address}: {error}"
        return {"problem": f"cannot reach {self.told['host']} ({problem})"}


def _addresses(first: str) -> list[str]:
    """IPv4 addresses of this node; those of the interface `first` come first."""
    try:
        import psutil

        by_name = sorted(psutil.net_if_addrs().items(), key=lambda item: (item[0] != first, item[0]))
        found = [a.address for _, entries in by_name for a in entries if a.family == socket.AF_INET]
    except ImportError:  # the doctor also works where nothing is installed
        found = []
        with contextlib.suppress(OSError):
            found = socket.gethostbyname_ex(socket.gethostname())[2]
    return [address for address in found if not address.startswith("127.")] or ["127.0.0.1"]


def _ping(connection: socket.socket) -> tuple[float, float]:
    """Seconds of a message there and back, and seconds that the other clock is ahead."""
    began = time.time()
    connection.sendall(b".")
    (there,) = _CLOCK.unpack(connection.recv(_CLOCK.size, socket.MSG_WAITALL))
    ended = time.time()
    return ended - began, there - (began + ended) / 2


def _write(path: str, values: dict[str, Any]) -> None:
    temporary = f"{path}.{os.getpid()}-{threading.get_ident()}.tmp"
    with open(temporary, "w") as file:
        json.dump(values, file)
    os.replace(temporary, path)


def _read(path: str) -> dict[str, Any]:
    """The values in a file; empty where there is none yet."""
    try:
        with open(path) as file:
            return json.load(file)
    except (OSError, ValueError):
        return {}
