#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""Let random faults befall a stack that broapt_compose.py watches on a real engine, and check its promises after each.

    .ci/chaos.py --seed 7 --minutes 30

Needs root, dockerd, unshare (util-linux), an image named busybox, and one or both generations of Compose (.ci/engine sets
all that up). It runs in namespaces of its own (processes, mounts, network) with a dockerd of its own in them, which can be
killed like anything else there: no other engine, container or process is ever touched, and nothing is left behind.

The seed decides on the faults, their targets, the pauses, the kinds of watcher and the generations of Compose. After each
fault all that should run must run in time, with as many containers as before, and nothing else may have been touched: not
the neighbours, not what is labelled broapt.watch=false, not the finished one-shot, not the project of a bystander. The
watchdog must not leave processes behind, nor grow. At the first broken promise the run ends with exit code 1 and says
what was expected and seen, with the processes of the watchdog and the end of its log. The same seed and number of minutes then
give the same faults again, in the same order, as far as two runs take the same time: at half-time the watchdog is changed.
"""

import argparse
import collections
import contextlib
import http.client
import json
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial
from typing import Any, Callable, Dict, FrozenSet, Iterator, List, NamedTuple, Optional, Tuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
SETTLE, INTERVAL, TIMEOUT = 0.5, 5.0, 8.0  # what the watchdog is told, seconds
SLACK = 10.0  # what two busy cores may take on top of what is promised, seconds
STEADY = 10.5  # of running, in seconds; then the watchdog has forgotten the last repairs
MEMORY_SLACK, FILE_SLACK = 8.0, 3  # MiB and open files that a watchdog may gain from its third fault on
STREAM_LIFE = 80.0  # seconds: a minute for an event stream whose watcher was killed, and some for a stopped engine
SCALE = {'web': 1, 'pool': 2, 'sick': 1, 'share': 1, 'flaky': 1, 'late': 1, 'job': 1}  # what the watchdog keeps up
RUN = 'command: [sh, -c, "trap exit TERM; while :; do sleep 1000 & wait; done"]'
STACK = f"""
services:
  web: {{image: busybox, {RUN}}}
  pool: {{image: busybox, {RUN}, scale: 2}}
  sick:
    image: busybox
    command: [sh, -c, "trap exit TERM; rm -f /tmp/ill; while :; do sleep 1000 & wait; done"]
    healthcheck: {{test: [CMD, test, "!", -e, /tmp/ill], interval: 1s, timeout: 30s, retries: 2}}
  share: {{image: busybox, {RUN}, network_mode: "service:web"}}
  flaky:
    image: busybox
    command: [sh, -c, "[ ! -e /data/loop ] || exit 3; trap exit TERM; while :; do sleep 1000 & wait; done"]
    volumes: ["./data:/data"]
  job: {{image: busybox, command: [sh, -c, "echo ran >>/data/job"], volumes: ["./data:/data"]}}
  late:
    image: busybox
    {RUN}
    restart: unless-stopped
    depends_on: {{job: {{condition: service_completed_successfully}}}}
  alone: {{image: busybox, {RUN}, labels: {{broapt.watch: "false"}}}}
"""
WRAPPER = """#!/bin/sh
read -r mode <{mode}
case $mode in
hang) exec sleep 1000;;
fail) echo 'error: out of luck' >&2; exit 1;;
garbage) echo '["half a line'; head -c 3000 /dev/urandom; exit 0;;
flood) head -c 20000000 /dev/zero | tr '\\0' x >&2; exit 1;;
esac
exec {command} "$@"
"""


class Failure(Exception):
    """A broken promise: what was expected, and what was seen."""


class Box(NamedTuple):
    """A container of the private engine."""

    id: str
    project: str
    service: str
    number: str
    oneoff: bool
    state: str
    exit_code: int
    health: str
    started: str  # time
    network: str  # mode
    pid: int

    @property
    def label(self) -> str:
        return f'{self.service}-{self.number}'


class Process(NamedTuple):
    """One line of `ps`, so to speak."""

    pid: int
    parent: int
    state: str
    age: float  # seconds
    command: str


class Outcome(NamedTuple):
    """What a fault has done, and what has to follow from it. All that is not named must stay as it was."""

    target: str
    restarted: FrozenSet[str] = frozenset()  # ids that must run anew
    replaced: FrozenSet[str] = frozenset()  # ids that must be gone
    either: FrozenSet[str] = frozenset()  # ids that may do both, or neither
    jobs: int = 0  # how often the one-shot may run again
    slack: float = 0.0  # seconds more until all is well
    engine: bool = False  # it stopped the containers of the bystander, too


class Usage(NamedTuple):
    """What a watchdog holds while it waits."""

    processes: int
    files: int
    memory: float  # MiB, proportional share


def call(*command: str, check: bool = True, **options: Any) -> str:
    """Run a command by hand and return its output; its failure is the watchdog's fault."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=120, check=False, **options)
    if check and done.returncode:
        raise Failure(f'`{shlex.join(command)}` succeeds', f'exit code {done.returncode}: {done.stderr.strip()[-500:]}')
    return str(done.stdout).strip()


def until(done: Callable[[], Any], seconds: float, expected: str, seen: object = 'not so') -> None:
    """Look until it is done; if that takes too long, it is a Failure."""
    began = time.monotonic()
    while not done():
        if time.monotonic() - began > seconds:
            raise Failure(f'{expected} within {seconds:.1f} s', seen)
        time.sleep(0.05)


def list_processes() -> List[Process]:
    """All processes of this namespace."""
    uptime, processes = float(pathlib.Path('/proc/uptime').read_text().split()[0]), []
    for folder in pathlib.Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):  # gone by now
            state, parent, *fields = (folder / 'stat').read_text().rpartition(') ')[2].split()
            age = uptime - int(fields[17]) / os.sysconf('SC_CLK_TCK')
            command = (folder / 'cmdline').read_bytes().decode(errors='replace').replace('\0', ' ')
            processes.append(Process(int(folder.name), int(parent), state, age, command))
    return processes


def find_tree(root: int) -> List[Process]:
    """A process and all that descend from it."""
    processes = list_processes()
    tree = [process for process in processes if process.pid == root]
    for process in tree:
        tree += [child for child in processes if child.parent == process.pid]
    return tree


def measure(processes: List[Process]) -> Usage:
    """What these processes hold together."""
    folders = [pathlib.Path(f'/proc/{process.pid}') for process in processes]
    files = [len(os.listdir(folder / 'fd')) for folder in folders]
    shares = [int((folder / 'smaps_rollup').read_text().split('\nPss:')[1].split()[0]) / 1024 for folder in folders]
    return Usage(len(processes), sum(files), sum(shares))


def find_network(box: Box) -> str:
    """Return what tells the network that a container really has from others."""
    try:
        return os.readlink(f'/proc/{box.pid}/ns/net')
    except OSError:
        return f'none of {box.id}'


class Connection(http.client.HTTPConnection):
    """To the engine's socket."""

    def __init__(self, path: str) -> None:
        super().__init__('localhost', timeout=30)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(self.path)


class Engine:
    """A dockerd of its own."""

    def __init__(self, work: pathlib.Path) -> None:
        self.work, self.socket, self.live = work, str(work / 'socket'), False
        self.process: Optional['subprocess.Popen[bytes]'] = None

    def start(self, live: bool) -> None:
        """Start it, with or without live-restore, and wait until it answers."""
        self.live, pidfile = live, self.work / 'pid'
        if pidfile.exists():
            pidfile.unlink()  # or a process that bears this number by now would hinder it
        command = ['dockerd', '-H', f'unix://{self.socket}', '--iptables=false', '--pidfile', str(pidfile)]
        command += ['--data-root', str(self.work / 'lib'), '--exec-root', str(self.work / 'exec'), *['--live-restore'] * live]
        with (self.work / 'dockerd.log').open('a') as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        until(self.answers, 90, 'dockerd answers')

    def answers(self) -> bool:
        """Whether it can be asked."""
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            return bool(self.get('/info'))
        return False

    def end(self, signum: int) -> None:
        """End it with this signal."""
        if self.process is not None:
            self.process.send_signal(signum)
            self.process.wait(90)

    def get(self, path: str) -> Any:
        """What its API answers; None if there is no such thing."""
        with contextlib.closing(Connection(self.socket)) as connection:
            connection.request('GET', path)
            response = connection.getresponse()
            return json.loads(response.read()) if response.status == 200 else None

    def look(self) -> List[Box]:
        """All containers."""
        boxes = []
        for entry in self.get('/containers/json?all=1') or ():
            found = self.get(f'/containers/{entry["Id"]}/json')
            if found is not None:
                labels, state = collections.defaultdict(str, found['Config']['Labels'] or {}), found['State']
                keys = ('project', 'service', 'container-number', 'oneoff')
                project, service, number, oneoff = (labels[f'com.docker.compose.{key}'] for key in keys)
                health, network = state.get('Health', {}).get('Status', ''), found['HostConfig']['NetworkMode']
                facts = (state['Status'], state['ExitCode'], health, state['StartedAt'], network, state['Pid'])
                boxes.append(Box(found['Id'], project, service, number, oneoff == 'True', *facts))
        return boxes


class Chaos:
    """One run."""

    def __init__(self, work: pathlib.Path, seed: int, minutes: float) -> None:
        self.random, self.work, self.seconds, self.where = random.Random(seed), work, minutes * 60, 'set-up'
        self.engine, self.project = Engine(work / 'engine'), 'chaos'
        self.folder, self.log, self.mode = work / self.project, work / 'log' / 'watchdog', work / 'mode'
        self.host: Optional['subprocess.Popen[bytes]'] = None
        self.watcher, self.compose_command = 'thread', ['docker', 'compose']
        self.jobs, self.usages, self.growth = 0, list[Usage](), list[str]()
        self.strikes: Dict[str, int] = collections.Counter()  # service -> faults in a row
        self.last: Dict[str, Box] = {}  # as it was after the last fault
        self.calm: Dict[str, float] = {}  # service -> when it was last well again
        self.times: Dict[str, List[float]] = collections.defaultdict(list)  # fault -> recovery times

    # -- the stage

    def set_up(self) -> None:
        """Start the engine, and put the bystander and the wrappers of the watchdog's commands in place."""
        for folder in (self.folder / 'data', self.engine.work, self.log.parent, self.work / 'bin'):
            folder.mkdir(parents=True)
        call('mount', '-t', 'tmpfs', 'tmpfs', '/run')  # no containerd but the engine's own; the shims' sockets
        call('mount', '-t', 'tmpfs', '-o', 'size=8m', 'tmpfs', str(self.log.parent))  # can be filled
        (self.folder / 'compose.yml').write_text(STACK)
        commands = [command for command in (['docker', 'compose'], ['docker-compose']) if shutil.which(command[0])]
        self.generations = [command for command in commands if call(*command, 'version', check=False)]
        self.set_mode('work')
        for name in {command[0] for command in [['docker'], *self.generations]}:
            wrapper = self.work / 'bin' / name
            wrapper.write_text(WRAPPER.format(mode=self.mode, command=shutil.which(name)))
            wrapper.chmod(0o755)
        os.environ['DOCKER_HOST'] = f'unix://{self.engine.socket}'
        self.engine.start(self.random.random() < 0.5)
        call('docker', 'load', '--input', str(self.work / 'busybox.tar'))
        labels = ['--label', 'com.docker.compose.project=bystander', '--label', 'com.docker.compose.service=web']
        call('docker', 'network', 'create', *labels[:2], 'bystander')
        call('docker', 'volume', 'create', *labels[:2], 'bystander')
        options = ['--detach', *labels, '--network', 'bystander', '--volume', 'bystander:/data', '--volume', '/anonymous']
        self.runner = call(
            'docker', 'run', '--restart=always', '--stop-timeout=1', '--name', 'running', *options, 'busybox', 'sleep', '99999'
        )
        call('docker', 'run', '--name', 'stopped', *options, 'busybox', 'false')
        call('docker', 'commit', 'stopped')  # a dangling image
        until(lambda: 'exited' in [box.state for box in self.engine.look()], 10, 'the bystander is ready')
        self.bystander = self.see_bystander()

    def tear_down(self) -> None:
        """Leave nothing that would outlive the namespaces, such as the containers' control groups."""
        if self.host is not None:
            self.host.kill()
        if self.engine.process is not None:
            with contextlib.suppress(Exception):
                self.engine.process.send_signal(signal.SIGCONT)
                if self.engine.process.poll() is not None:
                    self.engine.start(False)
                call('docker', 'rm', '--force', '--volumes', *[box.id for box in self.engine.look()])
                self.engine.end(signal.SIGTERM)

    def see_bystander(self) -> Dict[str, Any]:
        """All that belongs to the bystander."""
        boxes = [box for box in self.engine.look() if box.project == 'bystander']
        seen: Dict[str, Any] = {box.id: (box.state, box.started, box.exit_code) for box in boxes}
        seen['networks'] = {network['Id'] for network in self.engine.get('/networks') if network['Name'] == 'bystander'}
        seen['volumes'] = {volume['Name'] for volume in self.engine.get('/volumes')['Volumes']}
        seen['images'] = {image['Id'] for image in self.engine.get('/images/json')}
        return seen

    def compose(self, *arguments: str, check: bool = True) -> str:
        """Run Compose by hand."""
        return call(*self.compose_command, '--file', str(self.folder / 'compose.yml'), *arguments, check=check)

    def look(self) -> List[Box]:
        """The containers of the stack but one-offs."""
        return [box for box in self.engine.look() if box.project == self.project and not box.oneoff]

    def set_mode(self, mode: str) -> None:
        """Tell the commands that the watchdog finds on its PATH how to behave."""
        fresh = self.mode.with_suffix('.new')
        fresh.write_text(mode + '\n')
        fresh.replace(self.mode)

    # -- the watchdog

    def start_host(self) -> None:
        """Start the watchdog and wait until it watches."""
        command = f'-m broapt_compose run --verbose --settle {SETTLE:g} --interval {INTERVAL:g} --timeout {TIMEOUT:g}'.split()
        command += ['--watcher', self.watcher, '--compose-command', shlex.join(self.compose_command)]
        command += ['--file', str(self.folder / 'compose.yml')]
        environment = {**os.environ, 'PATH': f'{self.work / "bin"}:{os.environ["PATH"]}', 'PYTHONUNBUFFERED': '1'}
        begin, jobs = len(self.read_log()), self.count_jobs()
        with self.log.open('a') as log:
            print(f'--- a new watchdog, {self.watcher}, {shlex.join(self.compose_command)}', file=log, flush=True)
            streams: Dict[str, Any] = {'stdin': subprocess.DEVNULL, 'stdout': log, 'stderr': log}
            self.host = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, start_new_session=True, **streams)
        until(lambda: self.check_host_lives() and 'up and watched' in self.read_log()[begin:], 120, 'the stack is up')
        self.wait_until_well(SLACK)
        self.jobs = self.count_jobs()
        if self.jobs - jobs > 1:
            raise Failure('`up` runs the one-shot once', f'{self.jobs - jobs} times')
        self.usages = []

    def end_host(self, *signals: int) -> None:
        """Send the signals one after the other; after the first, the stack must come down, all of it."""
        assert self.host is not None
        self.note_growth()
        for signum in signals:
            self.host.send_signal(signum)
            time.sleep(self.random.uniform(0, 0.5) if len(signals) > 1 else 0)
        until(lambda: self.host and self.host.poll() is not None, 3 * TIMEOUT + SLACK, 'the watchdog ends')
        left = [box.label for box in self.look()]
        networks = [network['Name'] for network in self.engine.get('/networks') if network['Name'].startswith(self.project)]
        if self.host.returncode or left or networks:
            raise Failure('exit code 0, nothing left of the project', f'{self.host.returncode}, left: {left + networks}')
        self.check_log()

    def check_host_lives(self) -> bool:
        """True; a Failure if it has ended by itself."""
        if self.host is None or self.host.poll() is not None:
            raise Failure('the watchdog lives', f'exit code {self.host and self.host.returncode}')
        return True

    def read_log(self) -> str:
        return self.log.read_text(errors='replace') if self.log.exists() else ''

    def check_log(self) -> None:
        """Complain of what may never be in there, and keep it short."""
        text = self.read_log()
        for word in ('Traceback', 'unexpected error'):
            if word in text:
                raise Failure('no exception in the log', word)
        if len(text) > 1 << 20:
            self.log.write_text(text[-1 << 16 :])

    def count_jobs(self) -> int:
        """How often the one-shot has run so far."""
        file = self.folder / 'data' / 'job'
        return len(file.read_text().splitlines()) if file.exists() else 0

    def find_watchers(self) -> List[Process]:
        """The watchdog's own processes, without the commands that it runs."""
        assert self.host is not None
        own = re.compile(' -m broapt_compose | -c from multiprocessing')
        return [process for process in find_tree(self.host.pid) if own.search(process.command)]

    def find_streams(self) -> List[Process]:
        """The event streams of the watchdog that lives now."""
        assert self.host is not None
        return [process for process in find_tree(self.host.pid) if 'docker events ' in process.command]

    def check_idle(self) -> None:
        """Wait until it only waits, with one event stream and no other child, and no more files and memory than before."""
        seen: List[Any] = []
        last: List[Any] = []

        def is_idle() -> bool:
            self.check_host_lives()
            assert self.host is not None
            tree, watchers, streams = find_tree(self.host.pid), self.find_watchers(), self.find_streams()
            known, last[:] = last[:], [(process.pid, process.command) for process in tree]
            try:
                usage, first = measure(watchers), self.usages[2] if len(self.usages) > 2 else None
            except OSError:  # one has just ended
                return False
            seen[:] = [f'{usage}, {first} at first', *(process for process in tree if process not in watchers)]
            if last != known:  # a child that has just been forked looks like a watcher
                return False
            if len(streams) != 1 or len(tree) > len(watchers) + 1 or any(process.state == 'Z' for process in tree):
                return False
            if first and (usage.processes != first.processes or usage.files > first.files + FILE_SLACK):
                return False
            if first and usage.memory > first.memory + MEMORY_SLACK:
                return False
            self.usages.append(usage)
            return True

        until(is_idle, 2 * INTERVAL + TIMEOUT + SLACK, 'the watchdog only waits, and holds no more than at first', seen)
        lost = [process for process in list_processes() if 'docker events ' in process.command and process.age > STREAM_LIFE]
        if lost:
            raise Failure('no event stream outlives its time', f'{lost}')

    def note_growth(self) -> None:
        if len(self.usages) > 3:
            first, last = self.usages[2], self.usages[-1]
            text = '{} watcher, {} faults: {} -> {} processes, {} -> {} files, {:.1f} -> {:.1f} MiB'
            pairs = [value for pair in zip(first, last) for value in pair]
            self.growth.append(text.format(self.watcher, len(self.usages), *pairs))

    # -- the promises

    def find_wrongs(self, boxes: List[Box], before: Dict[str, Box], outcome: Outcome) -> Iterator[str]:
        """What is not, or not yet, as it should be."""
        count, now = collections.Counter(box.service for box in boxes), {box.id: box for box in boxes}
        for service, scale in SCALE.items():
            if count[service] != scale:
                yield f'{service}: {count[service]} instead of {scale} containers'
        web = next((box for box in boxes if box.service == 'web'), None)
        for box in boxes:
            wanted = ('exited', 0, '') if box.service == 'job' else ('running', 0, 'healthy' if box.service == 'sick' else '')
            if box.service != 'alone' and (box.state, box.exit_code, box.health) != wanted:
                yield f'{box.label}: {box.state} ({box.exit_code}) {box.health}'
            if box.service == 'share' and web and (box.network != f'container:{web.id}' or find_network(box) != find_network(web)):
                yield f'{box.label}: not in the network of web'  # also if web runs anew: that makes it a new network
        for ident, old in before.items():
            if ident in outcome.restarted and (ident not in now or now[ident].started == old.started):
                yield f'{old.label}: not started again'
            if ident in outcome.replaced and ident in now:
                yield f'{old.label}: not replaced'

    def find_damage(self, before: Dict[str, Box], outcome: Outcome) -> Iterator[str]:
        """What was touched though it was none of this fault's business."""
        now = {box.id: box for box in self.look()}
        for ident, old in before.items():
            if ident not in outcome.restarted | outcome.replaced | outcome.either:
                if ident not in now or now[ident].started != old.started:
                    yield f'{old.label}: touched'
        jobs = self.count_jobs() - self.jobs
        if not 0 <= jobs <= outcome.jobs:
            yield f'job: ran {jobs} times more'
        for key, value in self.see_bystander().items():
            known = self.bystander.get(key, '')
            if value != known and not (outcome.engine and 'running' in value and 'running' in known):
                yield f'bystander: {key}: {value} instead of {known}'

    def check_damage(self, before: Dict[str, Box], outcome: Outcome, expected: str) -> None:
        damage = list(self.find_damage(before, outcome))
        if damage:
            raise Failure(expected, '; '.join(damage))

    def wait_until_well(self, limit: float, before: Optional[Dict[str, Box]] = None, outcome: Optional[Outcome] = None) -> float:
        """Wait until all that should run does; the seconds it took."""
        began = time.monotonic()
        while True:
            wrongs = list(self.find_wrongs(self.look(), before or {}, outcome or Outcome('')))
            if not wrongs:
                return time.monotonic() - began
            if time.monotonic() - began > limit:
                raise Failure(f'all is well after {limit:.1f} s', '; '.join(wrongs))
            self.check_host_lives()
            time.sleep(0.05)

    def step(self, number: int, name: str, fault: Callable[[], Outcome], began: float) -> None:
        """Let one fault happen and see what follows."""
        self.rest()
        self.wait_until_well(0.0)
        before = {box.id: box for box in self.look()}
        if self.last:
            self.check_damage(self.last, Outcome(''), 'nothing happens between two faults')
        moment = time.monotonic() - began
        outcome = fault()
        concerned = {before[ident].service for ident in outcome.restarted | outcome.replaced | outcome.either}
        for service in concerned:
            self.strikes[service] += 1
        delay = 2.0 ** max((self.strikes[service] for service in concerned), default=0)
        seconds = self.wait_until_well(SETTLE + INTERVAL + SLACK + delay + outcome.slack, before, outcome)
        self.calm.update((service, time.monotonic()) for service in concerned)
        print(f'{number:4} {moment:7.1f} s  {name:<22} {outcome.target:<40} {seconds:6.2f} s', flush=True)
        self.times[name].append(seconds)
        if outcome.engine:
            until(lambda: 'running' in self.see_bystander()[self.runner], 30, 'the bystander runs again')
        self.check_damage(before, outcome, 'all else stays as it was')
        self.jobs, self.bystander = self.count_jobs(), self.see_bystander()
        self.bring_back_alone()
        self.check_idle()
        self.check_log()
        self.last = {box.id: box for box in self.look()}

    def rest(self) -> None:
        """Forget what was long ago, as the watchdog does; wait for that if a service has had too much."""
        for service, strikes in self.strikes.items():
            left = self.calm.get(service, 0.0) + STEADY - time.monotonic()
            if left > 0 and strikes > 2:
                time.sleep(left)
            if left <= 0 or strikes > 2:
                self.strikes[service] = 0

    def bring_back_alone(self) -> None:
        """What the watchdog must leave alone, somebody else has to mend."""
        found = [box for box in self.look() if box.service == 'alone']
        if not found:
            self.compose('up', '--detach', '--no-deps', 'alone')
        elif found[0].state != 'running':
            call('docker', 'unpause' if found[0].state == 'paused' else 'start', found[0].id)

    def pick(self, *services: str) -> Box:
        """A random container of these services, or of any that runs."""
        wanted = services or [service for service in SCALE if service != 'job']
        return self.random.choice(sorted((box for box in self.look() if box.service in wanted), key=lambda box: box.label))

    # -- the faults

    def find_followers(self, box: Box) -> FrozenSet[str]:
        """The ids of a container and of those that share its network, so that they need a new one when it does."""
        return frozenset(other.id for other in self.look() if other.id == box.id or other.network == f'container:{box.id}')

    def by_hand(self, *command: str) -> Outcome:
        """Run a Docker command on a container, after which it has to run anew, but as the same container."""
        box = self.pick()
        followers = self.find_followers(box)
        call('docker', *command, box.id)
        return Outcome(box.label, restarted=followers)

    def die(self) -> Outcome:
        box = self.pick()
        os.kill(box.pid, signal.SIGKILL)
        return Outcome(box.label, restarted=self.find_followers(box))

    def pause(self) -> Outcome:
        return self.by_hand('pause')._replace(restarted=frozenset())

    def pause_and_stop(self) -> Outcome:
        one, two = self.pick('web', 'pool', 'flaky'), self.pick('sick', 'share', 'late')
        call('docker', 'pause', one.id)
        call('docker', 'stop', two.id)
        return Outcome(f'{one.label}, {two.label}', restarted=frozenset([two.id]))

    def remove(self, *services: str) -> Outcome:
        box = self.pick(*services)
        gone = self.find_followers(box)
        call('docker', 'rm', '--force', box.id)
        return Outcome(box.label, replaced=gone, jobs=int(box.service == 'job'))

    def commit(self) -> Outcome:
        box = self.pick()
        call('docker', 'rmi', call('docker', 'commit', box.id))
        return Outcome(box.label)

    def down(self) -> Outcome:
        boxes = self.look()
        self.compose('down', check=False)  # the watchdog may be too fast for it
        return Outcome('all', either=frozenset(box.id for box in boxes), jobs=1, slack=SLACK)

    def redeploy(self) -> Outcome:
        box = self.pick('web', 'sick', 'flaky', 'late')
        gone = self.find_followers(box)
        self.compose('up', '--detach', '--no-deps', '--force-recreate', box.service)
        return Outcome(box.label, replaced=gone)

    def compose_restart(self) -> Outcome:
        service = self.pick().service
        ids = frozenset[str]().union(*[self.find_followers(box) for box in self.look() if box.service == service])
        self.compose('restart', service)
        return Outcome(service, restarted=ids)

    def scale_down(self) -> Outcome:
        ids = frozenset(box.id for box in self.look() if box.service == 'pool')
        self.compose('up', '--detach', '--no-deps', '--scale', 'pool=1', 'pool')
        return Outcome('pool', either=ids)

    def scale_up(self) -> Outcome:
        known = frozenset(box.id for box in self.look() if box.service == 'pool')
        self.compose('up', '--detach', '--no-deps', '--scale', 'pool=3', 'pool')
        time.sleep(SETTLE + 1)
        added = {box.id for box in self.look() if box.service == 'pool'} - known
        if len(added) != 1:
            raise Failure('the third one is left alone', f'{len(added)} more')
        call('docker', 'rm', '--force', *added)
        return Outcome('pool')

    def fall_ill(self) -> Outcome:
        box = self.pick('sick')
        for command in ('pause', 'unpause'):  # live-restored, it is not probed any more before 23.0 (moby issue 41871) until then
            call('docker', command, box.id)
        call('docker', 'exec', box.id, 'touch', '/tmp/ill')
        return Outcome(box.label, restarted=frozenset([box.id]), slack=5.0)

    def crash_loop(self) -> Outcome:
        box, switch, extra = self.pick('flaky'), self.folder / 'data' / 'loop', self.random.uniform(0, 4)
        begin, began = len(self.read_log()), time.monotonic()
        switch.touch()
        call('docker', 'kill', box.id)
        until(lambda: 'flaky: crash loop' in self.read_log()[begin:], 2 * SLACK, 'the log tells of a crash loop')
        time.sleep(extra)
        switch.unlink()
        return Outcome(box.label, restarted=frozenset([box.id]), slack=2 * (time.monotonic() - began))

    def one_off(self) -> Outcome:
        command = ['--file', str(self.folder / 'compose.yml'), 'run', '--rm', '-T', '--no-deps', 'pool', 'sleep', '4']
        quiet: Dict[str, Any] = {'stdin': subprocess.DEVNULL, 'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}
        with subprocess.Popen([*self.compose_command, *command], **quiet) as process:
            until(lambda: [box for box in self.engine.look() if box.oneoff and box.state == 'running'], 20, 'the one-off runs')
            outcome = self.by_hand('kill')
            if process.wait(30):
                raise Failure('`compose run` succeeds', f'exit code {process.returncode}')
        return outcome

    def harm_alone(self) -> Outcome:
        box, verb = self.pick('alone'), self.random.choice(['kill', 'pause', 'stop'])
        call('docker', verb, box.id)
        time.sleep(SETTLE + 1)
        state = self.pick('alone').state
        if state not in ('exited', 'paused'):
            raise Failure('broapt.watch=false is left alone', state)
        return Outcome(f'{verb} {box.label}')

    def stop_engine(self, signum: int) -> Outcome:
        """Stop the engine, or kill it, and start it again; perhaps something dies meanwhile."""
        boxes, lived = self.look(), self.engine.live
        live, seconds = self.random.random() < 0.5, self.random.choice([1, 5, 5, 20])
        victim = self.pick('web', 'pool', 'sick', 'share', 'flaky')
        self.engine.end(signum)
        time.sleep(seconds)
        survives = lived and live
        if survives:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim.pid, signal.SIGKILL)
        self.engine.start(live)
        running = frozenset(box.id for box in boxes if box.service not in ('job', 'alone'))
        target = f'{seconds} s, live-restore {"on" if lived else "off"} -> {"on" if live else "off"}'
        return Outcome(target, either=self.find_followers(victim) if survives else running, slack=SLACK, engine=not survives)

    def freeze_engine(self) -> Outcome:
        box, seconds = self.pick('web', 'pool', 'sick', 'share', 'flaky'), self.random.choice([2, 5, 12])
        assert self.engine.process is not None
        self.engine.process.send_signal(signal.SIGSTOP)
        os.kill(box.pid, signal.SIGKILL)
        time.sleep(seconds)
        self.engine.process.send_signal(signal.SIGCONT)
        return Outcome(f'{seconds} s, {box.label} dies', restarted=self.find_followers(box), slack=TIMEOUT)

    def spoil_commands(self) -> Outcome:
        mode, seconds = self.random.choice(['hang', 'fail', 'garbage', 'flood']), self.random.uniform(1, 7)
        self.set_mode(mode)
        outcome = self.by_hand('kill')
        time.sleep(seconds)
        self.set_mode('work')
        return outcome._replace(target=f'{mode} {seconds:.0f} s, {outcome.target}', slack=TIMEOUT)

    def fill_disk(self) -> Outcome:
        filler = self.log.with_name('filler')
        with contextlib.suppress(OSError), filler.open('wb', buffering=0) as file:
            while True:
                file.write(bytes(1 << 12))
        outcome = self.by_hand('kill')
        time.sleep(3)
        filler.unlink()
        return outcome

    def kill_watcher(self) -> Outcome:
        until(self.find_streams, INTERVAL + SLACK, 'an event stream')
        old = self.find_streams()[0].parent
        if self.watcher == 'thread':
            return self.kill_host()
        os.kill(old, signal.SIGKILL)
        until(lambda: [stream for stream in self.find_streams() if stream.parent != old], 1 + SLACK / 2, 'a new watcher')
        return Outcome('process')

    def kill_host(self) -> Outcome:
        assert self.host is not None
        self.note_growth()
        before, watchers = self.look(), {process.pid for process in self.find_watchers()}
        self.host.kill()
        self.host.wait()
        until(lambda: not watchers & {process.pid for process in list_processes()}, 2 + SLACK / 4, 'no watcher process is left')
        self.check_damage({box.id: box for box in before}, Outcome(''), 'the containers stay as they are')
        self.start_host()
        # `up` runs a finished one-shot again; and what `up --no-deps` has made has a different hash in Compose 2.26 if it depends
        # on something (as what is in the network of another does), so that a full `up` makes it anew.
        may_change = frozenset(box.id for box in before if box.service in ('job', 'share', 'late'))
        return Outcome(f'{self.watcher} watcher', either=may_change)

    def change_host(self) -> Outcome:
        boxes, during_repair = self.look(), self.random.random() < 0.5
        if during_repair:
            call('docker', self.random.choice(['kill', 'stop']), self.pick().id)
            time.sleep(self.random.uniform(0, 2 * SETTLE))
        self.end_host(*self.random.choice([[signal.SIGTERM], [signal.SIGINT], [signal.SIGTERM, signal.SIGINT, signal.SIGTERM]]))
        self.check_damage({}, Outcome('', jobs=1), 'the clean-up spares the bystander')
        self.choose_host()
        self.start_host()
        target = f'{self.watcher}, {shlex.join(self.compose_command)}{" (in a repair)" * during_repair}'
        return Outcome(target, replaced=frozenset(box.id for box in boxes))

    def choose_host(self) -> None:
        """The other kind of watcher, and one of the generations of Compose."""
        self.watcher = {'thread': 'process', 'process': 'thread'}[self.watcher]
        self.compose_command = self.random.choice(self.generations)

    # -- the run

    def run(self) -> int:
        """Fault after fault until the time is over."""
        docker, remove, engine = self.by_hand, self.remove, self.stop_engine
        kinds: List[Tuple[int, str, Callable[[], Outcome]]] = [  # how many of them are in the deck
            (3, 'docker kill', partial(docker, 'kill')), (3, 'docker stop', partial(docker, 'stop')), (3, 'process dies', self.die),
            (2, 'docker restart', partial(docker, 'restart')), (3, 'docker pause', self.pause), (1, 'docker commit', self.commit),
            (3, 'docker rm', partial(remove, *SCALE)), (2, 'network owner removed', partial(remove, 'web')), (2, 'down', self.down),
            (2, 'pause + stop', self.pause_and_stop), (3, 'up --force-recreate', self.redeploy), (2, 'unhealthy', self.fall_ill),
            (2, 'compose restart', self.compose_restart), (1, 'scale down', self.scale_down), (1, 'scale up', self.scale_up),
            (1, 'crash loop', self.crash_loop), (1, 'one-off', self.one_off), (1, 'watch=false', self.harm_alone),
            (1, 'engine stopped', partial(engine, signal.SIGTERM)), (1, 'engine killed', partial(engine, signal.SIGKILL)),
            (1, 'engine frozen', self.freeze_engine), (3, 'commands spoilt', self.spoil_commands), (1, 'disk full', self.fill_disk),
            (1, 'watcher killed', self.kill_watcher), (1, 'host killed', self.kill_host), (1, 'host ended', self.change_host),
        ]  # fmt: skip
        deck: List[Tuple[str, Callable[[], Outcome]]] = []
        self.watcher = self.random.choice(['thread', 'process'])
        self.choose_host()
        number, switched, began = 0, False, time.monotonic()
        self.start_host()
        while time.monotonic() - began < self.seconds:
            number += 1
            if not deck:
                deck = [(name, fault) for times, name, fault in kinds for _ in range(times)]
                self.random.shuffle(deck)
            name, fault = deck.pop()
            if not switched and time.monotonic() - began > self.seconds / 2:
                name, fault, switched = 'host ended', self.change_host, True
            self.where = f'step {number}: {name}'
            self.step(number, name, fault, began)
            time.sleep(self.random.choice([0.0, 0.3, 1.0, 2.0]))
        self.where = 'the end'
        self.end_host(signal.SIGTERM)
        return number


def perform(work: pathlib.Path, seed: int, minutes: float) -> int:
    """The run, and its report on standard output; the exit code."""
    chaos, began = Chaos(work, seed, minutes), time.monotonic()
    try:
        chaos.set_up()
        faults = chaos.run()
    except Exception as error:
        if not isinstance(error, Failure):
            traceback.print_exc(file=sys.stdout)
        expected, seen = error.args if isinstance(error, Failure) else ('no error in this script', repr(error))
        print(f'\nchaos: FAILED: seed {seed}, {chaos.where}, {chaos.watcher} watcher, {shlex.join(chaos.compose_command)}')
        print(f'expected: {expected}\nseen: {seen}\n\nthe processes of the watchdog:')
        print(*(find_tree(chaos.host.pid) if chaos.host else ()), sep='\n')
        lines = [line[:240] for line in chaos.read_log().splitlines() if 'DEBUG running docker ps ' not in line]
        print('\nthe end of its log:', *lines[-40:], sep='\n')
        return 1
    finally:
        chaos.tear_down()
    print()
    for name, times in sorted(chaos.times.items()):
        print(f'{name:<24} {len(times):4} times, median {statistics.median(times):6.2f} s, worst {max(times):6.2f} s')
    print(*chaos.growth, sep='\n')
    print(f'chaos: all fine: {faults} faults in {(time.monotonic() - began) / 60:.1f} minutes, seed {seed}')
    return 0


def be_init(arguments: argparse.Namespace) -> int:
    """Be the first process of the namespace: leave the work to a child, and bury whoever is orphaned."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = 1
        try:
            code = perform(pathlib.Path(arguments.work), arguments.seed, arguments.minutes)
        except KeyboardInterrupt:
            print('chaos: interrupted')
        finally:
            sys.stdout.flush()
        return code
    while True:
        pid, status = os.wait()
        if pid == child:
            return 1 if status else 0


def main() -> int:
    """Run in namespaces of its own; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--seed', type=int, default=random.randrange(1000), help='decides on the faults (default: a random one)')
    parser.add_argument('--minutes', type=float, default=2.0, help='how long it goes on (default: 2)')
    parser.add_argument('--work', help=argparse.SUPPRESS)  # inside the namespaces: the folder for everything
    arguments = parser.parse_args()
    if arguments.work:
        return be_init(arguments)
    if os.geteuid():
        sys.exit('chaos: needs root, for namespaces and an engine of its own')
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run inside handles it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    work = tempfile.mkdtemp(prefix='chaos-')
    again = [sys.executable, __file__, '--seed', str(arguments.seed), '--minutes', str(arguments.minutes), '--work', work]
    command = ['unshare', '--mount', '--net', '--pid', '--fork', '--kill-child', '--mount-proc', *again]
    try:
        subprocess.run(['docker', 'save', '--output', f'{work}/busybox.tar', 'busybox'], check=True)
        return subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == '__main__':
    sys.exit(main())
