#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""Let random faults befall a stack that broapt_compose.py watches; check its promises after each.

    .ci/chaos.py --seed 7 --minutes 30
    .ci/chaos.py --only 'engine spoilt,hold' --minutes 5

Needs root, dockerd, unshare, an image named busybox, and one or both generations of Compose
(.ci/engine sets all that up). It runs in namespaces with an engine of its own (lab.py).

The watchdog reaches the engine by way of a proxy in this process, which can hang, cut an answer in
the middle, answer with garbage or an error, and kill the engine between a request and its answer.
The Compose command that it finds on its PATH can do the like. What people do is done behind the
proxy's back.

The seed decides on the faults, their targets, the pauses, the kinds of watcher and the generations
of Compose. After each fault all that should run must run in time, with as many containers as
before, and nothing else may have been touched: not the neighbours, not what is labelled
broapt.watch=false, not the finished one-shot, not the project of a bystander, not the copy of a
container. The watchdog must not leave processes behind, nor grow. At the first broken promise the
run ends with exit code 1 and says what was expected and seen, with the processes of the watchdog
and the end of its log. The same seed and number of minutes then give the same faults again, in the
same order, as far as two runs take the same time: at half-time the watchdog is changed.
"""

import argparse
import collections
import contextlib
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
import threading
import time
import traceback
from functools import partial
from typing import Any, Callable, Dict, FrozenSet, Iterator, List, NamedTuple, Optional, Tuple

from lab import (
    MODULE,
    Box,
    Engine,
    Failure,
    Process,
    call,
    find_tree,
    list_processes,
    memory,
    module_command,
    module_environment,
    run_apart,
    until,
)

SETTLE, INTERVAL, TIMEOUT = 0.5, 5.0, 8.0  # what the watchdog is told, seconds
SLACK = 10.0  # what two busy cores may take on top of what is promised, seconds
STEADY = 10.5  # of running, in seconds; then the watchdog has forgotten the last repairs
MEMORY_SLACK, FILE_SLACK = 8.0, 3  # MiB and open files that it may gain from its third fault on
ONCE = 'job'  # the one-shot
ALONE = 'alone'  # what is labelled broapt.watch=false
SCALE = {
    'web': 1,
    'pool': 2,
    'sick': 1,
    'share': 1,
    'kin': 1,
    'net': 1,
    'flaky': 1,
    'late': 1,
    ONCE: 1,
}
SHARES = {'share': 'net', 'kin': 'pid'}  # service -> the namespace of web in which it runs
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
  kin: {{image: busybox, {RUN}, pid: "service:web"}}
  net: {{image: busybox, {RUN}, networks: [extra]}}
  flaky:
    image: busybox
    command:
    - sh
    - -c
    - "[ ! -e /data/loop ] || exit 3; trap exit TERM; while :; do sleep 1000 & wait; done"
    volumes: ["./data:/data"]
  job: {{image: busybox, command: [sh, -c, "echo ran >>/data/job"], volumes: ["./data:/data"]}}
  late:
    image: busybox
    {RUN}
    restart: unless-stopped
    depends_on: {{job: {{condition: service_completed_successfully}}}}
  alone: {{image: busybox, {RUN}, labels: {{broapt.watch: "false"}}}}
networks:
  extra: {{}}
"""
WRAPPER = """#!/bin/sh
case $0,$1 in
*/docker-compose,*|*,compose) read -r mode <{mode};;
esac
case $mode in
hang) while grep -q hang {mode}; do sleep 0.1; done; exit 1;;
fail) echo 'error: out of luck' >&2; exit 1;;
garbage) echo '["half a line'; head -c 3000 /dev/urandom; exit 0;;
flood) head -c 20000000 /dev/zero | tr '\\0' x >&2; exit 1;;
esac
exec {command} "$@"
"""
ERROR = b'HTTP/1.1 500 Internal Server Error\r\nConnection: close\r\nContent-Length: 27\r\n\r\n'
ERROR += b'{"message": "out of luck"}\n'


class Outcome(NamedTuple):
    """What a fault has done, and what has to follow. All that is not named must stay as it was."""

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


def measure(processes: List[Process]) -> Usage:
    """What these processes hold together."""
    pids = [process.pid for process in processes]
    files = sum(len(os.listdir(f'/proc/{pid}/fd')) for pid in pids)
    return Usage(len(pids), files, memory(pids, 'Pss'))


def find_namespace(box: Box, kind: str) -> str:
    """What tells the namespace in which a container really is from others."""
    try:
        return os.readlink(f'/proc/{box.pid}/ns/{kind}')
    except OSError:
        return f'none of {box.id}'


def ids(boxes: List[Box]) -> FrozenSet[str]:
    return frozenset(box.id for box in boxes)


# What stands between the watchdog and Docker


class Proxy:
    """Passes on what the watchdog and the engine say to each other, or does what its mode says."""

    def __init__(self, path: pathlib.Path, engine: Engine) -> None:
        self.path, self.engine, self.mode = str(path), engine, 'work'
        self.fatal, self.delay = (
            b'',
            0.0,
        )  # how a request begins that kills the engine so much later
        self.listener: Optional[socket.socket] = None

    def open(self) -> None:
        """Listen."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen(64)
        threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def close(self) -> None:
        """Refuse connections until it is opened again; those that are open stay."""
        assert self.listener is not None
        self.listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self.listener.close()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = listener.accept()[0]
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """One connection, to its end; both sides then end."""
        engine = socket.socket(socket.AF_UNIX)
        with client, engine, contextlib.suppress(OSError):
            engine.connect(self.engine.socket)
            answers = threading.Thread(
                target=self._pass, args=(engine, client, self._answer), daemon=True
            )
            answers.start()
            self._pass(client, engine, self._ask)
            answers.join()

    def _pass(
        self,
        source: socket.socket,
        sink: socket.socket,
        treat: Callable[[socket.socket, bytes], bool],
    ) -> None:
        """Pass on what comes until either side ends, or the treatment says that this is the end."""
        with contextlib.suppress(OSError):
            data = source.recv(1 << 16)
            while data and treat(sink, data):
                data = source.recv(1 << 16)
        for side in (source, sink):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)

    def _ask(self, engine: socket.socket, data: bytes) -> bool:
        """A request, or a part of it."""
        engine.sendall(data)
        if not self.fatal or not data.startswith(self.fatal):
            return True
        self.fatal = b''
        time.sleep(self.delay)
        self.engine.end(signal.SIGKILL)
        return False

    def _answer(self, client: socket.socket, data: bytes) -> bool:
        """An answer, or a part of it."""
        mode = self.mode
        while self.mode == 'hang':
            time.sleep(0.05)
        spoilt = {'cut': data[: len(data) // 2], 'garbage': os.urandom(len(data)), 'error': ERROR}
        client.sendall(data if mode == 'work' else spoilt.get(mode, b''))
        return mode == 'work'


class Stage:
    """The engine, the stack, the bystander, and what can go wrong between them and the watchdog."""

    def __init__(self, work: pathlib.Path, engine: Engine, generations: List[List[str]]) -> None:
        self.work, self.engine, self.project = work, engine, 'chaos'
        self.folder, self.bin, self.mode = work / self.project, work / 'bin', work / 'mode'
        self.file, self.jobs = self.folder / 'compose.yml', self.folder / 'data' / 'job'
        self.proxy, self.guest = Proxy(work / 'proxy', engine), ''
        self.generations = generations
        self.compose_command = generations[0]

    def set_up(self) -> None:
        """Put the stack's file, the wrappers of the Compose commands and the bystander in place."""
        for folder in (self.folder / 'data', self.bin):
            folder.mkdir(parents=True)
        self.file.write_text(STACK)
        self.set_mode('work')
        for name in {command[0] for command in [['docker'], *self.generations]}:
            wrapper = self.bin / name
            wrapper.write_text(WRAPPER.format(mode=self.mode, command=shutil.which(name)))
            wrapper.chmod(0o755)
        self.proxy.open()
        self.make_bystander()

    def make_bystander(self) -> None:
        """Another project: a container that runs, one that has ended, network, volume, image."""
        labels = [
            '--label',
            'com.docker.compose.project=bystander',
            '--label',
            'com.docker.compose.service=web',
        ]
        call('docker', 'network', 'create', *labels[:2], 'bystander')
        call('docker', 'volume', 'create', *labels[:2], 'bystander')
        options = [
            *labels,
            '--network',
            'bystander',
            '--volume',
            'bystander:/data',
            '--volume',
            '/anonymous',
        ]
        policy = ['--restart=always', '--stop-timeout=1']
        self.runner = call(
            'docker', 'run', '--detach', *policy, *options, 'busybox', 'sleep', '99999'
        )
        call('docker', 'run', '--name', 'stopped', *options, 'busybox', 'false', check=False)
        call('docker', 'commit', 'stopped')  # a dangling image

    def see_bystander(self) -> Dict[str, Any]:
        """All that is not the stack's."""
        boxes = [
            box for box in self.engine.look() if box.project == 'bystander' or box.id == self.guest
        ]
        seen: Dict[str, Any] = {box.id: (box.state, box.started, box.exit_code) for box in boxes}
        seen['networks'] = {
            network['Id']
            for network in self.engine.get('/networks')
            if network['Name'] == 'bystander'
        }
        seen['volumes'] = {volume['Name'] for volume in self.engine.get('/volumes')['Volumes']}
        seen['images'] = {image['Id'] for image in self.engine.get('/images/json')}
        return seen

    def look(self) -> List[Box]:
        """The containers of the stack but one-offs."""
        return [
            box for box in self.engine.look(self.project) if not box.oneoff and box.id != self.guest
        ]

    def followers(self, box: Box) -> FrozenSet[str]:
        """A container, and those that share its network or processes, and start anew with it."""
        owner = f'container:{box.id}'
        return ids(
            [
                other
                for other in self.look()
                if other.id == box.id or owner in (other.network_mode, other.pid_mode)
            ]
        )

    def networks(self) -> List[Any]:
        """The networks of the stack."""
        return [
            network
            for network in self.engine.get('/networks')
            if network['Name'].startswith(self.project)
        ]

    def compose(self, *arguments: str, check: bool = True) -> str:
        """Run Compose by hand."""
        return call(*self.compose_command, '--file', str(self.file), *arguments, check=check)

    def count_jobs(self) -> int:
        """How often the one-shot has run so far."""
        return len(self.jobs.read_text().splitlines()) if self.jobs.exists() else 0

    def set_mode(self, mode: str) -> None:
        """Tell the Compose commands that the watchdog finds on its PATH how to behave."""
        fresh = self.mode.with_suffix('.new')
        fresh.write_text(mode + '\n')
        fresh.replace(self.mode)

    def admit_guest(self, box: Box) -> None:
        """Run a copy of a container; its image has the labels of the stack, too."""
        self.guest = call('docker', 'run', '--detach', call('docker', 'commit', box.id))

    def dismiss_guest(self) -> None:
        """Remove the copy and its image."""
        if self.guest:
            image = self.engine.get(f'/containers/{self.guest}/json')['Image']
            call('docker', 'rm', '--force', self.guest)
            call('docker', 'rmi', image)
            self.guest = ''


class Watchdog:
    """The module as its users start it."""

    def __init__(self, stage: Stage, module: pathlib.Path) -> None:
        self.stage, self.module, self.watcher = stage, module, 'thread'
        self.log = stage.work / 'log' / 'watchdog'
        self.process: Optional['subprocess.Popen[bytes]'] = None
        self.usages: List[Usage] = []
        self.growth: List[str] = []
        self.log.parent.mkdir()
        call(
            'mount', '-t', 'tmpfs', '-o', 'size=8m', 'tmpfs', str(self.log.parent)
        )  # can be filled

    def start(self) -> None:
        """Start it and wait until it watches."""
        numbers = f'--settle {SETTLE:g} --interval {INTERVAL:g} --timeout {TIMEOUT:g}'.split()
        options = [
            'run',
            '--verbose',
            *numbers,
            '--watcher',
            self.watcher,
            '--file',
            str(self.stage.file),
        ]
        options += ['--compose-command', shlex.join(self.stage.compose_command)]
        variables = {
            'PATH': f'{self.stage.bin}:{os.environ["PATH"]}',
            'DOCKER_HOST': f'unix://{self.stage.proxy.path}',
        }
        begin = len(self.read_log())
        with self.log.open('a') as log:
            print(f'--- a new watchdog: {shlex.join(options)}', file=log, flush=True)
            streams: Dict[str, Any] = {'stdin': subprocess.DEVNULL, 'stdout': log, 'stderr': log}
            command, environment = (
                module_command(self.module, *options),
                module_environment(self.module, **variables),
            )
            self.process = subprocess.Popen(
                command, cwd='/', env=environment, start_new_session=True, **streams
            )
        until(
            lambda: self.check_lives() and 'up and watched' in self.read_log()[begin:],
            120,
            'the stack is up',
        )
        self.usages = []

    def run(self, command: str, *arguments: str) -> str:
        """Run another of its commands."""
        options = ['--file', str(self.stage.file)]
        return call(
            *module_command(self.module, command, *arguments, *options),
            env=module_environment(self.module),
        )

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def end(self, *signals: int) -> None:
        """Send the signals one after the other, each a moment later; it must end well."""
        assert self.process is not None
        self.note_growth()
        for signum in signals:
            self.process.send_signal(signum)
            time.sleep(random.uniform(0, 0.5) if len(signals) > 1 else 0)
        until(
            lambda: self.process and self.process.poll() is not None,
            3 * TIMEOUT + SLACK,
            'the watchdog ends',
        )
        if self.process.returncode:
            raise Failure('exit code 0', str(self.process.returncode))
        self.check_log()

    def kill(self) -> None:
        """Kill it; no watcher process may be left."""
        assert self.process is not None
        self.note_growth()
        watchers = {process.pid for process in self.find_watchers()}
        self.process.kill()
        self.process.wait()
        until(
            lambda: not watchers & {process.pid for process in list_processes()},
            2 + SLACK / 4,
            'no watcher process is left',
        )

    def destroy(self) -> None:
        """End it at once, if it has not ended."""
        if self.process is not None:
            self.process.kill()

    def check_lives(self) -> bool:
        """True; a Failure if it has ended by itself."""
        if self.process is None or self.process.poll() is not None:
            raise Failure(
                'the watchdog lives', f'exit code {self.process and self.process.returncode}'
            )
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

    def find_watchers(self) -> List[Process]:
        """Its own processes, without the commands that it runs; the watcher is the last one."""
        own = re.compile(f' -m {self.module.stem} | -c from multiprocessing')
        return [process for process in find_tree(self.pid) if own.search(process.command)]

    def check_idle(self) -> None:
        """Wait until it only waits, without a child, and holds no more than at first."""
        seen: List[Any] = []
        last: List[Any] = []

        def is_idle() -> bool:
            self.check_lives()
            tree, watchers = find_tree(self.pid), self.find_watchers()
            known, last[:] = last[:], [(process.pid, process.command) for process in tree]
            try:
                usage = measure(watchers)
            except OSError:  # one has just ended
                return False
            first = self.usages[2] if len(self.usages) > 2 else usage
            seen[:] = [
                f'{usage}, {first} at first',
                *(process for process in tree if process not in watchers),
            ]
            # A child that has just been forked looks like a watcher: look twice.
            if (
                last != known
                or len(tree) != len(watchers)
                or any(process.state == 'Z' for process in tree)
            ):
                return False
            if usage.processes != first.processes or usage.files > first.files + FILE_SLACK:
                return False
            if usage.memory > first.memory + MEMORY_SLACK:
                return False
            self.usages.append(usage)
            return True

        until(
            is_idle,
            2 * INTERVAL + TIMEOUT + SLACK,
            'it only waits, and holds no more than at first',
            seen,
        )

    def note_growth(self) -> None:
        if len(self.usages) > 3:
            first, last = self.usages[2], self.usages[-1]
            text = '{} watcher, {} faults: {} -> {} processes, {} -> {} files, {:.1f} -> {:.1f} MiB'
            pairs = [value for pair in zip(first, last) for value in pair]
            self.growth.append(text.format(self.watcher, len(self.usages), *pairs))


# The promises


class Judge:
    """What was, and what may have become of it."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.jobs = stage, 0
        self.boxes: Dict[str, Box] = {}
        self.bystander: Dict[str, Any] = {}

    def remember(self) -> None:
        """Take what is now for what was."""
        self.boxes = {box.id: box for box in self.stage.look()}
        self.jobs, self.bystander = self.stage.count_jobs(), self.stage.see_bystander()

    def find_wrongs(self, outcome: Outcome) -> Iterator[str]:
        """What is not, or not yet, as it should be."""
        boxes = self.stage.look()
        count, now = (
            collections.Counter(box.service for box in boxes),
            {box.id: box for box in boxes},
        )
        for service, scale in SCALE.items():
            if count[service] != scale:
                yield f'{service}: {count[service]} instead of {scale} containers'
        for box in boxes:
            wanted = (
                ('exited', 0, '')
                if box.service == ONCE
                else ('running', 0, 'healthy' if box.service == 'sick' else '')
            )
            if box.service != ALONE and (box.state, box.exit_code, box.health) != wanted:
                yield f'{box.label}: {box.state} ({box.exit_code}) {box.health}'
            for web in boxes:
                if web.service == 'web' and not self.lives_with(box, web):
                    yield f'{box.label}: not together with web'
        for old in self.boxes.values():
            if old.id in outcome.restarted and (
                old.id not in now or now[old.id].started == old.started
            ):
                yield f'{old.label}: not started again'
            if old.id in outcome.replaced and old.id in now:
                yield f'{old.label}: not replaced'

    def lives_with(self, box: Box, web: Box) -> bool:
        """Whether it is in the namespace of web that it should be in, if in any."""
        kind = SHARES.get(box.service)
        if kind is None:
            return True
        declared = {'net': box.network_mode, 'pid': box.pid_mode}[kind]
        return declared == f'container:{web.id}' and find_namespace(box, kind) == find_namespace(
            web, kind
        )

    def find_damage(self, outcome: Outcome) -> Iterator[str]:
        """What was touched though it was none of this fault's business."""
        now = {box.id: box for box in self.stage.look()}
        for old in self.boxes.values():
            if old.id not in outcome.restarted | outcome.replaced | outcome.either:
                if old.id not in now or now[old.id].started != old.started:
                    yield f'{old.label}: touched'
        jobs = self.stage.count_jobs() - self.jobs
        if not 0 <= jobs <= outcome.jobs:
            yield f'job: ran {jobs} times more'
        yield from self.find_damaged_bystander(outcome)

    def find_damaged_bystander(self, outcome: Outcome) -> Iterator[str]:
        for key, value in self.stage.see_bystander().items():
            known = self.bystander.get(key, '')
            if value != known and not (
                outcome.engine and 'running' in value and 'running' in known
            ):
                yield f'bystander: {key}: {value} instead of {known}'
        for key in self.bystander.keys() - self.stage.see_bystander().keys():
            yield f'bystander: {key}: gone'

    def check_damage(self, outcome: Outcome, expected: str) -> None:
        damage = list(self.find_damage(outcome))
        if damage:
            raise Failure(expected, '; '.join(damage))

    def wait_until_well(self, limit: float, outcome: Outcome) -> float:
        """Wait until all that should run does; the seconds it took."""
        began, wrongs = time.monotonic(), ['']

        def is_well() -> bool:
            wrongs[:] = self.find_wrongs(outcome)
            return not wrongs

        until(is_well, limit, 'all is well', wrongs)
        return time.monotonic() - began


# The faults


class Faults:
    """What can happen; each method lets it happen and returns what must follow."""

    def __init__(self, stage: Stage, watchdog: Watchdog, judge: Judge) -> None:
        self.stage, self.engine, self.watchdog, self.judge = stage, stage.engine, watchdog, judge

    def pick(self, *services: str) -> Box:
        """A random container of these services, or of any that runs."""
        wanted = services or [service for service in SCALE if service != ONCE]
        found = [box for box in self.stage.look() if box.service in wanted]
        return random.choice(sorted(found, key=lambda box: box.label))

    def by_hand(self, *command: str, services: Tuple[str, ...] = ()) -> Outcome:
        """Run a Docker command on a container, which then has to run anew, as the same one."""
        box = self.pick(*services)
        followers = self.stage.followers(box)
        call('docker', *command, box.id)
        return Outcome(box.label, restarted=followers)

    def crash(self) -> Outcome:
        """A process ends by itself, in one of three ways."""
        box = self.pick()
        ways = ['SIGKILL', 'SIGTERM'] + ['exec'] * (SHARES.get(box.service) != 'pid')
        way, followers = random.choice(ways), self.stage.followers(box)
        if way == 'exec':
            call('docker', 'exec', box.id, 'kill', '1', check=False)  # may die with it
        else:
            os.kill(box.pid, getattr(signal, way))
        return Outcome(f'{way} {box.label}', restarted=followers)

    def pause(self) -> Outcome:
        return self.by_hand('pause')._replace(restarted=frozenset())

    def pause_and_stop(self) -> Outcome:
        one, two = (
            self.pick('web', 'pool', 'flaky', 'net'),
            self.pick('sick', 'share', 'late', 'kin'),
        )
        call('docker', 'pause', one.id)
        call('docker', 'stop', two.id)
        return Outcome(f'{one.label}, {two.label}', restarted=frozenset([two.id]))

    def remove(self, *services: str) -> Outcome:
        box = self.pick(*services)
        gone = self.stage.followers(box)
        call('docker', 'rm', '--force', box.id)
        return Outcome(box.label, replaced=gone, jobs=int(box.service == ONCE))

    def commit(self) -> Outcome:
        box = self.pick()
        call('docker', 'rmi', call('docker', 'commit', box.id))
        return Outcome(box.label)

    def run_copy(self) -> Outcome:
        """Somebody runs a copy of a container. Both are killed, but only one is to come back."""
        if (
            'compose' not in self.stage.compose_command
        ):  # 1.29 leaves no trace that tells them apart
            return self.commit()
        box = self.pick('pool', 'late', 'net')
        followers = self.stage.followers(box)
        self.stage.admit_guest(box)
        time.sleep(random.uniform(0, SETTLE + 1))
        call('docker', 'kill', self.stage.guest)
        self.judge.bystander = self.stage.see_bystander()
        call('docker', 'kill', box.id)
        return Outcome(box.label, restarted=followers)

    def down(self) -> Outcome:
        boxes = self.stage.look()
        self.stage.compose('down', check=False)  # the watchdog may be too fast for it
        return Outcome('all', either=ids(boxes), jobs=1, slack=SLACK)

    def redeploy(self) -> Outcome:
        box = self.pick('web', 'sick', 'flaky', 'late', 'net')
        gone = self.stage.followers(box)
        self.stage.compose('up', '--detach', '--no-deps', '--force-recreate', box.service)
        return Outcome(box.label, replaced=gone, slack=SLACK)

    def compose_restart(self) -> Outcome:
        service = self.pick().service
        concerned = [
            self.stage.followers(box) for box in self.stage.look() if box.service == service
        ]
        self.stage.compose('restart', service)
        return Outcome(service, restarted=frozenset[str]().union(*concerned))

    def scale_down(self) -> Outcome:
        pool = [box for box in self.stage.look() if box.service == 'pool']
        self.stage.compose('up', '--detach', '--no-deps', '--scale', 'pool=1', 'pool')
        return Outcome('pool', either=ids(pool))

    def scale_up(self) -> Outcome:
        known = ids([box for box in self.stage.look() if box.service == 'pool'])
        self.stage.compose('up', '--detach', '--no-deps', '--scale', 'pool=3', 'pool')
        time.sleep(SETTLE + 1)
        added = ids([box for box in self.stage.look() if box.service == 'pool']) - known
        if len(added) != 1:
            raise Failure('the third one is left alone', f'{len(added)} more')
        call('docker', 'rm', '--force', *added)
        return Outcome('pool')

    def lose_network(self) -> Outcome:
        """A container's network is removed, and perhaps made anew; so is then the container."""
        box, anew = self.pick('net'), random.random() < 0.5
        network = next(
            network for network in self.stage.networks() if network['Name'].endswith('_extra')
        )

        def is_gone() -> bool:  # again if the watchdog has been quicker
            self.engine.do('POST', f'/containers/{box.id}/kill', 409)
            self.engine.do('DELETE', f'/networks/{network["Id"]}', 403, 404)
            return self.engine.get(f'/networks/{network["Id"]}') is None

        until(is_gone, SLACK, 'the network is gone')
        if anew:
            same = {'Name': network['Name'], 'Labels': network['Labels'], 'CheckDuplicate': True}
            self.engine.do('POST', '/networks/create', 409, body=same)
        return Outcome(
            f'{box.label}{", made anew" * anew}', replaced=frozenset([box.id]), slack=SLACK
        )

    def fall_ill(self) -> Outcome:
        box = self.pick('sick')
        for command in (
            'pause',
            'unpause',
        ):  # until then, live-restored, it is not probed before 23.0 (moby issue 41871)
            call('docker', command, box.id)
        call('docker', 'exec', box.id, 'touch', '/tmp/ill')
        return Outcome(box.label, restarted=frozenset([box.id]), slack=5.0)

    def crash_loop(self) -> Outcome:
        box, switch, extra = (
            self.pick('flaky'),
            self.stage.folder / 'data' / 'loop',
            random.uniform(0, 4),
        )
        begin, began = len(self.watchdog.read_log()), time.monotonic()
        switch.touch()
        call('docker', 'kill', box.id)
        until(
            lambda: 'crash loop' in self.watchdog.read_log()[begin:],
            2 * SLACK,
            'the log tells of a crash loop',
        )
        time.sleep(extra)
        switch.unlink()
        return Outcome(
            box.label, restarted=frozenset([box.id]), slack=2 * (time.monotonic() - began)
        )

    def one_off(self) -> Outcome:
        options = ['--rm', '-T', '--no-deps', 'pool', 'sleep', '4']
        command = [*self.stage.compose_command, '--file', str(self.stage.file), 'run', *options]
        quiet: Dict[str, Any] = dict.fromkeys(('stdin', 'stdout', 'stderr'), subprocess.DEVNULL)
        with subprocess.Popen(command, **quiet) as process:
            until(
                lambda: [
                    box for box in self.engine.look() if box.oneoff and box.state == 'running'
                ],
                20,
                'the one-off runs',
            )
            outcome = self.by_hand('kill')
            if process.wait(30):
                raise Failure('`compose run` succeeds', f'exit code {process.returncode}')
        return outcome

    def harm_alone(self) -> Outcome:
        box, verb = self.pick(ALONE), random.choice(['kill', 'pause', 'stop'])
        call('docker', verb, box.id)
        self.expect_down(ALONE, 'broapt.watch=false is left alone')
        return Outcome(f'{verb} {box.label}')

    def expect_down(self, service: str, promise: str) -> None:
        """See that nothing comes back for a while."""
        time.sleep(SETTLE + 1.5)
        state = self.pick(service).state
        if state not in ('exited', 'paused'):
            raise Failure(promise, state)

    def hold(self) -> Outcome:
        """A service on hold is stopped; it comes back when released, or when the hold ends."""
        box, seconds, verb = (
            self.pick('sick', 'flaky', 'late', 'net'),
            random.choice([8, 60]),
            random.choice(['kill', 'stop']),
        )
        self.watchdog.run('hold', box.service, '--for', f'{seconds}s')
        call('docker', verb, box.id)
        self.expect_down(box.service, 'what is on hold is left alone')
        if seconds > 8:
            self.watchdog.run('release', box.service)
        target = f'{box.label}, {"it ends by itself" if seconds == 8 else "released"}'
        return Outcome(target, restarted=frozenset([box.id]), slack=8.0)

    def stop_engine(self, end: Callable[[], None]) -> Outcome:
        """The engine ends, and starts again; if the containers live on, one dies meanwhile."""
        boxes, lived = self.stage.look(), self.engine.live
        live, seconds = random.random() < 0.5, random.choice([1, 5, 5, 20])
        victim = self.pick('pool', 'sick', 'share', 'flaky', 'net')
        end()
        self.stage.proxy.close()
        time.sleep(seconds)
        survives = lived and live
        if survives:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim.pid, signal.SIGKILL)
        self.engine.live = live
        self.engine.start()
        self.stage.proxy.open()
        running = ids([box for box in boxes if box.service not in (ONCE, ALONE)])
        target = (
            f'{seconds} s, live-restore {"on" if lived else "off"} -> {"on" if live else "off"}'
        )
        return Outcome(target, either=running, slack=SLACK, engine=not survives)

    def kill_in_request(self) -> None:
        """Kill the engine between a request of the watchdog, a look or a repair, and its answer."""
        proxy = self.stage.proxy
        proxy.delay, proxy.fatal = random.uniform(0, 0.1), random.choice([b'GET ', b'POST '])
        call('docker', 'kill', self.pick().id, check=False)
        until(self.engine.is_dead, INTERVAL + SLACK, 'a request comes')

    def stop_engine_in_request(self) -> Outcome:
        """After that, do what people have to do if it died in the middle of a start (20.10)."""
        outcome = self.stop_engine(self.kill_in_request)
        began = time.monotonic()
        while list(self.judge.find_wrongs(outcome)) and time.monotonic() - began < 2 * INTERVAL:
            for box in self.stage.look():
                if 'already exists' in box.error:  # its task, so that no start ever succeeds
                    call('docker', 'rm', '--force', box.id)
                    outcome = outcome._replace(target=f'{outcome.target}, {box.label} by hand')
            time.sleep(0.2)
        return outcome

    def freeze_engine(self) -> Outcome:
        box, seconds = self.pick('web', 'pool', 'sick', 'share', 'flaky'), random.choice([2, 5, 12])
        followers = self.stage.followers(box)
        assert self.engine.process is not None
        self.engine.process.send_signal(signal.SIGSTOP)
        os.kill(box.pid, signal.SIGKILL)
        time.sleep(seconds)
        self.engine.process.send_signal(signal.SIGCONT)
        return Outcome(f'{seconds} s, {box.label} dies', restarted=followers, slack=TIMEOUT)

    def spoil_engine(self) -> Outcome:
        """For a while, what the engine says comes late, in part, as garbage, or as an error."""
        mode, seconds = random.choice(['hang', 'cut', 'garbage', 'error']), random.uniform(1, 12)
        self.stage.proxy.mode = mode
        outcome = self.by_hand(random.choice(['kill', 'stop', 'pause']))
        time.sleep(seconds)
        self.stage.proxy.mode = 'work'
        # A start whose answer was lost may be tried again by Compose, which may make these anew.
        either = outcome.restarted | ids(
            [box for box in self.stage.look() if box.service in (*SHARES, 'late')]
        )
        return Outcome(f'{mode} {seconds:.0f} s, {outcome.target}', either=either, slack=TIMEOUT)

    def spoil_compose(self) -> Outcome:
        """Compose fails, in one way or another, for a while."""
        mode, seconds = random.choice(['hang', 'fail', 'garbage', 'flood']), random.uniform(1, 7)
        self.stage.set_mode(mode)
        outcome = self.remove('web', 'pool', 'sick', 'flaky', 'net')
        time.sleep(seconds)
        self.stage.set_mode('work')
        return outcome._replace(
            target=f'{mode} {seconds:.0f} s, {outcome.target}', slack=TIMEOUT + 2 * seconds
        )

    def fill_disk(self) -> Outcome:
        filler = self.watchdog.log.with_name('filler')
        with contextlib.suppress(OSError), filler.open('wb', buffering=0) as file:
            while True:
                file.write(bytes(1 << 12))
        outcome = self.by_hand('kill')
        time.sleep(3)
        filler.unlink()
        return outcome

    def suspend(self) -> Outcome:
        """The watchdog is stopped for a while, as by Ctrl+Z, before a fault or during a repair."""
        seconds, outcome = random.choice([1, 6, 15]), Outcome('before')
        if random.random() < 0.5:
            outcome = self.remove('web', 'pool', 'flaky')
            time.sleep(random.uniform(SETTLE, 2 * SETTLE))
        os.killpg(self.watchdog.pid, signal.SIGSTOP)
        if outcome.target == 'before':
            outcome = self.by_hand('kill')
        time.sleep(seconds)
        os.killpg(self.watchdog.pid, signal.SIGCONT)
        return outcome._replace(target=f'{seconds} s, {outcome.target}', slack=TIMEOUT)

    def kill_watcher(self) -> Outcome:
        if self.watchdog.watcher == 'thread':
            return self.kill_host()
        old = self.watchdog.find_watchers()
        os.kill(old[-1].pid, signal.SIGKILL)

        def is_replaced() -> bool:
            new = self.watchdog.find_watchers()
            return len(new) == len(old) and new[-1].pid != old[-1].pid

        until(is_replaced, 1 + SLACK / 2, 'a new watcher')
        return Outcome('process')

    def kill_host(self) -> Outcome:
        self.watchdog.kill()
        self.judge.check_damage(Outcome(''), 'the containers stay as they are')
        self.start_host()
        # `up` runs a finished one-shot again. What depends on another, as a sharer does, has a
        # different hash in Compose 2.26 if `up --no-deps` made it: a full `up` makes it anew.
        may_change = ids(
            [box for box in self.judge.boxes.values() if box.service in (ONCE, 'late', *SHARES)]
        )
        return Outcome(f'{self.watchdog.watcher} watcher', either=may_change, jobs=1)

    def change_host(self) -> Outcome:
        """End it, perhaps during a repair: only what is the stack's goes. Start another kind."""
        boxes, during_repair = self.stage.look(), random.random() < 0.5
        if 'compose' in self.stage.compose_command and random.random() < 0.5:
            self.stage.admit_guest(self.pick('pool', 'net'))
            call('docker', 'kill', self.stage.guest)
        self.judge.bystander = self.stage.see_bystander()
        if during_repair:
            call('docker', random.choice(['kill', 'stop']), self.pick().id)
            time.sleep(random.uniform(0, 2 * SETTLE))
        self.end_host(
            *random.choice(
                [[signal.SIGTERM], [signal.SIGINT], [signal.SIGTERM, signal.SIGINT, signal.SIGTERM]]
            )
        )
        damage = list(self.judge.find_damaged_bystander(Outcome('')))
        if damage:
            raise Failure('the clean-up spares the others', '; '.join(damage))
        self.stage.dismiss_guest()  # Compose would take it for its own
        self.choose_host()
        self.start_host()
        self.judge.bystander = self.stage.see_bystander()
        compose = shlex.join(self.stage.compose_command)
        target = f'{self.watchdog.watcher}, {compose}{" (in a repair)" * during_repair}'
        return Outcome(target, replaced=ids(boxes), jobs=1)

    def choose_host(self) -> None:
        """The other kind of watcher, and one of the generations of Compose."""
        self.watchdog.watcher = {'thread': 'process', 'process': 'thread'}[self.watchdog.watcher]
        self.stage.compose_command = random.choice(self.stage.generations)

    def start_host(self) -> None:
        jobs = self.stage.count_jobs()
        self.watchdog.start()
        self.judge.wait_until_well(SLACK, Outcome(''))
        if self.stage.count_jobs() - jobs > 1:
            raise Failure('`up` runs the one-shot once', f'{self.stage.count_jobs() - jobs} times')

    def end_host(self, *signals: int) -> None:
        """End it; the stack must come down, all of it."""
        self.watchdog.end(*signals)
        left = [box.label for box in self.stage.look()] + [
            network['Name'] for network in self.stage.networks()
        ]
        if left:
            raise Failure('nothing is left of the project', ', '.join(left))


class Deck:
    """The faults by name, and how often each is in the deck."""

    def __init__(self, faults: Faults, only: str) -> None:
        docker, remove, stop_engine = faults.by_hand, faults.remove, faults.stop_engine
        kinds: List[Tuple[int, str, Callable[[], Outcome]]] = [
            (3, 'docker kill', partial(docker, 'kill')),
            (3, 'docker stop', partial(docker, 'stop')),
            (4, 'process ends', faults.crash),
            (2, 'docker restart', partial(docker, 'restart')),
            (3, 'docker pause', faults.pause),
            (2, 'pause + stop', faults.pause_and_stop),
            (3, 'docker rm', partial(remove, *SCALE)),
            (2, 'owner removed', partial(remove, 'web')),
            (2, 'owner restarted', partial(docker, 'restart', services=('web',))),
            (2, 'network lost', faults.lose_network),
            (1, 'docker commit', faults.commit),
            (2, 'copy run', faults.run_copy),
            (2, 'down', faults.down),
            (3, 'up --force-recreate', faults.redeploy),
            (2, 'compose restart', faults.compose_restart),
            (1, 'scale down', faults.scale_down),
            (1, 'scale up', faults.scale_up),
            (2, 'unhealthy', faults.fall_ill),
            (1, 'crash loop', faults.crash_loop),
            (1, 'one-off', faults.one_off),
            (1, 'watch=false', faults.harm_alone),
            (2, 'hold', faults.hold),
            (1, 'engine stopped', partial(stop_engine, partial(faults.engine.end, signal.SIGTERM))),
            (1, 'engine killed', partial(stop_engine, partial(faults.engine.end, signal.SIGKILL))),
            (2, 'engine killed in request', faults.stop_engine_in_request),
            (1, 'engine frozen', faults.freeze_engine),
            (4, 'engine spoilt', faults.spoil_engine),
            (2, 'compose spoilt', faults.spoil_compose),
            (1, 'disk full', faults.fill_disk),
            (2, 'suspended', faults.suspend),
            (1, 'watcher killed', faults.kill_watcher),
            (1, 'host killed', faults.kill_host),
            (1, 'host ended', faults.change_host),
        ]
        self.change = kinds[-1][1:]
        self._kinds = [kind for kind in kinds if not only or kind[1] in only.split(',')]
        self._left: List[Tuple[str, Callable[[], Outcome]]] = []
        if not self._kinds:
            sys.exit(f'chaos: the faults are {", ".join(kind[1] for kind in kinds)}')

    def draw(self) -> Tuple[str, Callable[[], Outcome]]:
        """The next one."""
        if not self._left:
            self._left = [kind[1:] for kind in self._kinds for _ in range(kind[0])]
            random.shuffle(self._left)
        return self._left.pop()


# The run


class Run:
    """Fault after fault, each judged."""

    def __init__(self, stage: Stage, watchdog: Watchdog, only: str) -> None:
        self.stage, self.watchdog, self.judge, self.where = stage, watchdog, Judge(stage), 'set-up'
        self.faults = Faults(stage, watchdog, self.judge)
        self.deck = Deck(self.faults, only)
        self.strikes: Dict[str, int] = collections.Counter()  # service -> faults in a row
        self.calm: Dict[str, float] = {}  # service -> when it was last well again
        self.times: Dict[str, List[float]] = collections.defaultdict(
            list
        )  # fault -> recovery times

    def go(self, seconds: float) -> int:
        """Until the time is over; the number of faults."""
        number, switched, began = 0, False, time.monotonic()
        self.watchdog.watcher = random.choice(['thread', 'process'])
        self.faults.choose_host()
        self.faults.start_host()
        self.judge.remember()
        while time.monotonic() - began < seconds:
            number += 1
            name, fault = self.deck.draw()
            if not switched and time.monotonic() - began > seconds / 2:
                (name, fault), switched = self.deck.change, True
            self.where = f'step {number}: {name}'
            self.step(number, name, fault, began)
            time.sleep(random.choice([0.0, 0.3, 1.0, 2.0]))
        self.where = 'the end'
        self.faults.end_host(signal.SIGTERM)
        return number

    def step(self, number: int, name: str, fault: Callable[[], Outcome], began: float) -> None:
        """Let one fault happen and see what follows."""
        self.rest()
        self.judge.wait_until_well(0.0, Outcome(''))
        self.judge.check_damage(Outcome(''), 'nothing happens between two faults')
        self.judge.remember()
        moment = time.monotonic() - began
        outcome = fault()
        delay = self.count_strikes(outcome)
        limit = SETTLE + INTERVAL + SLACK + delay + outcome.slack
        seconds = self.judge.wait_until_well(limit, outcome)
        self.calm.update((service, time.monotonic()) for service in self.concerned(outcome))
        print(
            f'{number:4} {moment:7.1f} s  {name:<24} {outcome.target:<40} {seconds:6.2f} s',
            flush=True,
        )
        self.times[name].append(seconds)
        if outcome.engine:
            until(
                lambda: 'running' in self.stage.see_bystander()[self.stage.runner],
                30,
                'the bystander runs again',
            )
        self.judge.check_damage(outcome, 'all else stays as it was')
        self.stage.dismiss_guest()
        self.bring_back_alone()
        self.watchdog.check_idle()
        self.watchdog.check_log()
        self.judge.remember()

    def concerned(self, outcome: Outcome) -> List[str]:
        """The services that had to be repaired."""
        touched = outcome.restarted | outcome.replaced | outcome.either
        return sorted({box.service for box in self.judge.boxes.values() if box.id in touched})

    def count_strikes(self, outcome: Outcome) -> float:
        """The seconds that a crash loop's backoff may add."""
        for service in self.concerned(outcome):
            self.strikes[service] += (
                2 if service in SHARES else 1
            )  # a try more while its owner is down
        return 2.0 ** max((self.strikes[service] for service in self.concerned(outcome)), default=0)

    def rest(self) -> None:
        """Forget what was long ago, as the watchdog does; wait for that if it was too much."""
        for service, strikes in self.strikes.items():
            left = self.calm.get(service, 0.0) + STEADY - time.monotonic()
            if left > 0 and strikes > 2:
                time.sleep(left)
            if left <= 0 or strikes > 2:
                self.strikes[service] = 0

    def bring_back_alone(self) -> None:
        """What the watchdog must leave alone, somebody else has to mend."""
        found = [box for box in self.stage.look() if box.service == ALONE]
        if not found:
            self.stage.compose('up', '--detach', '--no-deps', ALONE)
        elif found[0].state != 'running':
            call('docker', 'unpause' if found[0].state == 'paused' else 'start', found[0].id)

    def report_failure(self, error: Exception) -> None:
        """What was expected and seen, and what the watchdog was doing."""
        if not isinstance(error, Failure):
            traceback.print_exc(file=sys.stdout)
        expected, seen = (
            error.args if isinstance(error, Failure) else ('no error in this script', repr(error))
        )
        kind = f'{self.watchdog.watcher} watcher, {shlex.join(self.stage.compose_command)}'
        print(f'\nchaos: FAILED: {self.where}, {kind}\nexpected: {expected}\nseen: {seen}')
        if self.watchdog.process is not None:
            print('\nthe processes of the watchdog:', *find_tree(self.watchdog.pid), sep='\n')
        lines = [line[:240] for line in self.watchdog.read_log().splitlines()]
        print('\nthe end of its log:', *lines[-40:], sep='\n')

    def report(self, faults: int, began: float) -> None:
        """How long the recovery took, and what the watchdogs have gained."""
        print()
        for name, times in sorted(self.times.items()):
            median, worst = statistics.median(times), max(times)
            print(f'{name:<24} {len(times):4} times, median {median:6.2f} s, worst {worst:6.2f} s')
        print(*self.watchdog.growth, sep='\n')
        print(f'chaos: all fine: {faults} faults in {(time.monotonic() - began) / 60:.1f} minutes')


def find_generations(only: str) -> List[List[str]]:
    """The Compose commands that are there, or the only one that was asked for."""
    commands = [shlex.split(only)] if only else [['docker', 'compose'], ['docker-compose']]
    there = [command for command in commands if shutil.which(command[0])]
    return [command for command in there if call(*command, 'version', check=False)]


def perform(options: argparse.Namespace, work: pathlib.Path) -> int:
    """The run, and its report on standard output; the exit code."""
    random.seed(options.seed)
    print(f'chaos: seed {options.seed}, {options.minutes:g} minutes', flush=True)
    began = time.monotonic()
    with Engine(work, live=random.random() < 0.5) as engine, contextlib.ExitStack() as exits:
        stage = Stage(work, engine, find_generations(options.compose_command))
        stage.set_up()
        run = Run(stage, Watchdog(stage, pathlib.Path(options.module).resolve()), options.only)
        exits.callback(run.watchdog.destroy)
        try:
            faults = run.go(options.minutes * 60)
        except Exception as error:
            run.report_failure(error)
            return 1
    run.report(faults, began)
    return 0


def main() -> int:
    """Run in namespaces of its own; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    add = parser.add_argument
    add('--seed', metavar='N', type=int, help='decides on the faults (default: a random one)')
    add('--minutes', metavar='N', type=float, default=2.0, help='how long (default: 2)')
    add('--only', metavar='FAULT,...', default='', help='only these faults')
    add('--module', metavar='PATH', default=str(MODULE), help='another than the one beside .ci')
    add('--compose-command', metavar='CMD', default='', help='only this one (default: both)')
    options = parser.parse_args()
    if options.seed is None:
        options.seed = random.randrange(1000)
    return run_apart(lambda work: perform(options, work))


if __name__ == '__main__':
    sys.exit(main())
