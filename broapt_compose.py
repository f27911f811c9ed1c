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

Each setting comes from an argument, else BroAPT's ``const`` module (the first three, without BROAPT_), else the environment:

======================  ==========================================================================  =====================
variable                meaning                                                                     default
======================  ==========================================================================  =====================
BROAPT_DOCKER_COMPOSE   Compose file; several are joined by os.pathsep, or the option is repeated   what Compose finds
BROAPT_INTERVAL         longest time between two full checks, seconds                               10
BROAPT_KILL_SIGNAL      signal that ends the host, such as 15, TERM or SIGTERM                      15
BROAPT_WATCHER          where the watcher runs: thread or process                                   thread
BROAPT_SETTLE           how long a fault must last before it is repaired, seconds                   1
BROAPT_TIMEOUT          deadline of one Docker command, seconds                                     60
BROAPT_PRUNE            what to delete at the end: project, system (all unused, whosever) or none   project
BROAPT_UNHEALTHY        restart or ignore a container whose health check fails                      restart
BROAPT_COMPOSE_COMMAND  the Compose command; docker-compose if that one does not answer             docker compose
======================  ==========================================================================  =====================
"""

import contextlib
import enum
import functools
import importlib
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

_STEADY = 10.0  # seconds of running that end a crash loop, as in Docker's own restart policy
_LONGEST_DELAY = 300.0  # seconds between two repairs in a crash loop
_LOOP = 3  # repairs in a row from which on it is called a crash loop
_DEFAULT_GRACE = 10.0  # seconds that Docker gives a container without a stop timeout of its own
_AFTERMATH = 5.0  # seconds after an event in which to look again: Docker tells of a death before `docker ps` shows it
_STREAM_LIFE = 55.0  # seconds of an event stream, so that none outlives its watcher by more than a minute
_OUTPUT_LIMIT, _ERROR_LIMIT = 1 << 22, 1 << 16  # bytes of what a command writes; of more, the end is kept
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
        lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ['no reason given']
        self.reason = reason or '; '.join([line for line in lines if 'error' in line.lower()][-2:] or lines[-1:])

    def __str__(self) -> str:
        code = '' if self.returncode is None else 'exit code {}: '.format(self.returncode)
        command = _quote(word if len(word) <= 80 else word[:80] + '...' for word in self.command)
        return _one_line('{}: {}{}'.format(command, code, self.reason[:500]))


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
        open(file, 'rb').close()
    if names and not files:
        raise ValueError
    return files


def _parse_seconds(value: Any, least: float = 0.0) -> float:
    if not least <= float(value) <= threading.TIMEOUT_MAX:
        raise ValueError
    return float(value)


def _parse_signal(value: Any) -> int:
    text = str(int(value) if isinstance(value, int) else value).strip().upper()
    number = signal.Signals(int(text)) if text.isdigit() else signal.Signals['SIG' + re.sub('^SIG', '', text)]
    if number in (signal.SIGKILL, signal.SIGSTOP):
        raise ValueError
    return int(number)


def _parse_command(value: Any) -> Tuple[str, ...]:
    command = tuple(shlex.split(value) if isinstance(value, str) else value)
    if not all(isinstance(word, str) for word in command) or not any(command):
        raise ValueError
    return command


_parse_positive = functools.partial(_parse_seconds, least=sys.float_info.min)
_OPTIONS: Mapping[str, Tuple[str, Callable[[Any], Any], str]] = {  # field: flags, parser, what it accepts
    'docker_compose': ('--file -f --docker-compose', _parse_files, 'a readable file'),
    'interval': ('--interval -i', _parse_positive, 'a number of seconds greater than 0'),
    'kill_signal': ('--signal -s', _parse_signal, 'a signal such as 15, TERM or SIGTERM, other than KILL and STOP'),
    'watcher': ('--watcher -w', Watcher, 'thread or process'),
    'settle': ('--settle', _parse_seconds, 'a number of seconds, 0 or more'),
    'timeout': ('--timeout', _parse_positive, 'a number of seconds greater than 0'),
    'prune': ('--prune', Prune, 'project, system or none'),
    'unhealthy': ('--unhealthy', Unhealthy, 'restart or ignore'),
    'compose_command': ('--compose-command', _parse_command, 'a command as in a shell'),
}


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
        const = _find_const()
        values = {field: value for field, value in given.items() if value is not None}
        for field, (flags, parse, accepted) in _OPTIONS.items():
            sources = {
                flags.split()[0]: given.get(field),
                'const.' + field.upper(): getattr(const, field.upper(), None) if field in cls._fields[:3] else None,
                'BROAPT_' + field.upper(): os.environ.get('BROAPT_' + field.upper()) or None,
            }
            source, value = next((item for item in sources.items() if item[1] is not None), ('', None))
            if value is not None:
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
State = enum.Enum('State', {  # of a container, in Docker's words
    'CREATED': 'created', 'RUNNING': 'running', 'PAUSED': 'paused', 'RESTARTING': 'restarting', 'REMOVING': 'removing',
    'EXITED': 'exited', 'DEAD': 'dead',
})  # fmt: skip
_UNITS = {'second': 1, 'minute': 60, 'hour': 3600, 'day': 86400, 'week': 604800, 'month': 2592000, 'year': 31536000}
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
    folder: str  # of the Compose file that made it

    @property
    def label(self) -> str:
        """The service's name, with the number where it is not the first."""
        return self.service if self.number in ('', '1') else '{}-{}'.format(self.service, self.number)

    @property
    def condition(self) -> str:
        """The state in words, such as 'exited (137)' or 'unhealthy'."""
        text = 'unhealthy' if self.health == 'unhealthy' else self.state.value
        return text if self.exit_code is None else '{} ({})'.format(text, self.exit_code)

    @property
    def age(self) -> int:
        """How long it is in this state, in seconds, rounded down as Docker does."""
        number, _, unit = re.sub('About an?', '1', re.sub('Less than a', '0', self.since)).partition(' ')
        return int(number or 0) * _UNITS.get(unit.rstrip('s'), 0)


class Service(NamedTuple):
    """One service of the Compose file."""

    scale: int = 1  # how many containers it shall have
    watched: bool = True
    network_of: str = ''  # the service whose network it uses
    depends_on: Mapping[str, str] = {}  # service -> condition


Containers = Sequence[Container]
Services = Mapping[str, Service]
_LABELS = ('broapt.watch', *map('com.docker.compose.{}'.format, ('service', 'container-number', 'oneoff', 'project.working_dir')))
_PS_FIELDS = ('.ID', '.Names', '.State', '.Status', *map('(.Label "{}")'.format, _LABELS))
_PS_FORMAT = '[{}]'.format(','.join('{{json %s}}' % field for field in _PS_FIELDS))
_STATUS = re.compile(r'(?:Up|\w+ \((\d+)\)) ?(.*?)(?: ago)?(?: \((?:Paused|(?:health: )?(starting|healthy|unhealthy))\))?')


def _parse_containers(text: str) -> List[Container]:
    """Return what `docker ps --format _PS_FORMAT` printed, newest first, without one-offs; ValueError if it is not that."""
    import json

    if text and not text.endswith('\n'):
        raise ValueError('the last line is cut off')
    containers = []
    for line in text.splitlines():
        ident, name, state, status, watch, service, number, oneoff, folder = json.loads(line)
        found = _STATUS.fullmatch(status)  # none in states that have no time, such as Created
        code, since, health = found.groups('') if found else ('', '', '')
        if oneoff != 'True':  # made by `compose run`: somebody's own business
            containers.append(Container(ident, name, service, number, State(state), int(code) if code else None, health, since,
                                        watch.lower() != 'false', folder))  # fmt: skip
    return containers


_CONFIG_LINE = re.compile(r'( *)(["\']?)([\w.-]+)\2:(?: (.*))?')


def _parse_services(text: str) -> Dict[str, Service]:
    """Return the services that `compose config` printed.

    Compose 1.x prints YAML only, which the standard library can't read; but it is in canonical form, two spaces a
    level, from both generations, so the few keys that matter are found by their path.
    """
    path: List[str] = []
    values = {}
    for found in filter(None, map(_CONFIG_LINE.fullmatch, text.splitlines())):
        path[len(found.group(1)) // 2 :] = [found.group(3)]
        values[tuple(path)] = (found.group(4) or '').strip('"\'')
    services = {}
    for name in [path[1] for path in values if path[0] == 'services' and len(path) == 2]:
        own = {path[2:]: value for path, value in values.items() if path[:2] == ('services', name)}
        scale = own.get(('scale',)) or own.get(('deploy', 'replicas')) or '1'
        if ('profiles',) in own and ('name',) not in values:
            scale = '0'  # Compose 1.29 gives no name, and prints also what is switched off
        watched = own.get(('labels', 'broapt.watch'), '').lower() != 'false'
        depends_on = {key[1]: value for key, value in own.items() if key[:1] == ('depends_on',) and key[2:] == ('condition',)}
        services[name] = Service(int(scale), watched, own.get(('network_mode',), '').partition('service:')[2], depends_on)
    return services


# -- the flag --------------------------------------------------------------------------------------------------------
class UpFlag(threading.Event):
    """A flag that is up while the stack shall run; lowering it wakes the watcher at once."""

    def __init__(self) -> None:
        super().__init__()
        self._guard = threading.RLock()
        self._callbacks: List[Callable[[], Any]] = []
        self.set()

    def clear(self) -> None:
        """Lower the flag."""
        with self._guard:
            super().clear()
            for callback in self._callbacks:
                callback()

    value = property(threading.Event.is_set, lambda self, up: self.set() if up else self.clear(), doc='Whether the flag is up.')

    @contextlib.contextmanager
    def when_lowered(self, callback: Callable[[], Any]) -> Iterator[None]:
        """During the block, *callback* is called when the flag is lowered; at once if it is down already."""
        with self._guard:
            self._callbacks.append(callback)
            if not self.is_set():
                callback()
        try:
            yield
        finally:
            with self._guard:
                self._callbacks.remove(callback)


UP_FLAG = UpFlag()


# -- the Docker layer ------------------------------------------------------------------------------------------------
def _spawn(command: Sequence[str], folder: str) -> 'subprocess.Popen[bytes]':
    """Start *command*, in a session of its own so that Ctrl+C in the terminal does not reach it."""
    environment = dict(os.environ)
    if getattr(sys, 'frozen', False):  # PyInstaller's library path is not for Docker
        environment.pop('LD_LIBRARY_PATH', None)
        if 'LD_LIBRARY_PATH_ORIG' in environment:
            environment['LD_LIBRARY_PATH'] = environment['LD_LIBRARY_PATH_ORIG']
    logger.debug('running %s', _quote(command))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # for the moment before it has its session
    try:
        folder = folder if os.path.isdir(folder) else '/'  # somebody may have removed it
        return subprocess.Popen(command, env=environment, cwd=folder, start_new_session=True, stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _kill(process: 'subprocess.Popen[bytes]') -> None:
    """Kill the process with its whole group, and wait a moment for its end."""
    with contextlib.suppress(ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(1)


def _run(command: Sequence[str], limit: float, folder: str, flag: Optional[UpFlag] = None,
         more: Optional[Callable[[], float]] = None, show: Optional[Callable[[bytes], Any]] = None) -> str:  # fmt: skip
    """Return what *command* wrote to standard output; *show* gets all that it writes, as it comes.

    After *limit* seconds, *more* tells how many it may have in addition. Raises ComposeError if it can't be started,
    fails or lasts longer, _Cancelled if *flag* is lowered.
    """
    if flag is not None and not flag.value:
        raise _Cancelled
    try:
        process: Any = _spawn(command, folder)
    except (OSError, ValueError) as error:
        reason = 'command not found' if isinstance(error, FileNotFoundError) else getattr(error, 'strerror', None) or str(error)
        raise ComposeError(command, None, '', reason) from None
    buffers = {process.stdout: bytearray(), process.stderr: bytearray()}
    began, code = time.monotonic(), None
    try:
        on_flag = flag.when_lowered(functools.partial(_kill, process)) if flag else contextlib.ExitStack()
        with process.stdout, process.stderr, on_flag:
            code = _collect(process, buffers, began + limit, show)
            if code is None and more is not None:
                limit += more()
                code = _collect(process, buffers, began + limit, show)
    finally:
        if code is None:
            _kill(process)
    if flag is not None and not flag.value:
        raise _Cancelled
    output, errors = (buffer.decode('utf-8', 'replace') for buffer in buffers.values())
    if code != 0:
        raise ComposeError(command, code, errors, 'no answer within {:g} s'.format(limit) if code is None else '', output)
    return output


def _collect(process: 'subprocess.Popen[bytes]', buffers: Mapping[Any, bytearray], end: float,
             show: Optional[Callable[[bytes], Any]]) -> Optional[int]:  # fmt: skip
    """Read what the process writes until it has ended; return its exit code, None if it has not before the time *end*."""
    with selectors.DefaultSelector() as selector:
        for pipe, buffer in buffers.items():
            selector.register(pipe, selectors.EVENT_READ, buffer)
        patience = 0.5
        while selector.get_map() and time.monotonic() < end:
            ready = selector.select(min(end - time.monotonic(), patience))
            for key, _ in ready:
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(key.fileobj)
                elif show is not None:
                    show(chunk)
                key.data.extend(chunk)
                del key.data[: -(_OUTPUT_LIMIT if key.fileobj is process.stdout else _ERROR_LIMIT)]
            if not ready and process.poll() is not None:
                break  # but a process that it left behind holds its pipes, as ssh's ControlPersist does
            patience = 0.5 if ready else 2 * patience
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0.01, end - time.monotonic()))
    return process.returncode


def _echo(chunk: bytes) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # full disk, closed or no stream
        sys.stderr.write(chunk.decode('utf-8', 'replace'))
        sys.stderr.flush()


class _Stack:
    """The containers of one Compose project, by way of the commands of Docker and Compose."""

    def __init__(self, settings: Optional[Settings], notify: Callable[[str], Any] = str) -> None:
        self.settings = Settings.load() if settings is None else settings
        self.notify = notify  # takes messages for the service manager
        self.folder = os.getcwd()  # stays, whatever the host does with its own
        self.flag: Optional[UpFlag] = None  # commands are cancelled when it is lowered
        self.project = self.filter = ''  # '' while there is no container to read the project's name off
        self.services: Dict[str, Service] = {}  # what the Compose files declared when they were last read
        if not self.settings.compose_command:
            self.settings = self.settings._replace(compose_command=self._find_compose())

    def _find_compose(self) -> Tuple[str, ...]:
        for command in (('docker', 'compose'), ('docker-compose',)):
            with contextlib.suppress(ComposeError):
                _run((*command, 'version'), self.settings.timeout, self.folder)
                return command
        self.docker('--version')  # raises if there is no Docker at all
        raise ComposeError(('docker', 'compose'), None, '', 'no Compose found, neither this nor docker-compose')

    def docker(self, *arguments: str) -> str:
        """Return what `docker` printed; its deadline is the timeout, for stop and restart on top of the longest grace period."""
        more = functools.partial(self.longest_grace, arguments[1:]) if arguments[0] in ('stop', 'restart') else None
        return _run(('docker', *arguments), self.settings.timeout, self.folder, self.flag, more)

    def compose(self, *arguments: str, more: Optional[Callable[[], float]] = None, echo: bool = False) -> str:
        """Return what Compose printed; its deadline is the timeout and *more* seconds."""
        files = [part for file in self.settings.docker_compose for part in ('--file', file)]
        command = (*self.settings.compose_command, *files, *arguments)
        return _run(command, self.settings.timeout, self.folder, self.flag, more, _echo if echo else None)

    def observe(self) -> List[Container]:
        """Return all containers of the project but one-offs, newest first. The only reader; one command."""
        if not self.project:  # its name is not always the folder's
            ids = ['--filter=id=' + ident for ident in self.compose('ps', '--all', '--quiet').split()[:9]]
            names = self.docker('ps', '--all', '--format={{.Label "com.docker.compose.project"}}', *ids) if ids else ''
            self.project = names.split('\n')[0]
            self.filter = '--filter=label=com.docker.compose.project=' + self.project
        try:
            text = self.docker('ps', '--all', '--no-trunc', self.filter, '--format', _PS_FORMAT) if self.project else ''
            containers = _parse_containers(text)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ComposeError(('docker', 'ps'), None, '', 'its answer is not understood: {}'.format(error)) from None
        # From a pause until the next probe, Docker calls a container unhealthy although no probe has failed.
        sick = [c.id for c in containers if c.health == 'unhealthy']
        well = [line[:-2] for line in self.inspect('{{.Id}} {{.State.Health.FailingStreak}}', sick) if line.endswith(' 0')]
        return [c._replace(health='starting') if c.id in well else c for c in containers]

    def inspect(self, template: str, ids: Sequence[str]) -> List[str]:
        """Return a line for each of these containers that is still there."""
        try:
            return self.docker('inspect', '--format', template, *ids).splitlines() if ids else []
        except ComposeError as error:
            return error.stdout.splitlines()

    def longest_grace(self, ids: Sequence[str]) -> float:
        """Return the longest stop timeout of these containers, in seconds."""
        answer = self.inspect('{{json .Config.StopTimeout}}', ids)
        return max([float(word) for word in answer if word.isdigit()] + [_DEFAULT_GRACE])

    def read_services(self) -> None:
        """Read what the Compose files declare now; if that fails another time, go on by what they said before."""
        try:
            self.services = _parse_services(self.compose('config'))
        except ComposeError as error:
            if not self.services:
                raise
            _warn('the Compose file cannot be read; going on by what it said before: {}'.format(error))

    def follow_events(self, since: str, show: Callable[[bytes], Any]) -> str:
        """Call *show* at each event that can begin a fault; return the engine's time at which the stream has ended.

        It begins at the engine's time *since* ('': now), less a second: an event too many does no harm. If its reader
        dies, it ends at the next event only, so it gets an end, by the engine's clock, which may differ from this one's.
        """
        import datetime

        since = since or self.docker('info', '--format', '{{.SystemTime}}').strip()
        start = datetime.datetime.strptime(since[:19], '%Y-%m-%dT%H:%M:%S')
        begin, end = ((start + datetime.timedelta(seconds=more)).isoformat() + since[19:] for more in (-1, _STREAM_LIFE))
        filters = ['--filter=event=' + event for event in ('create', 'die', 'destroy', 'pause', 'health_status')]
        command = ('docker', 'events', '--format={{.ID}}', '--since', begin, '--until', end, '--filter=type=container')
        _run((*command, self.filter, *filters), _STREAM_LIFE + 5, self.folder, self.flag, show=show)
        return end

    def prepare(self) -> None:
        """Read the Compose files, and unpause what is paused, which `up` can't start. If this fails, there is nothing to undo."""
        self.read_services()
        self.apply('unpause', [State.PAUSED], self.observe())

    def start(self) -> None:
        """Bring the stack up, without a deadline, and learn the project's name: the Compose file may be broken at the end."""
        try:
            self.compose('up', '--build', '--detach', more=lambda: math.inf, echo=True)
        except _Cancelled:
            threading.Event().wait(1.0)  # the engine still ends what it was asked for, such as a network
            raise
        self.observe()

    def stop(self) -> None:
        """Stop the stack gracefully, kill what outlasts its time, and clean up in any case."""
        self.flag, containers = None, []
        try:
            containers = self.observe()
            self.apply('unpause', [State.PAUSED], containers)  # else it can't stop gracefully
        except ComposeError as error:
            logger.error('%s; stopping the stack nevertheless', error)
        try:
            if not self.services:
                self.read_services()
            self.compose('stop', more=lambda: self.longest_grace([c.id for c in containers]))
        except ComposeError as error:
            logger.error('%s; stopping the containers one by one', error)
        try:  # also what Compose leaves: services of a profile, or that are not in its file any more
            containers = self.observe()
            self.apply('stop', _ALIVE, containers)
        except ComposeError as error:
            logger.error('%s; killing the containers', error)
            self.apply('kill', _ALIVE, self.observe())
        finally:
            try:
                self.clean_up(containers)
            except ComposeError as error:
                _warn('the clean-up failed: {}'.format(error))

    def apply(self, command: str, states: Iterable[State], containers: Containers) -> None:
        """Run a command on what is in these states, except a stack of another folder with the same project name."""
        folders = {c.folder for c in containers if c.service in self.services or not self.services}
        ids = [c.id for c in containers if c.state in states and c.folder in folders]
        if ids:
            self.docker(*command.split(), *ids)

    def clean_up(self, containers: Containers) -> None:
        """Delete what the setting *prune* says; *containers*: as seen last."""
        if self.settings.prune is Prune.SYSTEM:
            self.docker('system', 'prune', '--volumes', '--force')
        elif self.settings.prune is Prune.PROJECT and not self.project:
            self.compose('down')  # a start that failed before the first container may have left a network
        elif self.settings.prune is Prune.PROJECT:
            try:
                self.remove(containers)
            except ComposeError:  # perhaps somebody else removes it all, too
                self.remove(self.observe())

    def remove(self, containers: Containers) -> None:
        """Delete these containers, then the project's dangling images and its networks."""
        self.apply('rm --force --volumes', State, containers)
        # Only Compose 2.x labels the images it builds. One that is in use stays: hence prune, not rm.
        if self.docker('image', 'ls', '--quiet', '--filter=dangling=true', self.filter):
            self.docker('image', 'prune', '--force', self.filter)
        networks = self.docker('network', 'ls', '--quiet', self.filter).split()
        if networks:
            self.docker('network', 'rm', *networks)


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
    """Repairs that followed each other with less than ten seconds of running in between."""

    repairs: int = 0
    began: float = 0.0  # when the first fault was seen
    ended: float = -math.inf  # end of the last repair


class Action(NamedTuple):
    """A repair of one fault, due now or later. Times are seconds of a monotonic clock."""

    verb: Verb
    service: str
    container: str  # id; '' where containers are missing
    label: str
    cause: str
    since: float = 0.0  # when the fault was first seen
    due: float = 0.0
    streak: Streak = Streak()  # the repairs before this one

    @property
    def key(self) -> Tuple[Verb, str]:
        """What tells one fault from another."""
        return self.verb, self.container or self.service

    def target(self, verb: Verb) -> str:
        """What the command of *verb* names."""
        return self.container if verb.tool == 'docker' else self.service

    @property
    def line(self) -> str:
        """What its repairs count for: the service; but unpausing does not count, and only its failures make it wait."""
        return self.container if self.verb is Verb.UNPAUSE else self.service


class History(NamedTuple):
    """What decide() needs to know of the past."""

    since: Mapping[Tuple[Verb, str], float] = {}  # Action.key -> when a fault was first seen that is not being repaired yet
    streaks: Mapping[str, Streak] = {}  # Action.line -> its last repairs


def decide(containers: Containers, services: Services, now: float, history: History, settings: Settings) -> List[Action]:
    """Return a repair for each fault, due at once or later. Pure.

    *containers*: newest first; *now*: seconds of a monotonic clock.
    """
    actions = []
    for action in _find_faults([c for c in containers if c.service in services], services, settings):
        since = history.since.get(action.key, now)
        streak = history.streaks.get(action.line, Streak())
        if since - streak.ended >= _STEADY:
            streak = Streak(began=since)
        delay = min(2.0 ** min(streak.repairs - 1, 9), _LONGEST_DELAY) if streak.repairs else 0.0
        due = since + max(delay, settings.settle)
        actions.append(action._replace(since=since, due=due, streak=streak))
    return actions


def _find_faults(own: Containers, services: Services, settings: Settings) -> Iterator[Action]:
    for container in own:
        verb, cause = _find_verb(container, own, services, settings)
        if verb and container.watched and services[container.service].watched:
            yield Action(verb, container.service, container.id, container.label, cause)
    for name, cause in _find_missing(own, services):
        if services[name].watched and _may_begin(name, own, services):
            yield Action(Verb.CREATE, name, '', name, cause)


def _find_missing(own: Containers, services: Services) -> Iterator[Tuple[str, str]]:
    for name, service in services.items():
        missing = service.scale - sum(c.service == name for c in own)
        if missing > 0:
            yield name, 'missing' if service.scale == 1 else '{} of {} missing'.format(missing, service.scale)


def _find_verb(container: Container, own: Containers, services: Services, settings: Settings) -> Tuple[Optional[Verb], str]:
    """Return what has to be done about this container, and why; None: nothing, or not yet."""
    state, cause, network_of = container.state, container.condition, services[container.service].network_of
    owner = next((c for c in reversed(own) if c.service == network_of), None)
    if state is State.PAUSED:
        return Verb.UNPAUSE, cause
    if state is State.DEAD:
        return Verb.REMOVE, cause
    if state in (State.RESTARTING, State.REMOVING) or _is_being_replaced(container, own):
        return None, 'Docker, or somebody, is at it'
    if network_of and (owner is None or owner.state is not State.RUNNING):
        return None, 'it cannot run before the one whose network it uses'
    if owner and own.index(owner) < own.index(container):
        return Verb.RECREATE, 'its network is gone'  # it was made for the network of an older one
    if state is State.RUNNING and owner and owner.age < container.age:
        return Verb.RESTART, 'its network is gone'  # a container that is started anew gets a new network
    if state is State.RUNNING:
        return Verb.RESTART if container.health == 'unhealthy' and settings.unhealthy is Unhealthy.RESTART else None, cause
    if state is State.CREATED and not _may_begin(container.service, own, services):
        return None, 'what it depends on is not there yet'
    return None if _has_done_its_job(container, services) else Verb.START, cause


def _has_done_its_job(container: Container, services: Services) -> bool:
    wanted = [service.depends_on.get(container.service) for service in services.values()]
    return container.state is State.EXITED and container.exit_code == 0 and 'service_completed_successfully' in wanted


def _is_being_replaced(container: Container, own: Containers) -> bool:
    # During an `up --force-recreate`, two containers bear one number: Compose 2.x creates the new one beside the old one
    # running, 1.29 beside the old one stopped. So only the newest is touched, and not while an older one runs.
    twins = [c for c in own if (c.service, c.number) == (container.service, container.number)]
    return twins[0] is not container or any(c.state in _ALIVE for c in twins[1:])


def _may_begin(name: str, own: Containers, services: Services) -> bool:
    """Tell whether what a service needs before its first start is there, as far as it is watched.

    That something is merely started first is left to Compose; the rest it would wait for, and hold up all other repairs.
    """
    for other, condition in services[name].depends_on.items():
        needed = [c for c in own if c.service == other]
        met = {
            'service_completed_successfully': any(c.exit_code == 0 for c in needed),
            'service_healthy': any(c.state is State.RUNNING and c.health == 'healthy' for c in needed),
        }
        if other in services and services[other].watched and services[other].scale and not met.get(condition, True):
            return False
    owner = services[name].network_of
    return not owner or any(c.service == owner and c.state is State.RUNNING for c in own)


# -- the watcher -----------------------------------------------------------------------------------------------------
class _Task(threading.Thread):
    """A thread that keeps what its function raises; concurrent.futures would refuse once the host's main thread has ended."""

    def __init__(self, wake: threading.Event, function: Callable[..., Any], *arguments: Any) -> None:
        super().__init__(target=function, args=arguments, daemon=True)
        self.wake, self.ended = wake, False
        self.error: Optional[Exception] = None

    def run(self) -> None:
        """Call the function, then set *wake*."""
        try:
            super().run()
        except Exception as error:
            self.error = error
        finally:
            self.ended = True
            self.wake.set()


class _Watch:
    """Observe, decide, act, over and over. Repairs run in threads, so that a slow one holds up no other service."""

    def __init__(self, stack: _Stack, clock: Callable[[], float] = time.monotonic) -> None:
        self.stack, self.settings, self.clock = stack, stack.settings, clock
        stack.flag = UP_FLAG
        self.wake = threading.Event()  # set when there is something to look at
        self.woken = -math.inf  # when the last event came
        self.history = History()
        self.known: Any = None  # ids of the containers seen when the Compose files were read; None: read them
        self.repairs: List[Tuple[_Task, Verb, Sequence[Action], float]] = []  # under way, and since when
        # One Compose command at a time: two would create the same network twice.
        self.turns: Any = {'docker': threading.Semaphore(16), 'compose': threading.Lock()}
        self.failures = 0  # repairs that failed
        self.outage: Optional[float] = None  # when Docker stopped to answer

    def close(self) -> None:
        """End what is under way."""
        UP_FLAG.value = False
        for task in [task for task, *_ in self.repairs if not task.ended]:
            task.join()

    def run(self) -> None:
        """Watch until the flag is lowered."""
        follower, over = threading.Thread(target=self.follow_events, daemon=True), threading.Event()
        with UP_FLAG.when_lowered(over.set), UP_FLAG.when_lowered(self.wake.set), contextlib.closing(self):
            while not over.is_set():
                timeout = self.settings.interval
                try:
                    timeout = self.cycle()
                    if self.stack.project and not follower.ident:
                        with contextlib.suppress(RuntimeError):  # no thread to be had: the interval will do
                            follower.start()
                except _Cancelled:
                    pass
                except Exception:
                    logger.exception('unexpected error; the next check is in %g s', timeout)
                self.wake.wait(timeout)
                self.wake.clear()
        if follower.ident:
            follower.join()

    def follow_events(self) -> None:
        """Wake the watcher at each event until the flag is lowered, from one stream after the other."""
        until, over = '', threading.Event()
        with UP_FLAG.when_lowered(over.set):
            while not over.is_set():
                began = self.clock()
                with contextlib.suppress(_Cancelled, ComposeError, OSError, ValueError):  # for now, the interval will do
                    until = self.stack.follow_events(until, self.note_event)
                if self.clock() - began < _STREAM_LIFE - 5:
                    until = ''  # lost before its time: nobody knows what was missed
                    over.wait(min(self.settings.interval, _STREAM_LIFE / 2))

    def note_event(self, _: bytes) -> None:
        """Have the watcher look, for whatever this event tells."""
        self.woken = self.clock()
        self.wake.set()

    def cycle(self) -> float:
        """Take one look and begin what is due; return the seconds until the next look is wanted."""
        self.finish_repairs()
        now, interval = self.clock(), self.settings.interval
        try:
            containers = self.stack.observe()
            ids = {c.id for c in containers}
            if self.known is None or not self.repairs and not ids.issubset(self.known):  # somebody has deployed, perhaps changes
                self.stack.read_services()
                self.known = ids
        except ComposeError as error:
            self.history = self.history._replace(since={})  # nothing is repaired on the strength of old knowledge
            if self.outage is None:
                self.outage = now
                _warn('Docker does not answer; trying again every {:g} s: {}'.format(interval, error))
            return min(interval, max(0.1, now - self.outage))  # soon at first: it may be a moment's trouble only
        if self.outage is not None:
            logger.info('Docker answers again, after %.0f s', now - self.outage)
            self.outage = None
        ago = now - self.woken  # a new fault began with the last event, if that came just now
        actions = decide(containers, self.stack.services, self.woken if ago < 1.0 else now, self.history, self.settings)
        busy = {action.service for _, _, group, _ in self.repairs for action in group}
        actions = [action for action in actions if action.service not in busy]
        for action in actions:
            if action.streak.repairs + 1 >= _LOOP and action.key not in self.history.since:
                _warn(_describe_loop(action, now))
        waiting = [action for action in actions if action.due > now]
        self.history = self.history._replace(since={action.key: action.since for action in waiting})
        for verb in Verb:
            due = [action for action in actions if action.verb is verb and action not in waiting]
            for group in [due] if verb.tool == 'compose' else [[action] for action in due]:
                self._begin(verb, group, now)
        status = '; '.join('{}: {}'.format(action.label, action.cause) for action in actions)
        running = [c.state is State.RUNNING for c in containers if c.service in self.stack.services]
        self.stack.notify('STATUS={}\nWATCHDOG=1'.format(status or '{} of {} running'.format(sum(running), len(running))))
        wanted = [now + interval, *(action.due for action in waiting)]
        if ago < _AFTERMATH:
            wanted.append(now + max(0.1 if self.repairs else 0.01, ago))  # a look slows a repair down
        return min(wanted) - self.clock()

    def _begin(self, verb: Verb, group: Sequence[Action], began: float) -> None:
        """Mend faults of one kind in a thread. Only for Compose are there several at once: it takes its time for each command."""
        if group:
            task = _Task(self.wake, self._mend, verb, sorted({action.target(verb) for action in group}))
            try:
                task.start()
            except RuntimeError:  # no thread to be had, as in Python 3.12 once the main thread has ended: then in this one
                task.run()
            self.repairs.append((task, verb, group, began))

    def _mend(self, verb: Verb, targets: Sequence[str]) -> None:
        with self.turns[verb.tool]:
            if verb.tool == 'compose':
                self.stack.compose(*verb.arguments, *targets, more=lambda: 9 * self.settings.timeout)
            else:
                self.stack.docker(*verb.arguments, *targets)

    def finish_repairs(self) -> None:
        """Take note of the repairs that have ended.

        Compose brings up what Docker could not start. Where Compose failed for several, each gets a command of its own.
        """
        ended = [repair for repair in self.repairs if repair[0].ended]
        self.repairs = [repair for repair in self.repairs if repair not in ended]
        for task, verb, group, began in ended:
            error = task.error
            if error is not None and verb is Verb.START and not isinstance(error, _Cancelled):
                logger.info('%s; bringing %s up instead', error, group[0].label)
                self._begin(Verb.UP, group, began)
            elif error is not None and len(group) > 1:
                for action in group:
                    self._begin(verb, [action], began)
            elif not isinstance(error, _Cancelled):
                for action in group:
                    self._record(verb, action, error, began)

    def _record(self, verb: Verb, action: Action, error: Optional[BaseException], began: float) -> None:
        """Remember a repair: the next one of this service may have to wait."""
        if error is not None or action.verb not in (Verb.UNPAUSE, Verb.REMOVE) and action.cause != State.CREATED.value:
            streak = Streak(action.streak.repairs + 1, action.streak.began, self.clock())
            self.history = self.history._replace(streaks={**self.history.streaks, action.line: streak})
        if error is not None:
            self.failures += 1
            logger.error('%s: %s, not %s: %s', action.label, action.cause, verb.done, error)
        else:
            logger.info('%s: %s -> %s (%.2f s)', action.label, action.cause, verb.done, self.clock() - began)
        if verb.tool == 'compose':
            self.known = None  # perhaps the service is not declared any more, or with another scale


def _describe_loop(action: Action, now: float) -> str:
    count, began = action.streak.repairs + 1, action.streak.began
    ordinal = str(count) + ('th' if 10 < count % 100 < 14 else {1: 'st', 2: 'nd', 3: 'rd'}.get(count % 10, 'th'))
    text = '{}: crash loop, {} for the {} time in {:.0f} s; next try in {:.0f} s'
    return text.format(action.label, action.cause, ordinal, now - began, action.due - now)


def _watch_in_process(stack: _Stack, begun: threading.Event) -> None:
    """Keep a watcher process running while the flag is up; set *begun* once there is the first."""
    import multiprocessing.connection

    lowered, stack.flag = threading.Event(), None
    with UP_FLAG.when_lowered(lowered.set):
        while not lowered.is_set():
            theirs, ours = multiprocessing.Pipe(duplex=False)  # says nothing; its end is what counts
            process = multiprocessing.Process(target=_process_main, args=(theirs, ours, stack, logger.level), daemon=True)
            with contextlib.closing(theirs), contextlib.closing(ours), UP_FLAG.when_lowered(ours.close):
                try:
                    process.start()
                    begun.set()
                    multiprocessing.connection.wait([process.sentinel, theirs])
                except (OSError, AssertionError, RuntimeError) as error:  # such as: daemonic processes can't have children
                    if not lowered.is_set():
                        _warn('no watcher process can be started ({}); watching in a thread'.format(error))
                    begun.set()
                    return _Watch(stack).run()
            process.join(2)
            if process.pid and process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
            if not lowered.wait(_RESPAWN):
                _warn('the watcher process has died (exit code {}); starting it again'.format(process.exitcode))


def _process_main(theirs: Any, ours: Any, stack: _Stack, level: int) -> None:
    """Watch in a process of its own, until the parent closes its end of the pipe or is gone."""
    ours.close()  # with this copy open, the end of the parent would go unnoticed
    for signum in (signal.SIGINT, stack.settings.kill_signal):
        signal.signal(signum, lambda *_: None)  # the parent's business; not SIG_IGN, which commands would inherit
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how multiprocessing ends it if the host does not
    UP_FLAG.__init__()  # type: ignore[misc]  # a forked copy has the parent's callbacks
    if stack.notify is _notify:  # on the command line: a process that is not forked has to be told
        _set_up_logging(level)
    watcher, parent = threading.Thread(target=_Watch(stack).run, daemon=True), os.getppid()
    with contextlib.suppress(KeyboardInterrupt):
        watcher.start()
        while watcher.is_alive() and not theirs.poll(1.0) and os.getppid() == parent:  # a fork of it may hold the pipe open
            pass
    UP_FLAG.value = False
    watcher.join()


# -- the functions for the host --------------------------------------------------------------------------------------
def start_container(settings: Optional[Settings] = None) -> None:
    """Bring the stack up (`up --build --detach`), unpausing first what was left paused. There is no deadline.

    Raises ComposeError if Docker or Compose fails, ValueError for a bad setting.
    """
    stack = _Stack(settings)
    stack.prepare()
    stack.start()


def stop_container(settings: Optional[Settings] = None) -> None:
    """Stop the stack gracefully, kill what outlasts its time, and clean up as the setting *prune* says.

    Raises ComposeError if it can't be stopped, ValueError for a bad setting; a failed clean-up is a ComposeWarning.
    """
    _Stack(settings).stop()


def watch_container(settings: Optional[Settings] = None) -> None:
    """Watch and repair the stack, in this thread, until UP_FLAG is lowered.

    That Docker does not answer is a ComposeWarning, and it goes on trying. Raises ComposeError only if there is no
    Compose command at all, ValueError for a bad setting.
    """
    _Watch(_Stack(settings)).run()


def docker_compose(settings: Optional[Settings] = None) -> ContextManager[UpFlag]:
    """Return a context manager: inside, the stack is up and watched; at the end it is stopped and cleaned up.

    It gives UP_FLAG. Entering raises ComposeError if the stack can't be started (all is undone then); a bad setting is a
    ValueError. What the body raises comes out again after the clean-up, which no further signal interrupts.
    """
    return _supervise(_Stack(settings))


@contextlib.contextmanager
def _supervise(stack: _Stack) -> Iterator[UpFlag]:
    process = sys.modules.get('multiprocessing.process')
    if process is not None and getattr(process.current_process(), '_inheriting', False):  # a watcher process that starts
        raise RuntimeError("docker_compose() must stand under `if __name__ == '__main__':`, as multiprocessing wants it")
    UP_FLAG.value = True
    stack.prepare()
    stack.flag, failed = UP_FLAG, True
    started, begun = threading.Event(), threading.Event()
    start = _Task(started, stack.start)  # in a thread: here, a signal that comes while it starts a process would lose it
    in_process = stack.settings.watcher is Watcher.PROCESS
    watch = functools.partial(_watch_in_process, stack, begun) if in_process else _Watch(stack).run
    watcher = threading.Thread(target=watch, name='broapt-watchdog', daemon=True)
    signals = (int(signal.SIGINT), stack.settings.kill_signal)
    _Signals.number, _Signals.deaf_until = stack.settings.kill_signal, 0.0
    with _handling(signals):
        try:
            try:
                start.start()
                while not started.wait(1.0):  # no endless wait: the kernel may give a signal to another thread
                    pass
                if start.error is not None:
                    raise start.error
                watcher.start()
                while in_process and watcher.is_alive() and not begun.wait(0.1):
                    pass  # a fork amid the body's own subprocesses would hold their pipes open
                stack.notify('READY=1')
                yield UP_FLAG
                failed = False
            except _Cancelled:
                raise ComposeError((*stack.settings.compose_command, 'up'), None, '', 'the flag was lowered') from None
            finally:
                _Signals.deaf_until = math.inf  # from here on, further signals are only noted
        finally:  # nested, for a signal may come before that
            with _handling(signals):  # again: the body may have changed the handlers, as asyncio does
                _end(stack, [start, watcher], failed)
            _Signals.deaf_until = 0.0


def _end(stack: _Stack, threads: Sequence[threading.Thread], failed: bool) -> None:
    logger.info('stopping the stack')
    stack.notify('STOPPING=1')
    UP_FLAG.value = False
    for thread in threads:
        if thread.is_alive():
            thread.join(10)  # it ends at once, except in a host that is just being torn down
    try:
        stack.stop()
    except ComposeError as error:
        if not failed:
            raise
        _warn('the stack could not be stopped: {}'.format(error))  # what went wrong before comes out


# -- signals ---------------------------------------------------------------------------------------------------------
class _Signals:
    """What the signal handler knows. Plain attributes, since a handler must take no lock."""

    number: Optional[int] = None  # the kill signal
    previous: Dict[int, Any] = {}  # the handlers that flask_exit replaced
    deaf_until = 0.0  # monotonic: for a second from a signal on, which PyInstaller's bootloader repeats, and in the clean-up
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
    elif _Signals.previous.get(signum) not in (None, signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler):
        _Signals.previous[signum](signum, frame)
    else:
        _Signals.deaf_until = time.monotonic() + 1.0
        raise KeyboardInterrupt


def register(settings: Optional[Settings] = None) -> None:
    """Make flask_exit the handler of the kill signal. Raises ValueError outside the main thread, or for a bad setting."""
    number = (Settings.load() if settings is None else settings).kill_signal
    if threading.current_thread() is not threading.main_thread():
        raise ValueError('register() must be called in the main thread: Python handles signals there')
    _Signals.number, _Signals.deaf_until = number, 0.0
    if signal.getsignal(number) is not flask_exit:
        _Signals.previous[number] = signal.signal(number, flask_exit)


@contextlib.contextmanager
def _handling(signals: Iterable[int]) -> Iterator[None]:
    """Let flask_exit handle these signals, unless they are ignored; at the end, tell which came in the clean-up."""
    main = threading.current_thread() is threading.main_thread()  # only there can they be handled
    kept = (flask_exit, signal.SIG_IGN, None)  # None: Python could not put that handler back
    replaced = {s: signal.signal(s, flask_exit) for s in signals if main and signal.getsignal(s) not in kept}
    _Signals.previous.update(replaced)
    try:
        yield
    finally:
        for signum, handler in replaced.items():
            signal.signal(signum, handler)
            _Signals.previous.pop(signum, None)
        while _Signals.noted:
            name = signal.Signals(_Signals.noted.pop(0)).name
            logger.info('%s came when the end was under way already; it changed nothing', name)


# -- the command line ------------------------------------------------------------------------------------------------
def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; return the exit code: 0 fine, 1 Docker failed or a fault was found, 2 bad usage or setting."""
    arguments = _parse_arguments(argv)
    command, dry_run, as_json, level = map(arguments.pop, ('command', 'dry_run', 'json', 'level'))
    _set_up_logging(level)
    try:
        settings = Settings.load(**arguments)
        if command == 'run':
            return _run_until_signal(settings)
        stack = _Stack(settings)
        stack.read_services()
        code = _status(stack, as_json) if command == 'status' else _explain(stack) if dry_run else _check(stack)
        print(end='', flush=True)
        return code
    except KeyboardInterrupt:
        return 0 if command == 'run' else 1
    except (ValueError, ComposeError, OSError) as error:
        print('broapt_compose: {}'.format(error), file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def _parse_arguments(argv: Optional[Sequence[str]]) -> Dict[str, Any]:
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            """Exit with 2 and one line, without argparse's usage."""
            self.exit(2, '{}: {}; --help lists what is accepted\n'.format(self.prog, message))

    table = {field.lower(): texts for field, *texts in re.findall('BROAPT_(\\w+) +(.+?)  +(.+)', __doc__ or '')}
    parser = Parser('broapt_compose', description=(__doc__ or '').split('\n')[0],
                    epilog='Every setting can also come from the environment, for example BROAPT_INTERVAL.')  # fmt: skip
    commands = 'run: up, watch, stop at the signal (default); check: look once, and repair; status: a table'
    parser.add_argument('command', nargs='?', choices=('run', 'check', 'status'), default='run', help=commands)
    for field, (flags, parse, _) in _OPTIONS.items():
        metavar, action = flags.split()[0][2:].upper(), 'append' if parse is _parse_files else 'store'
        text = '{} (default: {})'.format(*table.get(field, ('', '')))
        parser.add_argument(*flags.split(), dest=field, metavar=metavar, action=action, help=text)
    parser.add_argument('--dry-run', action='store_true', help='with check: tell what would be done and why, and do nothing')
    parser.add_argument('--json', action='store_true', help='with status: print one JSON document')
    level: Dict[str, Any] = {'dest': 'level', 'action': 'store_const', 'default': logging.INFO}
    parser.add_argument('-v', '--verbose', const=logging.DEBUG, help='log every command', **level)
    parser.add_argument('-q', '--quiet', const=logging.WARNING, help='log only warnings and errors', **level)
    parser.add_argument('-V', '--version', action='version', version='%(prog)s ' + __version__)
    arguments = vars(parser.parse_args(argv))
    if arguments['dry_run'] and arguments['command'] != 'check' or arguments['json'] and arguments['command'] != 'status':
        parser.error('--dry-run goes with check, --json with status')
    return arguments


def _set_up_logging(level: int) -> None:
    logging.basicConfig(format='%(asctime)s %(levelname)s %(message)s')
    logging.raiseExceptions = False  # on a full disk, no tracebacks on top of what can't be written
    logger.setLevel(level)
    warnings.simplefilter('ignore', ComposeWarning)  # the log has them


def _run_until_signal(settings: Settings) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where it is ignored, in the background of a script
    register(settings)
    usec = os.environ.get('WATCHDOG_USEC', '') if os.environ.get('WATCHDOG_PID', str(os.getpid())) == str(os.getpid()) else ''
    if usec.isdigit():  # check twice as often as systemd wants to hear of it: sd_watchdog_enabled(3)
        settings = settings._replace(interval=min(settings.interval, max(int(usec), 1) / 2e6))
    try:
        with _supervise(_Stack(settings, _notify)), contextlib.suppress(KeyboardInterrupt):
            logger.info('the stack is up and watched; %s or Ctrl+C stops it', signal.Signals(settings.kill_signal).name)
            while True:  # no endless wait: the kernel may give a signal to another thread
                threading.Event().wait(1.0)
        return 0
    finally:
        for signum in (signal.SIGINT, settings.kill_signal):
            signal.signal(signum, signal.SIG_IGN)  # nothing is left to interrupt


def _notify(text: str) -> None:
    """Tell systemd, if it listens: sd_notify(3)."""
    import socket

    address = os.environ.get('NOTIFY_SOCKET', '')
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(text.encode(), '\0' + address[1:] if address.startswith('@') else address)


def _check(stack: _Stack) -> int:
    """Repair what is wrong, once it has settled; return 1 if that failed."""
    watch = _Watch(stack)
    with contextlib.closing(watch):
        watch.cycle()
        if watch.history.since:
            threading.Event().wait(stack.settings.settle)
            watch.cycle()
        while watch.repairs:
            watch.wake.wait(1.0)
            watch.wake.clear()
            watch.finish_repairs()
    return 1 if watch.outage is not None or watch.failures else 0


def _explain(stack: _Stack) -> int:
    """Print for each container what would be done, and why."""
    containers = stack.observe()
    actions = decide(containers, stack.services, 0.0, History(), stack.settings)
    for container in containers:
        if container.id not in [action.container for action in actions]:
            print('{}: {}: nothing to do'.format(container.label, container.condition))
    for action in actions:
        tool = stack.settings.compose_command if action.verb.tool == 'compose' else ('docker',)
        command = _quote([*tool, *action.verb.arguments, action.target(action.verb)])
        print('{}: {}: would run `{}`'.format(action.label, action.cause, command))
    if not actions:
        print('all is well')
    return 0


def _status(stack: _Stack, as_json: bool) -> int:
    """Print a row for each container and for each service that lacks one; return 1 if one is not as it should be."""
    containers, services = stack.observe(), stack.services
    rows: List[Dict[str, Any]] = []
    for name, cause in _find_missing(containers, services):
        rows.append({'service': name, 'state': cause, 'fault': services[name].watched})
    for c in containers:
        well = c.state is State.RUNNING and c.health != 'unhealthy' or _has_done_its_job(c, services)
        row = {'service': c.service, 'container': c.name, 'id': c.id, 'state': c.condition, 'health': c.health, 'since': c.since}
        rows.append({**row, 'watched': c.watched, 'fault': not well and c.watched and c.service in services})
    rows.sort(key=lambda row: (row['service'], row.get('container', '')))
    ok = not any(row['fault'] for row in rows)
    if as_json:
        import json

        print(json.dumps({'project': stack.project, 'ok': ok, 'containers': rows}, indent=2))
        return 0 if ok else 1
    columns = ('service', 'container', 'state', 'health', 'since')
    table = [[name.upper() for name in columns]] + [[row.get(name) or '-' for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    coloured = sys.stdout is not None and sys.stdout.isatty() and 'NO_COLOR' not in os.environ
    for cells, fault in zip(table, [None, *(row['fault'] for row in rows)]):
        line = '  '.join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip()
        print('\033[{}m{}\033[0m'.format(31 if fault else 32, line) if coloured and fault is not None else line)
    return 0 if ok else 1


if __name__ == '__main__':
    sys.exit(main())
