#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""Measure broapt_compose.py on a real Docker engine, beside what it is compared with, and print one Markdown table.

    .ci/bench.py                                                  everything, in about 45 minutes
    .ci/bench.py --only recovery --faults kill,pause --rounds 3
    .ci/bench.py --only end,import --json

recovery  from a fault's last event to the last start or unpause event, by the engine's clock: this module at settle 0
          and at its default; the floor, a listener on `docker events` that is told which fault comes, issues the one
          fitting command at once and checks nothing; the poller of 2019, one `docker inspect` per container every 10 s.
          Each has a stack of two services; each fault befalls one after the other, at random moments.
idle      CPU of the watcher and its children (not of the engine); `docker` commands started, counted by a wrapper on
          PATH that costs each of them under a millisecond; PSS of the watcher with and without its children.
end       from the signal to the exit, against `stop` and `down` by hand.
import    a whole `python -c 'import broapt_compose'` against `python -c pass`: time, and peak RSS as the process itself
          sees it; what the import, and then the running thread watcher, add to the PSS of a host process.

Several samples are shown as «median (worst)». Containers use the host's network unless told otherwise: they start
quickest, so that what the watchdog adds shows most. Python runs with -S: what others have put into site-packages is
not measured.
"""

import argparse
import contextlib
import inspect
import json
import math
import os
import pathlib
import platform
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
PYTHON = (sys.executable, '-S')
MODULE_0, MODULE, LEAST, POLLER = COLUMNS = ('module, settle 0', 'module', 'floor or bare', '2019 poller')
SETTLE = 1.0  # the module's default, seconds
INTERVAL = 10.0  # the module's default and the poller's, seconds
REST = 11.0  # between two faults of a stack, seconds: ten of running clear the module's history of a service
PATIENCE = 60.0  # in the table this means: not repaired after so many seconds
WARM_UP = 4.0  # from a stack that runs to a watcher that surely watches, seconds
LABEL = 'com.docker.compose.'
HOST = """
import http.server, inspect, json, logging, queue, subprocess, tempfile, time, typing, uuid  # as Flask and broaptd do

def pss():
    return int(open('/proc/self/smaps_rollup').read().split('Pss:')[1].split()[0]) / 1024

bare = pss() and pss()
import broapt_compose
imported = pss()
with broapt_compose.docker_compose():
    time.sleep({seconds})
    print('PSS', imported - bare, pss() - bare, flush=True)
"""


class Fault(NamedTuple):
    """Something that befalls a stack of the services «one» and «two»."""

    commands: Tuple[str, ...]  # all at once; {one} and {two} are container ids
    breaks: Dict[str, str]  # service -> the event that completes the fault


FAULTS = {
    'kill': Fault(('docker kill {one}',), {'one': 'die'}),
    'stop': Fault(('docker stop {one}',), {'one': 'die'}),
    'pause': Fault(('docker pause {one}',), {'one': 'pause'}),
    'remove': Fault(('docker rm --force {one}',), {'one': 'destroy'}),
    'down': Fault(('{compose} down',), {'one': 'destroy', 'two': 'destroy'}),
    'pause+stop': Fault(('docker pause {one}', 'docker stop {two}'), {'one': 'pause', 'two': 'die'}),
}


class Event(NamedTuple):
    """One line of `docker events`."""

    time: float  # seconds since 1970
    action: str
    container: str
    project: str
    service: str


class Figure(NamedTuple):
    """One row of the table."""

    what: str
    unit: str
    samples: Dict[str, List[float]]  # column -> values


class Goal(NamedTuple):
    """What issue 4 asks for; met if measured <= allowed."""

    what: str
    measured: float
    allowed: float


def say(text: str) -> None:
    """Tell the progress on standard error."""
    print(f'bench: {text}', file=sys.stderr, flush=True)


# The engine


class EventLog:
    """All that happens to this bench's containers, kept by a thread that reads one `docker events`."""

    def __init__(self) -> None:
        self._events: List[Event] = []
        command = f'docker events --since {int(time.time())} --filter type=container --format'
        self._child = subprocess.Popen([*command.split(), '{{json .}}'], stdout=subprocess.PIPE, text=True)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._child.stdout or ():
            event = json.loads(line)
            labels = event['Actor']['Attributes']
            project, service = labels.get(f'{LABEL}project', ''), labels.get(f'{LABEL}service', '')
            if project.startswith(f'bench-{os.getpid()}-'):
                moment = event['timeNano'] / 1e9
                self._events.append(Event(moment, event['Action'], event['Actor']['ID'], project, service))

    def of(self, project: str, since: float = 0.0) -> List[Event]:
        """The events of a project so far, from a moment on (seconds since 1970)."""
        return [event for event in list(self._events) if event.project == project and event.time >= since]

    def close(self) -> None:
        """End the child, and the thread with it."""
        self._child.kill()
        self._child.wait()


def last_changes(events: Sequence[Event]) -> Dict[str, Event]:
    """For each service the latest event that brought it up or down."""
    return {event.service: event for event in events if event.action in ('start', 'unpause', 'die', 'pause', 'destroy')}


def are_up(changes: Dict[str, Event]) -> bool:
    """Whether the latest change of every service brought it up."""
    return all(event.action in ('start', 'unpause') for event in changes.values())


def recovery_time(events: Sequence[Event], breaks: Dict[str, str]) -> float:
    """Seconds from the last event of the fault to the last repair; infinite as long as anything is down."""
    first = {(event.service, event.action): event.time for event in reversed(events)}
    changes = last_changes(events)
    if not first.keys() >= breaks.items() or not are_up(changes):
        return math.inf
    return max(event.time for event in changes.values()) - max(first[cause] for cause in breaks.items())


def wait_until(done: Callable[[], bool], seconds: float) -> None:
    """Look every 50 ms until done, at most so many seconds."""
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        time.sleep(0.05)


def list_containers(project: str) -> List[str]:
    """The ids of a project's containers, whatever their state."""
    command = ['docker', 'ps', '--all', '--quiet', '--filter', f'label={LABEL}project={project}']
    return subprocess.check_output(command, text=True).split()


class Stack:
    """A Compose project of its own, in a folder that gives it its name."""

    def __init__(self, options: argparse.Namespace, name: str, services: Sequence[str] = ('one', 'two')) -> None:
        self.options, self.services, self.project = options, services, f'bench-{os.getpid()}-{name}'
        self.file = pathlib.Path(options.work, self.project, 'docker-compose.yml')
        self.file.parent.mkdir()
        network = '' if options.network == 'default' else f'network_mode: {options.network}, '
        service = f'{{{network}image: busybox, command: [sh, -c, "trap exit TERM; sleep 99999 & wait"]}}'
        self.file.write_text('services:\n' + ''.join(f'  {name}: {service}\n' for name in services))
        self.log = self.file.with_name('log').open('a')
        self.command = [*shlex.split(options.compose), '-f', str(self.file)]

    def compose(self, *arguments: str) -> None:
        """Run one Compose command."""
        subprocess.run([*self.command, *arguments], stdout=self.log, stderr=self.log, check=True)

    def remove(self) -> None:
        """Leave nothing of the stack behind, whatever state it is in."""
        containers = list_containers(self.project)
        if containers:
            subprocess.run(['docker', 'rm', '--force', '--volumes', *containers], stdout=self.log, check=False)
        self.compose('down')


# The watchers compared


class Watcher:
    """A process that watches a stack: this file as floor or poller, or the module as its users start it."""

    def __init__(self, stack: Stack, column: str, path: str) -> None:
        self.stack, self.column, self.ready_at = stack, column, 0.0
        command = ['-c', watcher_source(be_floor if column == LEAST else be_poller), stack.project, *stack.command]
        if column in (MODULE_0, MODULE):
            options = f'--settle {0 if column == MODULE_0 else SETTLE} -f {stack.file} run'
            command = ['-m', 'broapt_compose', '--compose-command', stack.options.compose, *options.split()]
        env, log = {**stack.options.environment, 'PATH': path}, stack.log
        self.process = subprocess.Popen(
            [*PYTHON, *command], env=env, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True, start_new_session=True
        )

    def expect(self, breaks: Dict[str, str]) -> None:
        """Tell the floor what to wait for; it is the only one that is told."""
        if self.column == LEAST and self.process.stdin:
            print(json.dumps(breaks), file=self.process.stdin, flush=True)
            time.sleep(0.2)

    def check(self) -> None:
        """Complain if the watcher has ended by itself."""
        if self.process.poll() is not None:
            log = pathlib.Path(self.stack.log.name).read_text()
            raise RuntimeError(f'{self.column} ended with {self.process.returncode}:\n{log[-2000:]}')

    def end(self) -> float:
        """Send the kill signal; the seconds until the exit. What is left of its children is killed."""
        children = process_tree(self.process.pid)[1:]
        limit = threading.Timer(300, self.process.kill)  # not wait(300): that looks every 50 ms only
        limit.start()
        start = time.monotonic()
        self.process.terminate()
        self.process.wait()
        seconds = time.monotonic() - start
        limit.cancel()
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return seconds


@contextlib.contextmanager
def watching(log: EventLog, stack: Stack, column: str, path: str = os.environ['PATH']) -> Iterator[Watcher]:
    """A stack that runs, and a watcher that has begun to watch it; neither is left in the end."""
    with contextlib.ExitStack() as exits:
        exits.callback(stack.remove)
        if column in (LEAST, POLLER):
            stack.compose('up', '--detach')
        watcher = Watcher(stack, column, path)
        exits.callback(watcher.end)

        def is_up() -> bool:
            changes = last_changes(log.of(stack.project))
            return len(changes) == len(stack.services) and are_up(changes) or watcher.process.poll() is not None

        wait_until(is_up, 600)
        time.sleep(WARM_UP)
        watcher.check()
        yield watcher


def watcher_source(watch: Callable[[str, List[str]], None]) -> str:
    """A program of one function of this file: a process that does without what the rest of the file imports."""
    head = 'import json, subprocess, sys, threading, time\nfrom typing import Dict, List'
    constants = f'LABEL, INTERVAL = {LABEL!r}, {INTERVAL}'
    call = f'{watch.__name__}(sys.argv[1], sys.argv[2:])'
    return '\n'.join([head, constants, inspect.getsource(list_containers), inspect.getsource(watch), call])


def be_floor(project: str, compose: List[str]) -> None:
    """The least a watcher can do: wait for the events named on standard input, then one command, unchecked."""
    expected: Dict[str, str] = {}
    gone: List[str] = []
    threading.Thread(target=lambda: [expected.update(json.loads(line)) for line in sys.stdin], daemon=True).start()
    line_format = '{{.Action}} {{.ID}} {{index .Actor.Attributes "%sservice"}}' % LABEL
    listening = ['docker', 'events', '--filter', f'label={LABEL}project={project}', '--format', line_format]
    for line in subprocess.Popen(listening, stdout=subprocess.PIPE, text=True).stdout or ():
        action, container, service = line.split()
        if expected.get(service) != action:
            continue
        del expected[service]
        if action != 'destroy':
            subprocess.Popen(['docker', {'die': 'start', 'pause': 'unpause'}[action], container])
            continue
        gone.append(service)
        if not expected:
            subprocess.Popen([*compose, 'up', '--detach', '--no-recreate', *gone])
            gone = []


def be_poller(project: str, compose: List[str]) -> None:
    """BroAPT's way of 2019, but forgiving: it lives through a removed container, and unpauses only what is paused."""
    containers = list_containers(project)
    while True:
        states = {}
        for container in containers:
            command = ['docker', 'inspect', '--format', '{{.State.Status}}', container]
            states[container] = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout.strip()
        paused = [container for container, state in states.items() if state == 'paused']
        if paused:
            subprocess.run(['docker', 'unpause', *paused], check=False)
        if set(states.values()) - {'running', 'paused'}:
            subprocess.run([*compose, 'up', '--detach'], check=False)
            containers = list_containers(project)
        time.sleep(INTERVAL)


# Recovery


def strike(log: EventLog, watcher: Watcher, fault: Fault) -> float:
    """Let a fault befall the watcher's stack; the seconds it took to recover, PATIENCE if it did not."""
    stack = watcher.stack
    services = dict(zip(('one', 'two'), random.sample(stack.services, 2)))
    breaks = {services[service]: action for service, action in fault.breaks.items()}
    changes = last_changes(log.of(stack.project))
    words = {word: changes[service].container for word, service in services.items()}
    watcher.check()
    watcher.expect(breaks)
    since = time.time()
    commands = [shlex.split(text.format(compose=shlex.join(stack.command), **words)) for text in fault.commands]
    children = [subprocess.Popen(command, stdout=stack.log, stderr=stack.log) for command in commands]
    codes = [child.wait() for child in children]
    if any(codes):  # at settle 0, a container can be running again before `down` removes it
        say(f'{watcher.column}: the fault itself failed, again: {" + ".join(fault.commands)}')
        wait_until(lambda: are_up(last_changes(log.of(stack.project))), PATIENCE)
        time.sleep(REST)
        return strike(log, watcher, fault)

    def is_quiet() -> bool:
        events = log.of(stack.project, since)
        return recovery_time(events, breaks) < math.inf and time.time() - events[-1].time > 1

    wait_until(is_quiet, PATIENCE)
    seconds = recovery_time(log.of(stack.project, since), breaks)
    if seconds == math.inf:
        stack.remove()
        stack.compose('up', '--detach')
    return min(seconds, PATIENCE)


def measure_recovery(options: argparse.Namespace, log: EventLog) -> List[Figure]:
    """One row for each kind of fault."""
    figures = {name: Figure(f'recovery: {name}', 's', {column: [] for column in COLUMNS}) for name in options.faults}
    with contextlib.ExitStack() as exits:
        stacks = {column: Stack(options, f'recovery{number}') for number, column in enumerate(COLUMNS)}
        watchers = [exits.enter_context(watching(log, stack, column)) for column, stack in stacks.items()]
        for number, name in ((number, name) for number in range(options.rounds) for name in options.faults):
            for watcher in sorted(watchers, key=lambda watcher: watcher.ready_at):
                if watcher.column != POLLER or number < options.poller_rounds:
                    time.sleep(max(0.0, watcher.ready_at - time.monotonic()))
                    figures[name].samples[watcher.column].append(strike(log, watcher, FAULTS[name]))
                    watcher.ready_at = time.monotonic() + REST + random.uniform(0, INTERVAL)
            say(f'round {number + 1}: {show_row(figures[name], -1)}')
    return list(figures.values())


# Idle


def read_stat(pid: int) -> List[str]:
    """The fields of /proc/PID/stat (proc(5)) from the third on; none if the process has gone."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    return []


def process_tree(pid: int) -> List[int]:
    """A process and all its descendants."""
    stats = {int(name): read_stat(int(name)) for name in os.listdir('/proc') if name.isdigit()}
    tree = [pid]
    for parent in tree:
        tree += [child for child, stat in stats.items() if stat and int(stat[1]) == parent]
    return tree


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, of its children that have ended and of those that live; taken while none comes or goes."""
    while True:
        tree = process_tree(pid)
        stats = [read_stat(member) for member in tree]
        if all(stats) and tree == process_tree(pid):
            return sum(int(field) for stat in stats for field in stat[11:15]) / os.sysconf('SC_CLK_TCK')


def find_mib(name: str, text: str) -> float:
    """A value in KiB from one of the files in /proc."""
    found = re.search(rf'^{name}:\s+(\d+)', text, re.M)
    return int(found[1]) / 1024 if found else 0.0


def pss_mib(pids: Sequence[int]) -> float:
    """Proportional set size of some processes, together."""
    total = 0.0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            total += find_mib('Pss', pathlib.Path(f'/proc/{pid}/smaps_rollup').read_text())
    return total


def make_counter(options: argparse.Namespace) -> pathlib.Path:
    """A file that grows by a byte for each docker or docker-compose found by way of its folder."""
    counter = pathlib.Path(tempfile.mkdtemp(dir=options.work), 'count')
    counter.touch()
    for name in filter(shutil.which, ('docker', 'docker-compose')):
        wrapper = counter.with_name(name)
        wrapper.write_text(f'#!/bin/sh\necho >>{counter}\nexec {shutil.which(name)} "$@"\n')
        wrapper.chmod(0o755)
    return counter


def measure_idle(options: argparse.Namespace, log: EventLog) -> List[Figure]:
    """Four rows for each number of containers."""
    figures = []
    for count in map(int, options.containers):
        units = {'CPU': 's/min', 'commands': '/min', 'PSS with children': 'MiB', 'PSS without': 'MiB'}
        rows = [Figure(f'idle, {count} containers: {what}', unit, {}) for what, unit in units.items()]
        for column in (POLLER, MODULE):
            stack = Stack(options, f'idle{count}-{column[:1]}', [f's{number}' for number in range(count)])
            counter = make_counter(options)
            with watching(log, stack, column, f'{counter.parent}{os.pathsep}{os.environ["PATH"]}') as watcher:
                samples = idle_samples(watcher.process.pid, counter, options.idle_seconds)
                watcher.check()
            for row, values in zip(rows, samples):
                row.samples[column] = values
                say(f'{column}: {row.what}, {row.unit}: {show(values)}')
        figures += rows
    return figures


def idle_samples(pid: int, counter: pathlib.Path, seconds: float) -> Tuple[List[float], ...]:
    """CPU and commands per minute, and PSS with and without the children five times in between."""
    trees, alones = [], []
    start, cpu, count = time.monotonic(), cpu_seconds(pid), counter.stat().st_size
    for part in range(1, 6):
        time.sleep(max(0.0, start + seconds * part / 5 - time.monotonic()))
        trees.append(pss_mib(process_tree(pid)))
        alones.append(pss_mib([pid]))
    minutes = (time.monotonic() - start) / 60
    return [(cpu_seconds(pid) - cpu) / minutes], [(counter.stat().st_size - count) / minutes], trees, alones


# The end and the beginning


def measure_end(options: argparse.Namespace, log: EventLog) -> List[Figure]:
    """One row: the module from its signal to its exit, and the bare commands."""
    figure = Figure('end of two services', 's', {MODULE: [], LEAST: []})
    for number in range(options.end_rounds):
        with watching(log, Stack(options, f'end{number}'), MODULE) as watcher:
            figure.samples[MODULE].append(watcher.end())
        stack = Stack(options, f'bare{number}')
        stack.compose('up', '--detach')
        time.sleep(WARM_UP)
        start = time.monotonic()
        stack.compose('stop')
        stack.compose('down')
        figure.samples[LEAST].append(time.monotonic() - start)
        say(show_row(figure, -1))
    return [figure]


def run_python(options: argparse.Namespace, code: str, **variables: str) -> Tuple[float, str]:
    """The milliseconds from start to end of `python -c`, and its output."""
    environment = {**options.environment, **variables}
    start = time.monotonic()
    output = subprocess.check_output([*PYTHON, '-c', code], env=environment, stderr=subprocess.DEVNULL, text=True)
    return (time.monotonic() - start) * 1000, output


def measure_import(options: argparse.Namespace, log: EventLog) -> List[Figure]:
    """Time and memory of the import, and what the module adds to a host process."""
    codes = {MODULE: 'import broapt_compose', LEAST: 'pass'}
    runs: Dict[str, List[Tuple[float, str]]] = {column: [] for column in codes}
    run_python(options, codes[MODULE])  # writes the byte code
    for _ in range(options.import_rounds):
        for column, code in codes.items():
            # not by getrusage(): its peak counts the parent's memory before the exec as well
            runs[column].append(run_python(options, f'{code}; print(open("/proc/self/status").read())'))
    times = {column: [run[0] for run in of_column] for column, of_column in runs.items()}
    peaks = {column: [find_mib('VmHWM', run[1]) for run in of_column] for column, of_column in runs.items()}
    hosts = [host_memory(options, number) for number in range(3)]
    return [
        Figure('import: whole process', 'ms', times),
        Figure('import: peak RSS', 'MiB', peaks),
        Figure('host process: import adds', 'MiB', {MODULE: [host[0] for host in hosts]}),
        Figure('host process: import and watching add', 'MiB', {MODULE: [host[1] for host in hosts]}),
    ]


def host_memory(options: argparse.Namespace, number: int) -> Tuple[float, ...]:
    """MiB of PSS that a host gains by the import, and by import and watcher after the first interval check."""
    stack = Stack(options, f'host{number}')
    try:
        variables = {'BROAPT_DOCKER_COMPOSE': str(stack.file), 'BROAPT_COMPOSE_COMMAND': options.compose}
        _, output = run_python(options, HOST.format(seconds=INTERVAL + 2), **variables)
    finally:
        stack.remove()
    return tuple(map(float, re.findall(r'^PSS (\S+) (\S+)$', output, re.M)[0]))


# The report


def show(values: Sequence[float]) -> str:
    """«median (worst)», or the only value."""
    median, worst = statistics.median(values), max(values)
    return f'{median:.2f}' if len(values) == 1 else f'{median:.2f} ({worst:.2f})'


def show_row(figure: Figure, start: int = 0) -> str:
    """A figure on one line; start -1: the latest samples only."""
    columns = [f'{column} {show(values[start:])}' for column, values in figure.samples.items() if values]
    return f'{figure.what}, {figure.unit}: {", ".join(columns)}'


def judge(figures: Sequence[Figure]) -> List[Goal]:
    """The goals of issue 4 for which there are figures: medians, as ratios."""
    columns = [(f'{figure.what}; {column}', values) for figure in figures for column, values in figure.samples.items()]
    middle = {name: statistics.median(values) for name, values in columns if values}
    goals = []

    def compare(what: str, first: str, second: str, allowed: float, less: float = 0.0) -> None:
        if first in middle and second in middle:
            goals.append(Goal(what, (middle[first] - less) / middle[second], allowed))

    for what in [f'recovery: {name}' for name in FAULTS if f'recovery: {name}; {LEAST}' in middle]:
        for label, column, settle in (('settle 0', MODULE_0, 0.0), ('default minus settle', MODULE, SETTLE)):
            if what == 'recovery: pause':
                over = middle[f'{what}; {column}'] - settle - middle[f'{what}; {LEAST}']
                goals.append(Goal(f'{what}, {label}: seconds over the floor', over, 0.05))
            else:
                compare(f'{what}, {label}: times the floor', f'{what}; {column}', f'{what}; {LEAST}', 1.2, settle)
    cpu = 'idle, {} containers: CPU; {}'.format
    compare('idle CPU at 100 containers: times that at 2', cpu(100, MODULE), cpu(2, MODULE), 1.3)
    compare("idle CPU at 100 containers: times the poller's at 20", cpu(100, MODULE), cpu(20, POLLER), 0.1)
    compare('end: times the bare commands', f'end of two services; {MODULE}', f'end of two services; {LEAST}', 1.15)
    if f'import: whole process; {MODULE}' in middle:
        over = middle[f'import: whole process; {MODULE}'] - middle[f'import: whole process; {LEAST}']
        added = middle[f'host process: import and watching add; {MODULE}']
        goals += [Goal('import: ms over the bare interpreter', over, 30), Goal('host process: MiB added', added, 2)]
    return goals


def describe(options: argparse.Namespace) -> str:
    """One line on where this was measured."""
    engine = subprocess.check_output(['docker', 'version', '--format', '{{.Server.Version}}'], text=True).strip()
    compose = subprocess.check_output([*shlex.split(options.compose), 'version', '--short'], text=True).strip()
    return (
        f'Docker Engine {engine}, {options.compose} {compose}, Python {platform.python_version()}, '
        f'{os.cpu_count()} cores, network {options.network}'
    )


def print_tables(where: str, figures: Sequence[Figure], goals: Sequence[Goal]) -> None:
    """The figures and the goals in Markdown."""
    print(where, '', f'| | {" | ".join(COLUMNS)} |', '|---|' + '---|' * len(COLUMNS), sep='\n')
    for figure in figures:
        cells = [show(figure.samples[column]) if figure.samples.get(column) else '' for column in COLUMNS]
        print(f'| {figure.what}, {figure.unit} | {" | ".join(cells)} |')
    print('', '| goal (medians) | measured | allowed | |', '|---|---|---|---|', sep='\n')
    for goal in goals:
        verdict = 'met' if goal.measured <= goal.allowed else 'missed'
        print(f'| {goal.what} | {goal.measured:.2f} | {goal.allowed:g} | {verdict} |')


def print_json(where: str, figures: Sequence[Figure], goals: Sequence[Goal]) -> None:
    """The same with all samples."""
    rows = [figure._asdict() for figure in figures]
    print(json.dumps({'where': where, 'figures': rows, 'goals': [goal._asdict() for goal in goals]}, indent=2))


SECTIONS = {'recovery': measure_recovery, 'idle': measure_idle, 'end': measure_end, 'import': measure_import}


def parse_options(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """The command line."""

    def words(text: str) -> List[str]:
        return text.split(',')

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', type=words, default=list(SECTIONS), help=','.join(SECTIONS))
    parser.add_argument('--faults', type=words, default=list(FAULTS), help=','.join(FAULTS))
    parser.add_argument('--rounds', type=int, default=10, help='of each fault (default: %(default)s)')
    parser.add_argument('--poller-rounds', type=int, default=3, help='the same for the poller (default: %(default)s)')
    parser.add_argument('--containers', type=words, default=['2', '20', '100'], help='idle (default: 2,20,100)')
    parser.add_argument('--idle-seconds', type=float, default=120.0, help='(default: %(default)s)')
    parser.add_argument('--end-rounds', type=int, default=5, help='(default: %(default)s)')
    parser.add_argument('--import-rounds', type=int, default=20, help='(default: %(default)s)')
    parser.add_argument('--compose', default='docker compose', help='the Compose command (default: %(default)s)')
    parser.add_argument('--network', default='host', help='host, none, or default: one of its own (default: host)')
    parser.add_argument('--json', action='store_true', help='print JSON, with all samples')
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the sections asked for and print the report."""
    options = parse_options(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    figures: List[Figure] = []
    with tempfile.TemporaryDirectory(prefix='bench-') as options.work, contextlib.closing(EventLog()) as log:
        options.environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONPYCACHEPREFIX': options.work}
        options.environment.pop('PYTHONDONTWRITEBYTECODE', None)
        for section in options.only:
            say(f'{section} ...')
            figures += SECTIONS[section](options, log)
    (print_json if options.json else print_tables)(describe(options), figures, judge(figures))
    return 0


if __name__ == '__main__':
    sys.exit(main())
