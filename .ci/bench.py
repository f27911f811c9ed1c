#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""Measure broapt_compose.py on a real engine, beside what it is compared with; print tables.

    .ci/bench.py                                          everything, ten rounds: 45 minutes
    .ci/bench.py --only kill,pause,crash --rounds 5       some of it: a few minutes
    .ci/bench.py --module NEW.py --module OLD.py          two versions side by side

The first table, from a fault to running again, at settle 0 unless it says otherwise:

kill, stop, pause, remove, down, pause+stop    what people do; «down» stops and removes both
crash       SIGKILL from outside Docker; at the default settings
over ssh    through an sshd on loopback
30 of 100   from the first death to the last start. By hand: one `docker start` of all that were
            killed, or as many requests at once

Each watcher has a stack of two services; in each round each fault befalls one stack after the
other. Faults are requests to the engine's HTTP API from this process, so that no command competes
with what is measured. A time is the difference of two of the engine's own events (`timeNano`): from
the last one of the fault to the last start or unpause. The two floors are told which fault comes,
wait for its event, look at nothing, and do the one fitting thing:

command-line floor    reads `docker events`; runs `docker start`, `docker unpause`, `compose up`
socket floor          reads GET /events; sends one POST on a connection that is open already (over
                      ssh: on a kept `docker system dial-stdio`). What was removed has none

The second table, what it costs:

idle        CPU of the module and its children at interval 10, all stacks at once; its children
memory      what import and watcher add to a host that has http.client; USS: private pages
start, end  from the start to its log's «up and watched», against `up --build --detach`; from the
            signal to the exit, against `stop` and `down`
status      against `compose ps`

Several samples are shown as «median (worst)»; goals are about medians. All happens in namespaces
with an engine of their own. Containers use the host's network: they start quickest, so that what
the watchdog adds shows most. Python runs with -S: without what others have installed.
"""

import argparse
import concurrent.futures
import contextlib
import json
import math
import multiprocessing
import os
import pathlib
import platform
import random
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence, Tuple
from urllib.parse import quote

import lab

CLI, SOCKET, BARE = 'command-line floor', 'socket floor', 'by hand'
REST = 10.5  # seconds between two faults of a stack: ten of running clear the module's history
PATIENCE = 60.0  # seconds; in a table this means: not repaired by then
WARM_UP = 3.0  # seconds from a stack that runs to a watcher that surely watches
CROWD, VICTIMS = 100, 30
COUNTS = (2, 20, 100)  # containers of the idle stacks
INTERVAL, IDLE_SAMPLES, IDLE_SECONDS = 10.0, 3, 60.0
LABEL = 'com.docker.compose.'
SSHD = '/usr/sbin/sshd'
SSHD_CONFIG = """
ListenAddress 127.0.0.1
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
SetEnv HOME={folder}
"""
SSH_CONFIG = """
IdentityFile {folder}/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""
SSH_WRAPPER = """#!/bin/sh
exec {ssh} -F {folder}/client "$@"
"""
HOST = """
import http.client, inspect, json, logging, queue, subprocess, tempfile, threading, time, uuid

def measure():
    lines = [line.split() for line in open('/proc/self/smaps_rollup')]
    size = {{line[0]: int(line[1]) / 1024 for line in lines if line[0].endswith(':')}}
    return size['Pss:'], size['Private_Clean:'] + size['Private_Dirty:']

measure()
before = measure()
import {module}
imported = measure()
with {module}.docker_compose():
    time.sleep({seconds})
    states = imported, measure()
    print('MEMORY', *[new - old for state in states for old, new in zip(before, state)], flush=True)
"""


class Figure(NamedTuple):
    """One row of a table."""

    name: str
    unit: str
    samples: Dict[str, List[float]]  # column -> values


class Goal(NamedTuple):
    """What the median of a figure may be."""

    figure: str
    kind: str  # so many times another column's, so much over it, or at most so much
    against: str  # that column
    allowed: float


GOALS = [
    Goal('kill', 'times', SOCKET, 1.05),
    Goal('kill', 'times', CLI, 0.9),
    Goal('stop', 'times', SOCKET, 1.05),
    Goal('stop', 'times', CLI, 0.9),
    Goal('pause', 'over', SOCKET, 0.005),
    Goal('remove', 'times', CLI, 1.08),
    Goal('down', 'times', CLI, 1.08),
    Goal('crash', 'times', SOCKET, 1.1),
    Goal('over ssh: kill', 'over', SOCKET, 0.02),
    Goal('over ssh: pause', 'over', SOCKET, 0.02),
    Goal('idle CPU, 2 containers', 'at most', '', 0.02),
    Goal('idle CPU, 20 containers', 'at most', '', 0.02),
    Goal('idle CPU, 100 containers', 'at most', '', 0.06),
    Goal('idle: child processes', 'at most', '', 0),
    Goal('memory, import and watching: PSS', 'at most', '', 2),
    Goal('start', 'times', BARE, 1.3),
    Goal('end', 'times', BARE, 0.8),
    Goal('status', 'times', BARE, 2),
]


def say(text: str) -> None:
    """Tell the progress on standard error."""
    print(f'bench: {text}', file=sys.stderr, flush=True)


# Events


class Event(NamedTuple):
    """What happened to a container."""

    time: float  # seconds since 1970, by the engine
    action: str
    container: str
    project: str
    service: str


def read_event(line: bytes) -> Event:
    """One line of `docker events` or GET /events."""
    event = json.loads(line)
    labels = event['Actor']['Attributes']
    names = [labels.get(LABEL + name, '') for name in ('project', 'service')]
    return Event(event['timeNano'] / 1e9, event['Action'], event['Actor']['ID'], *names)


def follow_events(connection: lab.Connection, *labels: str) -> Iterator[bytes]:
    """The lines of GET /events for containers with these labels."""
    filters = quote(json.dumps({'type': ['container'], 'label': labels}))
    connection.request('GET', f'/events?since={time.time():.3f}&filters={filters}')
    return connection.getresponse()


class EventLog:
    """All that happens to the containers, kept by a thread."""

    def __init__(self, engine: lab.Engine) -> None:
        self.events: List[Event] = []
        self._lines = follow_events(lab.Connection(engine.socket, None))
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._lines:
            self.events.append(read_event(line))

    def of(self, project: str, since: float = 0.0) -> List[Event]:
        """The events of a project so far, from a moment on."""
        return [
            event for event in list(self.events) if event.project == project and event.time >= since
        ]


def last_changes(events: Sequence[Event]) -> Dict[str, Event]:
    """For each service the latest event that brought it up or down."""
    changes = ('start', 'unpause', 'die', 'pause', 'destroy')
    return {event.service: event for event in events if event.action in changes}


def are_up(changes: Dict[str, Event]) -> bool:
    """Whether the latest change of every service brought it up."""
    return all(event.action in ('start', 'unpause') for event in changes.values())


def recovery_time(events: Sequence[Event], breaks: Dict[str, str]) -> float:
    """Seconds from the fault's last event to the last repair; infinite while anything is down."""
    first = {(event.service, event.action): event.time for event in reversed(events)}
    changes = last_changes(events)
    if not first.keys() >= breaks.items() or not are_up(changes):
        return math.inf
    broken = max(first[cause] for cause in breaks.items())
    return max(event.time for event in changes.values()) - broken


# Faults


Strike = Callable[[lab.Engine, str, str], None]


def at_once(action: Callable[[str], object], containers: Sequence[str]) -> None:
    """Do something to each of the containers, each in a thread of its own."""
    with concurrent.futures.ThreadPoolExecutor(len(containers)) as pool:
        list(pool.map(action, containers))


def request(verb: str) -> Strike:
    """A fault that is one request about the first of two containers."""
    return lambda engine, one, two: engine.do('POST', f'/containers/{one}/{verb}')


def remove(engine: lab.Engine, one: str, two: str) -> None:
    """Force it, and again if it was started in the middle of that."""
    while engine.get(f'/containers/{one}/json'):
        engine.do('DELETE', f'/containers/{one}?force=1', 404, 409, 500)


def down(engine: lab.Engine, one: str, two: str) -> None:
    """Stop and remove both, as Compose does."""

    def stop_and_remove(container: str) -> None:
        engine.do('POST', f'/containers/{container}/stop')
        remove(engine, container, '')

    at_once(stop_and_remove, (one, two))


def pause_and_stop(engine: lab.Engine, one: str, two: str) -> None:
    """One is paused, the other one stopped."""
    engine.do('POST', f'/containers/{one}/pause')
    engine.do('POST', f'/containers/{two}/stop')


def crash(engine: lab.Engine, one: str, two: str) -> None:
    """The process ends, as far as Docker knows by itself."""
    os.kill(engine.get(f'/containers/{one}/json')['State']['Pid'], signal.SIGKILL)


class Fault(NamedTuple):
    """Something that befalls a stack of the services «one» and «two»."""

    strike: Strike
    breaks: Dict[str, str]  # service -> the event that completes the fault


FAULTS = {
    'kill': Fault(request('kill'), {'one': 'die'}),
    'stop': Fault(request('stop'), {'one': 'die'}),
    'pause': Fault(request('pause'), {'one': 'pause'}),
    'remove': Fault(remove, {'one': 'destroy'}),
    'down': Fault(down, {'one': 'destroy', 'two': 'destroy'}),
    'pause+stop': Fault(pause_and_stop, {'one': 'pause', 'two': 'die'}),
    'crash': Fault(crash, {'one': 'die'}),
}
REPAIRS = {'die': 'start', 'pause': 'unpause'}


# Stacks, and those who watch them


class Bench:
    """What all measurements need."""

    def __init__(self, options: argparse.Namespace, work: pathlib.Path, engine: lab.Engine) -> None:
        self.options, self.work, self.engine, self.log = options, work, engine, EventLog(engine)
        self.compose = shlex.split(options.compose_command)
        self.rounds = options.rounds
        self.modules: Dict[str, pathlib.Path] = {}  # column -> file
        for path in options.module or [lab.MODULE]:
            environment = lab.module_environment(path)
            name = lab.call(*lab.module_command(path, '--version'), env=environment).split()[-1]
            self.modules[f'{name} in {path.parent}' if name in self.modules else name] = path


class Stack:
    """A Compose project of its own; as a context manager, it leaves nothing behind."""

    def __init__(self, bench: Bench, *services: str) -> None:
        self.bench, self.services = bench, services or ('one', 'two')
        self.project = f'p{random.randrange(16**8):08x}'
        self.file = bench.work / self.project / 'docker-compose.yml'
        self.file.parent.mkdir()
        run = 'command: [sh, -c, "trap exit TERM; sleep 99999 & wait"]'
        service = f'{{network_mode: host, image: busybox, {run}}}'
        lines = [f'  {name}: {service}\n' for name in self.services]
        self.file.write_text('services:\n' + ''.join(lines))
        self.output = self.file.with_name('log')
        self.command = [*bench.compose, '-f', str(self.file)]

    def __enter__(self) -> 'Stack':
        return self

    def __exit__(self, *_: object) -> None:
        containers = [box.id for box in self.bench.engine.look(self.project)]
        if containers:
            lab.call('docker', 'rm', '--force', *containers)
        self.run('down')

    def run(self, *arguments: str) -> float:
        """Run a Compose command; the seconds it took."""
        began = time.monotonic()
        with self.output.open('a') as log:
            lab.call(*self.command, *arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return time.monotonic() - began

    def events(self, since: float = 0.0) -> List[Event]:
        """What has happened to its containers, from a moment on."""
        return self.bench.log.of(self.project, since)

    def is_up(self) -> bool:
        """Whether all its services run, by the events so far."""
        changes = last_changes(self.events())
        return len(changes) == len(self.services) and are_up(changes)


class Module:
    """The module as its users start it, on a stack."""

    def __init__(self, stack: Stack, path: pathlib.Path, *options: str, **variables: str) -> None:
        self.stack, began = stack, time.monotonic()
        compose = shlex.join(stack.bench.compose)
        arguments = ['run', '--compose-command', compose, '--file', str(stack.file), *options]
        with stack.output.open('a') as log:
            streams: Dict[str, Any] = {'stdin': subprocess.DEVNULL, 'stdout': log, 'stderr': log}
            self.process = subprocess.Popen(
                lab.module_command(path, *arguments),
                env=lab.module_environment(path, **variables),
                start_new_session=True,
                **streams,
            )
        lab.until(self.is_ready, 600, 'the stack is up and watched', pause=0.002)
        self.start_seconds = time.monotonic() - began

    def is_ready(self) -> bool:
        self.check()
        return 'up and watched' in self.stack.output.read_text()

    def expect(self, breaks: Dict[str, str]) -> None:
        """Nothing: it has to find out by itself."""

    def check(self) -> None:
        """Complain if it has ended by itself."""
        if self.process.poll() is not None:
            raise lab.Failure('the module goes on', self.stack.output.read_text()[-2000:])

    def end(self) -> float:
        """Send the kill signal; the seconds until the exit."""
        limit = threading.Timer(120, self.process.kill)  # wait(120) looks every 50 ms only
        limit.start()
        began = time.monotonic()
        self.process.terminate()
        self.process.wait()
        limit.cancel()
        return time.monotonic() - began


class Floor:
    """A process that does the one fitting thing after the events that it is told."""

    def __init__(self, stack: Stack, column: str, endpoint: str) -> None:
        stack.run('up', '--detach')
        self.stack = stack
        context = multiprocessing.get_context('spawn')
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, endpoint, stack.project, len(stack.services), stack.command)
        target = be_socket_floor if column == SOCKET else be_command_line_floor
        self.process = context.Process(target=target, args=arguments)
        self.process.start()
        theirs.close()

    def expect(self, breaks: Dict[str, str]) -> None:
        """Tell what comes."""
        self.pipe.send((time.time(), breaks))
        time.sleep(0.2)

    def check(self) -> None:
        """Complain if it has ended by itself."""
        if not self.process.is_alive():
            raise lab.Failure('the floor goes on', f'exit code {self.process.exitcode}')

    def end(self) -> None:
        """End it; what it has started ends at the next event, or with the namespaces."""
        self.process.kill()
        self.process.join()


Watcher = Any  # a Module or a Floor


def be_command_line_floor(pipe: Any, _: str, project: str, count: int, compose: List[str]) -> None:
    """Wait for each expected event in `docker events`, and run the fitting command."""
    listening = ['docker', 'events', '--filter', f'label={LABEL}project={project}']
    streams: Dict[str, Any] = {'stdout': subprocess.PIPE, 'stderr': subprocess.DEVNULL}
    lines: Any = subprocess.Popen([*listening, '--format', '{{json .}}'], **streams).stdout
    while True:
        since, breaks = pipe.recv()
        gone, children = list(breaks), []
        for event in expected_events(lines, since, breaks):
            if event.action in REPAIRS:
                command = ['docker', REPAIRS[event.action], event.container]
                children.append(subprocess.Popen(command, **streams))
            elif not breaks:
                command = [*compose, 'up', '--detach', '--no-recreate', *gone]
                children.append(subprocess.Popen(command, **streams))
        for child in children:
            child.communicate()


def be_socket_floor(pipe: Any, endpoint: str, project: str, count: int, _: List[str]) -> None:
    """The same with GET /events and requests on connections that are kept."""
    connections = [lab.Connection(open_socket(endpoint), None) for _round in range(count)]
    for connection in connections:
        connection.request('GET', '/_ping')  # over ssh, this takes half a second
        connection.getresponse().read()
    lines = follow_events(lab.Connection(open_socket(endpoint), None), f'{LABEL}project={project}')
    while True:
        answers = []
        for event, connection in zip(expected_events(lines, *pipe.recv()), connections):
            connection.request('POST', f'/containers/{event.container}/{REPAIRS[event.action]}')
            answers.append(connection)
        for connection in answers:
            connection.getresponse().read()


def expected_events(
    lines: Iterator[bytes], since: float, breaks: Dict[str, str]
) -> Iterator[Event]:
    """The events that belong to a fault; each is taken from what is expected."""
    while breaks:
        event = read_event(next(lines))
        if event.time >= since and breaks.get(event.service) == event.action:
            del breaks[event.service]
            yield event


def open_socket(endpoint: str) -> socket.socket:
    """A connection to the engine."""
    if endpoint.startswith('ssh:'):
        ours, theirs = socket.socketpair()
        command = ['docker', '-H', endpoint, 'system', 'dial-stdio']
        subprocess.Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno())
        theirs.close()
        return ours
    opened = socket.socket(socket.AF_UNIX)
    opened.connect(endpoint.replace('unix://', ''))
    return opened


# Recovery


class Recovery:
    """A stack, the watcher that it has, and how long both need to recover."""

    def __init__(self, stack: Stack, column: str, watcher: Watcher) -> None:
        self.stack, self.column, self.watcher, self.ready_at = stack, column, watcher, 0.0

    def measure(self, engine: lab.Engine, fault: Fault) -> float:
        """Let a fault befall the stack; the seconds it took to recover, PATIENCE if it did not."""
        time.sleep(max(0.0, self.ready_at - time.monotonic()))
        lab.until(self.stack.is_up, PATIENCE, f'{self.column}: the stack is up')
        self.watcher.check()
        services = dict(zip(('one', 'two'), random.sample(self.stack.services, 2)))
        breaks = {services[service]: action for service, action in fault.breaks.items()}
        changes = last_changes(self.stack.events())
        self.watcher.expect(breaks)
        since = time.time()
        fault.strike(engine, *[changes[service].container for service in services.values()])
        seconds = self.wait(since, breaks)
        self.ready_at = time.monotonic() + REST + random.uniform(0, 2)
        return seconds

    def wait(self, since: float, breaks: Dict[str, str]) -> float:
        """Wait until all is repaired and has been quiet for a second."""

        def is_quiet() -> bool:
            events = self.stack.events(since)
            return recovery_time(events, breaks) < math.inf and time.time() - events[-1].time > 1

        try:
            lab.until(is_quiet, PATIENCE, 'repaired')
        except lab.Failure:
            self.stack.run('up', '--detach')
            return PATIENCE
        return recovery_time(self.stack.events(since), breaks)


def start_watchers(
    exits: contextlib.ExitStack, bench: Bench, columns: Sequence[str], endpoint: str, *options: str
) -> List[Recovery]:
    """A stack and a watcher for each of the columns."""
    started = []
    for column in columns:
        stack = exits.enter_context(Stack(bench))
        if column in bench.modules:
            path = bench.modules[column]
            watcher: Watcher = Module(stack, path, *options, DOCKER_HOST=endpoint)
        else:
            watcher = Floor(stack, column, endpoint)
        exits.callback(watcher.end)
        started.append(Recovery(stack, column, watcher))
    time.sleep(WARM_UP)
    return started


def measure_faults(
    bench: Bench, names: Sequence[str], columns: Sequence[str], endpoint: str, *options: str
) -> List[Figure]:
    """One row for each kind of fault."""
    figures = {name: Figure(name, 's', {column: [] for column in columns}) for name in names}
    with contextlib.ExitStack() as exits:
        watchers = start_watchers(exits, bench, columns, endpoint, *options)
        for name in list(names) * bench.rounds:
            for watcher in watchers:
                if watcher.column != SOCKET or 'destroy' not in FAULTS[name].breaks.values():
                    seconds = watcher.measure(bench.engine, FAULTS[name])
                    figures[name].samples[watcher.column].append(seconds)
            say(show_row(figures[name], -1))
    return list(figures.values())


def measure_by_hand(bench: Bench, names: Sequence[str]) -> List[Figure]:
    """What people and Compose do, at settle 0."""
    columns, endpoint = [CLI, SOCKET, *bench.modules], os.environ['DOCKER_HOST']
    return measure_faults(bench, names, columns, endpoint, '--settle', '0')


def measure_crash(bench: Bench, names: Sequence[str]) -> List[Figure]:
    """A process that ends by itself, at the default settings."""
    return measure_faults(bench, names, [CLI, SOCKET, *bench.modules], os.environ['DOCKER_HOST'])


def measure_ssh(bench: Bench, names: Sequence[str]) -> List[Figure]:
    """Kill and pause with an sshd of its own between the watcher and the engine."""
    if not os.path.exists(SSHD):
        say('over ssh: skipped, for there is no openssh-server')
        return []
    folder, path = bench.work / 'ssh', os.environ['PATH']
    write_ssh_files(folder, bench.engine.socket)
    server = subprocess.Popen([SSHD, '-D', '-q', '-f', str(folder / 'server')])
    os.environ['PATH'] = f'{folder}:{path}'
    try:
        greeting = ['ssh', '127.0.0.1', 'true']
        lab.until(lambda: subprocess.call(greeting) == 0, 20, 'sshd answers')
        columns, endpoint = [SOCKET, *bench.modules], 'ssh://root@127.0.0.1'
        figures = measure_faults(bench, names, columns, endpoint, '--settle', '0')
    finally:
        os.environ['PATH'] = path
        server.terminate()
    return [figure._replace(name=f'over ssh: {figure.name}') for figure in figures]


def write_ssh_files(folder: pathlib.Path, engine: str) -> None:
    """All that ssh needs on both sides, and the engine where the far side looks for it."""
    folder.mkdir()
    pathlib.Path('/run/sshd').mkdir()
    pathlib.Path('/run/docker.sock').symlink_to(engine)
    lab.call('ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', str(folder / 'key'))
    (folder / 'server').write_text(SSHD_CONFIG.format(folder=folder))
    (folder / 'client').write_text(SSH_CONFIG.format(folder=folder))
    (folder / 'ssh').write_text(SSH_WRAPPER.format(folder=folder, ssh=shutil.which('ssh')))
    (folder / 'ssh').chmod(0o755)


def measure_crowd(bench: Bench) -> List[Figure]:
    """Many killed at once, at settle 0 and by hand."""
    figure = Figure(f'{VICTIMS} of {CROWD} killed', 's', {})
    names = [f's{number}' for number in range(CROWD)]
    with contextlib.ExitStack() as exits:
        stacks = {}
        for column, path in bench.modules.items():
            stacks[column] = exits.enter_context(Stack(bench, *names))
            exits.callback(Module(stacks[column], path, '--settle', '0').end)
        by_hand = exits.enter_context(Stack(bench, *names))
        by_hand.run('up', '--detach')
        stacks.update({CLI: by_hand, SOCKET: by_hand})
        for _round in range(bench.rounds):
            time.sleep(REST)
            for column, stack in stacks.items():
                figure.samples.setdefault(column, []).append(kill_many(bench, column, stack))
            say(show_row(figure, -1))
    return [figure]


def kill_many(bench: Bench, column: str, stack: Stack) -> float:
    """Seconds from the first death to the last start."""
    lab.until(stack.is_up, PATIENCE, 'the stack is up')
    changes, since = last_changes(stack.events()), time.time()
    victims = {name: changes[name].container for name in random.sample(stack.services, VICTIMS)}
    ids = list(victims.values())
    at_once(lambda container: bench.engine.do('POST', f'/containers/{container}/kill'), ids)
    if column == CLI:
        lab.call('docker', 'start', *ids)
    if column == SOCKET:
        at_once(lambda container: bench.engine.do('POST', f'/containers/{container}/start'), ids)

    def all_died() -> bool:
        died = {event.container for event in stack.events(since) if event.action == 'die'}
        return died >= set(ids) and stack.is_up()

    lab.until(all_died, PATIENCE, f'{column}: all have died and run again')
    times = [event.time for event in stack.events(since) if event.action in ('die', 'start')]
    return times[-1] - times[0]


# What it costs


def measure_idle(bench: Bench) -> List[Figure]:
    """CPU for each number of containers, and the children of all of them."""
    figures = {count: Figure(f'idle CPU, {count} containers', 's/min', {}) for count in COUNTS}
    children = Figure('idle: child processes', '', {})
    with contextlib.ExitStack() as exits:
        modules = []
        for column, path in bench.modules.items():
            for count in COUNTS:
                stack = exits.enter_context(
                    Stack(bench, *[f's{number}' for number in range(count)])
                )
                module = Module(stack, path)
                exits.callback(module.end)
                modules.append((column, count, module.process.pid))
        time.sleep(INTERVAL + WARM_UP)
        for _round in range(IDLE_SAMPLES):
            before = [lab.cpu_seconds(pid) for _, _, pid in modules]
            time.sleep(IDLE_SECONDS)
            for (column, count, pid), cpu in zip(modules, before):
                used = (lab.cpu_seconds(pid) - cpu) * 60 / IDLE_SECONDS
                figures[count].samples.setdefault(column, []).append(used)
                children.samples.setdefault(column, []).append(len(lab.find_tree(pid)) - 1)
    return [*figures.values(), children]


def measure_memory(bench: Bench) -> List[Figure]:
    """MiB that a host gains by the import, and by a watcher that has made an interval check."""
    parts = ('import', 'import and watching')
    rows = [
        Figure(f'memory, {part}: {kind}', 'MiB', {}) for part in parts for kind in ('PSS', 'USS')
    ]
    for column, path in [*bench.modules.items()] * min(bench.rounds, 3):
        with Stack(bench) as stack:
            environment = lab.module_environment(
                path,
                BROAPT_DOCKER_COMPOSE=str(stack.file),
                BROAPT_COMPOSE_COMMAND=bench.options.compose_command,
            )
            code = HOST.format(module=path.stem, seconds=INTERVAL + 2)
            output = lab.call(sys.executable, '-S', '-c', code, env=environment)
        for row, value in zip(rows, output.rpartition('MEMORY ')[2].split()):
            row.samples.setdefault(column, []).append(float(value))
    return rows


def measure_life(bench: Bench) -> List[Figure]:
    """Start and end, and the bare commands."""
    figures = Figure('start', 's', {}), Figure('end', 's', {})
    for _round in range(bench.rounds):
        for column in [BARE, *bench.modules]:
            with Stack(bench) as stack:
                for figure, seconds in zip(figures, live(stack, column)):
                    figure.samples.setdefault(column, []).append(seconds)
        say(f'{show_row(figures[0], -1)}; {show_row(figures[1], -1)}')
    return list(figures)


def live(stack: Stack, column: str) -> Tuple[float, float]:
    """Seconds until a stack is up, and then until it is down."""
    if column == BARE:
        start = stack.run('up', '--build', '--detach')
        time.sleep(WARM_UP)
        return start, stack.run('stop') + stack.run('down')
    module = Module(stack, stack.bench.modules[column])
    time.sleep(WARM_UP)
    return module.start_seconds, module.end()


def measure_status(bench: Bench) -> List[Figure]:
    """The module's `status`, and the bare `ps`."""
    figure = Figure('status', 's', {BARE: []})
    with Stack(bench) as stack:
        stack.run('up', '--detach')
        options = ('--file', str(stack.file), '--compose-command', bench.options.compose_command)
        for _round in range(2 * bench.rounds):
            figure.samples[BARE].append(stack.run('ps'))
            for column, path in bench.modules.items():
                began = time.monotonic()
                lab.call(
                    *lab.module_command(path, 'status', *options), env=lab.module_environment(path)
                )
                figure.samples.setdefault(column, []).append(time.monotonic() - began)
    return [figure]


# The report


def show(values: Sequence[float]) -> str:
    """«median (worst)», or the only value."""
    median, worst = statistics.median(values), max(values)
    digits = 2 if median >= 1 or not median else 3
    text = f'{median:.{digits}f}'
    return text if len(values) == 1 else f'{text} ({worst:.{digits}f})'


def show_row(figure: Figure, start: int = 0) -> str:
    """A figure on one line; start -1: the latest samples only."""
    cells = [
        f'{column} {show(values[start:])}' for column, values in figure.samples.items() if values
    ]
    return f'{figure.name}: {", ".join(cells)}'


def print_table(title: str, columns: Sequence[str], figures: Sequence[Figure]) -> None:
    """Some figures in Markdown."""
    if figures:
        print(f'\n| {title} | {" | ".join(columns)} |', '|---|' + '---|' * len(columns), sep='\n')
    for figure in figures:
        cells = [
            show(figure.samples[column]) if figure.samples.get(column) else '' for column in columns
        ]
        print(f'| {figure.name}{figure.unit and ", "}{figure.unit} | {" | ".join(cells)} |')


def judge(goal: Goal, figure: Figure, column: str) -> float:
    """What a median is by the goal's measure."""
    measured = statistics.median(figure.samples[column])
    if goal.kind == 'at most':
        return measured
    beside = statistics.median(figure.samples[goal.against])
    return measured / beside if goal.kind == 'times' else measured - beside


def print_goals(modules: Sequence[str], figures: Sequence[Figure]) -> None:
    """Each goal for which there are figures, and whether it is met."""
    print('\n| goal (medians) | module | measured | allowed | |', '|---|---|---|---|---|', sep='\n')
    found = {figure.name: figure for figure in figures}
    for goal in GOALS:
        for column in modules if goal.figure in found else ():
            measured = judge(goal, found[goal.figure], column)
            verdict = 'met' if measured <= goal.allowed else 'missed'
            what = f'{goal.figure}: {goal.kind} {goal.against}'.rstrip()
            print(f'| {what} | {column} | {measured:.3f} | {goal.allowed:g} | {verdict} |')


def print_report(bench: Bench, figures: Sequence[Figure]) -> None:
    """All of it, and where it was measured."""
    engine = bench.engine.get('/version')['Version']
    compose = lab.call(*bench.compose, 'version', '--short')
    machine = f'Python {platform.python_version()}, {os.cpu_count()} cores'
    print(f'Docker Engine {engine}, {shlex.join(bench.compose)} {compose}, {machine}')
    modules = list(bench.modules)
    floors = [figure for figure in figures if SOCKET in figure.samples]
    others = [figure for figure in figures if SOCKET not in figure.samples]
    print_table('from the fault to running again', [CLI, SOCKET, *modules], floors)
    print_table('cost', [BARE, *modules], others)
    print_goals(modules, figures)


BY_HAND = [name for name in FAULTS if name != 'crash']
SECTIONS: Dict[str, Callable[[Bench], List[Figure]]] = {
    'crash': lambda bench: measure_crash(bench, ['crash']),
    'ssh': lambda bench: measure_ssh(bench, ['kill', 'pause']),
    'crowd': measure_crowd,
    'idle': measure_idle,
    'memory': measure_memory,
    'life': measure_life,
    'status': measure_status,
}


def perform(options: argparse.Namespace, work: pathlib.Path) -> int:
    """Measure what was asked for, and print the report; 1 if something could not be measured."""
    figures: List[Figure] = []
    failed = 0
    with lab.Engine(work) as engine:
        bench = Bench(options, work, engine)
        by_hand = [name for name in BY_HAND if name in options.only]
        sections = {name: SECTIONS[name] for name in SECTIONS if name in options.only}
        if by_hand:
            sections = {'by hand': partial(measure_by_hand, names=by_hand), **sections}
        for name, measure in sections.items():
            say(f'{name} ...')
            try:
                figures += measure(bench)
            except lab.Failure as error:
                failed = 1
                say(f'{name}: expected: {error.args[0]}, seen: {error.args[1]}')
        print_report(bench, figures)
    return failed


def parse_options() -> argparse.Namespace:
    """The command line."""
    names = [*BY_HAND, *SECTIONS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--only', metavar='NAME', type=lambda text: text.split(','), help=', '.join(names)
    )
    parser.add_argument(
        '--rounds', metavar='N', type=int, default=10, help='(default: %(default)s)'
    )
    parser.add_argument(
        '--module',
        metavar='PATH',
        type=lambda path: pathlib.Path(path).resolve(),
        action='append',
        help='another file; repeatable',
    )
    parser.add_argument(
        '--compose-command', metavar='CMD', default='docker compose', help='(default: %(default)s)'
    )
    options = parser.parse_args()
    options.only = options.only or names
    if set(options.only) - set(names):
        parser.error(f'--only takes {", ".join(names)}')
    return options


def main() -> int:
    """Run in namespaces of its own; return the exit code."""
    options = parse_options()
    return lab.run_apart(lambda work: perform(options, work))


if __name__ == '__main__':
    sys.exit(main())
