# SPDX-FileCopyrightText: 2026 the broapt_compose authors
# SPDX-License-Identifier: BSD-3-Clause
"""Tests of the Docker watchdog: first on a scripted engine; last, on a real one."""

import calendar
import collections
import contextlib
import email.utils
import fcntl
import functools
import glob
import http.client
import http.server
import importlib.util
import json
import logging
import os
import pathlib
import pickle
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import urllib.parse
import urllib.request
import warnings
import zipfile
from functools import partial

import pytest

import broapt_compose as bc
from broapt_compose import (
    Action,
    ComposeError,
    ComposeWarning,
    Container,
    History,
    Service,
    Settings,
    State,
    Streak,
    Verb,
)

HERE = pathlib.Path(__file__).resolve().parent
MODULE = HERE / 'broapt_compose.py'

ignores_warnings = pytest.mark.filterwarnings('ignore::broapt_compose.ComposeWarning')

# -- captured outputs ------------------------------------------------------------------------------

ENTRY = """\
{"Id": "8f48490903fe", "Names": ["/shop-core-2"], "Image": "busybox", "ImageID": "sha256:85e7",
 "Command": "sh -c 'exit 3'", "Created": 1795615510, "Ports": [], "Labels": {
  "com.docker.compose.config-hash": "bea765ea267b814b4e815173ae4fb94cd09c0ed8",
  "com.docker.compose.container-number": "2", "com.docker.compose.depends_on": "",
  "com.docker.compose.image": "sha256:85e7", "com.docker.compose.oneoff": "False",
  "com.docker.compose.project": "shop",
  "com.docker.compose.project.config_files": "/shop/compose.yml",
  "com.docker.compose.project.working_dir": "/shop", "com.docker.compose.service": "core",
  "com.docker.compose.version": "2.26.1"}, "State": "exited", "Status": "Exited (3) 2 seconds ago",
 "HostConfig": {"NetworkMode": "shop_default"}, "NetworkSettings": {"Networks": {"shop_default": {
  "IPAMConfig": null, "Links": null, "Aliases": null, "NetworkID": "b19b709e48fc",
  "EndpointID": "", "Gateway": "", "IPAddress": "", "DriverOpts": null}}}, "Mounts": []}
"""

DETAILS = """\
{"Id": "8f48490903fe", "Created": "2026-11-25T14:05:10.5Z", "State": {"Status": "exited",
  "Running": false, "Paused": false, "Restarting": false, "OOMKilled": false, "Dead": false,
  "Pid": 0, "ExitCode": 3, "Error": "", "StartedAt": "2026-11-25T14:05:11.96989067Z",
  "FinishedAt": "2026-11-25T14:05:11.987097661Z"}, "Name": "/shop-core-2", "RestartCount": 0,
 "HostConfig": {"NetworkMode": "shop_default", "PidMode": "", "IpcMode": "private"},
 "Config": {"Image": "busybox", "StopTimeout": 120},
 "NetworkSettings": {"Networks": {"shop_default": {"NetworkID": "b19b709e48fc"}}}}
"""

CONFIG_2 = """\
{"name": "shop", "networks": {"default": {"name": "shop_default", "ipam": {}}}, "services": {
  "core": {"command": ["sleep", "1"], "depends_on": {
      "init": {"condition": "service_completed_successfully", "required": true},
      "multi": {"condition": "service_healthy", "required": false}},
    "environment": {"TEXT": "scale: 7\\n  depends_on:\\n"}, "image": "busybox",
    "labels": {"a/b": "x\\n    broapt.watch: false\\n", "broapt.watch": "false"},
    "networks": {"default": null}},
  "debug": {"image": "busybox", "profiles": ["debug"]},
  "init": {"command": null, "entrypoint": null, "image": "busybox", "networks": {"default": null}},
  "mate": {"depends_on": {
      "init": {"condition": "service_started", "restart": true, "required": true}},
    "image": "busybox", "ipc": "service:init", "pid": "container:fixed"},
  "multi": {"deploy": {"replicas": 2, "resources": {}, "placement": {}}, "image": "busybox"},
  "named": {"container_name": "fixed", "image": "busybox"},
  "side": {"depends_on": {
      "core": {"condition": "service_started", "restart": true, "required": true},
      "init": {"condition": "service_started", "required": true}},
    "labels": {"a/b": "x\\n    broapt.watch: false\\n"}, "network_mode": "service:core"},
  "zero": {"image": "busybox", "scale": 0}}}
"""

CONFIG_1 = r"""
services:
  core:
    command:
    - sleep
    - '1'
    depends_on:
      init:
        condition: service_completed_successfully
    environment:
      TEXT: "scale: 7\n  depends_on:\n"
    image: busybox
    labels:
      a/b: "x\n    broapt.watch: false\n"
      broapt.watch: "false"
  debug:
    image: busybox
    profiles:
    - debug
  init:
    image: busybox
  mate:
    image: busybox
    ipc: service:init
    pid: container:fixed
  multi:
    deploy:
      replicas: 2
    image: busybox
  named:
    container_name: fixed
    image: busybox
  side:
    depends_on:
      init:
        condition: service_started
    image: busybox
    labels:
      a/b: 'word word word word word word word word word word word word word word word
        word broapt.watch: false'
    network_mode: service:core
  zero:
    image: busybox
    scale: 0
version: '3.9'
"""

# -- the scripted engine ---------------------------------------------------------------------------

PROGRAM = """\
#!{python} -IS
# It asks the test's process what to do, step by step.
import _signal, _socket, json, os, select, sys

def connect(path, *call):
    connection = _socket.socket(_socket.AF_UNIX)
    connection.connect(path)
    connection.sendall(json.dumps(call).encode() + b'\\n' if call else b'')
    return connection

def write(fd, data):
    while data:
        data = data[os.write(fd, data):]

def bridge(path):
    engine = connect(path)
    ends = dict([(0, engine.fileno()), (engine.fileno(), 1)])
    while True:
        for fd in select.select(list(ends), [], [])[0]:
            data = os.read(fd, 65536)
            write(ends[fd], data)
            if fd and not data:
                sys.exit()
            if not data:
                del ends[0]
                engine.shutdown(_socket.SHUT_WR)

program, folder = os.path.basename(sys.argv[0]), os.readlink('/proc/self/cwd')
world = connect({path!r}, os.getpid(), program, sys.argv[1:], folder, dict(os.environ))
for line in open(world.fileno(), 'rb', closefd=False):
    step = json.loads(line.decode())
    if 'deaf' in step:
        _signal.signal(15, _signal.SIG_IGN)
    if 'child' in step and not os.fork():
        os.close(world.fileno())
        connect({path!r}, os.getpid()).recv(1)
        os._exit(0)
    write(2, b'x' * (step.get('flood', 0) << 20))
    write(1, step.get('out', '').encode('utf-8', 'surrogateescape'))
    write(2, step.get('err', '').encode('utf-8', 'surrogateescape'))
    while 'endless' in step:
        os.write(1, b'x' * 65536)
    if 'bridge' in step:
        bridge(step['bridge'])
    if 'code' in step:
        sys.exit(step['code'])
sys.exit(99)
"""

VALUED = (  # options of docker and of Compose that take the next word
    '-f --file -p --project-name --profile --env-file --project-directory --ansi --progress '
    '--parallel -c --context -H --host --config -l --log-level --format -t --timeout --scale '
    '--pull -s --signal --wait-timeout'
).split()
READERS = re.compile(
    'GET |context inspect|system dial-stdio|version|info|compose (config|version|ps)'
)
ALIVE = ('running', 'paused', 'restarting')
NEVER = '0001-01-01T00:00:00Z'
LABEL = 'com.docker.compose.'
OFFLINE = re.compile('context|compose (config|version)')
BEFORE = ('deaf', 'child', 'flood', 'out', 'err', 'endless')
MODES = {'network_mode': 'NetworkMode', 'pid': 'PidMode', 'ipc': 'IpcMode'}

Call = collections.namedtuple('Call', 'program argv cwd env')


class Refusal(Exception):
    """What is asked for can't be done: the HTTP status (or exit code) and the message."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


def parse(call):
    """Return the words of a command line that are no options, and the options."""
    words, options = ['compose'] * (call.program == 'docker-compose'), {}
    rest = iter(call.argv)
    for word in rest:
        if not word.startswith('-'):
            words.append(word)
        elif '=' in word:
            options.update([word.split('=', 1)])
        else:
            options[word] = next(rest, '') if word in VALUED else ''
    return words, options


def passes(query, labels, **facts):
    """Return whether the filters let through what has these labels and facts."""
    for key, values in json.loads(query.get('filters') or '{}').items():
        if key == 'label':
            pairs, labels = [value.partition('=') for value in values], labels or {}
            if not all(name in labels and text in ('', labels[name]) for name, _, text in pairs):
                return False
        elif key not in facts:
            raise Refusal(400, "Invalid filter '{}'".format(key))
        elif not set(values) & set(facts[key]):
            return False
    return True


def pick(things, name, message):
    """Return what has this id, name or tag."""
    for thing in things.values():
        names = [thing.get('Name', ''), thing['Id']] + thing.get('RepoTags', [])
        if {name, '/' + name, name + ':latest'} & set(names):
            return thing
    raise Refusal(404, message.format(name))


def seconds_of(moment):
    """Return the unix time of a moment as Docker writes it."""
    return calendar.timegm(time.strptime(moment[:19], '%Y-%m-%dT%H:%M:%S'))


def nanoseconds(text):
    """Return 'seconds.fraction' in nanoseconds."""
    second, _, fraction = text.partition('.')
    return int(second) * 10**9 + int(fraction.ljust(9, '0'))


def parse_query(target):
    return dict(urllib.parse.parse_qsl(target.partition('?')[2]))


def contains(line, words):
    """Return whether a command line has these words in this order."""
    rest = iter(line)
    return all(word in rest for word in words)


def refuse_compose(rest):
    """Return what a docker without Compose says: it stumbles over the first option."""
    for word in rest:
        if word.startswith('--'):
            return Refusal(125, 'unknown flag: ' + word.partition('=')[0])
        if word.startswith('-'):
            return Refusal(125, "unknown shorthand flag: '{}' in {}".format(word[1], word))
    return Refusal(1, "docker: 'compose' is not a docker command.\nSee 'docker --help'")


class Handler(http.server.BaseHTTPRequestHandler):
    """A connection to the engine."""

    protocol_version = 'HTTP/1.1'

    def do_GET(self):
        self.rfile.read(int(self.headers.get('Content-Length', 0)))
        self.server.answer(self)

    do_POST = do_DELETE = do_GET

    def log_message(self, *_):
        pass


class ScriptedEngine:
    """A Docker engine and a `docker` command that do as Docker does unless told otherwise.

    Containers are kept by id ('core1', its successor 'core1.2') as inspect shows them. What people
    do is `act`, what a process does by itself is `crash`; `change` comes without any event.
    """

    def __init__(self, folder, bin):
        self.bin = bin
        self.path, self.private = str(folder / 'engine'), str(folder / 'private')
        self.project, self.folder, self.compose, self.api = 'shop', os.getcwd(), '2.26.1', 41
        self.clock, self.contexts = time.time, {'default': 'unix://' + self.path}
        self.services, self.config = {}, None  # config: the text that is printed instead
        self.swarm = {'services': [], 'tasks': []}
        self.containers, self.networks, self.images, self.logs = {}, {}, {}, {}
        self.stale = {}  # what the list shows instead, by id
        self.log, self.events, self.children = [], collections.deque(maxlen=256), []
        self._faults, self._commands, self._streams = [], [], []
        self._moved, self._closed, self._moment = threading.Condition(), False, 0
        self._connections, self._threads, self._ids = {}, [], collections.Counter()
        self._listeners = {self.private: self._listen(self.private, self._obey)}
        self.add_image('sha256:busybox', 'busybox:latest')
        self.add_network('shop_default')
        self.up()

    # What the test moves

    def install(self, program):
        """Put docker or docker-compose, which does what this world says, on PATH."""
        path = self.bin / program
        path.write_text(PROGRAM.format(python=sys.executable, path=self.private))
        path.chmod(0o755)

    def declare(self, *names, **services):
        """Let the Compose file declare these services and no others."""
        self.services, self.config = {}, None
        for name, more in sorted(dict(dict.fromkeys(names, {}), **services).items()):
            service = dict({'image': 'busybox', 'command': None, 'entrypoint': None}, **more)
            needs = dict(service.pop('depends_on', {}))
            for key in MODES:
                kind, _, owner = service.get(key, '').partition(':')
                if kind == 'service':
                    needs.setdefault(
                        owner, {'condition': 'service_started', 'restart': True, 'required': True}
                    )
            if needs:
                service['depends_on'] = needs
            if 'network_mode' not in service:
                service.setdefault('networks', {'default': None})
            self.services[name] = service

    def run(self, *names, **services):
        """Declare these services, and let them run."""
        self.declare(*names, **services)
        self.bring_up()

    def add(self, service, state='running', number=1, exit_code=0, health='', labels=(), **more):
        """Add a container, five minutes old; return its id.

        Also: id, name, image, image_id, network_mode, pid, ipc, networks (names), stop_timeout, and
        fields of State.
        """
        id = more.get('id') or self._new_id(service + str(number))
        separator = '_' if self.compose[0] == '1' else '-'
        name = more.get('name', separator.join([self.project, service, str(number)]))
        image, mode = more.get('image', 'busybox'), more.get('network_mode')
        mode = mode or self.project + '_default'
        networks = more.get('networks', [] if ':' in mode or mode in ('host', 'none') else [mode])
        labels = dict(self._labels(service, number, image), **dict(labels))
        config = {'Image': image, 'Tty': False, 'Labels': labels}
        if 'stop_timeout' in more:
            config['StopTimeout'] = more['stop_timeout']
        born, died = self._now(-300), self._now(-5)
        times = {
            'StartedAt': NEVER if state == 'created' else born,
            'FinishedAt': died if state in ('exited', 'dead') else NEVER,
        }
        self.containers[id] = {
            'Id': id,
            'Name': '/' + name,
            'Created': born,
            'Image': more.get('image_id', 'sha256:' + image),
            'State': dict(times, Error='', OOMKilled=False),
            'RestartCount': 0,
            'Config': config,
            'HostConfig': {
                'NetworkMode': mode,
                'PidMode': more.get('pid') or '',
                'IpcMode': more.get('ipc') or 'private',
            },
            'NetworkSettings': {'Networks': {name: {'NetworkID': ''} for name in networks}},
            'Mounts': [],
        }
        self.containers[id]['State'].update((key, more[key]) for key in more if key[0].isupper())
        self.change(id, state, exit_code, health)
        if state != 'created':
            self._connect(self.containers[id])
        return id

    def _connect(self, container):
        """Give a container the ids of its networks, as its first start does."""
        for name, network in container['NetworkSettings']['Networks'].items():
            found = [n['Id'] for n in self.networks.values() if n['Name'] == name]
            if not network['NetworkID'] and found:
                network['NetworkID'] = found[-1]

    def _labels(self, service, number, image):
        labels = {'project': self.project, 'service': service, 'container-number': str(number)}
        labels.update(
            {'oneoff': 'False', 'version': self.compose, 'config-hash': service + '-hash'}
        )
        labels['project.working_dir'] = self.folder
        labels['project.config_files'] = os.path.join(self.folder, 'compose.yml')
        if self.compose[0] != '1':
            needs = self.services.get(service, {}).get('depends_on', {}).items()
            needs = [
                '{}:{}:{}'.format(name, n['condition'], n.get('restart', False)).lower()
                for name, n in needs
            ]
            labels.update(depends_on=','.join(needs), image='sha256:' + image)
        return {LABEL + key: value for key, value in labels.items()}

    def add_network(self, name, **labels):
        """Add a network of the project; return its id."""
        id = self._new_id(name)
        labels = dict({LABEL + 'network': 'default', LABEL + 'project': self.project}, **labels)
        self.networks[id] = {'Name': name, 'Id': id, 'Created': self._now(), 'Labels': labels}
        return id

    def add_image(self, id, *tags, **labels):
        """Add an image, a dangling one if it has no tag."""
        created = int(self.clock())
        image = {'Id': id, 'RepoTags': list(tags), 'Labels': labels or None, 'Created': created}
        self.images[id] = image

    def change(self, id, status, exit_code=0, health='', **state):
        """Change the state of a container without an event."""
        with self._moved:
            state.update(Status=status, ExitCode=exit_code, Pid=4242 if status in ALIVE else 0)
            state.update(Running=status in ALIVE, Restarting=status == 'restarting')
            state.update(Paused=status == 'paused', Dead=status == 'dead')
            if health:
                failing = int(health == 'unhealthy')
                state['Health'] = {'Status': health, 'FailingStreak': failing, 'Log': []}
            self.find(id)['State'].update(state)

    def act(self, verb, id, **query):
        """Do what a person does: start, stop, restart, kill, pause, unpause, remove."""
        with self._moved:
            return getattr(self, '_' + verb)(self.find(id), query)

    def post(self, query, id, verb):
        return self.act(verb, id, **query)

    def crash(self, id, exit_code=137, **state):
        """Let a process end by itself; the kernel ends the containers that share its pids, too."""
        with self._moved:
            id = self.find(id)['Id']
            self.change(id, 'exited', exit_code, FinishedAt=self._now(), **state)
            self.emit('die', id, exitCode=str(exit_code))
            for other in self.containers.values():
                if other['HostConfig']['PidMode'] == 'container:' + id and other['State']['Pid']:
                    self.crash(other['Id'])

    def turn(self, id, health):
        """Let the health check of a running container come to another result."""
        self.change(id, 'running', health=health)
        self.emit('health_status: ' + health, id)

    def lag(self, id):
        """Let the list go on showing this container as it is now, until `stale.clear()`."""
        self.stale[id] = json.loads(json.dumps(self._list_entry(self.find(id))))

    def emit(self, action, id, **attributes):
        """Tell all who follow the events; of what is gone by now, give the container itself."""
        with self._moved:
            container = id if isinstance(id, dict) else self.find(id)
            config, id = container['Config'], container['Id']
            attributes.update(config['Labels'], image=config['Image'], name=container['Name'][1:])
            event = {} if self.api >= 52 else {'status': action, 'id': id, 'from': config['Image']}
            event.update(Type='container', Action=action, scope='local')
            event['Actor'] = {'ID': id, 'Attributes': attributes}
            self._now()
            event.update(time=self._moment // 10**9, timeNano=self._moment)
            self.events.append(event)
            for handler, query in self._streams:
                self._tell(handler, query, event)

    def say(self, data):
        """Write bytes that are no event to all who follow the events."""
        with self._moved:
            for handler, _ in self._streams:
                self._chunk(handler, data)

    def streams(self):
        """Return how many follow the events."""
        return len(self._streams)

    def cut_streams(self):
        with self._moved:
            self._cut([handler.connection for handler, _ in self._streams])

    def down(self, stale=False):
        """Let the engine be gone, its connections too; a stale socket stays, and refuses."""
        self._cut([self._listeners.pop(self.path)])
        self._cut([connection for connection, pid in list(self._connections.items()) if not pid])
        if not stale:
            os.unlink(self.path)

    def up(self):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        serve = functools.partial(Handler, client_address='', server=self)
        self._listeners[self.path] = self._listen(self.path, serve)

    def fault(self, request, **play):
        """Play for requests whose 'METHOD /path?query' begins like this regular expression.

        First: hang, delay=seconds, call=function. Then status and message, or garbage=bytes,
        instead of doing it; or do it, and close within the head of the answer (close) or within
        its body (half; with hang, hang there and not before). once: for one request only.
        """
        self._faults.append((request, play))

    def command(self, words, **play):
        """Play for commands that contain these words in this order.

        First: deaf (to SIGTERM), child (it holds the pipes), flood=MiB on standard error, out, err,
        endless. Then hang, delay=seconds, call=function. Then code; with out, err or code all this
        is instead of what the command does by itself. once: for one command only.
        """
        self._commands.append((words, play))

    def heal(self, *keys):
        """End these faults and commands, or all of them; what hangs goes on."""
        with self._moved:
            for key, play in self._faults + self._commands:
                if not keys or key in keys:
                    play.update(spent=True, released=True)
            self._moved.notify_all()

    # What the test asks

    def find(self, name):
        return pick(self.containers, name, 'No such container: {}')

    def state(self, name):
        return self.find(name)['State']['Status']

    def requests(self):
        return [entry for entry in self.log if isinstance(entry, str)]

    def calls(self):
        return [entry for entry in self.log if isinstance(entry, Call)]

    def commands(self):
        return [call.argv for call in self.calls()]

    def changes(self):
        """Return the requests and command lines that were to change something, in their order."""
        lines = []
        for entry in self.log:
            line = entry if isinstance(entry, str) else ' '.join(parse(entry)[0])
            if not READERS.match(line):
                lines.append(line if line is entry else ' '.join(entry.argv))
        return lines

    # Sockets and threads

    def _listen(self, path, serve):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(128)
        self._start_thread(self._accept, listener, serve)
        return listener

    def _start_thread(self, *task):
        thread = threading.Thread(target=task[0], args=task[1:], daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener, serve):
        with listener, contextlib.suppress(OSError):  # it is shut down
            while True:
                connection = listener.accept()[0]
                self._connections[connection] = None
                self._start_thread(self._serve, connection, serve)

    def _serve(self, connection, serve):
        with connection, contextlib.suppress(OSError):  # the other side has gone
            serve(connection)
        del self._connections[connection]

    def _cut(self, connections):
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self):
        """Leave no thread, no connection and no process."""
        self._closed = True
        self.heal()
        self._cut(self._listeners.values())
        for thread in self._threads:
            while thread.is_alive():
                for connection, pid in list(self._connections.items()):
                    if pid:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                    self._cut([connection])
                thread.join(0.05)

    def _take(self, plays, fits):
        with self._moved:
            for key, play in reversed(plays):
                if not play.get('spent') and fits(key):
                    play['spent'] = play.get('once', False)
                    return play
        return {}

    def _hold(self, play):
        with self._moved:
            if 'hang' in play or 'delay' in play:
                self._moved.wait_for(lambda: play.get('released'), play.get('delay'))
        if self._closed:
            raise ConnectionAbortedError
        if 'call' in play:
            play['call']()

    def _now(self, seconds=0):
        """Return a new moment as Docker writes it: without the zeros at its end."""
        self._moment = max(self._moment + 1, int(self.clock() * 10**9))
        second, nano = divmod(self._moment + seconds * 10**9, 10**9)
        text = time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(second))
        return '{}.{:09}'.format(text, nano).rstrip('0').rstrip('.') + 'Z'

    def _new_id(self, id):
        self._ids[id] += 1
        return id if self._ids[id] == 1 else '{}.{}'.format(id, self._ids[id])

    # The engine: how it answers

    def answer(self, handler):
        target = re.sub(r'^/v1\.\d+(?=/)', '', handler.path)
        request = handler.command + ' ' + urllib.parse.unquote(target)
        self.log.append(request)
        play = self._take(self._faults, lambda key: re.match(key, request))
        if 'half' not in play:
            self._hold(play)
        status, body = self._respond(handler.command, target, play)
        if body is None:
            return self._stream(handler, parse_query(target))
        raw = self._write_head(status, len(body)) + body
        if 'close' in play or 'half' in play:
            raw = raw[: -(len(body) // 2)] if 'half' in play and body else raw[:9]
        handler.wfile.write(play.get('garbage', raw))
        if 'half' in play:
            self._hold(play)
        handler.close_connection |= bool({'half', 'close', 'garbage'} & set(play))

    def _respond(self, method, target, play):
        """Return status and body of the answer."""
        try:
            if 'status' in play:
                raise Refusal(play['status'], play.get('message', 'told to fail'))
            answer = b'' if 'garbage' in play else self._route(method, target)
        except Refusal as error:
            return error.status, json.dumps({'message': str(error)}).encode() + b'\n'
        except ValueError as error:
            return 500, json.dumps({'message': str(error)}).encode() + b'\n'
        if isinstance(answer, int):
            return answer, b''
        text = answer is None or isinstance(answer, bytes)
        return 200, answer if text else json.dumps(answer).encode() + b'\n'

    def _route(self, method, target):
        line = method + ' ' + urllib.parse.unquote(target.partition('?')[0])
        for route, action in ROUTES.items():
            match = re.match(route + '$', line)
            if match:
                with self._moved:
                    return action(self, parse_query(target), *match.groups())
        raise Refusal(404, 'page not found')

    def _write_head(self, status, length):
        date = email.utils.formatdate(self.clock(), usegmt=True)
        lines = ['HTTP/1.1 {} {}'.format(status, http.client.responses[status]), 'Date: ' + date]
        lines += ['Api-Version: 1.{}'.format(self.api), 'Content-Type: application/json']
        if length is None:
            lines.append('Transfer-Encoding: chunked')
        elif status not in (204, 304):
            lines.append('Content-Length: {}'.format(length))
        return '\r\n'.join(lines + ['', '']).encode()

    def check_times(self, query):
        """Raise ValueError for a time that is no number: the stream itself is `_stream`."""
        nanoseconds(query.get('since', '0'))

    def _stream(self, handler, query):
        """Write events until the other side goes, the stream is cut, or it is `until`."""
        since = nanoseconds(query['since']) if 'since' in query else 2**64
        with self._moved:
            handler.wfile.write(self._write_head(200, None))
            for event in self.events:
                if event['timeNano'] >= since:
                    self._tell(handler, query, event)
            self._streams.append((handler, query))
        seconds = max(0, float(query['until']) - self.clock()) if 'until' in query else None
        select.select([handler.connection], [], [], seconds)
        with self._moved:
            self._streams.remove((handler, query))
        handler.wfile.write(b'0\r\n\r\n')
        handler.close_connection = True

    def _tell(self, handler, query, event):
        labels, action = event['Actor']['Attributes'], event['Action']
        names = [event['Actor']['ID'], labels['name']]
        actions = [action, action.partition(':')[0]]
        if passes(query, labels, type=['container'], event=actions, container=names):
            self._chunk(handler, json.dumps(event).encode() + b'\n')

    def _chunk(self, handler, data):
        with contextlib.suppress(OSError):
            handler.wfile.write('{:x}\r\n'.format(len(data)).encode() + data + b'\r\n')

    # The engine: what it shows

    def list(self, query):
        entries = []
        for id, container in reversed(list(self.containers.items())):
            entry = self.stale.get(id) or self._list_entry(container)
            facts = {'id': [id], 'name': [entry['Names'][0][1:]], 'status': [entry['State']]}
            shown = entry['State'] in ALIVE or query.get('all') in ('1', 'true')
            if shown and passes(query, entry['Labels'], **facts):
                entries.append(entry)
        return entries

    def _list_entry(self, container):
        config, state = container['Config'], container['State']
        entry = {key: container[key] for key in ('Id', 'NetworkSettings', 'Mounts')}
        entry.update(Names=[container['Name']], Image=config['Image'], ImageID=container['Image'])
        entry.update(Labels=config['Labels'], Created=seconds_of(container['Created']))
        entry.update(State=state['Status'], Status=self._describe(state))
        entry['HostConfig'] = {'NetworkMode': container['HostConfig']['NetworkMode']}
        if self.api >= 52 and 'Health' in state:
            entry['Health'] = {key: state['Health'][key] for key in ('Status', 'FailingStreak')}
        return entry

    def _describe(self, state):
        """Return what the list says of a state in words."""
        moment = state['StartedAt' if state['Running'] else 'FinishedAt']
        seconds = int(self.clock()) - seconds_of(moment)
        age = '{} minutes'.format(seconds // 60) if seconds > 119 else '{} seconds'.format(seconds)
        health = state.get('Health', {}).get('Status', '')
        health = {'': '', 'starting': ' (health: starting)'}.get(health, ' ({})'.format(health))
        return {
            'running': 'Up {1}{2}',
            'paused': 'Up {1} (Paused)',
            'exited': 'Exited ({0}) {1} ago',
            'restarting': 'Restarting ({0}) {1} ago',
            'removing': 'Removal In Progress',
        }.get(state['Status'], state['Status'].capitalize()).format(state['ExitCode'], age, health)

    def read_logs(self, query, id):
        if not {'stdout', 'stderr'} & set(query):
            raise Refusal(400, 'Bad parameters: you must choose at least one stream')
        lines = self.logs.get(self.find(id)['Id'], b'').splitlines(True)
        if query.get('tail', 'all') != 'all':
            lines = lines[-int(query['tail']) :]
        return b''.join(struct.pack('>BxxxI', 1, len(line)) + line for line in lines)

    def list_networks(self, query):
        networks = self.networks.values()
        return [n for n in networks if passes(query, n['Labels'], id=[n['Id']], name=[n['Name']])]

    def show_network(self, query, name):
        network = pick(self.networks, name, 'network {} not found')
        return dict(network, Containers={id: {} for id in self._find_users(network['Id'])})

    def _find_users(self, network):
        users = []
        for container in self.containers.values():
            ids = [n['NetworkID'] for n in container['NetworkSettings']['Networks'].values()]
            users += [container['Id']] * (container['State']['Running'] and network in ids)
        return users

    def list_images(self, query):
        dangling = {True: ['false', '0'], False: ['true', '1']}
        images = self.images.values()
        return [
            i for i in images if passes(query, i['Labels'], dangling=dangling[bool(i['RepoTags'])])
        ]

    def show_image(self, query, name):
        image = dict(pick(self.images, name, 'No such image: {}:latest'), Created=NEVER)
        return dict(image, Config={'Labels': image.pop('Labels')})

    # The engine: what it does

    def _start(self, container, query):
        state = container['State']
        if state['Paused']:
            raise Refusal(409, 'cannot start a paused container, try unpause instead')
        if state['Running']:
            return 304
        try:
            self._check_surroundings(container)
        except Refusal as error:
            state.update(Error=str(error), ExitCode=state['ExitCode'] or 128)
            raise
        health = 'starting' if 'Health' in state else ''
        self.change(container['Id'], 'running', 0, health, StartedAt=self._now(), Error='')
        self.emit('start', container)
        return 204

    def _check_surroundings(self, container):
        """Raise Refusal, with 20.10's status, if what the container was made for isn't there."""
        for mode in MODES.values():
            kind, _, owner = container['HostConfig'][mode].partition(':')
            network = mode == 'NetworkMode'
            if kind == 'container' and owner not in self.containers:
                raise Refusal(404 if network else 500, 'No such container: ' + owner)
            if kind == 'container' and not self.containers[owner]['State']['Running']:
                text = 'cannot join {} of a non running container: {}'
                raise Refusal(409 if network else 500, text.format(mode[:-4].lower(), owner))
        self._connect(container)
        for name, network in container['NetworkSettings']['Networks'].items():
            if network['NetworkID'] not in self.networks:
                raise Refusal(404, 'network {} not found'.format(network['NetworkID'] or name))

    def _stop(self, container, query):
        state = container['State']
        if not state['Running']:
            return 304
        if state['Restarting']:
            self.change(container['Id'], 'exited', state['ExitCode'])
        else:
            self._kill(container, {'signal': 'TERM'})
        self.emit('stop', container)
        return 204

    def _kill(self, container, query):
        id, name = container['Id'], query.get('signal', 'KILL')
        number = int(name) if name.isdigit() else signal.Signals['SIG' + name.replace('SIG', '')]
        if container['State']['Status'] not in ('running', 'paused'):
            text = 'Cannot kill container: {0}: Container {0} is not running'
            raise Refusal(409, text.format(id))
        self.emit('kill', container, signal=str(int(number)))
        if container['State']['Paused'] and number == signal.SIGTERM:
            self.emit('unpause', container)
        if number in (signal.SIGKILL, signal.SIGTERM):
            self.crash(id, 128 + number)
        return 204

    def _restart(self, container, query):
        self._stop(container, query)
        try:
            self._start(container, query)
        except Refusal as error:
            text = 'Cannot restart container {}: {}'
            raise Refusal(500, text.format(container['Name'][1:], error)) from error
        self.emit('restart', container)
        return 204

    def _pause(self, container, query):
        state = container['State']
        if state['Paused'] or not state['Running']:
            what = 'already paused' if state['Paused'] else 'not running'
            raise Refusal(409, 'Container {} is {}'.format(container['Id'], what))
        self.change(container['Id'], 'paused')
        self.emit('pause', container)
        return 204

    def _unpause(self, container, query):
        if not container['State']['Paused']:
            raise Refusal(500, 'Container {} is not paused'.format(container['Id']))
        self.change(container['Id'], 'running')
        self.emit('unpause', container)
        return 204

    def _remove(self, container, query):
        if container['State']['Running'] and query.get('force') not in ('1', 'true'):
            text = 'You cannot remove a running container {}. Stop the container before'
            raise Refusal(409, text.format(container['Id']))
        if container['State']['Running']:
            self._kill(container, {})
        del self.containers[container['Id']]
        self.emit('destroy', container)
        return 204

    def remove_network(self, query, name):
        network = pick(self.networks, name, 'network {} not found')
        if self._find_users(network['Id']):
            text = 'error while removing network: network {Name} id {Id} has active endpoints'
            raise Refusal(403, text.format(**network))
        del self.networks[network['Id']]
        return 204

    def remove_image(self, query, name):
        image = pick(self.images, name, 'No such image: {}:latest')
        if image['Id'] in [container['Image'] for container in self.containers.values()]:
            text = 'conflict: unable to delete {} (must be forced) - image is being used'
            raise Refusal(409, text.format(image['Id']))
        del self.images[image['Id']]
        return [{'Untagged': tag} for tag in image['RepoTags']] + [{'Deleted': image['Id']}]

    def prune_images(self, query):
        gone = []
        for image in self.list_images(query):
            with contextlib.suppress(Refusal):
                gone += [] if image['RepoTags'] else self.remove_image({}, image['Id'])
        return {'ImagesDeleted': gone or None, 'SpaceReclaimed': 0}

    # The commands

    def _obey(self, connection):
        """Tell a command what to do; one without a command line is a child that holds the pipes."""
        pid, *call = json.loads(connection.makefile().readline() or '[0]')
        self._connections[connection] = pid
        if call:
            self._direct(connection, Call(*call))
        elif pid:
            self.children.append(pid)
        connection.recv(1)  # until it has ended

    def _direct(self, connection, call):
        self.log.append(call)
        line = ['compose'] * (call.program == 'docker-compose') + call.argv
        play = self._take(self._commands, lambda key: contains(line, key.split()))
        first = {key: value for key, value in play.items() if key in BEFORE}
        connection.sendall(json.dumps(first).encode() + b'\n')
        self._hold(play)
        told = {'code', 'out', 'err'} & set(play)
        last = {'code': play.get('code', 0)} if told else self._perform(call)
        connection.sendall(json.dumps(last).encode() + b'\n')

    def _perform(self, call):
        """Return what a command prints and its exit code."""
        words, options = parse(call)
        verb = ' '.join(words[:2])
        try:
            if verb not in COMMANDS:
                raise Refusal(1, 'docker: unknown command: docker ' + verb)
            if self.compose[0] == '1' and 'compose' in call.argv:
                raise refuse_compose(call.argv[call.argv.index('compose') + 1 :])
            if self.path not in self._listeners and not OFFLINE.match(verb):
                raise Refusal(1, 'Cannot connect to the Docker daemon at unix://' + self.path)
            with self._moved:
                step = COMMANDS[verb](self, words[2:], dict(call.env, **options))
            return dict({'code': 0}, **step)
        except Refusal as error:
            prefix = 'Error response from daemon: ' if error.status >= 300 else ''
            code = 1 if error.status >= 300 else error.status
            return {
                'out': '\n' * verb.startswith('context'),
                'err': prefix + str(error) + '\n',
                'code': code,
            }

    def _inspect_context(self, names, options):
        name = (names or [options.get('--context') or options.get('DOCKER_CONTEXT') or 'default'])[
            0
        ]
        host = self.contexts.get(name)
        if not names and '--context' not in options:
            host = options.get('DOCKER_HOST') or host
        if host is None:
            raise Refusal(1, 'context "{}": context not found'.format(name))
        context = {'Name': name, 'Endpoints': {'docker': {'Host': host}}}
        form = options.get('--format') or options.get('-f') or json.dumps([context])
        return {
            'out': form.replace('{{.Name}}', name).replace('{{.Endpoints.docker.Host}}', host)
            + '\n'
        }

    def print_config(self, names, options):
        if self.config is not None or self.compose[0] == '1':
            usage = 'Validate and view the Compose file.\n\nUsage: config [options]\n'
            return {'err': usage} if '--format' in options else {'out': self.config or ''}
        name = options.get('-p') or options.get('--project-name') or self.project
        networks = {'default': {'name': name + '_default', 'ipam': {}}}
        config = {'name': name, 'networks': networks, 'services': self.services}
        return {'out': json.dumps(config, indent=2) + '\n'}

    def bring_up(self, names=(), options=()):
        """Create and start what these services need, or all."""
        wanted = list(names or self.services)
        for name in wanted:  # it grows
            if name not in self.services:
                raise Refusal(1, 'no such service: ' + name)
            needs = () if '--no-deps' in options else self.services[name].get('depends_on', ())
            wanted += [need for need in needs if need not in wanted]
        if self.project + '_default' not in [n['Name'] for n in self.networks.values()]:
            self.add_network(self.project + '_default')
        for name in sorted(wanted, key=self._depth):
            service = self.services[name]
            scale = service.get('scale', service.get('deploy', {}).get('replicas', 1))
            for number in range(1, 1 + scale * ('provider' not in service)):
                self._bring_up_one(name, number, options)
        return {'err': ''.join(' Container {}  Started\n'.format(name) for name in wanted)}

    def _depth(self, name):
        return 1 + max(map(self._depth, self.services[name].get('depends_on', ())), default=0)

    def _bring_up_one(self, name, number, options):
        old = (self._list_ids(name, number) or [None])[0]
        modes = {key: self._resolve(self.services[name].get(key)) for key in MODES}
        new = old
        if old is None or '--force-recreate' in options or self._differs(old, modes, options):
            health = 'starting' if 'healthcheck' in self.services[name] else ''
            new = self.add(name, 'created', number, health=health, **modes)
            self.emit('create', new)
        if old not in (None, new):
            self.act('stop', old)
            self.act('remove', old)
            self.emit('rename', new)
        if '--no-start' not in options:
            self.act('start', new)

    def _differs(self, id, modes, options):
        host = self.containers[id]['HostConfig']
        changed = any(mode and host[MODES[key]] != mode for key, mode in modes.items())
        return changed and '--no-recreate' not in options

    def _resolve(self, mode):
        kind, _, service = (mode or '').partition(':')
        return 'container:' + self._list_ids(service)[0] if kind == 'service' else mode

    def _list_ids(self, service=None, number=None):
        ids = []
        for id, container in self.containers.items():
            labels = container['Config']['Labels']
            ours = labels[LABEL + 'project'] == self.project and labels[LABEL + 'oneoff'] == 'False'
            ours = ours and service in (None, labels[LABEL + 'service'])
            if ours and str(number) in ('None', labels[LABEL + 'container-number']):
                ids.append((int(labels[LABEL + 'container-number']), id))
        return [id for _, id in sorted(ids)]

    def act_on(self, verb, names):
        """Do the same to all containers of these services, or of all."""
        for id in sum((self._list_ids(name) for name in names or [None]), []):
            self.act(verb, id)
        return {}

    def bring_down(self, names, options):
        self.act_on('stop', ())
        self.act_on('remove', ())
        for id, network in list(self.networks.items()):
            if network['Labels'].get(LABEL + 'project') == self.project:
                with contextlib.suppress(Refusal):  # in use
                    self.remove_network({}, id)
        return {}


ROUTES = {
    'GET /_ping': lambda world, query: b'OK',
    'GET /version': lambda world, query: {'ApiVersion': '1.{}'.format(world.api), 'Os': 'linux'},
    'GET /info': lambda world, query: {'ID': 'scripted', 'Containers': len(world.containers)},
    'GET /containers/json': ScriptedEngine.list,
    'GET /containers/([^/]+)/json': lambda world, query, id: world.find(id),
    'GET /containers/([^/]+)/logs': ScriptedEngine.read_logs,
    'POST /containers/([^/]+)/(start|stop|restart|kill|pause|unpause)': ScriptedEngine.post,
    'DELETE /containers/([^/]+)': lambda world, query, id: world.post(query, id, 'remove'),
    'GET /events': ScriptedEngine.check_times,
    'GET /(services|tasks)': lambda world, _, kind: world.swarm[kind],
    'GET /networks': ScriptedEngine.list_networks,
    'GET /networks/([^/]+)': ScriptedEngine.show_network,
    'DELETE /networks/([^/]+)': ScriptedEngine.remove_network,
    'GET /images/json': ScriptedEngine.list_images,
    'GET /images/(.+)/json': ScriptedEngine.show_image,
    'DELETE /images/(.+)': ScriptedEngine.remove_image,
    'POST /images/prune': ScriptedEngine.prune_images,
}
COMMANDS = {
    'context inspect': ScriptedEngine._inspect_context,
    'system dial-stdio': lambda world, names, options: {'bridge': world.path},
    'system prune': lambda world, names, options: {},
    'version': lambda world, names, options: {'out': 'Docker version 20.10.24\n'},
    'compose version': lambda world, names, options: {
        'out': ('' if '--short' in options else 'Docker Compose version v') + world.compose + '\n'
    },
    'compose config': ScriptedEngine.print_config,
    'compose up': ScriptedEngine.bring_up,
    'compose down': ScriptedEngine.bring_down,
    'compose ps': lambda world, names, options: {
        'out': ''.join(i + '\n' for i in world._list_ids())
    },
}
for verb in ('start', 'stop', 'restart', 'kill', 'pause', 'unpause'):
    COMMANDS['compose ' + verb] = lambda world, names, _, verb=verb: world.act_on(verb, names)


def play_world(tmp_path, monkeypatch):
    """A scripted engine, a docker on PATH that knows it, and a folder with a Compose file."""
    bin, shop, sockets = tmp_path / 'bin', tmp_path / 'shop', tempfile.mkdtemp(prefix='w')
    bin.mkdir(), shop.mkdir()
    (shop / 'compose.yml').write_text('services: {}\n')
    for name in ('sh', 'cat', 'sleep'):
        (bin / name).symlink_to(shutil.which(name))
    monkeypatch.chdir(str(shop))
    engine = ScriptedEngine(pathlib.Path(sockets), bin)
    engine.install('docker')
    monkeypatch.setenv('PATH', str(bin))
    monkeypatch.setenv('DOCKER_HOST', 'unix://' + engine.path)
    monkeypatch.delenv('DOCKER_CONTEXT', raising=False)
    yield engine
    engine.close()
    shutil.rmtree(sockets)


world = pytest.fixture(play_world, name='world')


# -- fixtures and builders -------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _same_world(monkeypatch):
    """No setting from outside; flag, signals and logging as they were, before and after it."""
    outside = ('BROAPT_', 'COMPOSE_', 'NOTIFY_', 'WATCHDOG_')
    for name in [name for name in os.environ if name.startswith(outside)]:
        if not name.startswith('BROAPT_TEST_'):
            monkeypatch.delenv(name)
    monkeypatch.setattr(logging, 'raiseExceptions', True)
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    handlers = {signum: signal.getsignal(signum) for signum in signals}
    bc.UP_FLAG.value = True
    yield
    bc.UP_FLAG.value = True
    bc.logger.setLevel(logging.NOTSET)
    bc._Signals.previous.clear()
    bc._Signals.noted.clear()
    bc._Signals.deaf_until, bc._Signals.number = 0.0, None
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


class Clock:
    """A clock that the test moves."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


FAST = Settings(settle=0, timeout=20, interval=3600)
FOREVER = 3600  # seconds; pytest-timeout ends it


def make(service='core', state='running', **fields):
    """Return a container; the id is the service's name and number unless given."""
    number = fields.setdefault('number', '1')
    name = 'shop-{}-{}'.format(service, number)
    values = {'id': service + number, 'name': name, 'since': 100.0, 'folder': '/shop', **fields}
    if state == 'exited':
        values.setdefault('exit_code', 137)
    return Container(service=service, state=State(state), **values)


def gone(pid):
    try:
        with open('/proc/{}/stat'.format(pid)) as file:
            return file.read().rpartition(')')[2].split()[0] == 'Z'
    except OSError:
        return True


def eventually(predicate, seconds=20.0):
    """Return whether the predicate comes true within a generous time."""
    end = time.monotonic() + seconds
    pause = threading.Event()
    while not predicate():
        if time.monotonic() > end:
            return False
        pause.wait(0.02)
    return True


@contextlib.contextmanager
def meanwhile(*task):
    """Let a function be called in a thread during the block; see that it ends."""
    thread = threading.Thread(target=task[0], args=task[1:], daemon=True)
    thread.start()
    yield thread
    thread.join(30)
    assert not thread.is_alive()


@contextlib.contextmanager
def warned():
    """Give the texts of the ComposeWarnings that are issued in the block."""
    texts = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        try:
            yield texts
        finally:
            texts += [str(w.message) for w in caught if w.category is ComposeWarning]


@contextlib.contextmanager
def watch(settings=FAST, clock=time.monotonic, notify=str):
    """Give a watch whose cycles the test runs itself."""
    with contextlib.closing(bc._Stack(settings, notify)) as stack:
        with contextlib.closing(bc._Watch(stack, clock)) as watch:
            yield watch


def hear(watch, world):
    """Give the watch all events that it has not heard of."""
    watch.events.extend(json.loads(json.dumps(list(world.events))))
    world.events.clear()


def finish(watch):
    """Wait for the repairs under way, and take note of them."""
    while watch.busy:
        assert watch.wake.wait(20)
        watch.wake.clear()
        watch.take_results()


def run_cycle(watch):
    """Look once, repair what is due, and return in how many seconds the next look was wanted."""
    timeout = watch.cycle()
    finish(watch)
    return timeout


def summary(world):
    """Return what was done, in short: the verb, and the container's id or Compose's arguments."""
    lines = []
    for line in world.changes():
        line = re.sub(r'^POST /containers/(.*)/(\w+)(\?.*)?$', r'\2 \1', line)
        line = re.sub(r'^DELETE /(container|network)s/(\w+).*', r'remove \1 \2', line)
        lines.append(re.sub('remove container', 'remove', line))
    return lines


def run_module(*arguments, **kwargs):
    environment = dict(os.environ, PYTHONPATH=str(HERE), **kwargs.pop('env', {}))
    return subprocess.run(
        [sys.executable, '-m', 'broapt_compose', *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
        env=environment,
        stdin=subprocess.DEVNULL,
        timeout=120,
        **kwargs,
    )


def run_python(code, cwd, *options, **environment):
    """Return what a script prints."""
    variables = dict(os.environ, **environment)
    variables.pop('PYTHONPATH', None)
    command = [sys.executable, *options, '-c', textwrap.dedent(code)]
    return subprocess.check_output(
        command, cwd=str(cwd), env=variables, universal_newlines=True, timeout=60
    )


@contextlib.contextmanager
def script(code, *arguments, **kwargs):
    """Run a script that uses the module in a process of its own; give the process."""
    command = [sys.executable, '-c', textwrap.dedent(code), *map(str, arguments)]
    kwargs.setdefault('stdout', subprocess.PIPE)
    environment = dict(os.environ, PYTHONPATH=str(HERE))
    with subprocess.Popen(command, env=environment, universal_newlines=True, **kwargs) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


@contextlib.contextmanager
def forked(function):
    """Call the function in a forked child; give its pid, and see it end with the exit code 0."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    yield pid
    assert os.waitpid(pid, 0)[1] == 0


# -- errors and warnings ---------------------------------------------------------------------------


def test_error_is_one_line_with_the_command_its_code_and_the_last_thing_that_was_said():
    told = (
        'Error: an early one\nnoise\n\n\x1b[31mdependency db failed to start\nSee "docker --help"\n'
    )
    error = ComposeError(['docker', 'compose', 'a b'], 1, told.replace('"', "'"))
    assert str(error) == "docker compose 'a b': exit code 1:  [31mdependency db failed to start"
    assert (error.command, error.returncode) == (['docker', 'compose', 'a b'], 1)
    assert error.stderr.startswith('Error: an early one')


def test_error_of_a_request_has_its_status_and_the_engines_message():
    error = ComposeError(('POST', '/containers/core/start'), 409, 'it is\npaused')
    assert str(error) == 'POST /containers/core/start: status 409: paused'
    assert (error.command, error.returncode) == (['POST', '/containers/core/start'], 409)


def test_long_ids_and_arguments_are_shortened_in_an_error():
    error = ComposeError(('POST', '/containers/' + 64 * 'a' + '/start'), None, '', 'x' * 999)
    assert str(error).startswith('POST /containers/aaaaaaaaaaaa/start: xxx')
    assert len(str(error)) < 600
    assert len(str(ComposeError(['docker', 'x' * 999], 1, ''))) < 150


def test_error_can_be_pickled_as_a_watcher_process_needs_it():
    error = ComposeError(['docker'], 1, 'no')
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) and copy.returncode == 1


def test_same_warning_is_issued_each_time_and_never_raised():
    with warned() as texts:
        for _ in range(2):
            bc._warn('two\nlines')
    assert texts == ['two lines'] * 2
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        bc._warn('not raised')


# -- output ----------------------------------------------------------------------------------------


@pytest.fixture
def pipe():
    """Both ends of a pipe, as files."""
    reading, writing = os.pipe()
    with open(reading, 'rb') as reader, open(writing, 'w') as writer:
        yield reader, writer


def test_full_pipe_that_nobody_reads_blocks_no_writer_and_what_was_dropped_is_told(pipe):
    reader, writer = pipe
    outlet = bc._Outlet(writer)
    for number in range(5000):
        outlet.write('{:0100}\n'.format(number))
    assert outlet.dropped
    lines = []
    while not lines or 'dropped' not in lines[-1]:
        lines.append(reader.readline().decode())
    count = int(lines[-1].split()[0])
    assert lines[-1] == '{} lines were dropped: nobody read them\n'.format(count)
    assert count + len(lines) - 1 == 5000 and lines[:-1] == sorted(lines[:-1])
    outlet.write('it flows again\n')
    assert reader.readline() == b'it flows again\n'
    outlet.close()
    assert not outlet.thread.is_alive()


def test_lines_that_were_dropped_are_told_although_it_ends_as_soon_as_it_flows_again(pipe):
    reader, writer = pipe
    outlet = bc._Outlet(writer)
    while not outlet.dropped:
        outlet.write('x' * 1000 + '\n')
    reader.read(1 << 17)  # not all
    assert eventually(lambda: not outlet.queue.full())
    text = []
    with meanwhile(lambda: text.append(reader.read())):
        outlet.close()
        writer.close()
    assert b' lines were dropped: nobody read them\n' in text[0]


def test_output_can_be_closed_although_nobody_reads_it(pipe):
    outlet = bc._Outlet(pipe[1])
    while not outlet.dropped:
        outlet.write('x' * 1000)
    outlet.close()


def test_pipe_that_does_not_block_loses_no_line_untold(pipe):
    reader, writer = pipe
    os.set_blocking(writer.fileno(), False)
    outlet, text = bc._Outlet(writer), []
    for number in range(5000):
        outlet.write('{:0100}\n'.format(number))
    with meanwhile(lambda: text.extend(reader.read().decode().splitlines())):
        assert eventually(outlet.queue.empty)
        outlet.close()
        writer.close()
    dropped = [int(line.split()[0]) for line in text if 'were dropped' in line]
    assert len(text) - len(dropped) + sum(dropped) == 5000


def test_stream_with_a_high_descriptor_is_written_like_any_other(pipe):
    reader, writer = pipe
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2000:
        pytest.skip('no descriptor above 1024 is to be had')
    resource.setrlimit(resource.RLIMIT_NOFILE, (2000, hard))
    try:
        with open(fcntl.fcntl(writer, fcntl.F_DUPFD_CLOEXEC, 1500), 'w') as high:
            outlet = bc._Outlet(high)
            outlet.write('a line\n')
            assert reader.readline() == b'a line\n'
            outlet.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_forked_child_writes_by_itself(pipe):
    reader, writer = pipe
    outlet = bc._Outlet(writer)

    def child():
        outlet.write('from the child\n')
        outlet.close()

    with forked(child):
        assert reader.readline() == b'from the child\n'
    outlet.write('from the parent\n')
    assert reader.readline() == b'from the parent\n'
    outlet.close()


@pytest.mark.parametrize('kind', ['closed', 'none', 'full'])
def test_stream_that_cannot_be_written_to_is_no_matter(kind):
    stream = {'closed': open(os.devnull), 'none': None, 'full': open('/dev/full', 'w')}[kind]
    if kind == 'closed':
        stream.close()
    outlet = bc._Outlet(stream)
    outlet.write('a')
    outlet.write(b'b')
    outlet.close()
    assert not outlet.thread.is_alive()


# -- settings --------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_contract():
    assert Settings.load() == Settings()
    assert Settings()._asdict() == {
        'docker_compose': (),
        'interval': 10,
        'kill_signal': 15,
        'watcher': bc.Watcher.THREAD,
        'settle': 1,
        'timeout': 60,
        'prune': bc.Prune.PROJECT,
        'unhealthy': bc.Unhealthy.RESTART,
        'on_exit': bc.OnExit.STOP,
        'mode': bc.Mode.COMPOSE,
        'compose_command': (),
    }


def test_argument_comes_before_environment_and_empty_variable_counts_as_unset(
    monkeypatch, tmp_path
):
    files = [tmp_path / 'a.yml', tmp_path / '-b c.yml']
    for file in files:
        file.write_text('services: {}')
    monkeypatch.setenv('BROAPT_DOCKER_COMPOSE', os.pathsep.join(map(str, files)))
    monkeypatch.setenv('BROAPT_INTERVAL', '2.5')
    monkeypatch.setenv('BROAPT_SETTLE', '')
    monkeypatch.setenv('BROAPT_ON_EXIT', 'leave')
    monkeypatch.setenv('BROAPT_COMPOSE_COMMAND', "docker-compose -p 'a b'")
    settings = Settings.load(interval='3', kill_signal='sigint')
    assert settings.docker_compose == tuple(map(str, files))
    assert (settings.interval, settings.kill_signal, settings.settle) == (3, signal.SIGINT, 1)
    assert settings.compose_command == ('docker-compose', '-p', 'a b')
    assert settings.on_exit is bc.OnExit.LEAVE
    assert Settings.load().interval == 2.5


@pytest.mark.parametrize(
    'value, number',
    [(15, 15), ('15', 15), ('TERM', 15), ('sigterm', 15), (signal.SIGHUP, 1)],
)
def test_signal_is_a_number_or_a_name(value, number):
    assert Settings.load(kill_signal=value).kill_signal == number


@pytest.mark.parametrize(
    'field, values',
    [
        ('interval', ['0', '-1', 'nan', 'inf', 'abc', 0, float('nan'), [], '1e999']),
        ('timeout', ['0', '-1', 'nan', 'inf', 'abc']),
        ('settle', ['-1', 'nan', 'inf', 'abc']),
        ('kill_signal', ['KILL', 'SIGKILL', '9', 9, 'STOP', '19', 'FOO', '0', '99', '-1', 'SIG']),
        ('watcher', ['fork', 'Thread']),
        ('prune', ['all']),
        ('unhealthy', ['stop']),
        ('on_exit', ['kill']),
        ('mode', ['nomad']),
        ('compose_command', ["'", '', ' ', []]),
        ('docker_compose', ['/none/such.yml', '/', ['/none'], 'a\0b', 7, '', os.pathsep, ['']]),
    ],
)
def test_bad_value_is_one_line_naming_setting_and_value(field, values, monkeypatch):
    for value in values:
        with pytest.raises(ValueError) as caught:
            Settings.load(**{field: value})
        assert repr(value) in str(caught.value) and '\n' not in str(caught.value)
        if isinstance(value, str) and value and '\0' not in value:
            monkeypatch.setenv('BROAPT_' + field.upper(), value)
            with pytest.raises(ValueError, match='^BROAPT_{}: '.format(field.upper())):
                Settings.load()
            monkeypatch.delenv('BROAPT_' + field.upper())


def test_unknown_setting_is_a_type_error():
    with pytest.raises(TypeError, match='intervall'):
        Settings.load(intervall=3)


SHOW = (
    'import sys; sys.path.insert(0, "."); {}; import compose; '
    's = compose.Settings.load(); print(s.interval, s.kill_signal)'
)


def test_vendored_copy_reads_const_beside_it_and_the_original_does_not(tmp_path):
    shutil.copy(str(MODULE), str(tmp_path / 'compose.py'))
    code = SHOW.format('pass')
    assert run_python(code, tmp_path, '-I', BROAPT_INTERVAL='7') == '7.0 15\n'
    const = 'KILL_SIGNAL = 10\nINTERVAL = 4\nTIMEOUT = "not a setting of the watchdog"\n'
    (tmp_path / 'const.py').write_text(const)
    assert run_python(code, tmp_path, '-I', BROAPT_INTERVAL='7') == '4.0 10\n'
    version = subprocess.check_output(
        [sys.executable, '-m', 'compose', '-V'], cwd=str(tmp_path), universal_newlines=True
    )
    assert version == 'broapt_compose {}\n'.format(bc.__version__)


def test_const_that_the_host_has_loaded_is_read_wherever_it_is(tmp_path):
    (tmp_path / 'lib').mkdir()
    shutil.copy(str(MODULE), str(tmp_path / 'lib' / 'compose.py'))
    load = 'import types; const = types.ModuleType("const"); {}; sys.modules["const"] = const; '
    load += 'sys.path.insert(0, "lib")'
    code = SHOW.format(load.format('const.KILL_SIGNAL = 12; const.INTERVAL = "6"'))
    assert run_python(code, tmp_path, '-I') == '6.0 12\n'
    code = SHOW.format(load.format('const.INTERVAL = 3'))  # somebody else's module of that name
    assert run_python(code, tmp_path, '-I') == '10.0 15\n'


def test_import_has_no_side_effects(tmp_path):
    code = """
        import logging, os, signal, sys, threading
        def look():
            handlers = [signal.getsignal(number) for number in range(1, 32)]
            return handlers, dict(os.environ), os.listdir('/proc/self/fd')
        before = look()
        sys.path.insert(0, {!r})
        import broapt_compose
        assert before == look() and threading.active_count() == 1 and not logging.root.handlers
        late = ['argparse', 'flask', 'http.client', 'multiprocessing', 'ssl']
        print([name for name in late if name in sys.modules])
    """
    assert run_python(code.format(str(HERE)), tmp_path, '-I', BROAPT_INTERVAL='abc') == '[]\n'


# -- the flag --------------------------------------------------------------------------------------


def test_flag_is_an_event_that_is_up_at_import_and_has_a_value():
    flag = bc.UpFlag()
    assert isinstance(bc.UP_FLAG, threading.Event) and flag.value is True and flag.is_set()
    flag.value = False
    assert flag.value is False and not flag.wait(0)
    flag.value = True
    assert flag.value is True


def test_lowering_the_flag_calls_whoever_waits_for_it_at_once_and_never_after_the_block():
    flag, calls = bc.UpFlag(), []
    with flag.when_lowered(lambda: calls.append('first')):
        flag.value = True
        assert calls == []
        flag.clear()
        assert calls == ['first']
        with flag.when_lowered(lambda: calls.append('late')):
            assert calls == ['first', 'late']
    flag.value = False
    assert calls == ['first', 'late']


def test_forked_child_that_lowers_the_flag_calls_nothing_of_its_parents():
    flag, calls = bc.UpFlag(), []

    def child():
        flag.value = False
        assert not flag.value and calls == []
        with flag.when_lowered(lambda: calls.append('mine')):
            assert calls == ['mine']

    with flag.when_lowered(lambda: calls.append('parents')):
        with forked(child):
            pass
        assert flag.value and calls == []
        flag.value = False
        assert calls == ['parents']


def test_forked_child_is_not_stuck_in_what_another_thread_of_its_parent_was_doing():
    flag, inside, leave = bc.UpFlag(), threading.Event(), threading.Event()

    def child():
        flag.value = False
        flag.value = True
        with flag.when_lowered(inside.clear):
            flag.value = False

    def stay():
        inside.set()
        leave.wait(FOREVER)

    with flag.when_lowered(stay), meanwhile(flag.clear):
        assert inside.wait(20)
        with forked(child):
            pass
        leave.set()


# -- processes -------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path):
    return bc._Place(str(tmp_path), {})


def run(place, code, *arguments, **kwargs):
    """Run a shell script as the module runs commands."""
    command = ('/bin/sh', '-c', code, 'sh', *map(str, arguments))
    return bc._run(command, kwargs.pop('limit', 60), place, **{'flag': bc.UpFlag(), **kwargs})


LINGER = 'sleep 600 & echo $! >child; '  # a child that holds the pipes


def child_of(place):
    return (pathlib.Path(place.folder) / 'child').read_text()


def test_output_comes_back_and_errors_are_told_with_the_exit_code(place):
    assert run(place, 'echo "$1"; echo noise >&2', 'a  "b"\n') == 'a  "b"\n\n'
    with pytest.raises(ComposeError) as caught:
        run(place, 'echo out; echo one >&2; echo two >&2; exit 17')
    assert (caught.value.returncode, caught.value.stderr) == (17, 'one\ntwo\n')
    assert str(caught.value).endswith(': exit code 17: two')


def test_command_that_hangs_is_killed_with_its_whole_group_at_the_deadline(place):
    with pytest.raises(ComposeError, match=': no answer within 0.5 s$') as caught:
        run(place, LINGER + 'echo half; sleep 600', limit=0.5)
    assert caught.value.returncode is None
    assert eventually(lambda: gone(child_of(place)))


def test_answer_is_returned_although_a_process_left_behind_holds_the_pipes(place):
    assert run(place, LINGER + 'echo all') == 'all\n'
    assert eventually(lambda: gone(child_of(place)))


def test_process_that_has_left_the_group_holds_up_nothing(place):
    code = 'setsid sleep 600 & echo $! >child; echo why >&2; exit 3'
    try:
        with pytest.raises(ComposeError, match='exit code 3: why'):
            run(place, code)
    finally:
        os.kill(int(child_of(place)), signal.SIGKILL)


def test_command_that_somebody_kills_with_its_whole_group_has_not_run_out_of_time(place):
    with pytest.raises(ComposeError, match=r'exit code 137: ') as caught:
        run(place, 'kill -9 0')
    assert caught.value.returncode == 137


def test_command_whose_shell_alone_is_killed_is_ended_and_not_waited_for(place):
    with pytest.raises(ComposeError, match='exit code 137: '):
        run(place, 'echo $$ >child; kill -9 $PPID; exec sleep 600')
    assert eventually(lambda: gone(child_of(place)))


def test_flood_is_read_but_only_its_end_is_kept(place):
    flood = 'yes xxxxxxxxx | head -c 100000000 >&2; echo the end >&2; exit 3'
    with pytest.raises(ComposeError, match='exit code 3: the end') as caught:
        run(place, flood)
    assert len(caught.value.stderr) < 1 << 25


def test_whole_output_of_a_big_stack_is_kept(place):
    assert len(run(place, 'yes xxxxxxxxx | head -c 3000000')) == 3000000


def test_endless_output_is_read_until_the_deadline(place):
    with pytest.raises(ComposeError, match='no answer within 0.5 s'):
        run(place, 'yes xxxxxxxxx', limit=0.5)


def test_command_that_cannot_be_started_is_an_error_like_any_other(place):
    odd = pathlib.Path(place.folder) / 'odd'
    odd.write_text('')
    for command, why in (('/none', '127.*not found'), (str(odd), '126.*ermission denied')):
        with pytest.raises(ComposeError, match=why):
            bc._run((command,), 20, place, bc.UpFlag())
    with pytest.raises(ComposeError, match='null'):
        bc._run(('docker', '\0'), 20, place, bc.UpFlag())


def test_command_is_cancelled_at_once_when_the_flag_is_lowered(place):
    flag = bc.UpFlag()
    child = pathlib.Path(place.folder) / 'child'
    with meanwhile(lambda: eventually(child.exists) and flag.clear()):
        with pytest.raises(bc._Cancelled):
            run(place, LINGER + 'sleep 600', limit=FOREVER, flag=flag)
    assert eventually(lambda: gone(child_of(place)))
    with pytest.raises(bc._Cancelled):
        run(place, 'echo never >begun', flag=flag)
    assert not (child.parent / 'begun').exists()


def test_everything_is_shown_as_it_comes_and_the_error_still_tells_the_reason(place):
    shown = []
    with pytest.raises(ComposeError, match='exit code 17: no space'):
        run(place, 'echo built; echo no space >&2; exit 17', show=shown.append)
    assert sorted(b''.join(shown).splitlines()) == [b'built', b'no space']


def test_command_has_a_session_of_its_own_an_empty_input_and_no_other_files(place):
    code = 'cat; ps -o sid= -p $$ >/dev/null 2>&1; read -r _ _ _ _ _ sid _ </proc/self/stat; '
    code += 'echo $sid; ls -l /proc/self/fd'
    session, *files = run(place, code).splitlines()
    assert int(session) != os.getsid(0)
    assert not any('socket' in file for file in files), files


def test_command_runs_in_its_place_or_where_that_is_gone_in_the_root(place):
    assert run(place._replace(environment={'WORD': 'x'}), 'pwd; echo $WORD') == (
        place.folder + '\nx\n'
    )
    assert run(place._replace(folder=place.folder + '/none'), 'pwd') == '/\n'


def test_frozen_program_gives_commands_the_library_path_of_before(place, monkeypatch):
    code = 'echo "${LD_LIBRARY_PATH-unset}"'
    monkeypatch.setenv('LD_LIBRARY_PATH', '/bundle')
    assert run(place, code) == '/bundle\n'
    monkeypatch.setattr(sys, 'frozen', True, raising=False)
    assert run(place, code) == 'unset\n'
    monkeypatch.setenv('LD_LIBRARY_PATH_ORIG', '/before')
    assert run(place, code) == '/before\n'


def test_secrets_in_the_environment_are_never_told(place, monkeypatch, caplog):
    monkeypatch.setenv('PASSWORD', 'hunter2')
    caplog.set_level('DEBUG', 'broapt_compose')
    with pytest.raises(ComposeError) as caught:
        run(place._replace(environment={'TOKEN': 'hunter3'}), 'exit 1')
    assert caplog.messages and 'hunter' not in caplog.text + str(caught.value) + repr(caught.value)


def test_output_is_closed_and_nothing_is_left_after_many_commands(place):
    run(place, 'echo')
    before = len(os.listdir('/proc/self/fd')), threading.active_count()
    for _ in range(20):
        run(place, 'echo')
    assert (len(os.listdir('/proc/self/fd')), threading.active_count()) == before


IGNORED = """
    import os, signal, sys, threading, broapt_compose as bc
    def reap():
        while True:
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                pass
    if sys.argv[1] == 'ignored':
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    else:
        threading.Thread(target=reap, daemon=True).start()
    for code in (0, 3):
        try:
            command = ['/bin/sh', '-c', 'echo out; exit %d' % code]
            print(bc._run(command, 20, bc._Place('/', {}), bc.UP_FLAG))
        except bc.ComposeError as error:
            print(error.returncode)
"""


@pytest.mark.parametrize('children', ['ignored', 'reaped'])
def test_command_fails_by_its_own_result_in_a_host_that_ignores_or_reaps_its_children(children):
    with script(IGNORED, children) as host:
        assert host.communicate(timeout=30)[0] == 'out\n\n3\n'


SUSPENDED = """
    import sys, broapt_compose as bc
    def show(chunk):
        print('begun', flush=True)
    code = 'echo begun; read line <fifo; ' + sys.argv[1]
    try:
        limit = float(sys.argv[2])
        text = bc._run(['/bin/sh', '-c', code], limit, bc._Place('.', {}), bc.UP_FLAG, show)
        print(len(text))
    except bc.ComposeError as error:
        print(error)
"""


@pytest.mark.parametrize('limit, late', [(1, 0), (4, 3.7)], ids=['at once', 'just before the end'])
@pytest.mark.parametrize(
    'code, expected', [('yes | head -c 60000', '60006\n'), ('echo why >&2; exit 3', 'why\n')]
)
def test_process_that_was_suspended_for_longer_than_the_deadline_has_lost_nothing(
    tmp_path, code, expected, limit, late
):
    os.mkfifo(str(tmp_path / 'fifo'))
    with script(SUSPENDED, code, str(limit), cwd=str(tmp_path)) as host:
        assert host.stdout.readline() == 'begun\n'
        threading.Event().wait(late)
        host.send_signal(signal.SIGSTOP)
        (tmp_path / 'fifo').write_text('\n')
        threading.Event().wait(1.5)
        host.send_signal(signal.SIGCONT)
        assert host.communicate(timeout=30)[0].endswith(expected)


def test_lack_of_descriptors_is_an_error_like_any_other(tmp_path):
    code = """
        import os, resource, broapt_compose as bc
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
        files = []
        while True:
            try:
                files.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                break
        while files:
            try:
                bc._run(['true'], 9, bc._Place('/', {}), bc.UP_FLAG)
                break
            except bc.ComposeError as error:
                print(error)
            os.close(files.pop())
    """
    with script(code) as host:
        lines = set(host.communicate(timeout=30)[0].splitlines())
    assert lines == {'true: Too many open files'}


def test_of_a_flood_of_errors_the_end_is_kept():
    code = 'yes | head -c 3000000 >&2; echo why >&2; exit 3'
    with pytest.raises(ComposeError, match='exit code 3: why') as caught:
        bc._run(['/bin/sh', '-c', code], 60, bc._Place('/', {}), bc.UP_FLAG)
    assert len(caught.value.stderr) <= 1 << 16


def test_killed_process_leaves_no_command_behind(tmp_path):
    code = """
        import broapt_compose as bc
        code = 'sleep 600 & echo $!; echo $$; trap "" TERM HUP; sleep 600'
        show = lambda chunk: print(chunk.decode(), end='', flush=True)
        bc._run(['/bin/sh', '-c', code], 600, bc._Place('/', {}), bc.UP_FLAG, show)
    """
    with script(code) as host:
        pids = [int(host.stdout.readline()) for _ in range(2)]
        host.kill()
        assert eventually(lambda: all(map(gone, pids)), seconds=2)


# -- the engine ------------------------------------------------------------------------------------


def dial_nothing(sock):
    raise AssertionError('a unix socket is connected to directly')


@pytest.fixture
def engine_of(world):
    """Return a client of the scripted engine."""

    def build(limit=20.0, endpoint=None, dial=dial_nothing):
        return bc._Engine(endpoint or 'unix://' + world.path, limit, dial)

    return build


def test_answers_are_read_from_json_and_the_query_is_sent(world, engine_of):
    world.run('core')
    engine = engine_of()
    (entry,) = engine.request('GET', '/containers/json', all=1, filters='{"id": ["core1"]}')
    assert entry['Id'] == 'core1'
    assert engine.request('POST', '/containers/core1/stop', t=3) is None
    assert engine.request('POST', '/containers/core1/stop', t=3) is None  # 304
    assert world.requests()[-1] == 'POST /containers/core1/stop?t=3'
    assert abs(engine.get_time() - time.time()) < 5


@pytest.mark.parametrize(
    'play, told',
    [
        ({'status': 500, 'message': 'two\nlines'}, 'status 500: lines'),
        ({'status': 409, 'message': 'busy'}, 'status 409: busy'),
        ({'garbage': b'HTTP/1.1 500 No\r\nContent-Length: 4\r\n\r\nwhat'}, 'status 500: what'),
        ({'garbage': b'HTTP/1.1 502 No\r\nContent-Length: 2\r\n\r\n[]'}, 'status 502: []'),
        (
            {'garbage': b'HTTP/1.1 502 No\r\nContent-Length: 0\r\n\r\n'},
            'status 502: no reason given',
        ),
    ],
)
def test_error_that_the_engine_answers_is_one_line(world, engine_of, play, told):
    world.fault('GET /info', **play)
    with pytest.raises(ComposeError) as caught:
        engine_of().request('GET', '/info')
    assert str(caught.value) == 'GET /info: ' + told
    assert caught.value.returncode == int(told.split()[1].rstrip(':'))


@pytest.mark.parametrize(
    'play',
    [
        {'close': True},
        {'half': True},
        {'garbage': b''},
        {'garbage': b'garbage\r\n\r\n'},
        {'garbage': b'HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"a": 1'},
        {'garbage': b'HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n{"a": '},
        {'garbage': b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"a"'},
        {'garbage': b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n'},
        {'garbage': b'HTTP/1.1 200 OK\r\n' + b'X: y\r\n' * 200 + b'\r\n'},
        {'garbage': b'HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n\xff\xfe\xfd'},
    ],
    ids=str,
)
def test_answer_that_is_none_is_an_error_of_one_line_without_a_status(world, engine_of, play):
    world.fault('GET /info', **play)
    with pytest.raises(ComposeError) as caught:
        engine_of().request('GET', '/info')
    assert str(caught.value).startswith('GET /info: ') and '\n' not in str(caught.value)
    assert caught.value.returncode is None and caught.value.reason


@pytest.mark.parametrize('stale', [False, True])
def test_engine_that_is_not_there_is_an_error_with_the_systems_words(world, engine_of, stale):
    world.down(stale)
    why = 'Connection refused' if stale else 'No such file or directory'
    with pytest.raises(ComposeError, match='^GET /info: ' + why):
        engine_of().request('GET', '/info')


@pytest.mark.parametrize('play', [{'hang': True}, {'half': True, 'hang': True}])
def test_request_that_hangs_ends_at_its_deadline(world, engine_of, play):
    world.fault('GET /info', **play)
    with pytest.raises(ComposeError, match='^GET /info: no answer within 0.3 s$'):
        engine_of(0.3).request('GET', '/info')
    with pytest.raises(ComposeError, match='^GET /info: no answer within 0.2 s$'):
        engine_of(FOREVER).request('GET', '/info', 0.2)


@contextlib.contextmanager
def dripping(path, chunk, count=10**6):
    """An engine that answers byte by byte."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(8)
    over = threading.Event()

    def drip():
        connection = listener.accept()[0]
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n' % count)
            while not over.wait(0.05):
                connection.sendall(chunk)

    with listener, meanwhile(drip):
        yield
        over.set()


def test_deadline_is_that_of_the_whole_answer_not_of_each_part(tmp_path, engine_of):
    path = tempfile.mkdtemp(prefix='w') + '/drip'
    with dripping(path, b' '):
        with pytest.raises(ComposeError, match='no answer within 0.5 s'):
            engine_of(0.5, 'unix://' + path).request('GET', '/info')
    shutil.rmtree(os.path.dirname(path))


@pytest.mark.parametrize('play', [{'hang': True}, {'half': True, 'hang': True}])
def test_lowered_flag_ends_a_request_at_once(world, engine_of, play):
    world.fault('GET /info', **play)
    engine = engine_of(FOREVER)
    engine.flag = bc.UpFlag()
    with meanwhile(lambda: eventually(world.requests) and engine.flag.clear()):
        with pytest.raises(bc._Cancelled):
            engine.request('GET', '/info')
    with pytest.raises(bc._Cancelled):
        engine.request('GET', '/version')
    assert [request.rstrip('?') for request in world.requests()] == ['GET /info']


def test_lowered_flag_ends_a_stream_of_events_at_once(world, engine_of):
    engine = engine_of(FOREVER)
    engine.flag = bc.UpFlag()
    with meanwhile(lambda: eventually(world.streams) and engine.flag.clear()):
        with contextlib.suppress(bc._Cancelled):
            list(engine.follow())


def test_events_are_given_one_after_the_other_until_the_stream_is_cut(world, engine_of):
    world.run('core')
    world.events.clear()
    seen, engine = [], engine_of(1.0)

    def follow():
        for event in filter(None, engine.follow(since='0')):  # None: the stream is open
            seen.append(event['Action'])

    with meanwhile(follow):
        assert eventually(world.streams)
        world.act('stop', 'core1')
        assert eventually(lambda: seen == ['kill', 'die', 'stop'])
        threading.Event().wait(1.5)  # longer than the limit of a request
        world.act('start', 'core1')
        assert eventually(lambda: seen[3:] == ['start'])
        world.cut_streams()


@pytest.mark.parametrize('data', [b'garbage\n', b'[1]\n', b'{"Action": \n', b'\xff\xff\n'])
def test_event_that_is_none_is_an_error_or_something_else_than_a_crash(world, engine_of, data):
    engine = engine_of()

    def follow():
        with contextlib.suppress(ComposeError):
            for event in engine.follow():
                assert event in (None, [1])

    with meanwhile(follow):
        assert eventually(world.streams)
        world.say(data)
        world.cut_streams()


def test_requests_from_many_threads_do_not_wait_for_each_other(world, engine_of):
    world.run(**{'s{}'.format(number): {} for number in range(30)})
    world.fault('POST', hang=True)
    engine, answers = engine_of(FOREVER), []

    def stop(id):
        answers.append(engine.request('POST', '/containers/{}/stop'.format(id)))

    with contextlib.ExitStack() as stack:
        for id in world.containers:
            stack.enter_context(meanwhile(stop, id))
        assert eventually(lambda: len(world.requests()) == 30)
        assert engine.request('GET', '/version')
        world.heal()
    assert answers == [None] * 30


def test_answer_of_a_megabyte_with_any_letters_is_read(world, engine_of):
    world.run('core')
    world.find('core1')['Config']['Labels']['text'] = 'ä€\n' * 300000
    answer = engine_of().request('GET', '/containers/core1/json')
    assert answer['Config']['Labels']['text'] == 'ä€\n' * 300000


def test_no_connection_is_left_after_any_outcome(world, engine_of):
    world.fault('GET /half', half=True)
    world.fault('GET /hang', hang=True)
    engine = engine_of(0.1)
    before = len(os.listdir('/proc/self/fd'))
    for path in ('/version', '/half', '/hang', '/none'):
        with contextlib.suppress(ComposeError):
            engine.request('GET', path)
    world.heal()
    assert eventually(lambda: not [c for c, pid in world._connections.items() if not pid])
    assert len(os.listdir('/proc/self/fd')) == before


# -- the engine: over a connection that docker makes -----------------------------------------------


def dials(world):
    return [call.argv for call in world.calls() if call.argv[-2:] == ['system', 'dial-stdio']]


@pytest.fixture
def far(world, monkeypatch):
    """A context whose endpoint is no unix socket."""
    world.contexts['far'] = 'tcp://far:2376'
    monkeypatch.delenv('DOCKER_HOST')
    monkeypatch.setenv('DOCKER_CONTEXT', 'far')
    world.run('core', 'side')
    with contextlib.closing(bc._Stack(FAST)) as stack:
        yield stack


def test_connection_that_docker_makes_is_kept_for_one_request_after_the_other(world, far):
    for _ in range(3):
        assert len(far.engine.request('GET', '/containers/json')) == 2
    assert len(dials(world)) == 1
    assert [c.argv for c in world.calls() if 'inspect' in c.argv] == [
        ['context', 'inspect', '--format', '{{.Name}} {{.Endpoints.docker.Host}}']
    ]


def test_words_before_compose_in_the_compose_command_lead_to_its_engine(world, far, monkeypatch):
    monkeypatch.delenv('DOCKER_CONTEXT')
    settings = FAST._replace(compose_command=('docker', '--context', 'far', 'compose'))
    with contextlib.closing(bc._Stack(settings)) as stack:
        stack.engine.request('GET', '/version')
    assert dials(world) == [['--context', 'far', 'system', 'dial-stdio']]


def test_compose_is_pinned_to_the_context_that_was_found(world, far):
    far.engine.request('GET', '/version')
    os.environ['DOCKER_CONTEXT'] = 'default'  # somebody changes it later
    far.compose('up', '--detach')
    assert world.calls()[-1].env['DOCKER_CONTEXT'] == 'far'
    far.engine.request('GET', '/version')
    assert len(dials(world)) == 1


def test_connection_that_was_cut_meanwhile_is_replaced(world, far):
    far.engine.request('GET', '/version')
    world.down()
    world.up()
    assert eventually(lambda: not far.engine.kept or not far.engine.kept[0].is_idle())
    assert len(far.engine.request('GET', '/containers/json')) == 2
    assert len(dials(world)) == 2


def test_connection_whose_answer_was_not_read_to_its_end_is_not_used_again(world, far):
    world.fault('GET /containers/json', half=True, hang=True, once=True)
    with pytest.raises(ComposeError, match='no answer within 0.5 s'):
        far.engine.request('GET', '/containers/json', 0.5)
    assert far.engine.request('GET', '/version')['ApiVersion'] == '1.41'
    assert len(dials(world)) == 2


def test_reason_why_docker_could_not_connect_is_told(world, far):
    world.command('system dial-stdio', err='noise\nssh: permission denied\n', code=255)
    with pytest.raises(ComposeError, match='^GET /version: ssh: permission denied$'):
        far.engine.request('GET', '/version')


def test_docker_that_hangs_while_it_connects_is_killed_at_the_deadline(world, far):
    world.command('system dial-stdio', hang=True, deaf=True, child=True)
    with pytest.raises(ComposeError, match='^GET /version: no answer within 0.5 s$'):
        far.engine.request('GET', '/version', 0.5)
    assert eventually(lambda: world.children and all(map(gone, world.children)))


def test_few_connections_are_enough_for_many_requests_at_once(world, far):
    world.run(**{'s{}'.format(number): {} for number in range(30)})
    engine = far.engine
    bc._in_parallel(
        lambda id: engine.request('POST', '/containers/' + id + '/stop'), list(world.containers)
    )
    assert len(dials(world)) <= 8
    assert {world.state(id) for id in world.containers} == {'exited'}


def test_few_connections_are_enough_to_look_at_many_containers(world, far):
    world.run(**{'s{}'.format(number): {} for number in range(30)})
    far.project = 'shop'
    assert len(far.observe()) == 32
    assert len(dials(world)) <= 8


def test_process_that_connects_ends_with_the_killed_host(world, far):
    code = """
        import broapt_compose as bc
        stack = bc._Stack(bc.Settings())
        print(len(stack.engine.request('GET', '/containers/json')), flush=True)
        stack.engine.request('GET', '/hang')
    """
    world.fault('GET /hang', hang=True)
    with script(code) as host:
        assert host.stdout.readline() == '2\n'
        assert eventually(lambda: world.requests()[-1].startswith('GET /hang'))
        bridges = [pid for pid in world._connections.values() if pid]
        assert bridges
        host.kill()
        assert eventually(lambda: all(map(gone, bridges)), seconds=4)


# -- the engine: where it is -----------------------------------------------------------------------


def test_endpoint_is_the_one_that_docker_would_use_and_compose_gets_it_too(world, monkeypatch):
    world.contexts['near'] = 'unix://' + world.path
    monkeypatch.delenv('DOCKER_HOST')
    monkeypatch.setenv('DOCKER_CONTEXT', 'near')
    stack = bc._Stack(FAST)
    assert stack.engine.path == world.path
    world.contexts['near'] = 'unix:///none'
    stack.compose('config')
    assert world.calls()[-1].env['DOCKER_HOST'] == 'unix://' + world.path
    stack.engine.request('GET', '/version')
    assert len([c for c in world.commands() if 'inspect' in c]) == 1


def test_context_that_there_is_not_is_an_error_with_dockers_words(world, monkeypatch):
    monkeypatch.delenv('DOCKER_HOST')
    monkeypatch.setenv('DOCKER_CONTEXT', 'none')
    with pytest.raises(ComposeError, match='context "none": context not found'):
        bc._Stack(FAST).engine.request('GET', '/version')


@pytest.mark.parametrize('docker', ['missing', 'silent'])
@pytest.mark.parametrize(
    'host, endpoint',
    [('unix:///x', 'unix:///x'), ('tcp://x:1', None), ('', None)],
    ids=['unix', 'tcp', 'none'],
)
def test_without_docker_or_with_podmans_it_is_the_socket_of_the_environment_or_the_default(
    world, monkeypatch, docker, host, endpoint
):
    if docker == 'missing':
        (world.bin / 'docker').unlink()
    else:
        world.command('context inspect', out='')
    monkeypatch.setenv('DOCKER_HOST', host)
    stack = bc._Stack(FAST)
    assert 'unix://' + stack.engine.path == (endpoint or 'unix:///var/run/docker.sock')


# -- records ---------------------------------------------------------------------------------------


def entry(**changes):
    return dict(json.loads(ENTRY), **changes)


def details(**changes):
    return dict(json.loads(DETAILS), **changes)


def state(**changes):
    return dict(json.loads(DETAILS)['State'], **changes)


def test_container_is_read_from_what_list_and_inspect_say():
    assert bc._read_container(entry(), details()) == Container(
        id='8f48490903fe',
        name='shop-core-2',
        service='core',
        number='2',
        state=State.EXITED,
        exit_code=3,
        since=1795615511.987097661,
        grace=120,
        networks={'shop_default': 'b19b709e48fc'},
        folder='/shop',
    )


def test_container_that_cannot_be_inspected_is_read_from_the_list_alone():
    container = bc._read_container(entry(), {})
    assert (container.state, container.label, container.grace) == (State.EXITED, 'core-2', 10)
    assert container.networks == {'shop_default': 'b19b709e48fc'}


def test_inspect_is_newer_than_the_list():
    running = state(Status='running', ExitCode=0)
    container = bc._read_container(entry(), details(State=running))
    assert (container.state, container.exit_code) == (State.RUNNING, None)


@pytest.mark.parametrize(
    'changes, words',
    [
        ({}, 'exited (3)'),
        ({'OOMKilled': True, 'ExitCode': 137}, 'exited (137, out of memory)'),
        ({'Error': 'port is busy', 'ExitCode': 128}, 'exited (128, port is busy)'),
        ({'Status': 'running', 'OOMKilled': False}, 'running'),
        ({'Status': 'paused'}, 'paused'),
        ({'Status': 'created', 'ExitCode': 0}, 'created'),
        ({'Status': 'created', 'ExitCode': 128, 'Error': 'no net'}, 'created (no net)'),
        ({'Status': 'restarting', 'ExitCode': 1}, 'restarting (1)'),
        ({'Status': 'running', 'Health': {'Status': 'unhealthy', 'FailingStreak': 3}}, 'unhealthy'),
        ({'Status': 'exited', 'Health': {'Status': 'unhealthy', 'FailingStreak': 3}}, 'exited (3)'),
        ({'Status': 'stopped'}, 'exited (3)'),  # podman's
        ({'Status': 'stopping'}, 'removing (3)'),
        ({'Status': 'initialized'}, 'created'),
    ],
)
def test_state_is_told_in_words(changes, words):
    assert bc._read_container(entry(), details(State=state(**changes))).condition == words


@pytest.mark.parametrize('status, health', [('running', 'healthy'), ('exited', '')])
def test_health_of_what_does_not_run_says_nothing(status, health):
    found = state(Status=status, Health={'Status': 'healthy', 'FailingStreak': 0})
    assert bc._read_container(entry(), details(State=found)).health == health


@pytest.mark.parametrize(
    'health, word',
    [
        (None, ''),
        ({'Status': 'none', 'FailingStreak': 0}, ''),
        ({'Status': '', 'FailingStreak': 0, 'Log': None}, ''),  # podman's
        ({'Status': 'healthy', 'FailingStreak': 0}, 'healthy'),
        ({'Status': 'starting', 'FailingStreak': 2}, 'starting'),
        ({'Status': 'unhealthy', 'FailingStreak': 3}, 'unhealthy'),
        ({'Status': 'unhealthy', 'FailingStreak': 0}, 'starting'),  # Docker's, after a pause
    ],
)
def test_health_is_a_word_and_unhealthy_without_a_failure_is_none(health, word):
    running = state(Status='running', Health=health)
    assert bc._read_container(entry(), details(State=running)).health == word


@pytest.mark.parametrize(
    'text, seconds',
    [
        ('2026-11-25T14:05:12Z', 1795615512),
        ('2026-11-25T14:05:12.5Z', 1795615512.5),
        ('2026-11-25T15:05:12.017955371+01:00', 1795615512.017955),
        ('2026-11-25T09:35:12.0-04:30', 1795615512),
        ('0001-01-01T00:00:00Z', 0),
        ('', 0),
        ('yesterday', 0),
    ],
)
def test_time_is_read_with_its_zone(text, seconds):
    assert bc._read_time(text) == pytest.approx(seconds, abs=1e-6)


def test_times_are_told_apart_that_are_less_than_a_millisecond_apart():
    first, second = '2026-11-25T14:05:12.0171Z', '2026-11-25T14:05:12.0172Z'
    assert bc._read_time(first) < bc._read_time(second)


def test_owners_of_what_a_container_shares_are_read_off_it():
    host = {'NetworkMode': 'container:aaa', 'PidMode': 'container:bbb', 'IpcMode': 'shareable'}
    container = bc._read_container(entry(), details(HostConfig=host))
    assert container.owners == {'aaa': 'network', 'bbb': 'pid'}
    host = {'NetworkMode': 'host', 'PidMode': 'host', 'IpcMode': 'container:ccc'}
    assert bc._read_container(entry(), details(HostConfig=host)).owners == {'ccc': 'ipc'}
    listed = {'NetworkMode': 'container:aaa'}
    assert bc._read_container(entry(HostConfig=listed), {}).owners == {'aaa': 'network'}


def test_container_that_shares_several_namespaces_with_one_owner_is_read():
    host = {'NetworkMode': 'container:a', 'PidMode': 'container:a', 'IpcMode': 'container:a'}
    assert set(bc._read_container(entry(), details(HostConfig=host)).owners) == {'a'}


@pytest.mark.parametrize('inspected', [True, False])
def test_list_of_podman_lacks_the_host_configuration(inspected):
    short = entry(ImageID='85e7')
    del short['HostConfig']
    host = {'NetworkMode': 'container:aaa', 'PidMode': 'private', 'IpcMode': 'shareable'}
    networks = {'Networks': {'shop_default': {'NetworkID': 'shop_default'}}}
    more = details(HostConfig=host, NetworkSettings=networks) if inspected else {}
    container = bc._read_container(dict(short, NetworkSettings=networks), more)
    assert container.owners == ({'aaa': 'network'} if inspected else {})
    assert container.networks == {'shop_default': 'shop_default'}


def test_network_that_was_never_connected_is_known_by_its_name():
    networks = {'Networks': {'shop_default': {'NetworkID': ''}, 'other': {'NetworkID': 'o1'}}}
    container = bc._read_container(entry(NetworkSettings=networks), {})
    assert container.networks == {'shop_default': 'shop_default', 'other': 'o1'}
    assert bc._read_container(entry(NetworkSettings={'Networks': None}), {}).networks == {}


def test_name_is_the_containers_own_and_not_one_that_a_link_gave_it():
    linked = entry(Names=['/other/alias', '/shop-core-2'])
    assert bc._read_container(linked, details()).name == 'shop-core-2'
    for none in ([], None):  # it is about to be removed
        assert bc._read_container(entry(Names=none), {}).name == '8f48490903fe'


@pytest.mark.parametrize('text, watched', [('false', False), ('False', False), ('true', True)])
def test_label_switches_the_watching_off(text, watched):
    labels = dict(entry()['Labels'], **{'broapt.watch': text})
    assert (not bc._read_container(entry(Labels=labels), {}).left) is watched


def test_state_that_nobody_knows_is_refused(world):
    world.run('core')
    world.change('core1', 'pondering')
    stack = bc._Stack(FAST)
    stack.project = 'shop'
    with pytest.raises(ComposeError, match='its answer is not understood: .*pondering'):
        stack.observe()


DECLARED = {
    'core': Service(
        left='labelled broapt.watch=false', depends_on={'init': 'service_completed_successfully'}
    ),
    'debug': Service(),
    'init': Service(),
    'multi': Service(scale=2),
    'named': Service(),
    'zero': Service(scale=0),
}


def test_services_are_read_from_the_json_of_compose_2():
    services = bc._read_services(json.loads(CONFIG_2), 'shop', None)
    started = {'init': 'service_started'}
    needs = dict(DECLARED['core'].depends_on, multi='service_healthy')
    assert services == dict(
        DECLARED,
        core=DECLARED['core']._replace(depends_on=needs, optional=('multi',)),
        mate=Service(owners=('named', 'init'), depends_on=started),
        side=Service(owners=('core',), depends_on=dict(started, core='service_started')),
    )


def test_services_are_read_from_the_yaml_of_compose_1():
    services = bc._read_services(bc._parse_yaml(CONFIG_1), 'shop', {'debug'})
    assert services == dict(
        DECLARED,
        mate=Service(owners=('named', 'init')),
        side=Service(owners=('core',), depends_on={'init': 'service_started'}),
    )


@pytest.mark.parametrize('profiles, scale', [({''}, 0), ({'debug'}, 1), ({'*'}, 0)])
def test_service_of_a_profile_is_expected_of_compose_1_if_it_is_enabled(profiles, scale):
    services = bc._read_services(bc._parse_yaml(CONFIG_1), 'shop', profiles)
    assert services['debug'].scale == scale and services['init'].scale == 1


def test_list_of_what_a_service_depends_on_means_that_it_is_started_first():
    text = 'services:\n  core:\n    depends_on:\n    - db\n    - side\n  db: {}\n  side: {}\n'
    services = bc._read_services(bc._parse_yaml(text), 'shop', set())
    conditions = set(services['core'].depends_on.values())
    assert set(services) == {'core', 'db', 'side'} and conditions <= {'', 'service_started'}


def test_service_of_a_provider_has_no_containers():
    config = {'services': {'db': {'provider': {'type': 'x'}, 'image': 'y'}}}
    assert bc._read_services(config, 'shop', None) == {'db': Service(scale=0, provided=True)}


def test_container_of_the_project_that_is_shared_by_its_name_is_an_owner():
    config = {'services': {'a': {}, 'b': {'network_mode': 'container:shop-a-1', 'pid': 'host'}}}
    assert bc._read_services(config, 'shop', None)['b'].owners == ('a',)


@pytest.mark.parametrize('listed, code', [('Exited (7) 2 seconds ago', 7), ('Created', None)])
def test_exit_code_is_the_lists_where_inspect_has_no_answer(listed, code):
    entry = dict(json.loads(ENTRY), Status=listed)
    assert bc._read_container(entry, {}).exit_code == code
    assert bc._read_container(entry, json.loads(DETAILS)).exit_code == 3


@pytest.mark.parametrize(
    'text, config',
    [
        ('a:\n- b\n- c\n', {'a': {'b': {}, 'c': {}}}),
        ('a:\n  b: {}\n  c: []\nd: x\n', {'a': {'b': {}, 'c': '[]'}, 'd': 'x'}),
        ("a:\n  'e: f': g\n  h: ''\n", {'a': {'e: f': 'g', 'h': ''}}),
        ('a:\n  b: "one\\\n    \\ c: two"\n  d: three\n', {'a': {'b': 'one\\', 'd': 'three'}}),
        ('a:\n  "yes": \'it\'\'s: "x"\'\n', {'a': {'yes': "it''s: \"x"}}),
        ('WARNING: x\na:\n  b: c\n', {'WARNING': 'x', 'a': {'b': 'c'}}),
    ],
)
def test_what_compose_1_prints_is_read_key_by_key(text, config):
    assert bc._parse_yaml(text) == config


# -- decide ----------------------------------------------------------------------------------------

SERVICES = {
    'core': Service(depends_on={'init': 'service_completed_successfully', 'db': 'service_healthy'}),
    'db': Service(),
    'init': Service(),
    'side': Service(owners=('core',)),
}
NOW = 5000.0
LOST = 'the container whose network it shares'
HELD = 'on hold until 14:30'
LABELLED = 'labelled broapt.watch=false'
OWNER = "its network's owner is not running"
LEFT_OVER = 'left over from an interrupted recreate: it will not be touched'
AFTER = 'its {} is gone: core was started after it'
SIDE = {'owners': {'core1': 'network'}}


def base():
    """Return the containers of a stack that is well, the newest first."""
    return {
        'side': make('side', **SIDE),
        'core': make('core'),
        'db': make('db', health='healthy'),
        'init': make('init', 'exited', exit_code=0),
    }


def look(**changes):
    """Return the containers with changes: containers, lists, or None; «new» is the newest."""
    changed = [c if isinstance(c, list) else [c] for c in {**base(), **changes}.values() if c]
    return sorted((c for group in changed for c in group), key=lambda c: c.id != 'new')


def find_faults(*arguments):
    """Return what decide() says of what is not well."""
    return [a for a in bc.decide(*arguments) if a.wanted or a.why and a.cause != 'running']


def plan(containers, services=SERVICES, history=None, settings=FAST):
    """Return what is found, in words; in brackets what is so because somebody said so."""
    lines = []
    for action in find_faults(containers, services, NOW, history or History(), settings):
        words = [action.verb.name.lower() + ' ' + action.label, action.cause, action.why]
        line = ': '.join(filter(None, words))
        lines.append(line if action.wanted else '(' + line + ')')
    return sorted(lines)


KILLED_CORE = ['leave side: running: ' + OWNER, 'start core: exited (137)']
ROWS = [
    ('a stack that is well needs nothing', {}, []),
    ('paused core is unpaused', {'core': make(state='paused')}, ['unpause core: paused']),
    ('killed db is started', {'db': make('db', 'exited')}, ['start db: exited (137)']),
    (
        'db that was out of memory is started',
        {'db': make('db', 'exited', note='out of memory')},
        ['start db: exited (137, out of memory)'],
    ),
    (
        'db that ended with 0 is started',
        {'db': make('db', 'exited', exit_code=0)},
        ['start db: exited (0)'],
    ),
    ('created db is started', {'db': make('db', 'created')}, ['start db: created']),
    ('killed core is started', {'core': make(state='exited')}, KILLED_CORE),
    (
        'killed core waits for nothing',
        {'core': make(state='exited'), 'db': make('db', health='starting')},
        KILLED_CORE,
    ),
    (
        'created core waits for db to be healthy',
        {'core': make(state='created'), 'db': make('db', health='starting')},
        ['leave core: created: waits for db to be healthy', 'leave side: running: ' + OWNER],
    ),
    (
        'created core waits for init to complete',
        {'core': make(state='created'), 'init': make('init')},
        ['leave core: created: waits for init to complete', 'leave side: running: ' + OWNER],
    ),
    (
        'missing core waits for init to succeed, which is run again',
        {'core': None, 'side': None, 'init': make('init', 'exited', exit_code=1)},
        [
            'leave core: missing: waits for init to complete',
            'leave side: missing: waits for core to run',
            'start init: exited (1)',
        ],
    ),
    (
        'missing core waits for a db that is not there, which is created',
        {'core': None, 'side': None, 'db': None},
        [
            'create db: missing',
            'leave core: missing: waits for db to be healthy',
            'leave side: missing: waits for core to run',
        ],
    ),
    ('dead db is removed', {'db': make('db', 'dead')}, ['remove db: dead']),
    ('missing db is created', {'db': None}, ['create db: missing']),
    (
        'missing core is created while side waits for it',
        {'core': None, 'side': make('side', lost=LOST, **SIDE)},
        ['create core: missing', 'leave side: ' + LOST + ' is gone: waits for core to run'],
    ),
    ('missing side is created', {'side': None}, ['create side: missing']),
    (
        'missing side is not created before core runs',
        {'side': None, 'core': make(state='exited')},
        ['leave side: missing: waits for core to run', 'start core: exited (137)'],
    ),
    (
        'side of a core created anew is created anew',
        {'core': make(id='new'), 'side': make('side', lost=LOST, **SIDE)},
        ['recreate side: ' + LOST + ' is gone'],
    ),
    (
        'stopped side of a core created anew, too',
        {'core': make(id='new'), 'side': make('side', 'exited', lost=LOST, **SIDE)},
        ['recreate side: ' + LOST + ' is gone'],
    ),
    (
        'stopped db whose network is gone is created anew',
        {'db': make('db', 'exited', lost='its network back')},
        ['recreate db: its network back is gone'],
    ),
    (
        'created db whose network is gone, too',
        {'db': make('db', 'created', lost='its network back')},
        ['recreate db: its network back is gone'],
    ),
    (
        'of two db, the one whose network is gone is removed: the other would be made anew, too',
        {
            'db': [
                make('db', health='healthy'),
                make('db', 'exited', number='2', lost='its network'),
            ]
        },
        ['remove db-2: its network is gone'],
    ),
    (
        'side of a core that somebody is about to replace is left alone',
        {'core': [make('core', 'created', id='new'), make()]},
        ['leave core: created: ' + LEFT_OVER],
    ),
    (
        'side is restarted when the core whose network it shares was started after it',
        {'core': make(since=101.0)},
        ['restart side: ' + AFTER.format('network')],
    ),
    (
        'and when it shares its pids by its name',
        {'core': make(since=101.0), 'side': make('side', owners={'shop-core-1': 'pid'})},
        ['restart side: ' + AFTER.format('pid')],
    ),
    (
        'and when it shares its ipc',
        {'core': make(since=101.0), 'side': make('side', owners={'core1': 'ipc'})},
        ['restart side: ' + AFTER.format('ipc')],
    ),
    (
        'and although it is unhealthy, too',
        {'core': make(since=101.0), 'side': make('side', health='unhealthy', **SIDE)},
        ['restart side: ' + AFTER.format('network')],
    ),
    ('side that was started after core is left alone', {'core': make(since=99.0)}, []),
    (
        'stopped side is only started, though core was started after it',
        {'core': make(since=101.0), 'side': make('side', 'exited', **SIDE)},
        ['start side: exited (137)'],
    ),
    (
        'paused side is only unpaused, though core was started after it',
        {'core': make(since=101.0), 'side': make('side', 'paused', **SIDE)},
        ['unpause side: paused'],
    ),
    (
        'stopped side waits for a core that does not run',
        {'core': make(state='exited'), 'side': make('side', 'exited', **SIDE)},
        ['leave side: exited (137): ' + OWNER, 'start core: exited (137)'],
    ),
    (
        'stopped side of a stopped core that nobody watches says so',
        {'core': make(state='exited', left=LABELLED), 'side': make('side', 'exited', **SIDE)},
        [
            '(leave core: exited (137): ' + LABELLED + ')',
            'leave side: exited (137): ' + OWNER + ' and not watched',
        ],
    ),
    (
        'restarting db is left to Docker',
        {'db': make('db', 'restarting', exit_code=1)},
        ['leave db: restarting (1): Docker is at it'],
    ),
    (
        'removing db is left to Docker',
        {'db': make('db', 'removing')},
        ['leave db: removing: Docker is at it'],
    ),
    (
        'unhealthy db beside the one that replaces it is left alone, as is that one',
        {'db': [make('db', 'created', id='new'), make('db', health='unhealthy')]},
        ['leave db: created: ' + LEFT_OVER, 'leave db: unhealthy: ' + LEFT_OVER],
    ),
    (
        'unhealthy db is restarted',
        {'db': make('db', health='unhealthy')},
        ['restart db: unhealthy'],
    ),
    ('db whose health check starts is left alone', {'db': make('db', health='starting')}, []),
    (
        'stopped db that was unhealthy is started',
        {'db': make('db', 'exited', health='unhealthy')},
        ['start db: exited (137)'],
    ),
    (
        'failed one-shot is run again',
        {'init': make('init', 'exited', exit_code=2)},
        ['start init: exited (2)'],
    ),
    (
        'db labelled broapt.watch=false is never touched',
        {'db': make('db', 'exited', left=LABELLED)},
        ['(leave db: exited (137): ' + LABELLED + ')'],
    ),
    ('what the file does not declare is never touched', {'old': make('old', 'exited')}, []),
    (
        'replacement beside the running old one is left alone (2.x)',
        {'db': [make('db', 'created', id='new'), make('db', health='healthy')]},
        ['leave db: created: ' + LEFT_OVER],
    ),
    (
        'of replacement and stopped old one, the new one is started (1.29)',
        {'db': [make('db', 'created', id='new'), make('db', 'exited')]},
        ['leave db: exited (137): ' + LEFT_OVER, 'start db: created'],
    ),
    (
        'stopped old one beside its running replacement is left alone',
        {'db': [make('db', id='new', health='healthy'), make('db', 'exited')]},
        ['leave db: exited (137): ' + LEFT_OVER],
    ),
    (
        'second container of a service scaled by hand is watched',
        {'db': [make('db', health='healthy'), make('db', 'exited', number='2')]},
        ['start db-2: exited (137)'],
    ),
    (
        'paused and stopped at once are both repaired',
        {'side': make('side', 'paused', **SIDE), 'db': make('db', 'exited')},
        ['start db: exited (137)', 'unpause side: paused'],
    ),
    (
        'all gone: all are created, in their order',
        {'core': None, 'db': None, 'init': None, 'side': None},
        [
            'create db: missing',
            'create init: missing',
            'leave core: missing: waits for init to complete',
            'leave side: missing: waits for core to run',
        ],
    ),
]


@pytest.mark.parametrize('changes, lines', [r[1:] for r in ROWS], ids=[r[0] for r in ROWS])
def test_decide(changes, lines):
    assert plan(look(**changes)) == lines


FAULTS_OF_DB = {
    'stopped': make('db', 'exited'),
    'paused': make('db', 'paused'),
    'dead': make('db', 'dead'),
    'unhealthy': make('db', health='unhealthy'),
    'lost': make('db', 'exited', lost='its network back'),
    'missing': None,
}


@pytest.mark.parametrize('why', [HELD, 'labelled broapt.watch=false'])
@pytest.mark.parametrize('fault', list(FAULTS_OF_DB))
def test_what_somebody_told_us_to_leave_is_shown_and_never_touched(fault, why):
    services = dict(SERVICES, db=Service(left=why))
    (line,) = plan(look(db=FAULTS_OF_DB[fault]), services)
    assert line.startswith('(leave db: ') and line.endswith(': ' + why + ')')


def test_stopped_side_of_a_core_on_hold_says_so():
    services = dict(SERVICES, core=SERVICES['core']._replace(left=HELD))
    containers = look(core=make(state='exited'), side=make('side', 'exited', **SIDE))
    assert plan(containers, services)[1] == (
        'leave side: exited (137): ' + OWNER + ' and not watched'
    )


@pytest.mark.parametrize(
    'service',
    [None, Service(left=HELD), Service(scale=0), Service(scale=0, provided=True)],
    ids=['undeclared', 'on hold', 'off', 'provided'],
)
def test_first_start_does_not_wait_for_what_nobody_will_bring(service):
    services = {name: s for name, s in dict(SERVICES, init=service).items() if s}
    assert 'create core: missing' in plan(look(core=None, side=None, init=None), services)


def test_first_start_does_not_wait_for_what_is_merely_started_first():
    services = dict(SERVICES, side=Service(depends_on={'db': 'service_started'}))
    assert plan(look(side=None, db=None), services) == [
        'create db: missing',
        'create side: missing',
    ]


def test_job_is_done_whether_what_waits_for_it_needs_it_or_not_and_only_need_is_waited_for():
    services = dict(SERVICES, core=SERVICES['core']._replace(optional=['init', 'db']))
    assert plan(look(), services) == []
    assert plan(look(core=None, side=None, init=None, db=None), services) == [
        'create core: missing',
        'create db: missing',
        'create init: missing',
        'leave side: missing: waits for core to run',
    ]


STOPPING = 'somebody is stopping a container'


@pytest.mark.parametrize(
    'container',
    [
        make('db', health='unhealthy'),
        make('db', lost=LOST),
        make('db', owners={'core1': 'network'}, since=50.0),
    ],
    ids=['unhealthy', 'lost', 'in a dead namespace'],
)
def test_what_somebody_is_stopping_is_left_to_him(container):
    history = History(ending=['db1'])
    (line,) = plan(look(db=container), history=history)
    assert line.startswith('leave db: ') and line.endswith(STOPPING)
    assert plan(look(db=container)) and STOPPING not in plan(look(db=container))[0]


def test_what_was_only_made_is_not_started_while_somebody_stops_another_container():
    containers = look(db=make('db', 'created'))
    assert plan(containers, history=History(ending=['core1'])) == ['leave db: created: ' + STOPPING]
    crashed = look(db=make('db', 'exited', exit_code=1))
    assert plan(crashed, history=History(ending=['core1'])) == ['start db: exited (1)']


def test_unhealthy_is_left_alone_if_told_so():
    settings = FAST._replace(unhealthy=bc.Unhealthy.IGNORE)
    lines = plan(look(db=make('db', health='unhealthy')), settings=settings)
    assert lines == ['leave db: unhealthy: told to ignore health']


def test_containers_of_a_scaled_service_are_counted():
    services = dict(SERVICES, db=Service(scale=3))
    assert plan(look(), services) == ['create db: 2 of 3 missing']
    assert plan(look(), dict(SERVICES, db=Service(scale=0, provided=True))) == []


@pytest.mark.parametrize('state', ['exited', 'paused', 'created', 'dead'])
def test_what_is_left_of_a_service_scaled_to_0_stays_as_it_is(state):
    assert plan(look(web=make('web', state)), dict(SERVICES, web=Service(scale=0))) == []


def decide_on_db(state='exited', streak=None, seen=NOW, settings=FAST, crashed=(), **fields):
    """Return the one action about db."""
    db = make('db', state, **fields)
    seen = {(verb, 'db1'): seen for verb in Verb}
    streaks = {'db1': streak} if streak else {}
    history = History(seen, streaks, frozenset(crashed))
    (action,) = find_faults(look(db=db), SERVICES, NOW, history, settings)
    return action


SETTLING = FAST._replace(settle=3)


def test_what_may_have_been_done_by_hand_is_due_when_it_has_lasted_for_settle():
    (action,) = find_faults(look(db=make('db', 'exited')), SERVICES, NOW, History(), SETTLING)
    assert (action.since, action.due) == (NOW, NOW + 3)
    later = decide_on_db(settings=SETTLING, seen=NOW - 2)
    assert (later.since, later.due) == (NOW - 2, NOW + 1)


@pytest.mark.parametrize(
    'case', [{'crashed': ['db1']}, {'state': 'running', 'health': 'unhealthy'}], ids=str
)
def test_crash_and_failed_health_check_are_due_at_once(case):
    assert decide_on_db(settings=SETTLING, **case).due == NOW


def test_what_another_container_did_makes_nothing_due():
    assert decide_on_db(settings=SETTLING, crashed=['core1']).due == NOW + 3


def test_further_repairs_wait_longer_up_to_five_minutes():
    delays = []
    for count in range(14):
        action = decide_on_db(streak=Streak(count, NOW - 1, NOW) if count else None)
        assert action.streak.repairs == count
        delays.append(action.due - NOW)
    assert delays == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300, 300]


def test_crash_in_a_loop_waits_too():
    assert decide_on_db(streak=Streak(4, NOW - 9, NOW), crashed=['db1']).due == NOW + 8


def test_longer_of_settle_and_delay_counts():
    assert decide_on_db(streak=Streak(2, NOW - 9, NOW), settings=SETTLING).due == NOW + 3
    assert decide_on_db(streak=Streak(4, NOW - 9, NOW), settings=SETTLING).due == NOW + 8


def test_ten_seconds_of_running_clear_the_count():
    action = decide_on_db(streak=Streak(9, NOW - 99, NOW - 10))
    assert (action.due, action.streak) == (NOW, Streak(began=NOW))
    assert decide_on_db(streak=Streak(9, NOW - 99, NOW - 9.9)).due == NOW + 256


def test_after_a_restart_for_its_health_running_alone_clears_nothing():
    streak = Streak(9, NOW - 999, NOW - 100, ill=True)
    action = decide_on_db('running', streak, health='unhealthy')
    assert (action.due, action.streak.repairs) == (NOW + 256, 9)


def test_siblings_of_a_container_in_a_crash_loop_do_not_wait_for_it():
    containers = look(db=[make('db', 'exited'), make('db', 'exited', number='2')])
    services = dict(SERVICES, db=Service(scale=3))
    history = History({}, {'db1': Streak(9, NOW - 9, NOW)}, frozenset())
    due = {a.key: a.due - NOW for a in find_faults(containers, services, NOW, history, FAST)}
    assert due == {'db1': 256, 'db2': 0, 'db': 0}


def test_creating_that_fails_is_tried_less_and_less_often():
    history = History({}, {'db': Streak(3, NOW - 9, NOW - 1)}, frozenset())
    (action,) = find_faults(look(db=None), SERVICES, NOW, history, FAST)
    assert action.due == NOW + 4


def test_unpausing_that_fails_is_tried_less_and_less_often():
    assert decide_on_db('paused', Streak(3, NOW - 9, NOW - 1)).due == NOW + 4


def test_what_is_left_alone_is_never_due():
    actions = find_faults(look(core=make(state='exited')), SERVICES, NOW, History(), FAST)
    assert [a.due for a in actions if a.verb is Verb.LEAVE] == [float('inf')]


def draw_containers(rng):
    """Return containers as nobody would expect them."""
    containers = []
    for name in [*SERVICES, 'stranger']:
        for number in range(rng.choice([0, 1, 1, 1, 2])):
            fields = {
                'id': '{}-{}'.format(name, rng.random()),
                'number': str(rng.choice([number, 0]) + 1),
                'left': '' if rng.random() < 0.8 else LABELLED,
                'health': rng.choice(['', 'healthy', 'unhealthy']),
                'lost': rng.choice(['', '', '', 'its network x']),
                'exit_code': rng.choice([None, 0, 1]),
            }
            if name == 'side':
                fields['owners'] = {rng.choice(['shop-core-1', 'none']): 'network'}
            containers.append(make(name, rng.choice(list(State)).value, **fields))
    return [c._replace(since=rng.random()) for c in containers]


@pytest.mark.parametrize('seed', range(200))
def test_invariants_hold_over_random_histories(seed):
    rng = random.Random(seed)
    services = dict(SERVICES, init=Service(left=rng.choice(['', HELD])))
    settings, now, history = SETTLING, NOW, History({}, {}, frozenset())
    for _ in range(20):
        now += rng.choice([0.01, 0.5, 1.0, 7.0])
        containers = draw_containers(rng)
        actions = bc.decide(containers, services, now, history, settings)
        assert actions == bc.decide(containers, services, now, history, settings)
        judged = [action.container for action in actions if action.container]
        assert judged == containers, 'one action for each container'
        for action in actions:
            check_action(action, services, history, settings)
        due = [a for a in actions if a.due <= now]
        streaks = {a.key: a.streak._replace(repairs=a.streak.repairs + 1, ended=now) for a in due}
        seen = {(a.verb, a.key): a.since for a in actions if now < a.due < float('inf')}
        crashed = frozenset(c.id for c in containers if rng.random() < 0.3)
        history = History(seen, dict(history.streaks, **streaks), crashed)


def check_action(action, services, history, settings):
    container, known = action.container, action.service in services
    assert action.cause
    if action.verb is Verb.LEAVE:
        assert action.due == float('inf') and (action.why or not action.wanted)
        if known and not action.why:
            fine = container.state is State.RUNNING and not container.lost
            assert fine or container.exit_code == 0, 'no fault is concealed'
        return
    assert known
    assert action.wanted and not action.why and not services[action.service].left
    at_once = action.key in history.crashed or action.cause == 'unhealthy'
    assert at_once or action.due >= action.since + settings.settle, 'never before settle'
    if container:
        assert not container.left
        assert container.state not in (State.RESTARTING, State.REMOVING)


def test_finished_one_shot_is_not_made_anew_for_a_network_that_is_gone():
    wanted = {'init': 'service_completed_successfully'}
    services = {'init': Service(), 'web': Service(depends_on=wanted, scale=0)}
    done = Container('a', 'init-1', 'init', '1', State.EXITED, 0, lost='its network shop')
    assert find_faults([done], services, 0.0, History(), FAST) == []


def test_sharer_whose_start_is_not_known_is_not_restarted():
    owner = Container('a', 'core-1', 'core', '1', State.RUNNING, since=5.0)
    sharer = Container('b', 'side-1', 'side', '1', State.RUNNING, owners={'a': 'network'})
    services = {'core': Service(), 'side': Service(owners=('core',))}
    assert find_faults([sharer, owner], services, 0.0, History(), FAST) == []
    (action,) = find_faults([sharer._replace(since=3.0), owner], services, 0.0, History(), FAST)
    assert action.verb is Verb.RESTART


# -- the stack: what is there ----------------------------------------------------------------------


def shop(settings=FAST):
    """The stack of the project named shop."""
    stack = bc._Stack(settings)
    stack.project = 'shop'
    return stack


def seen(stack, afresh=True):
    """Return the services and conditions that a look shows, the newest first."""
    return [(c.label, c.condition) for c in stack.observe(afresh)]


def test_look_shows_all_containers_of_the_project_but_one_offs_the_newest_first(world):
    world.run('core', 'side')
    label = 'com.docker.compose.'
    world.add('core', 'exited', labels={label + 'oneoff': 'True'})
    world.add('core', id='stranger', labels={label + 'project': 'other'})
    world.add('old', 'exited', exit_code=3)
    for number, id in enumerate(['core1', 'old1', 'side1']):
        world.find(id)['Created'] = '2026-11-25T14:00:0{}Z'.format(number)
    assert seen(shop()) == [('side', 'running'), ('old', 'exited (3)'), ('core', 'running')]


def test_look_at_a_stack_that_is_well_is_one_request_whatever_the_number_of_containers(world):
    world.run(**{'s{}'.format(number): {} for number in range(100)})
    stack = shop()
    assert len(stack.observe()) == 100
    before = len(world.log)
    assert len(stack.observe(afresh=False)) == 100
    (request,) = world.log[before:]
    assert request.startswith('GET /containers/json?all=1&filters=')


def inspected(world, stack):
    """Return whom a look inspects that goes on from what is known."""
    before = len(world.log)
    stack.observe(afresh=False)
    asked = [line for line in world.log[before:] if line.split('?')[0].endswith('1/json')]
    return sorted(re.findall('/([a-z]+)1/json', ''.join(asked)))


def test_only_what_is_not_known_or_may_have_changed_unseen_is_inspected(world):
    world.run('core', 'side', 'db', 'ill', 'web')
    world.crash('db1', 3)
    world.turn('ill1', 'unhealthy')
    world.act('pause', 'web1')
    stack = shop()
    stack.observe()
    assert inspected(world, stack) == ['ill', 'web']
    del stack.known['core1']
    assert inspected(world, stack) == ['core', 'ill', 'web']
    world.act('start', 'db1')
    world.crash('db1', 4)
    assert inspected(world, stack) == ['db', 'ill', 'web']


def test_look_at_a_stack_with_a_job_that_is_done_is_one_request_too(world):
    once = {'init': {'condition': 'service_completed_successfully'}}
    world.run('init', core={'depends_on': once})
    world.crash('init1', 0)
    stack = shop()
    stack.read_services()
    stack.observe()
    before = len(world.requests())
    assert seen(stack, afresh=False)[-1] == ('init', 'exited (0)')
    (request,) = world.requests()[before:]
    assert request.startswith('GET /containers/json?all=1&filters=')


def test_container_that_an_event_named_is_seen_as_it_is_although_the_list_lags_behind(world):
    world.run('core')
    with watch() as w:
        run_cycle(w)
        world.lag('core1')
        world.crash('core1', 3)
        assert seen(w.stack, afresh=False) == [('core', 'running')]
        hear(w, world)
        w._take_events()
        assert seen(w.stack, afresh=False) == [('core', 'exited (3)')]
        world.act('start', 'core1')
        world.lag('core1')
        world.act('pause', 'core1')
        hear(w, world)
        w._take_events()
        assert seen(w.stack, afresh=False) == [('core', 'paused')]
        world.stale.clear()
        assert seen(w.stack, afresh=False) == [('core', 'paused')]


def test_container_that_cannot_be_inspected_in_time_is_seen_as_the_list_shows_it(world):
    world.run('core', 'side')
    world.crash('core1', 3)
    world.fault('GET /containers/core1/json', hang=True)
    assert sorted(seen(shop(FAST._replace(timeout=0.3)))) == [
        ('core', 'exited (3)'),
        ('side', 'running'),
    ]


def test_container_that_is_removed_between_list_and_inspect_is_not_there(world):
    world.run('core', 'side')
    world.fault('GET /containers/core1/json', call=lambda: world.act('remove', 'core1', force='1'))
    assert seen(shop()) == [('side', 'running')]


@pytest.mark.parametrize('answer', ['{}', 'null', '[1]', '[{}]', '[{"Id": "x"}]', '"text"', '7'])
def test_list_that_is_none_is_an_error_of_one_line(world, answer):
    raw = 'HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{}'.format(len(answer), answer)
    world.fault('GET /containers/json', garbage=raw.encode())
    with pytest.raises(ComposeError, match='^GET /containers.*: its answer is not understood'):
        shop().observe()


def lose(stack, service='side'):
    """Return what the container of this service has lost."""
    (lost,) = [c.lost for c in stack.observe() if c.service == service]
    return lost


def test_network_that_is_gone_is_noticed_on_what_does_not_run(world):
    back = world.add_network('shop_back')
    world.networks['net1'] = dict(world.networks.pop(back), Id='net1')
    world.run('core')
    world.add('side', networks=['shop_default', 'shop_back'])
    del world.networks['net1']
    assert lose(shop()) == ''  # it runs, with what it has
    world.crash('side1')
    assert lose(shop()) == 'its network shop_back'
    world.add_network('shop_back')  # made anew: another one
    assert lose(shop()) == 'its network shop_back'


def test_network_of_a_container_that_was_never_started_is_looked_for_by_its_name(world):
    world.run('core')
    world.add('side', 'created')
    network = world.find('side1')['NetworkSettings']['Networks']['shop_default']
    network['NetworkID'] = ''
    assert lose(shop()) == ''
    world.networks.clear()
    assert lose(shop()) == 'its network shop_default'


@pytest.mark.parametrize('mode', ['network', 'pid', 'ipc'])
@pytest.mark.parametrize('state', ['running', 'exited'])
def test_owner_that_is_gone_is_noticed_whether_it_runs_or_not(world, mode, state):
    world.run('core', 'db')
    key = {'network': 'network_mode'}.get(mode, mode)
    world.add('side', state, **{key: 'container:core1'})
    assert lose(shop()) == ''
    world.act('remove', 'core1', force='1')
    assert lose(shop()) == 'the container whose {} it shares'.format(mode)


def test_owner_outside_the_project_is_asked_for_by_itself(world):
    world.run('core')
    world.add('core', id='vpn', name='vpn', labels={'com.docker.compose.project': 'other'})
    world.add('side', network_mode='container:vpn')
    assert lose(shop()) == ''
    world.act('remove', 'vpn', force='1')
    assert lose(shop()) == 'the container whose network it shares'


def commit(world, service='core'):
    """Make an image of a container, as `docker commit` does, and run it beside: return its id."""
    original = world.find(service + '1')
    labels = original['Config']['Labels']
    labels.setdefault('com.docker.compose.config-hash', 'cafe')
    world.add_image('sha256:snapshot', 'snapshot:latest', **labels)
    more = {'id': 'copy', 'name': 'mine', 'image': 'snapshot', 'image_id': 'sha256:snapshot'}
    return world.add(service, labels=labels, **more)


def test_container_that_somebody_runs_from_a_committed_image_is_none_of_the_stack(world):
    world.run('core', 'side')
    commit(world)
    assert [c.id for c in shop().observe()] == ['side1', 'core1']
    del world.images['sha256:snapshot']  # a forced removal: nothing tells them apart any more
    assert len(shop().observe()) == 3


def test_service_of_a_committed_image_is_told_from_its_copies(world):
    world.run('core', 'side')
    commit(world)
    label = {'com.docker.compose.config-hash': 'beef'}
    world.add('web', image='snapshot', image_id='sha256:snapshot', labels=label)
    assert [c.service for c in shop().observe()] == ['web', 'side', 'core']


def test_container_made_anew_of_a_committed_image_is_the_services_own(world):
    world.run('core', 'side')
    original = world.find('core1')['Config']['Labels']
    world.add_image('sha256:fixed', 'core:latest', **original)  # committed under the old tag
    label = {'com.docker.compose.image': 'sha256:fixed'}
    world.add('core', image='core:latest', image_id='sha256:fixed', labels=label, id='new')
    assert [c.id for c in shop().observe()] == ['new', 'side1', 'core1']


@pytest.mark.parametrize('keys', ['service', 'oneoff config-hash', 'service oneoff config-hash'])
def test_what_has_only_some_of_composes_labels_is_none_of_the_stack(world, keys):
    world.run('core', 'side')
    id = world.add('core')
    for key in keys.split():
        del world.find(id)['Config']['Labels']['com.docker.compose.' + key]
    assert [c.id for c in shop().observe()] == ['side1', 'core1']


def test_image_is_asked_for_once(world):
    world.run('core', 'side', 'db')
    stack = shop()
    for _ in range(3):
        stack.observe()
    assert [r.split('?')[0] for r in world.requests() if '/images/' in r] == [
        'GET /images/sha256:busybox/json'
    ]


# -- the stack: what is declared -------------------------------------------------------------------


def test_compose_files_come_before_every_compose_command(world, tmp_path):
    file = tmp_path / '-odd "name"\n.yml'
    file.write_text('')
    world.declare('core')
    stack = bc._Stack(Settings.load(docker_compose=[str(file)]))
    stack.read_services()
    assert world.commands() == [['compose', '--file', str(file), 'config', '--format', 'json']]
    assert (stack.project, set(stack.services)) == ('shop', {'core'})


def test_commands_run_in_the_folder_where_it_began(world, tmp_path, monkeypatch):
    stack, before = bc._Stack(FAST), os.getcwd()
    monkeypatch.chdir(str(tmp_path))
    stack.compose('config')
    bc._Stack(FAST).compose('config')
    assert [call.cwd for call in world.calls()] == [before, str(tmp_path)]


@pytest.mark.parametrize(
    'play',
    [
        {'code': 15, 'err': 'yaml: line 3: no'},
        {'out': ''},
        {'out': 'garbage'},
        {'out': '[]'},
        {'out': 'null'},
        {'out': '{"name": "shop"}'},
        {'out': '{"name": "shop", "services": {}}'},
        {'out': '{"name": "shop", "services": ["core"]}'},
        {'out': '{"name": "shop", "services": {"core": 7}}'},
        {'out': '{"name": "shop", "services": {"core": {"scale": "x"}}}'},
        {'out': '{"name": "shop", "services": {"core": null}}'},
    ],
    ids=str,
)
def test_config_that_fails_or_names_no_services_keeps_what_was_known(world, play):
    world.declare('core')
    world.command('compose config', **play)
    stack = bc._Stack(FAST)
    with pytest.raises(ComposeError, match='^docker compose (config|version)'):
        stack.read_services()
    world.heal()
    stack.read_services()
    world.command('compose config', **play)
    with warned() as texts:
        stack.read_services()
    assert set(stack.services) == {'core'} and stack.project == 'shop'
    assert len(texts) == 1 and texts[0].startswith('the Compose file cannot be read; going on by')


@pytest.fixture
def old_world(world):
    """A world with Compose 1.29 only."""
    world.compose = '1.29.2'
    world.install('docker-compose')
    world.declare('core', 'side')
    world.config = 'services:\n  core:\n    image: b\n  side:\n    image: b\nversion: "3.9"\n'
    return world


def test_compose_1_stands_in_where_docker_has_no_compose(old_world, tmp_path):
    old_world.bring_up()
    stack = bc._Stack(FAST)
    stack.read_services()
    assert (stack.command, stack.legacy) == (('docker-compose',), True)
    assert set(stack.services) == {'core', 'side'}
    assert [c.service for c in stack.observe()] == ['side', 'core'] and stack.project == 'shop'
    (tmp_path / 'x.yml').write_text('')
    with_file = bc._Stack(FAST._replace(docker_compose=(str(tmp_path / 'x.yml'),)))
    with_file.read_services()
    assert with_file.command == ('docker-compose',)


@pytest.mark.parametrize('api, pinned', [(41, None), (44, None), (45, '1.44'), (51, '1.44')])
def test_compose_1_is_told_the_last_api_version_that_it_understands(old_world, api, pinned):
    old_world.api = api
    stack = bc._Stack(FAST)
    stack.read_services()
    stack.compose('up')
    assert old_world.calls()[-1].env.get('COMPOSE_API_VERSION') == pinned


def test_api_version_that_the_environment_pins_stays(old_world, monkeypatch):
    old_world.api = 51
    monkeypatch.setenv('COMPOSE_API_VERSION', '1.40')
    stack = bc._Stack(FAST)
    stack.read_services()
    stack.compose('up')
    assert old_world.calls()[-1].env['COMPOSE_API_VERSION'] == '1.40'


def test_absence_of_both_is_told(world):
    world.compose = '1.29.2'
    with pytest.raises(ComposeError, match='docker-compose version: .*not found'):
        bc._Stack(FAST).read_services()


@pytest.mark.parametrize(
    'play', [{'code': 1, 'err': 'no space'}, {'hang': True}, {'code': 14}], ids=str
)
def test_compose_that_fails_or_hangs_is_not_replaced_by_the_one_of_another_generation(world, play):
    world.install('docker-compose')
    world.declare('core')
    world.command('compose', **play)
    stack = bc._Stack(FAST._replace(timeout=0.5))
    with pytest.raises(ComposeError):
        stack.read_services()
    assert {call.program for call in world.calls()} == {'docker'}
    world.heal()
    stack.read_services()
    assert stack.command == ('docker', 'compose') and not stack.legacy


def test_compose_command_that_somebody_gave_is_never_replaced(old_world):
    stack = bc._Stack(FAST._replace(compose_command=('docker', 'compose')))
    with pytest.raises(ComposeError, match='is not a docker command|unknown'):
        stack.read_services()
    assert {call.program for call in old_world.calls()} == {'docker'}


@pytest.mark.parametrize('way', ['variable', 'command'])
def test_service_of_an_enabled_profile_is_expected_of_compose_1(old_world, way, monkeypatch):
    old_world.config = 'services:\n  debug:\n    profiles:\n    - debug\nversion: "3"\n'
    settings = FAST
    if way == 'variable':
        monkeypatch.setenv('COMPOSE_PROFILES', 'x,debug')
    else:
        settings = FAST._replace(compose_command=('docker-compose', '--profile', 'debug'))
    stack = bc._Stack(settings)
    stack.read_services()
    assert stack.services['debug'].scale == 1


# -- the stack on a swarm --------------------------------------------------------------------------

SWARM = FAST._replace(mode=bc.Mode.SWARM)


def task(wanted, state, error=None, created=1, service='1'):
    status = {'State': state, 'Err': error} if error else {'State': state}
    moment = '2026-11-25T13:44:{:02}Z'.format(created)
    return {'ServiceID': service, 'DesiredState': wanted, 'Status': status, 'CreatedAt': moment}


RUNNING = task('running', 'running')
FULL = 'no suitable node (insufficient resources on 3 nodes)'


@pytest.mark.parametrize(
    'tasks, condition',
    [
        ([RUNNING, RUNNING], 'running (2/2)'),
        ([RUNNING, RUNNING, RUNNING], 'running (3/2)'),  # scaled down: the last one just ends
        ([RUNNING], 'left to Swarm (1/2, starting)'),
        ([RUNNING, task('running', 'running', service='2')], 'left to Swarm (1/2, starting)'),
        ([RUNNING, task('shutdown', 'running')], 'left to Swarm (1/2, starting)'),  # its node died
        ([RUNNING, task('ready', 'ready')], 'left to Swarm (1/2, starting)'),
        ([RUNNING, task('running', 'pending', FULL)], 'left to Swarm (1/2, {})'.format(FULL)),
        (
            [
                task('shutdown', 'failed', 'task: non-zero exit (4)', created=3),
                task('shutdown', 'failed', 'task: non-zero exit (3)', created=2),
                task('ready', 'ready', created=4),
                RUNNING,
            ],
            'left to Swarm (1/2, task: non-zero exit (4))',
        ),
        ([RUNNING, RUNNING, task('shutdown', 'failed', 'exit (1)')], 'running (2/2)'),
    ],
)
def test_replicas_are_those_tasks_that_run_and_shall_run(world, tasks, condition):
    counts = {'RunningTasks': 2, 'DesiredTasks': 2}  # also of a node that is down
    world.swarm['services'].append(
        {'ID': '1', 'Spec': {'Name': 'shop_core'}, 'ServiceStatus': counts}
    )
    world.swarm['tasks'] = tasks
    world.declare('core')
    with contextlib.closing(bc._make_stack(SWARM)) as stack:
        stack.open()
        (container,) = stack.observe()
        assert (container.service, container.condition) == ('core', condition)
    own = json.dumps({'label': ['com.docker.stack.namespace=shop']})
    asked = [line for line in map(str, world.log) if re.match('GET /(tasks|services)', line)]
    assert [parse_query(line)['filters'] for line in asked] == [own, own]


def test_stack_that_a_swarm_does_not_remove_is_an_error(world):
    world.declare('core')
    world.command('stack rm', code=1, err='no way')
    with pytest.raises(ComposeError, match='docker stack rm shop: exit code 1: no way'):
        bc.stop_container(SWARM)


def test_stack_on_a_swarm_that_is_removed_is_the_one_that_was_started(world):
    world.declare('core')
    world.command('stack rm', out='')
    with contextlib.closing(bc._make_stack(SWARM)) as stack:
        stack.read_services()
        world.command('compose config', out='{"name": "other", "services": {"core": {}}}')
        stack.stop()
    assert world.changes() == ['stack rm shop']


def test_shortage_on_a_swarm_lasts_through_an_outage_and_is_told_once(world):
    world.declare('core')
    counts = {'RunningTasks': 1, 'DesiredTasks': 1}
    world.swarm['services'].append(
        {'ID': '1', 'Spec': {'Name': 'shop_core'}, 'ServiceStatus': counts}
    )
    with contextlib.closing(bc._make_stack(SWARM)) as stack:
        stack.open()
        (fault,) = stack.find_faults()
        repair = bc._Task(stack.act, Verb.START, [fault])
        with warned() as texts:
            repair.begin()
            world.fault('GET /tasks', status=500, message='no leader')
            before = len(world.log)
            assert eventually(lambda: str(world.log[before:]).count('GET /tasks') > 2)
            assert not repair.ended.is_set()
            stack.flag.value = False
            repair.wait(20)
    assert isinstance(repair.error, bc._Cancelled)
    assert texts == ['core: left to Swarm (0/1, starting)']


def test_containers_that_a_swarm_is_still_ending_after_the_time_are_told(world, caplog):
    world.declare('core')
    world.swarm['tasks'] = [task('remove', 'running')]
    world.command('stack rm', out='')
    with pytest.warns(ComposeWarning, match='Swarm is still ending some of its containers'):
        bc.stop_container(SWARM._replace(timeout=0.5))
    assert 'stopped' not in caplog.messages


@pytest.mark.parametrize('prune', list(bc.Prune))
def test_nothing_is_pruned_where_a_swarm_runs_the_stack(world, prune):
    world.declare('core')
    world.command('stack rm', out='')
    bc.stop_container(SWARM._replace(prune=prune))
    assert world.changes() == ['stack rm shop']


def test_engine_that_is_too_old_for_the_mode_is_told_before_anything_is_changed(
    world, command, caplog
):
    world.api = 40
    world.declare('core')
    for words in (['check'], ['status'], ['run']):
        caplog.clear()
        code, _, errors = command(*words, '--mode', 'swarm')
        told = [*errors.splitlines(), *caplog.messages]
        assert code == 2 and len(told) == 1
        assert told[0].endswith('--mode swarm: it takes an engine with API 1.41 or later')
    assert world.changes() == []


# -- the watcher -----------------------------------------------------------------------------------


def test_each_container_is_repaired_by_its_own_request_and_no_neighbour_is_touched(world):
    world.run('core', 'db', 'side', 'web', 'ill')
    world.act('stop', 'core1')
    world.crash('db1', 0)
    world.act('pause', 'web1')
    world.turn('ill1', 'unhealthy')
    with watch() as w:
        run_cycle(w)
    expected = ['restart ill1', 'start core1', 'start db1', 'unpause web1']
    assert sorted(summary(world)) == expected
    assert {world.state(id) for id in world.containers} == {'running'}


def test_unhealthy_container_that_somebody_stops_is_restarted_only_if_it_outlasts_its_grace(world):
    world.run('core', 'side')
    clock = Clock()
    with watch(clock=clock) as w:
        w.cycle()
        world.emit('kill', 'core1', signal='15')
        world.turn('core1', 'unhealthy')
        hear(w, world)
        assert run_cycle(w) == 10.0 and summary(world) == []  # its time to stop
        clock.now += 10.1
        run_cycle(w)
    assert summary(world) == ['restart core1']


def test_container_that_ends_by_a_signal_is_not_being_stopped_any_more(world):
    world.run('core', 'side')
    clock = Clock()
    with watch(clock=clock) as w:
        w.cycle()
        world.act('kill', 'core1')
        hear(w, world)
        run_cycle(w)
        world.turn('core1', 'unhealthy')
        run_cycle(w)
        clock.now += 2
        run_cycle(w)
    assert summary(world) == ['start core1', 'restart core1']


def test_container_that_has_ended_is_not_being_stopped_although_no_event_has_told_of_its_end(world):
    world.run('core', 'side')
    with watch() as w:
        w.cycle()
        world.emit('kill', 'core1', signal='15')
        world.change('core1', 'exited', 143)  # the engine was stopped
        hear(w, world)
        run_cycle(w)
    assert summary(world) == ['start core1']


def test_sibling_that_crashes_does_not_wait_for_what_is_done_for_its_service(world):
    world.declare(core={'scale': 2}, side={})
    world.add('core')
    world.add('side')
    world.command('compose up', hang=True)
    with watch() as w:
        w.cycle()
        assert eventually(lambda: len(world.changes()) == 1)
        world.crash('core1')
        hear(w, world)
        w.cycle()
        assert eventually(lambda: summary(world)[1:] == ['start core1'])
        world.heal()


def test_container_that_has_lost_what_it_was_made_for_is_stopped_before_it_is_removed(world):
    world.run('core', side={'network_mode': 'service:core', 'scale': 2})
    world.act('remove', 'core1', force='1')
    with watch() as w:
        run_cycle(w)
        run_cycle(w)
    lines = [line for line in summary(world) if 'side' in line]
    assert lines.index('stop side1') < lines.index('remove side1')


def test_missing_services_are_created_by_one_command_without_what_they_depend_on(world):
    world.run('side')
    world.declare('core', 'side', 'db')
    with watch() as w:
        run_cycle(w)
    assert summary(world) == ['compose up --detach --no-recreate --no-deps core db']


def test_stack_that_was_never_up_is_brought_up(world):
    world.declare('core', side={'network_mode': 'service:core'})
    with watch() as w:
        run_cycle(w)
        assert sorted(world.containers) == ['core1']
        run_cycle(w)
    assert world.state('side1') == 'running'


def test_compose_waits_for_a_moment_of_quiet_while_more_is_being_removed(world):
    world.run('core', 'side')
    clock = Clock()
    with watch(clock=clock) as w:
        run_cycle(w)
        world.change('side1', 'removing')
        world.act('remove', 'core1', force='1')
        w.stirred = clock()
        assert run_cycle(w) <= 0.02 and 'core1.2' not in world.containers
        world.act('remove', 'side1', force='1')
        clock.now += 0.01
        run_cycle(w)
        assert summary(world)[-1] == 'compose up --detach --no-recreate --no-deps core side'


def test_dead_container_is_removed_and_created_anew(world):
    world.run('core', 'side')
    world.change('core1', 'dead')
    with watch() as w:
        run_cycle(w)
        assert summary(world) == ['remove core1']
        run_cycle(w)
    assert world.state('core1.2') == 'running' and world.state('side1') == 'running'


def test_container_whose_network_is_gone_is_created_anew(world):
    world.run('core', 'side')
    world.act('stop', 'core1')
    world.networks.clear()
    with watch() as w:
        run_cycle(w)
    assert summary(world)[-1] == 'compose up --detach --force-recreate --no-deps core'
    assert world.state('core1.2') == 'running' and 'core1' not in world.containers
    assert world.state('side1') == 'running'


def test_container_whose_network_is_gone_is_removed_where_compose_would_replace_its_copy(world):
    world.run('core', 'side')
    copy = commit(world)
    world.act('stop', 'core1')
    world.networks.clear()
    with watch() as w:
        run_cycle(w)
    assert summary(world)[-1] == 'remove core1' and copy in world.containers


def test_files_are_read_anew_after_a_failed_up_although_no_container_is_left(world):
    world.run('core')
    file = pathlib.Path('compose.yml').absolute()
    file.touch()
    with watch(FAST._replace(docker_compose=(str(file),))) as w:
        run_cycle(w)
        world.act('remove', 'core1', force='1')
        world.command('compose up core', code=1, err='no core')
        run_cycle(w)
        os.utime(str(file), (1, 1))
        world.services.clear()
        world.declare('kernel')
        run_cycle(w)
    assert world.state('kernel1') == 'running'


def test_sharer_of_a_removed_owner_is_created_anew_after_it(world):
    world.run('core', side={'network_mode': 'service:core'})
    world.declare('core', side={'network_mode': 'service:core'})
    world.act('remove', 'core1', force='1')
    with watch() as w:
        run_cycle(w)
        run_cycle(w)
    assert summary(world) == [
        'compose up --detach --no-recreate --no-deps core',
        'compose up --detach --force-recreate --no-deps side',
    ]
    assert world.find('side1.2')['HostConfig']['NetworkMode'] == 'container:core1.2'


def test_sharer_of_a_restarted_owner_is_restarted(world):
    world.run('core', side={'network_mode': 'service:core'})
    world.act('restart', 'core1')
    with watch() as w:
        run_cycle(w)
    assert summary(world) == ['restart side1']


def test_container_that_compose_cannot_create_anew_is_removed_and_created(world, caplog):
    world.run('core', 'side')
    world.act('stop', 'core1')
    world.networks.clear()
    world.command('compose up --force-recreate', code=1, err='no way\n')
    with watch() as w:
        run_cycle(w)
        run_cycle(w)
    assert [line for line in summary(world) if not line.startswith('stop')] == [
        'compose up --detach --force-recreate --no-deps core',
        'remove core1',
        'compose up --detach --no-recreate --no-deps core',
    ]
    assert world.state('core1.2') == 'running'


@ignores_warnings
def test_busy_port_costs_no_container(world):
    world.run('core', 'side')
    world.act('stop', 'core1')
    message = 'driver failed programming external connectivity: port is already allocated'
    world.fault('POST /containers/core1/start', status=500, message=message)
    world.command('compose up', code=1, err=message)
    clock = Clock()
    with watch(clock=clock) as w:
        for _ in range(5):
            run_cycle(w)
            clock.now += 400
    assert 'core1' in world.containers
    assert not [line for line in summary(world) if 'remove' in line or 'recreate core' in line]


def test_nothing_that_may_have_been_done_by_hand_is_repaired_before_it_has_settled(world):
    clock = Clock()
    world.run('core', 'side')
    with watch(FAST._replace(settle=5), clock) as w:
        run_cycle(w)
        world.act('stop', 'core1')
        hear(w, world)
        assert run_cycle(w) == 5
        clock.now += 4.9
        assert run_cycle(w) == pytest.approx(0.1)
        world.act('start', 'core1')
        assert run_cycle(w) > 3000  # it came back by itself: forgotten
        clock.now += 1
        world.act('stop', 'core1')
        hear(w, world)
        assert run_cycle(w) == 5
        assert summary(world) == []
        clock.now += 5
        run_cycle(w)
    assert summary(world) == ['start core1']


ENDINGS = {
    'stopped': (lambda w: w.act('stop', 'core1'), False),
    'killed': (lambda w: w.act('kill', 'core1'), False),
    'killed by TERM': (lambda w: w.act('kill', 'core1', signal='TERM'), False),
    'paused': (lambda w: w.act('pause', 'core1'), False),
    'removed': (lambda w: w.act('remove', 'core1', force='1'), False),
    'seen by a look only': (lambda w: w.change('core1', 'exited', 137), False),
    'crashed': (lambda w: w.crash('core1', 3), True),
    'ended with 0': (lambda w: w.crash('core1', 0), True),
    'out of memory': (lambda w: w.crash('core1', OOMKilled=True), True),
    'asked to reload, then crashed': (
        lambda w: (w.act('kill', 'core1', signal='HUP'), forget(w, 3600), w.crash('core1', 3)),
        True,
    ),
    'asked to reload, and died of it': (
        lambda w: (w.act('kill', 'core1', signal='HUP'), w.crash('core1', 129)),
        False,
    ),
    'stopped long before it ended': (
        lambda w: (w.emit('kill', 'core1', signal='15'), forget(w, 60), w.crash('core1', 137)),
        False,
    ),
    'stopped, started and crashed': (
        lambda w: (w.act('stop', 'core1'), w.act('start', 'core1'), w.crash('core1', 3)),
        True,
    ),
}


def forget(world, seconds):
    """Let the events so far be of that many seconds ago."""
    for event in world.events:
        event['time'] -= seconds
        event['timeNano'] -= seconds * 10**9


@pytest.mark.parametrize('deed', list(ENDINGS))
def test_crash_is_repaired_at_once_and_what_people_do_only_when_it_has_settled(world, deed):
    world.run('core', 'side')
    act, at_once = ENDINGS[deed]
    with watch(FAST._replace(settle=5), Clock()) as w:
        run_cycle(w)
        world.events.clear()
        act(world)
        hear(w, world)
        w.stack.known = {}
        run_cycle(w)
    assert bool(summary(world)) == at_once


def test_end_of_a_stop_within_a_long_grace_period_is_no_crash(world):
    world.run('core', 'side')
    world.find('core1')['Config']['StopTimeout'] = 600
    with watch(FAST._replace(settle=5), Clock()) as w:
        run_cycle(w)
        world.events.clear()
        world.emit('kill', 'core1', signal='15')
        forget(world, 599)
        world.crash('core1')
        hear(w, world)
        run_cycle(w)
    assert summary(world) == []


def test_crash_does_not_hurry_what_is_done_by_hand_later(world):
    world.run('core', 'side')
    clock = Clock()
    with watch(FAST._replace(settle=5), clock) as w:
        run_cycle(w)
        world.crash('core1')
        hear(w, world)
        run_cycle(w)
        assert summary(world) == ['start core1']
        clock.now += 60
        world.act('stop', 'core1')
        hear(w, world)
        assert run_cycle(w) == 5
    assert summary(world) == ['start core1']


def test_deed_right_after_a_repair_waits_for_settle_too(world):
    world.run('core', 'side')
    with watch(FAST._replace(settle=5), Clock()) as w:
        run_cycle(w)
        world.crash('core1')
        hear(w, world)
        run_cycle(w)
        world.act('kill', 'core1')
        hear(w, world)
        assert run_cycle(w) == 5
    assert summary(world) == ['start core1']


def loop(w, world, clock, rounds, id='core1'):
    """Let a container crash, and be repaired, again and again; return the delays."""
    delays = []
    for _ in range(rounds):
        world.crash(id, 3)
        hear(w, world)
        delays.append(0)
        while world.state(id) == 'exited':
            timeout = run_cycle(w)
            if world.state(id) == 'exited':
                delays[-1] += timeout
                clock.now += timeout
        hear(w, world)
        run_cycle(w)
    return [round(delay, 3) for delay in delays]


def test_crash_loop_is_warned_of_from_the_third_repair_on(world, caplog):
    clock = Clock()
    world.run('core', 'side')
    caplog.set_level('INFO', 'broapt_compose')
    with watch(clock=clock) as w, warned() as texts:
        run_cycle(w)
        assert loop(w, world, clock, 5) == [0, 1, 2, 4, 8]
    assert texts == [
        'core: crash loop, exited (3) 3 times in 1 s; next try in 2 s',
        'core: crash loop, exited (3) 4 times in 3 s; next try in 4 s',
        'core: crash loop, exited (3) 5 times in 7 s; next try in 8 s',
    ]
    assert 'core: exited (3) -> started (0.00 s)' in caplog.messages
    assert summary(world) == ['start core1'] * 5


@ignores_warnings
def test_siblings_of_a_container_in_a_crash_loop_are_repaired_at_once(world):
    clock = Clock()
    world.run(core={'scale': 3})
    with watch(clock=clock) as w:
        run_cycle(w)
        assert loop(w, world, clock, 4) == [0, 1, 2, 4]
        world.crash('core1')
        world.crash('core2')
        hear(w, world)
        run_cycle(w)
        assert (world.state('core1'), world.state('core2')) == ('exited', 'running')
        world.act('remove', 'core3', force='1')
        hear(w, world)
        run_cycle(w)
        assert world.state('core3.2') == 'running'


DEEDS = {
    'removed': lambda w: w.act('remove', 'core1', force='1'),
    'killed': lambda w: w.act('kill', 'core1'),
    'stopped': lambda w: w.act('stop', 'core1'),
    'paused': lambda w: w.act('pause', 'core1'),
}


@ignores_warnings
@pytest.mark.parametrize('deed', list(DEEDS))
def test_what_a_person_does_starts_the_count_anew(world, deed):
    clock = Clock()
    world.run('core', 'side')
    with watch(FAST._replace(settle=1), clock) as w:
        run_cycle(w)
        loop(w, world, clock, 7)
        world.crash('core1')
        hear(w, world)
        assert run_cycle(w) == 64
        clock.now += 20
        if deed != 'removed':
            world.act('start', 'core1')
            hear(w, world)
            run_cycle(w)
        DEEDS[deed](world)
        hear(w, world)
        assert run_cycle(w) == 1
        clock.now += 1
        run_cycle(w)
    assert 'running' in [
        world.find(id)['State']['Status'] for id in world.containers if 'core' in id
    ]


@ignores_warnings
def test_own_restart_does_not_start_the_count_anew(world):
    clock = Clock()
    world.run('core', 'side')
    delays = []
    with watch(clock=clock) as w:
        run_cycle(w)
        for _ in range(5):
            world.turn('core1', 'unhealthy')
            hear(w, world)
            delays.append(0)
            while world.find('core1')['State']['Health']['Status'] == 'unhealthy':
                timeout = run_cycle(w)
                unwell = world.find('core1')['State']['Health']['Status'] == 'unhealthy'
                delays[-1] += timeout * unwell
                clock.now += timeout * unwell
            hear(w, world)
            run_cycle(w)
            clock.now += 60  # it takes long to turn unhealthy again
            run_cycle(w)
        assert [round(delay, 3) for delay in delays] == [0, 1, 2, 4, 8]
        world.turn('core1', 'healthy')
        hear(w, world)
        run_cycle(w)
        world.turn('core1', 'unhealthy')
        hear(w, world)
        run_cycle(w)
    assert summary(world) == ['restart core1?t=10'.split('?')[0]] * 6


def test_first_start_of_a_container_does_not_count_as_a_repair(world):
    world.run('side')
    world.declare('core', 'side')
    world.add('core', 'created')
    with watch() as w:
        run_cycle(w)
        assert summary(world) == ['start core1'] and w.streaks == {}


def test_unpausing_does_not_count(world):
    clock = Clock()
    world.run('core', 'side')
    with watch(clock=clock) as w:
        for _ in range(4):
            world.act('pause', 'core1')
            hear(w, world)
            run_cycle(w)
            assert world.state('core1') == 'running'
    assert summary(world) == ['unpause core1'] * 4


def test_repair_that_fails_three_times_with_the_same_error_is_told_with_what_to_do(world):
    clock = Clock()
    world.run('core', 'side')
    world.act('pause', 'core1')
    world.fault('POST', status=500, message='cgroup is stuck')
    with watch(clock=clock) as w, warned() as texts:
        for _ in range(5):
            run_cycle(w)
            clock.now += w.cycle()
    told = [text for text in texts if 'same reason' in text]
    assert len(told) == 1 and 'core: not unpaused 3 times for the same reason' in told[0]
    assert 'cgroup is stuck' in told[0] and 'somebody' in told[0]


def test_container_that_cannot_be_started_is_brought_up_by_compose(world, caplog):
    world.run('core', 'side')
    for id in ('core1', 'side1'):
        world.act('stop', id)
    world.fault('POST /containers/core1/start', status=500, message='network is gone', once=True)
    caplog.set_level('INFO', 'broapt_compose')
    with watch() as w:
        run_cycle(w)
    assert sorted(summary(world)) == [
        'compose up --detach --no-deps core',
        'start core1',
        'start side1',
    ]
    assert sorted(re.sub(r'\d\.\d+ s', 'N s', text) for text in caplog.messages) == [
        'core: exited (143) -> brought up (N s)',
        'core: exited (143), not started: POST /containers/core1/start: '
        'status 500: network is gone',
        'side: exited (143) -> started (N s)',
    ]


def test_container_with_siblings_that_cannot_be_started_is_not_left_to_compose(world):
    world.run(core={'scale': 2})
    world.act('stop', 'core1')
    world.fault('POST /containers/core1/start', status=500, message='no')
    with watch() as w:
        run_cycle(w)
    assert summary(world) == ['start core1'] and w.failures == 1


def test_slow_repair_holds_up_no_other_and_is_not_begun_twice(world):
    world.run('core', 'side', 'db')
    world.turn('core1', 'unhealthy')
    world.fault('POST /containers/core1/restart', hang=True)
    with watch() as w:
        w.cycle()
        assert eventually(lambda: summary(world) == ['restart core1'])
        world.act('stop', 'side1')
        hear(w, world)
        w.cycle()
        assert eventually(lambda: world.state('side1') == 'running')
        w.cycle()
        assert summary(world) == ['restart core1', 'start side1']
        bc.UP_FLAG.value = False


def test_restart_that_takes_long_does_not_hold_up_siblings(world):
    world.run(core={'scale': 3})
    world.turn('core1', 'unhealthy')
    world.fault('POST /containers/core1/restart', hang=True)
    with watch() as w:
        w.cycle()
        assert eventually(lambda: summary(world) == ['restart core1'])
        world.crash('core2')
        world.act('remove', 'core3', force='1')
        hear(w, world)
        w.cycle()
        assert eventually(lambda: world.state('core2') == 'running')
        assert eventually(lambda: 'core3.2' in world.containers)
        bc.UP_FLAG.value = False


def test_services_that_compose_failed_for_get_a_command_each(world, caplog):
    world.declare('core', 'side')
    world.command('compose up', code=1, err='no')
    with watch() as w:
        run_cycle(w)
    create = 'compose up --detach --no-recreate --no-deps '
    assert summary(world) == [create + 'core side', create + 'core', create + 'side']
    assert caplog.messages == [
        '{0}: missing, not created: docker {1}{0}: exit code 1: no'.format(name, create)
        for name in ('core', 'side')
    ]


def test_only_one_compose_command_runs_at_a_time(world):
    world.run('core', 'side')
    world.command('compose up core', hang=True)
    with watch() as w:
        w.cycle()
        world.act('remove', 'core1', force='1')
        hear(w, world)
        w.cycle()
        assert eventually(lambda: len(summary(world)) == 1)
        world.act('remove', 'side1', force='1')
        hear(w, world)
        w.cycle()
        assert not eventually(lambda: len(summary(world)) > 1, seconds=0.5)
        world.heal()
        finish(w)
    assert {world.state(id) for id in ('core1.2', 'side1.2')} == {'running'}


OUTAGES = {
    'gone': lambda w: w.down(),
    'refusing': lambda w: w.down(stale=True),
    'ill': lambda w: w.fault('GET /containers/json', status=500, message='no\nway'),
    'garbage': lambda w: w.fault('GET /containers/json', garbage=b'abc'),
    'closing': lambda w: w.fault('GET /containers/json', close=True),
    'half': lambda w: w.fault('GET /containers/json', half=True),
    'hanging': lambda w: w.fault('GET /containers/json', hang=True),
}


@pytest.mark.parametrize('outage', list(OUTAGES))
def test_outage_is_one_warning_and_one_line_at_its_end_and_no_repair(world, caplog, outage):
    clock = Clock()
    world.run('core', 'side')
    caplog.set_level('INFO', 'broapt_compose')
    with watch(FAST._replace(interval=10, settle=1), clock) as w, warned() as texts:
        run_cycle(w)
        w.stack.engine.limit = 0.2
        world.act('stop', 'core1')
        hear(w, world)
        assert run_cycle(w) == 1
        OUTAGES[outage](world)
        pauses = []
        for _ in range(5):
            clock.now += 4
            pauses.append(run_cycle(w))
        assert pauses == [0.1, 4, 8, 10, 10]
        clock.now += 24
        assert summary(world) == []
        world.heal()
        if outage in ('gone', 'refusing'):
            world.up()
        assert run_cycle(w) <= 1  # what was seen before the outage does not count
    assert len(texts) == 1
    assert texts[0].startswith('Docker does not answer; trying again every 10 s: GET /containers')
    assert caplog.messages[1:] == ['Docker answers again, after 40 s']


def test_outage_lasts_until_the_answer_and_not_until_it_was_asked_for(world, caplog):
    world.run('core')
    clock = Clock()
    caplog.set_level('INFO', 'broapt_compose')
    with watch(clock=clock) as w, warned():
        run_cycle(w)
        world.fault('GET /containers/json', status=500, message='away', once=True)
        w.cycle()

        def hang():
            clock.now += 9

        world.fault('GET /containers/json', call=hang, once=True)
        w.cycle()
    assert caplog.messages[-1] == 'Docker answers again, after 9 s'


def test_config_that_hangs_is_killed_and_what_it_said_before_goes_on_counting(world):
    world.run('core', 'side')
    with watch(FAST._replace(timeout=0.5)) as w, warned() as texts:
        run_cycle(w)
        world.command('compose config', hang=True, deaf=True, child=True)
        world.act('stop', 'core1')
        world.add('new')
        hear(w, world)
        run_cycle(w)
    assert world.state('core1') == 'running'
    assert len(texts) == 1 and 'no answer within 0.5 s' in texts[0]
    assert eventually(lambda: all(map(gone, world.children)))


def test_unexpected_exception_is_logged_with_its_traceback_and_the_next_cycle_runs(world, caplog):
    world.run('core')
    cycles = []

    def notify(text):
        cycles.append(text)
        if len(cycles) > 2:
            bc.UP_FLAG.value = False
        raise RuntimeError('planted')

    with warnings.catch_warnings():
        warnings.simplefilter('error')
        bc._Watch(bc._Stack(FAST._replace(interval=0.01), notify)).run()
    assert len(cycles) == 3 and caplog.text.count('RuntimeError: planted') == 3


def test_changed_definition_makes_the_compose_files_be_read_again(world):
    world.run('core', 'side')
    with watch() as w:
        run_cycle(w)
        world.run('core', 'side', 'new')
        run_cycle(w)
        assert set(w.stack.services) == {'core', 'side', 'new'}


@ignores_warnings
def test_service_manager_hears_of_each_completed_check_and_of_none_in_an_outage(world):
    world.run('core', 'side')
    told = []
    with watch(FAST._replace(settle=5), notify=told.append) as w:
        run_cycle(w)
        world.act('stop', 'core1')
        run_cycle(w)
        world.down()
        run_cycle(w)
        world.up()
    assert told == ['STATUS=2 of 2 running\nWATCHDOG=1', 'STATUS=core: exited (143)\nWATCHDOG=1']


# -- the watcher: events ---------------------------------------------------------------------------


@contextlib.contextmanager
def watching(settings=FAST, notify=str):
    """Let the stack be watched in a thread."""
    with meanwhile(bc._Watch(bc._Stack(settings, notify)).run):
        try:
            yield
        finally:
            bc.UP_FLAG.value = False


def streams(world):
    """Return the moments since which events were asked for."""
    queries = [parse_query(r) for r in world.requests() if r.startswith('GET /events')]
    return [float(query['since']) for query in queries]


@pytest.mark.parametrize('api', [41, 52])
def test_event_leads_to_a_repair_with_an_interval_of_an_hour(world, api):
    world.api = api  # from 52 on, events have no id
    world.run('core', 'side')
    with watching():
        assert eventually(world.streams)
        world.crash('core1')
        assert eventually(lambda: world.state('core1') == 'running')
        world.act('pause', 'side1')
        assert eventually(lambda: world.state('side1') == 'running')
        world.act('remove', 'core1', force='1')
        assert eventually(lambda: 'core1.2' in world.containers)
    assert len(streams(world)) == 1


def test_event_tells_of_what_the_list_does_not_show_yet(world):
    world.run('core', 'side')
    with watching():
        assert eventually(world.streams)
        world.lag('core1')
        world.crash('core1')
        assert eventually(lambda: world.state('core1') == 'running')


def test_what_happens_to_a_container_amid_its_repair_is_looked_at_when_that_is_over(world):
    world.run('core', 'side')
    with watching():
        assert eventually(world.streams)
        world.fault('POST', hang=True)
        world.crash('core1')
        assert eventually(lambda: summary(world) == ['start core1'])
        asked = []
        while eventually(lambda: world.requests() != asked, seconds=0.5):
            asked[:] = world.requests()  # a look that was woken before is over by then
        world.emit('die', 'core1')
        assert not eventually(lambda: world.requests() != asked, seconds=0.5)
        world.emit('pause', 'side1')
        assert eventually(lambda: world.requests() != asked)
        world.heal()
        assert eventually(lambda: world.state('core1') == 'running')
        world.crash('core1')
        assert eventually(lambda: summary(world) == ['start core1'] * 2)


def test_removal_is_heard_of_as_podman_tells_it(world):
    world.run('core', 'side')
    with watching():
        assert eventually(world.streams)
        container = world.containers.pop('core1')
        world.emit('remove', container)
        assert eventually(lambda: 'core1.2' in world.containers)


def test_only_containers_of_this_project_are_listened_to(world):
    world.run('core')
    with watching():
        assert eventually(world.streams)
    (query,) = [parse_query(r) for r in world.requests() if r.startswith('GET /events')]
    filters = json.loads(query['filters'])
    assert filters['type'] == ['container']
    assert filters['label'] == ['com.docker.compose.project=shop']
    assert not [event for event in filters['event'] if event.startswith('exec')]


def test_lost_stream_is_reopened_from_where_it_was_and_nothing_is_missed(world):
    world.run('core', 'side')
    with watching(FAST._replace(interval=0.5)):
        assert eventually(world.streams)
        world.crash('core1')
        assert eventually(lambda: world.state('core1') == 'running')
        last = world.events[-1]['time']
        world.cut_streams()
        assert eventually(lambda: len(streams(world)) > 1 and world.streams())
        world.crash('core1')
        assert eventually(lambda: world.state('core1') == 'running')
    assert last - 1 <= streams(world)[1] <= last


def test_restart_of_an_owner_is_noticed_although_no_event_can_tell_of_it(world):
    world.run('core', side={'network_mode': 'service:core'})
    with watching(FAST._replace(interval=0.3)):
        assert eventually(world.streams)
        world.fault('GET /events', status=500)
        world.cut_streams()
        world.change('core1', 'running', StartedAt=world._now())
        assert eventually(lambda: summary(world) == ['restart side1'])


def test_stream_that_cannot_be_opened_is_tried_again_but_not_in_a_hurry(world):
    world.run('core')
    world.fault('GET /events', status=500)
    with watching(FAST._replace(interval=0.4)):
        assert eventually(lambda: len(streams(world)) == 2)
        assert not eventually(lambda: len(streams(world)) > 3, seconds=0.5)
        world.heal()
        assert eventually(world.streams)


def test_fault_that_only_a_look_finds_lets_the_stream_be_reopened(world):
    world.run('core', 'side')
    with watching(FAST._replace(interval=0.3)):
        assert eventually(world.streams)
        world.crash('side1')  # so that a stream has told of something
        assert eventually(lambda: world.state('side1') == 'running')

        def looks():
            return sum('GET /containers/json' in line for line in world.requests())

        settled = looks() + 3  # what the events have woken is over by then
        assert eventually(lambda: looks() >= settled)
        count = len(streams(world))
        world.change('core1', 'exited', 137)
        assert eventually(lambda: world.state('core1') == 'running')
        assert eventually(lambda: len(streams(world)) > count)


@pytest.mark.parametrize('data', [b'garbage\n', b'{"Action": "die"}\n', b'[]\n'])
def test_event_that_is_none_changes_nothing(world, data, caplog):
    world.run('core', 'side')
    with watching(FAST._replace(interval=0.3)):
        assert eventually(world.streams)
        world.say(data)
        world.act('stop', 'core1')
        assert eventually(lambda: world.state('core1') == 'running')
        assert eventually(lambda: len(streams(world)) == 2 and world.streams())
    assert 'Traceback' not in caplog.text


def test_lowered_flag_ends_the_watcher_at_once_with_an_interval_of_an_hour(world):
    world.run('core', 'side')
    with meanwhile(bc.watch_container, FAST):
        assert eventually(world.streams)
        bc.UP_FLAG.value = False


@pytest.mark.parametrize('request_', ['GET /containers/json', 'GET /events', 'POST'])
def test_lowered_flag_ends_the_watcher_at_once_although_the_engine_hangs(world, request_, caplog):
    world.run('core', 'side')
    world.act('stop', 'core1')
    world.fault(request_, hang=True)
    with warned() as texts, meanwhile(bc.watch_container, FAST._replace(timeout=FOREVER)):
        assert eventually(lambda: any(r.startswith(request_) for r in world.requests()))
        bc.UP_FLAG.value = False
    assert texts == [] and 'Traceback' not in caplog.text


def test_flag_that_is_raised_again_at_once_has_ended_the_watcher_all_the_same(world):
    world.run('core')

    def toggle(_):
        bc.UP_FLAG.value = False
        bc.UP_FLAG.value = True

    with meanwhile(bc._Watch(bc._Stack(FAST, toggle)).run) as thread:
        thread.join(20)
        alive, bc.UP_FLAG.value = thread.is_alive(), False
    assert not alive


def test_interrupted_watch_container_leaves_no_thread_and_no_request(world):
    world.run('core', 'side')
    world.act('stop', 'core1')
    world.fault('POST', hang=True)
    before = set(threading.enumerate())

    def hit():
        assert eventually(lambda: summary(world))
        os.kill(os.getpid(), signal.SIGINT)

    with meanwhile(hit), pytest.raises(KeyboardInterrupt):
        bc.watch_container(FAST)
    assert eventually(lambda: set(threading.enumerate()) <= before | set(world._threads))


def test_watcher_goes_on_when_the_engine_is_another_one_after_an_outage(world):
    world.run('core', 'side')
    with watching(FAST._replace(interval=0.3)), warned() as texts:
        assert eventually(world.streams)
        world.down()
        assert eventually(lambda: not world.streams())
        world.change('core1', 'exited', 137)  # no event tells of it
        threading.Event().wait(0.5)
        world.up()
        assert eventually(lambda: world.state('core1') == 'running')
        assert eventually(world.streams)
        world.crash('core1')
        assert eventually(lambda: world.state('core1') == 'running')
    assert len(texts) == 1


# -- hold and release ------------------------------------------------------------------------------


def hold_file():
    return pathlib.Path('.broapt-hold')


def hold(**seconds):
    """Put services on hold for some seconds."""
    until = {name: time.time() + more for name, more in seconds.items()}
    hold_file().write_text(json.dumps(until))
    return until


def test_what_is_on_hold_is_left_alone_until_it_is_released(world, caplog):
    world.run('core', 'side')
    caplog.set_level('INFO', 'broapt_compose')
    with watch() as w:
        run_cycle(w)
        until = hold(core=600)['core']
        world.act('stop', 'core1')
        world.act('stop', 'side1')
        for _ in range(3):
            run_cycle(w)
        assert (world.state('core1'), world.state('side1')) == ('exited', 'running')
        hold_file().unlink()
        run_cycle(w)
        assert world.state('core1') == 'running'
    clock = time.strftime('%H:%M', time.localtime(until))
    assert [text for text in caplog.messages if 'hold' in text] == [
        'core: on hold until ' + clock,
        'core: not on hold any more',
    ]


def test_hold_ends_by_itself(world):
    world.run('core', 'side')
    hold(core=0.4)
    world.act('stop', 'core1')
    with watching(FAST._replace(interval=0.1)):
        assert eventually(lambda: world.state('core1') == 'running')


def test_missing_service_on_hold_is_not_created(world):
    world.run('side')
    world.declare('core', 'side')
    hold(core=600)
    with watch() as w:
        run_cycle(w)
    assert summary(world) == []


def test_hold_that_has_ended_or_would_last_longer_than_a_day_is_none(world):
    world.run('core', 'side')
    hold(core=-1, side=90000)
    assert bc._Stack(FAST).read_holds() == {}


@pytest.mark.parametrize('text', ['', '[]', '{"core": "x"}', '{"core": null}', 'null', '{"c'])
def test_file_of_holds_that_cannot_be_read_is_one_warning_and_no_hold(world, text):
    world.run('core', 'side')
    hold_file().write_text(text)
    world.act('stop', 'core1')
    with watch() as w, warned() as texts:
        for _ in range(3):
            run_cycle(w)
    assert world.state('core1') == 'running'
    assert len(texts) == 1 and str(hold_file().resolve()) in texts[0]


def test_hold_is_written_beside_the_first_compose_file_as_a_whole(world, tmp_path):
    world.run('core', 'side')
    for name in ('one', 'two'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'c.yml').write_text('')
    files = [str(tmp_path / name / 'c.yml') for name in ('one', 'two')]
    assert bc.main(['hold', 'core', '--for', '30m', '-f', files[0], '-f', files[1]]) == 0
    file = tmp_path / 'one' / '.broapt-hold'
    (until,) = json.loads(file.read_text()).values()
    assert 1790 < until - time.time() < 1801
    assert sorted(os.listdir(str(tmp_path / 'one'))) == ['.broapt-hold', 'c.yml']


def test_hold_names_all_services_if_none_is_named_and_release_ends_what_it_names(world, capsys):
    world.run('core', 'side')
    assert bc.main(['hold']) == 0
    held = json.loads(hold_file().read_text())
    assert set(held) == {'core', 'side'}
    assert all(3590 < until - time.time() < 3601 for until in held.values())
    assert bc.main(['hold', 'core', '--for', '2h']) == 0
    assert bc.main(['release', 'side', 'db']) == 0
    assert set(json.loads(hold_file().read_text())) == {'core'}
    assert bc.main(['release']) == 0
    assert json.loads(hold_file().read_text()) == {}
    clock = r'\d\d:\d\d'
    lines = capsys.readouterr().out.splitlines()
    expected = ['core: on hold until ' + clock, 'side: on hold until ' + clock]
    expected += ['core: on hold until ' + clock, 'side: watched again', 'db: was not on hold']
    assert all(map(re.fullmatch, [*expected, 'core: watched again'], lines)) and len(lines) == 6


@pytest.mark.parametrize('span', ['0s', '25h', '1441m', '30', 'm', '-5m', '1.5h', '', '1d'])
def test_time_of_a_hold_that_is_none_is_bad_usage(world, span, capsys):
    with pytest.raises(SystemExit) as caught:
        bc.main(['hold', 'core', '--for=' + span])
    assert caught.value.code == 2 and not hold_file().exists()
    assert 'such as 90s, 30m or 2h, at most 24h' in capsys.readouterr().err


def test_hold_of_a_service_that_there_is_not_is_bad_usage(world, capsys):
    world.run('core', 'side')
    assert bc.main(['hold', 'cor']) == 2
    assert "SERVICE: 'cor' is not one of core, side" in capsys.readouterr().err
    assert not hold_file().exists()


def test_hold_works_although_the_compose_file_cannot_be_read(world):
    world.run('core', 'side')
    world.command('compose config', code=15, err='yaml: no')
    assert bc.main(['hold', 'core']) == 0
    assert set(json.loads(hold_file().read_text())) == {'core'}
    assert bc.main(['release']) == 0


def test_hold_where_there_is_no_stack_is_an_error_and_writes_nothing(world):
    world.command('compose config', code=14, err='no configuration file provided: not found')
    assert bc.main(['hold']) == 1 and not os.path.exists('.broapt-hold')


def test_hold_that_cannot_be_written_is_an_error_and_leaves_the_old_one(world):
    world.run('core')
    hold(core=60)
    before = hold_file().read_text()
    stack = bc._Stack(FAST)
    with pytest.raises((TypeError, ValueError)):
        stack.write_holds({'core': 60.0, 'side': object()})
    assert hold_file().read_text() == before


def test_start_leaves_as_it_is_what_is_on_hold(world):
    world.run('core', 'side')
    world.act('pause', 'core1')
    pathlib.Path('.broapt-hold').write_text(json.dumps({'core': time.time() + 1000}))
    bc.start_container(FAST)
    assert world.changes() == ['compose up --build --detach --no-deps side']
    assert world.state('core1') == 'paused'


def test_start_leaves_as_it_is_what_is_paused_and_not_watched(world):
    world.declare('core', 'side')
    world.add('core', 'paused', labels={'broapt.watch': 'false'})
    bc.start_container(FAST)
    assert world.changes() == ['compose up --build --detach --no-deps side']
    assert world.state('core1') == 'paused'


def test_failed_start_pauses_again_what_was_paused(world):
    world.run('core')
    world.act('pause', 'core1')
    world.command('compose up --build', code=17, err='no')
    with pytest.raises(ComposeError, match='no'):
        bc.start_container(FAST)
    assert world.state('core1') == 'paused'


@ignores_warnings
@pytest.mark.parametrize('make', [os.mkfifo, os.mkdir], ids=['pipe', 'folder'])
def test_hold_file_of_another_kind_is_no_hold_and_holds_up_nothing(world, make):
    make('.broapt-hold')
    assert bc._Stack(FAST).read_holds() == {}


@ignores_warnings
def test_hold_with_a_number_beyond_all_bounds_is_none(world):
    pathlib.Path('.broapt-hold').write_text('{"core": 1' + '0' * 400 + '}')
    assert bc._Stack(FAST).read_holds() == {}


def test_hold_that_cannot_be_written_leaves_nothing_behind(world):
    os.mkdir('.broapt-hold')
    before = os.listdir('.')
    with pytest.raises(OSError):
        bc._Stack(FAST).write_holds({'core': 1.0})
    assert os.listdir('.') == before


@ignores_warnings
def test_hold_file_that_cannot_be_read_costs_no_descriptor(world):
    os.mkdir('.broapt-hold')
    stack, before = bc._Stack(FAST), len(os.listdir('/proc/self/fd'))
    for _ in range(5):
        assert stack.read_holds() == {}
    assert len(os.listdir('/proc/self/fd')) == before


# -- docker_compose and its parts ------------------------------------------------------------------

UP = 'compose up --build --detach'
ENDED = ['remove core1', 'remove network shop_default', 'remove side1']


def ending(world):
    """Return what was done from the stop on, without the images, sorted: it goes side by side."""
    lines = summary(world)
    rest = lines[lines.index('compose stop') + 1 :]
    return sorted(line for line in rest if not line.startswith('POST /images/prune'))


def test_stack_is_up_and_watched_inside_and_ended_after(world):
    world.declare('core', 'side')
    with bc.docker_compose(FAST) as flag:
        assert flag is bc.UP_FLAG and flag.value
        assert {world.state(id) for id in ('core1', 'side1')} == {'running'}
        assert eventually(world.streams)
        world.crash('core1')
        assert eventually(lambda: world.state('core1') == 'running')
    assert not bc.UP_FLAG.value and not world.containers and not world.networks
    assert summary(world)[:3] == [UP, 'start core1', 'compose stop'] and ending(world) == ENDED
    deletions = [line for line in world.requests() if line.startswith('DELETE /containers')]
    assert all('v=1' in line and 'force=1' in line for line in deletions)  # anonymous volumes


def test_context_can_be_entered_again(world):
    world.declare('core')
    for _ in range(2):
        with bc.docker_compose(FAST):
            assert world.changes()[-1] == UP
        assert not world.containers


def test_start_needs_few_requests_and_commands(world):
    world.declare('core')
    bc.start_container(FAST)
    commands = sorted(' '.join(argv).split(' --')[0] for argv in world.commands())
    assert commands == ['compose up', 'context inspect']
    assert len(world.requests()) <= 4


def answer_config_after_up(world):
    """Let `config` wait for `up`, a moment long; return where it is noted whether that came."""
    came = []
    world.command(
        'compose config', call=lambda: came.append(eventually(lambda: UP in world.changes(), 1))
    )
    return came


def test_first_stack_of_an_engine_is_brought_up_before_its_files_are_read(world):
    world.declare('core')
    came = answer_config_after_up(world)
    with bc.docker_compose(FAST):
        assert world.state('core1') == 'running'
        assert eventually(lambda: came == [True])
        world.crash('core1')
        assert eventually(lambda: world.state('core1') == 'running')
    assert not world.containers


@pytest.mark.parametrize(
    'prepare',
    [
        lambda world: world.add('core', 'exited'),
        lambda world: world.add('other', labels={LABEL + 'project': 'another'}),
        lambda world: hold(core=60),
    ],
    ids=['left of it', 'stack of another project', 'on hold'],
)
def test_files_are_read_first_where_there_may_be_something_to_look_out_for(world, prepare):
    world.declare('core', 'side')
    prepare(world)
    came = answer_config_after_up(world)
    bc.start_container(FAST)
    assert came == [False] and world.state('side1') == 'running'


def test_stack_whose_files_cannot_be_read_although_up_could_is_up_and_that_is_told(world, caplog):
    world.declare('core')
    world.command('compose config', code=15, err='yaml: no')
    with pytest.warns(ComposeWarning, match='docker compose config .*: yaml: no'):
        with bc.docker_compose(FAST):
            assert eventually(lambda: 'Docker does not answer' in caplog.text)
            assert world.state('core1') == 'running'
    assert not world.containers


def test_first_start_that_fails_names_what_is_wrong_with_the_files_and_is_undone(world, caplog):
    world.declare('core')
    world.command('compose up', code=1, err='whatever')
    world.command('compose config', code=15, err='yaml: no')
    with pytest.raises(ComposeError, match='docker compose config .*: yaml: no'):
        bc.start_container(FAST)
    assert not world.containers
    assert caplog.messages == []  # the error says it all


def test_what_up_cannot_mend_is_mended_before_it(world):
    world.run('core', 'side', 'db')
    world.act('pause', 'core1')
    world.change('side1', 'dead')
    world.act('stop', 'db1')
    network = world.find('db1')['NetworkSettings']['Networks']['shop_default']
    network['NetworkID'] = 'older'
    bc.start_container(FAST)
    assert summary(world)[-1] == UP and 'unpause core1' in summary(world)
    assert {world.state(id) for id in world.containers} == {'running'} and len(
        world.containers
    ) == 3


def fail(world):
    """Let the next up create a service and a network, start one that did not run, and fail."""

    def half():
        world.add('side', 'exited', exit_code=1)
        world.add_network('shop_front')
        if 'idle1' in world.containers:
            world.act('start', 'idle1')

    told = 'noise\ndependency failed to start: side is ill\n'
    world.command('compose up --build', code=17, err=told, call=half)


def test_failed_start_undoes_what_it_made_and_leaves_what_was_there(world, caplog):
    world.run('core', 'idle')
    world.declare('core', 'side', 'idle')
    world.act('stop', 'idle1')
    world.logs['side1'] = b'one\ncannot open\xff\n'
    fail(world)
    match = 'docker compose up --build --detach: exit code 17: dependency failed to start: side'
    with pytest.raises(ComposeError, match=match), bc.docker_compose(FAST):
        raise AssertionError('entered')
    states = {id: world.state(id) for id in world.containers}
    assert states == {'core1': 'running', 'idle1': 'exited'}
    assert [n['Name'] for n in world.networks.values()] == ['shop_default']
    assert 'compose stop' not in world.changes() and not bc.UP_FLAG.value
    assert 'side: exited (1): one' in caplog.messages
    assert 'side: exited (1): cannot open\ufffd' in caplog.messages


def test_failed_start_leaves_all_as_it_is_if_told_to_leave(world):
    world.run('core')
    world.declare('core', 'side')
    fail(world)
    with pytest.raises(ComposeError), bc.docker_compose(FAST._replace(on_exit=bc.OnExit.LEAVE)):
        raise AssertionError('entered')
    assert set(world.containers) == {'core1', 'side1'} and len(world.networks) == 2
    assert summary(world) == [UP]


def test_failed_start_of_start_container_is_undone_too(world):
    world.declare('side')
    fail(world)
    with pytest.raises(ComposeError, match='side is ill'):
        bc.start_container(FAST)
    assert not world.containers


def test_what_cannot_be_undone_is_a_warning_and_the_error_still_comes_out(world):
    world.declare('side')
    fail(world)
    world.fault('DELETE', status=500, message='stuck')
    with pytest.raises(ComposeError, match='side is ill'), warned() as texts:
        bc.start_container(FAST)
    assert len(texts) == 1 and 'could not be removed' in texts[0] and 'stuck' in texts[0]


def test_nothing_is_touched_if_it_fails_before_up(world):
    world.run('core', 'side')
    world.command('compose config', code=15, err='yaml: line 3: no')
    with pytest.raises(ComposeError, match='yaml: line 3: no'), bc.docker_compose(FAST):
        raise AssertionError('entered')
    assert summary(world) == [] and world.state('core1') == 'running'


def elsewhere(world, *services):
    """Let the same project have services of another folder."""
    label = {'com.docker.compose.project.working_dir': '/elsewhere'}
    return [world.add(service, labels=label) for service in services]


def test_stack_of_another_folder_with_the_same_project_name_is_not_ended(world, caplog):
    world.run('core')
    ours = world.add('gone')  # of this folder, but not declared any more
    theirs = elsewhere(world, 'other', 'more')
    world.command('compose stop', code=0)
    caplog.set_level('INFO', 'broapt_compose')
    with warned() as texts:
        bc.stop_container(FAST)
    assert set(world.containers) == set(theirs) and ours not in world.containers
    assert {world.state(id) for id in theirs} == {'running'}
    assert list(world.networks) and texts == []
    assert any('stays' in text for text in caplog.messages)


def test_failed_start_leaves_the_stack_of_another_folder_alone(world):
    (theirs,) = elsewhere(world, 'other')
    world.declare('side')
    fail(world)
    with pytest.raises(ComposeError):
        bc.start_container(FAST)
    assert list(world.containers) == [theirs] and world.state(theirs) == 'running'


def test_signal_in_the_middle_of_a_start_undoes_it(world):
    world.run('core')
    world.declare('core', 'side')
    world.command('compose up', hang=True)
    bc.register(FAST)

    def strike():
        assert eventually(lambda: UP in world.changes())
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(0.3)  # what the engine ends only now
        world.add('side')

    with meanwhile(strike), pytest.raises(KeyboardInterrupt), bc.docker_compose(FAST):
        raise AssertionError('entered')
    assert {id: world.state(id) for id in world.containers} == {'core1': 'running'}


def test_signal_while_the_first_files_are_still_read_undoes_the_start(world):
    world.declare('side')
    world.networks.clear()
    world.command('compose config', delay=3, once=True)

    def up():
        world.add_network('shop_front')
        threading.Event().wait(3)

    world.command('compose up', call=up)
    bc.register(FAST)

    def strike():
        assert eventually(lambda: world.networks)
        os.kill(os.getpid(), signal.SIGTERM)

    with meanwhile(strike), pytest.raises(KeyboardInterrupt), bc.docker_compose(FAST):
        raise AssertionError('entered')
    assert not world.networks


def test_failed_start_leaves_running_what_has_replaced_a_container_that_is_left_over(world):
    older = world.add('core', 'exited')
    newer = world.add('core')
    world.declare('core', 'side')
    fail(world)
    with pytest.raises(ComposeError):
        bc.start_container(FAST)
    assert (world.state(older), world.state(newer)) == ('exited', 'running')
    assert 'side1' not in world.containers


def test_flag_that_is_lowered_during_the_start_undoes_it(world):
    world.declare('side')
    world.command('compose up', hang=True, child=True, deaf=True)
    with meanwhile(lambda: eventually(lambda: world.children) and bc.UP_FLAG.clear()):
        with pytest.raises(ComposeError, match='docker compose up: the flag was lowered'):
            with bc.docker_compose(FAST):
                raise AssertionError('entered')
    assert not world.containers
    assert eventually(lambda: world.children and all(map(gone, world.children)))


def test_on_exit_leave_leaves_the_containers_for_the_next_watchdog(world):
    world.declare('core', 'side')
    settings = FAST._replace(on_exit=bc.OnExit.LEAVE)
    with bc.docker_compose(settings):
        before = json.dumps(world.containers)
    assert json.dumps(world.containers) == before and summary(world) == [UP]
    with bc.docker_compose(FAST):
        assert json.dumps(world.containers) == before
    assert not world.containers


def test_stop_ends_one_by_one_what_compose_cannot_then_kills_and_still_cleans_up(world, caplog):
    world.run('core', 'side')
    world.command('compose stop', code=1, err='no way')
    world.fault('POST /containers/core1/stop', status=500, message='stuck')
    bc.stop_container(FAST)
    assert caplog.messages == [
        'docker compose stop: exit code 1: no way; stopping the containers one by one',
        'POST /containers/core1/stop: status 500: stuck; killing the containers',
    ]
    assert ending(world) == sorted(['kill core1', 'stop core1', 'stop side1', *ENDED])


def test_container_that_ends_before_it_can_be_killed_is_stopped(world):
    world.run('core', 'side')
    world.command('compose stop', code=1, err='no way')
    world.fault('POST /containers/core1/stop', status=500, message='stuck')
    world.fault('POST /containers/core1/kill', call=lambda: world.crash('core1'))
    bc.stop_container(FAST)
    assert 'kill core1' in summary(world) and not world.containers


@ignores_warnings
def test_clean_up_that_failed_is_not_told_as_done(world, caplog):
    world.run('core')
    world.fault('DELETE /networks', status=500, message='stuck')
    caplog.set_level('INFO', 'broapt_compose')
    bc.stop_container(FAST)
    assert caplog.messages[-1] == 'stopped'


def test_paused_containers_are_unpaused_so_that_they_can_stop_gracefully(world):
    world.run('core', 'side')
    world.act('pause', 'core1')
    bc.stop_container(FAST)
    assert summary(world)[:2] == ['unpause core1', 'compose stop']


def test_container_that_cannot_be_unpaused_still_gets_its_grace_period(world, caplog):
    world.run('core')
    world.find('core1')['Config']['StopTimeout'] = 77
    world.act('pause', 'core1')
    world.fault('POST /containers/core1/unpause', status=500, message='stuck')
    caplog.set_level('INFO', 'broapt_compose')
    bc.stop_container(FAST)
    assert 'stopping the stack (up to 77 s)' in caplog.messages


@pytest.mark.parametrize('play', [{'hang': True}, {'code': 1, 'err': 'no'}], ids=str)
def test_stack_is_stopped_although_the_compose_file_cannot_be_read_any_more(world, play, caplog):
    world.run('core', 'side')
    with bc.docker_compose(FAST._replace(timeout=1)):
        world.command('compose config', **play)
        world.command('compose stop', code=15, err='yaml: no')
    assert not world.containers and not world.networks


def test_longest_grace_period_comes_on_top_of_the_timeout(world, caplog):
    world.run('core')
    world.add('side', stop_timeout=2)
    world.find('core1')['Config']['StopTimeout'] = 0
    world.command('compose stop', delay=1.2)
    caplog.set_level('INFO', 'broapt_compose')
    bc.stop_container(FAST._replace(timeout=0.5))
    assert caplog.messages[0] == 'stopping the stack (up to 2 s)'
    assert ending(world) == ENDED  # nothing had to be stopped one by one


def test_container_gets_its_own_grace_period_and_the_request_that_on_top(world):
    world.run('core')
    world.find('core1')['Config']['StopTimeout'] = 1
    stack = shop(FAST._replace(timeout=0.5))
    (core,) = stack.observe()
    world.fault('POST', delay=1.0)
    stack.post('stop', core)
    assert world.changes() == ['POST /containers/core1/stop?t=1']
    world.heal()
    world.fault('POST', hang=True)
    with pytest.raises(ComposeError, match='no answer within 1.5 s'):
        stack.post('restart', core)
    assert world.changes()[-1] == 'POST /containers/core1/restart?t=1'


@pytest.mark.parametrize('request_', ['DELETE /containers/core1', 'DELETE /networks'])
def test_failed_clean_up_is_a_warning_and_the_rest_is_cleaned_up(world, request_):
    world.run('core', 'side')
    world.add_image('sha256:old', **{'com.docker.compose.project': 'shop'})
    world.fault(request_, status=500, message='stuck')
    with warned() as texts:
        bc.stop_container(FAST)
    assert len(texts) == 1 and texts[0].startswith('the clean-up failed: ' + request_)
    assert 'stuck' in texts[0]
    assert not {'side1', 'sha256:old'} & (set(world.containers) | set(world.images))


@pytest.mark.parametrize('status', [404, 409])
def test_container_that_somebody_else_removes_is_no_matter(world, status):
    world.run('core', 'side')
    world.fault('DELETE /containers/core1', status=status, message='removal is in progress')
    with warned() as texts:
        bc.stop_container(FAST)
    assert 'side1' not in world.containers and texts == []


def test_only_dangling_images_that_compose_built_for_this_project_are_deleted(world):
    world.run('core')
    label = 'com.docker.compose.project'
    world.add_image('sha256:old', **{label: 'shop'})
    world.add_image('sha256:new', 'shop-core:latest', **{label: 'shop'})
    world.add_image('sha256:other', **{label: 'other'})
    world.add_image('sha256:plain')
    bc.stop_container(FAST)
    assert set(world.images) == {'sha256:busybox', 'sha256:new', 'sha256:other', 'sha256:plain'}


@pytest.mark.parametrize(
    'prune, last', [('system', 'system prune --volumes --force'), ('none', 'compose stop')]
)
def test_other_clean_ups(world, prune, last):
    world.run('core', 'side')
    bc.stop_container(FAST._replace(prune=bc.Prune(prune)))
    assert world.changes()[-1] == last and len(world.containers) == 2
    assert {world.state(id) for id in world.containers} == {'exited'}


def test_providers_hear_of_the_end(world):
    world.declare('core', db={'provider': {'type': 'x'}})
    with bc.docker_compose(FAST):
        pass
    assert 'compose down' in world.changes() and not world.containers


def test_anonymous_volumes_go_although_a_provider_has_to_hear_of_the_end(world):
    world.declare('core', db={'provider': {'type': 'x'}})
    with bc.docker_compose(FAST):
        pass
    (removal,) = [line for line in world.changes() if line.startswith('DELETE /containers/core1?')]
    assert 'v=1' in removal
    assert world.changes().index(removal) < world.changes().index('compose down')


def test_provider_hears_of_the_end_although_something_could_not_be_removed(world):
    world.declare('core', db={'provider': {'type': 'x'}})
    world.fault('DELETE /containers/core1', status=500, message='busy')
    with pytest.warns(ComposeWarning, match='the clean-up failed: DELETE .* busy'):
        with bc.docker_compose(FAST):
            pass
    assert 'compose down' in world.changes()


def test_container_of_a_committed_image_outlives_the_stack(world):
    world.run('core', 'side')
    commit(world)
    anew = 'compose up --no-recreate --no-deps --scale core=2 core'
    world.command(anew, call=lambda: world.add('core', number=2), code=0)
    with bc.docker_compose(FAST):
        world.crash('copy')
        world.act('remove', 'core1', force='1')
        assert eventually(lambda: 'core2' in world.containers)
    assert list(world.containers) == ['copy'] and world.state('copy') == 'exited'


def test_stop_that_does_not_know_what_to_stop_is_an_error(world):
    world.command('compose config', code=15, err='yaml: no')
    world.command('compose stop', code=15, err='yaml: no')
    with pytest.raises(ComposeError, match='compose stop: exit code 15: yaml: no'):
        bc.stop_container(FAST)


def test_copy_that_runs_is_not_stopped_by_compose_either(world):
    world.run('core', 'side')
    commit(world)
    bc.stop_container(FAST)
    assert {id: world.state(id) for id in world.containers} == {'copy': 'running'}


def test_engine_that_is_gone_at_the_end_is_an_error_and_not_a_hang(world):
    world.run('core')
    with warned() as texts, pytest.raises(ComposeError, match='No such file'):
        with bc.docker_compose(FAST._replace(timeout=1)):
            world.down()
    assert any('the clean-up failed' in text for text in texts)
    world.up()


def test_engine_that_hangs_at_the_end_is_an_error_within_the_deadlines(world):
    world.run('core')
    with warned(), pytest.raises(ComposeError, match='no answer within 0.3 s'):
        with bc.docker_compose(FAST._replace(timeout=0.3)):
            world.fault('', hang=True)


def test_what_the_body_raises_comes_out_even_if_the_stop_fails(world):
    world.run('core', 'side')
    world.command('compose stop', code=1)
    world.fault('POST /containers', status=500, message='no')
    with warned() as texts, pytest.raises(ZeroDivisionError):
        with bc.docker_compose(FAST._replace(prune=bc.Prune.NONE)):
            raise ZeroDivisionError
    assert any(text.startswith('the stack could not be stopped: POST /con') for text in texts)


def test_lowered_flag_cancels_a_repair_that_hangs(world):
    world.run('core', 'side')
    world.fault('POST /containers/core1/start', hang=True)
    with bc.docker_compose(FAST._replace(timeout=FOREVER)):
        world.crash('core1')
        assert eventually(lambda: 'start core1' in summary(world))
    assert not world.containers


def test_stack_is_stopped_although_its_working_directory_is_gone(world, tmp_path, monkeypatch):
    world.run('core', 'side')
    (tmp_path / 'release').mkdir()
    monkeypatch.chdir(str(tmp_path / 'release'))
    with bc.docker_compose(FAST):
        os.chdir('/')
        (tmp_path / 'release').rmdir()
    assert not world.containers


def test_stack_is_brought_up_from_a_working_directory_that_is_gone(world, tmp_path):
    world.declare('core')
    (tmp_path / 'c.yml').write_text('')
    settings = Settings.load(docker_compose=[str(tmp_path / 'c.yml')])
    (tmp_path / 'release').mkdir()
    os.chdir(str(tmp_path / 'release'))
    (tmp_path / 'release').rmdir()
    with bc.docker_compose(settings):
        assert world.state('core1') == 'running'
    assert not world.containers


def test_endpoint_is_pinned_whatever_somebody_does_to_the_configuration(world, monkeypatch):
    world.declare('core')
    world.contexts['near'] = world.contexts['default']
    monkeypatch.delenv('DOCKER_HOST')
    monkeypatch.setenv('DOCKER_CONTEXT', 'near')
    with bc.docker_compose(FAST):
        world.contexts['near'] = 'unix:///elsewhere'
        os.environ['DOCKER_HOST'] = 'unix:///elsewhere'
        os.environ['DOCKER_CONTEXT'] = 'none'
    assert not world.containers
    hosts = {c.env.get('DOCKER_HOST') for c in world.calls() if {'up', 'stop'} & set(c.argv)}
    assert hosts == {'unix://' + world.path}


def test_far_engine_is_watched_over_few_connections(world, far):
    with bc.docker_compose(FAST):
        assert eventually(world.streams)
        world.crash('core1')
        assert eventually(lambda: world.state('core1') == 'running')
        for connection in [c for c, pid in list(world._connections.items()) if not pid]:
            world._cut([connection])
        world.act('pause', 'side1')
        assert eventually(lambda: world.state('side1') == 'running')
    assert not world.containers
    assert eventually(lambda: not [pid for pid in world._connections.values() if pid])


# -- the watcher in a process ----------------------------------------------------------------------

PROCESS = FAST._replace(watcher=bc.Watcher.PROCESS)


def find_children(parent):
    """Return the ids of a process's own children that have not ended."""
    found = []
    for entry in filter(str.isdigit, os.listdir('/proc')):
        with contextlib.suppress(OSError):
            with open('/proc/{}/stat'.format(entry)) as file:
                state, ppid = file.read().rpartition(')')[2].split()[:2]
            found += [int(entry)] * (int(ppid) == parent and state != 'Z')
    return found


def test_watcher_process_is_there_before_the_body_begins_and_watches(world):
    world.run('core', 'side')
    with bc.docker_compose(PROCESS):
        (watcher,) = find_children(os.getpid())
        assert eventually(world.streams)
        world.crash('core1')
        assert eventually(lambda: world.state('core1') == 'running')
        bc.UP_FLAG.value = False
        assert eventually(lambda: gone(watcher), seconds=5)
    assert not world.containers


def test_watcher_process_that_dies_is_started_again_with_a_warning(world):
    world.run('core', 'side')
    with warned() as texts, bc.docker_compose(PROCESS):
        (watcher,) = find_children(os.getpid())
        assert eventually(world.streams)
        os.kill(watcher, signal.SIGKILL)
        assert eventually(lambda: set(find_children(os.getpid())) - {watcher})
        world.act('stop', 'core1')
        assert eventually(lambda: world.state('core1') == 'running')
    assert texts == ['the watcher process has died (exit code -9); starting it again']


def test_host_that_may_have_no_children_is_told_so_and_the_stack_is_up_all_the_same(world):
    world.declare('core')
    code = """
        import multiprocessing, warnings, broapt_compose as bc
        def host():
            with bc.docker_compose(bc.Settings.load(watcher='process')):
                print('up', flush=True)
        if __name__ == '__main__':
            warnings.simplefilter('always')
            process = multiprocessing.get_context('fork').Process(target=host, daemon=True)
            process.start()
            process.join()
            print(process.exitcode)
    """
    with script(code, stderr=subprocess.PIPE) as host:
        out, err = host.communicate(timeout=50)
    assert out == 'up\n0\n' and 'no watcher process can be started' in err
    assert not world.containers


def test_watcher_process_ends_with_its_killed_host_and_leaves_the_containers(world):
    world.run('core', 'side')
    code = """
        import threading, broapt_compose as bc
        if __name__ == '__main__':
            with bc.docker_compose(bc.Settings.load(watcher='process')):
                print('up', flush=True)
                threading.Event().wait()
    """
    with script(code) as host:
        assert host.stdout.readline() == 'up\n'
        children = find_children(host.pid)
        assert children and eventually(world.streams)
        before = world.changes()
        host.kill()
        assert eventually(lambda: all(map(gone, children)), seconds=4)
    assert world.changes() == before and world.state('core1') == 'running'


# -- hosts that fork, and hosts that end in odd ways -----------------------------------------------


def lower():
    bc.UP_FLAG.value = False


WAYS_OUT = {
    'exits': lambda: sys.exit(7),
    'fails': lambda: 1 // 0,
    'leaves': lambda: None,
    'lowers the flag': lower,
    'is interrupted': lambda: os.kill(os.getpid(), signal.SIGINT) or time.sleep(5),
}


@pytest.mark.parametrize('watcher', ['thread', 'process'])
@pytest.mark.parametrize('way', list(WAYS_OUT))
def test_forked_child_ends_in_whatever_way_without_touching_the_stack(world, way, watcher):
    world.run('core', 'side')
    child, settings = None, FAST._replace(watcher=bc.Watcher(watcher))
    try:
        with warned() as texts, bc.docker_compose(settings):
            child = os.fork()
            if not child:
                WAYS_OUT[way]()
            else:
                assert os.waitpid(child, 0)[1] == 0
                assert bc.UP_FLAG.value and summary(world) == [UP]
                world.act('stop', 'core1')
                assert eventually(lambda: world.state('core1') == 'running')
    finally:
        if child == 0:
            os._exit(time.monotonic() + 60 < bc._Signals.deaf_until)  # it must hear signals
    assert not world.containers and texts == []


LEFT = """
    import sys, threading, broapt_compose as bc
    settings = bc.Settings.load(settle=0, watcher=sys.argv[2], prune='none')
    def host():
        with bc.docker_compose(settings):
            entered.set()
            threading.main_thread().join()
            print('crash', flush=True)
            sys.stdin.readline()
    if sys.argv[1] == 'thread':
        entered = threading.Event()
        threading.Thread(target=host).start()
        entered.wait()
    else:
        context = bc.docker_compose(settings)
        context.__enter__()
        threading.Event().wait(0.5)
"""


def test_host_whose_main_thread_has_ended_is_served_like_any_other(world):
    world.run('core')
    with script(LEFT, 'thread', 'thread', stdin=subprocess.PIPE) as host:
        assert host.stdout.readline() == 'crash\n'
        world.act('stop', 'core1')
        assert eventually(lambda: world.state('core1') == 'running')
        host.stdin.write('\n')
        host.stdin.flush()
        assert host.wait(30) == 0
    assert summary(world)[-1] == 'compose stop'


@pytest.mark.parametrize('watcher', ['thread', 'process'])
def test_host_that_ends_without_leaving_the_context_does_not_hang(world, watcher):
    world.run('core')
    with script(LEFT, 'main', watcher) as host:
        host.wait(30)


def test_host_with_spawned_processes_and_no_guard_is_told_what_is_missing(world, tmp_path):
    world.run('core')
    code = """
        import multiprocessing, sys
        sys.path.insert(0, {!r})
        import broapt_compose as bc
        multiprocessing.set_start_method('spawn', force=True)
        with bc.docker_compose(bc.Settings(watcher=bc.Watcher.PROCESS, timeout=5)):
            pass
    """
    (tmp_path / 'host.py').write_text(textwrap.dedent(code.format(str(HERE))))
    result = subprocess.run(
        [sys.executable, str(tmp_path / 'host.py')], stderr=subprocess.PIPE, timeout=50
    )
    assert b"must stand under `if __name__ == '__main__':`" in result.stderr


# -- signals ---------------------------------------------------------------------------------------


def strike(signum=signal.SIGTERM):
    os.kill(os.getpid(), signum)
    time.sleep(20)  # it is interrupted


def test_first_signal_interrupts_and_further_ones_are_noted():
    bc.register()
    with pytest.raises(KeyboardInterrupt):
        strike()
    os.kill(os.getpid(), signal.SIGTERM)
    assert eventually(lambda: bc._Signals.noted == [signal.SIGTERM])


def test_handler_installed_before_register_is_called_instead():
    calls = []
    signal.signal(signal.SIGTERM, lambda signum, frame: calls.append(signum))
    bc.register()
    bc.register()  # twice makes no difference
    os.kill(os.getpid(), signal.SIGTERM)
    assert eventually(lambda: calls == [signal.SIGTERM])


def test_register_outside_the_main_thread_is_a_value_error():
    errors = []

    def other():
        try:
            bc.register()
        except ValueError as error:
            errors.append(str(error))

    with meanwhile(other):
        pass
    assert errors == ['register() must be called in the main thread: Python handles signals there']


def test_called_without_a_signal_it_sends_the_kill_signal_to_this_process():
    bc.register(Settings(kill_signal=signal.SIGUSR1))
    with pytest.raises(KeyboardInterrupt):
        bc.flask_exit()
        time.sleep(20)


def test_in_a_request_the_shutdown_of_an_old_werkzeug_is_used():
    flask = pytest.importorskip('flask')
    calls = []
    app = flask.Flask(__name__)
    app.add_url_rule('/', 'end', lambda: bc.flask_exit() or 'bye')
    shutdown = {'werkzeug.server.shutdown': lambda: calls.append('shutdown')}
    response = app.test_client().get('/', environ_overrides=shutdown)
    assert (response.status_code, calls) == (200, ['shutdown'])


SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


@pytest.mark.parametrize(
    'signum, kill_signal', [(signum, signal.SIGTERM) for signum in SIGNALS] + [(SIGNALS[1],) * 2]
)
def test_signal_inside_ends_the_stack_and_comes_out(world, signum, kill_signal):
    world.run('core')
    settings = FAST._replace(kill_signal=int(kill_signal))
    with pytest.raises(KeyboardInterrupt), bc.docker_compose(settings):
        strike(signum)
    assert not world.containers


def test_hangup_that_is_ignored_stays_ignored(world):
    world.run('core')
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with bc.docker_compose(FAST):
        os.kill(os.getpid(), signal.SIGHUP)
        assert world.containers
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_call_without_a_signal_works_although_nothing_was_registered(world):
    world.run('core')
    with pytest.raises(KeyboardInterrupt):
        with bc.docker_compose(FAST._replace(kill_signal=int(signal.SIGUSR1))):
            bc.flask_exit()
            time.sleep(20)
    assert not world.containers


@pytest.mark.parametrize('moment', ['compose stop', 'DELETE', 'POST /images'])
@pytest.mark.parametrize('signum', SIGNALS)
def test_signal_in_the_clean_up_changes_nothing_and_is_noted(world, moment, signum, caplog):
    world.run('core', 'side')
    caplog.set_level('INFO', 'broapt_compose')
    struck = []

    def hit():
        if not struck:
            struck.append(os.kill(os.getpid(), signum))

    (world.command if moment.islower() else world.fault)(moment, call=hit)
    with bc.docker_compose(FAST):
        pass
    assert struck and not world.containers and not world.networks
    name = signal.Signals(signum).name
    assert name + ' came when the end was under way already; it changed nothing' in caplog.messages


def test_clean_up_is_protected_although_the_body_has_changed_the_handlers(world):
    world.run('core')
    calls = []

    def handler(signum, frame):
        calls.append(signum)

    world.command('compose stop', call=lambda: os.kill(os.getpid(), signal.SIGTERM))
    bc.register(FAST)
    with bc.docker_compose(FAST):
        signal.signal(signal.SIGTERM, handler)
    assert calls == [] and signal.getsignal(signal.SIGTERM) is handler
    assert not world.containers


@pytest.mark.parametrize('kill_signal', SIGNALS)
def test_handlers_are_as_before_after_the_end_and_signals_work_again(world, kill_signal):
    world.run('core')
    settings = FAST._replace(kill_signal=int(kill_signal))
    before = [signal.getsignal(signum) for signum in SIGNALS]
    with bc.docker_compose(settings):
        pass
    assert [signal.getsignal(signum) for signum in SIGNALS] == before
    bc.register(settings)
    with bc.docker_compose(settings):
        pass
    with pytest.raises(KeyboardInterrupt):
        strike(kill_signal)


def test_context_in_another_thread_touches_no_handler(world):
    world.run('core')
    before, seen = [signal.getsignal(signum) for signum in SIGNALS], []

    def host():
        with bc.docker_compose(FAST):
            seen.extend(signal.getsignal(signum) for signum in SIGNALS)

    with meanwhile(host):
        pass
    assert seen == before and not world.containers


# -- the command line ------------------------------------------------------------------------------


@pytest.fixture
def command(world, capsys):
    """Run the command line in this process; return exit code, output and errors."""

    def run_command(*arguments):
        capsys.readouterr()
        try:
            code = bc.main(list(arguments))
        except SystemExit as error:
            code = error.code
        return (code, *capsys.readouterr())

    return run_command


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['-i', '0'], "--interval: '0' is not a number of seconds greater than 0"),
        (
            ['-s', 'KILL'],
            "--signal: 'KILL' is not a signal such as 15, TERM or SIGTERM, "
            'other than KILL and STOP',
        ),
        (
            ['-f', '/none', 'check'],
            "--file: ['/none'] is not a readable file (/none: No such file or directory)",
        ),
        (['run', '--prune', 'all'], "--prune: 'all' is not project, system or none"),
    ],
)
def test_bad_setting_is_one_line_and_exit_code_2(command, arguments, message):
    assert command(*arguments) == (2, '', 'broapt_compose: {}\n'.format(message))


@pytest.mark.parametrize(
    'arguments',
    [
        ['--nonsense'],
        ['nonsense'],
        ['status', '--dry-run'],
        ['check', '--json'],
        ['run', 'core'],
        ['hold', '--for'],
        ['-i'],
    ],
    ids=' '.join,
)
def test_bad_usage_is_one_line_and_exit_code_2(command, arguments):
    code, out, err = command(*arguments)
    assert (code, out) == (2, '') and len(err.splitlines()) == 1
    assert err.startswith('broapt_compose') and err.endswith('; --help lists what is accepted\n')


def test_bad_value_in_the_environment_is_exit_code_2_too(command, monkeypatch):
    monkeypatch.setenv('BROAPT_INTERVAL', 'soon')
    code, out, err = command('status')
    assert (code, out) == (2, '') and err.startswith("broapt_compose: BROAPT_INTERVAL: 'soon' is")


@pytest.mark.parametrize('name', ['run', 'check', 'status', 'hold'])
def test_docker_that_fails_is_one_line_and_exit_code_1(world, name):
    world.declare('core')
    world.fault('GET /containers', status=500, message='no\nway')
    result = run_module(name)
    assert (result.returncode, result.stdout) == (1, '')
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.endswith('GET /containers/json: status 500: way\n')


def test_missing_docker_is_one_line_and_exit_code_1(world, command):
    (world.bin / 'docker').unlink()
    code, out, err = command('check')
    assert (code, out, len(err.splitlines())) == (1, '', 1) and 'not found' in err


OPTIONS = {
    'run': ['--file', '--interval', '--signal', '--watcher', '--settle', '--timeout', '--prune']
    + ['--unhealthy', '--on-exit', '--mode', '--compose-command'],
    'check': ['--dry-run', '--file', '--settle', '--timeout', '--unhealthy']
    + ['--compose-command'],
    'status': ['--json', '--file', '--timeout', '--unhealthy', '--compose-command'],
    'hold': ['--for', '--file', '--timeout', '--compose-command'],
    'release': ['--file', '--compose-command'],
}


@pytest.mark.parametrize('name', list(OPTIONS))
def test_each_command_has_its_own_help_with_only_what_it_takes(command, name):
    code, out, err = command(name, '--help')
    assert (code, err) == (0, '')
    listed = set(re.findall(r'(?<![\w-])--[a-z][a-z-]+', out))
    every = {option for options in OPTIONS.values() for option in options}
    missing = set(OPTIONS[name]) - listed
    assert not missing and not listed & (every - set(OPTIONS[name]) - SHARED)
    assert 'SERVICE' in out or name not in ('hold', 'release')


SHARED = {'--file', '--docker-compose', '--timeout', '--unhealthy', '--mode', '--compose-command'}


def test_help_names_the_unit_of_each_value_and_its_default_and_variable(command):
    text = ' '.join(command('run', '--help')[1].split())
    for option in (
        '--interval SECONDS',
        '--settle SECONDS',
        '--timeout SECONDS',
        '--signal SIGNAL',
    ):
        assert option in text
    assert text.count('default: ') == len(Settings._fields) and 'default: )' not in text
    for field in Settings._fields:
        assert 'BROAPT_' + field.upper() in text
    assert 'default: 1)' in text.replace('1.0', '1') and 'TIME' in command('hold', '--help')[1]


def test_help_fits_on_a_screen(command, monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    code, out, err = command('--help')
    assert code == 0 and len(out.splitlines()) <= 24
    assert all(name in out for name in OPTIONS) and 'Exit codes' in out


def test_version_is_that_of_the_module(command):
    assert command('--version') == (0, 'broapt_compose {}\n'.format(bc.__version__), '')


def test_options_before_and_after_the_command_are_the_same(world, command):
    world.run('core')
    for arguments in (['-q', '--timeout', '7', 'status'], ['status', '-q', '--timeout', '7']):
        assert command(*arguments)[0] == 0
    assert command('--timeout', '0', 'status')[0] == command('status', '--timeout', '0')[0] == 2


def test_compose_files_before_and_after_the_command_all_count(world):
    arguments = bc._parse_arguments(['-f', 'a', 'status', '--file', 'b', '-f', 'c'])
    assert arguments['docker_compose'] == ['a', 'b', 'c']


def test_second_command_in_one_process_logs_like_the_first(world):
    code = 'import broapt_compose as bc, sys; bc.main(["hold"]); bc.main(["-v", "status"])'
    environment = dict(os.environ, PYTHONPATH=str(HERE))
    world.run('core')
    result = subprocess.run([sys.executable, '-c', code], env=environment, stderr=subprocess.PIPE)
    assert b'DEBUG running docker compose config' in result.stderr, result.stderr


# -- the command line: what is the matter ----------------------------------------------------------


def hold_core(world):
    hold(core=600)
    world.act('stop', 'core1')


def lose_network(world):
    world.act('stop', 'core1')
    world.networks.clear()


def needy(world, condition, health=''):
    """Let the missing web wait for core."""
    if health:
        world.change('core1', 'running', health=health)
    world.declare('core', 'side', web={'depends_on': {'core': {'condition': condition}}})


START = ': exited (143): will be started'
STATES = {
    'all is well': (lambda w: None, []),
    'paused': (lambda w: w.act('pause', 'core1'), ['core: paused: will be unpaused']),
    'stopped': (lambda w: w.act('stop', 'core1'), ['core' + START]),
    'crashed': (lambda w: w.crash('core1', 3), ['core: exited (3): will be started']),
    'out of memory': (
        lambda w: w.crash('core1', 137, OOMKilled=True),
        ['core: exited (137, out of memory): will be started'],
    ),
    'created': (lambda w: w.change('core1', 'created'), ['core: created: will be started']),
    'dead': (lambda w: w.change('core1', 'dead', 1), ['core: dead (1): will be removed']),
    'restarting': (
        lambda w: w.change('core1', 'restarting', 1),
        ['core: restarting (1): Docker is at it'],
    ),
    'removing': (
        lambda w: w.change('core1', 'removing', 1),
        ['core: removing (1): Docker is at it'],
    ),
    'missing': (
        lambda w: w.act('remove', 'core1', force='1'),
        ['core: missing: will be created'],
    ),
    'unhealthy': (lambda w: w.turn('core1', 'unhealthy'), ['core: unhealthy: will be restarted']),
    'health starts': (lambda w: w.turn('core1', 'starting'), []),
    'on hold': (hold_core, ['(core: exited (143): on hold until HH:MM)']),
    'on hold and missing': (
        lambda w: (hold_core(w), w.act('remove', 'core1')),
        ['(core: missing: on hold until HH:MM)'],
    ),
    'on hold and well': (lambda w: hold(core=600), ['(core: running: on hold until HH:MM)']),
    'labelled': (
        lambda w: (
            w.declare('side', core={'labels': {'broapt.watch': 'false'}}) or w.act('stop', 'core1')
        ),
        ['(core: exited (143): labelled broapt.watch=false)'],
    ),
    'container labelled': (
        lambda w: (
            w.find('core1')['Config']['Labels'].update({'broapt.watch': 'false'})
            or w.act('stop', 'core1')
        ),
        ['(core: exited (143): labelled broapt.watch=false)'],
    ),
    'not declared': (lambda w: w.add('old', 'exited', exit_code=1), []),
    'a one-off': (
        lambda w: w.add('core', 'exited', labels={'com.docker.compose.oneoff': 'True'}, id='x'),
        [],
    ),
    'scaled': (
        lambda w: w.declare('side', core={'scale': 3}),
        ['core: 2 of 3 missing: will be created'],
    ),
    'switched off': (lambda w: w.declare('core', 'side', db={'scale': 0}), []),
    'provided': (lambda w: w.declare('core', 'side', db={'provider': {'type': 'x'}}), []),
    'waiting for health': (
        lambda w: needy(w, 'service_healthy', 'starting'),
        ['web: missing: waits for core to be healthy'],
    ),
    'waiting for completion': (
        lambda w: needy(w, 'service_completed_successfully'),
        ['web: missing: waits for core to complete'],
    ),
    'nothing to wait for': (
        lambda w: needy(w, 'service_healthy', 'healthy'),
        ['web: missing: will be created'],
    ),
    'completed': (
        lambda w: needy(w, 'service_completed_successfully') or w.crash('core1', 0),
        ['web: missing: will be created'],
    ),
    'network lost': (
        lose_network,
        ['core: its network shop_default is gone: will be created anew'],
    ),
    'replaced (1.29)': (
        lambda w: (w.act('stop', 'core1'), w.add('core', 'created')),
        ['core: created: will be started', 'core: exited (143): ' + LEFT_OVER],
    ),
    'replaced (2.x)': (lambda w: w.add('core', 'created'), ['core: created: ' + LEFT_OVER]),
    'two things at once': (
        lambda w: (w.act('pause', 'core1'), w.act('stop', 'side1')),
        ['core: paused: will be unpaused', 'side' + START],
    ),
}
OWNED = {
    'owner stopped': (
        lambda w: w.act('stop', 'core1'),
        ['core' + START, 'side: running: ' + OWNER],
    ),
    'owner and sharer stopped': (
        lambda w: (w.act('stop', 'side1'), w.act('stop', 'core1')),
        ['core' + START, 'side: exited (143): ' + OWNER],
    ),
    'owner on hold': (
        lambda w: (hold_core(w), w.act('stop', 'side1')),
        [
            '(core: exited (143): on hold until HH:MM)',
            'side: exited (143): ' + OWNER + ' and not watched',
        ],
    ),
    'owner restarted': (
        lambda w: w.act('restart', 'core1'),
        ['side: its network is gone: core was started after it: will be restarted'],
    ),
    'owner removed': (
        lambda w: w.act('remove', 'core1', force='1'),
        ['core: missing: will be created', 'side: ' + LOST + ' is gone: waits for core to run'],
    ),
    'owner made anew': (
        lambda w: (w.act('remove', 'core1', force='1'), w.bring_up(['core'], ['--no-deps'])),
        ['side: ' + LOST + ' is gone: will be created anew'],
    ),
    'sharer missing': (
        lambda w: (w.act('remove', 'side1', force='1'), w.act('stop', 'core1')),
        ['core' + START, 'side: missing: waits for core to run'],
    ),
}


def prepare(world, case):
    """Let the stack be in this state; return what is found."""
    if case in OWNED:
        world.run('core', side={'network_mode': 'service:core'})
    else:
        world.run('core', 'side')
    act, lines = OWNED[case] if case in OWNED else STATES[case]
    act(world)
    return lines


def hide_clock(text):
    return re.sub(r'\d\d:\d\d', 'HH:MM', text)


@pytest.mark.parametrize('case', [*STATES, *OWNED])
def test_status_and_dry_run_show_the_same_faults_with_what_is_done_about_them(world, command, case):
    expected = prepare(world, case)
    faults = [line for line in expected if not line.startswith('(')]
    code, out, _ = command('check', '--dry-run')
    told = [hide_clock(line) for line in out.splitlines() if 'nothing to do' not in line]
    assert sorted(told) == sorted(line.strip('()') for line in expected)
    assert code == bool(faults)
    code, out, _ = command('status', '--json')
    document = json.loads(out)
    rows = [row for row in document['containers'] if row['note']]
    notes = sorted(hide_clock(row['note']) for row in rows)
    assert notes == sorted(
        line.strip('()').split(': ', 2)[-1].split('it: ')[-1] for line in expected
    )
    assert len([row for row in rows if row['fault']]) == len(faults)
    assert (code, document['ok']) == (bool(faults), not faults)
    assert summary(world) == []


def test_dry_run_says_so_where_there_is_nothing_to_do(world, command):
    world.run('core', 'side')
    code, out, _ = command('check', '--dry-run')
    assert (code, sorted(out.splitlines())) == (
        0,
        ['core: running: nothing to do', 'side: running: nothing to do'],
    )


def test_status_is_an_aligned_table_with_a_row_for_what_is_missing(world, command):
    world.run('core')
    world.declare('core', 'side')
    world.crash('core1', 3)
    code, out, err = command('status')
    assert (code, err) == (1, '')
    assert re.sub(r' +\n', '\n', re.sub(r'0:00:0\d', '0:00:0N', out)) == textwrap.dedent("""\
        SERVICE  CONTAINER    STATE       HEALTH  SINCE    NOTE
        core     shop-core-1  exited (3)  -       0:00:0N  will be started
        side     -            missing     -       -        will be created
        """)


def test_status_as_json(world, command):
    world.run(core={'healthcheck': {}})
    world.turn('core1', 'healthy')
    world.find('core1')['State']['StartedAt'] = '2020-11-25T14:05:12.5Z'
    code, out, _ = command('status', '--json')
    document = json.loads(out)
    (row,) = document['containers']
    assert (code, document['project'], document['ok'], document['error']) == (0, 'shop', True, '')
    assert re.fullmatch(r'\d+ days, \d+:\d\d:\d\d', row.pop('since'))
    assert row == {
        'service': 'core',
        'container': 'shop-core-1',
        'id': 'core1',
        'state': 'running',
        'health': 'healthy',
        'watched': True,
        'fault': False,
        'note': '',
    }


def test_status_shows_the_containers_with_the_error_if_the_file_cannot_be_read(world, command):
    world.run('core', 'side')
    world.command('compose config', code=15, err='env file x.env not found')
    code, out, _ = command('status')
    lines = out.splitlines()
    assert code == 1 and [line.split()[0] for line in lines[:3]] == ['SERVICE', 'core', 'side']
    assert lines[3].endswith('env file x.env not found')
    document = json.loads(command('status', '--json')[1])
    assert (document['ok'], len(document['containers'])) == (False, 2)
    assert document['error'].endswith('env file x.env not found')


def test_status_of_a_stack_that_was_never_up_shows_what_is_missing(world, command):
    world.declare('core', 'side')
    world.networks.clear()
    code, out, _ = command('status')
    assert code == 1 and [line.split()[2] for line in out.splitlines()[1:]] == ['missing'] * 2


def test_status_names_no_container_that_is_not_of_this_project(world, command):
    world.run('core')
    world.add('core', id='x', labels={'com.docker.compose.project': 'other'})
    assert len(command('status')[1].splitlines()) == 2


@pytest.mark.parametrize('closed', ['<&-', '>&-', '2>&-', '<&- >&- 2>&-'])
@pytest.mark.parametrize('arguments', [['status'], ['check', '--settle', '0']], ids=' '.join)
def test_closed_standard_streams_are_no_matter(world, arguments, closed):
    world.run('core', 'side')
    world.act('pause', 'core1')
    world.act('remove', 'side1', force='1')
    command = ['/bin/sh', '-c', '"$@" ' + closed, 'sh', sys.executable, str(MODULE), *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
    assert result.returncode == (arguments == ['status']), result
    assert b'Traceback' not in result.stderr
    if arguments != ['status']:
        assert {world.state(id) for id in world.containers} == {'running'}


def test_reader_of_the_table_that_has_gone_is_no_traceback(world):
    world.run('side')
    command = '"$0" "$1" status | true'
    result = subprocess.run(
        ['/bin/sh', '-c', command, sys.executable, str(MODULE)], stderr=subprocess.PIPE, timeout=60
    )
    assert b'Traceback' not in result.stderr


def test_check_repairs_and_tells_by_its_exit_code_whether_it_could(world, command, caplog):
    caplog.set_level('INFO', 'broapt_compose')
    world.run('core', 'side')
    world.act('pause', 'core1')
    assert command('check', '--settle', '0.1')[:2] == (0, '')
    assert any(text.startswith('core: paused -> unpaused') for text in caplog.messages)
    world.act('pause', 'core1')
    world.fault('POST', status=500, message='no')
    assert command('check', '--settle', '0')[0] == 1
    assert summary(world) == ['unpause core1'] * 2


def test_check_tries_what_else_may_help_before_it_ends(world, command):
    world.run('core')
    world.act('stop', 'core1')
    world.fault('POST /containers/core1/start', status=500, message='network is gone', once=True)
    assert command('check', '--settle', '0')[0] == 0
    assert summary(world) == ['start core1', 'compose up --detach --no-deps core']
    assert world.state('core1') == 'running'


def test_check_brings_up_a_stack_that_was_never_up(world, command):
    world.declare('core', 'side')
    assert command('check', '--settle', '0')[0] == 0
    assert {world.state(id) for id in ('core1', 'side1')} == {'running'}


def test_check_ends_with_1_while_a_fault_is_left(world, command, caplog):
    world.run('core', web={'depends_on': {'core': {'condition': 'service_healthy'}}})
    world.act('remove', 'web1', force='1')
    assert command('check', '--settle', '0')[0] == 1
    assert 'web: missing: waits for core to be healthy' in caplog.text
    hold(web=600)
    assert command('check', '--settle', '0')[0] == 0
    assert summary(world) == []


def test_check_in_an_outage_is_exit_code_1(world, command):
    world.run('core')
    world.fault('GET /containers', status=500, message='no')
    assert command('check', '--settle', '0')[0] == 1


def test_check_that_is_interrupted_ends_the_repair_under_way(world):
    world.run('core', 'side')
    world.act('pause', 'core1')
    world.fault('POST', hang=True)
    with subprocess.Popen(
        [sys.executable, str(MODULE), 'check', '--settle', '0', '--timeout', '999']
    ) as check:
        assert eventually(lambda: summary(world) == ['unpause core1'])
        check.send_signal(signal.SIGINT)
        assert check.wait(30) == 1


def test_logs_are_quiet_or_verbose_as_told_and_results_go_to_standard_output(world):
    world.run('core')
    assert run_module('-q', 'check').stderr == ''
    verbose = run_module('-v', 'status')
    assert 'running docker compose config --format json' in verbose.stderr
    assert 'SERVICE' in verbose.stdout and 'SERVICE' not in verbose.stderr


# -- the command line: run -------------------------------------------------------------------------


@contextlib.contextmanager
def watchdog(*arguments, **kwargs):
    """Run the stack under the watchdog until the block ends; give the process once it is up."""
    command = [sys.executable, str(MODULE), *arguments]
    kwargs.setdefault('stderr', subprocess.PIPE)
    with subprocess.Popen(command, universal_newlines=True, **kwargs) as host:
        try:
            if kwargs['stderr'] is subprocess.PIPE:
                assert any('the stack is up' in line for line in iter(host.stderr.readline, ''))
            yield host
        finally:
            if host.poll() is None:
                host.kill()


@pytest.mark.parametrize('watcher', ['thread', 'process'])
@pytest.mark.parametrize('signum', SIGNALS)
def test_run_ends_with_0_after_its_signal_and_says_what_it_does(world, signum, watcher):
    world.declare('core', 'side')
    with watchdog('--watcher', watcher) as host:
        assert eventually(world.streams)
        host.send_signal(signum)
        text = host.stderr.read()
        assert host.wait(20) == 0
    assert 'stopping the stack (up to 10 s)' in text and 'stopped' in text
    assert 'Traceback' not in text and not world.containers


def test_run_that_is_told_to_leave_leaves_the_containers(world):
    world.declare('core')
    with watchdog('--on-exit', 'leave') as host:
        host.terminate()
        assert host.wait(20) == 0
    assert world.state('core1') == 'running' and summary(world) == [UP]


def test_run_under_nohup_is_not_ended_by_a_hangup(world):
    world.declare('core')
    code = 'trap "" HUP; exec "$@"'
    command = ['/bin/sh', '-c', code, 'sh', sys.executable, str(MODULE), '--settle', '0']
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as host:
        try:
            assert eventually(world.streams)
            host.send_signal(signal.SIGHUP)
            world.act('stop', 'core1')
            assert eventually(lambda: world.state('core1') == 'running')
            assert host.poll() is None
            host.terminate()
            assert host.wait(20) == 0
        finally:
            if host.poll() is None:
                host.kill()


def test_failed_stop_at_the_end_of_a_run_is_exit_code_1(world):
    world.declare('core')
    with watchdog('--prune', 'none') as host:
        world.command('compose stop', code=1, err='no way')
        world.fault('POST /containers', status=500, message='no way')
        host.terminate()
        lines = host.stderr.read().splitlines()
        assert host.wait(20) == 1
    assert lines[-1] == 'broapt_compose: POST /containers/core1/kill: status 500: no way'


def test_log_that_nobody_reads_stops_neither_repairs_nor_the_end(world):
    world.declare('core')
    world.command('compose up --build', flood=1)
    with watchdog('-v', '--settle', '0', '--interval', '0.05', **stuck()) as host:
        assert eventually(world.streams)
        for _ in range(3):
            world.act('stop', 'core1')
            assert eventually(lambda: world.state('core1') == 'running')
        host.terminate()
        assert host.wait(20) == 0
    assert not world.containers


def stuck():
    """Return a standard error whose pipe is full and which nobody reads."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b'x' * 4096)
    os.set_blocking(writing, True)
    return {'stderr': os.fdopen(writing, 'w')}


def test_signal_that_the_kernel_gives_to_another_thread_ends_the_run_too(world):
    world.declare('core')
    code = """
        import logging, signal, sys, threading, broapt_compose
        def strike():
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        class Handler(logging.Handler):
            def emit(self, record):
                if 'is up' in record.getMessage():
                    threading.Timer(0.5, strike).start()
        broapt_compose.logger.addHandler(Handler())
        sys.exit(broapt_compose.main([]))
    """
    with script(code, stderr=subprocess.DEVNULL) as host:
        assert host.wait(30) == 0


def test_service_manager_is_told_when_it_is_up_after_each_check_and_when_it_stops(world, tmp_path):
    world.declare('core')
    path = str(tmp_path / 'notify')
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        sock.settimeout(20)
        environment = dict(os.environ, NOTIFY_SOCKET=path, WATCHDOG_USEC='400000')
        with watchdog(env=environment) as host:
            told = [sock.recv(4096).decode() for _ in range(4)]
            host.terminate()
            while told[-1] != 'STOPPING=1':
                told.append(sock.recv(4096).decode())
            assert host.wait(20) == 0
    assert 'READY=1' in told[:2]
    assert told.count('STATUS=1 of 1 running\nWATCHDOG=1') >= 2


def test_module_documents_itself():
    for name in bc.__all__:
        assert getattr(bc, name).__doc__, name
    text = subprocess.check_output(
        [sys.executable, '-m', 'pydoc', 'broapt_compose'], cwd=str(HERE), universal_newlines=True
    )
    assert 'docker_compose' in text and Action.__doc__ and Verb.__doc__


# -- on a real engine: what is used by all of these tests ------------------------------------------

COMPOSE = {'Compose 1.29': ('docker-compose',), 'Compose 2': ('docker', 'compose')}
ROUNDS = int(os.environ.get('BROAPT_TEST_ROUNDS', '1'))  # of each thing that people do by hand
needs_docker = pytest.mark.docker

STACK = """\
services:
  core: &plain {image: busybox, command: sleep 10000, stop_signal: SIGKILL}
  far: {image: busybox, command: sleep 10000, stop_signal: SIGKILL, network_mode: 'service:core'}
  pair: {image: busybox, command: sleep 10000, stop_signal: SIGKILL, scale: 2}
  once: {image: busybox, command: 'true'}
  side:
    <<: *plain
    depends_on: {once: {condition: service_completed_successfully}}
  well:
    <<: *plain
    healthcheck: {test: test ! -e /dev/shm/sick, interval: 0.3s, retries: 1, start_period: 0s}
  alone:
    <<: *plain
    labels: {broapt.watch: 'false'}
"""


def call(*command, code=0, **kwargs):
    """Return what the command prints on standard output."""
    result = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
        **kwargs,
    )
    assert code in (None, result.returncode), (command, result)
    return result.stdout


class Host:
    """A process with a log; whatever happens, nothing of its own is left at the end."""

    def __init__(self, command, log, **kwargs):
        self.path = log
        kwargs.setdefault('stdin', subprocess.DEVNULL)
        with log.open('w') as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, **kwargs)

    def log(self):
        return self.path.read_text()

    def says(self, text, times=1, seconds=20.0):
        """Return whether the text comes to stand in the log that many times."""
        return eventually(lambda: self.log().count(text) >= times, seconds)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        children = descendants(self.process.pid)
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def descendants(pid):
    """Return the ids of a process's children, and of theirs."""
    children = {}
    for entry in os.listdir('/proc'):
        with contextlib.suppress(OSError, ValueError):
            with open('/proc/{}/stat'.format(int(entry))) as file:
                children.setdefault(int(file.read().rpartition(')')[2].split()[1]), []).append(
                    int(entry)
                )
    found = children.get(pid, [])
    for child in found:
        found.extend(children.get(child, []))
    return found


@functools.lru_cache(maxsize=None)
def has_compose_1():
    try:
        return call('docker-compose', 'version', '--short', code=None).startswith('1.')
    except OSError:
        return False


class Project:
    """A Compose project of its own on the real engine."""

    def __init__(self, folder, compose, environment=None):
        if compose == COMPOSE['Compose 1.29'] and not has_compose_1():
            pytest.skip('optional: 1.29 is not to be had on this machine')
        self.folder, self.compose_command, self.environment = folder, compose, environment
        self.name = 'broapt-test-{:08x}'.format(random.SystemRandom().getrandbits(32))
        self.filter = '--filter=label=com.docker.compose.project=' + self.name
        self.file = folder / 'docker-compose.yml'

    def write(self, text):
        self.file.write_text(text)
        return self

    def docker(self, *arguments, **kwargs):
        return call('docker', *arguments, env=self.environment, **kwargs)

    def compose(self, *arguments, **kwargs):
        arguments = (*self.compose_command, '-f', str(self.file), '-p', self.name, *arguments)
        return call(*arguments, cwd=str(self.folder), env=self.environment, **kwargs)

    def settings(self, **given):
        given = {
            'settle': 0,
            'interval': 5,
            'compose_command': (*self.compose_command, '-p', self.name),
            **given,
        }
        return Settings.load(docker_compose=[str(self.file)], **given)

    def options(self, *more):
        """The same for the command line."""
        command = ' '.join(map(shlex.quote, [*self.compose_command, '-p', self.name]))
        return [
            '--file',
            str(self.file),
            '--compose-command',
            command,
            '--settle',
            '0',
            '--interval',
            '5',
            *more,
        ]

    @contextlib.contextmanager
    def watchdog(
        self, *options, start=(sys.executable, str(MODULE), 'run'), code=0, environment=None
    ):
        """Run the stack under the watchdog, in its own process; see it exit as it should."""
        command = [*start, *self.options(*options)]
        with Host(command, self.folder / 'log', env=environment or self.environment) as host:
            assert host.says('the stack is up', seconds=60), host.log()
            yield host
            host.process.terminate()
            assert host.process.wait(60) == code, host.log()
            assert self.ids() == []

    def ids(self, *services):
        """Ids of the containers of these services (none: of all), the oldest first."""
        form = '{{.ID}} {{.Label "com.docker.compose.service"}}'
        pairs = map(
            str.split,
            reversed(
                self.docker('ps', '-a', '--no-trunc', self.filter, '--format', form).splitlines()
            ),
        )
        return [ident for ident, service in pairs if not services or service in services]

    def look(self):
        """Return id -> (service, state, start time, restarts) of all containers."""
        ids = self.ids()
        labels = '{{index .Config.Labels "com.docker.compose.service"}}'
        form = '{{.Id}} ' + labels + ' {{.State.Status}} {{.State.StartedAt}} {{.RestartCount}}'
        lines = (
            self.docker('inspect', '--format', form, *ids, code=None).splitlines() if ids else []
        )  # one may be gone
        return {line.split()[0]: tuple(line.split()[1:]) for line in lines}

    def is_well(self, services=('core', 'far', 'once', 'pair', 'pair', 'side', 'well')):
        """Whether each service runs as often as it is named, and what runs once has ended."""
        shown = sorted(
            (service, state) for service, state, *_ in self.look().values() if service != 'alone'
        )
        return shown == [
            (service, 'exited' if service == 'once' else 'running') for service in services
        ]

    def remove(self):
        for ident in self.ids():
            subprocess.run(
                ['docker', 'rm', '-fv', ident],
                env=self.environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        for kind in ('network', 'volume'):
            for name in self.docker(kind, 'ls', '-q', self.filter).split():
                self.docker(kind, 'rm', name)
        assert self.ids() == []


@pytest.fixture(scope='session')
def engine():
    """Make sure that there is an engine, or skip; with BROAPT_TEST_DOCKER=required, fail."""
    for command in (['docker', 'image', 'inspect', 'busybox'], ['docker', 'compose', 'version']):
        try:
            call(*command)
        except (AssertionError, OSError) as error:
            reason = 'no Docker engine with busybox and Compose 2: {}'.format(error)
            (pytest.fail if os.environ.get('BROAPT_TEST_DOCKER') == 'required' else pytest.skip)(
                reason
            )


@pytest.fixture(params=list(COMPOSE))
def project(request, engine, tmp_path):
    project = Project(tmp_path, COMPOSE[request.param])
    yield project
    project.remove()


@pytest.fixture
def project_2(engine, tmp_path):
    """A project where the generation of Compose makes no difference."""
    project = Project(tmp_path, COMPOSE['Compose 2'])
    yield project
    project.remove()


PAIR = 'services:\n  core: {image: busybox, command: sleep 10000, stop_signal: SIGKILL}\n'
PAIR += '  side: {image: busybox, command: sleep 10000, stop_signal: SIGKILL}\n'


# -- on a real engine: repairs ---------------------------------------------------------------------


# Each generation of Compose and each kind of watcher, but not each with each: that shows no more.
CROSSED = [('Compose 1.29', 'thread'), ('Compose 2', 'process'), ('Compose 2', 'thread')]


@pytest.fixture(scope='module', params=CROSSED, ids=' '.join)
def watched(request, engine, tmp_path_factory):
    """A stack under the watchdog, for one fault after the other."""
    project = Project(tmp_path_factory.mktemp('stack'), COMPOSE[request.param[0]]).write(STACK)
    try:
        with project.watchdog(
            '--watcher', request.param[1], '--interval', '3600'
        ) as host:  # nothing but the events wakes it
            project.log = host.log
            yield project
    finally:
        project.remove()


def sicken(project):
    project.docker('exec', *project.ids('well'), 'touch', '/dev/shm/sick')


FAULTS = {
    'killed': (['core', 'far'], lambda p: p.docker('kill', *p.ids('core'))),
    'stopped': (['side'], lambda p: p.docker('stop', *p.ids('side'))),
    'paused': (['core'], lambda p: p.docker('pause', *p.ids('core'))),
    'removed': (['side'], lambda p: p.docker('rm', '-f', *p.ids('side'))),
    'one of two killed': (['pair'], lambda p: p.docker('kill', p.ids('pair')[0])),
    'one of two removed': (['pair'], lambda p: p.docker('rm', '-f', p.ids('pair')[0])),
    'owner of a network removed': (['core', 'far'], lambda p: p.docker('rm', '-f', *p.ids('core'))),
    'one in the network of another removed': (
        ['far'],
        lambda p: p.docker('rm', '-f', *p.ids('far')),
    ),
    'unhealthy': (['well'], sicken),
    'one paused and one stopped at once': (
        ['core', 'side'],
        lambda p: (p.docker('pause', *p.ids('core')), p.docker('stop', *p.ids('side'))),
    ),
    'all stopped': (['core', 'far', 'pair', 'side', 'well', 'alone'], lambda p: p.compose('stop')),
    'all removed': (
        ['core', 'far', 'pair', 'side', 'well', 'once', 'alone'],
        lambda p: p.compose('down', code=None),
    ),  # may fail: it is fought
}


@needs_docker
@pytest.mark.parametrize('fault', list(FAULTS))
def test_fault_is_repaired_without_touching_the_neighbours(watched, fault):
    assert eventually(watched.is_well)
    concerned, act = FAULTS[fault]
    before = watched.look()
    act(watched)
    assert eventually(
        lambda: watched.is_well() and (fault == 'paused' or watched.look() != before), 60
    ), (
        watched.look(),
        watched.log(),
    )
    after = watched.look()
    for ident, container in before.items():
        if container[0] not in concerned or fault == 'paused':
            assert after.get(ident) == container
    far = watched.ids('far')
    assert eventually(
        lambda: (
            'eth0' in watched.docker('exec', *watched.ids('far'), 'cat', '/proc/net/dev', code=None)
        )
    ), far
    kept = [ident for ident in watched.ids() if ident in before]
    assert ('removed' in fault) == (len(kept) < len(before))


@needs_docker
def test_paused_stack_is_unpaused_and_started(project):
    project.write(PAIR).compose('up', '-d')
    before = project.look()
    project.docker('pause', *project.ids())
    with bc.docker_compose(project.settings()):
        assert project.look() == before


@needs_docker
def test_container_that_was_created_but_never_started_is_started_by_check(project):
    project.write(PAIR).compose('up', '-d', 'core')
    project.compose('up', '--no-start', 'side')
    before = project.look()
    assert sorted(state for _, state, *_ in before.values()) == ['created', 'running']
    dry = run_module('check', '--dry-run', *project.options())
    assert (dry.returncode, project.look()) == (1, before)
    assert dry.stdout == 'core: running: nothing to do\nside: created: will be started\n'
    result = run_module('check', *project.options())
    assert (result.returncode, result.stdout) == (0, '')
    assert result.stderr.count('side: created -> started (') == 1
    after = project.look()
    assert sorted(after) == sorted(before) and [state for _, state, *_ in after.values()] == [
        'running',
        'running',
    ]
    assert after[project.ids('core')[0]] == before[project.ids('core')[0]]


@needs_docker
def test_check_of_a_stack_that_was_never_up_brings_it_up(project):
    project.write(PAIR)
    assert run_module('status', *project.options()).returncode == 1
    assert run_module('check', *project.options()).returncode == 0
    result = run_module('status', '--json', *project.options())
    document = json.loads(result.stdout)
    assert (result.returncode, document['ok'], document['project']) == (0, True, project.name)
    assert [row['service'] for row in document['containers']] == ['core', 'side']
    table = run_module('status', *project.options()).stdout.splitlines()
    assert table[0].split() == ['SERVICE', 'CONTAINER', 'STATE', 'HEALTH', 'SINCE', 'NOTE']
    assert [row.split()[:3:2] for row in table[1:]] == [['core', 'running'], ['side', 'running']]


@needs_docker
def test_unhealthy_container_is_left_alone_if_told_so(project_2):
    project = project_2.write(STACK)
    with project.watchdog('--unhealthy', 'ignore'):
        before = project.look()
        sicken(project)
        form = '{{.State.Health.Status}}'
        assert eventually(
            lambda: (
                project.docker('inspect', '--format', form, *project.ids('well')) == 'unhealthy\n'
            )
        )
        project.docker(
            'pause', *project.ids('core')
        )  # by its repair the watchdog shows that it has looked since
        assert eventually(lambda: project.look() == before)


@needs_docker
def test_healthy_container_is_not_restarted_because_it_was_paused(project_2):
    """From the pause on, until the next probe an hour later, Docker calls it unhealthy."""
    project = project_2.write(
        PAIR.replace('image', "healthcheck: {test: 'true', interval: 1h}, image", 1)
    )
    with project.watchdog() as watchdog:
        before = project.look()
        project.docker('pause', *project.ids('core'))
        assert watchdog.says('core: paused -> unpaused')
        assert 'unhealthy' in project.docker('ps', project.filter)
        project.docker(
            'kill', *project.ids('side')
        )  # by its repair the watchdog shows that it has looked since
        assert watchdog.says('side: exited (137) -> started')
        assert (
            project.look()[project.ids('core')[0]] == before[project.ids('core')[0]]
            and 'restarted' not in watchdog.log()
        )


@needs_docker
def test_what_is_not_the_watchdogs_business_is_never_touched(project, tmp_path_factory):
    other = Project(tmp_path_factory.mktemp('other'), project.compose_command).write(PAIR)
    project.write(STACK)
    try:
        other.compose('up', '-d')
        with project.watchdog():
            project.compose('run', '-d', 'core', 'true')
            project.compose('run', '-d', 'core', 'sleep', '10000')
            one_offs = [
                ident
                for ident, (service, *_) in project.look().items()
                if service == 'core' and ident != project.ids('core')[0]
            ]
            assert len(one_offs) == 2
            project.docker('kill', *project.ids('alone'), *other.ids('core'))
            project.docker('pause', *other.ids('side'), *one_offs[1:])
            strangers = {
                **other.look(),
                **{ident: project.look()[ident] for ident in [*one_offs, *project.ids('alone')]},
            }
            project.docker('kill', *project.ids('side'))
            assert eventually(
                lambda: (
                    [state for service, state, *_ in project.look().values() if service == 'side']
                    == ['running']
                )
            )
            assert {
                **other.look(),
                **{ident: project.look()[ident] for ident in [*one_offs, *project.ids('alone')]},
            } == strangers
            project.docker('unpause', *one_offs[1:])
            project.docker('rm', '-f', *one_offs)
        assert sorted(state for _, state, *_ in other.look().values()) == ['exited', 'paused']
    finally:
        other.remove()


@needs_docker
def test_crash_loop_is_told_and_spread_while_neighbours_are_repaired_as_promptly_as_ever(project_2):
    project = project_2.write(
        PAIR + "  loop: {image: busybox, command: sh -c 'exit 7', restart: 'no'}\n"
    )
    with project.watchdog() as watchdog:
        assert watchdog.says('exited (7) 4 times', seconds=30)
        before = project.look()
        project.docker('kill', *project.ids('side'))
        assert watchdog.says('side: exited (137) -> started', seconds=3)
        assert project.look()[project.ids('core')[0]] == before[project.ids('core')[0]]
        log = watchdog.log()
    assert 'WARNING loop: crash loop, exited (7) 3 times in ' in log and 'next try in 2 s' in log
    assert log.count('loop: exited (7) -> started') <= 5


@needs_docker
def test_container_that_docker_restarts_is_left_to_docker(project_2):
    project = project_2.write(
        PAIR + "  loop: {image: busybox, command: sh -c 'sleep 0.2; exit 7', restart: always}\n"
    )
    with project.watchdog() as watchdog:
        assert eventually(lambda: int(project.look()[project.ids('loop')[0]][3]) >= 5)
        assert 'loop:' not in watchdog.log()


# -- on a real engine: people at work --------------------------------------------------------------

BY_HAND = {
    'docker restart': lambda p: p.docker('restart', '-t', '1', *p.ids('core')),
    'docker commit': lambda p: p.docker('rmi', p.docker('commit', *p.ids('side')).strip()),
    'force-recreate': lambda p: p.compose('up', '-d', '--force-recreate', 'side'),
    'scale up and down': lambda p: (
        p.compose('up', '-d', '--scale', 'pair=4'),
        p.compose('up', '-d', '--scale', 'pair=2'),
    ),
    'compose restart': lambda p: p.compose('restart', '-t', '1', 'core'),
}


@pytest.fixture(scope='module', params=list(COMPOSE))
def settled(request, engine, tmp_path_factory):
    """A stack under the watchdog with the default settle and an interval that does not help."""
    project = Project(tmp_path_factory.mktemp('stack'), COMPOSE[request.param]).write(STACK)
    try:
        with project.watchdog('--settle', '1', '--interval', '0.7') as watchdog:
            yield project, watchdog
    finally:
        project.remove()


@needs_docker
@pytest.mark.parametrize('work', list(BY_HAND))
def test_what_people_do_by_hand_succeeds_and_nothing_is_doubled_or_left_down(settled, work):
    project, watchdog = settled
    for _ in range(ROUNDS):
        BY_HAND[work](project)  # asserts that the command ends with 0
        assert eventually(project.is_well), (project.look(), watchdog.log())


# Neither heeds SIGTERM: to replace them takes eight seconds.
SLOW_TO_STOP = """\
services:
  core: {image: busybox, command: sleep 10000, stop_grace_period: 4s}
  side: {image: busybox, command: sleep 10000, stop_grace_period: 4s, network_mode: 'service:core'}
"""


@needs_docker
def test_redeployment_of_what_stops_slowly_is_left_to_finish(project_2):
    project = project_2.write(SLOW_TO_STOP)
    with project.watchdog('--settle', '1') as watchdog:
        project.compose('up', '-d', '--force-recreate')  # asserts that it ends with 0
        assert project.is_well(('core', 'side')), (project.look(), watchdog.log())
        assert '->' not in watchdog.log(), watchdog.log()
        names = project.docker('ps', '-a', project.filter, '--format', '{{.Names}}').split()
        assert sorted(names) == [f'{project.name}-{service}-1' for service in ('core', 'side')]


# -- on a real engine: the end ---------------------------------------------------------------------

STORE = (
    PAIR.replace('image', "volumes: [/anonymous, 'named:/named'], image", 1)
    + 'volumes: {named: {}}\n'
)


def make_dangling_image(*labels):
    """Return the id of an image without a name."""
    changes = [part for label in labels for part in ('--change', 'LABEL ' + label)]
    archive = subprocess.Popen(['tar', 'c', '--files-from', '/dev/null'], stdout=subprocess.PIPE)
    made = subprocess.check_output(
        ['docker', 'import', *changes, '-'], stdin=archive.stdout, universal_newlines=True
    )
    archive.communicate()
    return made.strip()


def list_belongings(project):
    """Return the ids or names of the project's containers, their volumes and its networks."""
    volumes = project.docker(
        'inspect', '--format', '{{range .Mounts}}{{.Name}} {{end}}', *project.ids()
    ).split()
    return {
        *project.ids(),
        *volumes,
        *project.docker('network', 'ls', '-q', '--no-trunc', project.filter).split(),
    }


def existing(names):
    return {
        name
        for name in names
        if not subprocess.call(
            ['docker', 'inspect', name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    }


@needs_docker
@pytest.mark.parametrize('prune', ['project', 'none'])
def test_clean_up_deletes_what_belongs_to_the_project_and_nothing_else(
    project, tmp_path_factory, prune
):
    other = Project(tmp_path_factory.mktemp('other'), project.compose_command).write(STORE)
    project.write(STORE)
    label = 'com.docker.compose.project='
    images = [
        make_dangling_image(label + project.name),
        make_dangling_image(label + other.name),
        make_dangling_image('a=b'),
    ]
    names = [project.name + suffix for suffix in ('-container', '-volume', '-network')]
    try:
        other.compose('up', '-d')
        other.compose('stop')
        other.compose('run', '-d', 'core', 'true')
        project.docker(
            'run',
            '--network',
            'none',
            '--name',
            names[0],
            '-v',
            names[1] + ':/data',
            'busybox',
            'true',
        )
        project.docker('network', 'create', names[2])
        strangers = list_belongings(other) | {*names, *images[1:]}
        with bc.docker_compose(project.settings(prune=prune)):
            belongings = list_belongings(project) | {images[0]}
            assert len(belongings) == 6  # two containers, two volumes, a network, an image
        assert existing(strangers) == strangers
        assert existing(belongings) == (
            belongings if prune == 'none' else {project.name + '_named'}
        )
    finally:
        other.remove()
        project.docker('rm', '-f', names[0], code=None)
        project.docker('volume', 'rm', names[1], code=None)
        project.docker('network', 'rm', names[2], code=None)
        project.docker('rmi', '-f', *images, code=None)


@needs_docker
def test_image_that_a_rebuild_left_dangling_is_deleted_but_the_new_one_stays(project_2):
    project = project_2.write(
        'services:\n  core: {build: ., command: sleep 10000, stop_signal: SIGKILL}\n'
    )
    listing = ('images', '-q', '--no-trunc', project.filter.replace('--filter', '--filter', 1))
    try:
        for text in ('one', 'two'):
            (project.folder / 'Dockerfile').write_text('FROM busybox\nLABEL text={}\n'.format(text))
            project.compose('build')
        assert len(set(project.docker(*listing).split())) == 2
        with bc.docker_compose(project.settings()):
            assert [state for _, state, *_ in project.look().values()] == ['running']
        assert len(set(project.docker(*listing).split())) == 1
    finally:
        project.remove()
        project.docker('rmi', '-f', *project.docker(*listing).split(), code=None)


@needs_docker
def test_grace_period_is_kept_although_the_timeout_is_shorter(project):
    command = (
        'sh -c \'trap "sleep 5; echo in time > /out/end; exit" TERM; while :; do sleep 0.1; done\''
    )
    slow = 'services:\n  core: {{image: busybox, command: {}, stop_grace_period: 1m, '
    slow += 'volumes: [".:/out"]}}\n'
    project.write(slow.format(json.dumps(command)))
    with bc.docker_compose(project.settings(timeout=4)):
        assert len(project.ids()) == 1
    assert (project.folder / 'end').read_text() == 'in time\n'
    assert project.ids() == []


@needs_docker
def test_stack_ends_gracefully_although_its_file_is_broken_by_then_or_lacks_a_service(project_2):
    command = 'sh -c \'trap "echo in time > /out/$0; exit" TERM; while :; do sleep 0.1; done\' {}'
    service = "  {}: {{image: busybox, command: {}, volumes: ['.:/out']}}\n"
    whole = 'services:\n' + ''.join(
        service.format(name, json.dumps(command.format(name))) for name in ('core', 'side')
    )
    project = project_2
    for text in (whole + 'junk: [', whole.replace('  side:', '  other:')):
        with project.write(whole).watchdog():
            assert len(project.ids()) == 2
            project.write(text)
        for name in ('core', 'side'):
            assert (project.folder / name).read_text() == 'in time\n'
            (project.folder / name).unlink()


@needs_docker
def test_scale_that_was_changed_in_the_file_is_the_one_that_counts(project_2):
    project = project_2
    text = PAIR.replace('image', 'scale: N, image', 1)
    with project.write(text.replace('N', '3')).watchdog(
        '--settle', '1'
    ) as watchdog:  # people are at work
        project.write(text.replace('N', '1')).compose('up', '-d')
        project.docker('pause', *project.ids('side'))
        assert watchdog.says('side: paused -> unpaused')
        project.write(text.replace('N', '2')).compose('up', '-d')
        project.docker('rm', '-f', *project.ids('side'))
        assert watchdog.says('side: missing -> created')
        assert (
            eventually(lambda: len(project.ids('core')) == 2) and 'crash loop' not in watchdog.log()
        )


@needs_docker
def test_start_that_fails_is_undone_and_the_stack_can_be_entered_again(project):
    project.write(PAIR + '  bad: {image: busybox, command: /no/such/program}\n')
    with pytest.raises(ComposeError, match='/no/such/program') as caught, bc.docker_compose(
        project.settings()
    ):
        raise AssertionError('the body must not run')
    assert caught.value.returncode != 0 and len(str(caught.value).splitlines()) == 1
    assert project.ids() == []
    project.write(PAIR)
    for _ in range(2):
        with pytest.raises(KeyError, match='body'), bc.docker_compose(project.settings()) as flag:
            assert flag is bc.UP_FLAG and flag.value
            assert [state for _, state, *_ in project.look().values()] == ['running'] * 2
            raise KeyError('body')
        assert not flag.value and project.ids() == []
        assert not [thread for thread in threading.enumerate() if thread.name == 'broapt-watchdog']


@needs_docker
def test_end_comes_at_once_although_a_repair_builds_for_hours(project):
    project.write(PAIR)
    with project.watchdog() as watchdog:
        (project.folder / 'Dockerfile').write_text('FROM busybox\nRUN sleep 10000\n')
        project.write(
            PAIR.replace('side: {image: busybox', 'side: {build: {context: ., network: none}')
        )
        project.docker('rm', '-f', *project.ids('side'))
        assert eventually(
            lambda: any(
                ' up --detach' in command_line(pid) for pid in descendants(watchdog.process.pid)
            )
        )


@needs_docker
@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT], ids=lambda signum: signum.name)
def test_signal_at_any_moment_ends_in_a_complete_clean_up_and_exit_code_0(project_2, signum):
    project, chance = project_2.write(PAIR), random.Random(int(signum))
    for _ in range(ROUNDS):
        with Host(
            [sys.executable, str(MODULE), '--verbose', *project.options()], project.folder / 'log'
        ) as host:
            assert host.says('running docker')  # before, Python itself may still be starting
            threading.Event().wait(chance.uniform(0, 3))
            for pause in (chance.uniform(0, 1), 0.1, 0):
                with contextlib.suppress(ProcessLookupError):
                    host.process.send_signal(signum)
                threading.Event().wait(pause)
            assert host.process.wait(60) == 0, host.log()
            assert project.ids() == [] and 'Traceback' not in host.log()
            assert project.docker('network', 'ls', '-q', project.filter) == ''


@needs_docker
@pytest.mark.parametrize('project, watcher', CROSSED, indirect=['project'])
def test_ctrl_c_in_a_terminal_ends_all_in_order(project, watcher):
    import pty

    project.write(PAIR)
    pid, terminal = pty.fork()
    if not pid:
        os.execv(
            sys.executable, [sys.executable, str(MODULE), *project.options('--watcher', watcher)]
        )
    shown = bytearray()

    def read_until(text):
        with contextlib.suppress(OSError):  # how a terminal ends
            while text not in shown and select.select([terminal], [], [], 60)[0]:
                shown.extend(os.read(terminal, 1 << 16))
        return text in shown

    try:
        assert read_until(b'the stack is up'), shown.decode()
        project.docker('kill', *project.ids('core'))
        assert read_until(b'core: exited (137) -> started'), shown.decode()
        os.write(terminal, b'\x03\x03')  # to the whole foreground group
        assert not read_until(b'Traceback')
        assert eventually(lambda: gone(pid)), shown.decode()
        assert project.ids() == []
    finally:
        os.kill(pid, signal.SIGKILL)
        code = os.waitpid(pid, 0)[1]
        os.close(terminal)
    assert code == 0, shown.decode()


# -- on a real engine: deaths ----------------------------------------------------------------------


def command_line(pid):
    try:
        with open('/proc/{}/cmdline'.format(pid), 'rb') as file:
            return file.read().replace(b'\0', b' ').decode()
    except OSError:
        return ''


@needs_docker
def test_watcher_process_that_is_killed_comes_back_with_a_warning(project_2):
    project = project_2.write(PAIR)
    with project.watchdog('--watcher', 'process', '--interval', '3600') as watchdog:
        for lines in (1, 2):
            assert eventually(lambda: len(descendants(watchdog.process.pid)) == 1)
            os.kill(descendants(watchdog.process.pid)[0], signal.SIGKILL)
            project.docker('kill', *project.ids('core'))
            warning = 'WARNING the watcher process has died (exit code -9); starting it again'
            assert watchdog.says(warning, lines, 3)
            assert watchdog.says('core: exited (137) -> started', lines)


@needs_docker
@pytest.mark.parametrize('watcher', ['thread', 'process'])
def test_host_that_is_killed_leaves_no_process_and_the_containers_as_they_are(project_2, watcher):
    project = project_2.write(PAIR)
    command = [sys.executable, str(MODULE), *project.options('--watcher', watcher)]
    with Host(command, project.folder / 'log') as host:
        assert host.says('the stack is up', seconds=60), host.log()
        (project.folder / 'Dockerfile').write_text('FROM busybox\nRUN sleep 10000\n')
        project.write(
            PAIR.replace('side: {image: busybox', 'side: {build: {context: ., network: none}')
        )
        project.docker('rm', '-f', *project.ids('side'))  # a repair that takes hours
        children = partial(descendants, host.process.pid)
        assert eventually(lambda: any(' up --detach' in command_line(pid) for pid in children()))
        before, pids = project.look(), children()
        host.process.kill()
        host.process.wait()
        assert eventually(lambda: all(gone(pid) for pid in pids), 2.5)
        assert project.look() == before
    with project.write(PAIR).watchdog():  # a new one takes over
        assert project.look().items() >= before.items()


@needs_docker
@pytest.mark.parametrize('watcher', ['thread', 'process'])
def test_idle_watchdog_has_no_child_but_its_watcher(project_2, watcher):
    with project_2.write(PAIR).watchdog('--watcher', watcher) as watchdog:
        expected = 1 if watcher == 'process' else 0
        assert eventually(lambda: len(descendants(watchdog.process.pid)) == expected)


# -- on a real engine: outages, and other engines --------------------------------------------------

ENGINES = pathlib.Path('/usr/local/lib/docker/engines')  # of `.ci/engine --all`: a folder a version


class Engine:
    """A second Docker engine, which a test may stop, kill and reach by other ways."""

    def __init__(self, options=(), home=None):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix='bt'))  # a socket's path has to be short
        self.bridge = self.folder.name[:15]
        # No --default-address-pool: with it, the second start deletes the machine's docker0.
        self.options = ['--bridge=' + self.bridge, '--iptables=false', *options]
        for option in ('data-root', 'exec-root', 'pidfile'):
            self.options += ['--{}={}'.format(option, self.folder / option)]
        socket_path = 'unix://{}'.format(self.folder / 'socket')
        self.environment = dict(os.environ, DOCKER_HOST=socket_path)
        self.options += ['--host=' + socket_path]
        self.process = None
        if home is not None:
            self.use(home)

    def use(self, home):
        """Take the engine, its client and its Compose from this folder."""
        config = self.folder / 'config'
        config.mkdir()
        (config / 'cli-plugins').symlink_to(home / 'cli-plugins')
        path = '{}{}{}'.format(home / 'bin', os.pathsep, os.environ['PATH'])
        self.environment.update(PATH=path, DOCKER_CONFIG=str(config))

    def start(self):
        containerd = self.folder / 'exec-root' / 'containerd' / 'containerd.pid'
        if containerd.exists():  # of a dockerd that was killed, and takes a zombie for alive
            assert eventually(lambda: not os.path.exists('/proc/' + containerd.read_text()))
        with (self.folder / 'log').open('a') as log:
            command = ['dockerd', *self.options]
            self.process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        answers = ['docker', 'info']
        nowhere = subprocess.DEVNULL
        quiet = {'env': self.environment, 'stdout': nowhere, 'stderr': nowhere}
        up = eventually(lambda: subprocess.call(answers, **quiet) == 0, 60)
        assert up, (self.folder / 'log').read_text()[-2000:]

    def end(self, signum):
        self.process.send_signal(signum)
        self.process.wait(60)

    def __enter__(self):
        try:
            call('ip', 'link', 'add', self.bridge, 'type', 'bridge')
            call('ip', 'address', 'add', '10.233.0.1/24', 'dev', self.bridge)
            call('ip', 'link', 'set', self.bridge, 'up')
            self.start()
            copy_image(self.folder, self.environment)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        try:
            if self.process is not None:
                if self.process.poll() is not None:
                    self.start()
                ids = call('docker', 'ps', '-aq', env=self.environment).split()
                call('docker', 'rm', '-fv', *ids, code=None, env=self.environment)
        finally:
            self.clean_up()

    def clean_up(self):
        if self.process is not None and self.process.poll() is None:
            self.end(signal.SIGTERM)
        containerd = self.folder / 'exec-root' / 'containerd' / 'containerd.pid'
        if containerd.exists():  # of a dockerd that was killed
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(containerd.read_text()), signal.SIGKILL)
        call('ip', 'link', 'delete', self.bridge, code=None)
        with open('/proc/mounts') as file:
            for mount in sorted(
                (line.split()[1] for line in file if str(self.folder) in line), reverse=True
            ):
                call('umount', '--lazy', mount, code=None)
        shutil.rmtree(str(self.folder), ignore_errors=True)


@needs_docker
@pytest.mark.parametrize(
    'signum, options',
    [(signal.SIGTERM, ()), (signal.SIGKILL, ('--live-restore',))],
    ids=['stopped', 'killed with live-restore'],
)
def test_outage_of_the_engine_is_told_once_and_all_runs_soon_after_its_end(
    engine, tmp_path, signum, options
):
    with Engine(options) as second:
        project = Project(tmp_path, COMPOSE['Compose 2'], second.environment).write(STACK)
        with project.watchdog('--interval', '1') as watchdog:
            before = watchdog.log()
            second.end(signum)
            assert watchdog.says('WARNING Docker does not answer; trying again every 1 s: GET /')
            looks = threading.Event()
            assert not looks.wait(3)  # it tries some times more, in silence
            second.start()
            assert watchdog.says('INFO Docker answers again, after ')
            assert eventually(project.is_well), (project.look(), watchdog.log())
            project.docker('pause', *project.ids('core'))
            assert watchdog.says('core: paused -> unpaused')
            told = watchdog.log()[len(before) :]
        assert (told.count('WARNING'), told.count('answers again')) == (1, 1)
        assert len(told.splitlines()) < 20 and 'Traceback' not in told


class Podman:
    """podman's service in namespaces of its own: nothing is left when its first process ends."""

    # The shell stays, to reap what podman leaves to it.
    SCRIPT = 'mount -t tmpfs none /var/lib/cni 2>&-; podman "$@"; :'

    def __init__(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix='bt'))
        self.environment = dict(
            os.environ, DOCKER_HOST='unix://{}'.format(self.folder / 'socket'), DOCKER_BUILDKIT='0'
        )

    def __enter__(self):
        # podman's own defaults are more than this process may be allowed to give.
        limits = self.folder / 'containers.conf'
        limits.write_text(
            '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]\n'
        )
        options = ['--runtime', shutil.which('runc') or 'crun', '--cgroup-manager', 'cgroupfs']
        for option in ('root', 'runroot', 'tmpdir', 'network-config-dir'):
            options += ['--' + option, str(self.folder / option)]
        service = ['system', 'service', '--time', '0', self.environment['DOCKER_HOST']]
        alone = ['unshare', '--net', '--mount', '--pid', '--mount-proc', '--fork', '--kill-child']
        command = [*alone, 'sh', '-c', self.SCRIPT, 'sh', *options, *service]
        environment = dict(os.environ, CONTAINERS_CONF=str(limits))
        self.host = Host(command, self.folder / 'log', env=environment, start_new_session=True)
        assert eventually((self.folder / 'socket').exists), self.host.log()
        copy_image(self.folder, self.environment)
        return self

    def __exit__(self, *_):
        self.host.__exit__()
        shutil.rmtree(str(self.folder), ignore_errors=True)


class Sshd:
    """A way to an engine: an ssh server with keys of its own, and an `ssh` that knows them."""

    SERVER = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
StrictModes no
PidFile none
SetEnv DOCKER_HOST={engine} HOME={folder}
"""  # that HOME: the account's start-up files may do anything, and hang once they were killed
    CLIENT = """\
IdentityFile {folder}/user
IdentitiesOnly yes
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""

    def __init__(self, folder, engine):
        self.folder, self.environment = folder, engine.environment
        self.url = 'ssh://root@127.0.0.1:{}'.format(free_port())
        url, port = self.environment['DOCKER_HOST'], self.url.rpartition(':')[2]
        (folder / 'server').write_text(self.SERVER.format(folder=folder, port=port, engine=url))
        (folder / 'client').write_text(self.CLIENT.format(folder=folder))
        for key in ('host', 'user'):
            call('ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', str(folder / key))
        wrapper = folder / 'bin' / 'ssh'
        wrapper.parent.mkdir()
        wrapper.write_text(
            '#!/bin/sh\nexec {} -F {} "$@"\n'.format(shutil.which('ssh'), folder / 'client')
        )
        wrapper.chmod(0o755)
        self.path = '{}{}{}'.format(wrapper.parent, os.pathsep, os.environ['PATH'])

    def __enter__(self):
        os.makedirs('/run/sshd', exist_ok=True)  # the server's package leaves that to its service
        command = [find_program('sshd'), '-f', str(self.folder / 'server')]
        lenient = ['-o', 'PerSourcePenalties=no']  # since 9.8, who breaks connections is shut out
        if subprocess.call([*command, *lenient, '-t'], stderr=subprocess.DEVNULL) == 0:
            command += lenient
        self.host = Host([*command, '-D', '-e'], self.folder / 'log')
        assert self.host.says('Server listening'), self.host.log()
        return self

    def __exit__(self, *_):
        self.host.__exit__()


def copy_image(folder, environment):
    """Give an engine the first engine's busybox."""
    saved = folder / 'busybox.tar'
    call('docker', 'save', '--output', str(saved), 'busybox')
    call('docker', 'load', '--input', str(saved), env=environment)
    saved.unlink()


def find_program(name):
    return shutil.which(name, path=os.environ['PATH'] + ':/usr/sbin')


def skip_without(*programs):
    """Skip what needs a program that `.ci/engine --all` installs where it can be had."""
    for program in programs:
        if not find_program(program):
            pytest.skip('optional: no {} on this machine'.format(program))


@pytest.fixture(scope='module')
def newest(engine):
    """The newest engine that has been fetched, with its own client and Compose."""
    homes = [path.parent.parent for path in ENGINES.glob('*/bin/dockerd')]
    if not homes:
        pytest.skip('optional: no second version on this machine')
    with Engine(home=max(homes, key=lambda home: list(map(int, home.name.split('.'))))) as newest:
        yield newest


@pytest.fixture(scope='module')
def podman(engine):
    skip_without('podman', 'unshare')
    with Podman() as podman:
        yield podman


@pytest.fixture(scope='module')
def second(engine):
    """An engine that listens on a tcp port, too, without TLS."""
    url = 'tcp://127.0.0.1:{}'.format(free_port())
    with Engine(['--host=' + url, '--tls=false']) as second:
        second.url = url
        yield second


@pytest.fixture(scope='module')
def certified(engine, tmp_path_factory):
    """An engine that listens on a tcp port, too, and wants certificates of its clients."""
    folder = tmp_path_factory.mktemp('certificates')
    make_certificates(folder)
    files = {'ca': folder / 'ca.pem', 'cert': folder / 'cert.pem', 'key': folder / 'key.pem'}
    options = [
        '--tls{}={}'.format('cacert' if kind == 'ca' else kind, path)
        for kind, path in files.items()
    ]
    url = 'tcp://127.0.0.1:{}'.format(free_port())
    with Engine(['--tlsverify', *options, '--host=' + url]) as certified:
        certified.url, certified.certificates, certified.files = url, folder, files
        yield certified


@pytest.fixture(scope='module')
def sshd(second, tmp_path_factory):
    skip_without('sshd', 'ssh', 'ssh-keygen')
    with Sshd(tmp_path_factory.mktemp('ssh'), second) as sshd:
        yield sshd


def free_port():
    with contextlib.closing(socket.socket()) as sock:
        sock.bind(('127.0.0.1', 0))
        return sock.getsockname()[1]


def make_certificates(folder):
    """Make what both sides of a TLS connection need, under the names that `docker` looks for."""
    (folder / 'san').write_text(
        'subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n'
    )
    new = ['openssl', 'req', '-newkey', 'rsa:2048', '-nodes', '-subj']
    call(*new, '/CN=ca', '-x509', '-keyout', 'ca-key.pem', '-out', 'ca.pem', cwd=str(folder))
    call(*new, '/CN=both', '-keyout', 'key.pem', '-out', 'request', cwd=str(folder))
    sign = [
        'openssl',
        'x509',
        '-req',
        '-in',
        'request',
        '-CA',
        'ca.pem',
        '-CAkey',
        'ca-key.pem',
        '-CAcreateserial',
    ]
    call(*sign, '-extfile', 'san', '-out', 'cert.pem', cwd=str(folder))


def by_context(folder, endpoint, **environment):
    """Make a context, and return the environment in which it is the current one."""
    environment = dict(os.environ, DOCKER_CONFIG=str(folder / 'config'), **environment)
    call('docker', 'context', 'create', 'other', '--docker', endpoint, env=environment)
    call('docker', 'context', 'use', 'other', env=environment)
    return environment


def with_certificates(certified):
    environment = dict(os.environ, DOCKER_HOST=certified.url)
    environment.update(DOCKER_TLS_VERIFY='1', DOCKER_CERT_PATH=str(certified.certificates))
    for name in (
        'REQUESTS_CA_BUNDLE',
        'CURL_CA_BUNDLE',
    ):  # they come before DOCKER_CERT_PATH for Compose 1.29
        environment.pop(name, None)
    return environment


def endpoint_of(certified):
    return ','.join(
        [
            'host=' + certified.url,
            *['{}={}'.format(kind, path) for kind, path in certified.files.items()],
        ]
    )


# How to reach an engine -> the fixture that has it, and the environment for that.
WAYS = {
    'context': (
        'second',
        lambda second, folder: by_context(folder, 'host=' + second.environment['DOCKER_HOST']),
    ),
    'tcp': ('second', lambda second, folder: dict(os.environ, DOCKER_HOST=second.url)),
    'TLS': ('certified', lambda certified, folder: with_certificates(certified)),
    'TLS by a context': (
        'certified',
        lambda certified, folder: by_context(folder, endpoint_of(certified)),
    ),
    'ssh': ('sshd', lambda sshd, folder: dict(os.environ, DOCKER_HOST=sshd.url, PATH=sshd.path)),
    'ssh by a context': (
        'sshd',
        lambda sshd, folder: by_context(folder, 'host=' + sshd.url, PATH=sshd.path),
    ),
}
BY_DIAL = [way for way in WAYS if way != 'context']  # through `docker system dial-stdio`


def reach(request, way, folder, compose='Compose 2'):
    """Return a project, and the environment of a watchdog that reaches its engine by this way."""
    fixture, environment = WAYS[way]
    other = request.getfixturevalue(fixture)
    return Project(folder, COMPOSE[compose], other.environment).write(PAIR), environment(
        other, folder
    )


def see_repairs(project, environment=None):
    """See what is killed, paused and removed run again by events alone, its neighbour untouched."""
    with project.write(PAIR).watchdog('--interval', '3600', environment=environment) as watchdog:
        before = project.look()[project.ids('side')[0]]
        for deed, end in (
            ('kill', '-> started'),
            ('pause', '-> unpaused'),
            ('rm -f', '-> created'),
        ):
            project.docker(*deed.split(), *project.ids('core'))
            assert watchdog.says(end), (deed, watchdog.log())
            assert eventually(lambda: project.is_well(('core', 'side'))), (deed, project.look())
        assert project.look()[project.ids('side')[0]] == before
        assert 'Traceback' not in watchdog.log()


# 1.29 knows no contexts, and no `ssh` but its own.
REACHED = [(way, 'Compose 2') for way in WAYS] + [('TLS', 'Compose 1.29')]


@needs_docker
@pytest.mark.parametrize('way, compose', REACHED)
def test_engine_is_watched_by_whatever_way_it_is_reached(request, tmp_path, way, compose):
    see_repairs(*reach(request, way, tmp_path, compose))


@needs_docker
def test_certificates_are_really_asked_for(certified):
    environment = dict(
        with_certificates(certified), DOCKER_CERT_PATH='/nowhere', DOCKER_TLS_VERIFY=''
    )
    assert (
        b'client'
        in subprocess.run(['docker', 'ps'], env=environment, stderr=subprocess.PIPE).stderr.lower()
    )


def find_connections(pid):
    """Return the ids of the commands by which a process and its children reach another machine."""
    return [child for child in descendants(pid) if 'dial-stdio' in command_line(child)]


def kill_all(pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def see_breaks(project, environment, connections, times):
    """See a container repaired that is killed just when all connections are, again and again."""
    with project.watchdog('--interval', '3600', environment=environment) as watchdog:
        core = project.ids('core')
        for repaired in range(1, times + 1):
            assert eventually(lambda: find_connections(watchdog.process.pid))
            kill_all(connections(watchdog))
            project.docker('kill', *core)
            assert watchdog.says('-> started', repaired), watchdog.log()
        assert 'Traceback' not in watchdog.log() and project.ids('core') == core


@needs_docker
@pytest.mark.parametrize('way', BY_DIAL)
def test_connection_that_breaks_is_replaced_and_what_happened_meanwhile_is_seen(
    request, tmp_path, way
):
    project, environment = reach(request, way, tmp_path)
    see_breaks(project, environment, lambda watchdog: find_connections(watchdog.process.pid), 3)


@needs_docker
def test_ssh_connection_that_the_other_side_breaks_is_replaced(request, sshd, tmp_path):
    project, environment = reach(request, 'ssh', tmp_path)
    see_breaks(project, environment, lambda watchdog: descendants(sshd.host.process.pid), 2)


@needs_docker
@pytest.mark.parametrize('way', ['tcp', 'ssh'])
def test_connections_are_few_and_end_with_the_watchdog(request, tmp_path, way):
    project, environment = reach(request, way, tmp_path)
    with project.watchdog(environment=environment) as watchdog:
        assert eventually(lambda: find_connections(watchdog.process.pid))
        connections = find_connections(watchdog.process.pid)
        dials = [pid for pid in connections if command_line(pid).startswith('docker ')]
        # Each may be two logins, and sshd's own limit is 10.
        assert len(dials) <= 3, [command_line(pid) for pid in connections]
    assert eventually(lambda: all(gone(pid) for pid in connections), 2.5)


@needs_docker
@pytest.mark.parametrize('way', ['tcp', 'ssh'])
def test_watchdog_that_is_killed_leaves_no_connection(request, tmp_path, way):
    project, environment = reach(request, way, tmp_path)
    try:
        with Host(
            [sys.executable, str(MODULE), *project.options()], tmp_path / 'log', env=environment
        ) as host:
            assert host.says('the stack is up', seconds=60) and eventually(
                lambda: find_connections(host.process.pid)
            )
            left = descendants(host.process.pid)
            host.process.kill()
            host.process.wait()
            assert eventually(lambda: all(gone(pid) for pid in left), 2.5), [
                command_line(pid) for pid in left
            ]
    finally:
        project.remove()


@needs_docker
@pytest.mark.parametrize('compose', list(COMPOSE))
def test_newest_engine_is_watched_like_this_machines_own(newest, tmp_path, compose):
    version = ['docker', 'version', '--format', '{{.Server.Version}}']
    assert call(*version, env=newest.environment) != call(*version)
    see_repairs(Project(tmp_path, COMPOSE[compose], newest.environment))


@pytest.fixture(scope='module')
def watched_by_newest(newest, tmp_path_factory):
    project = Project(
        tmp_path_factory.mktemp('stack'), COMPOSE['Compose 2'], newest.environment
    ).write(STACK)
    with project.watchdog('--interval', '3600') as host:
        project.log = host.log
        yield project


@needs_docker
@pytest.mark.parametrize('fault', list(FAULTS))
def test_fault_is_repaired_on_the_newest_engine_without_touching_the_neighbours(
    watched_by_newest, fault
):
    test_fault_is_repaired_without_touching_the_neighbours(watched_by_newest, fault)


@needs_docker
def test_podman_is_watched_like_docker(podman, tmp_path):
    see_repairs(Project(tmp_path, COMPOSE['Compose 2'], podman.environment))


# -- on a real engine: hosts, service manager, packages --------------------------------------------

HOST = """
import threading
import flask
from compose import UP_FLAG, docker_compose, flask_exit, register

app = flask.Flask('broaptd')

@app.route('/up')
def up():
    return str(UP_FLAG.value)

@app.route('/exit')
def exit():
    flask_exit()
    return 'going'

if __name__ == '__main__':
    register()
    with docker_compose():
        app.run(host='127.0.0.1', port={port})
    print('after', threading.active_count(), flush=True)
"""


def list_flask_pythons():
    """The interpreters with Flask: this one, and Python 3.6 with the Flask of its time."""
    old = os.environ.get('BROAPT_TEST_PYTHON36')
    reason = 'BROAPT_TEST_PYTHON36 names no Python 3.6 with Flask'
    missing = pytest.mark.skipif(
        importlib.util.find_spec('flask') is None, reason='Flask is not installed'
    )
    return [
        pytest.param(sys.executable, id='this', marks=missing),
        pytest.param(old, id='3.6', marks=pytest.mark.skipif(not old, reason=reason)),
    ]


@contextlib.contextmanager
def run_broapt(project, python, **const):
    """Run a server as BroAPT does, the module beside a const; it has to leave nothing."""
    shutil.copy(str(MODULE), str(project.folder / 'compose.py'))
    project.file.rename(project.folder / 'stack.yml')  # a name that Compose does not find by itself
    project.file = project.folder / 'stack.yml'
    values = {'DOCKER_COMPOSE': str(project.file), 'INTERVAL': 5, 'KILL_SIGNAL': 15}
    (project.folder / 'const.py').write_text(
        ''.join('{} = {!r}\n'.format(*item) for item in values.items())
    )
    port = free_port()
    (project.folder / 'broaptd.py').write_text(HOST.format(port=port))
    environment = dict(os.environ, COMPOSE_PROJECT_NAME=project.name, BROAPT_SETTLE='0')
    environment.update(const, BROAPT_COMPOSE_COMMAND=' '.join(project.compose_command))
    address = 'http://127.0.0.1:{}/'.format(port)
    with Host(
        [python, 'broaptd.py'], project.folder / 'log', cwd=str(project.folder), env=environment
    ) as host:
        assert host.says('Running on', seconds=60), host.log()
        assert urllib.request.urlopen(address + 'up').read() == b'True'
        pids = [*descendants(host.process.pid), host.process.pid]
        yield host, address
        assert host.process.wait(60) == 0, host.log()
        assert host.log().endswith('after 1\n') and 'Traceback' not in host.log(), host.log()
        assert project.ids() == []
        assert eventually(lambda: all(gone(pid) for pid in pids))


@needs_docker
@pytest.mark.parametrize('compose, watcher', CROSSED)
@pytest.mark.parametrize('python', list_flask_pythons())
def test_flask_server_of_broapt_ends_in_order_in_the_middle_of_a_repair(
    project_2, python, compose, watcher
):
    project = project_2
    project.compose_command = COMPOSE[compose]
    with run_broapt(project.write(PAIR), python, BROAPT_WATCHER=watcher) as (host, _):
        project.docker('kill', *project.ids('core'))
        assert eventually(
            lambda: [state for _, state, *_ in project.look().values()] == ['running'] * 2
        )
        project.docker('rm', '-f', *project.ids('side'))
        assert eventually(
            lambda: any(
                ' up --detach' in command_line(pid) for pid in descendants(host.process.pid)
            )
        )
        host.process.terminate()


@needs_docker
@pytest.mark.parametrize('python', list_flask_pythons())
def test_flask_view_may_end_the_server(project_2, python):
    with run_broapt(project_2.write(PAIR), python) as (_, address):
        with contextlib.suppress(
            OSError, http.client.HTTPException
        ):  # the newer servers end before the answer does
            urllib.request.urlopen(address + 'exit').read()


METHOD = """
import multiprocessing, os, sys, threading
import broapt_compose as bc

if __name__ == '__main__':
    multiprocessing.set_start_method(sys.argv[1])
    settings = bc.Settings.load(docker_compose=sys.argv[2], interval=3600, settle=0,
                                watcher='process', compose_command=sys.argv[3])
    with bc.docker_compose(settings) as flag:
        print('up', flush=True)
        os.read(0, 1)
        threading.Thread(target=lambda: setattr(flag, 'value', False)).start()
        while threading.active_count() > 1:
            pass
        print('watcher gone', multiprocessing.active_children(), flush=True)
"""


@needs_docker
@pytest.mark.parametrize('method', ['fork', 'spawn', 'forkserver'])
def test_watcher_process_is_started_by_any_method_and_ended_by_the_flag(project_2, method):
    project = project_2.write(PAIR)
    (project.folder / 'host.py').write_text(METHOD)
    command = ' '.join([*project.compose_command, '-p', project.name])
    arguments = [
        sys.executable,
        str(project.folder / 'host.py'),
        method,
        str(project.file),
        command,
    ]
    environment = dict(os.environ, PYTHONPATH=str(HERE))
    with Host(arguments, project.folder / 'log', env=environment, stdin=subprocess.PIPE) as host:
        assert host.says('up\n', seconds=60), host.log()
        project.docker('kill', *project.ids('core'))
        assert eventually(
            lambda: [state for _, state, *_ in project.look().values()] == ['running'] * 2
        )
        host.process.communicate(b'\n', 60)
        assert host.process.returncode == 0 and host.log().endswith('watcher gone []\n'), host.log()
        assert project.ids() == []


@contextlib.contextmanager
def service_manager(address):
    """Listen as systemd does; give a function that collects messages until a text comes."""
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sock:
        sock.bind(address.replace('@', '\0', 1))
        messages = []

        def read_until(text, seconds=30):
            sock.settimeout(seconds)
            messages.clear()
            while text not in '\n'.join(messages):
                messages.append(sock.recv(1 << 16).decode())
            return messages

        yield read_until


@needs_docker
@pytest.mark.parametrize('watcher', ['thread', 'process'])
@pytest.mark.parametrize('address', ['{}/notify', '@{}/notify'], ids=['path', 'abstract'])
def test_service_manager_is_told_what_goes_on_and_is_fed_by_completed_checks_only(
    project_2, watcher, address
):
    project, folder = project_2.write(PAIR), tempfile.mkdtemp(prefix='bt')
    address = address.format(folder)
    link = pathlib.Path(folder, 'docker.sock')  # the engine does not answer while it is away
    link.symlink_to('/var/run/docker.sock')
    host = 'unix://{}'.format(link)
    project.environment = dict(os.environ, NOTIFY_SOCKET=address, WATCHDOG_USEC='1000000')
    dogs_environment = dict(project.environment, DOCKER_HOST=host)
    try:
        with service_manager(address) as read_until:
            options = ('--watcher', watcher, '--interval', '3600')
            with project.watchdog(*options, environment=dogs_environment) as watchdog:
                assert 'READY=1' in read_until('2 of 2 running')
                assert set(read_until('running')) == {
                    'STATUS=2 of 2 running\nWATCHDOG=1'
                }  # twice a WATCHDOG_USEC
                project.docker('pause', *project.ids('side'))
                assert 'STATUS=side: paused\nWATCHDOG=1' in read_until('paused')
                read_until('2 of 2 running')
                link.unlink()
                assert watchdog.says('WARNING Docker does not answer')
                with pytest.raises(socket.timeout):
                    for _ in range(10):
                        read_until('2 of 2 running', seconds=4)
                link.symlink_to('/var/run/docker.sock')
                read_until('2 of 2 running')
            assert 'STOPPING=1' in read_until('STOPPING=1')
    finally:
        shutil.rmtree(folder)


def test_unit_file_of_the_readme_is_accepted_by_systemd(tmp_path):
    if not shutil.which('systemd-analyze'):
        pytest.skip('systemd-analyze is not installed')
    unit = re.search('```ini\n(.*?)```', (HERE / 'README.md').read_text(), re.DOTALL).group(1)
    (tmp_path / 'broapt.service').write_text(unit)
    result = subprocess.run(
        ['systemd-analyze', 'verify', str(tmp_path / 'broapt.service')], stderr=subprocess.PIPE
    )
    assert (result.returncode, result.stderr) == (0, b'')


def test_webhook_of_the_readme_gets_what_is_logged(tmp_path):
    blocks = re.findall('```python\n(.*?)```', (HERE / 'README.md').read_text(), re.DOTALL)
    (code,) = [block for block in blocks if 'HTTPHandler' in block]
    posted = []

    class Hook(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers['Content-Length'])
            posted.append(urllib.parse.parse_qs(self.rfile.read(length).decode()))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(('127.0.0.1', 0), Hook) as server:
        server.socket.settimeout(30)
        code = code.replace('127.0.0.1:8080', '127.0.0.1:{}'.format(server.server_address[1]))
        code += "log.warning('core: %s', 'missing')\ninput()\n"
        with Host([sys.executable, '-c', code], tmp_path / 'log', stdin=subprocess.PIPE) as host:
            server.handle_request()
            assert [form['msg'] for form in posted] == [['core: missing']], host.log()


def need(*modules):
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip('{} is not installed'.format(module))


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """Build both packages, the wheel from the sdist as an installer does; give the wheel."""
    need('build', 'flit_core')
    folder = tmp_path_factory.mktemp('packages')
    for name in (
        'broapt_compose.py',
        'test_broapt_compose.py',
        'pyproject.toml',
        'README.md',
        'LICENSE',
    ):
        shutil.copy(str(HERE / name), str(folder))
    call(sys.executable, '-m', 'build', '--no-isolation', cwd=str(folder))
    return next((folder / 'dist').glob('*.whl'))


def test_wheel_holds_the_module_and_tells_all_about_it(wheel):
    with zipfile.ZipFile(str(wheel)) as archive:
        files = {name.rpartition('/')[2]: archive.read(name) for name in archive.namelist()}
    assert sorted(files) == [
        'LICENSE',
        'METADATA',
        'RECORD',
        'WHEEL',
        'broapt_compose.py',
        'entry_points.txt',
    ]
    assert files['broapt_compose.py'] == MODULE.read_bytes()
    metadata = files['METADATA'].decode()
    for line in (
        'Name: broapt_compose',
        'Version: ' + bc.__version__,
        'Requires-Python: >=3.6.1',
        'License-Expression: BSD-3-Clause',
    ):
        assert line + '\n' in metadata
    required = [line for line in metadata.splitlines() if line.startswith('Requires-Dist')]
    assert all(line.endswith('extra == "test"') for line in required)


@needs_docker
def test_installed_command_repairs_a_stack_on_the_oldest_and_this_python(wheel, project_2):
    project = project_2.write(PAIR)
    project.compose('up', '-d')
    for python in filter(None, [os.environ.get('BROAPT_TEST_PYTHON36'), sys.executable]):
        venv = project.folder / 'venv'
        call(python, '-m', 'venv', '--clear', str(venv))
        call(
            str(venv / 'bin' / 'python'),
            '-m',
            'pip',
            'install',
            '--no-index',
            '--no-deps',
            str(wheel),
        )
        command = str(venv / 'bin' / 'broapt-compose')
        assert call(command, '--version', cwd='/') == 'broapt_compose {}\n'.format(bc.__version__)
        project.docker('kill', *project.ids('core'))
        call(command, 'check', *project.options(), cwd='/')
        assert [state for _, state, *_ in project.look().values()] == ['running'] * 2
        call(command, 'status', *project.options(), cwd='/')


FROZEN = """
import multiprocessing, sys
import broapt_compose

if __name__ == '__main__':
    multiprocessing.freeze_support()
    sys.exit(broapt_compose.main())
"""


@pytest.fixture(scope='module')
def frozen(tmp_path_factory):
    """Freeze a host into one file, as BroAPT is."""
    need('PyInstaller')
    folder = tmp_path_factory.mktemp('frozen')
    (folder / 'host.py').write_text(FROZEN)
    call(
        sys.executable, '-m', 'PyInstaller', '-F', '--paths', str(HERE), 'host.py', cwd=str(folder)
    )
    return folder / 'dist' / 'host'


@needs_docker
@pytest.mark.parametrize('watcher', ['thread', 'process'])
def test_frozen_host_repairs_and_ends_in_order(frozen, project_2, watcher):
    project = project_2
    with project.write(PAIR).watchdog('--watcher', watcher, start=(str(frozen), 'run')) as host:
        project.docker('kill', *project.ids('core'))
        assert host.says('core: exited (137) -> started'), host.log()
        pids = descendants(host.process.pid)
        assert len(pids) >= (
            2 if watcher == 'process' else 1
        )  # the program in the program, the watcher
    assert all(gone(pid) for pid in pids) and 'Traceback' not in host.log()


# -- on a real engine: names and secrets -----------------------------------------------------------


@needs_docker
def test_odd_names_of_folders_files_and_services_are_only_names(project, monkeypatch):
    folder = project.folder / """-f "it's" $(touch x); `x` & ü\n*"""
    folder.mkdir()
    project.folder, project.file = folder, folder / '-x é.yml'
    project.write(PAIR.replace('core', 'Co.re_-1').replace('side', '0-_'))
    monkeypatch.chdir(str(folder))
    with bc.docker_compose(project.settings()):
        project.docker('kill', *project.ids())
        assert eventually(
            lambda: [state for _, state, *_ in project.look().values()] == ['running'] * 2
        )
        project.docker('rm', '-f', *project.ids('0-_'))
        assert eventually(
            lambda: [state for _, state, *_ in project.look().values()] == ['running'] * 2
        )
    assert sorted(os.listdir(str(folder))) == ['-x é.yml']


@needs_docker
def test_secrets_appear_nowhere(project_2):
    project = project_2
    text = (
        PAIR
        + "  loop: {image: busybox, command: sh -c 'exit 7', "
        + "environment: {TOKEN: canary-2, OTHER: '${CANARY}'}}\n"
    )
    project.write(text)
    project.environment = dict(os.environ, CANARY='canary-1', DOCKER_PASSWORD='canary-3')
    with project.watchdog('--verbose') as watchdog:
        assert watchdog.says('crash loop')
        project.write(
            'services: {core: {image: busybox, environment: {TOKEN: canary-4}, command: [}}'
        )
        project.docker('rm', '-f', *project.ids('side'))
        assert watchdog.says('ERROR side: missing, not created')
        project.write(text)
        assert 'canary' not in watchdog.log()
    assert 'canary' not in watchdog.log()


# -- on a real engine: hosts that fork, reap or ignore their children, or are suspended ------------


@contextlib.contextmanager
def hosted(project, script, *arguments, **environment):
    """Run a script that uses the library on the project's stack; its environment sets all."""
    (project.folder / 'host.py').write_text(script)
    command = ' '.join([*project.compose_command, '-p', project.name])
    values = {'BROAPT_DOCKER_COMPOSE': str(project.file), 'BROAPT_COMPOSE_COMMAND': command}
    values.update(BROAPT_SETTLE='0', BROAPT_INTERVAL='3600', PYTHONPATH=str(HERE), **environment)
    variables = dict(project.environment or os.environ, **values)
    command = [sys.executable, str(project.folder / 'host.py'), *arguments]
    log = project.folder / 'log'
    with Host(command, log, env=variables, cwd=str(project.folder), stdin=subprocess.PIPE) as host:
        yield host


def run_on(project, *arguments, start=(sys.executable, str(MODULE)), **environment):
    """Run a command of the module on the project's stack; return what `subprocess.run` does."""
    variables = dict(project.environment or os.environ, **environment)
    return subprocess.run(
        [*start, *arguments, *project.options()],
        env=variables,
        cwd=str(project.folder),
        timeout=120,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
    )


def tell(host, text):
    """Write a line to the standard input of a script."""
    host.process.stdin.write(text.encode() + b'\n')
    host.process.stdin.flush()


def see_it_watched(project, host):
    """See that a fault is still repaired, and noticed by its event."""
    repaired = host.log().count('core: paused -> unpaused')
    before, core = project.look(), project.ids('core')
    assert core, host.log()
    project.docker('pause', *core)
    assert host.says('core: paused -> unpaused', repaired + 1), host.log()
    assert eventually(lambda: project.look() == before), (project.look(), host.log())


def complaints(host):
    """Return the lines of the log that tell of trouble."""
    words = (
        'WARNING:broapt|ERROR:broapt|ComposeWarning| WARNING | ERROR |can only join|can only test'
    )
    return [line for line in host.log().splitlines() if re.search(words, line)]


FORKS = """
import logging, os, sys, threading, warnings
import broapt_compose as bc

def say(*words):
    os.write(1, (' '.join(map(str, words)) + '\\n').encode())  # in one piece: two processes write

def lower():
    bc.UP_FLAG.value = False
    sys.exit()

def wait():
    say('waiting', os.getpid())
    threading.Event().wait(60)

def fork_again():
    if os.fork():
        os.wait()
    sys.exit()

def linger():
    os.setsid()
    if not os.fork():
        say('lingering', os.getpid())
        threading.Event().wait(120)
    os._exit(0)

WAYS = {'exit': sys.exit, 'fail': lambda: 1 / 0, 'leave': lambda: None, 'lower': lower,
        'call': bc.flask_exit, 'wait': wait, 'again': fork_again, 'linger': linger}

if __name__ == '__main__':
    logging.basicConfig(level='INFO')
    warnings.simplefilter('always')
    bc.register()
    with bc.docker_compose() as flag:
        say('up')
        for line in iter(sys.stdin.readline, ''):
            child = os.fork()
            if not child:
                WAYS[line.strip()]()
                break
            os.waitpid(child, 0)
            say('ended', flag.value)
    say('after', os.getpid())
"""


@needs_docker
@pytest.mark.parametrize('watcher', ['thread', 'process'])
def test_forked_child_ends_in_whatever_way_without_touching_the_stack_of_its_parent(
    project_2, watcher
):
    project = project_2.write(PAIR)
    with hosted(project, FORKS, BROAPT_WATCHER=watcher) as host:
        assert host.says('up\n', seconds=60), host.log()
        before = project.look()
        for count, way in enumerate(
            ['exit', 'fail', 'leave', 'lower', 'call', 'wait', 'again', 'linger']
        ):
            tell(host, way)
            if way == 'wait':
                assert host.says('waiting ')
                os.kill(int(host.log().split('waiting ')[1].split()[0]), signal.SIGTERM)
            assert host.says('ended True\n', count + 1, seconds=30), (way, host.log())
            assert project.look() == before, (way, project.look(), host.log())
            see_it_watched(project, host)
        lingering = int(host.log().split('lingering ')[1].split()[0])
        try:
            host.process.stdin.close()
            assert host.process.wait(60) == 0, host.log()
        finally:
            os.kill(lingering, signal.SIGKILL)
        assert host.log().count('after {}\n'.format(host.process.pid)) == 1
        assert complaints(host) == [] and project.ids() == [], host.log()


AROUND = """
import logging, os, sys, warnings
import broapt_compose as bc
from gunicorn.app.base import BaseApplication

def app(environ, start_response):
    start_response('200 OK', [('Content-Type', 'text/plain')])
    return [str(os.getpid()).encode()]

def enter(server):
    server.stack = bc.docker_compose()
    server.stack.__enter__()

def leave(server):
    server.stack.__exit__(None, None, None)

class Server(BaseApplication):
    def load_config(self):
        self.cfg.set('bind', '127.0.0.1:' + sys.argv[1])
        self.cfg.set('workers', 2)
        self.cfg.set('max_requests', 3)
        if sys.argv[2] != 'around':
            self.cfg.set(sys.argv[2], enter)
            self.cfg.set('on_exit', leave)

    def load(self):
        return app

if __name__ == '__main__':
    logging.basicConfig(level='INFO')
    warnings.simplefilter('always')
    if sys.argv[2] == 'around':
        with bc.docker_compose():
            Server('gunicorn').run()
    Server('gunicorn').run()
"""


def ask_gunicorn(port):
    """Return the id of the worker that answers; 0 if none does, as happens while one ends."""
    try:
        return int(urllib.request.urlopen('http://127.0.0.1:{}/'.format(port), timeout=10).read())
    except (OSError, ValueError):
        return 0


@needs_docker
@pytest.mark.parametrize(
    'where, watcher',
    [
        ('around', 'thread'),
        ('when_ready', 'process'),
        ('on_starting', 'process'),
    ],
)
def test_workers_of_gunicorn_come_and_go_and_only_the_end_of_the_master_stops_the_stack(
    project_2, where, watcher
):
    need('gunicorn')
    project, port = project_2.write(PAIR), free_port()
    with hosted(project, AROUND, str(port), where, BROAPT_WATCHER=watcher) as host:
        seen = set()

        def another_worker_answers():
            pid = ask_gunicorn(port)
            return pid and pid not in seen and not seen.add(pid)

        assert eventually(another_worker_answers, 60), host.log()
        before = project.look()
        for _ in range(4):
            assert eventually(another_worker_answers), host.log()  # each ends after three requests
        see_it_watched(project, host)
        host.process.send_signal(signal.SIGHUP)
        assert eventually(another_worker_answers), host.log()
        for pid in [pid for pid in seen if 'host.py' in command_line(pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        assert eventually(another_worker_answers), host.log()
        assert project.look() == before, host.log()
        see_it_watched(project, host)
        project.docker('rm', '-f', *project.ids('side'))
        assert eventually(lambda: project.is_well(('core', 'side'))), (project.look(), host.log())
        host.process.terminate()
        assert host.process.wait(60) == 0, host.log()
        assert complaints(host) == [] and project.ids() == [], host.log()


CHILDREN = """
import logging, os, signal, sys, warnings
import broapt_compose as bc

def reap(*_):
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass

if __name__ == '__main__':
    logging.basicConfig(level='INFO')
    warnings.simplefilter('always')
    signal.signal(signal.SIGCHLD, {'reaped': reap, 'ignored': signal.SIG_IGN}[sys.argv[1]])
    if sys.argv[1] == 'reaped':  # also what the kernel tells a thread that does not handle signals
        signal.signal(signal.SIGALRM, reap)
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    while sys.stdin.readline():
        try:
            with bc.docker_compose():
                print('up', flush=True)
                sys.stdin.readline()
            print('down', flush=True)
        except bc.ComposeError as error:
            print('refused:', error, flush=True)
    signal.setitimer(signal.ITIMER_REAL, 0)
"""
# The command has ended, and the host has reaped it, before its pipes end.
LINGERING = '$real "$@"; code=$?; sleep 0.2 & exit $code'
NO_PROGRAM = PAIR + '  bad: {image: busybox, command: /no/such/program}\n'


@needs_docker
@pytest.mark.parametrize(
    'children, watcher', [('reaped', 'process'), ('ignored', 'thread'), ('ignored', 'process')]
)
def test_command_fails_or_succeeds_by_its_own_result_in_a_host_that_reaps_or_ignores_its_children(
    project_2, children, watcher
):
    project = project_2
    put_on_path(project, 'docker', LINGERING)
    with hosted(project, CHILDREN, children, BROAPT_WATCHER=watcher) as host:
        for count, text in enumerate([NO_PROGRAM, 'services: [']):
            project.write(text)
            tell(host, 'start')
            assert host.says('refused: ', count + 1) and 'up\n' not in host.log(), host.log()
        project.write(PAIR)
        tell(host, 'start')
        assert host.says('up\n'), host.log()
        see_it_watched(project, host)
        project.docker('kill', *project.ids('core'))
        project.docker('rm', '-f', *project.ids('side'))
        assert eventually(lambda: project.is_well(('core', 'side'))), (project.look(), host.log())
        assert complaints(host) == [], host.log()
        project.write(PAIR.replace('side: {image: busybox', 'side: {image: 127.0.0.1:1/none'))
        project.docker('rm', '-f', *project.ids('side'))
        assert host.says('127.0.0.1:1') and 'side: missing -> created (' in host.log(), host.log()
        assert host.log().count('side: missing -> created (') == 1
        host.process.stdin.close()
        assert host.process.wait(60) == 0 and host.says('down\n'), host.log()
        assert 'has died' not in host.log() and 'no watcher process' not in host.log(), host.log()
        assert project.ids() == [], host.log()


IGNORING = ('sh', '-c', 'trap "" CHLD; exec "$@"', 'sh', sys.executable, str(MODULE))


@needs_docker
def test_starter_that_ignores_sigchld_changes_no_exit_code(project_2):
    project = project_2
    project.write(NO_PROGRAM)
    failed = run_on(project, 'run', start=IGNORING)
    assert (failed.returncode, 'the stack is up' in failed.stderr) == (1, False), failed
    assert run_on(project, 'status', start=IGNORING).returncode == 1
    assert run_on(project, 'check', start=IGNORING).returncode == 1
    assert run_on(project, 'check', start=IGNORING, DOCKER_HOST='unix:///none/such').returncode == 1
    project.remove()  # what the check has left
    with project.write(PAIR).watchdog(start=[*IGNORING, 'run']) as watchdog:
        project.docker('kill', *project.ids('core'))
        project.docker('rm', '-f', *project.ids('side'))
        assert eventually(lambda: project.is_well(('core', 'side'))), (
            project.look(),
            watchdog.log(),
        )
        assert run_on(project, 'status', start=IGNORING).returncode == 0
        assert complaints(watchdog) == []


def put_on_path(project, name, script):
    """Put a shell script on the project's PATH before the program of that name, its $real."""
    folder = project.folder / 'bin'
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(
        '#!/bin/sh\nreal={}\nhere={}\n{}\n'.format(shutil.which(name), folder, script)
    )
    (folder / name).chmod(0o755)
    environment = project.environment or os.environ
    if not environment['PATH'].startswith(str(folder)):
        project.environment = dict(environment, PATH='{}:{}'.format(folder, environment['PATH']))
    return folder


SLOW = """
case " $* " in *" WORD "*) ;; *) exec $real "$@";; esac
touch $here/begun
sleep 0.3
$real "$@"
code=$?
echo last words of WORD >&2
touch $here/ended
exit $code
"""
LONG_TIMEOUT, LONGER = (
    3,
    3.5,
)  # seconds: enough for every command, and what a suspended process sleeps through


@contextlib.contextmanager
def suspended(host, seconds=LONGER):
    """Stop the process, as Ctrl+Z does; after the block it sleeps for so many seconds more."""
    host.process.send_signal(signal.SIGSTOP)
    try:
        yield
        threading.Event().wait(seconds)
    finally:
        host.process.send_signal(signal.SIGCONT)


def suspend_during_command(host, folder):
    """If it has begun the slow command, suspend it until that has ended and its time is over."""
    if eventually((folder / 'begun').exists, 4):
        with suspended(host):
            assert eventually((folder / 'ended').exists)
            (folder / 'begun').unlink()
            (folder / 'ended').unlink()


@needs_docker
@pytest.mark.parametrize('word', ['config', 'up'])
def test_watchdog_that_was_suspended_while_a_command_ran_has_lost_nothing(project_2, word):
    project = project_2.write(PAIR)
    folder = put_on_path(project, 'docker', SLOW.replace('WORD', word))
    options = project.options('--timeout', str(LONG_TIMEOUT), '--interval', '3600')
    with Host(
        [sys.executable, str(MODULE), *options], project.folder / 'log', env=project.environment
    ) as host:
        suspend_during_command(host, folder)
        while word == 'config' and not host.says('the stack is up', seconds=2):
            suspend_during_command(host, folder)
        assert host.says('the stack is up'), host.log()
        assert ('last words of up' in host.log()) == (word == 'up'), host.log()
        if word == 'config':  # perhaps it reads the file again once it watches
            suspend_during_command(host, folder)
        project.environment, deploy = None, ('up', '-d', '--force-recreate', 'side')
        deployment = threading.Thread(target=project.compose, args=deploy)
        deployment.start()
        if word == 'config':  # or when somebody deploys
            suspend_during_command(host, folder)
        deployment.join()
        assert eventually(lambda: project.is_well(('core', 'side'))), host.log()
        see_it_watched(project, host)
        project.docker('rm', '-f', *project.ids('side'))
        assert eventually(lambda: project.is_well(('core', 'side'))), (project.look(), host.log())
        host.process.terminate()
        assert host.process.wait(60) == 0 and complaints(host) == [], host.log()
        assert project.ids() == [] and project.docker('network', 'ls', '-q', project.filter) == ''


class Relay:
    """A way to the engine; while it is held, only Compose gets answers."""

    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix='bt')  # a socket's path has to be short
        self.address = os.path.join(self.folder, 'socket')
        self.flowing, self.waiting = threading.Event(), threading.Event()
        self.flowing.set()

    def __enter__(self):
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.address)
        self.listener.listen(64)
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.flowing.set()
        self.listener.close()
        shutil.rmtree(self.folder)

    def serve(self):
        with contextlib.suppress(OSError):  # closed at the end
            while True:
                client, server = self.listener.accept()[0], socket.socket(socket.AF_UNIX)
                server.connect('/var/run/docker.sock')
                pid = struct.unpack(
                    '3i', client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                )[0]
                compose = 'docker-compose' in command_line(pid).split(' ')[0]
                for ends in ((client, server, False), (server, client, not compose)):
                    threading.Thread(target=self.pump, args=ends, daemon=True).start()

    def pump(self, source, target, held):
        with contextlib.suppress(OSError):
            for chunk in iter(lambda: source.recv(1 << 16), b''):
                if held and not self.flowing.is_set():
                    self.waiting.set()
                    self.flowing.wait()
                target.sendall(chunk)
            target.shutdown(socket.SHUT_WR)

    def hold_next(self, host):
        """Hold the next answer back; return whether there is one before the process ends."""
        self.waiting.clear()
        self.flowing.clear()
        return (
            eventually(lambda: self.waiting.is_set() or host.process.poll() is not None)
            and self.waiting.is_set()
        )


@pytest.fixture
def relayed(project_2):
    """A project whose engine is reached by way of a relay."""
    with Relay() as relay:
        project_2.environment = dict(os.environ, DOCKER_HOST='unix://' + relay.address)
        yield project_2.write(PAIR), relay
        project_2.environment = None


@needs_docker
def test_watchdog_that_was_suspended_while_it_looked_has_seen_everything(relayed):
    project, relay = relayed
    with project.watchdog('--timeout', str(LONG_TIMEOUT), '--interval', '0.5') as host:
        see_it_watched(project, host)
        assert relay.hold_next(host)
        with suspended(host):
            relay.flowing.set()
        see_it_watched(project, host)
        assert 'missing' not in host.log() and complaints(host) == [], host.log()


@needs_docker
def test_watchdog_that_is_suspended_again_and_again_while_it_ends_leaves_nothing_behind(relayed):
    project, relay = relayed
    with project.watchdog('--interval', '3600') as host:
        project.environment = None  # for what follows, of ours
        host.process.terminate()
        while relay.hold_next(host):
            with suspended(host, 0.7):
                relay.flowing.set()
        relay.flowing.set()
    assert complaints(host) == [], host.log()
    assert project.docker('network', 'ls', '-q', project.filter) == ''


# -- on a real engine: starts that fail beside what ran before -------------------------------------

RAN_BEFORE = STORE.replace(
    'services:',
    """services:
  well:
    image: busybox
    command: sleep 10000
    stop_signal: SIGKILL
    healthcheck: {test: test ! -e /dev/shm/sick, interval: 0.3s, retries: 1, start_period: 0s}""",
    1,
)
SICK = """
  sick:
    image: busybox
    command: sh -c 'echo the database is locked; sleep 10000'
    stop_signal: SIGKILL
    healthcheck: {test: sh -c 'sleep 0.3; false', interval: 0.2s, retries: 1}
  web: {image: busybox, depends_on: {sick: {condition: service_healthy}}}
"""
DIES = """
  dies: {image: busybox, command: sh -c 'echo no such table; exit 3'}
  web: {image: busybox, depends_on: {dies: {condition: service_completed_successfully}}}
"""
FAILURES = {
    'image that cannot be had': "\n  bad: {image: '127.0.0.1:1/none'}\n",
    'device that is not there': '\n  bad: {image: busybox, devices: [/dev/none-such]}\n',
    'program that is not there': '\n  bad: {image: busybox, command: /no/such/program}\n',
    'build that fails': '\n  bad: {build: {context: ., network: none}}\n',
    'unhealthy dependency': SICK,
    'dependency that dies': DIES,
    'dependency of before that is unhealthy now': """
  web: {image: busybox, depends_on: {well: {condition: service_healthy}}}
""",
}


def insert_services(text, more):
    """Add services to a Compose file, above its volumes."""
    return text.replace('\nvolumes:', more + 'volumes:', 1)


@pytest.fixture(scope='module')
def running(engine, tmp_path_factory):
    """A stack that runs without a watchdog, one of its services stopped."""
    project = Project(tmp_path_factory.mktemp('stack'), COMPOSE['Compose 2']).write(RAN_BEFORE)
    (project.folder / 'Dockerfile').write_text('FROM busybox\nRUN echo no such package; false\n')
    yield project
    project.remove()


def bring_up_before(project):
    """Bring up what is there before the start that fails; return it, and all that belongs to it."""
    project.write(RAN_BEFORE).compose('up', '-d', '--remove-orphans')
    project.compose('stop', 'side')
    project.docker('exec', *project.ids('well'), 'rm', '-f', '/dev/shm/sick')
    well = project.ids('well')[0]
    form = '{{.State.Health.Status}}'
    assert eventually(lambda: project.docker('inspect', '--format', form, well) == 'healthy\n')
    return project.look(), list_belongings(project)


def fail_to_start(project):
    """Run the watchdog, whose start has to fail; return what it wrote."""
    result = run_on(project, 'run')
    assert (result.returncode, 'the stack is up' in result.stderr) == (1, False), result
    assert 'Traceback' not in result.stderr and result.stderr.splitlines()[-1].startswith(
        'broapt_compose: '
    ), result.stderr
    return result.stderr


def states(containers):
    """Return containers; without start times if stopped: the failed start may have tried them."""
    return {ident: (c[0], c[1], c[1] == 'running' and c[2]) for ident, c in containers.items()}


@needs_docker
@pytest.mark.parametrize('failure', list(FAILURES))
def test_failed_start_undoes_what_it_made_and_nothing_that_was_there_before(running, failure):
    project = running
    before, belongings = bring_up_before(project)
    if failure.startswith('dependency of before'):
        sicken(project)
        assert eventually(lambda: 'unhealthy' in project.docker('ps', project.filter))
    project.write(insert_services(RAN_BEFORE, FAILURES[failure]))
    told = fail_to_start(project)
    assert states(project.look()) == states(before), told
    assert list_belongings(project) == belongings, told
    assert ('the database is locked' in told) == (failure == 'unhealthy dependency')
    assert 'no such table' in told or failure != 'dependency that dies'


@needs_docker
def test_failed_start_leaves_running_what_ran_before_although_compose_has_replaced_it(project_2):
    text = PAIR.replace('side: {', 'side: {depends_on: [core], environment: {A: "1"}, ')
    project = project_2.write(text)
    project.compose('up', '-d')
    bad = text.replace('command: sleep 10000', 'command: /no/such/program', 1)
    project.write(bad.replace('A: "1"', 'A: "2"'))
    told = fail_to_start(project)
    shown = sorted(container[:2] for container in project.look().values())
    assert shown == [('core', 'created'), ('side', 'running')], told
    assert '; core does not run any more' in told and 'could not be removed' not in told


@needs_docker
def test_signal_in_the_middle_of_a_start_brings_back_what_compose_was_replacing(project_2):
    project = project_2.write(SLOW_TO_STOP)
    project.compose('up', '-d')
    before = set(project.ids())
    project.write(SLOW_TO_STOP.replace('sleep 10000', 'sleep 10001'))
    with Host([sys.executable, str(MODULE), *project.options()], project.folder / 'log') as host:
        assert eventually(lambda: set(project.ids()) - before), host.log()  # it stops the old one
        host.process.terminate()
        assert host.process.wait(60) == 0, host.log()
    assert set(project.ids()) <= before, host.log()


@needs_docker
def test_signal_in_the_middle_of_a_start_leaves_what_was_there_before(running):
    project = running
    before, belongings = bring_up_before(project)
    project.write(
        insert_services(
            RAN_BEFORE, '\n  bad: {build: {context: ., dockerfile: Slow, network: none}}\n'
        )
    )
    (project.folder / 'Slow').write_text('FROM busybox\nRUN sleep 10000\n')
    with Host([sys.executable, str(MODULE), *project.options()], project.folder / 'log') as host:
        assert eventually(
            lambda: any(' up ' in command_line(pid) for pid in descendants(host.process.pid))
        )
        assert not threading.Event().wait(1)
        host.process.terminate()
        assert host.process.wait(60) == 0, host.log()
    assert states(project.look()) == states(before) and list_belongings(project) == belongings, (
        host.log()
    )


@needs_docker
def test_failed_start_undoes_nothing_that_was_there_before_with_compose_1_29_either(
    engine, tmp_path
):
    project = Project(tmp_path, COMPOSE['Compose 1.29'])
    try:
        before, belongings = bring_up_before(project)
        project.write(insert_services(RAN_BEFORE, SICK))
        told = fail_to_start(project)
        assert states(project.look()) == states(before), told
        assert list_belongings(project) == belongings and 'the database is locked' in told, told
    finally:
        project.remove()


@pytest.fixture
def namesake(project, tmp_path_factory):
    """A stack of another folder with the same project name, as all folders named docker have it."""
    other = Project(tmp_path_factory.mktemp('other'), project.compose_command)
    other.name, other.filter = project.name, project.filter
    return other.write(STORE.replace('side', 'other'))


@needs_docker
@pytest.mark.parametrize('failure', ['image that cannot be had', 'program that is not there'])
def test_failed_start_leaves_another_folders_stack_of_the_same_name_alone(
    project, namesake, failure
):
    if failure == 'program that is not there':  # Compose itself replaces what has the same name
        namesake.write(namesake.file.read_text().replace('core', 'theirs'))
    namesake.compose('up', '-d')
    before, belongings = namesake.look(), list_belongings(namesake)
    told = fail_to_start(project.write(PAIR + FAILURES[failure]))
    assert project.look() == before, told
    assert list_belongings(namesake) == belongings, told


@needs_docker
@pytest.mark.parametrize('project', ['Compose 2'], indirect=True)
def test_end_of_one_of_two_stacks_with_the_same_project_name_leaves_the_other_its_network(
    project, namesake
):
    namesake.write(namesake.file.read_text().replace('core', 'theirs')).compose('up', '-d')
    before, belongings = namesake.look(), list_belongings(namesake)
    with Host(
        [sys.executable, str(MODULE), *project.write(PAIR).options()], project.folder / 'log'
    ) as host:
        assert host.says('the stack is up', seconds=60), host.log()
        assert len(project.ids('core', 'side')) == 2
        host.process.terminate()
        assert host.process.wait(60) == 0, host.log()
    assert (namesake.look(), list_belongings(namesake)) == (before, belongings), host.log()
    assert complaints(host) == [], host.log()
    with namesake.watchdog():
        assert namesake.look() == before
    assert project.docker('network', 'ls', '-q', project.filter) == ''


FAIL_ONCE = """
if [ "$1" = compose ] && ! [ -e $here/failed ]; then
    touch $here/failed
    echo plugin: cannot allocate memory >&2
    exit 1
fi
exec $real "$@"
"""


@needs_docker
def test_compose_that_fails_once_is_not_replaced_by_the_one_of_another_generation(project_2):
    project = project_2.write(PAIR)
    project.compose('up', '-d')
    before = project.look()
    folder = put_on_path(project, 'docker', FAIL_ONCE)
    put_on_path(project, 'docker-compose', 'touch $here/taken; exec $real "$@"')
    project.environment['COMPOSE_PROJECT_NAME'] = project.name
    with Host(
        [sys.executable, str(MODULE), '--file', str(project.file), '--settle', '0'],
        project.folder / 'log',
        env=project.environment,
    ) as host:
        assert eventually(
            lambda: host.process.poll() is not None or 'the stack is up' in host.log(), 60
        )
        assert (folder / 'failed').exists() and not (folder / 'taken').exists(), host.log()
        assert project.look() == before and host.process.poll() in (None, 1), host.log()


# -- on a real engine: copies made by docker commit ------------------------------------------------


@contextlib.contextmanager
def copied(project, service):
    """Run a container from an image that was committed from a service's container; give its id."""
    image = project.name + '-snapshot'
    project.docker('commit', '--pause=false', *project.ids(service), image)
    try:
        ident = project.docker(
            'run', '-d', '--network', 'none', '--name', project.name + '-mine', image
        ).strip()
        yield ident, image
    finally:
        project.docker('rm', '-f', project.name + '-mine', code=None)
        project.docker('rmi', '-f', image, code=None)


def runs_beside(project, copy, service='core'):
    """Whether the service has a container that runs, other than the copy."""
    others = [c[:2] for ident, c in project.look().items() if ident != copy and c[0] == service]
    return others == [(service, 'running')]


@contextlib.contextmanager
def watchdog_beside(project, copy):
    """Run the watchdog, at whose end nothing but the copy may be left, as it was."""
    with Host([sys.executable, str(MODULE), *project.options()], project.folder / 'log') as host:
        assert host.says('the stack is up', seconds=60), host.log()
        yield host
        before = project.look()[copy]
        host.process.terminate()
        assert host.process.wait(60) == 0, host.log()
        assert project.look() == {copy: before}, host.log()


@needs_docker
def test_copy_made_by_commit_is_never_touched_and_its_original_is_repaired(project):
    with project.write(PAIR).watchdog() as host, copied(project, 'core') as (copy, _):
        original, mine = project.ids('core')[0], project.look()[copy]
        project.docker('kill', original)
        assert eventually(lambda: runs_beside(project, copy)), (project.look(), host.log())
        assert project.look()[copy] == mine and original in project.look()
        project.docker('kill', copy)
        stopped = project.look()[copy]
        see_it_repaired_beside(project, host)
        assert project.look()[copy] == stopped, host.log()


def see_it_repaired_beside(project, host):
    """See that the watchdog has looked since: by another repair."""
    count = host.log().count('side: paused -> unpaused')
    project.docker('pause', *project.ids('side'))
    assert host.says('side: paused -> unpaused', count + 1), host.log()


@needs_docker
def test_service_whose_image_was_committed_under_its_own_name_has_one_container(project):
    image = project.name + '-fixed'
    project.docker('tag', 'busybox', image)
    try:
        project.write(PAIR.replace('busybox', image, 1))
        with project.watchdog() as host:
            project.docker('commit', '--pause=false', *project.ids('core'), image)
            for _ in range(2):
                project.docker('rm', '-f', *project.ids('core'))
                assert eventually(lambda: project.is_well(PAIRED)), (project.look(), host.log())
            see_it_repaired_beside(project, host)
            assert project.is_well(PAIRED), (project.look(), host.log())
    finally:
        project.docker('rmi', '-f', image, code=None)


@needs_docker
def test_container_with_only_some_of_composes_labels_is_never_touched(project_2):
    project = project_2.write(PAIR.replace('image: busybox', 'build: .', 1))
    (project.folder / 'Dockerfile').write_text('FROM busybox\n')
    label, name = project.filter.partition('label=')[2], project.name
    try:
        with project.watchdog() as host:
            for extra, image in [('--label=' + label, 'busybox'), ('--rm=false', name + '-core')]:
                project.docker('run', '-d', extra, '--name', name + '-mine', image, 'true')
                count = host.log().count('core: missing -> created')
                project.docker('rm', '-f', name + '-core-1')
                assert host.says('core: missing -> created', count + 1), host.log()
                project.docker('kill', name + '-side-1')
                assert host.says('side: exited (137) -> started', count + 1), host.log()
                form = '{{.State.Status}} {{.RestartCount}} {{.State.ExitCode}}'
                mine = project.docker('inspect', '--format', form, name + '-mine')
                assert mine == 'exited 0 0\n', host.log()
                project.docker('rm', name + '-mine')
    finally:
        project.docker('rm', '-f', name + '-mine', code=None)
        project.docker('rmi', '-f', name + '-core', code=None)


# Not with 1.29 while it runs: its own `up` deletes the newer of two containers with one number.
MOMENTS = [('Compose 1.29', 'before'), ('Compose 2', 'before'), ('Compose 2', 'while it runs')]


@needs_docker
@pytest.mark.parametrize('project, moment', MOMENTS, indirect=['project'])
def test_original_that_was_removed_is_made_anew_beside_its_copy(project, moment):
    project.write(PAIR).compose('up', '-d')
    original = project.ids('core')[0]
    with copied(project, 'core') as (copy, _):
        before = project.look()
        mine = before[copy]
        if moment == 'before':
            project.docker('rm', '-f', original)
        with watchdog_beside(project, copy) as host:
            if moment == 'while it runs':
                assert project.look() == before, host.log()
                project.docker('rm', '-f', original)
            assert eventually(lambda: runs_beside(project, copy)), (project.look(), host.log())
            assert run_on(project, 'status').returncode == 0
            assert project.look()[copy] == mine and 'crash loop' not in host.log()


@needs_docker
def test_service_that_uses_a_committed_image_is_watched_like_any_other(project):
    project.write(PAIR).compose('up', '-d')
    with copied(project, 'core') as (copy, image):
        project.docker('rm', '-f', copy)
        project.compose('down')
        project.write(PAIR.replace('image: busybox', 'image: ' + image, 1))
        with project.watchdog() as watchdog:
            before = project.ids()
            project.docker('kill', *project.ids('core'))
            assert eventually(lambda: project.is_well(('core', 'side'))), (
                project.look(),
                watchdog.log(),
            )
            assert project.ids() == before


# -- on a real engine: what a container was made for is gone ---------------------------------------

SHARERS = """
services:
  core: &plain
    image: busybox
    command: sleep 10000
    stop_signal: SIGKILL
    container_name: NAME-core
    volumes: [/data]
    ipc: shareable
  side:
    image: busybox
    command: sleep 10000
    stop_signal: SIGKILL
    networks: [default, outer]
  far: &sharer
    image: busybox
    command: sleep 10000
    stop_signal: SIGKILL
    network_mode: 'service:core'
  near:
    <<: *sharer
    network_mode: 'container:NAME-core'
    depends_on: [core]
  kin:
    <<: *sharer
    network_mode: none
    pid: 'service:core'
  ipc:
    <<: *sharer
    network_mode: none
    ipc: 'service:core'
networks:
  outer: {external: true, name: NAME-outer}
"""


WITH_NETWORK = ('core', 'far', 'near', 'side')


class Sharing:
    """A stack whose containers share networks and namespaces, some of which somebody takes away."""

    def __init__(self, project):
        text, self.services = SHARERS, ['core', 'far', 'ipc', 'kin', 'near', 'side']
        if (
            project.compose_command == COMPOSE['Compose 1.29']
        ):  # it wants that container to be there before
            text = re.sub('  near:.*?(?=  kin:)', '', text, flags=re.DOTALL)
            self.services.remove('near')
        self.project = project.write(text.replace('NAME', project.name))
        self.outer = project.name + '-outer'
        self.nets = [self.outer, project.name + '_default']

    def __enter__(self):
        self.project.docker('network', 'create', self.outer)
        return self

    def __exit__(self, *_):
        self.project.remove()
        self.project.docker('network', 'rm', self.outer, code=None)

    def mark(self):
        """Write something into the anonymous volume."""
        self.project.docker('exec', *self.project.ids('core'), 'touch', '/data/mark')

    def lose_networks(self, anew):
        """Remove the networks of a stopped stack; the external one is always made anew."""
        p = self.project
        p.docker('network', 'rm', *self.nets)
        p.docker('network', 'create', self.outer)
        labels = [
            '--label=com.docker.compose.' + pair
            for pair in ('project=' + p.name, 'network=default')
        ]
        if anew:
            p.docker('network', 'create', *labels, self.nets[1])

    def is_well(self):
        """Whether all run, in networks and namespaces that are alive."""
        p = self.project
        if not p.is_well(self.services):
            return False
        nets = {
            name: self.ask(name, 'cat', '/proc/net/dev')
            for name in self.services
            if name in WITH_NETWORK
        }
        return all('eth0' in text for text in nets.values()) and 'eth1' in nets['side']

    def ask(self, service, *command):
        return self.project.docker('exec', *self.project.ids(service), *command, code=None)

    def shares(self, kind, *services):
        """Whether these services are in the same namespace of this kind as core."""
        links = [
            self.ask(name, 'readlink', '/proc/self/ns/' + kind) for name in (*services, 'core')
        ]
        return all(links) and len(set(links)) == 1

    def share_network(self):
        return self.shares('net', *{'far', 'near'}.intersection(self.services))


@pytest.fixture
def sharing(request, engine, tmp_path):
    """Such a stack, of Compose 2 unless a parameter says otherwise."""
    compose = getattr(request, 'param', 'Compose 2')
    with Sharing(Project(tmp_path, COMPOSE[compose])) as sharing:
        yield sharing


BEFORE_START = [('Compose 1.29', 'removed'), ('Compose 2', 'removed'), ('Compose 2', 'made anew')]


@needs_docker
@pytest.mark.parametrize('sharing, how', BEFORE_START, indirect=['sharing'])
def test_watchdog_heals_a_stack_that_lost_its_networks_before_the_start(sharing, how):
    project = sharing.project
    project.compose('up', '-d')
    sharing.mark()
    project.compose('stop')
    sharing.lose_networks(anew=how == 'made anew')
    with project.watchdog() as watchdog:
        assert eventually(sharing.is_well, 30), (project.look(), watchdog.log())
        assert sharing.ask('core', 'ls', '/data') == 'mark\n', (
            'the only container of a service keeps its anonymous volumes'
        )


@needs_docker
def test_watchdog_heals_a_stack_that_loses_its_networks_while_it_runs(sharing):
    project = sharing.project
    with project.watchdog('--settle', '3') as watchdog:
        sharing.mark()
        project.docker('kill', *project.ids())
        sharing.lose_networks(anew=False)
        assert eventually(sharing.is_well, 60), (project.look(), watchdog.log())
        assert sharing.ask('core', 'ls', '/data') == 'mark\n'


SHARED_DEEDS = [('Compose 1.29', 'rm'), ('Compose 2', 'restart'), ('Compose 2', 'rm')]


@needs_docker
@pytest.mark.parametrize('sharing, deed', SHARED_DEEDS, indirect=['sharing'])
def test_those_that_share_with_a_container_follow_it_when_it_is_started_or_made_anew(sharing, deed):
    project = sharing.project
    with project.watchdog() as watchdog:
        assert sharing.is_well() and sharing.share_network()
        side = project.look()[project.ids('side')[0]]
        options = ['-t', '0'] if deed == 'restart' else ['-f']
        project.docker(deed, *options, *project.ids('core'))
        assert eventually(lambda: sharing.is_well() and sharing.share_network(), 40), (
            project.look(),
            watchdog.log(),
        )
        project.docker(
            'kill', *project.ids('ipc')
        )  # what shares only memory goes on; but it can't start in what is gone
        assert eventually(lambda: sharing.is_well() and sharing.shares('ipc', 'ipc'), 40), (
            project.look(),
            watchdog.log(),
        )
        assert sharing.shares('pid', 'kin')
        assert project.look()[project.ids('side')[0]] == side


@needs_docker
def test_watchdog_that_starts_on_a_stack_in_dead_namespaces_heals_it(sharing):
    project = sharing.project
    project.compose('up', '-d')
    project.docker('restart', '-t', '0', *project.ids('core'))
    assert not sharing.is_well()
    with project.watchdog() as watchdog:
        assert eventually(sharing.is_well, 30), (project.look(), watchdog.log())
        assert sharing.share_network()


@needs_docker
def test_port_that_is_busy_costs_no_container(project_2):
    project = project_2
    port = free_port()
    project.write(PAIR.replace('image', "ports: ['127.0.0.1:{}:80'], image".format(port), 1))
    with project.watchdog('--settle', '2') as watchdog:
        ident, core = project.ids('core')[0], project.look()[project.ids('core')[0]]
        project.docker('exec', ident, 'touch', '/mark')
        project.docker('kill', ident)
        with contextlib.closing(socket.socket()) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(('127.0.0.1', port))
            sock.listen(1)
            assert watchdog.says('in use') or watchdog.says('allocated', seconds=1), watchdog.log()
            assert project.ids('core') == [ident]
        assert eventually(lambda: project.look()[ident][1] == 'running', 30), watchdog.log()
        assert (
            project.look()[ident] != core
            and project.docker('exec', ident, 'ls', '/mark') == '/mark\n'
        )


@needs_docker
def test_compose_1_29_makes_containers_anew_on_an_engine_with_a_newer_api(newest, tmp_path):
    project = Project(tmp_path, COMPOSE['Compose 1.29'], newest.environment)
    try:
        text = PAIR.replace('image', "network_mode: 'service:core', image").replace(
            "network_mode: 'service:core', ", '', 1
        )
        with project.write(text).watchdog() as watchdog:
            before = set(project.ids())
            project.docker('rm', '-f', *project.ids('core'))
            assert eventually(lambda: not before & set(project.ids()), 40), watchdog.log()
            assert eventually(lambda: project.is_well(('core', 'side'))), watchdog.log()
    finally:
        project.remove()


# -- on a real engine: services without containers, crash loops, replicas --------------------------

PROVIDER = """
#!/bin/sh
echo "$@" >>{folder}/calls
printf '{{"type": "info", "message": "at your service"}}\\n'
"""


def find_newest_compose():
    """Return an environment for `docker compose` that knows provider services, or skip."""
    homes = sorted(ENGINES.glob('*/cli-plugins'))  # what `.ci/engine --all` has fetched
    environment = (
        dict(os.environ, DOCKER_CONFIG=str(homes[-1].parent)) if homes else dict(os.environ)
    )
    version = call('docker', 'compose', 'version', '--short', env=environment)
    if tuple(map(int, re.findall(r'\d+', version)[:2])) < (2, 36):
        pytest.skip('optional: Compose {} has no provider services'.format(version.strip()))
    return environment


@needs_docker
def test_service_of_a_provider_is_never_missing_and_its_provider_hears_of_the_end(project_2):
    project = project_2
    project.environment = find_newest_compose()
    folder = put_on_path(project, 'provide-test', '')
    (folder / 'provide-test').write_text(PROVIDER.lstrip().format(folder=folder))
    provided = '  cloud: {{provider: {{type: {}, options: {{size: 1}}}}}}\n'.format(
        folder / 'provide-test'
    )
    calls = folder / 'calls'
    with project.write(PAIR + provided).watchdog('--interval', '0.5') as watchdog:
        begun = calls.read_text()
        assert begun.count(' up ') == 1, begun
        project.docker('rm', '-f', *project.ids('side'))
        assert eventually(lambda: project.is_well(('core', 'side'))), (
            project.look(),
            watchdog.log(),
        )
        assert not threading.Event().wait(2)
        result = run_on(project, 'status')
        assert result.returncode == 0, result
        result = run_on(project, 'check')
        assert result.returncode == 0 and 'cloud' not in result.stderr, result
        assert calls.read_text() == begun and 'cloud: missing' not in watchdog.log(), watchdog.log()
    assert calls.read_text()[len(begun) :].count(' down ') == 1
    assert complaints(watchdog) == [], watchdog.log()


TROUBLE = """
services:
  core: {image: busybox, command: sleep 10000, stop_signal: SIGKILL}
  loop: {image: busybox, command: sh -c 'exit 7'}
  slow:
    image: busybox
    command: sleep 10000
    stop_signal: SIGKILL
    healthcheck: {test: 'false', interval: 5.5s, retries: 2, start_period: 0s}
  pair:
    image: busybox
    command: sh -c 'while ! test -e /here/bad-$$HOSTNAME; do sleep 0.1; done; exit 7'
    stop_signal: SIGKILL
    scale: 3
    volumes: ['.:/here']
"""


@pytest.fixture(scope='module')
def troubled(engine, tmp_path_factory):
    """A stack with one container in a crash loop, one never well, and one bad replica of three."""
    project = Project(tmp_path_factory.mktemp('stack'), COMPOSE['Compose 2']).write(TROUBLE)
    try:
        with project.watchdog('--interval', '3600') as host:
            bad = project.ids('pair')[0]
            (project.folder / ('bad-' + bad[:12])).touch()
            yield project, host, bad
    finally:
        project.remove()


@needs_docker
def test_replica_in_a_crash_loop_neither_holds_up_nor_touches_its_siblings(troubled):
    project, host, bad = troubled
    crashes = r'pair[-\d]*: crash loop, exited \(7\) .*; next try in 4 s'
    assert eventually(lambda: re.search(crashes, host.log()), 30), host.log()
    _, second, third = project.ids('pair')
    before = project.look()
    project.docker('kill', second)
    assert eventually(lambda: project.look()[second][1] == 'running', 3), host.log()
    project.docker('rm', '-f', second)
    assert eventually(lambda: len(project.ids('pair')) == 3, 5), host.log()
    after = project.look()
    assert after[third] == before[third] and bad in after, host.log()


@needs_docker
def test_removing_a_container_in_a_crash_loop_by_hand_starts_the_count_anew(troubled):
    project, host, _ = troubled
    assert eventually(lambda: re.search('loop: crash loop, .*; next try in 8 s', host.log()), 60), (
        host.log()
    )
    old = project.ids('loop')
    project.docker('rm', '-f', *old)
    assert eventually(lambda: project.ids('loop') not in ([], old), 4), host.log()
    assert host.says('loop: missing -> created (') and 'crash loop, missing' not in host.log()


@needs_docker
def test_replica_that_cannot_start_again_is_replaced_without_touching_one_that_somebody_added(
    project_2,
):
    project = project_2.write(PAIR.replace('image', 'scale: 2, image', 1))
    extra = project.name + '-extra'
    project.docker('network', 'create', extra)
    try:
        with project.watchdog('--settle', '2') as watchdog:
            project.compose('up', '-d', '--no-recreate', '--scale', 'core=3')
            first, *others = project.ids('core')
            before = project.look()
            project.docker('network', 'connect', extra, first)
            project.docker('kill', first)
            project.docker('network', 'rm', extra)
            names = ['core', 'core', 'core', 'side']
            assert eventually(lambda: project.is_well(names[1:]) or project.is_well(names), 40), (
                watchdog.log()
            )
            after = project.look()
            assert all(after.get(ident) == before[ident] for ident in others), (
                before,
                after,
                watchdog.log(),
            )
    finally:
        project.docker('network', 'rm', extra, code=None)


@needs_docker
def test_replica_whose_restart_takes_long_does_not_hold_up_its_siblings(project_2):
    stubborn = 'trap "echo not yet" TERM; while ! test -e /here/over; do sleep 0.1; done'
    project = project_2.write(
        """
services:
  core:
    image: busybox
    command: [sh, -c, '{}']
    stop_grace_period: 8s
    scale: 2
    volumes: ['.:/here']
    healthcheck: {{test: test ! -e /dev/shm/sick, interval: 0.3s, retries: 1, start_period: 0s}}
""".format(stubborn)
    )
    with project.watchdog() as watchdog:
        sick, other = project.ids('core')
        before = project.look()[sick]
        project.docker('exec', sick, 'touch', '/dev/shm/sick')
        assert eventually(lambda: 'not yet' in project.docker('logs', sick)), watchdog.log()
        project.docker('kill', other)
        assert eventually(lambda: project.look()[other][1] == 'running', 6), watchdog.log()
        assert project.look()[sick] == before, 'its grace period is not over'
        (project.folder / 'over').touch()


# -- on a real engine: what the Compose file says --------------------------------------------------


@needs_docker
def test_what_is_not_required_is_not_waited_for(project_2):
    project = project_2.write("""
services:
  never:
    image: busybox
    command: sleep 10000
    stop_signal: SIGKILL
    healthcheck: {test: 'false', interval: 0.2s, retries: 1}
  init: {image: busybox, command: 'false'}
  core:
    image: busybox
    command: sleep 10000
    stop_signal: SIGKILL
    depends_on:
      never: {condition: service_healthy, required: false}
      init: {condition: service_completed_successfully, required: false}
""")
    with project.watchdog('--unhealthy', 'ignore') as watchdog:
        old = project.ids('core')
        project.docker('rm', '-f', *old)
        running = [('core', 'running')]
        assert eventually(
            lambda: [c[:2] for c in project.look().values() if c[0] == 'core'] == running
        ), watchdog.log()
        assert project.ids('core') != old


@needs_docker
@pytest.mark.parametrize(
    'compose, way',
    [('Compose 1.29', 'variable'), ('Compose 1.29', 'option'), ('Compose 2', 'option')],
)
def test_service_of_an_enabled_profile_is_created_again_and_shown(project_2, compose, way):
    project = project_2
    project.compose_command = COMPOSE[compose]
    project.write(
        PAIR.replace('image', 'profiles: [extra, more], image', 1)
        + '  idle: {image: busybox, profiles: [idle]}\n'
    )
    project.file.write_text("version: '3.9'\n" + project.file.read_text())
    if way == 'variable':
        project.environment = dict(os.environ, COMPOSE_PROFILES='extra,else')
    else:
        project.compose_command = (*project.compose_command, '--profile', 'extra')
    with project.watchdog() as watchdog:
        assert project.is_well(('core', 'side')), watchdog.log()
        old = project.ids('core')
        project.docker('rm', '-f', *old)
        assert eventually(lambda: project.ids('core') not in ([], old)), watchdog.log()
    result = run_on(project, 'status', '--json')
    rows = {row['service']: row['fault'] for row in json.loads(result.stdout)['containers']}
    assert (result.returncode, rows) == (1, {'core': True, 'side': True}), result


KEYS = r"""
version: '3.9'
x-common:
  services: {core: {scale: 0}}
services:
  core:
    image: busybox
    command: ['sh', '-c', "sleep 10000\nscale: 0\n", "\n    scale: 0\n"]
    stop_signal: SIGKILL
    labels:
      a/b: |
        x
          broapt.watch: "false"
      c d: "one\n  broapt.watch: 'false'\n\nbroapt.watch: false\n\n    scale: 0\n"
      e/f: 'lorem ipsum dolor sit amet consectetur adipiscing elit sed do eiusmod tempor

        broapt.watch: false

        scale: 0'
      broapt/watch: 'false'
  side:
    image: busybox
    command: sleep 10000
    stop_signal: SIGKILL
    environment:
      ODD KEY: "x\n\n  scale: 0\n      scale: 0\n    profiles:\n"
      scale: '0'
      broapt.watch: 'false'
      depends_on: core
    healthcheck:
      test: "true || echo '\n    scale: 0\n    network_mode: service:core\n'"
  two:
    image: busybox
    command: sleep 10000
    stop_signal: SIGKILL
    scale: 2
    labels: ["g h=\n      broapt.watch: false", "i/j=network_mode: service:core"]
networks:
  default: {labels: {"k/l": "\n  services:\n    nobody:\n      image: x\n"}}
"""


@needs_docker
def test_text_that_looks_like_a_key_is_only_text(project):
    project.write(KEYS)
    services = ('core', 'side', 'two', 'two')
    with project.watchdog() as watchdog:
        assert project.is_well(services), (project.look(), watchdog.log())
        result = run_on(project, 'status', '--json')
        rows = json.loads(result.stdout)['containers']
        assert result.returncode == 0 and [row['service'] for row in rows] == list(services), result
        assert all(row['watched'] for row in rows)
        one, two = project.ids('two')
        project.docker('kill', one, *project.ids('core'))
        project.docker('rm', '-f', two, *project.ids('side'))
        assert eventually(lambda: project.is_well(services)), (project.look(), watchdog.log())


@needs_docker
def test_label_that_switches_the_watching_off_may_be_an_entry_of_a_list(project_2):
    labels = "labels: ['broapt.watch=FALSE']"
    project = project_2.write(PAIR.replace('image', labels + ', image', 1))
    with project.watchdog() as watchdog:
        project.docker('kill', *project.ids())
        assert watchdog.says('side: exited (137) -> started'), watchdog.log()
        see = sorted(c[:2] for c in project.look().values())
        assert see == [('core', 'exited'), ('side', 'running')]


# Here, as it takes half a minute, which the tests above have given it.
@needs_docker
def test_restarts_of_a_container_that_is_never_healthy_become_a_crash_loop(troubled):
    _, host, _ = troubled
    assert host.says('slow: crash loop, unhealthy ', seconds=90), host.log()


# -- on a real engine: a folder that is gone, and reasons ------------------------------------------

LEAVE = ('sh', '-c', 'cd "$0" && rmdir "$0" && exec "$@"')


@needs_docker
def test_working_directory_that_was_deleted_before_the_start_is_no_matter(project_2, tmp_path):
    project = project_2
    gone = tmp_path / 'gone'
    gone.mkdir()
    with project.write(PAIR).watchdog(
        start=(*LEAVE, str(gone), sys.executable, str(MODULE), 'run')
    ) as watchdog:
        project.docker('kill', *project.ids('core'))
        project.docker('rm', '-f', *project.ids('side'))
        assert eventually(lambda: project.is_well(('core', 'side'))), (
            project.look(),
            watchdog.log(),
        )
        for command in ('status', 'check'):
            gone.mkdir()
            call(*LEAVE, str(gone), sys.executable, str(MODULE), command, *project.options())
    gone.mkdir()
    command = (
        *LEAVE,
        str(gone),
        sys.executable,
        str(MODULE),
        'run',
    )  # no file, and nowhere to look for one
    result = subprocess.run(command, stderr=subprocess.PIPE, universal_newlines=True, timeout=60)
    assert result.returncode in (1, 2) and len(result.stderr.splitlines()) == 1, result


@needs_docker
def test_reason_of_a_failed_start_is_the_last_thing_that_compose_said(project_2):
    project = project_2.write('services:' + SICK.replace('sick', 'error'))
    told = fail_to_start(project)
    name = project.name + '-error-1'
    assert told.endswith('dependency failed to start: container {} is unhealthy\n'.format(name)), (
        told
    )
    assert told.splitlines()[-1].count(' Error') == 0 and project.ids() == []


NOWHERE = 'http://127.0.0.1:9'  # nothing listens there
PLAIN = ('core', 'side')


def run_command_on(project, command, *options, **environment):
    """Return exit code and output of one of the watchdog's commands on this project."""
    environment = dict(project.environment or os.environ, **environment)
    compose = ' '.join([*project.compose_command, '-p', project.name])
    arguments = [sys.executable, str(MODULE), command, '--file', str(project.file)]
    arguments += ['--compose-command', compose, *options]
    pipes = {'stdin': subprocess.DEVNULL, 'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT}
    result = subprocess.run(arguments, env=environment, timeout=120, **pipes)
    return result.returncode, result.stdout.decode('utf-8', 'replace')


def is_refilled(project, gone):
    """Whether all runs, and none of these containers is there any more."""
    return project.is_well(PLAIN) and not set(gone) & set(project.ids())


# -- the way to the engine -------------------------------------------------------------------------


@needs_docker
def test_proxy_in_the_environment_is_not_asked_for_the_engines_socket(project_2):
    """moby/moby#12298, docker-java#396."""
    names = ('HTTP_PROXY', 'HTTPS_PROXY', 'ALL_PROXY', 'http_proxy', 'https_proxy', 'all_proxy')
    project_2.environment = dict(os.environ, **dict.fromkeys(names, NOWHERE))
    see_repairs(project_2)


@needs_docker
def test_engine_at_an_ipv6_address_is_watched_like_any_other(engine, tmp_path):
    """docker/docker-py#1135, docker/compose#2879."""
    if not os.path.exists('/proc/net/if_inet6'):
        pytest.skip('this machine has no IPv6')
    host = 'tcp://[::1]:{}'.format(free_port())
    with Engine(['--host=' + host, '--tls=false']):
        see_repairs(Project(tmp_path, COMPOSE['Compose 2'], dict(os.environ, DOCKER_HOST=host)))


class StreamRelay:
    """A socket before the engine's; it can keep event streams open, and silent."""

    def __init__(self, path, target='/var/run/docker.sock'):
        self.path, self.target = str(path), target
        self.streams = []  # an event for each stream of events: set, it carries nothing any more
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen(50)

    def __enter__(self):
        self.begin(self.accept)
        return self

    def __exit__(self, *_):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def begin(self, function, *arguments):
        threading.Thread(target=function, args=arguments, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                ours, theirs, silent = (
                    self.listener.accept()[0],
                    socket.socket(socket.AF_UNIX),
                    threading.Event(),
                )
                theirs.connect(self.target)
                self.begin(self.carry, ours, theirs, silent, True)
                self.begin(self.carry, theirs, ours, silent, False)

    def carry(self, source, target, silent, is_request):
        with contextlib.suppress(OSError):
            for chunk in iter(lambda: source.recv(1 << 16), b''):
                if is_request and b'/events?' in chunk:
                    self.streams.append(silent)
                if not silent.is_set():
                    target.sendall(chunk)
            target.shutdown(socket.SHUT_WR)

    def silence(self):
        for silent in self.streams:
            silent.set()


@needs_docker
def test_event_stream_that_is_open_but_dead_is_replaced_when_a_look_finds_what_it_has_missed(
    project_2,
):
    """kontena/kontena#867, docker/for-win#3337."""
    project, folder = project_2.write(PAIR), tempfile.mkdtemp(prefix='bt')
    try:
        with StreamRelay(os.path.join(folder, 'socket')) as relay:
            project.environment = dict(os.environ, DOCKER_HOST='unix://' + relay.path)
            with project.watchdog('--interval', '2') as watchdog:
                assert eventually(lambda: relay.streams)
                relay.silence()
                streams = len(relay.streams)
                project.docker('kill', *project.ids('core'))
                assert eventually(lambda: project.is_well(PLAIN)), watchdog.log()
                assert eventually(lambda: len(relay.streams) > streams), watchdog.log()
            assert len(relay.streams) < 10
    finally:
        project.environment = None
        shutil.rmtree(folder)


FULL_HOST = """\
import logging, os, resource, sys, threading
import broapt_compose as bc
logging.basicConfig(format='%(levelname)s %(message)s', level=logging.INFO)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
file, compose = sys.argv[1:]
settings = bc.Settings.load(docker_compose=[file], compose_command=compose, settle=0, interval=1)
with bc.docker_compose(settings):
    print('up', flush=True)
    sys.stdin.readline()
    files, free = [], threading.Event()
    def fill():
        while not free.wait(0.002):
            try:
                files.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                pass
    filler = threading.Thread(target=fill)
    filler.start()
    print('full', flush=True)
    sys.stdin.readline()
    free.set()
    filler.join()
    for file in files:
        os.close(file)
    print('free', flush=True)
    sys.stdin.readline()
print('over', flush=True)
"""


@needs_docker
def test_host_that_has_no_file_descriptor_left_is_an_outage_that_ends_when_it_has(project_2):
    """moby/moby#37061: «dial unix: socket: too many open files», each second."""
    project = project_2.write(PAIR)
    command = [
        sys.executable,
        '-c',
        FULL_HOST,
        str(project.file),
        'docker compose -p ' + project.name,
    ]
    environment = dict(os.environ, PYTHONPATH=str(HERE))
    with Host(command, project.folder / 'log', stdin=subprocess.PIPE, env=environment) as host:

        def go_on():
            host.process.stdin.write(b'\n')
            host.process.stdin.flush()

        assert host.says('up\n', seconds=60)
        go_on()
        assert host.says('full\n')
        project.docker('kill', *project.ids('core'))
        assert host.says('Docker does not answer'), host.log()
        go_on()
        assert host.says('free\n')
        assert eventually(lambda: project.is_well(PLAIN)), host.log()
        go_on()
        assert host.process.wait(60) == 0, host.log()
        log = host.log()
        assert (
            log.count('WARNING Docker does not answer') == 1
            and 'Traceback' not in log
            and 'over\n' in log
        ), log
    assert project.ids() == []


# -- what the engine tells -------------------------------------------------------------------------


@needs_docker
def test_container_that_others_link_to_is_shown_by_its_own_name(engine, tmp_path):
    """kevana/ui-for-docker#132: the engine also lists its names in those that link to it."""
    text = PAIR.replace('SIGKILL}', 'SIGKILL, network_mode: bridge}')
    with (
        Engine()
    ) as second:  # links exist in an engine's default network only, which is its own there
        project = Project(tmp_path, COMPOSE['Compose 2'], second.environment)
        project.write(text[: text.rindex('}')] + ", links: ['core:aaa']}\n").compose('up', '-d')
        code, output = run_command_on(project, 'status', '--json')
        names = [container['container'] for container in json.loads(output)['containers']]
        assert (code, names) == (0, [project.name + '-core-1', project.name + '-side-1'])


@needs_docker
def test_container_renamed_by_hand_stays_its_services_own(project_2):
    """docker/compose#4789: labels count, not names."""
    with project_2.write(PAIR).watchdog() as watchdog:
        before, (core,) = project_2.ids(), project_2.ids('core')
        project_2.docker('rename', core, project_2.name + '-aside')
        project_2.docker('kill', core)
        assert eventually(lambda: project_2.is_well(PLAIN)), watchdog.log()
        assert project_2.ids() == before
        project_2.docker('rm', '-f', core)
        assert eventually(lambda: is_refilled(project_2, [core])), watchdog.log()
        name = project_2.docker('inspect', '--format', '{{.Name}}', *project_2.ids('core'))
        assert name == '/{}-core-1\n'.format(project_2.name)


@needs_docker
def test_label_of_half_a_megabyte_changes_nothing(project):
    """docker/for-linux#157, grafana/alloy#5602: readers with a limit on a line fail."""
    text = PAIR.replace('SIGKILL}', 'SIGKILL, labels: {big: %s}}' % ('x' * (1 << 19)), 1)
    with project.write(text).watchdog() as watchdog:
        project.docker('kill', *project.ids())
        assert eventually(lambda: project.is_well(PLAIN)), watchdog.log()[-3000:]
        gone = project.ids('core')
        project.docker('rm', '-f', *gone)
        assert eventually(lambda: is_refilled(project, gone)), watchdog.log()[-3000:]
        assert max(map(len, watchdog.log().splitlines())) < 1000


@needs_docker
@pytest.mark.parametrize('length', [129, 200])
def test_service_with_a_very_long_name_is_watched_like_any_other(project, length):
    """YAML printers write a key of more than 128 letters as «? name», «: image: ...»."""
    name = 'n' * length
    with project.write(PAIR.replace('core', name)).watchdog() as watchdog:
        project.docker('kill', *project.ids())
        assert eventually(lambda: project.is_well((name, 'side'))), watchdog.log()[-3000:]
        gone = project.ids(name)
        project.docker('rm', '-f', *gone)
        assert eventually(lambda: project.is_well((name, 'side')) and project.ids(name) != gone), (
            watchdog.log()[-3000:]
        )
        code, output = run_command_on(project, 'check', '--dry-run')
        assert code == 0 and 'would' not in output, output


@needs_docker
def test_health_checks_wake_nobody_while_they_pass(project_2):
    """node-red/node-red-docker#224: three events each (exec_create, exec_start, exec_die)."""
    check = "SIGKILL, healthcheck: {test: 'true', interval: 0.2s, retries: 1}}"
    project, folder = (
        project_2.write(PAIR.replace('SIGKILL}', check)),
        tempfile.mkdtemp(prefix='bt'),
    )
    project.environment = dict(os.environ, NOTIFY_SOCKET=folder + '/notify')
    command = [
        'docker',
        'events',
        '--filter',
        'event=exec_die',
        '--filter',
        'label=com.docker.compose.project=' + project.name,
    ]
    try:
        with service_manager(folder + '/notify') as read_until, project.watchdog(
            '--interval', '3600'
        ):
            read_until('2 of 2 running')
            with pytest.raises(socket.timeout):  # it looks some times more after the start
                for _ in range(20):
                    read_until('running', seconds=7)
            with subprocess.Popen(command, stdout=subprocess.PIPE) as events:
                for _ in range(10):
                    assert events.stdout.readline()
                events.terminate()
            with pytest.raises(socket.timeout):
                read_until('', seconds=0.1)
                read_until('running', seconds=0.1)
    finally:
        shutil.rmtree(folder)


@needs_docker
def test_container_whose_lock_is_stuck_in_the_engine_holds_up_no_other(engine, tmp_path):
    """docker/for-linux#891, moby/moby#18848: `inspect` of that one hangs, and a list may."""
    with Engine() as second:
        project = Project(tmp_path, COMPOSE['Compose 2'], second.environment).write(PAIR)
        with project.watchdog('--timeout', '5', '--interval', '2') as watchdog:
            core, form = project.ids('core'), '{{.State.Running}} {{.State.StartedAt}}'
            look_at_core = functools.partial(project.docker, 'inspect', '--format', form, *core)
            pid = project.docker(
                'inspect', '--format', '{{.State.Pid}}', *project.ids('side')
            ).strip()
            with open('/proc/{}/stat'.format(pid)) as file:
                shim = int(file.read().rpartition(')')[2].split()[1])
            os.kill(shim, signal.SIGSTOP)
            try:
                pause = subprocess.Popen(
                    ['docker', 'pause', *project.ids('side')], env=second.environment
                )
                for _ in range(3):
                    stale = ('', look_at_core(), look_at_core().replace('true', 'false'))
                    project.docker('kill', *core)
                    assert eventually(lambda stale=stale: look_at_core() not in stale, 30), (
                        watchdog.log()
                    )
            finally:
                os.kill(shim, signal.SIGCONT)
                pause.wait(60)
            assert eventually(lambda: project.is_well(PLAIN)), watchdog.log()


# -- what can't be repaired for now ----------------------------------------------------------------


@needs_docker
def test_container_whose_bind_source_was_gone_runs_again_once_that_is_back_and_is_still_the_same(
    project_2,
):
    """moby/moby#28211: Docker's own `restart: always` gives up there, for ever."""
    data, aside = project_2.folder / 'data', project_2.folder / 'aside'
    data.mkdir()
    mount = (
        'volumes: [{type: bind, source: ./data, target: /data, bind: {create_host_path: false}}]'
    )
    text = PAIR.replace('SIGKILL}', 'SIGKILL, restart: always, {}}}'.format(mount), 1)
    with project_2.write(text).watchdog() as watchdog:
        before, (core,) = project_2.look(), project_2.ids('core')
        data.rename(aside)
        project_2.docker('kill', core)
        assert watchdog.says('bind source path does not exist', 3, 60), watchdog.log()
        aside.rename(data)
        assert eventually(lambda: project_2.is_well(PLAIN), 60), watchdog.log()
        after = project_2.look()
        assert set(after) == set(before)
        assert all(after[ident] == before[ident] for ident in before if ident != core)


@needs_docker
def test_name_that_a_strangers_container_has_taken_is_told_and_used_once_it_is_free(project_2):
    """docker/compose#9860: «Conflict. The container name is already in use»."""
    stranger = project_2.name + '-core-1'
    with project_2.write(PAIR).watchdog() as watchdog:
        (core,) = project_2.ids('core')
        project_2.docker('rename', core, project_2.name + '-aside')
        try:
            options = ('--detach', '--init', '--network', 'none', '--name', stranger)
            taken = project_2.docker('run', *options, 'busybox', 'sleep', '10000').strip()
            project_2.docker('rm', '-f', core)
            assert watchdog.says('already in use', 3, 60), watchdog.log()
            assert project_2.docker('inspect', '--format', '{{.State.Running}}', taken) == 'true\n'
        finally:
            project_2.docker('rm', '-f', stranger)
        assert eventually(lambda: is_refilled(project_2, [core]), 60), watchdog.log()


@needs_docker
def test_container_that_docker_has_given_up_is_started_less_and_less_often_and_told(project_2):
    """zebrunner/mcloud-agent#124: a start sets the count of `restart: on-failure:2` back to 0."""
    command = "sh -c 'sleep 0.1; exit 3'"
    loop = "  loop: {image: busybox, command: %s, restart: 'on-failure:2'}\n" % command
    with project_2.write(PAIR + loop).watchdog() as watchdog:
        before = {ident: box for ident, box in project_2.look().items() if box[0] != 'loop'}
        assert watchdog.says('crash loop', 3, 60), watchdog.log()
        assert watchdog.log().count('loop: exited (3) -> started') <= 5
        after = project_2.look()
        assert {ident: after[ident] for ident in before} == before
        project_2.docker('kill', *project_2.ids('core'))
        assert watchdog.says('core: exited (137) -> started'), watchdog.log()


@needs_docker
def test_start_that_fails_tells_why_whatever_bytes_the_container_has_written(project_2):
    """python-on-whales#606, docker/compose#2317: output that is not UTF-8."""
    command = 'sh -c \'printf "caf\\\\351 \\\\376\\\\377\\\\n"; exit 3\''
    bad = "  bad: {image: busybox, command: %s, healthcheck: {test: 'true'}}\n" % command
    text = PAIR.replace('SIGKILL}', 'SIGKILL, depends_on: {bad: {condition: service_healthy}}}', 1)
    project_2.write(text + bad)
    code, output = run_command_on(
        project_2, 'run', LC_ALL='C', PYTHONCOERCECLOCALE='0', PYTHONUTF8='0'
    )
    assert code == 1 and 'Traceback' not in output and 'bad' in output.splitlines()[-1], output
    assert project_2.ids() == []


# -- the surroundings ------------------------------------------------------------------------------


@needs_docker
def test_locale_without_any_letter_beyond_ascii_hides_and_breaks_nothing(project_2):
    """politeauthority/docker-pretty-ps#22: UnicodeEncodeError in a locale such as cron's."""
    folder = project_2.folder / 'größe 北京'
    folder.mkdir()
    project_2.folder, project_2.file = folder, folder / 'é.yml'
    ascii_only = {'LC_ALL': 'C', 'PYTHONCOERCECLOCALE': '0', 'PYTHONUTF8': '0'}
    project_2.environment = dict(os.environ, **ascii_only)
    project_2.write(PAIR)
    with project_2.watchdog() as watchdog:
        project_2.docker('kill', *project_2.ids('core'))
        assert watchdog.says('core: exited (137) -> started'), watchdog.log()
        assert run_command_on(project_2, 'status')[0] == 0
        assert run_command_on(project_2, 'check', '--dry-run')[0] == 0
    code, output = run_command_on(project_2, 'check', '--dry-run')
    assert 'core' in output and 'Traceback' not in output
    project_2.write('services: [größe')
    code, output = run_command_on(project_2, 'check')
    assert code == 1 and len(output.splitlines()) == 1 and 'Traceback' not in output, output


@needs_docker
def test_nothing_is_written_so_a_read_only_file_system_without_a_temporary_folder_is_no_matter(
    project_2,
):
    """Hosts whose disk the kernel has made read-only, and images with a read-only root."""
    frozen = (
        'unshare',
        '--mount',
        'sh',
        '-c',
        'mount -o remount,bind,ro / && ! touch /x 2>/dev/null && exec "$@"',
        'sh',
    )
    nowhere = dict(os.environ, TMPDIR='/nowhere', HOME='/nowhere', PYTHONDONTWRITEBYTECODE='')
    if subprocess.call([*frozen, 'true'], stderr=subprocess.DEVNULL):
        pytest.skip('needs root, and a file system that can be made read-only in a namespace')
    project_2.environment = nowhere
    with project_2.write(PAIR).watchdog(
        start=(*frozen, sys.executable, str(MODULE), 'run')
    ) as watchdog:
        project_2.docker('kill', *project_2.ids('core'))
        assert watchdog.says('core: exited (137) -> started'), watchdog.log()
        gone = project_2.ids('side')
        project_2.docker('rm', '-f', *gone)
        assert eventually(lambda: is_refilled(project_2, gone)), watchdog.log()


@needs_docker
def test_compose_files_of_the_environment_and_a_changed_env_file_count(project):
    """docker/compose#6163, #4140: what is made anew has the new value, what runs is left alone."""
    first, second = (project.folder / name for name in ('a.yml', 'b.yml'))
    core, side = PAIR.splitlines(True)[1:]
    first.write_text(
        'services:\n' + core.replace('SIGKILL}', "SIGKILL, environment: {VALUE: '${VALUE}'}}")
    )
    second.write_text(
        'services:\n' + side.replace('SIGKILL}', "SIGKILL, environment: {VALUE: '${VALUE}'}}")
    )
    version = "version: '3.7'\n" if project.compose_command == COMPOSE['Compose 1.29'] else ''
    for file in (first, second):
        file.write_text(version + file.read_text())
    (project.folder / '.env').write_text(
        'VALUE=old\nCOMPOSE_FILE=a.yml:b.yml\nCOMPOSE_PROJECT_NAME={}\n'.format(project.name)
    )
    command = [
        sys.executable,
        str(MODULE),
        '--settle',
        '0',
        '--compose-command',
        ' '.join(project.compose_command),
    ]
    with Host(command, project.folder / 'log', cwd=str(project.folder)) as host:
        assert host.says('the stack is up', seconds=60), host.log()
        before = project.look()
        (core,) = project.ids('core')
        (project.folder / '.env').write_text(
            (project.folder / '.env').read_text().replace('old', 'new')
        )
        project.docker('rm', '-f', core)
        assert eventually(lambda: is_refilled(project, [core])), host.log()
        assert 'VALUE=new\n' in project.docker('exec', *project.ids('core'), 'env')
        after = project.look()
        assert all(after[ident] == before[ident] for ident in before if ident != core)
        host.process.terminate()
        assert host.process.wait(60) == 0, host.log()
    assert project.ids() == []


@needs_docker
def test_service_of_an_included_file_in_another_folder_is_watched_and_ended_like_any_other(
    project_2,
):
    """docker/compose#10932, #11626: `include` has a project directory of its own."""
    core, side = PAIR.splitlines(True)[1:]
    (project_2.folder / 'sub').mkdir()
    (project_2.folder / 'sub' / 'compose.yml').write_text('services:\n' + side)
    project_2.write('include: [sub/compose.yml]\nservices:\n' + core)
    with project_2.watchdog() as watchdog:
        project_2.docker('kill', *project_2.ids())
        assert eventually(lambda: project_2.is_well(PLAIN)), watchdog.log()
        gone = project_2.ids()
        project_2.docker('rm', '-f', *gone)
        assert eventually(lambda: is_refilled(project_2, gone)), watchdog.log()


@needs_docker
@pytest.mark.parametrize('version', ['1.40', '1.24'])
def test_version_of_the_api_that_the_environment_pins_is_no_matter(project_2, version):
    """testcontainers, docker-py: «client version is too old», or answers without new fields."""
    project_2.environment = dict(os.environ, DOCKER_API_VERSION=version)
    try:
        project_2.write(PAIR).compose('config')
        project_2.docker('ps')
        project_2.compose('up', '-d')
    except AssertionError as error:
        pytest.skip(
            'this version of the API is too old for the engine or for Compose: {}'.format(error)[
                :200
            ]
        )
    see_repairs(project_2)


@needs_docker
def test_colours_and_progress_that_the_environment_asks_of_compose_never_reach_an_error(project_2):
    """COMPOSE_ANSI=always, COMPOSE_PROGRESS=tty: escape sequences in what others parse."""
    project_2.environment = dict(os.environ, COMPOSE_ANSI='always', COMPOSE_PROGRESS='tty')
    see_repairs(project_2)
    project_2.write(PAIR.replace('busybox', 'none.invalid/nothing', 1))
    code, output = run_command_on(project_2, 'run', '--quiet')
    assert (
        code == 1 and '\x1b' not in output.splitlines()[-1] and '[0m' not in output.splitlines()[-1]
    ), output


@needs_docker
@pytest.mark.parametrize('watcher', ['thread', 'process'])
def test_stack_whose_name_changes_in_its_file_stays_the_same_stack(project_2, watcher):
    project_2.write('name: {}\n{}'.format(project_2.name, PAIR))
    command = [sys.executable, str(MODULE), 'run', '--file', str(project_2.file)]
    command += ['--settle', '0', '--interval', '5', '--watcher', watcher]
    with Host(command, project_2.folder / 'log') as host:
        assert host.says('the stack is up'), host.log()
        project_2.docker('kill', *project_2.ids('core'))
        assert host.says('core: exited (137) -> started'), host.log()
        project_2.write('name: {}-new\n{}'.format(project_2.name, PAIR))
        project_2.docker('rm', '--force', *project_2.ids('core'))
        assert host.says('core: missing -> created'), host.log()
        host.process.terminate()
        assert host.process.wait(60) == 0, host.log()
    assert project_2.ids() == [] and project_2.name not in project_2.docker('ps', '--all')
    assert project_2.name not in project_2.docker('network', 'ls')


@needs_docker
def test_clock_that_is_a_day_slow_delays_no_repair(project_2):
    """moby/moby#11330, elastic/beats#24318: `since` is compared with the engine's clock."""
    libraries = glob.glob('/usr/lib/*/faketime/libfaketime.so.1')
    if not libraries:
        pytest.skip('libfaketime is not installed')
    environment = dict(os.environ, LD_PRELOAD=libraries[0], FAKETIME='-1d')
    options = project_2.write(PAIR).options('--interval', '3600')
    command = [sys.executable, str(MODULE), *options]
    # Killed at the end: the library has a lock for all processes, which one that is killed keeps.
    with Host(command, project_2.folder / 'log', env=environment) as host:
        assert host.says('the stack is up', seconds=60), host.log()
        project_2.docker('kill', *project_2.ids('core'))
        assert host.says('core: exited (137) -> started'), host.log()


@needs_docker
def test_hold_is_seen_whatever_the_umask_of_who_orders_it(project_2):
    """The person on call has another umask than the service that runs the watchdog."""
    if 'hold' not in call(sys.executable, str(MODULE), '--help'):
        pytest.skip('this version knows no hold')
    with project_2.write(PAIR).watchdog() as watchdog:
        hold = [sys.executable, str(MODULE), 'hold', '--file', str(project_2.file), 'core']
        call('sh', '-c', 'umask 077 && exec "$@"', 'sh', *hold)
        assert (project_2.folder / '.broapt-hold').stat().st_mode & 0o444 == 0o444
        project_2.docker('kill', *project_2.ids())
        assert watchdog.says('side: exited (137) -> started'), watchdog.log()
        assert 'core: exited' not in watchdog.log()
        call(sys.executable, str(MODULE), 'release', '--file', str(project_2.file))
        assert eventually(lambda: project_2.is_well(PLAIN)), watchdog.log()


SYSTEMD = '/usr/lib/systemd/systemd'
CGROUPS = pathlib.Path('/sys/fs/cgroup')

# The machine's own files and engine, but no units than these; a new cgroup2 for this systemd alone.
BOOT = """\
mount --make-rprivate /
mount --bind /run/docker.sock "$FOLDER/docker.sock"
mount -t proc proc /proc
mount --bind -o ro /proc/sys /proc/sys
umount --recursive --lazy /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount --bind "$FOLDER/console" /dev/console
mount -t tmpfs tmpfs /run
touch /run/docker.sock
mount --bind "$FOLDER/docker.sock" /run/docker.sock
mount -t tmpfs tmpfs /usr/lib/systemd/system-generators
mount --bind "$FOLDER/units" /usr/lib/systemd/system
mount -t tmpfs tmpfs /etc/systemd
exec env -i container=other PATH="$PATH" "$SYSTEMD" --unit=basic.target --log-target=console
"""
TARGETS = ('sysinit', 'basic', 'shutdown', 'multi-user', 'umount', 'final')
ENGINE = '[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n'
OWN = """\
[Service]
Environment=COMPOSE_PROJECT_NAME={name} BROAPT_SETTLE=0 "PATH={path}"
StandardOutput=append:{folder}/log
StandardError=append:{folder}/log
RestartSec=0.1
WatchdogSec=2
"""


def is_removed(folder):
    with contextlib.suppress(OSError):
        folder.rmdir()
    return not folder.exists()


class Manager:
    """A systemd with one unit, the README's, for one project."""

    def __init__(self, project, **environment):
        self.project, self.folder = project, project.folder
        self.log = self.folder / 'log'
        text = re.search('```ini\n(.*?)```', (HERE / 'README.md').read_text(), re.DOTALL).group(1)
        assert '/opt/broapt' in text and '/usr/bin/python3 ' in text
        text = text.replace('/opt/broapt', str(self.folder)).replace(
            '/usr/bin/python3 ', sys.executable + ' '
        )
        shutil.copy(str(MODULE), str(self.folder))
        units = self.folder / 'units'
        (units / 'broapt.service.d').mkdir(parents=True)
        (units / 'broapt.service').write_text(text)
        own = OWN.format(name=project.name, folder=self.folder, path=os.environ['PATH'])
        own += ''.join('Environment={}={}\n'.format(*item) for item in environment.items())
        (units / 'broapt.service.d' / 'own.conf').write_text(own)
        (units / 'docker.service').write_text(ENGINE)
        for target in TARGETS:
            (units / (target + '.target')).write_text('[Unit]\nDescription={}\n'.format(target))
        for name in ('console', 'docker.sock'):
            (self.folder / name).touch()

    def __enter__(self):
        mounts = CGROUPS / 'unified' if (CGROUPS / 'unified').is_dir() else CGROUPS
        self.cgroup = mounts / self.project.name
        try:
            self.cgroup.mkdir()
            environment = dict(os.environ, FOLDER=str(self.folder), SYSTEMD=SYSTEMD)
            join = 'echo $$ >"{}/cgroup.procs" && exec "$@"'.format(self.cgroup)
            namespaces = ('--mount', '--pid', '--cgroup', '--uts', '--ipc')
            command = ['unshare', *namespaces, '--fork', '--kill-child', 'sh', '-euc', BOOT]
            with (self.folder / 'boot').open('w') as boot:
                self.process = subprocess.Popen(
                    ['sh', '-c', join, 'sh', *command],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=boot,
                    stderr=subprocess.STDOUT,
                )
            if not eventually(self.is_up):
                pytest.skip('no systemd can be started here: ' + self.read_console()[-1000:])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        with contextlib.suppress(AttributeError):
            self.process.kill()  # with it its child, process 1 of the namespace, and so all in it
            self.process.wait()
        if self.cgroup.is_dir():
            folders = sorted(self.cgroup.glob('**/'), reverse=True)
            assert eventually(
                lambda: not any((folder / 'cgroup.procs').read_text() for folder in folders)
            )
            for folder in folders:
                assert eventually(functools.partial(is_removed, folder)), (
                    'its last process is still there'
                )

    def read_console(self):
        return (self.folder / 'boot').read_text() + (self.folder / 'console').read_text()

    def is_up(self):
        with contextlib.suppress(AssertionError, IndexError):
            return self.control('is-system-running', code=None).strip() in ('running', 'degraded')
        return False

    def control(self, *arguments, **kwargs):
        path = '/proc/{0}/task/{0}/children'.format(self.process.pid)
        pid = pathlib.Path(path).read_text().split()[0]
        enter = ['nsenter', '--target', pid, '--mount', '--pid', '--cgroup', '--uts', '--ipc']
        return call(*enter, 'systemctl', *arguments, **kwargs)

    def show(self, *names):
        """Return these properties of the unit."""
        lines = self.control(
            'show', 'broapt', *['--property=' + name for name in names]
        ).splitlines()
        values = dict(line.split('=', 1) for line in lines)
        return [values[name] for name in names]

    def main_process(self):
        """Return the unit's main process as this side of the namespaces numbers it."""
        inner = self.show('MainPID')[0]
        for pid in self.list_processes():
            with contextlib.suppress(OSError):
                if re.search(
                    '^NSpid:.*\t{}$'.format(inner),
                    pathlib.Path('/proc', pid, 'status').read_text(),
                    re.MULTILINE,
                ):
                    return int(pid)
        raise AssertionError(self.read_console())

    def list_processes(self):
        return [
            pid for path in self.cgroup.glob('**/cgroup.procs') for pid in path.read_text().split()
        ]


@pytest.fixture
def manage(project_2):
    """Give a function that returns a manager of this project, or skip."""
    if os.geteuid() or not all(map(shutil.which, ('unshare', 'nsenter', 'systemctl', SYSTEMD))):
        pytest.skip('needs root, util-linux, and the package of systemd')
    project_2.write(PAIR)
    return lambda **environment: Manager(project_2, **environment)


PAIRED = ('core', 'side')


@needs_docker
@pytest.mark.parametrize('watcher', ['thread', 'process'])
def test_unit_is_started_watched_and_stopped(manage, project_2, watcher):
    with manage(BROAPT_WATCHER=watcher) as manager:
        manager.control('start', 'broapt')  # until READY=1
        assert manager.show('ActiveState', 'SubState') == [
            'active',
            'running',
        ] and project_2.is_well(PAIRED)
        assert eventually(lambda: manager.show('StatusText') == ['2 of 2 running'])
        fed = manager.show('WatchdogTimestampMonotonic')
        assert eventually(lambda: manager.show('WatchdogTimestampMonotonic') != fed)
        project_2.docker('kill', *project_2.ids('core'))
        assert eventually(lambda: project_2.is_well(PAIRED)), manager.log.read_text()
        manager.control('stop', 'broapt')
        assert manager.show('ActiveState', 'Result', 'ExecMainStatus', 'NRestarts') == [
            'inactive',
            'success',
            '0',
            '0',
        ]
        assert project_2.ids() == []


@needs_docker
@pytest.mark.parametrize('watcher', ['thread', 'process'])
def test_unit_that_hangs_is_started_again_and_its_containers_run_on(manage, project_2, watcher):
    with manage(BROAPT_WATCHER=watcher) as manager:
        manager.control('start', 'broapt')
        before, process = project_2.look(), manager.main_process()
        for pid in manager.list_processes():  # all of the unit's, but not systemd
            with contextlib.suppress(OSError):
                if 'broapt.service' in pathlib.Path('/proc', pid, 'cgroup').read_text():
                    os.kill(int(pid), signal.SIGSTOP)
        assert eventually(
            lambda: manager.show('NRestarts', 'ActiveState') == ['1', 'active'], 60
        ), manager.read_console()
        assert gone(process) and project_2.look() == before
        project_2.docker('pause', *project_2.ids('side'))
        assert eventually(lambda: project_2.is_well(PAIRED)), manager.log.read_text()


@needs_docker
def test_unit_that_is_stopped_in_the_middle_of_a_repair_leaves_nothing(manage, project_2):
    with (
        manage()
    ) as manager:  # systemd sends the signal to all processes of the unit, Compose's, too
        manager.control('start', 'broapt')
        for _ in range(3):
            project_2.docker('rm', '-f', *project_2.ids())
            manager.control('stop', 'broapt')
            assert manager.show('Result', 'ExecMainStatus') == ['success', '0'], (
                manager.log.read_text()
            )
            assert project_2.ids() == []
            manager.control('start', 'broapt')
            assert project_2.is_well(PAIRED)


@needs_docker
def test_unit_that_is_killed_comes_back_and_its_containers_run_on(manage, project_2):
    with manage() as manager:
        manager.control('start', 'broapt')
        before = project_2.look()
        os.kill(manager.main_process(), signal.SIGKILL)
        assert eventually(
            lambda: manager.show('NRestarts', 'ActiveState') == ['1', 'active'], 60
        ), manager.read_console()
        assert project_2.look() == before


@needs_docker
def test_unit_that_leaves_its_containers_is_upgraded_without_a_pause_of_theirs(manage, project_2):
    with manage(BROAPT_ON_EXIT='leave') as manager:
        manager.control('start', 'broapt')
        before, process = project_2.look(), manager.main_process()
        manager.control('restart', 'broapt')
        assert gone(process) and project_2.look() == before
        project_2.docker('kill', *project_2.ids('core'))  # the next one watches the same containers
        assert eventually(lambda: project_2.is_well(PAIRED) and project_2.look() != before), (
            manager.log.read_text()
        )
        before = project_2.look()
        manager.control('stop', 'broapt')
        assert (
            manager.show('Result', 'ExecMainStatus') == ['success', '0']
            and project_2.look() == before
        )


# -- on a real engine: a swarm of three ------------------------------------------------------------

MACHINE = """\
hostname {name}
mkdir -p {private} && for folder in {private}; do mount -t tmpfs none $folder || exit; done
read go && exec docker-init -- dockerd {options} >>{folder}/log 2>&1
"""
# What an engine would share with the machine's first one: sandboxes, shims' sockets, its key.
PRIVATE = ('/run/docker', '/run/containerd', '/etc/docker')
TASK = 'image: busybox, command: sleep 10000, stop_signal: SIGKILL'
ON_SWARM = 'services:\n  core: {%s, deploy: {replicas: 3}}\n  side: {%s}\n' % (TASK, TASK)
ON_SWARM += 'networks: {default: {external: true, name: host}}\n'  # an overlay takes longer


def unshare(*command, **kwargs):
    """Start a command with a network and mounts of its own, which end with it."""
    command = ['unshare', '--net', '--mount', '--propagation=private', *command]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL, **kwargs)


def inside(process, *command):
    """Run a command in that process's network."""
    return call('nsenter', '--net=/proc/{}/ns/net'.format(process.pid), *command)


class Machine:
    """Namespaces with an engine: the end of their first process is the end of all others."""

    def __init__(self, folder, number, switch):
        self.name, self.address = 'node{}'.format(number), '10.231.7.{}/24'.format(number)
        self.switch, self.folder, self.links = switch, folder / self.name, 0
        self.folder.mkdir()
        self.group = '{}-{}'.format(folder.name, self.name)
        self.environment = dict(os.environ, DOCKER_HOST='unix://{}'.format(self.folder / 'socket'))
        self.process = self.init = None

    def docker(self, *arguments, **kwargs):
        return call('docker', *arguments, env=self.environment, **kwargs)

    def start(self):
        """Boot it; return when its engine answers."""
        (self.folder / 'settings').write_text('{}')
        for name in ('pidfile', 'exec-root'):  # as /run is empty after a boot
            shutil.rmtree(str(self.folder / name), ignore_errors=True)
            with contextlib.suppress(OSError):
                (self.folder / name).unlink()
        options = ['--host=' + self.environment['DOCKER_HOST'], '--cgroup-parent=/' + self.group]
        options.append('--config-file={}'.format(self.folder / 'settings'))
        for name in ('data-root', 'exec-root', 'pidfile'):
            options.append('--{}={}'.format(name, self.folder / name))
        text = MACHINE.format(
            name=self.name,
            private=' '.join(PRIVATE),
            options=' '.join(options),
            folder=self.folder,
        )
        apart = ('--uts', '--pid', '--fork', '--kill-child', '--mount-proc')
        self.process = unshare(*apart, 'sh', '-c', text, stdin=subprocess.PIPE)
        children = pathlib.Path('/proc/{0}/task/{0}/children'.format(self.process.pid))
        if not eventually(lambda: self.process.poll() is not None or children.read_text()):
            raise OSError('no namespaces')
        self.init = int(children.read_text())
        self.plug_in()
        self.process.stdin.write(b'go\n')
        self.process.stdin.close()
        quiet = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}
        answers = partial(subprocess.call, ['docker', 'version'], env=self.environment, **quiet)
        assert eventually(lambda: answers() == 0, 60), (self.folder / 'log').read_text()[-2000:]

    def plug_in(self):
        self.links += 1  # the link of a dead machine lingers for a moment
        port = '{}-{}'.format(self.name, self.links)
        peer = ('type', 'veth', 'peer', 'name', 'eth0', 'netns', str(self.process.pid))
        inside(self.switch, 'ip', 'link', 'add', port, *peer)
        inside(self.switch, 'ip', 'link', 'set', port, 'master', 'switch', 'up')
        inside(self.process, 'ip', 'address', 'add', self.address, 'dev', 'eth0')
        for device in ('lo', 'eth0'):
            inside(self.process, 'ip', 'link', 'set', device, 'up')

    def end(self, signum):
        """End its engine by this signal, and so all of it; SIGKILL: it loses its power."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, TypeError):
                os.kill(self.init, signum)
            self.process.wait(60)
        self.process = None

    def clean_up(self):
        self.end(signal.SIGKILL)
        for controller in (CGROUPS, *CGROUPS.iterdir()):  # version 2, version 1
            for folder, _, _ in os.walk(str(controller / self.group), topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)


class Swarm:
    """Three machines on a switch; the first is the manager. All have the image busybox."""

    def __init__(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix='bs'))  # a socket's path has to be short
        self.switch, self.machines = None, []

    def __enter__(self):
        try:
            plug = 'ip link add switch up type bridge && echo && exec sleep 3600'
            self.switch = unshare('sh', '-c', plug, stdout=subprocess.PIPE)
            if not self.switch.stdout.readline():
                raise OSError('no network')
            for number in (1, 2, 3):
                self.machines.append(Machine(self.folder, number, self.switch))
                self.machines[-1].start()
                copy_image(self.folder, self.machines[-1].environment)
            self.manager = self.machines[0]
            address = self.manager.address[:-3]
            options = ('--advertise-addr', address, '--dispatcher-heartbeat', '1s')
            self.manager.docker('swarm', 'init', *options)
            token = self.manager.docker('swarm', 'join-token', '--quiet', 'worker').strip()
            for machine in self.machines[1:]:
                machine.docker('swarm', 'join', '--token', token, address)
            assert eventually(self.is_whole, 60)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for machine in self.machines:
            machine.clean_up()
        if self.switch is not None:
            self.switch.kill()
            self.switch.communicate()
        shutil.rmtree(str(self.folder), ignore_errors=True)

    def is_whole(self):
        states = self.manager.docker('node', 'ls', '--format', '{{.Status}}', code=None)
        return states.split() == ['Ready'] * 3


@pytest.fixture(scope='module')
def swarm(engine):
    if os.geteuid() or not all(map(find_program, ('unshare', 'nsenter', 'ip', 'docker-init'))):
        pytest.skip('optional: needs root, util-linux, iproute2 and docker-init')
    try:
        context = Swarm().__enter__()
    except OSError as error:
        pytest.skip('optional: {} of its own to be had here'.format(error))
    with contextlib.ExitStack() as stack:
        stack.push(context.__exit__)
        yield context


class Deployed(Project):
    """A stack of its own on the swarm."""

    def __init__(self, folder, swarm):
        super().__init__(folder, COMPOSE['Compose 2'], swarm.manager.environment)
        self.swarm = swarm
        self.write(ON_SWARM)

    def options(self, *more):
        return [*super().options(), '--mode', 'swarm', '--interval', '1', *more]

    def ids(self, *services):
        """Ids of the tasks that run (of these services), with the machine of each."""
        form = '{{.Name}} {{.ID}} {{.Node}} {{.CurrentState}}'
        lines = self.docker('stack', 'ps', '--no-trunc', '--format', form, self.name, code=None)
        tasks = [line.split() for line in lines.splitlines()]
        names = ['{}_{}'.format(self.name, service) for service in services]
        return sorted(
            (ident, node)
            for name, ident, node, state, *_ in tasks
            if state == 'Running' and (not names or name.partition('.')[0] in names)
        )

    def counts(self):
        """Return service -> 'running/desired', as Swarm tells."""
        own = '--filter=label=com.docker.stack.namespace=' + self.name
        form = '{{.Name}} {{.Replicas}}'
        lines = self.docker('service', 'ls', '--format', form, own).splitlines()
        return {line.split()[0][len(self.name) + 1 :]: line.split()[1] for line in lines}

    def is_well(self, services=(('core', '3/3'), ('side', '1/1'))):
        return self.counts() == dict(services)

    def act(self, *words):
        """Do something to a service by hand: the last word is its name."""
        return self.docker('service', *words[:-1], '{}_{}'.format(self.name, words[-1]))

    def run(self, *words, environment=None):
        """Return exit code, output and errors of a command of the watchdog."""
        result = subprocess.run(
            [sys.executable, str(MODULE), *words, *self.options()],
            env=environment or self.environment,
            cwd=str(self.folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
            timeout=120,
        )
        return result.returncode, result.stdout, result.stderr

    def remove(self):
        self.docker('stack', 'rm', self.name)
        assert eventually(lambda: not self.ids(), 60)


@pytest.fixture
def deployed(swarm, tmp_path):
    for machine in swarm.machines:
        if machine.process is None:
            machine.start()
    assert eventually(swarm.is_whole, 90)
    project = Deployed(tmp_path, swarm)
    yield project
    project.remove()


def finds(host, pattern, seconds=30.0):
    """Return whether the pattern comes to stand in the log."""
    return eventually(lambda: re.search(pattern, host.log()), seconds)


@needs_docker
def test_stack_on_a_swarm_is_waited_for_and_gone_after_the_signal(deployed):
    job = '  job: {image: busybox, command: "true", deploy: {mode: replicated-job}'
    job += ', labels: {broapt.watch: "false"}}\n'  # else it would be waited for
    volumes = "side: {volumes: ['data:/data'], "
    deployed.write(ON_SWARM.replace('side: {', volumes).replace('networks', job + 'networks'))
    with deployed.file.open('a') as file:
        file.write('volumes: {data: {}}\n')
    began = time.monotonic()
    with deployed.watchdog() as watchdog:
        before = watchdog.log().partition('the stack is up')[0]
        assert re.search(r'INFO core: left to Swarm \(\d/3, starting\)\n', before), before
        code, table, _ = deployed.run('status')
        assert code == 0 and re.search(r'\ncore .* running \(3/3\)', table), table
        assert 'WARNING' not in watchdog.log(), watchdog.log()
    assert deployed.counts() == {} and time.monotonic() - began < 60  # a finished job holds up none
    volumes = [m.docker('volume', 'ls', '--quiet') for m in deployed.swarm.machines]
    assert ''.join(volumes).split().count(deployed.name + '_data') == 1


@needs_docker
def test_start_that_waits_for_replicas_tells_what_hinders_them_and_is_ended_by_the_signal(deployed):
    deployed.write(
        ON_SWARM.replace('replicas: 3', 'placement: {constraints: [node.labels.none == 1]}')
    )
    command = [sys.executable, str(MODULE), 'run', *deployed.options()]
    with Host(command, deployed.folder / 'log', env=deployed.environment) as host:
        why = 'no suitable node (scheduling constraints not satisfied on 3 nodes)'
        assert host.says('INFO core: left to Swarm (0/1, {})'.format(why)), host.log()
        code, _, errors = deployed.run('check')  # that has no such patience
        assert code == 1 and 'WARNING core: left to Swarm (0/1, no suitable' in errors, errors
        assert 'the stack is up' not in host.log()
        host.process.terminate()
        assert host.process.wait(60) == 0, host.log()
    assert (deployed.counts(), deployed.ids()) == ({}, [])


@needs_docker
def test_start_that_fails_on_a_swarm_is_undone(deployed):
    deployed.write(ON_SWARM.replace('{external: true, name: host}', '{driver: bridge}'))
    code, _, errors = deployed.run('run', '--quiet')
    assert code == 1 and 'Only networks scoped to the swarm' in errors.splitlines()[-1], errors
    assert deployed.counts() == {} and deployed.name not in deployed.docker('network', 'ls')


@needs_docker
@pytest.mark.parametrize('watcher', ['thread', 'process'])
def test_service_removed_from_a_swarm_is_deployed_again_and_no_other_is_touched(deployed, watcher):
    with deployed.watchdog('--watcher', watcher, '--interval', '3600') as watchdog:
        core = deployed.ids('core')
        deployed.act('rm', 'side')
        assert watchdog.says('INFO side: missing -> created'), watchdog.log()
        assert deployed.is_well() and deployed.ids('core') == core
        assert 'WARNING' not in watchdog.log()
        if watcher == 'process':
            return
        deployed.act('scale', '--detach', 'core=4')  # that is no fault
        assert eventually(lambda: deployed.counts()['core'] == '4/4')
        assert deployed.run('check')[0] == 0 and deployed.counts()['core'] == '4/4'


@needs_docker
def test_shortage_on_a_swarm_is_one_warning_with_its_cause_and_one_line_at_its_end(deployed):
    short = 'side: left to Swarm (0/1, task: non-zero exit (3))'
    with deployed.watchdog('--settle', '3') as watchdog:
        update = ('update', '--detach', '--update-order', 'start-first', '--args')
        deployed.act(*update, 'sh -c "sleep 1; exit 3"', '--restart-delay', '5s', 'side')
        assert watchdog.says('WARNING ' + short), watchdog.log()
        assert eventually(lambda: short[6:] in deployed.run('status')[1])
        code, text, _ = deployed.run('check', '--dry-run')
        assert code == 1 and 'core: running (3/3): nothing to do' in text, text
        looks = threading.Event()
        assert not looks.wait(7)  # each of its replicas runs for a moment
        deployed.act(*update, 'sleep 1000', 'side')
        assert watchdog.says('INFO {} -> started'.format(short)), watchdog.log()
        told = watchdog.log().partition('up and watched')[2]
        assert (told.count('WARNING'), told.count('side')) == (1, 2), told


@needs_docker
def test_replicas_of_a_machine_that_dies_run_elsewhere_and_the_watchdog_goes_on(deployed):
    # They begin there so much later that a look has to see that they lack.
    later = '{replicas: 3, restart_policy: {delay: 3s}}'
    deployed.write(ON_SWARM.replace('{replicas: 3}', later))
    with deployed.watchdog() as watchdog:
        deployed.swarm.machines[2].end(signal.SIGKILL)
        assert finds(watchdog, r'WARNING \w+: left to Swarm \(\d/\d, starting\)'), watchdog.log()
        assert finds(watchdog, r'INFO \w+: left to Swarm .* -> started'), watchdog.log()
        assert eventually(
            lambda: [node != 'node3' for _, node in deployed.ids()].count(True) == 4
        ), deployed.ids()
        deployed.act('rm', 'side')
        assert watchdog.says('INFO side: missing -> created'), watchdog.log()
        deployed.swarm.machines[2].start()
        assert eventually(deployed.swarm.is_whole, 60)


@needs_docker
def test_service_of_a_swarm_on_hold_or_labelled_is_not_deployed_again(deployed):
    alone = '  alone: {%s, labels: {broapt.watch: "false"}}\n' % TASK
    deployed.write(ON_SWARM.replace('networks:', alone + 'networks:'))
    with deployed.watchdog() as watchdog:
        assert deployed.run('hold', 'side', '--for', '10m')[0] == 0
        deployed.act('rm', 'side')
        deployed.act('rm', 'alone')
        code, table, _ = deployed.run('status')
        assert code == 0 and 'on hold until' in table and 'labelled' in table, table
        looks = threading.Event()
        assert not looks.wait(2) and list(deployed.counts()) == ['core'], watchdog.log()
        assert deployed.run('release')[0] == 0
        assert eventually(lambda: 'side' in deployed.counts()), watchdog.log()


@needs_docker
def test_stack_left_on_a_swarm_is_taken_over_and_check_deploys_what_it_lacks(deployed):
    with deployed.watchdog('--on-exit', 'leave') as watchdog:
        before = deployed.ids()
        watchdog.process.terminate()
        assert watchdog.process.wait(60) == 0 and deployed.ids() == before
        deployed.act('rm', 'side')
        assert deployed.run('status')[0] == 1 and deployed.run('check')[0] == 0
        assert deployed.is_well()
        with deployed.watchdog():
            core = [task for task in before if task in deployed.ids()]
            assert len(core) >= 3


@needs_docker
def test_host_runs_its_stack_on_a_swarm_by_the_environment_alone(deployed):
    shutil.copy(str(MODULE), str(deployed.folder / 'compose.py'))
    deployed.write(ON_SWARM.replace('core', 'app').replace('replicas: 3', 'replicas: 2'))
    const = 'DOCKER_COMPOSE = {!r}\nINTERVAL = 1\nKILL_SIGNAL = 15\n'.format(str(deployed.file))
    (deployed.folder / 'const.py').write_text(const)
    (deployed.folder / 'daemon.py').write_text(SWARM_HOST)
    own = {'COMPOSE_PROJECT_NAME': deployed.name, 'BROAPT_MODE': 'swarm'}
    kwargs = {'env': dict(deployed.environment, **own), 'cwd': str(deployed.folder)}
    with Host([sys.executable, 'daemon.py'], deployed.folder / 'log', **kwargs) as host:
        assert host.says('up\n', seconds=60), host.log()
        assert deployed.is_well([('app', '2/2'), ('side', '1/1')])
        deployed.act('rm', 'app')
        assert host.says('app: missing -> created'), host.log()
        assert deployed.is_well([('app', '2/2'), ('side', '1/1')])
        host.process.terminate()
        assert host.process.wait(60) == 0 and host.log().endswith('after\n'), host.log()
    assert (deployed.counts(), deployed.ids()) == ({}, [])


SWARM_HOST = """
import logging, threading
from compose import docker_compose, register

logging.basicConfig(level=logging.INFO)
register()
with docker_compose():
    print('up', flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
print('after', flush=True)
"""


@needs_docker
@pytest.mark.parametrize(
    'service, told',
    [
        ('{build: .}', 'core: no image specified'),
        (
            '{image: busybox, depends_on: {side: {condition: service_healthy}}}',
            'services.core.depends_on must be a list',
        ),
        (
            "{image: busybox, network_mode: 'service:side'}",
            'core: Swarm can share no network_mode, pid or ipc',
        ),
    ],
)
def test_file_that_a_swarm_can_not_take_is_one_line_and_changes_nothing(deployed, service, told):
    deployed.write('services:\n  core: {}\n  side: {{{}}}\n'.format(service, TASK))
    code, _, errors = deployed.run('run', '--quiet')
    assert code in (1, 2) and told in errors, errors
    assert len(errors.splitlines()) == 1, errors
    assert deployed.counts() == {} and deployed.name not in deployed.docker('network', 'ls')


@needs_docker
def test_engine_that_is_no_manager_is_one_line(deployed):
    for words in (['run', '--quiet'], ['check'], ['status']):
        code, _, errors = deployed.run(*words, environment=deployed.swarm.machines[1].environment)
        assert code == 1 and len(errors.splitlines()) == 1 and 'manager' in errors, errors
    assert deployed.counts() == {}


@needs_docker
def test_restart_of_the_manager_is_an_outage_that_is_told_once(deployed):
    manager = deployed.swarm.manager
    # The workers need half a minute to come back; so this test is the last one.
    there = '{deploy: {placement: {constraints: [node.role == manager]}}, image'
    deployed.write(ON_SWARM.replace(', deploy: {replicas: 3}', '').replace('{image', there))
    with deployed.watchdog() as watchdog:
        manager.end(signal.SIGTERM)
        assert watchdog.says('WARNING Docker does not answer'), watchdog.log()
        manager.start()
        assert watchdog.says('INFO Docker answers again, after '), watchdog.log()
        deployed.act('rm', 'side')
        assert finds(watchdog, 'INFO side: missing -> created'), watchdog.log()
        assert watchdog.log().count('Docker does not answer') == 1, watchdog.log()
        assert 'Traceback' not in watchdog.log(), watchdog.log()
