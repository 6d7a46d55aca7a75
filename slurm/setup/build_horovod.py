"""Builds a wheel of Horovod 0.28.1 that works with today's PyTorch, compilers and Open MPI, and keeps it.

In: what the machine has (`Target`). Out: the path of a wheel in the user's cache, built at most once for each target.
Horovod's sdist is changed by exact text replacement (`PATCHES`), which fails when a text is not found.
"""

import dataclasses
import hashlib
import os
import pathlib
import platform
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable

VERSION = "0.28.1"  # the newest release (2023)

# Standard headers that g++ 13 no longer includes by way of others, and that Horovod and its third_party rely on.
HEADERS = "string stdexcept cstdint memory functional vector unordered_map mutex thread".split()

# Tools of the build itself. They go to a folder of their own, so that the user's environment is not changed.
# setuptools: from 81 on it lacks what Horovod's setup.py uses. cffi: Horovod's setup.py asks for it.
BUILD_TOOLS = ["setuptools<81", "wheel", "cffi>=1.4", "packaging", "pyyaml", "psutil", "cloudpickle"]
CMAKE_TOOLS = ["cmake>=3.22", "ninja"]  # only where cmake or make is missing


@dataclasses.dataclass(frozen=True)
class Patch:
    """Replace `old`, which stands exactly once in `file`, by `new`."""

    file: str
    old: str
    new: str
    why: str


_LAUNCH_MPIRUN = '''\
# A rank that leaves with one of these has said why: 2 bad input, 75 stopped on request.
_SPEAKING_EXIT_CODES = (2, 75)
_STOP_SECONDS = float(os.environ.get('HOROVOD_STOP_SECONDS', '40'))
_RULE = b'-' * 74 + b'\\n'
_HYDRA_REPORT = re.compile(rb'=[= ]  |={60}|YOUR APPLICATION TERMINATED WITH|This typically refers to a problem with your '
                           rb'app|Please see the FAQ page for debug|\\[mpiexec@\\S+\\] Exit codes: (.*)')
_REPORT = re.compile(rb'Primary job +terminated normally, but|\\S+ detected that one or more processes exited with non-zero')


def _forward(source, target):
    """Copy the bytes of mpirun's stderr. Its report of a rank that ended with an exit code becomes one line, or
    none when that exit code says it all; everything else passes unchanged."""
    held, line_start, end = b'', True, False
    while not end:
        data = os.read(source, 65536)
        end = not data
        held += data
        while held:
            if line_start and _RULE.startswith(held[:len(_RULE)]):
                # A report: rule, text, rule. Its first line says which one it is.
                text = held[len(_RULE):]
                if b'\\n' not in text and not end:
                    break
                if _REPORT.match(text):
                    close = text.find(_RULE)
                    if close >= 0:
                        held = text[close + len(_RULE):]
                        found = re.search(rb'Process name: .*,(\\d+)\\]\\s+Exit code: +(\\d+)', text[:close])
                        if found and int(found[2]) not in _SPEAKING_EXIT_CODES:
                            target.write(b'horovodrun: rank %s ended with exit code %s\\n' % found.groups())
                        continue
                    if not end:
                        break
            newline = held.find(b'\\n') + 1
            line, held = (held[:newline], held[newline:]) if newline else (held, b'')
            line_start = line.endswith(b'\\n')
            target.write(line)
        target.flush()


def _forward_hydra(source, target, codes):
    """Copy the bytes of mpiexec's stdout, without its report of ranks that failed; their exit codes go to `codes`.

    mpiexec of Intel MPI ends with 255, whatever the rank's own code was, and that of MPICH with 9 where one was killed."""
    held, line_start, end = b'', True, False
    while not end:
        data = os.read(source, 65536)
        end = not data
        held += data
        while held:
            newline = held.find(b'\\n') + 1
            if not newline and not end and line_start and held[:1] in b'=[YTP':
                break  # perhaps the report
            line, held = (held[:newline], held[newline:]) if newline else (held, b'')
            report = line_start and _HYDRA_REPORT.match(line)
            line_start = line.endswith(b'\\n')
            if not report:
                target.write(line)
            elif report[1]:  # "[host:0] 9,512 [other:1] 0": what waitpid gave for each rank
                for status in re.findall(rb'(?<=[ ,])\\d+(?=[,\\s])', report[1] + b' '):
                    status = int(status)
                    codes.append(128 + (status & 127) if status & 127 else status >> 8)
        target.flush()


def _reason(codes):
    """The exit code that says why: that of a rank that left by itself, else that of those that were killed."""
    failed = [code for code in codes if code]
    code = next((code for code in failed if code < 128), failed[0])
    if code not in _SPEAKING_EXIT_CODES:
        ranks = [str(rank) for rank, other in enumerate(codes) if other == code]
        print('horovodrun: rank {} ended with exit code {}'.format(', '.join(ranks), code), file=sys.stderr)
    return code


def _run_mpirun(command, env, hydra=False):
    """Run mpirun; return its exit code, which is that of the first rank that failed.

    The first request to stop (SIGTERM, SIGINT, SIGHUP, SIGUSR1) reaches the ranks as SIGUSR1, because mpirun hands on
    that one and answers the others by killing. A second request, or ranks that take too long, ends the job."""
    def child_setup():
        # Ctrl-C is for this process alone, and mpirun does not outlive it (1 is PR_SET_PDEATHSIG).
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)

    stdin = subprocess.DEVNULL if sys.stdin is None or sys.stdin.isatty() else None
    mpirun = subprocess.Popen(['/bin/sh', '-c', 'exec ' + command], env=env, stdin=stdin, stderr=subprocess.PIPE,
                              stdout=subprocess.PIPE if hydra else None, preexec_fn=child_setup)
    requests, codes = [], []

    def stop(signum, frame):
        requests.append(signum)
        if len(requests) > 1:
            mpirun.terminate()
            return
        mpirun.send_signal(signal.SIGUSR1)
        timer = threading.Timer(_STOP_SECONDS, mpirun.terminate)
        timer.daemon = True
        timer.start()

    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, stop)
    readers = [threading.Thread(target=_forward, args=(mpirun.stderr.fileno(), sys.stderr.buffer), daemon=True)]
    if hydra:
        arguments = (mpirun.stdout.fileno(), sys.stdout.buffer, codes)
        readers.append(threading.Thread(target=_forward_hydra, args=arguments, daemon=True))
    for reader in readers:
        reader.start()
    code = mpirun.wait()
    for reader in readers:
        reader.join(5)  # not for ever: a process that outlives mpirun may hold the other end
    if code and any(codes):
        return _reason(codes)
    return code if code >= 0 else 128 - code


def _on_this_host(mpi, env):
    """Environment of a mpirun whose ranks all run here. A batch system may have given this job one task (salloc -n1,
    Jupyter): it does not say how many ranks there are, the option -np does."""
    env = dict(env)
    if mpi == _OMPI_IMPL:
        for name in ('OMPI_MCA_ras', 'OMPI_MCA_plm', 'PRTE_MCA_ras', 'PRTE_MCA_plm'):  # Open MPI 4, and 5
            env.setdefault(name, '^slurm,tm,lsf,gridengine,alps,pbs')
    else:
        for name in ('HYDRA_LAUNCHER', 'HYDRA_BOOTSTRAP', 'I_MPI_HYDRA_BOOTSTRAP'):
            env[name] = 'fork'
    return env


def mpi_run(settings, nics, env, command, stdout=None, stderr=None):
'''

_TERMINATE_OLD = """\
    # Terminate children gracefully.
    for child in p.children():
        try:
            child.terminate()
        except psutil.NoSuchProcess:
            pass

    # Wait for graceful termination.
    gone, alive = psutil.wait_procs(p.children(), timeout=GRACEFUL_TERMINATION_TIME_S)
"""

_TERMINATE_NEW = """\
    def running(process):
        # Look, do not wait: the exit code is for the Popen object that waits for it.
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    # The sh of `sh -c` becomes the command that it runs: then p is the rank, and its children are its own affair.
    # A shell without children is about to become it.
    try:
        ranks = p.name() in ('sh', 'dash', 'bash') and p.children() or [p]
    except psutil.NoSuchProcess:
        return
    for rank in ranks:
        try:
            rank.terminate()
        except psutil.NoSuchProcess:
            pass

    # Wait for graceful termination.
    deadline = time.time() + GRACEFUL_TERMINATION_TIME_S
    while time.time() < deadline and any(running(rank) for rank in ranks):
        time.sleep(0.1)
    alive = [rank for rank in ranks if running(rank)]
    if not alive:
        return
"""

_KILL_OLD = """\
    # Kill shell itself.
    try:
        p.terminate()
    except psutil.NoSuchProcess:
        pass

    try:
        p.wait(timeout=GRACEFUL_TERMINATION_TIME_S)
    except psutil.TimeoutExpired:
        try:
            p.kill()
        except psutil.NoSuchProcess:
            pass
"""

_KILL_NEW = """\
    # Kill shell itself.
    try:
        p.kill()
    except psutil.NoSuchProcess:
        pass
"""

_GLOO_RAISE = """\
        if exit_code != 0:
            raise RuntimeError('Horovod detected that one or more processes exited with non-zero '
"""

_GLOO_ELASTIC_RAISE = """\
            if exit_code != 0:
                raise RuntimeError('Horovod detected that one or more processes exited with non-zero '
"""

_MISSED_WORKERS = """\
    def _end_missed_workers(self, rendezvous_id):
        # A worker that is stopped, or hangs, never comes to the barrier, and the others would wait for it for ever.
        with self._lock:
            if rendezvous_id != self._rendezvous_id or self._driver.finished():
                return
            missed = [slot for slots in self._driver.host_assignments.values() for slot in slots
                      if (slot.hostname, slot.local_rank) not in self._states]
        for slot in missed:
            print('horovodrun: rank {} on {} has not come back for {:.0f} s: it is ended'.format(
                slot.rank, slot.hostname, _MISSED_SECONDS), file=sys.stderr)
        for host in {slot.hostname for slot in missed}:
            self._host_manager.get_host_event(host).set()

    def _wait(self, key, state, rendezvous_id):
"""

_FOR_ANY_SHELL = r'''def for_any_shell(command):
    """`command` as the argument of ssh. A login shell that is csh knows no 2>&1, and reads ! and newlines in quotes."""
    escaped = ''.join('\\0%03o' % ord(letter) if letter in "\\'!\n" else letter for letter in command)
    return """exec sh -c 'eval "$(printf %b "$1")"' sh '""" + escaped + "'"


def get_ssh_command('''

_MPI = "horovod/runner/mpi_run.py"
_GLOO = "horovod/runner/gloo_run.py"
_SHELL = "horovod/runner/common/util/safe_shell_exec.py"
_LAUNCH = "horovod/runner/launch.py"
_HTTP = "horovod/runner/http/http_server.py"
_NETWORK = "horovod/runner/common/util/network.py"
_REGISTRATION = "horovod/runner/elastic/registration.py"
_CMAKE = "CMakeLists.txt"
_CMAKE_TORCH = "horovod/torch/CMakeLists.txt"
_CMAKE_CUDA = "horovod/common/ops/cuda/CMakeLists.txt"

PATCHES = (
    # The build. {cxx} is the C++ standard that torch's headers ask for.
    Patch(_CMAKE, "set(CMAKE_CXX_STANDARD 14)", "set(CMAKE_CXX_STANDARD {cxx})", "torch's headers need it"),
    Patch(_CMAKE_TORCH, "set(CMAKE_CXX_STANDARD 14)", "set(CMAKE_CXX_STANDARD {cxx})", "torch's headers need it"),
    Patch(_CMAKE_CUDA, "set(CMAKE_CUDA_STANDARD 11)", "set(CMAKE_CUDA_STANDARD 17)", "CUDA 13 has no C++11"),
    Patch(
        _CMAKE,
        "project(horovod CXX)\n",
        "project(horovod CXX)\n"
        "set(CMAKE_BUILD_WITH_INSTALL_RPATH TRUE)\n"
        'set(CMAKE_INSTALL_RPATH "$ENV{{HOROVOD_RPATH}}")\n',
        "a wheel in the cache must not look for libraries in the environment that built it",
    ),
    Patch(
        _CMAKE_TORCH,
        "from distutils.sysconfig import get_python_inc; print(get_python_inc())",
        "import sysconfig; print(sysconfig.get_path('include'))",
        "Python 3.12 has no distutils",
    ),
    Patch(
        "setup.py",
        "setup_requires=require_list if is_build_action() else [],",
        "",
        "they are installed by then; setuptools would fetch them by itself",
    ),
    # The rank.
    Patch(
        "horovod/torch/mpi_ops_v2.cc",
        "      std::this_thread::yield();\n",
        "      std::this_thread::sleep_for(std::chrono::microseconds(50));\n",
        "a rank that waits took half of its core, and Python's lock, from the threads that it waits for",
    ),
    Patch(
        "horovod/common/gloo/gloo_context.cc",
        "  device_attr.iface = gloo_iface_;\n"
        "  device_attr.ai_family = AF_UNSPEC;\n"
        "  auto dev = CreateDevice(device_attr);\n\n"
        "  global_ctx",
        "  device_attr.iface = global_context.gloo_iface_;\n"
        "  device_attr.ai_family = AF_UNSPEC;\n"
        "  auto dev = CreateDevice(device_attr);\n\n"
        "  global_ctx",
        "ranks listened on the address of the host's name, and crashed where that has none",
    ),
    # horovodrun.
    Patch(
        "horovod/runner/js_run.py",
        "from distutils.spawn import find_executable",
        "from shutil import which as find_executable",
        "Python 3.12 has no distutils",
    ),
    Patch(
        _MPI,
        "_NO_BINDING_ARGS = ['-bind-to none', '-map-by slot']",
        "_NO_BINDING_ARGS = ['--bind-to none', '--map-by slot']",
        "mpirun of Open MPI 5 refuses the other spelling",
    ),
    Patch(
        _MPI,
        "import copy\nimport os\nimport sys\n",
        "import copy\nimport ctypes\nimport os\nimport re\nimport signal\nimport subprocess\nimport sys\nimport threading\n",
        "for the functions below",
    ),
    Patch(
        _MPI,
        "def mpi_run(settings, nics, env, command, stdout=None, stderr=None):\n",
        _LAUNCH_MPIRUN,
        "a request to stop reaches the ranks; mpirun's words do not bury the rank's own",
    ),
    Patch(
        _MPI,
        "os.execve('/bin/sh', ['/bin/sh', '-c', mpirun_command], env)",
        "sys.exit(_run_mpirun(mpirun_command, env, impi_or_mpich))",
        "as above",
    ),
    Patch(
        _MPI,
        "if nics and not impi_or_mpich else ''\n    nccl_socket_intf_arg",
        "if nics and not impi_or_mpich else ''\n"
        "    if mpi == _OMPI_IMPL and nics and set(nics) == {'lo'}:\n"
        "        tcp_intf_arg = ''\n"
        "        mpi_impl_flags = [flag.replace('btl ^openib', 'btl ^openib,tcp') for flag in mpi_impl_flags]\n"
        "    nccl_socket_intf_arg",
        "ranks of one host talk through memory; the TCP transport would listen on every interface",
    ),
    Patch(
        _MPI,
        "basic_args = '-l' if impi_or_mpich else '--allow-run-as-root --tag-output'",
        "basic_args = '-print-all-exitcodes' if impi_or_mpich else '--allow-run-as-root'\n"
        "    if settings.prefix_output_with_timestamp:\n"
        "        basic_args += ' -l' if impi_or_mpich else ' --tag-output'",
        "lines without the rank in front, unless --prefix-output-with-timestamp asks for it: only rank 0 speaks",
    ),
    Patch(
        _MPI,
        "        elif 'MPICH' in output:\n",
        "        elif 'MPICH' in output or 'HYDRA' in output:\n",
        "what mpirun of MPICH and MVAPICH calls itself",
    ),
    Patch(
        _MPI,
        "from horovod.runner.common.util import env as env_util, hosts, safe_shell_exec, tiny_shell_exec\n",
        "from horovod.runner.common.util import env as env_util, hosts, safe_shell_exec, tiny_shell_exec\n"
        "from horovod.runner.util import network\n",
        "for the next",
    ),
    Patch(
        _MPI,
        "    # On large cluster runs (e.g. Summit)",
        "    if not network.filter_local_addresses(hosts.parse_hosts_and_slots(settings.hosts)[0]):\n"
        "        env = _on_this_host(mpi, env)\n"
        "    elif mpi == _IMPI_IMPL and 'SLURM_JOB_ID' in env:\n"
        "        env = {'I_MPI_HYDRA_BOOTSTRAP': 'slurm', **env}\n\n"
        "    # On large cluster runs (e.g. Summit)",
        "ranks of one host do not depend on the tasks of a batch job; Intel's mpirun, see below, chooses this bootstrap",
    ),
    Patch(
        _MPI,
        "        'mpirun {basic_args} '\n",
        "        '{program} {basic_args} '\n",
        "Intel's mpirun is a shell script, which does not hand on signals",
    ),
    Patch(
        _MPI,
        "        .format(basic_args=basic_args,\n",
        "        .format(program='mpiexec.hydra' if mpi == _IMPI_IMPL else 'mpirun', basic_args=basic_args,\n",
        "as above",
    ),
    Patch(
        _GLOO,
        ".format(\n            shell='env',\n",
        ".format(\n            shell='exec env',\n",
        "the shell says nothing of its own when the rank is killed, and a signal reaches the rank",
    ),
    Patch(
        _GLOO,
        "index=index,\n                                                stdout=stdout,",
        "index=index if settings.prefix_output_with_timestamp else None,\n"
        "                                                stdout=stdout,",
        "as above",
    ),
    Patch(
        _GLOO,
        "            if exit_code != 0:\n"
        "                print('Process {idx} exit with status code {ec}.'.format(idx=index, ec=exit_code))\n",
        "            if exit_code not in (0, 2, 75) and not any(ev.is_set() for ev in all_events):\n"
        "                print('horovodrun: rank {idx} on {host} ended with exit code {ec}'.format(\n"
        "                    idx=index, host=host_name, ec=exit_code), file=sys.stderr)\n",
        "the first failure alone is told, and on stderr",
    ),
    Patch(
        _GLOO,
        "            if not any(ev.is_set() for ev in all_events):\n"
        "                print('Terminating remaining workers after failure of Process {idx}.'.format(idx=index))\n",
        "",
        "as above",
    ),
    Patch(
        _GLOO,
        _GLOO_RAISE,
        "        if exit_code != 0 and not settings.run_func_mode:\n            sys.exit(exit_code)\n" + _GLOO_RAISE,
        "the exit code of the first rank that failed, no traceback of the launcher",
    ),
    Patch(
        _GLOO,
        "    signal.signal(signal.SIGTERM, set_event_on_signal)\n",
        "    signal.signal(signal.SIGTERM, set_event_on_signal)\n"
        "    signal.signal(signal.SIGUSR1, set_event_on_signal)\n",
        "SIGUSR1 asks for a stop, as with MPI",
    ),
    Patch(
        _SHELL,
        "GRACEFUL_TERMINATION_TIME_S = 5",
        "GRACEFUL_TERMINATION_TIME_S = float(os.environ.get('HOROVOD_STOP_SECONDS', '40'))",
        "a rank that is asked to stop needs time to write its checkpoint",
    ),
    Patch(_SHELL, _TERMINATE_OLD, _TERMINATE_NEW, "SIGTERM went to the children of the rank, not to the rank"),
    Patch(_SHELL, _KILL_OLD, _KILL_NEW, "waiting here took the exit code from the one who waits for it"),
    Patch(
        _LAUNCH,
        "def _launch_job(args, settings, nics, command):\n    env = os.environ.copy()\n",
        "def _launch_job(args, settings, nics, command):\n    env = os.environ.copy()\n"
        "    # mpirun gives every rank a pseudo-terminal, so that a rank cannot see by itself where its output goes.\n"
        "    env['HOROVOD_TERMINAL'] = '1' if sys.stdout is not None and sys.stdout.isatty() else '0'\n",
        "ranks draw a progress bar only where somebody watches",
    ),
    Patch(
        _LAUNCH,
        "        fn_cache = cache.Cache(CACHE_FOLDER, CACHE_STALENESS_THRESHOLD_MINUTES,\n"
        "                               parameters_hash)\n",
        "        try:\n"
        "            fn_cache = cache.Cache(CACHE_FOLDER, CACHE_STALENESS_THRESHOLD_MINUTES,\n"
        "                                   parameters_hash)\n"
        "        except OSError:\n"
        "            pass  # a home that cannot be written; the cache saves a second of ssh\n",
        "compute nodes may have no home, or one that cannot be written",
    ),
    Patch(
        _LAUNCH,
        "    _run(args)\n\n\nif __name__ == '__main__':",
        "    os.environ.setdefault('HOME', os.path.expanduser('~') if os.path.expanduser('~') != '~' else '/tmp')\n"
        "    try:\n"
        "        _run(args)\n"
        "    except Exception as error:\n"
        "        if args.verbose:\n"
        "            raise\n"
        "        sys.exit('error: horovodrun: ' + ' '.join(str(error).split()))\n\n\n"
        "if __name__ == '__main__':",
        "one line instead of a traceback",
    ),
    Patch(
        _LAUNCH,
        "argparse.ArgumentParser(description='Horovod Runner')",
        "argparse.ArgumentParser(description='Horovod Runner', allow_abbrev=False)",
        "an option of the command, --timeline, was taken for an abbreviation",
    ),
    # Sockets listen on the network of the job alone.
    Patch(
        "horovod/runner/util/network.py",
        "def find_port(server_factory):",
        "def find_port(server_factory, ip=''):",
        "an address to listen on",
    ),
    Patch("horovod/runner/util/network.py", "addr = ('', port)", "addr = (ip, port)", "as above"),
    Patch(
        _HTTP,
        "def start(self, handler_cls=RendezvousHandler):",
        "def start(self, handler_cls=RendezvousHandler, ip=''):",
        "as above",
    ),
    Patch(
        _HTTP,
        "addr, handler_cls, self._verbose))\n",
        "addr, handler_cls, self._verbose), ip)\n",
        "as above",
    ),
    Patch(_GLOO, "rendezvous.start()", "rendezvous.start(ip=server_ip)", "anybody could write to the rendezvous store"),
    Patch(_GLOO, "    global_rendezv_port = rendezvous.start(handler)\n", "", "the address is known a little later"),
    Patch(
        _GLOO,
        "    server_ip = network.get_driver_ip(nics)\n    run_func_server = None\n",
        "    server_ip = network.get_driver_ip(nics)\n"
        "    global_rendezv_port = rendezvous.start(handler, server_ip)\n"
        "    run_func_server = None\n",
        "as above",
    ),
    Patch(
        _NETWORK,
        "        self._server, _ = find_port(\n"
        "            lambda addr: socketserver.ThreadingTCPServer(\n"
        "                addr, self._make_handler()))\n",
        "        names = [nics] if isinstance(nics, str) else list(nics or ())\n"
        "        ips = [a.address for a in psutil.net_if_addrs().get(names[0], ()) if a.family == socket.AF_INET] if names else []\n"
        "        self._server, _ = find_port(\n"
        "            lambda addr: socketserver.ThreadingTCPServer(\n"
        "                addr, self._make_handler()), ips[0] if len(names) == 1 and len(ips) == 1 else '')\n",
        "where one interface is named",
    ),
    Patch(
        _GLOO,
        "            local_command = quote('cd {pwd} > /dev/null 2>&1 ; {command}'\n"
        "                                  .format(pwd=os.getcwd(), command=command))\n",
        "            local_command = quote(for_any_shell('cd {pwd} > /dev/null 2>&1 ; {command}'\n"
        "                                  .format(pwd=quote(os.getcwd()), command=command)))\n",
        "the login shell over there may be csh, which knows no 2>&1",
    ),
    Patch(
        _GLOO,
        "from horovod.runner.util.remote import get_remote_command\n",
        "from horovod.runner.util.remote import for_any_shell, get_remote_command\n",
        "as above",
    ),
    Patch(
        "horovod/runner/util/remote.py",
        "def get_ssh_command(",
        _FOR_ANY_SHELL,
        "as above",
    ),
    # Hosts that vanish, and elastic training.
    Patch(
        "horovod/runner/util/remote.py",
        "SSH_COMMAND_PREFIX = 'ssh -o",
        "SSH_COMMAND_PREFIX = 'ssh -o ServerAliveInterval=5 -o ServerAliveCountMax=3 -o",
        "ssh would wait for hours for a host that has vanished",
    ),
    Patch(
        _GLOO,
        _GLOO_ELASTIC_RAISE,
        "            if exit_code != 0 and not settings.run_func_mode:\n"
        "                sys.exit(exit_code)\n" + _GLOO_ELASTIC_RAISE,
        "the exit code of the first rank that failed, no traceback of the launcher",
    ),
    Patch(
        "horovod/common/operations.cc",
        "    horovod_global.initialization_done = false;\n    horovod_global.background_thread =",
        "    horovod_global.initialization_done = false;\n    horovod_global.initialization_failed = false;\n"
        "    horovod_global.background_thread =",
        "another host may vanish while ranks find each other anew: they try again",
    ),
    Patch(
        "horovod/runner/elastic/driver.py",
        "self._notify_workers_host_changes(self._host_manager.current_hosts, update_res)",
        "threading.Thread(target=self._notify_workers_host_changes, daemon=True,\n"
        "                                     args=(self._host_manager.current_hosts, update_res)).start()",
        "rank 0's host may be the one that has vanished: the driver tried to reach it for a minute, and held a lock",
    ),
    Patch(
        "horovod/runner/elastic/rendezvous.py",
        "            driver.record_ready(host, local_rank)\n",
        "            if driver.has_rank_assignment(host, local_rank):\n"
        "                driver.record_ready(host, local_rank)\n",
        "a worker that was removed and asks again is not one of those that are waited for",
    ),
    Patch(
        _REGISTRATION,
        "import logging\nimport threading\n",
        "import logging\nimport os\nimport sys\nimport threading\n",
        "for a worker that is stopped: it must not stop the others",
    ),
    Patch(
        _REGISTRATION,
        "READY = 'READY'\n",
        "_MISSED_SECONDS = float(os.environ.get('HOROVOD_ELASTIC_MISSED_SECONDS', '60'))\n\nREADY = 'READY'\n",
        "as above",
    ),
    Patch(
        _REGISTRATION,
        "            rendezvous_id = self._rendezvous_id\n\n        rendezvous_id = self._wait(key, state, rendezvous_id)\n",
        "            rendezvous_id = self._rendezvous_id\n"
        "            if len(self._states) == 1:\n"
        "                timer = threading.Timer(_MISSED_SECONDS, self._end_missed_workers, (rendezvous_id,))\n"
        "                timer.daemon = True\n"
        "                timer.start()\n\n"
        "        rendezvous_id = self._wait(key, state, rendezvous_id)\n",
        "as above",
    ),
    Patch(
        _REGISTRATION,
        "    def _wait(self, key, state, rendezvous_id):\n",
        _MISSED_WORKERS,
        "as above",
    ),
    Patch(
        "horovod/runner/util/cache.py",
        "        with open(self._cache_file, 'wb') as cf:\n"
        "            cloudpickle.dump(content, cf, protocol=self._pickle_protocol)\n",
        "        temporary = '{}.{}'.format(self._cache_file, os.getpid())\n"
        "        with open(temporary, 'wb') as cf:\n"
        "            cloudpickle.dump(content, cf, protocol=self._pickle_protocol)\n"
        "        os.replace(temporary, self._cache_file)\n",
        "two horovodruns at once must not read half a file",
    ),
    Patch(
        "horovod/runner/util/cache.py",
        "            self._dump(self._content)\n        finally:\n",
        "            self._dump(self._content)\n        except OSError:\n            pass\n        finally:\n",
        "a disk that is full",
    ),
)


class PatchError(Exception):
    """A text that a patch replaces is not there exactly once."""


def cxx_standard(torch_version: str) -> int:
    """C++ standard that the headers of this torch need."""
    major, minor = (int(part) for part in torch_version.split(".")[:2])
    return 20 if (major, minor) >= (2, 14) else 17


def apply_patches(root: pathlib.Path, torch_version: str) -> None:
    """Change Horovod's sources under `root`. Raises PatchError, and leaves the file alone, when a text is not found."""
    for patch in PATCHES:
        path = root / patch.file
        text = path.read_text()
        if text.count(patch.old) != 1:
            raise PatchError(
                f"{patch.file} of Horovod {VERSION} holds {patch.old.splitlines()[0].strip()!r} {text.count(patch.old)} "
                f"times, not once ({patch.why})"
            )
        new = patch.new.format(cxx=cxx_standard(torch_version)) if path.name == "CMakeLists.txt" else patch.new
        path.write_text(text.replace(patch.old, new))


def patch_hash() -> str:
    """Eight hex digits that change with the changes that are made to Horovod."""
    return hashlib.sha256(repr((VERSION, HEADERS, PATCHES)).encode()).hexdigest()[:8]


@dataclasses.dataclass(frozen=True)
class Target:
    """All that a built Horovod depends on. A wheel fits where all of it is the same."""

    python: str  # cache tag of the interpreter, "cpython-311"
    torch: str  # version with its local part, "2.13.0+cu130"
    cxx11_abi: bool
    mpi: str  # kind, name and version, "wheel Open MPI 5.0.11"
    mpi_libraries: str = ""  # folder of the machine's libmpi, where it is known
    cuda: str = ""  # version of nvcc; empty: a build without CUDA
    nccl: str = ""  # version of the NCCL header
    compiler: str = ""  # first line of c++ --version
    machine: str = ""  # architecture, C library and vector extensions


def key(target: Target) -> str:
    """Eight hex digits that change with anything in `target` and with the patches."""
    text = repr((dataclasses.astuple(target), patch_hash()))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def local_version(target: Target) -> str:
    """Local part of the version of our wheel: tells it from others' Horovod and says which patches it has."""
    return f"alexnet.p{patch_hash()}.k{key(target)}"


def machine_id() -> str:
    """Architecture, C library and the vector extensions that Horovod's build asks the compiler for."""
    try:
        words = set(pathlib.Path("/proc/cpuinfo").read_text().split())
    except OSError:
        words = set()
    extensions = " ".join(name for name in ("avx", "fma", "f16c") if name in words)
    return f"{platform.machine()} {' '.join(platform.libc_ver())} {extensions}"


def cached_wheel(cache: pathlib.Path, target: Target) -> pathlib.Path | None:
    """The wheel for `target` in the cache, or None."""
    found = sorted((cache / "wheels" / key(target)).glob("horovod-*.whl"))
    return found[0] if found else None


def jobs() -> int:
    """Compiler processes at once: the cores that this process may use, and memory for each (torch's headers take 2 GiB)."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(len(os.sched_getaffinity(0)), int(memory / 2.5), 16))


def build_environment(target: Target, tools: pathlib.Path, cuda_home: str, nccl_home: str, cuda_arch: str) -> dict:
    """Environment variables of the build. `tools` is the folder that BUILD_TOOLS were installed into."""
    rpath = ["$ORIGIN/../../torch/lib", "$ORIGIN/../../nvidia/nccl/lib"]  # from site-packages/horovod/torch
    if target.mpi.startswith("wheel"):
        rpath.append("$ORIGIN/../../../..")  # PyPI's libmpi lies in the lib folder of the environment
    elif target.mpi_libraries:
        rpath.append(target.mpi_libraries)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HOROVOD_", "PIP_TARGET"))}
    env |= {
        "HOROVOD_WITH_MPI": "1",
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_LOCAL_VERSION": local_version(target),
        "HOROVOD_RPATH": ";".join(rpath),
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # CMake 4 refuses the projects in third_party otherwise
        "CXXFLAGS": " ".join([os.environ.get("CXXFLAGS", "")] + [f"-include {name}" for name in HEADERS]).strip(),
        "LDFLAGS": f"{os.environ.get('LDFLAGS', '')} -s".strip(),  # -s: no debug symbols, 1 MB instead of 60
        "MAKEFLAGS": f"-j{jobs()}",
        "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs()),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(tools), os.environ.get("PYTHONPATH")])),
        "PATH": f"{tools / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    if not shutil.which("make"):
        env["CMAKE_GENERATOR"] = "Ninja"
    if target.cuda:
        env |= {
            "HOROVOD_GPU_OPERATIONS": "NCCL",
            "HOROVOD_NCCL_LINK": "SHARED",
            # The nvcc on PATH may be a script elsewhere; CMake and torch look for the toolkit beside it.
            "CUDA_HOME": cuda_home,
            "HOROVOD_CUDA_HOME": cuda_home,
            "CUDACXX": f"{cuda_home}/bin/nvcc",
            "PATH": f"{cuda_home}/bin{os.pathsep}{env['PATH']}",
        }
        if nccl_home:
            env["HOROVOD_NCCL_HOME"] = nccl_home
        if cuda_arch:
            env["HOROVOD_BUILD_CUDA_CC_LIST"] = cuda_arch
    return env


def nccl_folder(source: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """A folder with `include` and `lib/libnccl.so`, made of an NCCL that has libnccl.so.2 only (pip's)."""
    (folder / "lib").mkdir(parents=True)
    (folder / "include").symlink_to(source / "include")
    (folder / "lib" / "libnccl.so").symlink_to(source / "lib" / "libnccl.so.2")
    return folder


def keep(file: pathlib.Path, place: pathlib.Path) -> None:
    """Copy a file, whole or not at all: it gets its name when all of it is there."""
    partial = place.with_name(f".{place.name}.{os.getpid()}")
    shutil.copyfile(file, partial)
    os.replace(partial, place)


def unpack(sdist: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Unpack Horovod's sources into `folder`; returns where they are."""
    safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4 and later
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **safely)
    return folder / f"horovod-{VERSION}"


def build(
    target: Target,
    cache: pathlib.Path,
    run: Callable[..., None],
    *,
    cuda_home: str = "",
    nccl_home: str = "",
    cuda_arch: str = "",
) -> pathlib.Path:
    """Build the wheel for `target` and put it into `cache`. Returns its path.

    `run(command, what, **popen)` runs one command into the log and raises when it fails. `cuda_home` and `nccl_home` are
    the folders of the CUDA toolkit and of NCCL, `cuda_arch` the compute capabilities, "80,90".
    """
    python = sys.executable
    with tempfile.TemporaryDirectory(prefix="horovod-build-") as folder:
        work = pathlib.Path(folder)
        pip = [python, "-m", "pip", "--disable-pip-version-check"]
        tools = work / "tools"
        missing = [] if shutil.which("cmake") and shutil.which("make") else CMAKE_TOOLS
        run([*pip, "install", "--target", str(tools), *BUILD_TOOLS, *missing], "fetch the build tools")
        sdist = cache / f"horovod-{VERSION}.tar.gz"
        if not sdist.exists():
            run(
                [*pip, "download", "--no-binary", "horovod", "--no-deps", "--no-build-isolation", "--dest", str(work)]
                + [f"horovod=={VERSION}"],
                "fetch Horovod's sources",
                env=os.environ | {"PYTHONPATH": str(tools)},
            )
            keep(work / sdist.name, sdist)
        source = unpack(sdist, work)
        apply_patches(source, target.torch)
        if nccl_home and not list(pathlib.Path(nccl_home).glob("lib*/**/libnccl.so")):
            nccl_home = str(nccl_folder(pathlib.Path(nccl_home), work / "nccl"))
        run(
            [python, "setup.py", "bdist_wheel", "--dist-dir", str(work / "dist")],
            "compile Horovod",
            cwd=source,
            env=build_environment(target, tools, cuda_home, nccl_home, cuda_arch),
        )
        wheel = next((work / "dist").glob("horovod-*.whl"))
        home = cache / "wheels" / key(target)
        home.mkdir(parents=True, exist_ok=True)
        (home / "target.txt").write_text(f"{target}\n")
        keep(wheel, home / wheel.name)
        return home / wheel.name
