"""A real Slurm cluster on this machine for as long as a test needs it: munge, slurmctld and one slurmd a node.

In: number of nodes. Out: a `Cluster` that runs commands on its head node, and loses and regains nodes on request.
By hand: `python -m tests.cluster --nodes 4 bash` gives a shell on the head node; the cluster ends with the command.

Two forms, and `Cluster.form` says which one runs:
- `hosts`  (root, where the kernel allows namespaces): head and nodes are hosts in small, each with its own host name,
  address, processes, /run, /dev/shm and sshd, joined by a bridge. All of it, the bridge too, lives in namespaces below
  one process that dies with us: nothing can be left behind, and nothing of this machine is changed.
- `simple` (anywhere Slurm is installed): several slurmd under this host's own name, each with a port of its own. mpirun
  spans these nodes; `srun --mpi=pmix` and horovodrun with several nodes need the other form.
"""

import argparse
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NODE_CPUS = max(2, os.cpu_count() or 1)  # of every node: each is told that it has all cores of this machine
NODE_GPUS = 2  # for Slurm to count; no GPU is behind them
STARTUP_SECONDS = 60
_PREFIX = "slurm-cluster-"
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"  # Debian keeps the daemons out of a user's PATH

# Waits in Slurm that are minutes on a real cluster are cut to seconds: cred_expire is how long a requeued job waits
# before it may start again (120), KillWait is from SIGTERM to SIGKILL (30).
_SLURM_CONF = """\
ClusterName=test
SlurmctldHost={head}
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout={lost_after}
MessageTimeout=5
TCPTimeout=2
KillWait=20
CompleteWait=0
MinJobAge=600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
"""

_SSHD_CONF = """\
HostKey {root}/ssh/host_key
AuthorizedKeysFile {root}/ssh/user_key.pub
PidFile none
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
AcceptEnv *
"""

_SSH_CONF = """\
Host *
  IdentityFile {root}/ssh/user_key
  UserKnownHostsFile /dev/null
  StrictHostKeyChecking no
  LogLevel ERROR
"""

# Run by bash as process 1 of a host in small; bash reaps what its daemons leave behind. The host's own /run keeps the
# folders of PMIx, of mpirun's daemons and TMPDIR apart; its own /dev/shm keeps ranks of two nodes from talking through
# memory.
_HOST_SCRIPT = """\
set -e
mount -t tmpfs tmpfs /run && mkdir -p /run/sshd /run/pmix /run/tmp
mount -t tmpfs tmpfs /dev/shm
hostname {name}
ip link set lo up
{setup}
touch {root}/up-{name}
sleep infinity & wait
"""


class ClusterError(RuntimeError):
    """The cluster could not be started or did not do in time what was asked; the message has the end of its logs."""


def missing() -> str:
    """Why no cluster can run on this machine, in one line, or an empty string."""
    absent = [p for p in _PROGRAMS if not shutil.which(p, path=_PATH)]
    return (
        f"Slurm is not installed ({', '.join(absent)} missing): bash tests/install_slurm.sh as root" if absent else ""
    )


def namespaces_refused() -> str:
    """Why hosts in small cannot run here, in one line, or an empty string."""
    absent = [p for p in ("unshare", "nsenter", "ip", "sshd", "ssh-keygen") if not shutil.which(p, path=_PATH)]
    if absent:
        return f"{', '.join(absent)} missing"
    if os.geteuid() != 0:
        return "not root"
    probe = "mount -t tmpfs tmpfs /mnt && ip link add t0 type bridge && ip link add t1 type veth peer name t2"
    command = ["unshare", "--mount", "--pid", "--net", "--uts", "--ipc", "--fork", "--mount-proc", "sh", "-c", probe]
    tried = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return (tried.stderr.strip().splitlines() or ["unshare failed"])[-1] if tried.returncode else ""


class Cluster:
    """A running Slurm cluster; a context manager. Nodes are named n1, n2, ...; every node sees this machine's files."""

    def __init__(self, nodes: int = 4, form: str = "auto", rate: str = "", lost_after: int = 300):
        """Start it.

        Args:
            form: auto, hosts or simple.
            rate: bandwidth of each node's link in the words of tc, say 1gbit (form hosts).
            lost_after: seconds after which Slurm gives up a silent node and requeues its jobs (its SlurmdTimeout).
        """
        _clean_leftovers()
        if missing():
            raise ClusterError(missing())
        self.refused = namespaces_refused() if form != "simple" else "asked for the simple form"
        if form == "hosts" and self.refused:
            raise ClusterError(f"namespaces are refused here: {self.refused}")
        self.form = "simple" if self.refused else "hosts"
        self.names = [f"n{i + 1}" for i in range(nodes)]
        self.rate, self.lost_after = rate, lost_after
        self.root = Path(tempfile.mkdtemp(prefix=_PREFIX))
        (self.root / "owner").write_text(f"{os.getpid()} {_start_time(os.getpid())}")
        self._processes: dict[str, subprocess.Popen] = {}
        self._inits: dict[str, int] = {}  # hosts form: process 1 of each host, as this machine numbers it
        try:
            self._configure()
            self._start_head()
            for name in self.names:
                self._start_node(name)
            self.wait_for(self.all_idle, "all nodes idle", STARTUP_SECONDS)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # What a test does with it.

    def command(self, *words: str, cwd: str | Path = ".", host: str = "head") -> list[str]:
        """The command line that runs `words` on a host of the cluster, in folder `cwd`."""
        inside = ["env", "-C", str(Path(cwd).resolve()), *words]
        if self.form == "simple":
            return inside
        return ["nsenter", "--target", str(self._inits[host]), "--all", *inside]

    def environment(self, **more: str) -> dict[str, str]:
        """This process's environment without traces of other clusters, plus what Slurm's clients and mpirun need."""
        drop = ("SLURM", "SBATCH", "OMPI_", "PMIX_", "PRTE_", "HOROVOD_")
        env = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
        python = os.path.dirname(sys.executable)
        env |= {"SLURM_CONF": f"{self.root}/slurm.conf", "PATH": f"{python}:{env.get('PATH', '')}:{_PATH}"}
        if sys.prefix != sys.base_prefix:
            env["VIRTUAL_ENV"] = sys.prefix
        if os.geteuid() == 0:  # Open MPI asks twice
            env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
            env |= {"PRTE_ALLOW_RUN_AS_ROOT": "1", "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        if self.form == "hosts":
            env["TMPDIR"] = "/run/tmp"
        return env | more

    def run(self, *words: str, cwd: str | Path = ".", host: str = "head", timeout: float = 60, env: dict | None = None,
            check: bool = True) -> subprocess.CompletedProcess:  # fmt: skip
        """Run a command on a host of the cluster to its end; text in stdout and stderr."""
        done = subprocess.run(
            self.command(*words, cwd=cwd, host=host),
            env=self.environment(**(env or {})),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode:
            raise ClusterError(f"{' '.join(words)}: exit {done.returncode}\n{done.stdout}{done.stderr}{self.logs()}")
        return done

    def sbatch(self, *words: str, cwd: str | Path = ".", env: dict | None = None) -> int:
        """Submit; the job's number."""
        return int(self.run("sbatch", "--parsable", *words, cwd=cwd, env=env).stdout.split(";")[0])

    def job(self, number: int | str) -> dict[str, str]:
        """What `scontrol show job` says of a job: JobState, Reason, Restarts, ExitCode, NodeList, BatchHost, ..."""
        shown = self.run("scontrol", "--oneliner", "show", "job", str(number)).stdout
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def node_state(self, name: str) -> str:
        return self.run("sinfo", "-h", "-p", "main", "-n", name, "-o", "%T").stdout.split()[0]

    def all_idle(self) -> bool:
        states = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).stdout.split()
        return states == ["idle"] * len(self.names)

    def wait_for(self, condition, what: str, seconds: float):
        """Ask `condition()` until it is true, and return its value; ClusterError after so many seconds."""
        end = time.monotonic() + seconds
        while not (value := condition()):
            if time.monotonic() > end:
                raise ClusterError(f"{what}: not within {seconds:.0f} s\n{self.logs()}")
            time.sleep(0.2)
        return value

    def wait_state(self, number: int | str, states: str, seconds: float) -> dict[str, str]:
        """Wait until a job is in one of the `states` (words), and return what Slurm says of it."""
        job: dict[str, str] = {}

        def reached() -> bool:
            job.update(self.job(number))
            return job["JobState"] in states.split()

        try:
            self.wait_for(reached, f"job {number} {states}", seconds)
        except ClusterError as error:
            raise ClusterError(f"{error}\nnow: {job}") from None
        return job

    def power_off(self, name: str) -> None:
        """A node vanishes: its link is cut without a word to its peers, then all of its processes are killed."""
        if self.form == "hosts":
            self.run("ip", "link", "delete", f"port-{name}")
            os.kill(self._inits.pop(name), signal.SIGKILL)
        else:
            _kill_all(self.root, f"SLURMD_NODENAME={name}")
            self._processes[name].kill()
        self._processes.pop(name).wait(timeout=20)

    def power_on(self, name: str) -> None:
        self._start_node(name)

    def logs(self, lines: int = 12) -> str:
        """The end of the daemons' logs."""
        out = []
        for path in sorted([*self.root.glob("slurmctld.*"), *self.root.glob("n*.log")]):
            out += [f"--- {path.name}", *path.read_text(errors="replace").splitlines()[-lines:]]
        return "\n".join(out)

    def close(self) -> None:
        """End every process of the cluster and remove its folder."""
        if head := self._inits.get("head"):
            os.kill(head, signal.SIGKILL)  # process 1 of all the others: the kernel ends them with it
        for process in self._processes.values():
            if self.form == "simple":
                process.kill()
            process.wait(timeout=20)
        _kill_all(self.root)
        self._processes, self._inits = {}, {}
        shutil.rmtree(self.root, ignore_errors=True)

    # How it is made.

    def _configure(self) -> None:
        root, user = self.root, pwd.getpwuid(os.geteuid()).pw_name
        for folder in ("state", "ssh", *(f"spool-{name}" for name in self.names)):
            (root / folder).mkdir()
        key = root / "munge.key"
        key.touch(mode=0o400)
        key.chmod(0o600)
        key.write_bytes(secrets.token_bytes(1024))
        hosts = self.form == "hosts"
        head = "head" if hosts else socket.gethostname().split(".")[0]
        ports = [6817, *[6818] * len(self.names)] if hosts else _free_ports(1 + len(self.names))
        conf = _SLURM_CONF.format(
            root=root,
            user=user,
            head=head if hosts else f"{head}(127.0.0.1)",
            port=ports[0],
            lost_after=self.lost_after,
        )
        for i, name in enumerate(self.names):
            address = "" if hosts else f" NodeAddr=127.0.0.1 NodeHostname={head}"
            conf += (
                f"NodeName={name}{address} Port={ports[i + 1]} CPUs={NODE_CPUS} RealMemory=4000 Gres=gpu:{NODE_GPUS}\n"
            )
        everyone = f"Nodes={','.join(self.names)} MaxTime=60 State=UP"
        conf += f"PartitionName=main {everyone} Default=YES GraceTime=30\n"
        conf += f"PartitionName=shared {everyone} OverSubscribe=FORCE:8\n"  # many jobs on the same cores
        conf += f"PartitionName=urgent {everyone} PriorityTier=2 PreemptMode=OFF\n"  # its jobs push those of main aside
        (root / "slurm.conf").write_text(conf)
        (root / "gres.conf").write_text(
            "Name=gpu File=/dev/zero\nName=gpu File=/dev/full\n"
        )  # Slurm wants a device each
        (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        if not hosts:
            return
        (root / "mpi.conf").write_text("PMIxCliTmpDirBase=/run/pmix\n")
        (root / "hosts").write_text(
            "127.0.0.1 localhost\n10.117.0.254 head\n"
            + "".join(f"10.117.0.{i + 1} {n}\n" for i, n in enumerate(self.names))
        )
        (root / "ssh" / "sshd.conf").write_text(_SSHD_CONF.format(root=root))
        (root / "ssh" / "ssh.conf").write_text(_SSH_CONF.format(root=root))
        for name in ("host_key", "user_key"):
            make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(root / "ssh" / name)]
            subprocess.run(make, check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=20)

    def _start_head(self) -> None:
        if self.form == "hosts":
            setup = f"""\
mount --bind {self.root}/hosts /etc/hosts
mount --bind {self.root}/ssh/ssh.conf /etc/ssh/ssh_config
ip link add bridge0 type bridge && ip addr add 10.117.0.254/24 dev bridge0 && ip link set bridge0 up"""
            self._start_host("head", setup)
        munged = f"munged --foreground --force --key-file={self.root}/munge.key --socket={self.root}/munge.socket"
        munged += (
            f" --pid-file={self.root}/munged.pid --log-file={self.root}/munged.log --seed-file={self.root}/munge.seed"
        )
        self._start_daemon("munged", "head", munged.split())
        self.wait_for((self.root / "munge.socket").exists, "munge", STARTUP_SECONDS)
        self._start_daemon("slurmctld", "head", ["slurmctld", "-D"])
        ping = lambda: self.run("scontrol", "ping", check=False).stdout  # noqa: E731
        self.wait_for(lambda: "is UP" in ping(), "slurmctld", STARTUP_SECONDS)

    def _start_node(self, name: str) -> None:
        if self.form == "hosts":
            setup = f"""\
while ! ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip addr add 10.117.0.{self.names.index(name) + 1}/24 dev eth0 && ip link set eth0 up
/usr/sbin/sshd -f {self.root}/ssh/sshd.conf -E {self.root}/sshd-{name}.log"""
            if self.rate:
                # 5 ms: the buffer of a port. One of 100 ms makes every answer of a protocol wait as long.
                setup += f"\ntc qdisc add dev eth0 root tbf rate {self.rate} burst 256kb latency 5ms"
            self._start_host(name, setup)
        self._start_daemon(name, name, ["slurmd", "-D", "-N", name])

    def _start_host(self, name: str, setup: str) -> None:
        """Start a host in small: the head below this process, the nodes below the head."""
        up = self.root / f"up-{name}"
        up.unlink(missing_ok=True)
        script = _HOST_SCRIPT.format(name=name, root=self.root, setup=setup)
        command = ["unshare", "--mount", "--pid", "--net", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        command += ["bash", "-c", script]
        node = name != "head"
        process = self._popen(f"host-{name}", self.command(*command) if node else command)
        # The first bash below the process: nsenter and unshare each fork once on the way to it.
        init = self.wait_for(lambda: _descendant(process.pid, "bash"), f"host {name}", STARTUP_SECONDS)
        self._processes[f"host-{name}"], self._inits[name] = process, init
        if node:
            port = f"port-{name}"
            pair = f"ip link add {port} type veth peer name eth0 netns {self._inner_pid(init)}"
            self.run("sh", "-c", f"{pair} && ip link set {port} master bridge0 up")
        self.wait_for(up.exists, f"host {name}", STARTUP_SECONDS)

    def _inner_pid(self, pid: int) -> int:
        """The number that the head knows a process of this machine by."""
        numbers = next(
            x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("NSpid:")
        ).split()
        return int(numbers[2])  # NSpid: here, on the head, on the node

    def _start_daemon(self, name: str, host: str, words: list[str]) -> None:
        self._processes[name] = self._popen(name, self.command(*words, host=host, cwd=self.root))

    def _popen(self, name: str, command: list[str]) -> subprocess.Popen:
        with open(self.root / f"{name}.out.log", "w") as out:
            return subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],  # if we are killed, it is
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def _descendant(pid: int, name: str) -> int:
    """The nearest process below `pid` whose program is `name`; 0 when there is none (yet)."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for child in map(int, children):
            found = child if Path(f"/proc/{child}/comm").read_text().strip() == name else _descendant(child, name)
            if found:
                return found
    except OSError:  # it has ended meanwhile
        pass
    return 0


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _start_time(pid: int) -> str:
    """When a process started, in the kernel's clock ticks: with the pid, its name for good. Empty: no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        return ""


def _kill_all(root: Path, also: str = "") -> None:
    """Kill every process whose environment says that it belongs to the cluster in folder `root` (and says `also`)."""
    marks = [f"SLURM_CONF={root}/slurm.conf".encode(), *([also.encode()] if also else [])]
    for _ in range(3):  # a process may be born while we look
        found = False
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit() or int(folder.name) == os.getpid():
                continue
            try:
                if set(marks) <= set((folder / "environ").read_bytes().split(b"\0")):
                    os.kill(int(folder.name), signal.SIGKILL)
                    found = True
            except OSError:  # ended meanwhile, or not ours
                continue
        if not found:
            return


def _clean_leftovers() -> None:
    """Remove clusters whose owner was killed before it could."""
    for owner in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/owner"):
        try:
            pid, started = owner.read_text().split()
        except (OSError, ValueError):  # another run is making or removing it just now
            continue
        if _start_time(int(pid)) != started:
            _kill_all(owner.parent)
            shutil.rmtree(owner.parent, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.cluster", description="Run a command on a Slurm cluster of this machine."
    )
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--form", choices=("auto", "hosts", "simple"), default="auto")
    parser.add_argument("--rate", default="", help="bandwidth of a node's link, say 1gbit (form hosts)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="default: a shell")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with Cluster(options.nodes, options.form, options.rate) as cluster:
        print(f"cluster of {options.nodes} nodes, form {cluster.form} {cluster.refused}", file=sys.stderr, flush=True)
        env = cluster.environment(CLUSTER_HEAD=str(cluster._inits.get("head", "")))
        return subprocess.run(cluster.command(*(options.command or ["bash"])), env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
