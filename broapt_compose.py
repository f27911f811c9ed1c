# SPDX-FileCopyrightText: 2026 the broapt_compose authors
# SPDX-License-Identifier: BSD-3-Clause
"""Docker watchdog: bring a Docker Compose stack up, keep it up, and stop it at the end.

As a library, in a host such as BroAPT's daemon (which has a copy of this one file, named ``compose.py``)::

    from broapt_compose import docker_compose, register

    register()                       # the kill signal ends the server
    with docker_compose():           # stack up, watcher running
        app.run()                    # Flask's own server, until the signal
    # stack stopped and cleaned up

From the command line: ``python -m broapt_compose [run | check | status] [OPTIONS]``; ``--help`` lists the options.

The watcher sees all containers of the project with one ``docker ps``, decides from that look what is wrong, and
mends it: paused containers are unpaused, stopped ones started, missing ones created, unhealthy ones restarted.
``docker events`` only wakes it; it looks at least every *interval* anyway. Other projects are never touched.

Each setting comes from an argument, else BroAPT's ``const`` module (the first three), else the environment:

======================  =======================================================================  ==================
variable                meaning                                                                  default
======================  =======================================================================  ==================
BROAPT_DOCKER_COMPOSE   Compose files, joined by os.pathsep (in const: DOCKER_COMPOSE)           what Compose finds
BROAPT_INTERVAL         longest time between two full checks, seconds (INTERVAL)                 10
BROAPT_KILL_SIGNAL      the signal that ends the host (KILL_SIGNAL)                              15 (SIGTERM)
BROAPT_WATCHER          where the watcher runs: thread or process                                thread
BROAPT_SETTLE           how long a fault must last before it is repaired, seconds                1
BROAPT_TIMEOUT          deadline of one Docker command, seconds                                  60
BROAPT_PRUNE            what is deleted after the stop: project, system or none                  project
BROAPT_UNHEALTHY        what happens if a health check fails: restart or ignore                  restart
BROAPT_COMPOSE_COMMAND  the Compose command; else the first of the two that answers              docker compose,
                                                                                                 docker-compose
======================  =======================================================================  ==================
"""

import collections
import contextlib
import enum
import functools
import importlib
import json
import logging
import math
import os
import re
import selectors
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
from typing import Any, Callable, ContextManager, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

__version__ = '1.0.0'
__all__ = [
    'docker_compose', 'watch_container', 'start_container', 'stop_container', 'flask_exit', 'register', 'UP_FLAG',
    'ComposeWarning', 'ComposeError', 'Settings', 'main',
]  # fmt: skip

logger = logging.getLogger('broapt_compose')
logger.addHandler(logging.NullHandler())

Notify = Callable[[str], Any]  # takes a message for the service manager

_STEADY = 10.0  # seconds of running that end a crash loop, as in Docker's own restart policy
_LONGEST_DELAY = 300.0  # seconds between two repairs in a crash loop
_PATIENCE = 60.0  # seconds that a created container may wait for somebody's `up` to start it
_LOOP = 3  # repairs in a row from which on it is called a crash loop
_DEFAULT_GRACE = 10.0  # seconds that Docker gives a container without a stop timeout of its own
_AFTERMATH = 1.0  # seconds after an event in which to look again: Docker tells of a death before `docker ps` shows it
_STREAM_LIFE = 55.0  # seconds of an event stream, so that none outlives its watcher by more than a minute
_OUTPUT_LIMIT = 1 << 24  # bytes; no answer of Docker's is longer
_ERROR_LIMIT = 1 << 16  # bytes; of more, the end is kept
_RESPAWN = 0.5  # seconds before a watcher process that died is started again


# -- exceptions ------------------------------------------------------------------------------------------------------
class ComposeWarning(Warning):
    """The containers could not be polled, a service is in a crash loop, or a clean-up failed."""


class ComposeError(Exception):
    """A command failed; the text is one line: which command, its exit code, and why.

    Attributes: *command* (list), *returncode* (None if it did not end by itself), *stderr*, *stdout*.
    """

    def __init__(self, command: Sequence[str], returncode: Optional[int], stderr: str, reason: str = '', stdout: str = '') -> None:
        super().__init__(command, returncode, stderr, reason, stdout)
        self.command, self.returncode, self.stderr, self.stdout = list(command), returncode, stderr, stdout
        lines = [line.strip() for line in stderr.splitlines() if line.strip()]
        self.reason = (reason or '; '.join([line for line in lines if 'error' in line.lower()][-2:] or lines[-1:]))[:500]
        self.reason = self.reason or 'no reason given'

    def __str__(self) -> str:
        code = '' if self.returncode is None else 'exit code {}: '.format(self.returncode)
        command = _quote(word if len(word) <= 80 else word[:80] + '...' for word in self.command)
        return _one_line('{}: {}{}'.format(command, code, self.reason))


class _Cancelled(Exception):
    """The flag was lowered while a command ran."""


def _one_line(text: str) -> str:
    return re.sub(r'[\x00-\x1f\x7f]+', ' ', text)


def _quote(command: Iterable[str]) -> str:
    return _one_line(' '.join(map(shlex.quote, command)))


def _warn(text: str) -> None:
    """Log and issue a ComposeWarning: each time, not once per text, and without raising it under -W error."""
    logger.warning('%s', _one_line(text))
    with contextlib.suppress(ComposeWarning):
        warnings.warn_explicit(_one_line(text), ComposeWarning, __file__, 0, registry=None)


# -- settings --------------------------------------------------------------------------------------------------------

Watcher = enum.Enum('Watcher', [('THREAD', 'thread'), ('PROCESS', 'process')])
Prune = enum.Enum('Prune', [('PROJECT', 'project'), ('SYSTEM', 'system'), ('NONE', 'none')])
Unhealthy = enum.Enum('Unhealthy', [('RESTART', 'restart'), ('IGNORE', 'ignore')])


def _parse_files(value: Any) -> Tuple[str, ...]:
    names = value.split(os.pathsep) if isinstance(value, str) else [value] if isinstance(value, os.PathLike) else value
    files = tuple(os.path.abspath(os.fsdecode(name)) for name in names if name)
    for file in files:
        with open(file, 'rb'):
            pass
    return files


def _parse_seconds(value: Any, least: float = 0.0) -> float:
    seconds = float(value)
    if not least <= seconds < math.inf or isinstance(value, bool):
        raise ValueError
    return seconds


def _parse_signal(value: Any) -> int:
    text = str(int(value) if isinstance(value, int) else value).strip().upper()
    number = signal.Signals(int(text)) if text.isdigit() else signal.Signals['SIG' + re.sub('^SIG', '', text)]
    if number in (signal.SIGKILL, signal.SIGSTOP) or isinstance(value, bool):
        raise ValueError
    return int(number)


def _parse_command(value: Any) -> Tuple[str, ...]:
    command = tuple(shlex.split(value) if isinstance(value, str) else value)
    if not all(isinstance(word, str) for word in command) or not any(command):
        raise ValueError
    return command


class _Option(NamedTuple):
    field: str  # in upper case: its name in BroAPT's const module, and after BROAPT_ in the environment
    flags: Tuple[str, ...]
    parse: Callable[[Any], Any]
    accepted: str
    help: str


_parse_positive = functools.partial(_parse_seconds, least=sys.float_info.min)
_POSITIVE = 'a number of seconds greater than 0'
_OPTIONS = (
    _Option('docker_compose', ('-f', '--file', '--docker-compose'), _parse_files, 'a readable file',
            'Compose file, repeatable (default: what Compose finds in the working directory)'),
    _Option('interval', ('-i', '--interval'), _parse_positive, _POSITIVE,
            'longest time between two full checks, in seconds (default: 10)'),
    _Option('kill_signal', ('-s', '--signal'), _parse_signal, 'a signal such as 15, TERM or SIGTERM, other than KILL and STOP',
            'signal that ends the watchdog (default: 15)'),
    _Option('watcher', ('-w', '--watcher'), Watcher, 'thread or process',
            'where the watcher runs: thread or process (default: thread)'),
    _Option('settle', ('--settle',), _parse_seconds, 'a number of seconds, 0 or more',
            'how long a fault must last before it is repaired, in seconds (default: 1)'),
    _Option('timeout', ('--timeout',), _parse_positive, _POSITIVE, 'deadline of one Docker command, in seconds (default: 60)'),
    _Option('prune', ('--prune',), Prune, 'project, system or none',
            "what to delete after the stop: the project's containers and networks, all that is unused on the whole machine "
            "(other projects' data, too), or nothing: project (default), system or none"),
    _Option('unhealthy', ('--unhealthy',), Unhealthy, 'restart or ignore',
            'restart or ignore a container whose health check fails (default: restart)'),
    _Option('compose_command', ('--compose-command',), _parse_command, 'a command as in a shell',
            "the Compose command (default: 'docker compose', else 'docker-compose')"),
)  # fmt: skip


class Settings(NamedTuple):
    """What the watchdog works by. Use :meth:`load`: it reads the sources and checks the values."""

    docker_compose: Tuple[str, ...] = ()  # absolute paths; none: Compose's own discovery
    interval: float = 10.0  # seconds
    kill_signal: int = int(signal.SIGTERM)
    watcher: Watcher = Watcher.THREAD
    settle: float = 1.0  # seconds
    timeout: float = 60.0  # seconds
    prune: Prune = Prune.PROJECT
    unhealthy: Unhealthy = Unhealthy.RESTART
    compose_command: Tuple[str, ...] = ()  # none: found by asking each for its version

    @classmethod
    def load(cls, **given: Any) -> 'Settings':
        """Return the settings: *given* ones first, then BroAPT's const, the environment (empty: not set), the defaults.

        Strings are parsed as on the command line; None counts as not given. Raises ValueError: one line naming the
        setting, its value, and what is accepted.
        """
        unknown = set(given) - set(cls._fields)
        if unknown:
            raise TypeError('unknown settings: {}'.format(', '.join(sorted(unknown))))
        const, values = _find_const(), {}
        for field, flags, parse, accepted, _ in _OPTIONS:
            name = field.upper()
            sources = {
                max(flags[:2], key=len): given.get(field),
                'const.' + name: getattr(const, name, None) if field in cls._fields[:3] else None,
                'BROAPT_' + name: os.environ.get('BROAPT_' + name) or None,
            }
            for source, value in [(source, value) for source, value in sources.items() if value is not None][:1]:
                try:
                    values[field] = parse(value)
                except (OSError, ValueError, TypeError, KeyError, OverflowError) as error:
                    why = ' ({}: {})'.format(error.filename, error.strerror) if isinstance(error, OSError) else ''
                    raise ValueError(_one_line('{}: {!r} is not {}{}'.format(source, value, accepted, why))) from None
        return cls(**values)


def _find_const() -> Any:
    """Return BroAPT's const module: the one that the host has loaded, or the one beside this vendored copy; or None."""
    if __name__ in ('__main__', '__mp_main__'):
        return None
    name = __name__.rpartition('.')[0] + '.const' if '.' in __name__ else 'const'
    beside = os.path.isfile(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'const.py'))
    const = sys.modules.get(name) or (importlib.import_module(name) if beside else None)
    return const if hasattr(const, 'KILL_SIGNAL') or hasattr(const, 'DOCKER_COMPOSE') else None


# -- records ---------------------------------------------------------------------------------------------------------
# The states of a container, in Docker's words.
State = enum.Enum('State', [
    ('CREATED', 'created'), ('RUNNING', 'running'), ('PAUSED', 'paused'), ('RESTARTING', 'restarting'),
    ('REMOVING', 'removing'), ('EXITED', 'exited'), ('DEAD', 'dead'),
])  # fmt: skip
_ALIVE = (State.RUNNING, State.PAUSED, State.RESTARTING)


class Container(NamedTuple):
    """One container of the project, as one look showed it."""

    id: str
    name: str
    service: str
    number: str  # which of the service's containers; a replacement bears the number of what it replaces
    state: State
    exit_code: Optional[int]  # None while it has not ended
    health: str  # 'starting', 'healthy', 'unhealthy'; '' without a health check
    since: str  # how long it is in this state, in Docker's words, such as '5 minutes'
    watched: bool  # False if labelled broapt.watch=false
    config_hash: str  # changes with the service's definition
    folder: str  # of the Compose file that made it
    network_owner: str  # id of the container whose network it uses; '' if it has its own, '?' if that is not known yet
    started_at: str = ''  # the engine's time; known only if it shares a network

    @property
    def label(self) -> str:
        """The service's name, with the number where it is not the first."""
        return self.service if self.number in ('', '1') else '{}-{}'.format(self.service, self.number)

    @property
    def condition(self) -> str:
        """The state in words, such as 'exited (137)' or 'unhealthy'."""
        text = 'unhealthy' if self.health == 'unhealthy' else self.state.value
        return text if self.exit_code is None else '{} ({})'.format(text, self.exit_code)


class Service(NamedTuple):
    """One service of the Compose file."""

    scale: int = 1  # how many containers it shall have
    watched: bool = True
    network_of: str = ''  # the service whose network it uses
    depends_on: Mapping[str, str] = {}  # service -> condition


_LABELS = ['com.docker.compose.' + name for name in ('service', 'container-number', 'oneoff', 'config-hash', 'project.working_dir')]
_PS_FIELDS = ['.ID', '.Names', '.State', '.Status', '.Networks']
_PS_FIELDS += ['(.Label "{}")'.format(label) for label in ['broapt.watch', *_LABELS]]
_PS_FORMAT = '[{}]'.format(','.join('{{json %s}}' % field for field in _PS_FIELDS))
_STATUS = re.compile(r'(?:Up|\w+ \((\d+)\)) ?(.*?)(?: ago)?(?: \((?:Paused|(?:health: )?(starting|healthy|unhealthy))\))?')


def _parse_containers(text: str) -> List[Container]:
    """Return what `docker ps --format _PS_FORMAT` printed, newest first, without one-offs; ValueError if it is not that."""
    if text and not text.endswith('\n'):
        raise ValueError('the last line is cut off')
    containers = []
    for line in text.splitlines():
        ident, name, state, status, networks, watch, service, number, oneoff, config_hash, folder = json.loads(line)
        code, since, health = (_STATUS.fullmatch(status) or re.fullmatch('()()()', '')).groups()  # type: ignore[union-attr]
        # Docker shows no network for a container in another one's; in whose, takes a second command.
        record = Container(ident, name, service, number, State(state), int(code) if code else None, health or '', since,
                           watch.lower() != 'false', config_hash, folder, '' if networks else '?')  # fmt: skip
        if oneoff != 'True':  # made by `compose run`: somebody's own business
            containers.append(record)
    return containers


_CONFIG_LINE = re.compile(r'( *)(["\']?)([\w.-]+)\2:(?: (.*))?')


def _parse_services(text: str) -> Dict[str, Service]:
    """Return the services that `compose config` printed.

    Compose 1.x prints YAML only, which the standard library can't read; but it is in canonical form, two spaces a
    level, from both generations, so the few keys that matter are found by their path.
    """
    services: Dict[str, Service] = {}
    path: List[str] = []
    named = False
    for found in filter(None, map(_CONFIG_LINE.fullmatch, text.splitlines())):
        path[len(found.group(1)) // 2 :] = [found.group(3)]
        named = named or path == ['name']
        if path[0] != 'services' or len(path) < 2:
            continue
        name, key, value = path[1], path[2:], (found.group(4) or '').strip('"\'')
        service = services.setdefault(name, Service())
        if key in (['scale'], ['deploy', 'replicas']) and value.isdigit() and service.scale:
            service = service._replace(scale=int(value))
        elif key == ['profiles'] and not named:  # Compose 1.29 gives no name, and prints also what is switched off
            service = service._replace(scale=0)
        elif key == ['labels', 'broapt.watch']:
            service = service._replace(watched=value.lower() != 'false')
        elif key == ['network_mode'] and value.startswith('service:'):
            service = service._replace(network_of=value[len('service:') :])
        elif key[:1] == ['depends_on'] and key[2:] == ['condition']:
            service = service._replace(depends_on={**service.depends_on, key[1]: value})
        services[name] = service
    return services


# -- the Docker layer ------------------------------------------------------------------------------------------------
def _spawn(command: Sequence[str], folder: Optional[str] = None, errors: int = subprocess.PIPE) -> 'subprocess.Popen[bytes]':
    """Start *command*, in a session of its own so that Ctrl+C in the terminal does not reach it."""
    environment = None
    if getattr(sys, 'frozen', False):  # PyInstaller's library path is not for Docker
        environment = {key: value for key, value in os.environ.items() if key != 'LD_LIBRARY_PATH'}
        if 'LD_LIBRARY_PATH_ORIG' in environment:
            environment['LD_LIBRARY_PATH'] = environment['LD_LIBRARY_PATH_ORIG']
    logger.debug('running %s', _quote(command))
    streams: Dict[str, Any] = {'stdin': subprocess.DEVNULL, 'stdout': subprocess.PIPE, 'stderr': errors}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # for the moment before it has its session
    try:
        return subprocess.Popen(command, env=environment, cwd=folder, start_new_session=True, **streams)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _kill(process: 'subprocess.Popen[bytes]') -> None:
    """Kill the process with its whole group, and wait a moment for its end."""
    with contextlib.suppress(ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(1)


def _run(command: Sequence[str], limit: float, cancel: Any = None, echo: bool = False, folder: Optional[str] = None) -> str:
    """Return what *command* wrote to standard output; with *echo*, all it writes is shown on standard error as it comes.

    Raises ComposeError if it can't be started, fails, or has not ended after *limit* seconds, and _Cancelled once
    *cancel* is readable. In the last two cases its whole process group is killed.
    """
    output, errors, process, reason = bytearray(), bytearray(), None, 'interrupted'
    try:
        with _holding_signals():  # until the process is known: it could not be killed
            process = _spawn(command, folder)
        _collect(process, {process.stdout: output, process.stderr: errors}, limit, cancel, echo)
        reason = ''
    except subprocess.TimeoutExpired:
        reason = 'no answer within {:g} s'.format(limit)
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
    finally:
        if process is not None:
            if reason:
                _kill(process)
            process.stdout.close()  # type: ignore[union-attr]
            process.stderr.close()  # type: ignore[union-attr]
    out, code = output.decode('utf-8', 'replace'), process.returncode if process and not reason else None
    if reason or code:
        raise ComposeError(command, code, errors.decode('utf-8', 'replace'), reason, out)
    return out


def _collect(process: Any, buffers: Dict[Any, bytearray], limit: float, cancel: Any, echo: bool) -> None:
    """Read what the process writes until it has ended; raise TimeoutExpired at the limit."""
    end, pipes = time.monotonic() + limit, set(buffers)
    with selectors.DefaultSelector() as selector:
        for file in [*pipes, cancel] if cancel else pipes:
            selector.register(file, selectors.EVENT_READ)
        while pipes:
            ready: List[Any] = [key.fileobj for key, _ in selector.select(max(0.0, min(end - time.monotonic(), 0.5)))]
            if cancel in ready:
                raise _Cancelled
            for pipe in ready:
                chunk = os.read(pipe.fileno(), 1 << 16)
                if not chunk:
                    selector.unregister(pipe)
                    pipes.remove(pipe)
                if echo:
                    with contextlib.suppress(OSError, ValueError, AttributeError):  # full disk, closed or no stream
                        sys.stderr.write(chunk.decode('utf-8', 'replace'))
                        sys.stderr.flush()
                buffers[pipe] += chunk
                if echo or pipe is process.stderr:
                    del buffers[pipe][:-_ERROR_LIMIT]
                elif len(buffers[pipe]) > _OUTPUT_LIMIT:
                    raise ValueError('its output does not end')
            if time.monotonic() >= end:
                raise subprocess.TimeoutExpired(process.args, limit)
            if not ready and process.poll() is not None:
                return  # it has ended, but a process that it left behind holds its pipes, as ssh's ControlPersist does
    process.wait(max(0.01, end - time.monotonic()))


class _Stack:
    """The containers of one Compose project, by way of the commands of Docker and Compose."""

    def __init__(self, settings: Settings, project: str = '', cancel: Any = None, folder: Optional[str] = None) -> None:
        self.settings = settings
        self.folder = folder or os.getcwd()  # stays, whatever the host does with its own
        self.project = project  # '' while there is no container to read it off
        self.cancel = cancel  # a file; once it is readable, commands are cancelled
        self.declared: Sequence[str] = ()  # the services of the Compose files, once they have been read
        self.details: Dict[str, Tuple[str, str]] = {}  # id -> network owner, start time

    def docker(self, *arguments: str, limit: Optional[float] = None) -> str:
        return _run(('docker', *arguments), self.settings.timeout if limit is None else limit, self.cancel, folder=self.folder)

    def compose(self, *arguments: str, limit: Optional[float] = None, echo: bool = False) -> str:
        files = [part for file in self.settings.docker_compose for part in ('--file', file)]
        command = (*self.settings.compose_command, *files, *arguments)
        return _run(command, self.settings.timeout if limit is None else limit, self.cancel, echo, self.folder)

    @property
    def filter(self) -> str:
        """The filter for what belongs to the project."""
        return '--filter=label=com.docker.compose.project=' + self.project

    def find_project(self) -> None:
        """Read the project's name off a container, unless it is known: it is not always the folder's name."""
        filters = [] if self.project else ['--filter=id=' + ident for ident in self.compose('ps', '--all', '--quiet').split()[:9]]
        if filters:
            template = '--format={{.Label "com.docker.compose.project"}}'
            self.project = self.docker('ps', '--all', template, *filters).split('\n')[0]

    def observe(self) -> List[Container]:
        """Return all containers of the project but one-offs, newest first. The only reader; one command."""
        self.find_project()
        text = self.docker('ps', '--all', '--no-trunc', self.filter, '--format', _PS_FORMAT) if self.project else ''
        try:
            return self._add_details(_parse_containers(text))
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ComposeError(('docker', 'ps'), None, '', 'its answer is not understood: {}'.format(error)) from None

    def _add_details(self, containers: List[Container]) -> List[Container]:
        """Fill in what `docker ps` does not tell: in whose network a container is, and whether *unhealthy* is meant so.

        The former is asked when it is new, or one of the two has just been started. As to the latter, Docker calls a
        container unhealthy, with no failure at all, from a pause until the next probe.
        """
        details, well = self.details, set()
        sharing = {c.id for c in containers if c.network_owner}.union(owner for owner, _ in details.values())
        young = [c.id for c in containers if c.id in sharing and (c.id not in details or 'second' in c.since)]
        asked = [*young, *(c.id for c in containers if c.health == 'unhealthy')]
        for ident, mode, state in map(
            json.loads, self.inspect('[{{json .Id}},{{json .HostConfig.NetworkMode}},{{json .State}}]', asked)
        ):
            details[ident] = mode[len('container:') :] if mode.startswith('container:') else '', state['StartedAt'].rstrip('Z')
            well |= set() if (state.get('Health') or {}).get('FailingStreak') else {ident}
        self.details = {c.id: details[c.id] for c in containers if c.id in details}
        for index, c in enumerate(containers):
            owner, started_at = details.get(c.id, (c.network_owner, ''))
            health = 'starting' if c.id in well and c.health == 'unhealthy' else c.health
            containers[index] = c._replace(network_owner=owner, started_at=started_at, health=health)
        return containers

    def inspect(self, template: str, ids: Sequence[str]) -> List[str]:
        """Return a line for each of these containers that is still there."""
        try:
            return self.docker('inspect', '--format', template, *ids).splitlines() if ids else []
        except ComposeError as error:
            return error.stdout.splitlines()

    def services(self) -> Dict[str, Service]:
        """Return the services that the Compose files declare now."""
        services = _parse_services(self.compose('config'))
        self.declared = tuple(services)
        return services

    def longest_grace(self, ids: Sequence[str]) -> float:
        """Return the longest stop timeout of these containers, in seconds."""
        answer = self.inspect('{{json .Config.StopTimeout}}', ids)
        return max([float(word) for word in answer if word.isdigit()] + [_DEFAULT_GRACE])

    def open_events(self, since: str) -> Tuple['subprocess.Popen[bytes]', str]:
        """Start `docker events` for what can begin a fault; return it, and the engine's time at which it will end.

        It begins at the engine's time *since* ('': now). If its reader dies, it ends at the next event only, so it gets
        an end; that is compared with the engine's clock, which may differ from this machine's.
        """
        import datetime

        since = since or self.docker('info', '--format', '{{.SystemTime}}').strip()
        try:
            start = datetime.datetime.strptime(since[:19], '%Y-%m-%dT%H:%M:%S')
        except ValueError as error:
            raise ComposeError(('docker', 'info'), None, '', 'its answer is not understood: {}'.format(error)) from None
        until = (start + datetime.timedelta(seconds=_STREAM_LIFE)).isoformat() + since[19:]
        filters = ['--filter=event=' + event for event in ('create', 'die', 'destroy', 'pause', 'health_status')]
        command = ('docker', 'events', '--format={{.ID}}', '--since', since, '--until', until, '--filter=type=container')
        return _spawn((*command, self.filter, *filters), self.folder, subprocess.DEVNULL), until

    def up(self) -> None:
        """Build, create and start the stack, without a deadline."""
        self.compose('up', '--build', '--detach', limit=math.inf, echo=True)

    def unpause(self) -> List[Container]:
        """Unpause what is paused, for it can neither be started by `up` nor stop gracefully; return all containers."""
        containers = self.observe()
        paused = [c.id for c in containers if c.state is State.PAUSED]
        if paused:
            self.docker('unpause', *paused)
        return containers

    def stop(self) -> None:
        """Stop the stack gracefully, kill what outlasts its time, and clean up in any case."""
        limit = self.settings.timeout
        try:
            self.declared = self.declared or tuple(self.services())
            limit += self.longest_grace([c.id for c in self.unpause()])
            self.compose('stop', limit=limit)
        except ComposeError as error:
            logger.error('%s; stopping the containers one by one', error)
        try:  # also what Compose leaves: services of a profile, or that are not in its file any more
            self._end('stop', limit)
        except ComposeError as error:
            logger.error('%s; killing the containers', error)
            self._end('kill', limit)
        finally:
            try:
                self.clean_up()
            except ComposeError as error:
                _warn('the clean-up failed: {}'.format(error))

    def _end(self, command: str, limit: float) -> None:
        alive = [c.id for c in self.observe_own() if c.state in _ALIVE]
        if alive:
            self.docker(command, *alive, limit=limit)

    def observe_own(self) -> List[Container]:
        """Return the containers but those of a stack in another folder that happens to have the same project name."""
        containers = self.observe()
        folders = {c.folder for c in containers if c.service in self.declared or not self.declared}
        return [c for c in containers if c.service in self.declared or c.folder in folders]

    def clean_up(self) -> None:
        """Delete what the setting *prune* says."""
        if self.settings.prune is Prune.SYSTEM:
            self.docker('system', 'prune', '--volumes', '--force')
        elif self.settings.prune is Prune.PROJECT and not self.project:
            self.compose('down')  # a start that failed before the first container may have left a network
        elif self.settings.prune is Prune.PROJECT:
            self._remove_containers()
            networks = self.docker('network', 'ls', '--quiet', self.filter).split()
            if networks:
                self.docker('network', 'rm', *networks)
            # Only Compose 2.x labels the images it builds. One that is in use stays: hence prune, not rm.
            if self.docker('image', 'ls', '--quiet', '--filter=dangling=true', self.filter):
                self.docker('image', 'prune', '--force', self.filter)

    def _remove_containers(self) -> None:
        """Remove the containers with their anonymous volumes; look again, for the engine may finish a cancelled `up`."""
        for tries_left in (2, 1, 0):
            ids = [c.id for c in self.observe_own()]
            if not ids:
                return
            try:
                self.docker('rm', '--force', '--volumes', *ids)
            except ComposeError:  # perhaps somebody else removes them, too
                if not tries_left:
                    raise


def _complete(settings: Optional[Settings]) -> Settings:
    """Return the settings with the Compose command filled in."""
    settings = Settings.load() if settings is None else settings
    if settings.compose_command:
        return settings
    for command in (('docker', 'compose'), ('docker-compose',)):
        with contextlib.suppress(ComposeError):
            _run((*command, 'version'), settings.timeout)
            return settings._replace(compose_command=command)
    _run(('docker', '--version'), settings.timeout)  # raises if there is no Docker at all
    raise ComposeError(('docker', 'compose'), None, '', 'no Compose found, neither this nor docker-compose')


# -- decide ----------------------------------------------------------------------------------------------------------
class Verb(enum.Enum):
    """What mends a fault: the word for it in the log, then the command and its arguments."""

    UNPAUSE = ('unpaused', 'docker', 'unpause')
    START = ('started', 'docker', 'start')
    RESTART = ('restarted', 'docker', 'restart')
    REMOVE = ('removed', 'docker', 'rm', '--force', '--volumes')
    # --no-deps: what a service depends on is watched itself, and `up` would run finished one-shot services again.
    CREATE = ('created', 'compose', 'up', '--detach', '--no-recreate', '--no-deps')
    UP = ('brought up', 'compose', 'up', '--detach', '--no-deps')
    # --force-recreate: Compose 1.29 does not see that a container's network is gone.
    RECREATE = ('created anew', 'compose', 'up', '--detach', '--force-recreate', '--no-deps')

    def __init__(self, done: str, tool: str, *arguments: str) -> None:
        self.done, self.tool, self.arguments = done, tool, arguments


class Streak(NamedTuple):
    """Repairs of one service that followed each other with less than ten seconds of running in between."""

    repairs: int = 0
    began: float = 0.0  # when the first fault was seen
    ended: float = -math.inf  # end of the last repair
    failed: str = ''  # what the last repair could not mend: the id of a container, or the service's name


class Action(NamedTuple):
    """A repair of one fault, due now or later. Times are seconds of a monotonic clock."""

    verb: Verb
    service: str
    container: str  # id; '' where containers are missing
    label: str
    cause: str
    targets: Tuple[str, ...]  # what the command names
    patience: float = 0.0  # seconds to wait at least
    since: float = 0.0  # when the fault was first seen
    due: float = 0.0
    streak: Streak = Streak()  # the repairs before this one

    @property
    def key(self) -> Tuple[Verb, str]:
        """What tells one fault from another."""
        return self.verb, self.container or self.service


class History(NamedTuple):
    """What decide() needs to know of the past."""

    since: Mapping[Tuple[Verb, str], float] = {}  # Action.key -> when that fault was first seen
    streaks: Mapping[str, Streak] = {}  # service -> its last repairs


def decide(
    containers: Sequence[Container], services: Mapping[str, Service], now: float, history: History, settings: Settings
) -> List[Action]:
    """Return a repair for each fault, due at once or later. Pure.

    *containers*: newest first; *now*: seconds of a monotonic clock.
    """
    actions, known = [], {'', *services, *(c.id for c in containers)}
    for action in _find_faults(containers, services, history, settings):
        since = history.since.get(action.key, now)
        streak = history.streaks.get(action.service, Streak())
        if since - streak.ended >= _STEADY:
            streak = Streak(began=since)
        elif streak.failed not in known:  # it failed because somebody removed the container
            streak = streak._replace(repairs=streak.repairs - 1)
        delay = max(settings.settle, action.patience)
        if streak.repairs and (action.verb is not Verb.UNPAUSE or streak.failed == action.container):
            delay = max(delay, min(2.0 ** min(streak.repairs - 1, 9), _LONGEST_DELAY))
        actions.append(action._replace(since=since, due=since + delay, streak=streak))
    return actions


def _find_faults(
    containers: Sequence[Container], services: Mapping[str, Service], history: History, settings: Settings
) -> Iterator[Action]:
    own = [c for c in containers if c.service in services]
    for container in own:
        if container.watched and services[container.service].watched:
            verb = _find_verb(container, own, services, history, settings)
            if verb:
                lost = verb is Verb.RECREATE or verb is Verb.RESTART and container.health != 'unhealthy'
                cause = 'its network is gone' if lost else container.condition
                targets = (container.id,) if verb.tool == 'docker' else _name_with_scale(container.service, own, services)
                patience = _PATIENCE if verb is Verb.START and _is_somebody_at_work(container, own, services) else 0.0
                yield Action(verb, container.service, container.id, container.label, cause, targets, patience)
    for name, service in services.items():
        missing = service.scale - sum(c.service == name and c.state is not State.DEAD for c in own)
        if missing > 0 and service.watched:
            cause = 'missing' if service.scale == 1 else '{} of {} missing'.format(missing, service.scale)
            # Without its network's owner, Compose 1.29 would create it in a network of its own.
            targets = (name, service.network_of) if service.network_of else (name,)
            yield Action(Verb.CREATE, name, '', name, cause, targets)


def _find_verb(
    container: Container, own: Sequence[Container], services: Mapping[str, Service], history: History, settings: Settings
) -> Optional[Verb]:
    """Return what has to be done about this container; None: nothing, or not yet."""
    name, state, service = container.service, container.state, services[container.service]
    if state in (State.PAUSED, State.DEAD):
        return Verb.UNPAUSE if state is State.PAUSED else Verb.REMOVE
    if state in (State.RESTARTING, State.REMOVING) or _is_being_replaced(container, own):
        return None  # Docker, or somebody, is at it
    if service.network_of and not _is_met('service_started', service.network_of, own):
        return None  # it can't run before that one does
    if service.network_of and container.network_owner not in ('?', *(c.id for c in own)):
        return Verb.RECREATE
    if state is State.RUNNING and any(c.id == container.network_owner and c.started_at > container.started_at for c in own):
        return Verb.RESTART  # a container that is started anew gets a new network; who shares the old one is cut off
    if state is State.RUNNING:
        return Verb.RESTART if container.health == 'unhealthy' and settings.unhealthy is Unhealthy.RESTART else None
    if _has_done_its_job(container, services):
        return None
    return Verb.UP if container.id == history.streaks.get(name, Streak()).failed else Verb.START


def _name_with_scale(name: str, own: Sequence[Container], services: Mapping[str, Service]) -> Tuple[str, ...]:
    """Return what names the service to `up`, so that containers which somebody has added stay."""
    count = sum(c.service == name for c in own)
    return (name, '--scale={}={}'.format(name, count)) if count > services[name].scale else (name,)


def _is_somebody_at_work(container: Container, own: Sequence[Container], services: Mapping[str, Service]) -> bool:
    """Tell whether somebody's `up` may be about to start this created container, once others are ready, or replaced."""
    needed = services[container.service].depends_on.items()
    waits = not all(_is_met(condition, other, own) for other, condition in needed if other in services)
    return container.state is State.CREATED and (waits or any(_is_being_replaced(c, own) for c in own))


def _has_done_its_job(container: Container, services: Mapping[str, Service]) -> bool:
    wanted = [service.depends_on.get(container.service) for service in services.values()]
    return container.state is State.EXITED and container.exit_code == 0 and 'service_completed_successfully' in wanted


def _is_being_replaced(container: Container, own: Sequence[Container]) -> bool:
    """Tell whether somebody's `up --force-recreate` is at work: for a while, old and new container bear one number.

    Compose 2.x creates the new one beside the old one running, 1.29 beside the old one stopped. So of two that do not
    run, only the newest may be started.
    """
    twins = [c for c in own if (c.service, c.number) == (container.service, container.number)]
    return container.state not in _ALIVE and (twins[0] is not container or any(c.state in _ALIVE for c in twins))


def _is_met(condition: str, name: str, own: Sequence[Container]) -> bool:
    """Tell whether the service *name* is as a `depends_on` wants it."""
    containers = [c for c in own if c.service == name]
    if condition == 'service_completed_successfully':
        return any(c.exit_code == 0 for c in containers)
    return any(c.state is State.RUNNING and (condition != 'service_healthy' or c.health == 'healthy') for c in containers)


def _mend(stack: _Stack, group: Sequence[Action]) -> str:
    """Run the one command that mends these faults of one kind; return its output."""
    verb, targets = group[0].verb, sorted({target for action in group for target in action.targets})
    if verb.tool == 'compose':
        return stack.compose(*verb.arguments, *targets, limit=10 * stack.settings.timeout)
    grace = stack.longest_grace(targets) if verb is Verb.RESTART else 0.0
    return stack.docker(*verb.arguments, *targets, limit=stack.settings.timeout + grace)


# -- the watcher -----------------------------------------------------------------------------------------------------
class UpFlag(threading.Event):
    """A flag that is up while the stack shall run; lowering it wakes the watcher at once."""

    def __init__(self) -> None:
        super().__init__()
        self._guard = threading.RLock()
        self._pipe: Tuple[int, ...] = ()  # readable while the flag is down
        self._pid = os.getpid()  # a fork has a flag of its own, but would share the pipe
        self.set()

    @property
    def value(self) -> bool:
        """Whether the flag is up; set it to False to end the watcher."""
        return self.is_set()

    @value.setter
    def value(self, up: bool) -> None:
        with self._guard:
            if self._pipe and self._pid == os.getpid() and up != self.is_set():
                _ = os.read(self._pipe[0], 1) if up else os.write(self._pipe[1], b'.')
            (super().set if up else super().clear)()

    def set(self) -> None:
        """Raise the flag."""
        self.value = True

    def clear(self) -> None:
        """Lower the flag."""
        self.value = False

    def fileno(self) -> int:
        """Return a file descriptor that is readable while the flag is down; it lives as long as the flag."""
        with self._guard:
            if not self._pipe:
                self._pipe = os.pipe()
                if not self.is_set():
                    os.write(self._pipe[1], b'.')
            return self._pipe[0]


UP_FLAG = UpFlag()


class _Watch:
    """Observe, decide, act, over and over. Repairs run in threads, so that a slow one holds up no other service."""

    def __init__(
        self, stack: _Stack, services: Optional[Mapping[str, Service]] = None, notify: Notify = str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        from concurrent.futures import Future, ThreadPoolExecutor

        self.stack, self.settings, self.notify, self.clock = stack, stack.settings, notify, clock
        self.services = services  # None: not read yet
        self.history = History()
        self.definitions: Any = set()  # (service, config hash) of all containers seen
        self.repairs: Dict[Future[str], Tuple[List[Action], float]] = {}  # under way: what, and since when
        self.failures = 0  # repairs that failed
        self.outage: Optional[float] = None  # when Docker stopped to answer
        self.events: Optional[subprocess.Popen[bytes]] = None
        self.events_opened = self.reopening = self.woken = -math.inf  # woken: when the last event came
        self.events_until = ''  # the engine's time up to which no event is missed
        # One Compose command at a time: two would create the same network twice.
        self.pools = {'docker': ThreadPoolExecutor(16), 'compose': ThreadPoolExecutor(1)}
        self.wake = os.pipe()  # written to when a repair has ended
        self.selector = selectors.DefaultSelector()
        for file in (self.wake[0], UP_FLAG):
            self.selector.register(file, selectors.EVENT_READ)

    def close(self) -> None:
        """End what was started. Repairs under way end by themselves when the flag is lowered."""
        self._close_events()
        for pool in self.pools.values():
            pool.shutdown()
        self.selector.close()
        for descriptor in self.wake:
            os.close(descriptor)

    def run(self) -> None:
        """Watch until the flag is lowered."""
        timeout = 0.0
        with contextlib.closing(self):
            while self.wait(timeout):
                timeout = self.settings.interval
                try:
                    timeout = self.cycle()
                except _Cancelled:
                    pass  # wait() returns at once
                except Exception:
                    logger.exception('unexpected error; the next check is in %g s', timeout)

    def wait(self, timeout: float) -> bool:
        """Wait until a repair has ended, Docker reports an event, or the timeout; return False if the flag is down."""
        for key, _ in self.selector.select(max(0.0, min(timeout, 1e6))):  # epoll takes 24 days at most
            if key.fileobj is UP_FLAG:
                continue
            if not os.read(key.fd, 1 << 16):  # the end of the event stream
                if self.clock() - self.events_opened < _STREAM_LIFE - 5:
                    self.events_until = ''  # lost before its time: nobody knows what was missed
                self._close_events()
            elif key.fd != self.wake[0]:
                self.woken = self.clock()
        return UP_FLAG.value

    def _open_events(self, now: float) -> None:
        """Keep a stream open. Each begins where the last one ended, so that no event falls in between."""
        if self.events is None and self.stack.project and now >= self.reopening:
            self.events_opened, self.reopening = now, now + min(self.settings.interval, _STREAM_LIFE / 2)
            if not self.events_until:
                self.woken = now  # what happened just before counts as an event
            with contextlib.suppress(OSError):  # no process to be had just now: the interval will do
                self.events, self.events_until = self.stack.open_events(self.events_until)
                self.selector.register(self.events.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]

    def _close_events(self) -> None:
        if self.events is not None:
            self.selector.unregister(self.events.stdout)  # type: ignore[arg-type]
            _kill(self.events)
            self.events.stdout.close()  # type: ignore[union-attr]
            self.events = None

    def cycle(self) -> float:
        """Take one look and begin what is due; return the seconds until the next look is wanted."""
        self.finish_repairs()
        now, interval = self.clock(), self.settings.interval
        try:
            self.stack.find_project()
            self._open_events(now)
            containers = self.stack.observe()
            seen = {(c.service, c.config_hash) for c in containers}
            if self.services is None or self.definitions and not seen <= self.definitions:  # somebody has deployed changes
                self._read_services()
            self.definitions = seen
        except ComposeError as error:
            self._close_events()
            self.events_until = ''
            self.stack.details = {}  # nothing is repaired on the strength of old knowledge
            self.history = self.history._replace(since={})
            if self.outage is None:
                self.outage = now
                _warn('Docker does not answer; trying again every {:g} s: {}'.format(interval, error))
            return min(interval, max(0.1, now - self.outage))  # soon at first: it may be a moment's trouble only
        if self.outage is not None:
            logger.info('Docker answers again, after %.0f s', now - self.outage)
            self.outage = None
        recent = now - self.woken < _AFTERMATH
        services = self.services or {}
        actions = decide(containers, services, self.woken if recent else now, self.history, self.settings)
        busy = {action.service for group, _ in self.repairs.values() for action in group}
        actions = [action for action in actions if action.service not in busy]
        self._warn_of_loops(actions, now)
        self.history = self.history._replace(since={action.key: action.since for action in actions})
        self._act([action for action in actions if action.due <= now])
        self.notify('STATUS={}\nWATCHDOG=1'.format(_summarize(containers, services, actions)))
        waiting = [now + interval, self.reopening if self.stack.project and not self.events else math.inf]
        waiting += [now + max(0.03, now - self.woken)] if recent else []
        return min(waiting + [action.due for action in actions if action.due > now]) - self.clock()

    def _read_services(self) -> None:
        """Read the Compose files; if that fails another time, go on by what they said before."""
        try:
            self.services = self.stack.services()
        except ComposeError as error:
            if self.services is None:
                raise
            _warn('the Compose file cannot be read; going on by what it said before: {}'.format(error))

    def _warn_of_loops(self, actions: Iterable[Action], now: float) -> None:
        for action in actions:
            repairs, began = action.streak[:2]
            if repairs + 1 >= _LOOP and action.key not in self.history.since and action.verb is not Verb.UNPAUSE:
                text = '{}: crash loop, {} for the {} time in {:.0f} s; next try in {:.0f} s'
                _warn(text.format(action.label, action.cause, _ordinal(repairs + 1), now - began, action.due - now))

    def _act(self, actions: Iterable[Action]) -> None:
        """Begin the repairs: one command for all of a kind, but one of its own for each service that Compose failed for."""
        groups: Dict[Tuple[Verb, str], List[Action]] = {}
        for action in actions:
            alone = self.history.streaks.get(action.service, Streak()).failed == action.service
            groups.setdefault((action.verb, action.service if alone else ''), []).append(action)
        for (verb, _), group in groups.items():
            future = self.pools[verb.tool].submit(_mend, self.stack, group)
            self.repairs[future] = (group, self.clock())
            future.add_done_callback(lambda _: os.write(self.wake[1], b'.'))

    def finish_repairs(self) -> None:
        """Take note of the repairs that have ended."""
        for future in [future for future in self.repairs if future.done()]:
            group, began = self.repairs.pop(future)
            error = future.exception()
            if isinstance(error, _Cancelled):
                continue
            for action in group:
                # Docker prints the id of each container that it has mended, also if it fails for others.
                failed = error is not None and action.container not in getattr(error, 'stdout', '').split()
                self.failures += failed
                self._record(action, failed)
                if failed:
                    logger.error('%s: %s, not %s: %s', action.label, action.cause, action.verb.done, error)
                else:
                    seconds = self.clock() - began
                    logger.info('%s: %s -> %s (%.2f s)', action.label, action.cause, action.verb.done, seconds)
            if group[0].verb.tool == 'compose':
                self._read_services()  # perhaps the service is not declared any more, or with another scale

    def _record(self, action: Action, failed: bool) -> None:
        """Remember a repair: its fault is over, or begins anew, and the next one of this service may have to wait."""
        since = {key: seen for key, seen in self.history.since.items() if key != action.key}
        streaks = dict(self.history.streaks)
        if failed or action.verb is not Verb.UNPAUSE:
            repairs, began = action.streak[:2]
            streaks[action.service] = Streak(repairs + 1, began, self.clock(), action.targets[0] if failed else '')
        self.history = History(since, streaks)


def _summarize(containers: Sequence[Container], services: Mapping[str, Service], actions: Sequence[Action]) -> str:
    if actions:
        return '; '.join('{}: {}'.format(action.label, action.cause) for action in actions)
    own = [c for c in containers if c.service in services]
    return '{} of {} running'.format(sum(c.state is State.RUNNING for c in own), len(own))


def _ordinal(number: int) -> str:
    return str(number) + ('th' if 10 < number % 100 < 14 else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th'))


# -- the watcher as a thread or a process ----------------------------------------------------------------------------
def _watch(stack: _Stack, services: Optional[Mapping[str, Service]] = None, notify: Notify = str) -> None:
    _Watch(_Stack(stack.settings, stack.project, UP_FLAG, stack.folder), services, notify).run()


def _watch_in_process(stack: _Stack, services: Mapping[str, Service], notify: Notify) -> None:
    """Keep a watcher process running while the flag is up."""
    import multiprocessing.connection

    while UP_FLAG.value:
        theirs, ours = multiprocessing.Pipe(duplex=False)  # says nothing; its end is what counts
        arguments = (theirs, ours, stack, services, notify, logger.level if notify is _notify else None)
        process = multiprocessing.Process(target=_process_main, args=arguments, daemon=True)
        with contextlib.closing(ours), contextlib.suppress(OSError):  # no process to be had just now
            try:
                process.start()
            except (AssertionError, RuntimeError) as error:  # such as: daemonic processes can't have children
                _warn('no watcher process can be started ({}); watching in a thread'.format(error))
                return _watch(stack, services, notify)
            theirs.close()
            multiprocessing.connection.wait([process.sentinel, UP_FLAG.fileno()])
        if process.pid is not None:
            process.join(2)
        if not multiprocessing.connection.wait([UP_FLAG.fileno()], _RESPAWN):
            _warn('the watcher process has died (exit code {}); starting it again'.format(process.exitcode))


def _process_main(
    channel: Any, parents_end: Any, stack: _Stack, services: Mapping[str, Service], notify: Notify, level: Optional[int]
) -> None:
    """Watch in a process of its own, until the parent closes its end of the channel or is gone."""
    parents_end.close()  # with this copy open, the end of the parent would go unnoticed
    for signum in (signal.SIGINT, stack.settings.kill_signal):
        signal.signal(signum, lambda *_: None)  # the parent's business; not SIG_IGN, which commands would inherit
    UP_FLAG.__init__()  # type: ignore[misc]  # a forked copy would wake the parent's watcher
    if level is not None:  # on the command line: a process that is not forked has to be told
        _set_up_logging(level)
    threading.Thread(target=_lower_with_parent, args=(channel, os.getppid()), daemon=True).start()
    _watch(stack, services, notify)


def _lower_with_parent(channel: Any, parent: int) -> None:
    """Lower the flag when the parent closes the channel, or has died while a fork of it still holds it open."""
    while not channel.poll(1.0) and os.getppid() == parent:
        pass
    UP_FLAG.value = False


# -- the functions for the host --------------------------------------------------------------------------------------
def start_container(settings: Optional[Settings] = None) -> None:
    """Bring the stack up (`up --build --detach`), unpausing first what was left paused. There is no deadline.

    Raises ComposeError if Docker or Compose fails, ValueError for a bad setting.
    """
    stack = _Stack(_complete(settings))
    stack.unpause()
    stack.up()


def stop_container(settings: Optional[Settings] = None) -> None:
    """Stop the stack gracefully, kill what outlasts its time, and clean up as the setting *prune* says.

    Raises ComposeError if it can't be stopped, ValueError for a bad setting; a failed clean-up is a ComposeWarning.
    """
    _Stack(_complete(settings)).stop()


def watch_container(settings: Optional[Settings] = None) -> None:
    """Watch and repair the stack, in this thread, until UP_FLAG is lowered.

    That Docker does not answer is a ComposeWarning, and it goes on trying. Raises ComposeError only if there is no
    Compose command at all, ValueError for a bad setting.
    """
    _watch(_Stack(_complete(settings)))


def docker_compose(settings: Optional[Settings] = None) -> ContextManager[UpFlag]:
    """Return a context manager: inside, the stack is up and watched; at the end it is stopped and cleaned up.

    It gives UP_FLAG. Entering raises ComposeError if the stack can't be started (all is undone then), ValueError for a
    bad setting. What the body raises comes out again after the clean-up, which no further signal interrupts.
    """
    return _supervise(settings, str)


@contextlib.contextmanager
def _supervise(settings: Optional[Settings], notify: Notify) -> Iterator[UpFlag]:
    process = sys.modules.get('multiprocessing.process')
    if process is not None and getattr(process.current_process(), '_inheriting', False):  # a watcher process that starts
        raise RuntimeError("docker_compose() must stand under `if __name__ == '__main__':`, as multiprocessing wants it")
    settings = _complete(settings)
    stack = _Stack(settings)
    signals = {int(signal.SIGINT), settings.kill_signal} if _is_main_thread() else set()
    _Signals.deaf_until = 0.0
    with _handling(signum for signum in signals if callable(signal.getsignal(signum))):
        UP_FLAG.value = True
        stack.unpause()
        failed = True
        try:
            try:
                stack.up()
                services, counts = stack.services(), collections.Counter(c.service for c in stack.observe())
                services = {name: service._replace(scale=counts[name]) for name, service in services.items()}
                with _watching(stack, services, notify):
                    yield UP_FLAG
                failed = False
            finally:
                _Signals.deaf_until = math.inf
        finally:  # nested, for a signal may come before that
            with _handling(signals):
                UP_FLAG.value = False
                notify('STOPPING=1')
                _stop(stack, failed)
            _Signals.deaf_until = 0.0


def _stop(stack: _Stack, failed: bool) -> None:
    logger.info('stopping the stack')
    try:
        stack.stop()
    except ComposeError as error:
        if not failed:
            raise
        _warn('the stack could not be stopped: {}'.format(error))  # what went wrong before comes out


@contextlib.contextmanager
def _watching(stack: _Stack, services: Mapping[str, Service], notify: Notify) -> Iterator[None]:
    target = _watch_in_process if stack.settings.watcher is Watcher.PROCESS else _watch
    thread = threading.Thread(target=target, args=(stack, services, notify), name='broapt-watchdog', daemon=True)
    thread.start()
    try:
        notify('READY=1')
        yield
    finally:
        _Signals.deaf_until = math.inf  # from here on, further signals are only noted
        UP_FLAG.value = False
        thread.join()


# -- signals ---------------------------------------------------------------------------------------------------------
class _Signals:
    """What the signal handler knows. Plain attributes, since a handler must take no lock."""

    number: Optional[int] = None  # the kill signal
    previous: Dict[int, Any] = {}  # the handlers that flask_exit replaced
    # Monotonic: for a second from a signal on (it may come twice), while a process is started, and during the clean-up.
    deaf_until = 0.0
    noted: List[int] = []  # signals that came while deaf


def flask_exit(signum: Optional[int] = None, frame: Any = None) -> None:
    """End the server: as a signal handler, or called directly, for example in a Flask view.

    As a handler it calls the handler that was there before, else raises KeyboardInterrupt, on which Flask's and
    waitress's servers return normally; further signals are only noted. Called directly it uses
    `werkzeug.server.shutdown` (Werkzeug before 2.1), else sends this process its own kill signal.
    """
    if signum is None:
        flask = sys.modules.get('flask')
        environ = flask.request.environ if flask is not None and flask.has_request_context() else {}
        kill_signal = _Signals.number or Settings.load().kill_signal
        environ.get('werkzeug.server.shutdown', lambda: os.kill(os.getpid(), kill_signal))()
    elif time.monotonic() < _Signals.deaf_until:
        _Signals.noted.append(signum)
    else:
        _Signals.deaf_until = time.monotonic() + 1.0
        previous = _Signals.previous.get(signum)
        if not callable(previous):
            raise KeyboardInterrupt
        previous(signum, frame)


def register(settings: Optional[Settings] = None) -> None:
    """Make flask_exit the handler of the kill signal. Raises ValueError outside the main thread, or for a bad setting."""
    settings = Settings.load() if settings is None else settings
    if not _is_main_thread():
        raise ValueError('register() must be called in the main thread: Python handles signals there')
    _Signals.number, _Signals.deaf_until = settings.kill_signal, 0.0
    _hook(settings.kill_signal)


@contextlib.contextmanager
def _holding_signals() -> Iterator[None]:
    """Let signals wait until the end of the block."""
    if not _is_main_thread():
        yield
        return
    deaf_until, known = _Signals.deaf_until, len(_Signals.noted)
    _Signals.deaf_until = math.inf
    try:
        yield
    finally:
        _Signals.deaf_until = deaf_until
        held, _Signals.noted[known:] = _Signals.noted[known:], []
        for signum in held:
            flask_exit(signum)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _hook(signum: int) -> None:
    if signal.getsignal(signum) is not flask_exit:
        _Signals.previous[signum] = signal.getsignal(signum)
        signal.signal(signum, flask_exit)


@contextlib.contextmanager
def _handling(signals: Iterable[int]) -> Iterator[None]:
    """Let flask_exit handle these signals: the first one interrupts, further ones are noted.

    One signal can come twice at once: a PyInstaller program is two processes, and the first one forwards.
    """
    # None is a handler that Python can't put back.
    replaced = [signum for signum in signals if signal.getsignal(signum) not in (flask_exit, None)]
    for signum in replaced:
        _hook(signum)
    try:
        yield
    finally:
        for signum in replaced:
            signal.signal(signum, _Signals.previous.pop(signum))
        while _Signals.noted:
            name = signal.Signals(_Signals.noted.pop(0)).name
            logger.info('%s came while the stack was being stopped; it changed nothing', name)


# -- the command line ------------------------------------------------------------------------------------------------
def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; return the exit code: 0 fine, 1 Docker failed or a fault was found, 2 bad usage or setting."""
    parser = _make_parser()
    arguments = vars(parser.parse_args(argv))
    command, dry_run, as_json = arguments.pop('command'), arguments.pop('dry_run'), arguments.pop('json')
    if dry_run and command != 'check' or as_json and command != 'status':
        parser.error('--dry-run goes with check, --json with status')
    _set_up_logging(arguments.pop('level'))
    try:
        settings = Settings.load(**arguments)
        if command == 'run':
            return _run_until_signal(settings)
        stack = _Stack(_complete(settings), cancel=UP_FLAG)
        code = _status(stack, as_json) if command == 'status' else _explain(stack) if dry_run else _check(stack)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 1
    except (ValueError, ComposeError, OSError) as error:
        print('broapt_compose: {}'.format(error), file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def _make_parser() -> Any:
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            self.exit(2, '{}: {}; --help lists what is accepted\n'.format(self.prog, message))

    parser = Parser('broapt_compose', allow_abbrev=False)
    parser.description = 'Bring a Docker Compose stack up, keep it up, and stop it at the end.'
    parser.epilog = 'Every setting can also come from the environment, for example BROAPT_INTERVAL.'
    commands = 'run: up, watch, stop at the signal (default); check: look once, and repair; status: a table'
    parser.add_argument('command', nargs='?', choices=('run', 'check', 'status'), default='run', help=commands)
    for option in _OPTIONS:
        action = 'append' if option.parse is _parse_files else 'store'
        metavar = max(option.flags[:2], key=len).lstrip('-').upper()
        parser.add_argument(*option.flags, dest=option.field, metavar=metavar, action=action, help=option.help)
    parser.add_argument('--dry-run', action='store_true', help='with check: tell what would be done and why, and do nothing')
    parser.add_argument('--json', action='store_true', help='with status: print one JSON document')
    level: Dict[str, Any] = {'dest': 'level', 'action': 'store_const', 'default': logging.INFO}
    parser.add_argument('-v', '--verbose', const=logging.DEBUG, help='log every command', **level)
    parser.add_argument('-q', '--quiet', const=logging.WARNING, help='log only warnings and errors', **level)
    parser.add_argument('-V', '--version', action='version', version='%(prog)s ' + __version__)
    return parser


def _set_up_logging(level: int) -> None:
    logging.basicConfig(format='%(asctime)s %(levelname)s %(message)s')
    logging.raiseExceptions = False  # on a full disk, no tracebacks on top of what can't be written
    logger.setLevel(level)
    warnings.simplefilter('ignore', ComposeWarning)  # the log has them


def _run_until_signal(settings: Settings) -> int:
    register(settings)
    _hook(signal.SIGINT)
    usec = os.environ.get('WATCHDOG_USEC', '') if os.environ.get('WATCHDOG_PID', str(os.getpid())) == str(os.getpid()) else ''
    if usec.isdigit():  # check twice as often as systemd wants to hear of it: sd_watchdog_enabled(3)
        settings = settings._replace(interval=min(settings.interval, max(int(usec), 1) / 2e6))
    try:
        with _supervise(settings, _notify), contextlib.suppress(KeyboardInterrupt):
            logger.info('the stack is up and watched; %s or Ctrl+C stops it', signal.Signals(settings.kill_signal).name)
            while True:  # not one endless wait: a signal that the kernel gives to another thread would not end it
                threading.Event().wait(1.0)
    except KeyboardInterrupt:
        pass
    finally:
        for signum in (signal.SIGINT, settings.kill_signal):
            signal.signal(signum, signal.SIG_IGN)  # nothing is left to interrupt
    return 0


def _notify(text: str) -> None:
    """Tell systemd, if it listens: sd_notify(3)."""
    import socket

    address = os.environ.get('NOTIFY_SOCKET', '')
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(text.encode(), '\0' + address[1:] if address.startswith('@') else address)


def _check(stack: _Stack) -> int:
    """Look, wait until the faults have settled, look again, and repair what still is wrong."""
    with contextlib.closing(_Watch(stack)) as watch:
        try:
            watch.cycle()
            settled = watch.clock() + stack.settings.settle
            while watch.clock() < settled:
                watch.wait(settled - watch.clock())
            watch.cycle()
            while watch.repairs:
                watch.wait(stack.settings.interval)
                watch.finish_repairs()
        except KeyboardInterrupt:
            UP_FLAG.value = False  # ends the repairs under way
            raise
        return 1 if watch.outage is not None or watch.failures else 0


def _explain(stack: _Stack) -> int:
    """Print for each container what would be done, and why."""
    containers, services = stack.observe(), stack.services()
    actions = decide(containers, services, 0.0, History(), stack.settings)
    for container in containers:
        if container.id not in [action.container for action in actions]:
            print('{}: {}: nothing to do'.format(container.label, container.condition))
    for action in actions:
        command = _quote([action.verb.tool, *action.verb.arguments, *action.targets])
        print('{}: {}: would run `{}`'.format(action.label, action.cause, command))
    if not actions:
        print('all is well')
    return 0


def _status(stack: _Stack, as_json: bool) -> int:
    """Print a row for each container and for each service that lacks one; return 1 if one is not as it should be."""
    containers, services = stack.observe(), stack.services()
    rows = []
    for c in containers:
        well = c.state is State.RUNNING and c.health != 'unhealthy' or _has_done_its_job(c, services)
        row = {'service': c.service, 'container': c.name, 'id': c.id, 'state': c.condition, 'health': c.health, 'since': c.since}
        rows.append({**row, 'watched': c.watched, 'fault': not well and c.watched and c.service in services})
    for action in decide(containers, services, 0.0, History(), stack.settings):
        if not action.container:
            rows.append({'service': action.service, 'state': action.cause, 'fault': True})
    rows.sort(key=lambda row: (row['service'], row.get('container', '')))
    ok = not any(row['fault'] for row in rows)
    if as_json:
        print(json.dumps({'project': stack.project, 'ok': ok, 'containers': rows}, indent=2))
    else:
        _print_table(rows)
    return 0 if ok else 1


def _print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows aligned; on a terminal, what is wrong in red and the rest in green (not with NO_COLOR)."""
    colour = sys.stdout.isatty() and 'NO_COLOR' not in os.environ
    columns = ('service', 'container', 'state', 'health', 'since')
    table = [[name.upper() for name in columns]] + [[row.get(name) or '-' for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    for index, cells in enumerate(table):
        line = '  '.join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip()
        code = 31 if index and rows[index - 1]['fault'] else 32
        print('\033[{}m{}\033[0m'.format(code, line) if colour and index else line)


if __name__ == '__main__':
    sys.exit(main())
