# SPDX-FileCopyrightText: 2026 the broapt_compose authors
# SPDX-License-Identifier: BSD-3-Clause
"""Docker watchdog: bring a Docker Compose stack up, keep it up, and stop it at the end.

As a library, in a host such as BroAPT's daemon (which has a copy of this file, ``compose.py``)::

    from broapt_compose import docker_compose, register

    register()                       # the kill signal ends the server
    with docker_compose():           # stack up, watcher running
        app.run()                    # Flask's own server, until the signal
    # stack stopped and cleaned up

From the command line: ``python -m broapt_compose [run | check | status | hold | release]``.

The watcher sees all containers of the project with one request to the engine, decides from that
look what is wrong, and mends it: paused containers are unpaused, stopped ones started, missing ones
created, unhealthy ones restarted. Events only wake it; it looks at least every *interval* anyway.
Other projects are never touched (unless you ask for ``--prune system``).

The containers are handled over the engine's HTTP API; Compose is run for what only Compose knows.
All settings stand in one table, `_OPTIONS`; ``python -m broapt_compose run --help`` prints it.
"""

import datetime
import importlib
import json
import logging
import math
import os
import queue
import re
import select
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from contextlib import ExitStack, closing, contextmanager, suppress
from enum import Enum
from functools import lru_cache, partial
from typing import (
    Any,
    Callable,
    ContextManager,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
)

__version__ = '2.0.0'
__all__ = [
    'docker_compose',
    'watch_container',
    'start_container',
    'stop_container',
    'flask_exit',
    'register',
    'UP_FLAG',
    'ComposeWarning',
    'ComposeError',
    'Settings',
    'main',
]

logger = logging.getLogger('broapt_compose')
logger.addHandler(logging.NullHandler())

_STEADY = 10.0  # seconds of running that end a crash loop, as in Docker's own restart policy
_LONGEST_DELAY = 300.0  # seconds between two repairs in a crash loop
_LOOP = 3  # repairs in a row from which on it is called a crash loop
_DEFAULT_GRACE = 10.0  # seconds that Docker gives a container without a stop timeout of its own
_LONGEST_HOLD = 86400.0  # seconds
_QUIET = 0.02  # seconds without an event that Compose waits for
_RESPAWN = 0.5  # seconds before a watcher process that died is started again
_INSPECT_LIMIT = 1.0  # seconds: the engine answers late for a container that it is busy with
# What comes of reading an answer, a file, or a value, of another form than expected.
_MISREAD = (LookupError, TypeError, ValueError, AttributeError)


# -- exceptions ------------------------------------------------------------------------------------
class ComposeWarning(Warning):
    """The containers could not be polled, a service is in a crash loop, or a clean-up failed."""


class ComposeError(Exception):
    """A command or a request to the engine failed; the text is one line: what failed, on what, why.

    Attributes: *command* (a list; of a request: method and path), *returncode* (of a request: the
    HTTP status; None: no answer), *stderr* (of a request: the engine's message), *reason*.
    """

    def __init__(
        self, command: Sequence[str], returncode: Optional[int], stderr: str, reason: str = ''
    ) -> None:
        self.command, self.returncode, self.stderr = list(command), returncode, stderr
        self.reason = reason or _find_reason(stderr)

    def __str__(self) -> str:
        kind = 'status' if self.command[0].isupper() else 'exit code'
        code = '' if self.returncode is None else f'{kind} {self.returncode}: '
        words = [re.sub('(.{80}).+', r'\1...', _one_line(word)) for word in self.command]
        return _one_line(f'{_quote(words)}: {code}{self.reason[:500]}')


class _Cancelled(Exception):
    """The flag was lowered while a command or a request was under way."""


def _find_reason(stderr: str) -> str:
    """Return the last line that says something; some commands close with general advice."""
    for line in reversed(stderr.splitlines()):
        if not re.match(r"\s*($|See '|Run '|Encountered errors)", line):
            return line.strip()
    return 'no reason given'


def _one_line(text: str) -> str:
    return re.sub(r'[\x00-\x1f\x7f]+', ' ', re.sub(r'\b([0-9a-f]{12})[0-9a-f]{52}\b', r'\1', text))


def _quote(command: Iterable[str]) -> str:
    return _one_line(' '.join(map(shlex.quote, command)))


def _warn(text: str) -> None:
    """Log and issue a ComposeWarning: each time, not once per text; -W error does not raise it."""
    logger.warning(_one_line(text))
    with suppress(ComposeWarning):
        warnings.warn_explicit(_one_line(text), ComposeWarning, __file__, 0, registry=None)


# -- output ----------------------------------------------------------------------------------------
class _Outlet:
    """A stream for which nobody waits: what is not read in time is dropped, and that is said."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.dropped, self.thread = stream, 0, threading.Thread()

    def write(self, text: Any) -> None:
        """Have a text, or bytes, written soon."""
        if not self.thread.is_alive():  # not begun yet, closed before, or lost in a fork
            self.queue: Any = queue.Queue(1000)
            self.thread = threading.Thread(target=self._pump, daemon=True)
            self.thread.start()
        chunk = text.encode('utf-8', 'replace') if isinstance(text, str) else text
        try:
            self.queue.put_nowait(chunk)
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Wait a moment until all is written."""
        self.write(b'')
        self.thread.join(1)

    def _pump(self) -> None:
        while True:
            chunk = self.queue.get()
            self._put(chunk)
            if self.dropped and self.queue.empty():
                self._put(b'%d lines were dropped: nobody read them\n' % self.dropped)
                self.dropped = 0
            if not chunk:  # the end
                return

    def _put(self, chunk: bytes) -> None:
        # A full disk, a closed stream, or none, is no matter.
        with suppress(OSError, ValueError, AttributeError):
            try:
                number = self.stream.fileno()  # past its buffer, whose lock would hold up the exit
                poll = select.poll()
                poll.register(number, select.POLLOUT)
                while chunk:
                    poll.poll()  # it may be one that does not block
                    chunk = chunk[os.write(number, chunk) :]
            except (ValueError, AttributeError):  # it has no descriptor
                self.stream.write(chunk.decode('utf-8', 'replace'))


# -- settings --------------------------------------------------------------------------------------
class Watcher(Enum):
    """Where the watcher runs."""

    THREAD = 'thread'
    PROCESS = 'process'


class Prune(Enum):
    """What is deleted at the end."""

    PROJECT = 'project'
    SYSTEM = 'system'
    NONE = 'none'


class Unhealthy(Enum):
    """What is done with a container whose health check fails."""

    RESTART = 'restart'
    IGNORE = 'ignore'


class OnExit(Enum):
    """What becomes of the containers when the watchdog ends."""

    STOP = 'stop'
    LEAVE = 'leave'


class Mode(Enum):
    """What runs the containers."""

    COMPOSE = 'compose'
    SWARM = 'swarm'


def _parse_files(value: Any) -> Tuple[str, ...]:
    if isinstance(value, str):
        value = value.split(os.pathsep)
    names = [value] if isinstance(value, os.PathLike) else value
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


_parse_positive = partial(_parse_seconds, least=sys.float_info.min)


def _parse_signal(value: Any) -> int:
    if isinstance(value, str) and not value.strip().isdigit():
        value = signal.Signals['SIG' + re.sub('^SIG', '', value.strip().upper())]
    number = signal.Signals(int(value))
    if number in (signal.SIGKILL, signal.SIGSTOP):
        raise ValueError
    return int(number)


def _parse_command(value: Any) -> Tuple[str, ...]:
    command = tuple(shlex.split(value) if isinstance(value, str) else value)
    if not ''.join(command):
        raise ValueError
    return command


class _Option(NamedTuple):
    usage: str  # on the command line
    parse: Callable[[Any], Any]
    accepted: str
    help: str


_OPTIONS = {  # by field; the variable is BROAPT_ and the field's name
    'docker_compose': _Option(
        '--file -f --docker-compose FILE',
        _parse_files,
        'a readable file',
        'Compose file, repeatable; in the variable joined by os.pathsep; default: Compose finds it',
    ),
    'interval': _Option(
        '--interval -i SECONDS',
        _parse_positive,
        'a number of seconds greater than 0',
        'longest time between two full checks',
    ),
    'kill_signal': _Option(
        '--signal -s SIGNAL',
        _parse_signal,
        'a signal such as 15, TERM or SIGTERM, other than KILL and STOP',
        'what ends the host',
    ),
    'watcher': _Option(
        '--watcher -w KIND',
        Watcher,
        'thread or process',
        'where the watcher runs: thread or process',
    ),
    'settle': _Option(
        '--settle SECONDS',
        _parse_seconds,
        'a number of seconds, 0 or more',
        'how long what was done by hand must last before it is undone; a crash waits for nothing',
    ),
    'timeout': _Option(
        '--timeout SECONDS',
        _parse_positive,
        'a number of seconds greater than 0',
        'deadline of one request to the engine or one Compose command',
    ),
    'prune': _Option(
        '--prune WHAT',
        Prune,
        'project, system or none',
        'what to delete at the end: project, system (all that is unused, whosever it is) or none',
    ),
    'unhealthy': _Option(
        '--unhealthy WHAT',
        Unhealthy,
        'restart or ignore',
        'restart or ignore a container whose health check fails',
    ),
    'on_exit': _Option(
        '--on-exit WHAT',
        OnExit,
        'stop or leave',
        'stop the containers at the end, or leave them running for the next watchdog',
    ),
    'mode': _Option(
        '--mode WHAT',
        Mode,
        'compose or swarm',
        'run the stack by Compose on one machine, or by a Swarm on several',
    ),
    'compose_command': _Option(
        '--compose-command CMD',
        _parse_command,
        'a command as in a shell',
        'the Compose command; default: docker compose, or docker-compose where docker has none',
    ),
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
    on_exit: OnExit = OnExit.STOP
    mode: Mode = Mode.COMPOSE
    compose_command: Tuple[str, ...] = ()  # none: `docker compose`, or what stands in for it

    @classmethod
    def load(cls, **given: Any) -> 'Settings':
        """Return the settings: from *given*, else BroAPT's const, the environment, the defaults.

        Strings are parsed as on the command line; None, and an empty variable, count as not given.
        Raises ValueError: one line naming the setting, its value, and what is accepted.
        """
        values, const = {}, _find_const()
        for field, option in _OPTIONS.items():
            name = field.upper()
            sources = {
                option.usage.split()[0]: given.pop(field, None),
                f'const.{name}': getattr(const, name, None) if field in cls._fields[:3] else None,
                f'BROAPT_{name}': os.environ.get(f'BROAPT_{name}') or None,
            }
            for source, value in sources.items():
                if value is not None:
                    values[field] = _parse_value(source, value, option)
                    break
        return cls(**values, **given)


def _parse_value(source: str, value: Any, option: _Option) -> Any:
    try:
        return option.parse(value)
    except (OSError, OverflowError, *_MISREAD) as error:
        why = f' ({error.filename}: {error.strerror})' if isinstance(error, OSError) else ''
        raise ValueError(_one_line(f'{source}: {value!r} is not {option.accepted}{why}')) from None


def _find_const() -> Any:
    """Return BroAPT's const: what the host has loaded, or lies beside this copy; or None."""
    name = re.sub('[^.]+$', 'const', __name__)
    beside = os.path.join(os.path.dirname(__file__), 'const.py')
    if __name__ == '__main__' or not (name in sys.modules or os.path.isfile(beside)):
        return None
    const = importlib.import_module(name)
    return const if hasattr(const, 'KILL_SIGNAL') or hasattr(const, 'DOCKER_COMPOSE') else None


# -- the flag --------------------------------------------------------------------------------------
_Waiting = Tuple[Any, List[Callable[[], Any]]]  # a lock, and what is called at the lowering


class UpFlag(threading.Event):
    """A flag that is up while the stack shall run; lowering it ends at once all that waits for it.

    In a process forked from the one where something waits for it, it is a flag and nothing more.
    """

    def __init__(self) -> None:
        super().__init__()
        self._waiting: Dict[int, _Waiting] = {}  # by process id
        self.set()

    def _get_own(self) -> _Waiting:
        """Return this process's lock and callbacks; a fork has none of its parent's."""
        return self._waiting.setdefault(os.getpid(), (threading.RLock(), []))

    def clear(self) -> None:
        """Lower the flag."""
        super().clear()
        guard, callbacks = self._get_own()
        with guard:
            for callback in callbacks:
                callback()

    @property
    def value(self) -> bool:
        """Whether the flag is up."""
        return self.is_set()

    @value.setter
    def value(self, up: bool) -> None:
        """Raise or lower it."""
        if up:
            self.set()
        else:
            self.clear()

    def check(self) -> None:
        """Raise _Cancelled if the flag is down."""
        if not self.is_set():
            raise _Cancelled

    @contextmanager
    def when_lowered(self, callback: Callable[[], Any]) -> Iterator[None]:
        """During the block, call *callback* when the flag is lowered; at once if it is down."""
        guard, callbacks = self._get_own()
        with guard:
            callbacks.append(callback)
            if not self.is_set():
                callback()
        try:
            yield
        finally:
            with guard:
                callbacks.remove(callback)


UP_FLAG = UpFlag()


# -- processes -------------------------------------------------------------------------------------
_Show = Optional[Callable[[bytes], Any]]  # gets what a command writes, as it comes
# Bytes that a command writes; of more, the end is kept.
_OUTPUT_LIMIT, _ERROR_LIMIT = 1 << 22, 1 << 16
# The shell kills the command's process group once our end of the socket is closed, by us or by our
# death, and tells the exit code, which waitpid() doesn't where SIGCHLD is ignored or others reap.
_GUARD = 'exec 3<&0; (read -r _ <&3; kill -9 0) >/dev/null 2>&1 & "$@" <{} 3<&-; echo $? >&3'


class _Place(NamedTuple):
    """Where commands run."""

    folder: str  # stays, whatever the host does with its own
    environment: Dict[str, str]  # on top of the host's; what pins Compose to the engine is added

    def get_environment(self) -> Dict[str, str]:
        """Return the whole environment."""
        whole = {**os.environ, **self.environment}
        if getattr(sys, 'frozen', False):  # PyInstaller's library path is not for Docker
            whole.pop('LD_LIBRARY_PATH', None)
            if 'LD_LIBRARY_PATH_ORIG' in whole:
                whole['LD_LIBRARY_PATH'] = whole['LD_LIBRARY_PATH_ORIG']
        return whole


def _explain(error: Exception) -> str:
    """Return why something failed, in one phrase."""
    return getattr(error, 'strerror', '') or str(error)


def _count_down(limit: float) -> Iterator[float]:
    """Give how long to wait next, until *limit* seconds are over; being stopped doesn't count.

    In steps, and once more at the end: who was stopped while he waited has to look again, for
    meanwhile data may have come.
    """
    longest = min(1.0, limit / 8)
    while limit > 0:
        step, began = min(limit, longest), time.monotonic()
        yield step
        limit -= min(step, time.monotonic() - began)
    yield 0.001


def _cut(sock: socket.socket) -> None:
    """Wake whoever waits at either end: nothing more will come."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


class _Process:
    """A command in a session of its own, so that Ctrl+C in the terminal does not reach it."""

    def __init__(
        self, command: Sequence[str], place: _Place, peer: Optional[socket.socket] = None
    ) -> None:
        """Start it; *peer* becomes its standard input and output. Raises OSError, ValueError."""
        logger.debug(f'running {_quote(command)}')
        guard = _GUARD.format('&1' if peer else '/dev/null')
        self.lifeline, theirs = socket.socketpair()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # till it has its session
        try:
            with theirs:
                self.popen = subprocess.Popen(
                    ['/bin/sh', '-c', guard, 'sh', *command],
                    cwd=place.folder if os.path.isdir(place.folder) else '/',  # it may be gone
                    env=place.get_environment(),
                    start_new_session=True,
                    stdin=theirs.fileno(),
                    stdout=peer.fileno() if peer else subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
        except (OSError, ValueError):
            self.lifeline.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def kill(self) -> None:
        """Kill it with its whole group."""
        _cut(self.lifeline)

    def close(self) -> None:
        """Kill what is left of it, and free what it holds."""
        self.kill()
        for end in (self.lifeline, self.popen.stdout, self.popen.stderr):
            if end:
                end.close()
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(1)

    def read(self, limit: float, show: _Show = None) -> Tuple[Optional[int], str, str]:
        """Return exit code (None: none in *limit* seconds), output, errors; *show* gets these."""
        code, output, errors = bytearray(), bytearray(), bytearray()
        ends: Any = {self.lifeline: code, self.popen.stdout: output, self.popen.stderr: errors}
        with selectors.DefaultSelector() as selector:
            for end in filter(None, ends):
                selector.register(end, selectors.EVENT_READ, ends[end])
            for step in _count_down(limit):
                # Once it has ended, all is there; something that it left behind may hold its pipes.
                ended = self.lifeline not in selector.get_map() or self.popen.poll() is not None
                ready = selector.select(0 if ended else step)
                if ended and not ready:
                    break
                for key, _ in ready:
                    chunk = os.read(key.fd, 1 << 16)
                    if not chunk or key.data is code:
                        selector.unregister(key.fileobj)
                    elif show:
                        show(chunk)
                    key.data.extend(chunk)
                    del key.data[: -_OUTPUT_LIMIT if key.data is output else -_ERROR_LIMIT]
        return (
            int(code or b'137') if code or ended else None,  # 137: somebody has killed the shell
            output.decode('utf-8', 'replace'),
            errors.decode('utf-8', 'replace'),
        )


def _run(
    command: Sequence[str],
    limit: float,
    place: _Place,
    flag: UpFlag,
    show: _Show = None,
) -> str:
    """Return what *command* wrote to standard output.

    Raises ComposeError if it can't be started, fails, or lasts longer than *limit* seconds;
    _Cancelled if *flag* is lowered.
    """
    flag.check()
    try:
        with closing(_Process(command, place)) as process:
            with flag.when_lowered(process.kill):
                code, output, errors = process.read(limit, show)
    except (OSError, ValueError) as error:
        raise ComposeError(command, None, '', _explain(error)) from None
    flag.check()
    if code != 0:
        raise ComposeError(command, code, errors, '' if code else f'no answer within {limit:g} s')
    return output


# -- the engine ------------------------------------------------------------------------------------
class _Socket(socket.socket):
    """A socket with one deadline for all that it receives."""

    steps: Iterable[Optional[float]]  # how long to wait next
    dialer: Optional[_Process] = None  # what connects it with the engine

    def recv_into(self, *arguments: Any) -> int:
        """Receive as usual; raises socket.timeout when no time is left."""
        for step in self.steps:
            self.settimeout(step)
            with suppress(socket.timeout):
                return super().recv_into(*arguments)
        raise socket.timeout

    def is_idle(self) -> bool:
        """Tell whether the other end keeps the connection and has nothing to say."""
        poll = select.poll()
        poll.register(self, select.POLLIN)
        return not poll.poll(0)

    def release(self) -> None:
        """Close it, and end what connects it."""
        self.close()
        if self.dialer:
            self.dialer.close()


class _Engine:
    """The engine's HTTP API: on a unix socket a connection for each request, else kept ones."""

    def __init__(
        self, endpoint: str, limit: float, dial: Callable[[socket.socket], _Process]
    ) -> None:
        """*limit*: seconds for a request; *dial* starts what connects with any other endpoint."""
        self.path = endpoint.partition('unix://')[2]
        self.limit, self.dial = limit, dial
        self.flag = UpFlag()  # requests are cancelled when it is lowered
        # Elsewhere each connection may be a login: few at once, and the slow ones hold up no look.
        self.turns = [threading.Semaphore(64 if self.path else 4) for _ in range(2)]
        self.kept: List[_Socket] = []
        self.stream: Optional[_Socket] = None  # the one that events come from
        self.date = ''  # the engine's clock, as told last

    def request(
        self, method: str, path: str, limit: float = 0.0, absent: Sequence[int] = (), **query: Any
    ) -> Any:
        """Return what the engine answers within *limit* seconds (0: its own limit), read from JSON.

        Raises ComposeError for no or half an answer and for an error, except for those that are
        *absent*: None is returned for them. _Cancelled if the flag is lowered.
        """
        turn = self.turns[method == 'GET']
        with turn, self.ask(method, path, query, limit) as (_, answer):
            body = answer.read().decode('utf-8', 'replace')
            self.date = answer.getheader('Date', self.date)
            content = json.loads(body) if body.strip() and answer.status < 400 else None
        if answer.status >= 400 and answer.status not in absent:
            raise ComposeError((method, path), answer.status, _read_message(body))
        return content

    def follow(self, **query: Any) -> Iterator[Any]:
        """Give None once the stream is open, then each event until the end, or that of the flag."""
        with self.ask('GET', '/events', query) as (sock, answer):
            sock.steps, self.stream = [None], sock
            yield None
            for line in answer:
                yield json.loads(line)

    def get_time(self) -> float:
        """Return the engine's clock at its last answer, in seconds since 1970."""
        import email.utils

        if not self.date:
            self.request('GET', '/version')
        return email.utils.parsedate_to_datetime(self.date).timestamp()

    def close(self) -> None:
        """End the connections that are kept."""
        while self.kept:
            self.kept.pop().release()

    def cut_stream(self) -> None:
        """End the stream of events: it has missed one."""
        if self.stream:
            _cut(self.stream)

    @contextmanager
    def ask(
        self, method: str, path: str, query: Mapping[str, Any], limit: float = 0.0
    ) -> Iterator[Any]:
        """Give the connection and the answer. Whatever goes wrong with them is a ComposeError."""
        import http.client
        import urllib.parse

        self.flag.check()
        limit = limit or self.limit
        connection = http.client.HTTPConnection('localhost')
        sock: Optional[_Socket] = None  # as long as it is for us to release
        try:
            sock = connection.sock = self._connect()
            sock.steps = _count_down(limit)
            with self.flag.when_lowered(partial(_cut, sock)):
                connection.request(method, f'{path}?{urllib.parse.urlencode(query)}')
                answer = connection.getresponse()
                yield sock, answer
            if not self.path and answer.isclosed() and not answer.will_close:
                self.kept.append(sock)
                sock = None
        except (OSError, ValueError, http.client.HTTPException) as error:
            self.flag.check()
            reason = _find_trouble(error, sock, limit)
            raise ComposeError((method, path), None, '', reason) from None
        finally:
            if sock:
                sock.release()

    def _connect(self) -> _Socket:
        """Return a connection that is open, as far as can be told."""
        while self.kept:
            with suppress(IndexError):  # another thread was faster
                sock = self.kept.pop()
                if sock.is_idle():
                    return sock
                sock.release()
        if self.path:
            sock = _Socket(socket.AF_UNIX)
            try:
                sock.settimeout(self.limit)
                sock.connect(self.path)
            except OSError:
                sock.close()
                raise
        else:
            ours, theirs = socket.socketpair()
            with theirs:
                sock = _Socket(socket.AF_UNIX, fileno=ours.detach())
                sock.dialer = self.dial(theirs)
        return sock


def _read_message(body: str) -> str:
    """Return what the engine says in an answer that is an error."""
    try:
        return str(json.loads(body)['message'])
    except _MISREAD:
        return body


def _find_trouble(error: Exception, sock: Optional[_Socket], limit: float) -> str:
    """Return why there was no answer, in one phrase; what should have connected us knows best."""
    if isinstance(error, socket.timeout):
        return f'no answer within {limit:g} s'
    if isinstance(error, ValueError):
        return f'its answer is not understood: {error}'
    if sock and sock.dialer:
        told = sock.dialer.read(0.1)[2]
        if told.strip():
            return _find_reason(told)
    return _explain(error)


# -- records ---------------------------------------------------------------------------------------
Facts = Mapping[str, Any]  # what Docker or Compose tells of one thing


class State(Enum):
    """Of a container, in Docker's words; or of a service on a swarm."""

    CREATED = 'created'
    RUNNING = 'running'
    PAUSED = 'paused'
    RESTARTING = 'restarting'
    REMOVING = 'removing'
    EXITED = 'exited'
    DEAD = 'dead'
    SHORT = 'left to Swarm'  # a service that lacks replicas

    @property
    def alive(self) -> bool:
        """Whether it has processes, or will soon have some again."""
        return self in (State.RUNNING, State.PAUSED, State.RESTARTING)


_PODMAN_STATES = {'stopped': 'exited', 'stopping': 'removing', 'initialized': 'created'}


class Container(NamedTuple):
    """One container of the project, as one look showed it."""

    id: str
    name: str
    service: str
    number: str  # which of the service's; a replacement bears the number of what it replaces
    state: State
    exit_code: Optional[int] = None  # None while it has not ended
    note: str = ''  # why it ended or could not start, as far as the engine knows
    health: str = ''  # 'starting', 'healthy', 'unhealthy'; '' without a health check
    since: float = 0.0  # when it came into this state, in seconds since 1970 by the engine's clock
    grace: float = _DEFAULT_GRACE  # seconds that it has to stop
    networks: Mapping[str, str] = {}  # name -> id; name -> name if it was never connected
    owners: Mapping[str, str] = {}  # id or name of a container -> its namespace that this shares
    lost: str = ''  # what it was made for and is gone, so that it can never start again
    left: str = ''  # why it is left alone; '': it is not
    folder: str = ''  # of the Compose file that made it

    @property
    def label(self) -> str:
        """The service's name, with the number where it is not the first."""
        return self.service if self.number in ('', '1') else f'{self.service}-{self.number}'

    @property
    def condition(self) -> str:
        """The state in words, such as 'exited (137, out of memory)' or 'unhealthy'."""
        if self.state is State.RUNNING and self.health == 'unhealthy':
            return 'unhealthy'
        told = [str(word) for word in (self.exit_code, self.note) if word not in (None, '')]
        return f'{self.state.value} ({", ".join(told)})' if told else self.state.value


class Service(NamedTuple):
    """One service of the Compose file."""

    scale: int = 1  # how many containers it shall have
    left: str = ''  # why it is left alone; '': it is not
    owners: Tuple[str, ...] = ()  # the services whose network, pid or ipc it shares
    depends_on: Mapping[str, str] = {}  # service -> condition
    optional: Tuple[str, ...] = ()  # those of them that it can do without
    provided: bool = False  # by something else than containers


_MODES = {'network': 'NetworkMode', 'pid': 'PidMode', 'ipc': 'IpcMode'}
Containers = Sequence[Container]
Services = Mapping[str, Service]
Holds = Dict[str, float]  # service -> when its hold ends, in seconds since 1970


def _read_container(entry: Facts, details: Facts) -> Container:
    """Return a container as the engine's list and its answer to inspect (may be empty) show it."""
    labels, names = entry['Labels'], entry['Names'] or [entry['Id']]
    found = details.get('State', {})
    word = found.get('Status', entry['State'])
    state = State(_PODMAN_STATES.get(word, word))
    ended = state not in (State.CREATED, State.RUNNING, State.PAUSED)
    # The list of podman lacks this, and its time to stop is always 0.
    config = details.get('Config', {}) if 'HostConfig' in entry else {}
    host = details.get('HostConfig', entry.get('HostConfig', {}))
    owners = {host.get(key, '').partition('container:')[2]: kind for kind, key in _MODES.items()}
    owners.pop('', None)
    networks = entry['NetworkSettings']['Networks'] or {}
    return Container(
        id=entry['Id'],
        name=min(names, key=lambda name: name.count('/')).lstrip('/'),  # not the alias of a link
        service=labels['com.docker.compose.service'],
        number=labels.get('com.docker.compose.container-number', ''),
        state=state,
        exit_code=_read_code(found, entry['Status']) if ended else None,
        note='out of memory' if found.get('OOMKilled') else found.get('Error', ''),
        health=_read_health(found.get('Health') or {}) if state.alive else '',
        since=_read_time(found.get('StartedAt' if state.alive else 'FinishedAt', '')),
        grace=float(config.get('StopTimeout', _DEFAULT_GRACE)),
        networks={name: network.get('NetworkID') or name for name, network in networks.items()},
        owners=owners,
        left=_read_left(labels),
        folder=labels.get('com.docker.compose.project.working_dir', ''),
    )


def _read_code(found: Facts, status: str) -> Any:
    """Return an exit code, by the list if inspect had no answer."""
    listed = re.match(r'Exited \((\d+)', status)
    return found.get('ExitCode', int(listed[1]) if listed else None)


def _read_left(labels: Facts) -> str:
    """Return why a container, or a service, with these labels is left alone; '': it is not."""
    watched = str(labels.get('broapt.watch')).lower() != 'false'
    return '' if watched else 'labelled broapt.watch=false'


def _read_health(health: Facts) -> str:
    status = str(health.get('Status', ''))
    if status == 'unhealthy' and not health.get('FailingStreak'):
        return 'starting'  # what Docker calls unhealthy from a pause until the next probe
    return '' if status == 'none' else status


def _read_time(text: str) -> float:
    """Return the seconds since 1970 of a time such as 2026-11-25T13:41:31.967303858Z."""
    found = re.fullmatch(r'(.{19})(\.\d+)?(Z|.{6})', text)
    if not found:
        return 0.0
    second, fraction, zone = found.groups('0')
    zone = zone.replace('Z', '+0000').replace(':', '')  # as Python 3.6 wants it
    moment = datetime.datetime.strptime(second + zone, '%Y-%m-%dT%H:%M:%S%z')
    return max(0.0, moment.timestamp()) + float(fraction)


def _read_services(config: Facts, project: str, profiles: Optional[Set[str]]) -> Dict[str, Service]:
    """Return the services that `compose config` printed.

    *profiles*: those of 1.x that are on, since it prints what is off, too.
    """
    declared = config['services'].items()
    names = {}
    for name, own in declared:
        names[f'service:{name}'] = name
        names['container:' + own.get('container_name', f'{project}-{name}-1')] = name
    return {name: _read_service(own, names, profiles) for name, own in declared}


def _read_service(own: Facts, names: Mapping[str, str], profiles: Optional[Set[str]]) -> Service:
    """Return a service; *names*: what a mode may say, such as service:x -> that service."""
    provided = 'provider' in own
    off = profiles is not None and 'profiles' in own and profiles.isdisjoint(own['profiles'])
    scale = own.get('scale', own.get('deploy', {}).get('replicas', 1))
    modes = [own.get(key, '') for key in ('network_mode', 'pid', 'ipc')]
    needs = own.get('depends_on', {})
    return Service(
        scale=0 if off or provided else int(scale),
        left=_read_left(own.get('labels', {})),
        owners=tuple(names[mode] for mode in modes if mode in names),
        depends_on={name: how.get('condition', '') for name, how in needs.items()},
        optional=tuple(name for name, how in needs.items() if not how.get('required', True)),
        provided=provided,
    )


_YAML_LINE = re.compile(r'( *)(?:- (.+)|(\'.*?\'|".*?"|[^\s\'"-].*?):(?: (.*))?)')


def _parse_yaml(text: str) -> Facts:
    """Return the mappings that `docker-compose config` of 1.x printed, its lists as keys of one.

    The YAML is in canonical form, two spaces a level. What is indented below a scalar is its text.
    """
    root: Dict[str, Any] = {}
    levels = [root]  # the mappings that are open, from the outermost on
    text = re.sub(r'(?m)^( *)\? (.+)\n\1: ', r'\1\2:\n\1  ', text)  # how long keys are printed
    for found in filter(None, map(_YAML_LINE.fullmatch, text.splitlines())):
        indent, item, key, value = found.groups()
        depth = len(indent) // 2 + bool(item)
        if depth < len(levels):
            del levels[depth + 1 :]
            entry: Any = {} if value in (None, '', '{}') else value.strip('\'"')
            levels[depth][(item or key).strip('\'"')] = entry
            if entry == {}:
                levels.append(entry)
    return root


# -- decide ----------------------------------------------------------------------------------------
class Verb(Enum):
    """What is done about a fault, in the word that the log has for it when it is done."""

    LEAVE = 'left alone'
    UNPAUSE = 'unpaused'
    START = 'started'
    RESTART = 'restarted'
    REMOVE = 'removed'
    CREATE = 'created'
    UP = 'brought up'
    RECREATE = 'created anew'


# What Compose does. --no-deps: what a service depends on is watched itself, and `up` would run
# finished one-shots again.
_UP = {
    Verb.CREATE: ('--no-recreate', '--no-deps'),
    Verb.UP: ('--no-deps',),
    Verb.RECREATE: ('--force-recreate', '--no-deps'),  # it keeps the anonymous volumes
}


class Streak(NamedTuple):
    """Repairs that followed each other. Times are seconds of a monotonic clock."""

    repairs: int = 0
    began: float = 0.0  # when the first fault was seen
    ended: float = -math.inf  # end of the last repair
    ill: bool = False  # the last one was for its health: only being healthy ends the streak
    error: str = ''  # why the last one failed
    failures: int = 0  # in a row, with this error


class Action(NamedTuple):
    """What is done about one container, or a service's missing ones, now or later, or why nothing.

    A fault is found with the verb that would mend it; whether, and when, is decided after that.
    """

    verb: Verb
    service: str
    container: Optional[Container]  # None where some are missing
    cause: str
    why: str = ''  # it is left alone
    wanted: bool = True  # that it be otherwise; False: it is well, or we were told to leave it
    since: float = 0.0  # when the fault was first seen
    due: float = math.inf
    streak: Streak = Streak()  # the repairs before this one

    @property
    def key(self) -> str:
        """What its repairs count for: this container, or the service's missing ones."""
        return self.container.id if self.container else self.service

    @property
    def plan(self) -> str:
        """What will be done, or why nothing is."""
        return self.why if self.verb is Verb.LEAVE else f'will be {self.verb.value}'

    @property
    def touched(self) -> List[str]:
        """The id, or the service, that nothing else may be done to meanwhile."""
        return [self.key, self.service] if self.verb in _UP else [self.key]

    @property
    def label(self) -> str:
        """What the log calls it."""
        return self.container.label if self.container else self.service

    def __str__(self) -> str:
        return f'{self.label}: {self.cause}'


Actions = Sequence[Action]


class History(NamedTuple):
    """What decide() needs to know of the past."""

    seen: Mapping[Tuple[Verb, str], float] = {}  # when a fault that waits was first seen
    streaks: Mapping[str, Streak] = {}  # by Action.key
    crashed: Iterable[str] = ()  # ids of containers whose process ended by itself
    ending: Iterable[str] = ()  # ids of those that somebody is stopping


def decide(
    containers: Containers, services: Services, now: float, history: History, settings: Settings
) -> Actions:
    """Return what is done about each container, and about each service that lacks some. Pure.

    *containers*: newest first; *now*: seconds of a monotonic clock.
    """
    own = [c for c in containers if c.service in services]
    judged = [_judge(container, own, services) for container in containers]
    counted = [_count(name, own, services) for name in services]
    actions = filter(None, (*judged, *counted))
    return [_schedule(action, now, history, settings) for action in actions]


def _judge(container: Container, own: Containers, services: Services) -> Action:
    """Return what would mend a container, by the table of the contract."""
    name, state, cause = container.service, container.state, container.condition
    service = services.get(name, Service(scale=0))
    left = container.left or service.left
    well = Action(Verb.LEAVE, name, container, cause, left, wanted=False)
    if left or not service.scale or _is_done(container, services):
        return well
    verb, why, ill = Verb.START, '', cause == 'unhealthy'
    obstacle, renewal = _judge_owners(container, own, services)
    if state is State.PAUSED:
        verb = Verb.UNPAUSE
    elif state is State.DEAD:
        verb = Verb.REMOVE
    elif state in (State.RESTARTING, State.REMOVING):
        why = 'Docker is at it'
    elif (ill or state is not State.RUNNING) and _is_being_replaced(container, own):
        why = 'left over from an interrupted recreate: it will not be touched'
    elif container.lost:
        alone = [c.service for c in own].count(name) == 1
        verb = Verb.RECREATE if alone else Verb.REMOVE  # siblings would be created anew, too
        cause, why = f'{container.lost} is gone', _find_obstacle(name, own, services)
    elif obstacle or state is not State.RUNNING:
        why = obstacle or (_find_obstacle(name, own, services) if state is State.CREATED else '')
    elif renewal or ill:
        verb, cause = Verb.RESTART, renewal or cause
    else:
        return well
    return Action(verb, name, container, cause, why)


def _is_being_replaced(container: Container, own: Containers) -> bool:
    """Tell whether somebody replaces the container, or by it another one.

    During an `up --force-recreate`, two bear one number: Compose 2.x creates the new one beside the
    old one running, 1.29 beside the old one stopped. So only the newest is touched, and not while
    an older one runs.
    """
    twins = [c for c in own if (c.service, c.number) == (container.service, container.number)]
    return twins[0] is not container or any(c.state.alive for c in twins[1:])


def _judge_owners(container: Container, own: Containers, services: Services) -> Tuple[str, str]:
    """Return what hinders a container that shares a namespace, and what makes it useless; or ''."""
    obstacle = renewal = ''
    for owner in own if container.owners else ():
        kind = container.owners.get(owner.id) or container.owners.get(owner.name)
        if kind and owner.state not in (State.RUNNING, State.PAUSED):
            obstacle = f"its {kind}'s owner is not running"
            if services[owner.service].left or owner.left:
                obstacle += ' and not watched'
        elif kind and owner.since > container.since > 0:
            renewal = f'its {kind} is gone: {owner.label} was started after it'
    return obstacle, renewal


def _is_done(container: Container, services: Services) -> bool:
    if container.exit_code != 0:
        return False
    wanted = [service.depends_on.get(container.service) for service in services.values()]
    return 'service_completed_successfully' in wanted


def _count(name: str, own: Containers, services: Services) -> Optional[Action]:
    """Return what is wrong with the number of a service's containers; None: nothing."""
    scale, left = services[name].scale, services[name].left
    missing = scale - len({c.number for c in own if c.service == name})
    if missing <= 0:
        return None
    cause = 'missing' if scale == 1 else f'{missing} of {scale} missing'
    why = left or _find_obstacle(name, own, services)
    return Action(Verb.CREATE, name, None, cause, why, wanted=not left)


def _find_obstacle(name: str, own: Containers, services: Services) -> str:
    """Return what a service waits for before its first start, as far as that is watched; or ''.

    That something is merely started first is left to Compose; for the rest it would wait, and hold
    up all others.
    """
    completed = {c.service for c in own if c.exit_code == 0}
    healthy = {c.service for c in own if c.health == 'healthy'}
    running = {c.service for c in own if c.state is State.RUNNING}
    for other, condition in services[name].depends_on.items():
        if other in services[name].optional or other not in services:
            continue
        if services[other].left or not services[other].scale:
            continue
        if condition == 'service_completed_successfully' and other not in completed:
            return f'waits for {other} to complete'
        if condition == 'service_healthy' and other not in healthy:
            return f'waits for {other} to be healthy'
    for owner in services[name].owners:
        if owner not in running:
            return f'waits for {owner} to run'
    return ''


def _schedule(action: Action, now: float, history: History, settings: Settings) -> Action:
    """Return the action with the time when it is due, or as left alone."""
    ill, why = action.cause == 'unhealthy', action.why
    if ill and settings.unhealthy is Unhealthy.IGNORE:
        why = why or 'told to ignore health'
    container = action.container
    made = container and container.state is State.CREATED  # by somebody who deploys
    if action.key in history.ending or made and history.ending:
        why = why or 'somebody is stopping a container'
    if why or action.verb is Verb.LEAVE:
        return action._replace(verb=Verb.LEAVE, why=why)
    since = history.seen.get((action.verb, action.key), now)
    streak = history.streaks.get(action.key, Streak())
    if since - streak.ended >= _STEADY and not streak.ill:  # over, or the first one
        streak = Streak(began=since)
    delay = min(2**streak.repairs // 2, _LONGEST_DELAY)  # 0, 1, 2, 4 ...
    # What shares the processes of another dies with it, whoever has ended that one.
    shares = container and 'pid' in container.owners.values()
    at_once = ill or action.key in history.crashed and not shares
    due = since + max(delay, 0.0 if at_once else settings.settle)
    return action._replace(since=since, due=due, streak=streak)


# -- the stack -------------------------------------------------------------------------------------
_PROJECT = 'com.docker.compose.project'
_FILES = 'com.docker.compose.project.config_files'
_SERVICE = 'com.docker.compose.service'
_ONE_OFF = 'com.docker.compose.oneoff'  # made by `compose run`
_HASH = 'com.docker.compose.config-hash'
_IMAGE = 'com.docker.compose.image'  # its id; 1.x counts it in with the hash


class _Task(threading.Thread):
    """A thread that keeps what its function raises."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        super().__init__(target=function, args=arguments, daemon=True)
        self.error: Optional[Exception] = None
        self.ended = threading.Event()

    def begin(self) -> '_Task':
        """Start it. Where no thread is to be had, the function is called in this one.

        So it is in Python 3.12 once the main thread has ended.
        """
        try:
            self.start()
        except RuntimeError:
            self.run()
        return self

    def run(self) -> None:
        """Call the function."""
        try:
            super().run()
        except Exception as error:
            self.error = error
        finally:
            self.ended.set()

    def wait(self, limit: float = math.inf) -> None:
        """Wait for its end, if a signal did not come before it could begin."""
        for step in _count_down(limit):
            if self.ended.wait(step) or self.ident is None:
                break

    def finish(self) -> None:
        """Wait for its end, and raise what it raised."""
        self.wait()
        if self.error:
            raise self.error


def _in_parallel(function: Callable[[Any], Any], items: Iterable[Any]) -> None:
    """Call the function for each item, side by side; when all have ended, raise the first error."""
    tasks = [_Task(function, item).begin() for item in items]
    for task in tasks:
        task.wait()
    for task in tasks:
        task.finish()


@contextmanager
def _going_on(how: str) -> Iterator[None]:
    """Log that something has failed, and how it goes on."""
    try:
        yield
    except ComposeError as error:
        logger.error(f'{error}; {how}')


class _Docker:
    """The two ways to Docker: the engine, and Compose as a command."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.command = settings.compose_command or ('docker', 'compose')
        at = self.command.index('compose') if 'compose' in self.command else 0
        self.docker = self.command[:at] or ('docker',)  # with the words that choose an engine
        try:
            folder = os.getcwd()
        except FileNotFoundError:  # somebody has removed it
            folder = '/'
        self.place = _Place(folder, {})
        self.home = os.path.dirname((*settings.docker_compose, folder + '/')[0])
        self.endpoint = ''
        self.legacy = False  # Compose 1.x
        self.flag = UpFlag()  # commands and requests are cancelled when it is lowered
        self._engine: Optional[_Engine] = None

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, '_engine': None, 'flag': None}  # each process has its own

    def close(self) -> None:
        """End the connections that are kept."""
        if self._engine:
            self._engine.close()

    @property
    def engine(self) -> _Engine:
        """The engine that the docker command would use, found once and pinned for Compose too."""
        if self._engine is None:
            self.endpoint = self.endpoint or self._find_endpoint()
            dial = partial(_Process, (*self.docker, 'system', 'dial-stdio'), self.place)
            self._engine = _Engine(self.endpoint, self.settings.timeout, dial)
        self._engine.flag = self.flag
        return self._engine

    def _find_endpoint(self) -> str:
        form = '{{.Name}} {{.Endpoints.docker.Host}}'
        _Task(importlib.import_module, 'http.client').begin()  # meanwhile: it takes as long
        try:
            told = self._call(*self.docker, 'context', 'inspect', '--format', form)
        except ComposeError as error:
            if error.returncode != 127:  # the shell's word for: no such command
                raise
            told = ''
        name, _, endpoint = told.strip().partition(' ')
        if not endpoint:  # no docker command, or podman's
            given = os.environ.get('DOCKER_HOST', '')
            endpoint = given if given.startswith('unix://') else 'unix:///var/run/docker.sock'
        if name == 'default' or endpoint.startswith('unix://'):
            self.place.environment['DOCKER_HOST'] = endpoint
        else:  # certificates or ssh belong to it
            self.place.environment['DOCKER_CONTEXT'] = name
        return endpoint

    def _call(self, *command: str, limit: float = 0.0, show: _Show = None) -> str:
        """Return what a command printed within *limit* seconds (0: the timeout)."""
        return _run(command, limit or self.settings.timeout, self.place, self.flag, show)

    def compose(self, *arguments: str, **options: Any) -> str:
        """Return what Compose printed; *options*: those of _call()."""
        files = [word for file in self.settings.docker_compose for word in ('--file', file)]
        return self._call(*self.command, *files, *arguments, **options)

    def read_config(self) -> Any:
        """Return what `compose config` says, having found out which Compose there is."""
        while not self.legacy:  # once more with another command, if that has turned out to be right
            command = self.command
            try:
                return json.loads(self.compose('config', '--format', 'json'))
            except (ComposeError, ValueError):  # 1.x exits with 0, having printed its usage
                self.legacy = self._is_legacy()
                if not self.legacy and self.command == command:
                    raise
        return _parse_yaml(self.compose('config'))

    def _is_legacy(self) -> bool:
        """Tell whether this is 1.x. If docker has no compose, docker-compose stands in for it."""
        try:
            version = self._call(*self.command, 'version')
        except ComposeError as error:
            absent = error.returncode == 127 or re.search(
                'is not a docker command|unknown command', error.stderr
            )
            if self.settings.compose_command or not absent:
                raise
            self.command = ('docker-compose',)
            version = self._call(*self.command, 'version')
        if not re.search(r'version v?1\.', version):
            return False
        api = self.engine.request('GET', '/version')['ApiVersion']
        if int(api.partition('.')[2]) > 44:  # a field that 1.x reads is gone since 1.45
            pinned = os.environ.get('COMPOSE_API_VERSION', '1.44')
            self.place.environment['COMPOSE_API_VERSION'] = pinned
        return True


class _Project(_Docker):
    """One Compose project: what is declared, what is there, and what shall be left alone."""

    def __init__(self, settings: Settings, notify: Callable[[str], Any] = str) -> None:
        super().__init__(settings)
        self.notify = notify  # takes messages for the service manager
        self.project = ''  # its name
        self.services: Dict[str, Service] = {}  # as declared when they were last read
        self.stamp: List[float] = []  # when the files had been written that were read
        self.files: List[str] = []  # what Compose has found, as its containers tell
        self.known: Dict[str, Container] = {}  # as seen last, by id
        self.copies: List[str] = []  # services of which somebody runs a copy
        self.images: Dict[str, Any] = {}  # id -> what tells a copy of a container
        self.hold_file, self.hold_trouble = os.path.join(self.home, '.broapt-hold'), ''

    def open(self) -> None:
        """Read the Compose files, and meanwhile find the engine."""
        _in_parallel(lambda job: job(), (self.read_services, lambda: self.engine.get_time()))

    # -- what is declared

    def read_services(self) -> None:
        """Read what the Compose files declare; should that fail later, go on by what they said."""
        self.stamp = self.get_stamp()
        try:
            self.project, self.services = self._read_project()
        except ComposeError as error:
            if not self.services:
                raise
            _warn(f'the Compose file cannot be read; going on by what it said before: {error}')

    def get_stamp(self) -> List[float]:
        """Return when each of the Compose files was last written."""
        times = []
        for file in self.settings.docker_compose or self.files:
            with suppress(OSError):
                times.append(os.path.getmtime(file))
        return times

    def _read_project(self) -> Tuple[str, Dict[str, Service]]:
        why = 'it names no services'
        try:
            config = self.read_config()
            project = config.get('name', self.project)
            profiles = None
            if self.legacy:
                profiles = set(os.environ.get('COMPOSE_PROFILES', '').split(','))
                profiles.update(re.findall('--profile[ =]([^ ]+)', ' '.join(self.command)))
            services = _read_services(config, project, profiles)
            if project:  # whatever becomes of it in the files
                self.place.environment['COMPOSE_PROJECT_NAME'] = project
            if services:
                return project, services
        except _MISREAD as error:
            why = f'its answer is not understood: {error!r}'
        raise ComposeError((*self.command, 'config'), 0, '', why)

    def find_project(self) -> None:
        """Learn the project's name from a container, where Compose doesn't tell it."""
        if self.legacy:
            ids = self.compose('ps', '--all', '--quiet').split()
            found = [entry for entry in self._list('/containers/json') if entry['Id'] in ids]
        else:  # its files can't be read
            home = os.fsencode(self.home).decode('utf-8', 'replace')
            found = self._list('/containers/json', f'{_PROJECT}.working_dir={home}')
        names = {entry['Labels'][_PROJECT] for entry in found}
        self.project = names.pop() if len(names) == 1 else ''

    # -- what is there

    def _list(self, path: str, *labels: str) -> Any:
        """Return the engine's list of what has these labels."""
        query = json.dumps({'label': labels})
        # all: also what does not run; status: of a swarm's services
        return self.engine.request('GET', path, all=1, filters=query, status='true')

    def observe(self, afresh: bool = True) -> Containers:
        """Return all containers of the project but one-offs, newest first. The only reader.

        *afresh*: nothing is known, for any may have changed in any way.
        """
        if afresh:
            self.known = {}
        if not self.project:
            self.find_project()
        try:
            return list(self._look()) if self.project else []
        except _MISREAD as error:
            path = ('GET', '/containers')
            raise ComposeError(path, None, '', f'its answer is not understood: {error!r}') from None

    def _look(self) -> Iterable[Container]:
        """Take one list, and inspect each container of which that may not tell enough."""
        # What has not all of these labels was not made by Compose; what it builds has some.
        labels = (f'{_PROJECT}={self.project}', f'{_ONE_OFF}=False', _SERVICE, _HASH)
        entries = self._list('/containers/json', *labels)
        entries.sort(key=lambda entry: -int(entry['Created']))
        copies = [e for e in entries if self._is_copy(e)]
        self.copies = [e['Labels'].get(_SERVICE) for e in copies]
        own = [e for e in entries if e not in copies]
        self.files = own[0]['Labels'].get(_FILES, '').split(',') if own else []
        _in_parallel(self._note, [e for e in own if self._is_stale(e)])
        containers = [self.known[e['Id']] for e in own if e['Id'] in self.known]
        self.known = {c.id: c for c in containers}
        there = self._find_there(containers, entries)
        return [c._replace(lost=_find_loss(c, there)) for c in containers]

    def _is_stale(self, entry: Facts) -> bool:
        """Tell whether more than the list must be asked about a container."""
        known = self.known.get(entry['Id'])
        if not known or not known.since:  # inspect had no answer
            return True
        listed_well = entry['State'] == 'running' and 'unhealthy' not in entry['Status']
        known_well = known.state is State.RUNNING and known.health in ('', 'healthy')
        if listed_well and known_well:
            return False
        return not entry['Status'].startswith(f'Exited ({known.exit_code})')

    def _is_copy(self, entry: Facts) -> bool:
        """Tell whether its labels come from an image that `docker commit` made of a container."""
        image = entry['ImageID']
        if image not in self.images:
            found = self.engine.request('GET', f'/images/{image}/json', absent=(404,)) or {}
            labels = (found.get('Config') or {}).get('Labels') or {}
            self.images[image] = _read_make(labels)
        return bool(self.images[image] == _read_make(entry['Labels']))

    def _note(self, entry: Facts) -> None:
        """Know a container as inspect shows it; else as the list does."""
        details = self._inspect(entry['Id'])
        if details is None:  # it has just been removed
            self.known.pop(entry['Id'], None)
        else:
            self.known[entry['Id']] = _read_container(entry, details)

    def _inspect(self, container: str) -> Any:
        """Return all about a container: None if it is gone, {} if the engine is busy with it."""
        path, limit = f'/containers/{container}/json', min(_INSPECT_LIMIT, self.settings.timeout)
        try:
            return self.engine.request('GET', path, limit, absent=(404,))
        except ComposeError as error:
            logger.debug(f'{error}')
            return {}

    def _find_there(self, containers: Containers, entries: Sequence[Facts]) -> Set[str]:
        """Return the ids and names of all that containers may be made for and is there."""
        there = {entry['Id'] for entry in entries}
        for entry in entries:
            there.update(name[1:] for name in entry['Names'] or ())
        if not all(c.state.alive or _is_done(c, self.services) for c in containers):
            for network in self._list('/networks'):
                there |= {network['Id'], network['Name']}
        others = {owner for c in containers for owner in c.owners} - there
        return there | {owner for owner in others if self._inspect(owner) is not None}

    def get_own(self, containers: Containers) -> Containers:
        """Return those of this folder: another one's stack may have the same project name."""
        home = os.path.realpath(os.fsencode(self.home))  # bytes: the locale may be ASCII
        here = [
            c for c in containers if os.path.realpath(c.folder.encode('utf-8', 'replace')) == home
        ]
        return here or [c for c in containers if c.service in self.services or not self.services]

    # -- what somebody wants to be left alone

    def read_holds(self) -> Holds:
        """Return until when which service is on hold, in seconds since 1970."""
        holds, trouble, now = {}, '', time.time()
        try:
            with open(self.hold_file, encoding='utf-8', opener=_open_at_once) as file:
                told = json.load(file, parse_int=float)
            holds = {name: end for name, end in told.items() if now < end <= now + _LONGEST_HOLD}
        except FileNotFoundError:
            pass
        except (OSError, RecursionError, *_MISREAD) as error:
            trouble = f'{self.hold_file} cannot be read, so nothing is on hold: {error}'
        if trouble and not self.hold_trouble:
            _warn(trouble)
        self.hold_trouble = trouble
        return holds

    def write_holds(self, holds: Holds) -> None:
        """Replace the file of holds, as a whole or not at all."""
        temporary = f'{self.hold_file}.{os.getpid()}'
        try:
            with open(temporary, 'w', encoding='utf-8') as file:
                json.dump(holds, file)
            os.chmod(temporary, 0o644)  # whatever the umask: others have to read it
            os.replace(temporary, self.hold_file)
        finally:
            with suppress(OSError):
                os.unlink(temporary)

    def get_services(self, holds: Holds) -> Services:
        """Return the declared services; those on hold are left alone."""
        services = dict(self.services)
        for name in services.keys() & holds.keys():
            left = f'on hold until {_clock_time(holds[name])}'
            services[name] = services[name]._replace(left=left)
        return services


def _find_loss(container: Container, there: Set[str]) -> str:
    """Return, in words, what the container was made for and is not there any more."""
    lost = []
    for owner, kind in container.owners.items():
        if owner not in there:
            lost.append(f'the container whose {kind} it shares')
    for name, ident in container.networks.items():
        if ident not in there and not container.state.alive:  # what runs keeps them
            lost.append(f'its network {name}')
    return ', '.join(lost)


def _read_make(labels: Facts) -> Sequence[Any]:
    """Return what Compose made a container of; an image that is committed from it keeps that."""
    return [labels.get(_HASH), labels.get(_IMAGE)]


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # it may be a pipe


def _clock_time(moment: float) -> str:
    return time.strftime('%H:%M', time.localtime(moment))


class _Stack(_Project):
    """What can be done to a project: repairs, the beginning and the end."""

    patience = math.inf  # seconds that a check waits for a repair, which has its own deadline

    def look_once(self) -> Actions:
        """Return what would be done, without regard to what has been."""
        services = self.get_services(self.read_holds())
        actions = decide(self.observe(), services, 0.0, History(), self.settings)
        return sorted(actions, key=lambda action: action.label)

    def find_faults(self) -> Actions:
        """Return what a look shows to be otherwise than wanted."""
        return [action for action in self.look_once() if action.wanted]

    # -- repairs

    def act(self, verb: Verb, actions: Actions) -> None:
        """Do this about the faults; several only where Compose does it."""
        if verb is Verb.RECREATE and actions[0].service in self.copies:
            verb = Verb.REMOVE  # Compose would replace the copy, too
        if verb in _UP:
            services = sorted({action.service for action in actions})
            options = (*_UP[verb], *self._count_copies(services))
            self.compose('up', '--detach', *options, *services, limit=10 * self.settings.timeout)
            return
        for container in [action.container for action in actions if action.container]:
            if verb is Verb.REMOVE:
                if container.state.alive:
                    self.post('stop', container)
                self.remove(container)
            else:
                self.post(verb.name.lower(), container)  # the engine has the same words

    def _count_copies(self, services: Iterable[str]) -> List[str]:
        """Return options for `up`: Compose takes a copy for one of the service's own."""
        options = []
        for name in services:
            copies = self.copies.count(name)
            if copies:
                options += ['--scale', f'{name}={self.services[name].scale + copies}']
        return options

    def post(self, what: str, container: Container) -> None:
        """Unpause, start, restart, stop or kill a container; it has its grace period to stop."""
        path, limit = f'/containers/{container.id}/{what}', self.engine.limit + container.grace
        # Without a time to stop, podman kills at once; what does not stop takes no notice of it.
        absent = (404, 409) if what == 'kill' else ()  # it has ended meanwhile
        self.engine.request('POST', path, limit, absent, t=int(container.grace))

    def remove(self, container: Container) -> None:
        """Delete a container with its anonymous volumes."""
        gone = (404, 409)  # somebody else has removed it, or is about to
        self.engine.request('DELETE', f'/containers/{container.id}', absent=gone, force=1, v=1)

    def remove_networks(self, spared: Set[str]) -> None:
        """Delete the project's networks, but for those that are spared."""
        networks = self._list('/networks', f'{_PROJECT}={self.project}') if self.project else []
        _in_parallel(self._remove_network, {network['Id'] for network in networks} - spared)

    def _remove_network(self, network: str) -> None:
        """Delete a network, unless something else uses it."""
        try:
            self.engine.request('DELETE', f'/networks/{network}')
        except ComposeError as error:
            if error.returncode not in (403, 404, 409):
                raise
            logger.info(f'network {network[:12]} stays: {error.reason}')

    # -- the beginning and the end

    def start(self) -> None:
        """Bring the stack up, without a deadline; what a failed start has created is undone."""
        containers, networks = self._list('/containers/json'), self._list('/networks')
        there = {entry['Id'] for entry in containers + networks}
        before: Containers = []
        # Where Compose has made nothing yet, and nothing is on hold, `up` needs no care, and a
        # watcher in this process can read the files later: that saves time. Not 1.x, which has to
        # be told from what they say.
        made = any(_PROJECT in (entry['Labels'] or ()) for entry in containers)
        apart = self.settings.watcher is Watcher.PROCESS or 'compose' not in self.command[1:]
        if made or apart or self.read_holds():
            self.read_services()
            before = self.observe()
        try:
            self._up(self._make_ready(before))
        except BaseException as error:
            self.flag = UpFlag()  # nothing cancels that
            if self.settings.on_exit is OnExit.STOP:
                self._undo(before, there, error)
            raise

    def _up(self, options: Optional[List[str]]) -> None:
        """Run `up`; with no options, there is nothing to do."""
        if options is None:
            return
        command = self.command
        with closing(_Outlet(sys.stderr)) as outlet:
            words = ('up', '--build', '--detach', *options)
            up = partial(self.compose, *words, limit=math.inf, show=outlet.write)
            try:
                up()
            except ComposeError:
                self.read_services()  # the files may be to blame, and would be named
                if self.command == command:
                    raise
                up()  # by `docker-compose`, where docker has no `compose`

    def _make_ready(self, before: Containers) -> Optional[List[str]]:
        """Mend what `up` can't, and return its options; None if it has nothing to do."""
        holds = self.read_holds()
        if before:
            self._prepare()
        options = self._count_copies(self.services)
        spared = self._find_spared(before, holds)
        names = sorted(self.services.keys() - spared)
        if spared:
            logger.info(f'left as it is: {", ".join(sorted(spared))}')
            options += ['--no-deps', *names]
        return options if names or not spared else None

    def _find_spared(self, before: Containers, holds: Holds) -> Set[str]:
        """Return the services that `up` must not touch: it starts what was stopped on purpose."""
        spared = set(holds)
        for container in before:
            labelled = self.services.get(container.service, Service()).left or container.left
            if labelled and container.state is State.PAUSED:  # nor can it start that
                spared.add(container.service)
        return spared & self.services.keys()

    def _prepare(self) -> None:
        """Mend what `up` can't: what is paused, dead, or has lost what it was made for."""
        wanted = (Verb.UNPAUSE, Verb.REMOVE, Verb.RECREATE)
        for _ in range(3):  # what shares a namespace comes after its owner
            actions = [action for action in self.look_once() if action.verb in wanted]
            for action in actions:
                with _going_on(f'{action}, not {action.verb.value}'):
                    self.act(action.verb, [action])
            if not actions:
                break

    def _undo(self, before: Containers, there: Set[str], error: BaseException) -> None:
        """Delete what is not *there* yet; stop and pause again what was so *before*."""
        if not isinstance(error, ComposeError):
            threading.Event().wait(1.0)  # the engine still ends what it was asked for
            with _going_on('undoing what can be found'):
                self.read_services()
        try:
            now = self.observe()
            # By id; what has been replaced, by its number: the newest of those that bore it.
            ids = {c.id for c in now}
            gone = [c for c in reversed(before) if c.id not in ids]
            states: Dict[Any, State] = {(c.service, c.number): c.state for c in gone}
            states.update((c.id, c.state) for c in before)
            jobs = []
            for c in now:
                was = states.get(c.id) or states.get((c.service, c.number))
                if was or c.id not in there:
                    jobs.append((c, was))
            _in_parallel(lambda job: self._restore(*job), jobs)
            self.remove_networks(spared=there)
        except ComposeError as trouble:
            _warn(f'what the failed start has created could not be removed: {trouble}')

    def _restore(self, container: Container, was: Optional[State]) -> None:
        """Bring a container back into the state in which it was; None: it was not there."""
        if was is None:
            self._show_log(container)
            self.remove(container)
        elif container.state.alive and not was.alive:
            self.post('stop', container)
        elif container.state is State.RUNNING and was is State.PAUSED:
            self.post('pause', container)
        elif was.alive and not container.state.alive:
            with _going_on(f'{container.label} does not run any more'):
                self.post('start', container)

    def _show_log(self, container: Container) -> None:
        """Log the last lines that a container wrote, before it goes, unless it was well."""
        if container.condition == 'running':
            return
        path, query = f'/containers/{container.id}/logs', {'stdout': 1, 'stderr': 1, 'tail': 10}
        raw = b''
        how = _going_on('its log is not shown')
        with how, self.engine.ask('GET', path, query) as (_, answer):
            raw = answer.read()
        text = re.sub(rb'[\0-\2]\0\0\0....', b'', raw, flags=re.DOTALL)  # headers of the parts
        for line in text.decode('utf-8', 'replace').splitlines():
            logger.error(f'{container.label}: {container.condition}: {_one_line(line)}')

    def stop(self) -> None:
        """Stop the stack gracefully, kill what outlasts its time, and clean up in any case."""
        self.flag = UpFlag()  # nothing cancels the end
        own: Containers = []
        with _going_on('stopping the stack nevertheless'):
            if not self.services:
                self.read_services()
        with _going_on('stopping the stack nevertheless'):
            own = self.get_own(self.observe())
            paused = [c for c in own if c.state is State.PAUSED]  # they can't stop gracefully
            _in_parallel(partial(self.post, 'unpause'), paused)
        grace = max([c.grace for c in own], default=_DEFAULT_GRACE)
        logger.info(f'stopping the stack (up to {grace:g} s)')
        names = [name for name in self.services if name not in self.copies] if self.copies else []
        try:
            if names or not self.copies:
                self.compose('stop', *names, limit=self.settings.timeout + grace)
        except ComposeError as error:
            if not self.project:
                raise  # nor is it known what else could be stopped
            logger.error(f'{error}; stopping the containers one by one')
        removed = ''
        try:
            own = self._halt()
        finally:
            try:
                removed = self._clean_up(own)
            except ComposeError as error:
                _warn(f'the clean-up failed: {error}')
        logger.info(f'stopped{removed}')

    def _halt(self, what: str = 'stop') -> Containers:
        """Stop what Compose leaves, or kill what can't be stopped; return all that there is.

        It leaves the services of a profile, and what is not in its file any more.
        """
        try:
            own = self.get_own(self.observe())
            _in_parallel(partial(self.post, what), [c for c in own if c.state.alive])
        except ComposeError as error:
            if what == 'kill':
                raise
            logger.error(f'{error}; killing the containers')
            return self._halt('kill')
        return own

    def _clean_up(self, own: Containers) -> str:
        """Delete what the setting *prune* says; return, in words, what is gone."""
        if self.settings.prune is Prune.NONE:
            return ''
        try:
            if self.settings.prune is Prune.SYSTEM:
                self._call(*self.docker, 'system', 'prune', '--volumes', '--force')
            elif self.project:
                self._remove_project(own)
        finally:
            # Providers want to be told. And 1.x, without a project yet: a start that failed before
            # its first container may have left a network.
            if not self.project or any(service.provided for service in self.services.values()):
                self.compose('down')
        return '; containers and networks removed'

    def _remove_project(self, own: Containers) -> None:
        try:
            try:
                _in_parallel(self.remove, own)
            except ComposeError:  # podman: what shares a namespace has to go first
                _in_parallel(self.remove, own)
        finally:
            try:
                self.remove_networks(spared=set())
            finally:
                # Only 2.x labels the images that it builds. One that is in use stays: hence prune.
                query = {'dangling': ['true'], 'label': [f'{_PROJECT}={self.project}']}
                self.engine.request('POST', '/images/prune', filters=json.dumps(query))


# -- the stack on a swarm --------------------------------------------------------------------------
class _Swarm(_Stack):
    """A stack on a swarm, which places, restarts and moves the containers itself.

    Each service counts as one container, which runs when all of its replicas do. That it lacks some
    is told by a repair that lasts until Swarm has mended it.
    """

    patience = 15.0

    def read_services(self) -> None:
        """Read what the Compose files declare. Raises ValueError for what Swarm can't do."""
        super().read_services()
        if float(self.engine.request('GET', '/version')['ApiVersion']) < 1.41:
            raise ValueError('--mode swarm: it takes an engine with API 1.41 or later')
        for name, service in self.services.items():
            if service.owners:  # `stack deploy` would drop that without a word
                raise ValueError(f'{name}: Swarm can share no network_mode, pid or ipc')
            self.services[name] = Service(left=service.left)

    def _look(self) -> Iterator[Container]:
        """Give the services of the stack.

        Tasks are counted here: the swarm's own count keeps those of a node that is down.
        """
        own = f'com.docker.stack.namespace={self.project}'
        tasks = sorted(self._list('/tasks', own), key=lambda task: task['CreatedAt'])
        for entry in self._list('/services', own):
            running = 0
            error = 'starting'
            for task in tasks:
                if task['ServiceID'] == entry['ID']:
                    running += task['Status']['State'] == task['DesiredState'] == 'running'
                    error = task['Status'].get('Err', error)
            name = entry['Spec']['Name'].partition(f'{self.project}_')[2]
            desired = entry['ServiceStatus']['DesiredTasks']
            state = State.RUNNING
            note = f'{running}/{desired}'
            if running < desired:
                state = State.SHORT
                note += f', {error}'
            yield Container(entry['ID'], name, name, '', state, note=note)

    def act(self, verb: Verb, actions: Actions) -> None:
        """Deploy what is missing; of what lacks replicas, warn, and wait until it has them."""
        if verb is Verb.CREATE:
            self._deploy(_STEADY)
            return
        for fault in actions:
            _warn(f'{fault}')
            looks = 0
            while looks < 20:  # ten seconds: in a crash loop it runs now and then
                threading.Event().wait(0.5)
                with suppress(ComposeError):  # an outage tells nothing
                    if fault.key in [action.key for action in self.find_faults()]:
                        looks = 0
                    looks += 1

    def _deploy(self, limit: float) -> None:
        """Deploy the stack, and wait until nothing is wanting, or *limit* seconds are over."""
        self._call(
            *self.docker,
            'stack',
            'deploy',
            '--resolve-image=changed',  # else services that are there would get newer images
            *[f'--compose-file={file}' for file in self.settings.docker_compose],
            self.project,
        )
        tell = lru_cache()(logger.info)  # each line once
        for step in _count_down(limit):
            faults = self.find_faults()
            for fault in faults:
                tell(f'{fault}')
            if not faults:
                break
            threading.Event().wait(step)

    def start(self) -> None:
        """Deploy the stack and wait, without a deadline, until all of its replicas run."""
        self.read_services()
        before = self.observe()
        try:
            self._deploy(math.inf)
        except BaseException:
            if not before and self.settings.on_exit is OnExit.STOP:
                with _going_on('what the start has deployed may be left'):
                    self.stop()
            raise

    def stop(self) -> None:
        """Remove the stack, and wait until its containers have ended."""
        self.flag = UpFlag()  # nothing cancels the end
        if not self.project:
            self.read_services()
        logger.info('stopping the stack')
        self._call(*self.docker, 'stack', 'rm', self.project)
        own = f'com.docker.stack.namespace={self.project}'
        for step in _count_down(self.settings.timeout):
            # Those of finished jobs stay.
            if 'remove' not in [task['DesiredState'] for task in self._list('/tasks', own)]:
                logger.info('stopped')
                return
            threading.Event().wait(step)
        _warn('the stack is removed; Swarm is still ending some of its containers')


def _make_stack(settings: Optional[Settings]) -> _Stack:
    settings = settings or Settings.load()
    return _Swarm(settings) if settings.mode is Mode.SWARM else _Stack(settings)


# -- the watcher -----------------------------------------------------------------------------------
# Where Docker says destroy, podman says remove.
_EVENTS = 'create start kill die stop oom pause unpause destroy remove health_status'.split()
_ADVICE = (
    'It is tried again, less and less often, until somebody mends that, or puts the service on hold'
)
# Seconds that somebody's signal may take beyond the grace period: what ends later does not end by
# it. Some ask for a reload.
_LONGEST_END = 300.0


class _Watch:
    """Observe, decide, act, over and over. Repairs run in threads: a slow one holds up nothing."""

    def __init__(self, stack: _Stack, clock: Callable[[], float] = time.monotonic) -> None:
        self.stack, self.settings, self.clock = stack, stack.settings, clock
        stack.flag = UP_FLAG
        self.wake = threading.Event()  # set when there is something to look at
        self.over = threading.Event()  # set when the flag has been lowered, if only for a moment
        # Events that came since the last look; None: a stream has been opened.
        self.events: List[Optional[Facts]] = []
        # Repairs that have ended: why they failed, if they did, and when they began.
        self.results: List[Tuple[Action, Optional[Exception], float]] = []
        self.since = 0.0  # the engine's time up to which all events have been seen
        self.stirred = -math.inf  # when the last event came
        # Id -> until when, by the engine's clock, its end counts as somebody's deed.
        self.killed: Dict[str, float] = {}
        self.seen: Dict[Tuple[Verb, str], float] = {}  # as in History
        self.streaks: Dict[str, Streak] = {}
        self.crashed: Set[str] = set()
        # Id -> until when somebody's signal may still be stopping it.
        self.ending: Dict[str, float] = {}
        # Ids of the containers that were there when the files were read; None: not looked yet.
        self.declared: Optional[Set[str]] = None
        self.holds: Holds = {}
        self.busy: List[str] = []  # ids, and services, that are being repaired
        self.turn = threading.Lock()  # for Compose: two would create the same network twice
        self.tasks: List[_Task] = []  # repairs under way
        self.failures = 0  # repairs that failed
        self.outage: Optional[float] = None  # when Docker stopped to answer

    def close(self) -> None:
        """End what is under way."""
        UP_FLAG.value = False
        for task in self.tasks:
            task.wait()

    def run(self) -> None:
        """Watch until the flag is lowered."""
        follower = threading.Thread(target=self._follow, daemon=True)
        over, wake = UP_FLAG.when_lowered(self.over.set), UP_FLAG.when_lowered(self.wake.set)
        with over, wake, closing(self):
            woken = True
            while not self.over.is_set():
                timeout = self.settings.interval
                try:
                    timeout = self.cycle(woken)
                    if self.stack.project and not follower.ident:
                        with suppress(RuntimeError):  # no thread: the interval will do
                            follower.start()
                except _Cancelled:
                    pass
                except Exception:
                    logger.exception('unexpected error; the next check is in %g s', timeout)
                woken = self.wake.wait(timeout)
                self.wake.clear()
        if follower.ident:
            follower.join()

    def _follow(self) -> None:
        """Collect events until the flag is lowered, from one stream after the other."""
        label = f'{_PROJECT}={self.stack.project}'
        filters = {'type': ['container'], 'event': _EVENTS, 'label': [label]}
        if isinstance(self.stack, _Swarm):
            filters = {'scope': ['swarm']}  # tasks have no events
        while not self.over.is_set():
            began = self.clock()
            try:
                since = f'{self.since:.9f}'
                for event in self.stack.engine.follow(since=since, filters=json.dumps(filters)):
                    if event is not None:
                        self.since, self.stirred = event['time'], self.clock()
                    self.events.append(event)
                    # What is being repaired is looked at when that is over.
                    if event is None or event['Actor']['ID'] not in self.busy:
                        self.wake.set()
            except (_Cancelled, ComposeError, *_MISREAD) as error:
                logger.debug(f'{error}')
            self.over.wait(max(0.0, began + 2.0 - self.clock()))

    def cycle(self, woken: bool = True) -> float:
        """Take one look and begin what is due; return the seconds until the next look is wanted."""
        self.take_results()
        self._take_events()
        now = self.clock()
        try:
            containers = self._look()
        except ComposeError as error:
            return self._suffer(error, now)
        if self.outage is not None:
            logger.info(f'Docker answers again, after {self.clock() - self.outage:.0f} s')
            self.outage = None
        services = self.stack.get_services(self._note_holds())
        history = History(self.seen, self.streaks, self.crashed, self.ending)
        actions = self._choose(
            decide(containers, services, now, history, self.settings), containers
        )
        self._tell(actions, now, woken)
        waiting = [action for action in actions if now < action.due < math.inf]
        self.seen = {(action.verb, action.key): action.since for action in waiting}
        self._begin([action for action in actions if action.due <= now], now)
        self._report(containers, actions)
        soon = [*self.ending.values(), *(action.due for action in waiting)]
        return min([now + self.settings.interval, *soon]) - self.clock()

    def _choose(self, actions: Actions, containers: Containers) -> Actions:
        """Return the actions about what is not being repaired, those for Compose a moment later.

        For while another container has ended, too, somebody may be removing one after the other,
        and Compose would be run for each of them.
        """
        well = all(c.state.alive for c in containers)
        quiet = 0.0 if well else self.stirred + _QUIET
        # What has crashed does not wait for what is done for a sibling.
        free = [a for a in actions if a.key in self.crashed or a.service not in self.busy]
        free = [a for a in free if a.key not in self.busy]
        return [a._replace(due=max(a.due, quiet)) if a.verb in _UP else a for a in free]

    # -- what has happened

    def take_results(self) -> None:
        """Take note of the repairs that have ended, and begin what else may help."""
        while self.results:
            action, error, began = self.results.pop(0)
            for key in action.touched:
                self.busy.remove(key)
            self._record(action, error, began)

    def _take_events(self) -> None:
        """Note what the events tell; a container that one names is not known any more.

        For right after an event, the engine's list may still show what was before.
        """
        while self.events:
            event = self.events.pop(0)
            if event is None:  # some may have been missed
                self.stack.known = {}
                continue
            kind, _, _ = event['Action'].partition(':')
            ident, told = event['Actor']['ID'], event['Actor']['Attributes']
            known = self.stack.known.pop(ident, None)
            grace = known.grace if known else _DEFAULT_GRACE
            if kind == 'kill':
                self.ending[ident] = self.clock() + grace
            if kind == 'die':
                self.ending.pop(ident, None)
            if kind in ('kill', 'stop', 'destroy', 'remove'):
                self._note_deed(ident, told.get(_SERVICE, ''))
                self.killed[ident] = event['time'] + _LONGEST_END + grace
            if kind == 'die' and event['time'] >= self.killed.get(ident, -math.inf):
                self.crashed.add(ident)
            if kind in ('start', 'destroy', 'remove'):
                self.killed.pop(ident, None)
                self.crashed.discard(ident)

    def _note_deed(self, *keys: str) -> None:
        """Note what somebody did to a container: the count of its repairs begins anew."""
        for key in keys:
            recent = self.clock() - self.streaks.get(key, Streak()).ended < 1.0
            if key in self.busy or recent:
                break  # it may have been us
        else:
            for key in keys:
                self.streaks.pop(key, None)

    def _look(self) -> Containers:
        """Return the containers, having read the Compose files anew if somebody has deployed."""
        self.since = self.since or self.stack.engine.get_time()
        if not self.stack.services:
            self.stack.read_services()
        containers = self.stack.observe(afresh=False)
        ids = {c.id for c in containers}
        if self.declared is None:
            self.declared = ids
            self.stack.stamp = self.stack.stamp or self.stack.get_stamp()  # of what Compose found
        deployed = not self.busy and not ids <= self.declared
        deploying = ids != self.declared and self.stack.get_stamp() != self.stack.stamp
        if deployed or deploying:
            self.stack.read_services()
            self.declared = ids
        self._forget(containers)
        return containers

    def _forget(self, containers: Containers) -> None:
        """Forget what is over: the illness of what is healthy, and what is not there any more."""
        there = {*self.stack.services, *(c.id for c in containers)}
        healthy = {c.id for c in containers if c.health == 'healthy'}
        for key, streak in list(self.streaks.items()):
            if key not in there or key in healthy and streak.ill:
                del self.streaks[key]
        self.crashed &= there
        alive, now = [c.id for c in containers if c.state.alive], self.clock()
        self.ending = {i: end for i, end in self.ending.items() if i in alive and now < end}

    def _suffer(self, error: ComposeError, now: float) -> float:
        """Take note that Docker does not answer: nothing is repaired by old knowledge."""
        self.seen = {}
        if self.outage is None:
            self.outage = now
            pause = f'{self.settings.interval:g} s'
            _warn(f'Docker does not answer; trying again every {pause}: {error}')
        return min(self.settings.interval, max(0.1, now - self.outage))  # soon at first

    def _note_holds(self) -> Holds:
        before, self.holds = self.holds, self.stack.read_holds()
        for name in sorted(self.holds.keys() ^ before.keys()):
            until = self.holds.get(name)
            told = f'on hold until {_clock_time(until)}' if until else 'not on hold any more'
            logger.info(f'{name}: {told}')
        return self.holds

    def _tell(self, actions: Actions, now: float, woken: bool) -> None:
        """Warn of crash loops; let the events be followed anew if they did not tell of a fault."""
        fresh = [a for a in actions if a.due < math.inf and (a.verb, a.key) not in self.seen]
        for action in fresh:
            streak = action.streak
            if streak.repairs + 1 >= _LOOP:
                told = f'{action.label}: crash loop, {action.cause} {streak.repairs + 1} times'
                wait = max(0.0, action.due - now)
                _warn(f'{told} in {now - streak.began:.0f} s; next try in {wait:.0f} s')
        if fresh and not woken:
            self.stack.engine.cut_stream()

    def _report(self, containers: Containers, actions: Actions) -> None:
        status = '; '.join(f'{action}' for action in actions if action.wanted)
        running = [c.state is State.RUNNING for c in containers if c.service in self.stack.services]
        well = f'{sum(running)} of {len(running)} running'
        self.stack.notify(f'STATUS={status or well}\nWATCHDOG=1')

    # -- repairs

    def _begin(self, actions: Actions, now: float) -> None:
        """Begin repairs: several in one only by Compose, which takes its time each time."""
        groups: Dict[Any, List[Action]] = {}
        for action in actions:
            groups.setdefault(action.verb if action.verb in _UP else action.key, []).append(action)
            self.busy += action.touched
        self.tasks = [task for task in self.tasks if not task.ended.is_set()]
        self.tasks += [_Task(self._mend, group, now).begin() for group in groups.values()]

    def _mend(self, group: Actions, began: float) -> None:
        """Repair, in a thread, and leave the outcome for the watcher.

        Where Compose failed for several, each gets a command of its own.
        """
        verb, error = group[0].verb, None
        turn: Any = self.turn if verb in _UP else ExitStack()
        try:
            with turn:
                self.stack.act(verb, group)
        except _Cancelled:
            return
        except Exception as failure:
            error = failure
        if error and len(group) > 1:
            for action in group:
                self._mend([action], began)
        else:
            self.results.extend((action, error, began) for action in group)
            self.wake.set()

    def _record(self, action: Action, error: Optional[Exception], began: float) -> None:
        """Remember a repair: the next one of the same may have to wait."""
        streak, now, done = action.streak, self.clock(), action.verb.value
        if action.verb in _UP:
            self.declared = {action.service}  # no id, so that it differs: the files may, too
        if error is None:
            logger.info(f'{action} -> {done} ({now - began:.2f} s)')
            failures, ill = 0, action.cause == 'unhealthy'
        else:
            instead = self._find_instead(action, error)
            level = logging.INFO if instead else logging.ERROR
            logger.log(level, f'{action}, not {done}: {error}')
            if instead:
                self._begin([action._replace(verb=instead)], began)
                return
            self.failures += 1
            failures, ill = 1 + streak.failures * (streak.error == str(error)), streak.ill
        if failures == _LOOP:
            told = f'{action.label}: not {done} {failures} times for the same reason: {error}'
            _warn(f'{told}. {_ADVICE}')
        # Unpausing does not count, nor does a first start.
        state = action.container and action.container.state
        if error or state not in (State.CREATED, State.PAUSED):
            streak = Streak(streak.repairs + 1, streak.began, now, ill, str(error or ''), failures)
            self.streaks[action.key] = streak

    def _find_instead(self, action: Action, error: Exception) -> Optional[Verb]:
        """Return what else may help where this failed, and concerns no sibling and no sharer."""
        own = self.stack.services.get(action.service, Service())
        gone = getattr(error, 'returncode', None) in (404, 409)  # it is being removed
        if action.verb is Verb.START and own.scale == 1 and not own.owners and not gone:
            return Verb.UP
        return Verb.REMOVE if action.verb is Verb.RECREATE else None


# -- the watcher in a process ----------------------------------------------------------------------
def _watch_in_process(stack: _Stack, begun: threading.Event) -> None:
    """Keep a watcher process running while the flag is up; set *begun* once there is the first."""
    lowered = threading.Event()
    with UP_FLAG.when_lowered(lowered.set):
        while not lowered.is_set():
            try:
                code = _run_process(stack, begun)
            except Exception as error:  # AssertionError: a daemon process may have no children
                _warn(f'no watcher process can be started: {error}')
                begun.set()
                lowered.wait(stack.settings.interval)
                continue
            if not lowered.wait(_RESPAWN):
                _warn(f'the watcher process has died (exit code {code}); starting it again')


def _run_process(stack: _Stack, begun: threading.Event) -> Optional[int]:
    """Run a watcher process until it ends, or the flag is lowered; return its exit code."""
    import multiprocessing.connection
    import multiprocessing.process

    theirs, ours = multiprocessing.Pipe(duplex=False)  # what it says is: the end
    say_end = partial(ours.send_bytes, b'.')  # a fork may hold it open
    arguments = (theirs, ours, stack, logger.level)
    process = multiprocessing.Process(target=_process_main, args=arguments)
    with theirs, ours, UP_FLAG.when_lowered(say_end):
        process.start()
        # Else a process forked from the host would end it at its own exit.
        multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]
        begun.set()
        multiprocessing.connection.wait([process.sentinel, theirs])
    # Not by its exit code, which nobody gets where SIGCHLD is ignored.
    if process.pid and not multiprocessing.connection.wait([process.sentinel], 2):
        os.kill(process.pid, signal.SIGKILL)
    process.join(2)
    return process.exitcode


def _process_main(theirs: Any, ours: Any, stack: _Stack, level: int) -> None:
    """Watch in a process of its own, until the parent closes its end of the pipe or is gone."""
    ours.close()  # with this copy open, the end of the parent would go unnoticed
    # Signals are the parent's business; not SIG_IGN, which commands would inherit.
    for signum in _get_signals(stack.settings):
        signal.signal(signum, lambda *_: None)
    stack._engine = None  # a forked copy has the parent's connections
    UP_FLAG.value = True
    if stack.notify is _notify:  # on the command line: a process that is not forked has to be told
        _set_up_logging(level)
    watcher, parent = _Task(_Watch(stack).run).begin(), os.getppid()
    # A fork of the parent may hold the pipe open.
    while watcher.is_alive() and not theirs.poll(1.0) and os.getppid() == parent:
        pass
    UP_FLAG.value = False
    watcher.join()


# -- the functions for the host --------------------------------------------------------------------
def start_container(settings: Optional[Settings] = None) -> None:
    """Bring the stack up (`up --build --detach`), unpausing first what is paused. No deadline.

    Raises ComposeError if Docker or Compose fails (what was created is removed then, unless told to
    leave), ValueError for a bad setting.
    """
    with closing(_make_stack(settings)) as stack:
        stack.start()


def stop_container(settings: Optional[Settings] = None) -> None:
    """Stop the stack gracefully, kill what outlasts its time, and clean up as *prune* says.

    Raises ComposeError if it can't be stopped, ValueError for a bad setting; a failed clean-up is
    a ComposeWarning.
    """
    with closing(_make_stack(settings)) as stack:
        stack.stop()


def watch_container(settings: Optional[Settings] = None) -> None:
    """Watch and repair the stack, in this thread, until UP_FLAG is lowered.

    That Docker does not answer is a ComposeWarning, and it goes on trying. Raises ValueError for a
    bad setting.
    """
    with closing(_make_stack(settings)) as stack:
        _Watch(stack).run()


def docker_compose(settings: Optional[Settings] = None) -> ContextManager[UpFlag]:
    """Return a context manager: inside, the stack is up and watched; at the end it is stopped.

    It gives UP_FLAG. Entering raises ComposeError if the stack can't be started (what was created
    is undone then, unless told to leave), ValueError for a bad setting. What the body raises comes
    out again after the clean-up, which no further signal interrupts. In a process forked inside,
    the end of the copied block does nothing.
    """
    return _supervise(_make_stack(settings))


@contextmanager
def _supervise(stack: _Stack) -> Iterator[UpFlag]:
    """Start the stack, watch it during the block, and stop it in the process that began it."""
    _require_main_guard()
    owner, failed, signals = os.getpid(), True, _get_signals(stack.settings)
    _Signals.number, _Signals.deaf_until = stack.settings.kill_signal, 0.0
    UP_FLAG.value = True
    stack.flag = UP_FLAG
    # In the main thread, a signal could lose a process that is being started.
    start, begun = _Task(stack.start), threading.Event()
    watcher = _make_watcher(stack, begun)
    with _handling(signals):
        try:
            try:
                _bring_up(stack, start)
                watcher.start()
                begun.wait()  # a fork amid the body's own subprocesses would hold their pipes open
                stack.notify('READY=1')
                yield UP_FLAG
                failed = False
            finally:
                _go_deaf(owner)
        finally:
            _go_deaf(owner)  # again, for a signal may have come before that
            if os.getpid() == owner:
                # Again: the body may have changed the handlers, as asyncio does.
                with _handling(signals), closing(stack):
                    _end(stack, start, watcher, failed)
                _Signals.deaf_until = 0.0


def _require_main_guard() -> None:
    process = sys.modules.get('multiprocessing.process')
    if process and getattr(process.current_process(), '_inheriting', False):
        raise RuntimeError(
            "docker_compose() must stand under `if __name__ == '__main__':` for multiprocessing"
        )


def _get_signals(settings: Settings) -> Set[int]:
    """Return the signals that end the host."""
    return {signal.SIGINT, signal.SIGHUP, settings.kill_signal}


def _bring_up(stack: _Stack, start: _Task) -> None:
    try:
        start.begin().finish()
    except _Cancelled:
        raise ComposeError((*stack.command, 'up'), None, '', 'the flag was lowered') from None


def _make_watcher(stack: _Stack, begun: threading.Event) -> threading.Thread:
    """Return the thread that watches, in itself or in a process; *begun* is set once it does."""
    watch: Any = partial(_watch_in_process, stack, begun)
    if stack.settings.watcher is Watcher.THREAD:
        begun.set()
        watch = _Watch(stack).run
    return threading.Thread(target=watch, name='broapt-watchdog', daemon=True)


def _end(stack: _Stack, start: _Task, watcher: threading.Thread, failed: bool) -> None:
    stack.notify('STOPPING=1')
    UP_FLAG.value = False
    if watcher.is_alive():
        watcher.join(10)  # it ends at once, except in a host that is just being torn down
    start.wait()
    if start.error or not start.ended.is_set():
        return  # it has undone what it did
    if stack.settings.on_exit is OnExit.LEAVE:
        logger.info('leaving the containers as they are')
        return
    try:
        stack.stop()
    except ComposeError as error:
        if not failed:
            raise
        _warn(f'the stack could not be stopped: {error}')  # what went wrong before comes out


# -- signals ---------------------------------------------------------------------------------------
class _Signals:
    """What the signal handler knows. Plain attributes, since a handler must take no lock."""

    number: Optional[int] = None  # the kill signal
    previous: Dict[int, Any] = {}  # the handlers that flask_exit replaced
    # Monotonic: a second from a signal on, as PyInstaller repeats it, and in the clean-up.
    deaf_until = 0.0
    noted: List[int] = []  # signals that came while deaf


def _go_deaf(owner: int) -> None:
    """From here on, only note the signals that the main thread of process *owner* gets."""
    if os.getpid() == owner and threading.current_thread() is threading.main_thread():
        _Signals.deaf_until = math.inf


def flask_exit(signum: Optional[int] = None, frame: Any = None) -> None:
    """End the server: as a signal handler, or called directly, for example in a Flask view.

    As a handler it calls the handler that was there before, else raises KeyboardInterrupt, on which
    Flask's and waitress's servers return normally; further signals are only noted. Called directly
    it uses `werkzeug.server.shutdown` (before 2.1), else sends this process its own kill signal.
    """
    if signum is None:
        flask = sys.modules.get('flask')
        environ = flask.request.environ if flask and flask.has_request_context() else {}
        kill_signal = _Signals.number or Settings.load().kill_signal
        environ.get('werkzeug.server.shutdown', lambda: os.kill(os.getpid(), kill_signal))()
        return
    previous = _Signals.previous.get(signum)
    if time.monotonic() < _Signals.deaf_until:
        _Signals.noted.append(signum)
    elif callable(previous) and previous is not signal.default_int_handler:
        previous(signum, frame)
    else:
        _Signals.deaf_until = time.monotonic() + 1.0
        raise KeyboardInterrupt


def register(settings: Optional[Settings] = None) -> None:
    """Make flask_exit the handler of the kill signal.

    Raises ValueError outside the main thread, or for a bad setting.
    """
    number = (settings or Settings.load()).kill_signal
    if threading.current_thread() is not threading.main_thread():
        raise ValueError(
            'register() must be called in the main thread: Python handles signals there'
        )
    _Signals.number, _Signals.deaf_until = number, 0.0
    if signal.getsignal(number) is not flask_exit:
        _Signals.previous[number] = signal.signal(number, flask_exit)


@contextmanager
def _handling(signals: Iterable[int]) -> Iterator[None]:
    """Let flask_exit handle these signals, unless they are ignored; tell which came too late."""
    owner, replaced = os.getpid(), {}
    kept = (flask_exit, signal.SIG_IGN, None)  # None: Python could not put that handler back
    if threading.current_thread() is threading.main_thread():  # only there can they be handled
        changed = [signum for signum in signals if signal.getsignal(signum) not in kept]
        replaced = {signum: signal.signal(signum, flask_exit) for signum in changed}
    _Signals.previous.update(replaced)
    try:
        yield
    finally:
        if os.getpid() == owner:
            for signum, handler in replaced.items():
                signal.signal(signum, handler)
                _Signals.previous.pop(signum, None)
            while _Signals.noted:
                name = signal.Signals(_Signals.noted.pop(0)).name
                logger.info(f'{name} came when the end was under way already; it changed nothing')


# -- the command line ------------------------------------------------------------------------------
def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; return the exit code.

    0: fine; 1: Docker failed, or a fault was found; 2: bad usage or setting.
    """
    arguments = _parse_arguments(argv)
    outlet = _set_up_logging(arguments.pop('level'))
    command = _COMMANDS[arguments.pop('command') or 'run']
    given = {field: arguments.pop(field) for field in Settings._fields}
    reconfigure = getattr(sys.stdout, 'reconfigure', None)  # since 3.7
    if reconfigure:
        reconfigure(errors='backslashreplace')  # a locale may know few letters
    try:
        code = command.run(_make_stack(Settings.load(**given)), **arguments)
        print(end='', flush=True)
        return code
    except KeyboardInterrupt:
        return 0 if command.run is _run_until_signal else 1
    except (ValueError, ComposeError, OSError) as error:
        outlet.write(f'broapt_compose: {error}\n')
        return 2 if isinstance(error, ValueError) else 1
    finally:
        outlet.close()


def _parse_arguments(argv: Optional[Sequence[str]]) -> Dict[str, Any]:
    """Return what the command line gives: the command, settings, and the command's own."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            """Exit with 2 and one line, without argparse's usage."""
            self.exit(2, f'{self.prog}: {message}; --help lists what is accepted\n')

    epilog = (
        'COMMAND --help lists its options. Exit codes: 0 fine; 1 Docker failed, or a fault was '
        'found; 2 bad usage or setting.'
    )
    settings = Parser('broapt_compose', add_help=False)  # taken before the command and after it
    _add_settings(settings, Settings._fields)
    given, rest = settings.parse_known_args(argv)
    parser = Parser('broapt_compose', description=(__doc__ or '').split('\n')[0], epilog=epilog)
    parser.add_argument('-V', '--version', action='version', version='%(prog)s ' + __version__)
    # With its name given, argparse loads no formatter: that saves time.
    commands = parser.add_subparsers(
        prog=parser.prog, dest='command', metavar='COMMAND', title='commands'
    )
    for name, command in _COMMANDS.items():
        own = commands.add_parser(name, help=command.text, description=command.text)
        if name in rest:  # else nobody can ask for its help: that saves time
            _add_settings(own, command.shown)
        for flag, how in command.arguments.items():
            own.add_argument(flag, **how)
    return {**vars(parser.parse_args(rest)), **vars(given)}


def _add_settings(parser: Any, fields: Sequence[str]) -> None:
    level = {'dest': 'level', 'action': 'store_const', 'default': logging.INFO}
    parser.add_argument('-v', '--verbose', const=logging.DEBUG, help='log every command', **level)
    parser.add_argument(
        '-q', '--quiet', const=logging.WARNING, help='log only warnings and errors', **level
    )
    for field in fields:
        option, default = _OPTIONS[field], Settings._field_defaults[field]
        value = f'; default: {getattr(default, "value", default)}' if default else ''
        *flags, metavar = option.usage.split()
        parser.add_argument(
            *flags,
            dest=field,
            metavar=metavar,
            action='append' if field == 'docker_compose' else 'store',
            help=f'{option.help} (BROAPT_{field.upper()}{value})',
        )


def _parse_span(text: str) -> float:
    """Return the seconds of a time such as 30m."""
    import argparse

    found = re.fullmatch(r'(\d+)([smh])', text)
    seconds = int(found[1]) * {'s': 1, 'm': 60, 'h': 3600}[found[2]] if found else 0
    if not 0 < seconds <= _LONGEST_HOLD:
        raise argparse.ArgumentTypeError(f'{text!r} is not a time {_SPAN}')
    return float(seconds)


def _set_up_logging(level: int) -> _Outlet:
    outlet = _Outlet(sys.stderr)
    logging.basicConfig(format='%(asctime)s %(levelname)s %(message)s', stream=outlet)
    logging.raiseExceptions = False  # on a full disk, no tracebacks on top of what can't be written
    logger.setLevel(level)
    warnings.simplefilter('ignore', ComposeWarning)  # the log has them
    return outlet


def _run_until_signal(stack: _Stack) -> int:
    """Keep the stack up until the signal; return 0."""
    settings, stack.notify = stack.settings, _notify
    # Also where it is ignored, in the background of a script.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    register(settings)
    usec = os.environ.get('WATCHDOG_USEC', '')
    if usec.isdigit():
        # Check twice as often as systemd wants to hear of it: sd_watchdog_enabled(3).
        interval = min(settings.interval, max(int(usec), 1) / 2e6)
        stack.settings = settings._replace(interval=interval)
    try:
        with _supervise(stack), suppress(KeyboardInterrupt):
            name = signal.Signals(settings.kill_signal).name
            logger.info(f'the stack is up and watched; {name} or Ctrl+C stops it')
            # No endless wait: the kernel may give the signal to another thread.
            while not threading.Event().wait(1.0):
                pass
        return 0
    finally:
        for signum in _get_signals(settings):
            signal.signal(signum, signal.SIG_IGN)  # nothing is left to interrupt


def _notify(text: str) -> None:
    """Tell systemd, if it listens: sd_notify(3)."""
    address = os.environ.get('NOTIFY_SOCKET', '')
    if address:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(text.encode(), re.sub('^@', '\0', address))


def _check(stack: _Stack, dry_run: bool) -> int:
    """Repair what is wrong, once it has settled; return 1 if a fault is left."""
    UP_FLAG.value = True
    stack.open()
    if dry_run:
        actions = stack.look_once()
        for action in actions:
            print(f'{action}: {action.plan or "nothing to do"}')
        return 1 if any(action.wanted for action in actions) else 0
    watch = _Watch(stack)
    with closing(watch):
        watch.cycle()
        if watch.seen:
            threading.Event().wait(stack.settings.settle)
            watch.cycle()
        for _ in range(2):
            for task in watch.tasks:
                task.wait(stack.patience)
            watch.take_results()  # that may begin something else
        if watch.outage is not None:
            return 1
        remaining = stack.find_faults()
    for action in remaining:
        logger.warning(f'{action}: {action.plan}')
    return 1 if remaining or watch.failures else 0


def _status(stack: _Stack, as_json: bool) -> int:
    """Print a row for each container, and each service that lacks one; return 1 for a fault."""
    error = ''
    try:
        stack.open()
    except ComposeError as failure:
        error = str(failure)
    actions, now = stack.look_once(), stack.engine.get_time()
    rows = [_make_row(action, now) for action in actions]
    ok = not error and not any(row['fault'] for row in rows)
    if as_json:
        document = {'project': stack.project, 'ok': ok, 'error': error, 'containers': rows}
        print(json.dumps(document, indent=2))
    else:
        _print_table(rows)
        if error:
            print(error)
    return 0 if ok else 1


def _make_row(action: Action, now: float) -> Facts:
    row: Dict[str, Any] = {'service': action.service, 'state': action.cause}
    container = action.container
    if container:
        age = datetime.timedelta(seconds=int(now - container.since))
        row.update(
            container=container.name,
            id=container.id,
            state=container.condition,
            health=container.health,
            since=str(age) if container.since else '',
            watched=not container.left,
        )
    return {**row, 'fault': action.wanted, 'note': action.plan}


def _print_table(rows: Sequence[Facts]) -> None:
    columns = ('service', 'container', 'state', 'health', 'since', 'note')
    table = [[name.upper() for name in columns]]
    table += [[row.get(name) or '-' for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    coloured = sys.stdout is not None and sys.stdout.isatty() and 'NO_COLOR' not in os.environ
    for cells, row in zip(table, [{}, *rows]):
        line = '  '.join(map(str.ljust, cells, widths)).rstrip()
        if coloured and row:
            line = f'\033[{31 if row["fault"] else 32}m{line}\033[0m'
        print(line)


def _hold(stack: _Stack, names: Sequence[str], span: float) -> int:
    """Have these services, or all, left alone for *span* seconds."""
    with _going_on('the containers tell the services'):
        stack.open()
    known = sorted({*stack.services, *(c.service for c in stack.observe())})
    if not known:
        return 1
    for name in names:
        if name not in known:
            raise ValueError(f'SERVICE: {name!r} is not one of {", ".join(known)}')
    names, until = sorted(names or known), time.time() + span
    stack.write_holds({**stack.read_holds(), **dict.fromkeys(names, until)})
    for name in names:
        print(f'{name}: on hold until {_clock_time(until)}')
    return 0


def _release(stack: _Stack, names: Sequence[str]) -> int:
    """Have services watched again."""
    holds = stack.read_holds()
    for name in names or sorted(holds):
        print(f'{name}: ' + ('watched again' if holds.pop(name, 0) else 'was not on hold'))
    stack.write_holds(holds)
    return 0


class _Command(NamedTuple):
    run: Callable[..., int]
    text: str  # in the help
    shown: Sequence[str]  # the settings that matter to it
    arguments: Mapping[str, Mapping[str, Any]] = {}  # its own: flag or name -> how it is taken


_LOOKING = ('docker_compose', 'timeout', 'unhealthy', 'mode', 'compose_command')
_SPAN = 'such as 90s, 30m or 2h, at most 24h'
_NAMES = {'names': {'nargs': '*', 'metavar': 'SERVICE', 'help': 'none: all of them'}}
_FOR = {
    'dest': 'span',
    'type': _parse_span,
    'metavar': 'TIME',
    'default': '1h',
    'help': f'{_SPAN} (default: %(default)s)',
}
_COMMANDS = {
    'run': _Command(
        _run_until_signal,
        'bring the stack up, watch it, and stop it at the signal (default)',
        Settings._fields,
    ),
    'check': _Command(
        _check,
        'look once, repair what is wrong, and exit',
        ('settle', *_LOOKING),
        {
            '--dry-run': {
                'action': 'store_true',
                'help': 'tell what would be done and why, and do nothing',
            }
        },
    ),
    'status': _Command(
        _status,
        'print a table of services and containers',
        _LOOKING,
        {'--json': {'dest': 'as_json', 'action': 'store_true', 'help': 'print one JSON document'}},
    ),
    'hold': _Command(
        _hold,
        'leave services alone for a while, to work on them by hand',
        _LOOKING,
        {**_NAMES, '--for': _FOR},
    ),
    'release': _Command(_release, 'watch them again', _LOOKING, _NAMES),
}


if __name__ == '__main__':
    sys.exit(main())
