# SPDX-License-Identifier: BSD-3-Clause
"""What bench.py and chaos.py share: namespaces, an engine, the module's command line, /proc.

run_apart() runs a function as root in new namespaces (processes, mounts, network). Engine is a
dockerd of its own in them, which can be killed like anything else there: no other engine, container
or process is touched, and nothing is left behind.
"""

import collections
import contextlib
import http.client
import json
import os
import pathlib
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

MODULE = pathlib.Path(__file__).resolve().parent.parent / 'broapt_compose.py'
WORK = 'BROAPT_LAB_WORK'  # variable: the folder for everything; set inside the namespaces only


class Failure(Exception):
    """A broken promise: what was expected, and what was seen."""


# Commands and waiting


def call(*command: str, check: bool = True, **options: Any) -> str:
    """Run a command and return its output; unless it may fail, its failure is a Failure."""
    streams: Dict[str, Any] = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    done = subprocess.run(command, timeout=300, check=False, **{**streams, **options})
    if check and done.returncode:
        seen = f'exit code {done.returncode}: {str(done.stderr).strip()[-500:]}'
        raise Failure(f'`{shlex.join(command)}` succeeds', seen)
    return str(done.stdout).strip()


def until(
    done: Callable[[], Any],
    seconds: float,
    expected: str,
    seen: object = 'not so',
    pause: float = 0.02,
) -> None:
    """Look every *pause* seconds until it is done; if that takes too long, it is a Failure."""
    began = time.monotonic()
    while not done():
        if time.monotonic() - began > seconds:
            raise Failure(f'{expected} within {seconds:.1f} s', seen)
        time.sleep(pause)


# Namespaces


def run_apart(perform: Callable[[pathlib.Path], int]) -> int:
    """Run this program again in new namespaces, there to call perform(folder); its exit code."""
    if os.environ.get(WORK):
        return be_first_process(perform, pathlib.Path(os.environ[WORK]))
    if os.geteuid():
        sys.exit('needs root, for namespaces and an engine of its own')
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program inside handles it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    work = tempfile.mkdtemp(prefix='lab-')
    apart = ['unshare', '--mount', '--net', '--pid', '--fork', '--kill-child', '--mount-proc']
    quiet: Dict[str, Any] = {'stdin': subprocess.DEVNULL, 'check': False}
    try:
        call('docker', 'save', '--output', f'{work}/busybox.tar', 'busybox')
        command = [*apart, sys.executable, *sys.argv]
        return subprocess.run(command, env={**os.environ, WORK: work}, **quiet).returncode
    finally:
        shutil.rmtree(work, ignore_errors=True)


def be_first_process(perform: Callable[[pathlib.Path], int], work: pathlib.Path) -> int:
    """Leave the work to a child, and bury whoever is orphaned."""
    call('mount', '-t', 'tmpfs', 'tmpfs', '/run')  # no containerd but the engine's own
    call('ip', 'link', 'set', 'lo', 'up')
    for name in ('DOCKER_CONTEXT', 'PYTHONDONTWRITEBYTECODE', WORK):
        os.environ.pop(name, None)
    os.environ['PYTHONPYCACHEPREFIX'] = str(work / 'pycache')  # never beside the module
    child = os.fork()
    if not child:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return perform(work)
        except KeyboardInterrupt:
            print('interrupted')
            return 1
    while True:
        pid, status = os.wait()
        if pid == child:
            return 1 if status else 0


# The engine


class Connection(http.client.HTTPConnection):
    """HTTP over a unix socket, or over any socket that is connected already."""

    def __init__(self, address: Any, timeout: Optional[float] = 60.0) -> None:
        super().__init__('localhost', timeout=timeout)
        self.address = address

    def connect(self) -> None:
        """Connect; http.client calls this at the first request."""
        if isinstance(self.address, socket.socket):
            self.sock = self.address
        else:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(self.timeout)
            self.sock.connect(str(self.address))


class Box(NamedTuple):
    """A container."""

    id: str
    project: str
    service: str
    number: str
    oneoff: bool
    state: str
    exit_code: int
    health: str
    started: str  # time
    network_mode: str
    pid_mode: str
    pid: int
    error: str  # of its last start

    @property
    def label(self) -> str:
        return f'{self.service}-{self.number}'


def read_box(found: Any) -> Box:
    """What the engine tells about a container, as a record."""
    labels, state = collections.defaultdict(str, found['Config']['Labels'] or {}), found['State']
    keys = ('project', 'service', 'container-number', 'oneoff')
    project, service, number, oneoff = (labels[f'com.docker.compose.{key}'] for key in keys)
    health, host = state.get('Health', {}).get('Status', ''), found['HostConfig']
    facts = (state['Status'], state['ExitCode'], health, state['StartedAt'])
    modes = (host['NetworkMode'], host['PidMode'], state['Pid'], state['Error'])
    return Box(found['Id'], project, service, number, oneoff == 'True', *facts, *modes)


class Engine:
    """A dockerd of its own with the image busybox, which DOCKER_HOST names to all commands."""

    def __init__(self, work: pathlib.Path, live: bool = False) -> None:
        self.image, self.work, self.live = work / 'busybox.tar', work / 'engine', live
        self.socket = str(self.work / 'socket')
        self.process: Optional['subprocess.Popen[bytes]'] = None

    def __enter__(self) -> 'Engine':
        self.work.mkdir()
        os.environ['DOCKER_HOST'] = f'unix://{self.socket}'
        try:
            self.start()
            call('docker', 'load', '--input', str(self.image))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the containers: their control groups would outlive the namespaces."""
        if self.process is None:
            return
        with contextlib.suppress(Exception):
            self.process.send_signal(signal.SIGCONT)
            if self.process.poll() is not None:
                self.start()
            call(
                'docker',
                'rm',
                '--force',
                '--volumes',
                *[box.id for box in self.look()],
                check=False,
            )
        self.end(signal.SIGTERM)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        folders = {name: str(self.work / name) for name in ('data-root', 'exec-root', 'pidfile')}
        with contextlib.suppress(FileNotFoundError):
            os.unlink(
                folders['pidfile']
            )  # or a process that bears this number by now would hinder it
        command = ['dockerd', '-H', f'unix://{self.socket}', '--iptables=false']
        command += [f'--{name}={folder}' for name, folder in folders.items()]
        command += ['--live-restore'] * self.live
        with (self.work / 'log').open('a') as log:
            streams: Dict[str, Any] = {'stdin': subprocess.DEVNULL, 'stdout': log, 'stderr': log}
            self.process = subprocess.Popen(command, start_new_session=True, **streams)
        until(self.answers, 90, 'dockerd answers')

    def answers(self) -> bool:
        """Whether it can be asked."""
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            return bool(self.get('/info'))
        return False

    def is_dead(self) -> bool:
        """Whether it has ended."""
        return self.process is not None and self.process.poll() is not None

    def end(self, signum: int) -> None:
        """End it with this signal."""
        if self.process is not None:
            self.process.send_signal(signum)
            self.process.wait(90)

    def request(self, method: str, path: str, body: object = None) -> Tuple[int, Any]:
        """The status of its answer, and the answer."""
        text = None if body is None else json.dumps(body)
        with contextlib.closing(Connection(self.socket)) as connection:
            connection.request(method, path, text, {'Content-Type': 'application/json'})
            response = connection.getresponse()
            answer = response.read()
            return response.status, json.loads(answer) if answer[:1] in (b'{', b'[') else None

    def get(self, path: str) -> Any:
        """What it answers; None if there is no such thing."""
        status, answer = self.request('GET', path)
        return answer if status == 200 else None

    def do(self, method: str, path: str, *allowed: int, body: object = None) -> Any:
        """Have something done; the answer. An error but the allowed ones is a Failure."""
        status, answer = self.request(method, path, body)
        if status >= 400 and status not in allowed:
            raise Failure(f'{method} {path} succeeds', f'{status} {answer}')
        return answer

    def look(self, project: str = '') -> List[Box]:
        """All containers, or those of a project."""
        boxes = []
        for entry in self.get('/containers/json?all=1') or ():
            found = self.get(f'/containers/{entry["Id"]}/json')
            if found is not None:
                boxes.append(read_box(found))
        return [box for box in boxes if project in ('', box.project)]


# Processes


def module_command(module: pathlib.Path, *arguments: str) -> List[str]:
    """The module's command line, without what others have put into site-packages."""
    return [sys.executable, '-S', '-m', module.stem, *arguments]


def module_environment(module: pathlib.Path, **variables: str) -> Dict[str, str]:
    """The environment in which it is found."""
    return {**os.environ, 'PYTHONPATH': str(module.parent), 'PYTHONUNBUFFERED': '1', **variables}


class Process(NamedTuple):
    """One line of `ps`, so to speak."""

    pid: int
    parent: int
    state: str
    waited: float  # CPU seconds of its children that have ended
    command: str


def list_processes() -> List[Process]:
    """All processes of this namespace."""
    processes = []
    for folder in pathlib.Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):  # gone by now
            state, parent, *fields = (folder / 'stat').read_text().rpartition(') ')[2].split()
            waited = (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')
            command = (folder / 'cmdline').read_bytes().decode(errors='replace').replace('\0', ' ')
            processes.append(Process(int(folder.name), int(parent), state, waited, command))
    return processes


def find_tree(root: int) -> List[Process]:
    """A process and all that descend from it, the nearest first."""
    processes = list_processes()
    tree = [process for process in processes if process.pid == root]
    for process in tree:
        tree += [child for child in processes if child.parent == process.pid]
    return tree


def cpu_seconds(root: int) -> float:
    """CPU time of a process and all its descendants; taken while none comes or goes."""
    while True:
        with contextlib.suppress(OSError):
            tree = find_tree(root)
            # What clock_getcpuclockid(3) returns: to the nanosecond, where /proc counts hundredths.
            own = sum(time.clock_gettime(~process.pid << 3 | 2) for process in tree)
            if [process.pid for process in find_tree(root)] == [process.pid for process in tree]:
                return own + sum(process.waited for process in tree)


def memory(pids: Sequence[int], *fields: str) -> float:
    """MiB that processes hold together: the sum of fields of smaps_rollup, such as Pss."""
    total = 0
    for pid in pids:
        for line in pathlib.Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines():
            if line.partition(':')[0] in fields:
                total += int(line.split()[1])
    return total / 1024
