"""Ranks watch each other, so that one that hangs ends the job instead of letting the others wait for ever.

In: Horovod, initialised; a number that grows while this rank makes progress. Out: one line that names rank and host,
and the end of the job, when a rank is stopped (SIGSTOP), its node is gone, it hangs, its launcher was killed, or all
ranks wait for different messages. (Horovod's own stall check does not see a stopped rank: the cycle in which it looks
waits for that rank, too. Its stall shutdown cannot tell a rank that validates or writes from one that never comes.)
"""

import contextlib
import hmac
import os
import re
import secrets
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import horovod
import horovod.torch as hvd
import psutil

from shards import ROOT
from shards.errors import positive_number, see

PERIOD = 2.0  # seconds between two signs of life
# Set it above 1 where file systems or nodes hang at times and come back.
PATIENCE = positive_number("HEARTBEAT_PATIENCE", 1.0)
SILENT = 30.0 * PATIENCE  # without a sign of life: the process is stopped, or its node is gone
STILL = 70.0 * PATIENCE  # signs of life, but no progress and not waiting for others: a file system or a device hangs
START_FACTOR = 2  # on SILENT, until a rank trains: loading libraries stops all threads of a process
PATIENT = 600.0 * PATIENCE  # before the first progress, when files are opened and a GPU is set up; and for a slow disk
SLOW_FACTOR = 4  # a rank that once needed t seconds between two signs of progress gets this many t
CONNECT_SECONDS = 20.0

# Under horovodrun's elastic mode ranks come and go: it and Gloo's timeout handle those that vanish.
ELASTIC = os.environ.get("HOROVOD_ELASTIC") == "1"

_HELLO = struct.Struct("!16sI")  # the job's token, rank
_STARTING, _ALIVE, _ENDING = b"\x01", b"\x02", b"\x03"
_WAITING = b"\x04"  # after one of the first two, and followed by the place: for STILL seconds in one call of Horovod
_READING = ("loader.py", "workers.py")  # of job.batches: the main thread waits for data there
_HERE = os.path.join(ROOT, "job", "")
_HOROVOD = os.path.dirname(os.path.abspath(horovod.__file__))

# What launchers put into the environment of their ranks. Without a launcher, the parent process may exit first.
LAUNCHED = any(name in os.environ for name in ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "HOROVOD_RANK"))
_PARENT = os.getppid()

first_ended = threading.Event()  # rank 0 has ended, after it has said why
_progress: Callable[[], float] | None = None
_record: Callable[[str], None] | None = None
_longest_silent: Callable[[], tuple[float, int, str]] | None = None  # seconds, rank, host


def watch(progress: Callable[[], float], record: Callable[[str], None]) -> None:
    """From now on this rank also ends the job when `progress()` does not grow for long, unless it waits for others.

    Args:
        record: called with the reason on the rank that ends the job.
    """
    global _progress, _record
    _progress, _record = progress, record


def forget() -> None:
    """Stop watching the progress: elastic training will start again."""
    global _progress, _record
    _progress = _record = None


def lost(reason: str) -> str:
    """This rank has lost the others, and none of them has said why: record it as a hang.

    Returns: the message to print: `reason`, or a better one that names the rank that is silent.
    """
    if _longest_silent:
        seconds, rank, host = _longest_silent()
        if seconds > 3 * PERIOD:
            reason = _silent(rank, host, seconds)
    _note(reason)
    return reason


def _note(reason: str) -> None:
    if _record:
        # In a separate thread: it may be the file system that hangs.
        writer = threading.Thread(target=_record, args=(reason,), daemon=True)
        writer.start()
        writer.join(PERIOD)


def start() -> None:
    """Begin to watch, on all ranks together. Every rank except 0 holds a connection to rank 0."""
    if hvd.size() == 1 or ELASTIC:
        threading.Thread(target=_beat_alone, name="heartbeat", daemon=True).start()
        return
    hosts = hvd.allgather_object(socket.gethostname(), name="heartbeat_hosts")
    listener, offer = None, None
    if hvd.rank() == 0:
        token = secrets.token_bytes(16)
        listener = socket.create_server((_address(hosts), 0), backlog=hvd.size())
        offer = (*listener.getsockname()[:2], token)
    host, port, token = hvd.broadcast_object(offer, name="heartbeat_address")
    connection, problem = None, ""
    if hvd.rank() > 0:
        try:
            connection = socket.create_connection((host, port), CONNECT_SECONDS)
            connection.sendall(_HELLO.pack(token, hvd.rank()))
        except OSError as error:
            problem = f"rank {hvd.rank()} on {hosts[hvd.rank()]} cannot reach {host}:{port} ({error})"
    problem = next(filter(None, hvd.allgather_object(problem, name="heartbeat_problem")), "")
    if problem:
        if hvd.rank() == 0:
            print(
                f"warning: {problem}: only a rank that stands still itself will be noticed; name the ranks' network in "
                f"NETWORK_INTERFACE of slurm/site.sh or in HOROVOD_GLOO_IFACE {see('network')}",
                file=sys.stderr,
                flush=True,
            )
        threading.Thread(target=_beat_alone, name="heartbeat", daemon=True).start()
        return
    beat, arguments = (_beat_first, (listener, token, hosts)) if listener else (_beat_other, (connection, hosts))
    threading.Thread(target=beat, args=arguments, name="heartbeat", daemon=True).start()


def _address(hosts: list[str]) -> str:
    """Address of this host on the network that the ranks share, and on no other."""
    others = [host for host in hosts if host != hosts[0]]
    if not others:
        return "127.0.0.1"
    named = (os.environ.get("HOROVOD_GLOO_IFACE") or "").split(",")[0]
    for entry in psutil.net_if_addrs().get(named, ()):
        if entry.family == socket.AF_INET:
            return entry.address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((others[0], 9))  # sends nothing; finds which of our addresses leads there
            return probe.getsockname()[0]
        except OSError:
            pass
    try:
        return socket.gethostbyname(hosts[0])
    except OSError:
        return "127.0.0.1"  # a host that does not know its own name; the others will say that they cannot reach it


class _Own:
    """Whether this rank's main thread makes progress."""

    def __init__(self) -> None:
        self._value: float | None = None
        self._since = time.monotonic()
        self._longest = 0.0  # seconds between two signs of progress
        self._moved = False
        self._call: object = None  # of Horovod, in which the main thread is
        self._called = self._since
        self.waits_at = ""  # where it has been in that call for STILL seconds

    def sign(self) -> bytes:
        """The sign of life to send."""
        sign = _ALIVE if self._moved else _STARTING
        return sign + _WAITING + self.waits_at.encode() if self.waits_at else sign

    def overslept(self, seconds: float) -> None:
        """This process was suspended: that time does not count."""
        self._since += seconds
        self._called += seconds

    def hangs(self) -> str:
        """Why this rank must end the job: it hangs, or has lost its launcher; "" mostly."""
        if LAUNCHED and os.getppid() != _PARENT:
            return "has lost its launcher"
        now = time.monotonic()
        value = _progress() if _progress else None
        at, call = _main_thread()
        if call is None or call != self._call:
            self._call, self._called = call, now
        self.waits_at = at if now - self._called > STILL else ""
        if value is None or call is not None:
            self._since = now
            return ""
        if value != self._value:
            if self._moved:
                self._longest = max(self._longest, now - self._since)
            self._moved = self._value is not None
            self._value, self._since = value, now
            return ""
        # A rank that waits for data is the cause. One that waits for its GPU may be waiting for other ranks.
        limit = STILL if at.startswith(_READING) else STILL + 10
        if not self._moved or "checkpoint.py" in at:
            limit = PATIENT
        limit = max(limit, min(SLOW_FACTOR * self._longest, PATIENT))
        if now - self._since <= limit:
            return ""
        return f"has made no progress for {now - self._since:.0f} s; it is at {at}"


def _main_thread() -> tuple[str, object]:
    """Where the main thread is in this project's code, and in which call of Horovod, waiting for other ranks.

    Calls are told apart by the handle of their message. None: in no call of Horovod.
    """
    frame = sys._current_frames().get(threading.main_thread().ident)
    found, call = "", None
    while frame:
        name = frame.f_code.co_filename
        if call is None and name.startswith(_HOROVOD):
            handle = frame.f_locals.get("handle")
            call = id(frame), frame.f_lasti, handle if isinstance(handle, int) else None
        if not found and name.startswith(_HERE):
            found = f"{os.path.basename(name)}:{frame.f_lineno}, {frame.f_code.co_name}"
        frame = frame.f_back
    return found or "start-up", call


def here() -> str:
    """Name of this process in messages where ranks may change."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def _beat_alone() -> None:
    """The thread of a rank that watches itself only."""
    own, woke = _Own(), time.monotonic()
    while True:
        time.sleep(PERIOD)
        woke = _overslept(woke, own)
        if reason := own.hangs():
            _end(f"{here()} {reason}")


class _Peers:
    """The other ranks as rank 0 hears them.

    Attributes:
        ranks: the rank at the other end of each connection.
        heard: time of each rank's last sign of life.
        waiting: place where each rank waits for others, "" where it does not.
        ending: one of them ends the job, and has said why.
    """

    def __init__(self, listener: socket.socket, token: bytes, hosts: list[str]):
        self._listener, self._token, self._hosts = listener, token, hosts
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)
        self.ranks: dict[socket.socket, int] = {}
        self.heard = dict.fromkeys(range(1, len(hosts)), time.monotonic())
        self.waiting = dict.fromkeys(self.heard, "")
        self.ending = False
        self._limits = dict.fromkeys(self.heard, _limit(_STARTING))
        self._greetings: dict[socket.socket, bytes] = {}  # what has come before a peer has shown the token

    def listen(self, seconds: float) -> None:
        """Take in what comes within `seconds`, at least once."""
        for key, _ in self._selector.select(max(0.0, seconds)):
            if key.fileobj is self._listener:
                self._accept()
            else:
                self._hear(key.fileobj)

    def _accept(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except OSError:
            return
        peer.setblocking(False)
        self._selector.register(peer, selectors.EVENT_READ)
        self._greetings[peer] = b""

    def _hear(self, peer: socket.socket) -> None:
        try:
            data = peer.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            # Its process has ended: a matter for the launcher, unless that does not notice either.
            self._drop(peer)
            return
        if peer in self._greetings:
            greeting = self._greetings[peer] + data
            self._greetings[peer] = greeting
            if len(greeting) < _HELLO.size:
                return
            claimed, rank = _HELLO.unpack(greeting[: _HELLO.size])
            if not hmac.compare_digest(claimed, self._token) or rank not in self.heard:
                self._drop(peer)  # no rank of this job
                return
            del self._greetings[peer]
            self.ranks[peer], data = rank, greeting[_HELLO.size :]
        rank = self.ranks[peer]
        self.heard[rank] = time.monotonic()
        self._limits[rank] = _limit(data)
        self.waiting[rank] = _waits_at(data)
        self.ending = self.ending or _ENDING in data

    def _drop(self, peer: socket.socket) -> None:
        self._selector.unregister(peer)
        peer.close()
        self.ranks.pop(peer, None)
        self._greetings.pop(peer, None)

    def overslept(self, seconds: float) -> None:
        """This process was suspended: that time does not count."""
        self.heard = {rank: at + seconds for rank, at in self.heard.items()}

    def longest_silent(self) -> tuple[float, int, str]:
        """Seconds of silence, number and host of the rank that has been silent for longest."""
        at, rank = min((at, rank) for rank, at in self.heard.items())
        return time.monotonic() - at, rank, self._hosts[rank]

    def silent(self, now: float) -> str:
        """What to say of a rank that has been silent for too long; mostly nothing."""
        for rank, at in self.heard.items():
            if now - at > self._limits[rank]:
                return _silent(rank, self._hosts[rank], now - at)
        return ""


def _beat_first(listener: socket.socket, token: bytes, hosts: list[str]) -> None:
    """The thread of rank 0: hears all other ranks, and answers them."""
    global _longest_silent
    own, peers, woke = _Own(), _Peers(listener, token, hosts), time.monotonic()
    _longest_silent = peers.longest_silent
    due = time.monotonic() + PERIOD
    while True:
        peers.listen(due - time.monotonic())
        if peers.ending:
            _end("", peers.ranks)
        if time.monotonic() < due:
            continue
        slept = _overslept(woke, own)
        peers.overslept(max(0.0, slept - woke - 2 * PERIOD))
        woke, due = slept, time.monotonic() + PERIOD
        _tell(peers.ranks, own.sign())
        if reason := own.hangs():
            _end(f"rank 0 on {hosts[0]} {reason}", peers.ranks)
        if reason := _all_wait([own.waits_at, *peers.waiting.values()], hosts) or peers.silent(woke):
            _end(reason, peers.ranks)


def _beat_other(connection: socket.socket, hosts: list[str]) -> None:
    """The thread of every other rank: hears rank 0."""
    own, woke = _Own(), time.monotonic()
    heard, limit = time.monotonic(), _limit(_STARTING)
    global _longest_silent

    def longest_silent() -> tuple[float, int, str]:
        return time.monotonic() - heard, 0, hosts[0]

    _longest_silent = longest_silent
    connection.setblocking(False)
    # When rank 0 is silent, rank 1 speaks for all; the others do a little later, if rank 1 is gone, too.
    later = 0.0 if hvd.rank() == 1 else 10.0
    while True:
        time.sleep(PERIOD)
        slept = _overslept(woke, own)
        heard += max(0.0, slept - woke - 2 * PERIOD)
        woke = slept
        try:
            connection.send(own.sign())
            data = connection.recv(4096)
            ended = not data
        except OSError as error:
            data, ended = b"", not isinstance(error, BlockingIOError)
        if ended:
            first_ended.set()
        if data:
            heard, limit = woke, _limit(data)
        if _ENDING in data:
            _end("")
        if reason := own.hangs():
            _end(f"rank {hvd.rank()} on {hosts[hvd.rank()]} {reason}", {connection: 0})
        if woke - heard > limit + later:
            _end(_silent(0, hosts[0], woke - heard))


def _waits_at(signs: bytes) -> str:
    """Where the sender of these signs of life waits, by the last of them; "": it does not wait."""
    last = re.split(b"[%b%b]" % (_STARTING, _ALIVE), signs)[-1]
    return last[1:].decode(errors="replace") if last.startswith(_WAITING) else ""


def _all_wait(places: list[str], hosts: list[str]) -> str:
    """The message when every rank waits for others, for messages that will never come; else "".

    A rank that computes, reads, validates, compiles or writes does not wait, however long it takes.
    """
    if not all(places):
        return ""
    other = next((rank for rank, place in enumerate(places) if place != places[0]), len(places) - 1)
    return (
        f"all ranks have waited for each other for {STILL:.0f} s, each for a message that not all of them send: rank 0 "
        f"on {hosts[0]} at {places[0]}; rank {other} on {hosts[other]} at {places[other]}"
    )


def _limit(signs: bytes) -> float:
    """Seconds for which the sender of these signs of life may be silent."""
    return SILENT if _ALIVE in signs else START_FACTOR * SILENT


def _overslept(woke: float, own: _Own) -> float:
    """The time now. A job that was suspended as a whole (scontrol suspend, Ctrl-Z) does not hang."""
    now = time.monotonic()
    if now - woke > 2 * PERIOD:
        own.overslept(now - woke - 2 * PERIOD)
    return now


def _tell(peers: dict[socket.socket, int], message: bytes) -> None:
    for peer in peers:
        try:
            peer.send(message)
        except OSError:  # it has ended, or takes nothing
            pass


def _silent(rank: int, host: str, seconds: float) -> str:
    return f"rank {rank} on {host} has given no sign of life for {seconds:.0f} s: it is stopped, or its host is gone"


def _end(reason: str, peers: dict[socket.socket, int] | None = None) -> NoReturn:
    """Say why, and end this process; the launcher and the other ranks end the rest."""
    if reason:
        with contextlib.suppress(OSError):  # a launcher that is gone does not listen
            print(f"error: {reason}; run the same command again", file=sys.stderr, flush=True)
        _note(reason)
    _tell(peers or {}, _ENDING)
    if not reason:
        time.sleep(2 * PERIOD)  # the one that spoke goes first: its exit code is the job's
    os._exit(1)
