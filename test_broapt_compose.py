# SPDX-FileCopyrightText: 2026 the broapt_compose authors
# SPDX-License-Identifier: BSD-3-Clause
"""Tests of the Docker watchdog: first what needs no engine, with a scripted `docker` on PATH; last, on a real engine."""

import contextlib
import datetime
import http.client
import importlib.util
import json
import multiprocessing
import os
import pathlib
import random
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import urllib.request
import warnings
import zipfile

import pytest

import broapt_compose as bc
from broapt_compose import Action, ComposeError, ComposeWarning, Container, History, Service, Settings, State, Streak, Verb

HERE = pathlib.Path(__file__).resolve().parent
MODULE = HERE / 'broapt_compose.py'

# -- captured outputs ------------------------------------------------------------------------------------------------

PS = """\
["aa00","shop-side-1","running","Up 2 seconds","","side","1","False","/shop"]
["bb00","shop-core-1","running","Up 5 minutes (unhealthy)","","core","1","False","/shop"]
["cc00","shop-init-1","exited","Exited (0) 1 second ago","","init","1","False","/shop"]
["dd00","shop-core-2","paused","Up About an hour (Paused)","FALSE","core","2","False","/shop"]
["ee00","shop-core-3","restarting","Restarting (1) 3 seconds ago","","core","3","False","/shop"]
["ff00","shop-core-run-1","exited","Exited (1) 3 days ago","","core","1","True","/shop"]
["gg00","shop-new-1","created","Created","","new","1","False","/shop"]
["hh00","shop-new-2","running","Up Less than a second (health: starting)","","new","2","False","/"]
"""

CONFIG_2 = """\
name: shop
services:
  core:
    command:
      - sleep
    depends_on:
      init:
        condition: service_completed_successfully
        required: true
    environment:
      TEXT: |
        scale: 7
          depends_on:
    labels:
      broapt.watch: "false"
    networks:
      default: null
  init:
    image: busybox
  multi:
    deploy:
      replicas: 2
  side:
    depends_on:
      core:
        condition: service_started
        required: true
    network_mode: service:core
  zero:
    scale: 0
networks:
  default:
    name: shop_default
"""

CONFIG_1 = """\
services:
  core:
    command: sleep
    depends_on:
      init:
        condition: service_completed_successfully
    environment:
      TEXT: "scale: 7\\n  depends_on:\\n"
    labels:
      broapt.watch: 'false'
  init:
    image: busybox
  multi:
    deploy:
      replicas: 2
  side:
    depends_on:
      core:
        condition: service_started
    network_mode: service:core
  zero:
    scale: 0
version: '3.9'

"""

# -- fakes and builders ----------------------------------------------------------------------------------------------

DOCKER = """\
#!{python} -IS
import json, os, sys, time
here = os.path.dirname(os.path.abspath(__file__))
arguments = sys.argv[1:]
with open(os.path.join(here, 'calls'), 'a') as file:
    file.write(json.dumps(arguments) + '\\n')
with open(os.path.join(here, 'script.json')) as file:
    script = json.load(file)
for words, play in script:
    if arguments[:len(words)] == words:
        break
else:
    play = {{}}
if play.get('once'):
    with open(os.path.join(here, 'script.json'), 'w') as file:
        json.dump([entry for entry in script if entry[1] is not play], file)
if play.get('child'):  # it holds the pipes and ignores what happens to its parent
    import subprocess
    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
    with open(os.path.join(here, 'child'), 'w') as file:
        file.write(str(child.pid))
if play.get('flood'):
    for _ in range(play['flood']):
        os.write(2, b'x' * (1 << 20))
if play.get('endless'):
    while True:
        os.write(1, b'x' * (1 << 20))
sys.stdout.write(play.get('out', ''))
sys.stderr.write(play.get('err', ''))
sys.stdout.flush()
time.sleep(600 if play.get('hang') else play.get('seconds', 0))
sys.exit(play.get('code', 0))
"""


class FakeDocker:
    """A real executable named docker, which plays what it is told and writes down how it was called."""

    def __init__(self, folder):
        self.folder = folder
        executable = folder / 'docker'
        executable.write_text(DOCKER.format(python=sys.executable))
        executable.chmod(0o755)
        self.play()

    def play(self, **plays):
        """Play for each command ('ps', 'compose_config' ...) what its dictionary says."""
        script = [[words.split('_'), play] for words, play in plays.items()]
        temporary = self.folder / 'script.tmp'
        temporary.write_text(json.dumps(sorted(script, key=lambda entry: -len(entry[0]))))
        os.replace(str(temporary), str(self.folder / 'script.json'))

    def calls(self):
        path = self.folder / 'calls'
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def docker(tmp_path, monkeypatch):
    folder = tmp_path / 'bin'
    folder.mkdir()
    monkeypatch.setenv('PATH', str(folder))
    return FakeDocker(folder)


@pytest.fixture(autouse=True)
def _same_world(monkeypatch):
    """No setting from outside; the flag up and the signals as they were, before and after each test."""
    for name in [name for name in os.environ if name.startswith(('BROAPT_', 'COMPOSE_', 'NOTIFY_', 'WATCHDOG_'))]:
        if not name.startswith('BROAPT_TEST_'):
            monkeypatch.delenv(name)
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    bc.UP_FLAG.value = True
    yield
    bc.UP_FLAG.value = True
    bc._Signals.previous.clear()
    bc._Signals.deaf_until, bc._Signals.number = 0.0, None
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


class Clock:
    """A clock that the test moves."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def make(service='core', state='running', **fields):
    """Return a container; the id is the service's name and number unless given."""
    number = fields.setdefault('number', '1')
    values = {'id': service + number, 'name': 'shop-' + service + '-' + number, 'exit_code': None, 'health': '', 'since': ''}
    values.update(watched=True, folder='/shop')
    values.update(fields)
    if state == 'exited' and values['exit_code'] is None:
        values['exit_code'] = 137
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


def play_stack(docker, lines, config=CONFIG_2, **more):
    """Play a project named shop with these `docker ps` lines."""
    ids = ''.join(json.loads(line)[0] + '\n' for line in lines)
    info = {'out': '2026-11-23T15:09:35.9+01:00\n'}
    answers = {'compose_ps': {'out': ids}, 'compose_config': {'out': config}, 'info': info, 'events': {'hang': True}}
    answers['ps'] = {'out': ''.join(line + '\n' for line in lines)}
    answers['ps_--all_--format={{.Label "com.docker.compose.project"}}'] = {'out': 'shop\n'}
    answers.update(more)
    docker.play(**answers)


def line(service, state, status, number='1'):
    return json.dumps(
        [service + number, 'shop-{}-{}'.format(service, number), state, status, '', service, number, 'False', '/shop']
    )


PLAIN = 'services:\n  core:\n    image: busybox\n  side:\n    image: busybox\n'
SIDE = line('side', 'running', 'Up 2 minutes')
FAST = Settings(settle=0, timeout=20, interval=3600, compose_command=('docker', 'compose'))


@contextlib.contextmanager
def watch(settings=FAST, clock=time.monotonic):
    """Give a watch whose cycles the test runs itself."""
    stack = bc._Stack(settings)
    stack.flag = bc.UP_FLAG
    with contextlib.closing(bc._Watch(stack, clock)) as watch:
        yield watch


def shop():
    """The stack of the project named shop."""
    stack = bc._Stack(FAST)
    stack.project = 'shop'
    return stack


def finish(watch):
    """Wait for the repairs under way, and take note of them."""
    while watch.repairs:
        for task, *_ in watch.repairs:
            task.join(20)
        watch.finish_repairs()


def repairs(docker):
    """The commands that changed something."""
    readers = (['ps'], ['info'], ['events'], ['inspect'], ['compose', 'ps'], ['compose', 'config'], ['compose', 'version'])
    return [call for call in docker.calls() if call[:1] not in readers and call[:2] not in readers]


# -- errors and warnings ---------------------------------------------------------------------------------------------


def test_error_is_one_line_with_the_command_its_code_and_the_reason():
    error = ComposeError(['docker', 'start', 'a b'], 1, 'noise\nError response from daemon: no\n\x1b[31mError: failed\n')
    assert str(error) == "docker start 'a b': exit code 1: Error response from daemon: no;  [31mError: failed"
    assert (error.command, error.returncode) == (['docker', 'start', 'a b'], 1)


def test_same_warning_is_issued_each_time_and_never_raised():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('default')
        for _ in range(2):
            bc._warn('two\nlines')
    assert [(str(w.message), w.category) for w in caught] == [('two lines', ComposeWarning)] * 2
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        bc._warn('not raised')


# -- settings --------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_contract():
    assert Settings.load() == Settings() == ((), 10, 15, bc.Watcher.THREAD, 1, 60, bc.Prune.PROJECT, bc.Unhealthy.RESTART, ())


def test_argument_comes_before_environment_and_empty_variable_counts_as_unset(monkeypatch, tmp_path):
    files = [tmp_path / 'a.yml', tmp_path / '-b c.yml']
    for file in files:
        file.write_text('services: {}')
    monkeypatch.setenv('BROAPT_DOCKER_COMPOSE', os.pathsep.join(map(str, files)))
    monkeypatch.setenv('BROAPT_INTERVAL', '2.5')
    monkeypatch.setenv('BROAPT_SETTLE', '')
    monkeypatch.setenv('BROAPT_COMPOSE_COMMAND', "docker-compose -p 'a b'")
    settings = Settings.load(interval='3', kill_signal='sigint')
    assert settings.docker_compose == tuple(map(str, files))
    assert (settings.interval, settings.kill_signal, settings.settle) == (3, signal.SIGINT, 1)
    assert settings.compose_command == ('docker-compose', '-p', 'a b')
    assert Settings.load().interval == 2.5


@pytest.mark.parametrize('value, number', [(15, 15), ('15', 15), ('TERM', 15), ('sigterm', 15), (signal.SIGHUP, 1)])
def test_signal_is_a_number_or_a_name(value, number):
    assert Settings.load(kill_signal=value).kill_signal == number


@pytest.mark.parametrize(
    'field, values',
    [
        ('interval', ['0', '-1', 'nan', 'inf', 'abc', 0, float('nan'), [], '1e999']),
        ('timeout', ['0', '-1', 'nan', 'inf', 'abc']),
        ('settle', ['-1', 'nan', 'inf', 'abc']),
        ('kill_signal', ['KILL', 'SIGKILL', '9', 9, 'STOP', '19', 'FOO', '0', '99', '-1', 'SIG', '1.5']),
        ('watcher', ['fork', 'Thread']),
        ('prune', ['all']),
        ('unhealthy', ['stop']),
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


def run_python(code, cwd, *options, **environment):
    variables = dict(os.environ, **environment)
    variables.pop('PYTHONPATH', None)
    return subprocess.check_output([sys.executable, *options, '-c', code], cwd=str(cwd), env=variables, universal_newlines=True)


SHOW = 'import sys; sys.path.insert(0, "."); {}; import compose; s = compose.Settings.load(); print(s.interval, s.kill_signal)'


def test_vendored_copy_reads_const_beside_it_and_the_original_does_not(tmp_path):
    shutil.copy(str(MODULE), str(tmp_path / 'compose.py'))
    assert run_python(SHOW.format('pass'), tmp_path, '-I', BROAPT_INTERVAL='7') == '7.0 15\n'
    (tmp_path / 'const.py').write_text('KILL_SIGNAL = 10\nINTERVAL = 4\nTIMEOUT = "not a setting of the watchdog"\n')
    assert run_python(SHOW.format('pass'), tmp_path, '-I', BROAPT_INTERVAL='7') == '4.0 10\n'
    code = 'import sys; sys.path.insert(0, "."); sys.argv[1:] = ["-i", "0"]; import compose; sys.exit(compose.main())'
    result = subprocess.run([sys.executable, '-m', 'compose', '-V'], cwd=str(tmp_path), stdout=subprocess.PIPE)
    assert (result.returncode, result.stdout) == (0, b'broapt_compose 1.0.0\n')
    with pytest.raises(subprocess.CalledProcessError):
        run_python(code, tmp_path, '-I')


def test_const_that_the_host_has_loaded_is_read_wherever_it_is(tmp_path):
    (tmp_path / 'lib').mkdir()
    shutil.copy(str(MODULE), str(tmp_path / 'lib' / 'compose.py'))
    load = 'import types; const = types.ModuleType("const"); const.KILL_SIGNAL = 12; const.INTERVAL = "6"'
    code = SHOW.format(load + '; sys.modules["const"] = const; sys.path.insert(0, "lib")')
    assert run_python(code, tmp_path, '-I') == '6.0 12\n'
    other = 'import types; const = types.ModuleType("const"); const.INTERVAL = 3'  # somebody else's module of that name
    code = SHOW.format(other + '; sys.modules["const"] = const; sys.path.insert(0, "lib")')
    assert run_python(code, tmp_path, '-I') == '10.0 15\n'


def test_import_has_no_side_effects(tmp_path):
    code = (
        'import os, signal, sys, threading, logging\n'
        'before = [signal.getsignal(n) for n in range(1, 32)], dict(os.environ), os.listdir("/proc/self/fd")\n'
        'sys.path.insert(0, {!r})\nimport broapt_compose\n'
        'after = [signal.getsignal(n) for n in range(1, 32)], dict(os.environ), os.listdir("/proc/self/fd")\n'
        'assert before == after and threading.active_count() == 1 and not logging.root.handlers\n'
        'print(sorted({{"multiprocessing", "argparse", "socket", "flask"}} & set(sys.modules)))'
    ).format(str(HERE))
    assert run_python(code, tmp_path, '-I', BROAPT_INTERVAL='abc') == '[]\n'


# -- parsing what Docker and Compose print ---------------------------------------------------------------------------


def test_containers_are_read_with_state_code_health_and_without_one_offs():
    containers = bc._parse_containers(PS)
    seen = [(c.label, c.state.value, c.exit_code, c.health, c.since, c.age, c.watched, c.folder) for c in containers]
    assert seen == [
        ('side', 'running', None, '', '2 seconds', 2, True, '/shop'),
        ('core', 'running', None, 'unhealthy', '5 minutes', 300, True, '/shop'),
        ('init', 'exited', 0, '', '1 second', 1, True, '/shop'),
        ('core-2', 'paused', None, '', 'About an hour', 3600, False, '/shop'),
        ('core-3', 'restarting', 1, '', '3 seconds', 3, True, '/shop'),
        ('new', 'created', None, '', '', 0, True, '/shop'),
        ('new-2', 'running', None, 'starting', 'Less than a second', 0, True, '/'),
    ]


@pytest.mark.parametrize('text', ['garbage\n', PS[:-1], PS[:-9], '[]\n', '{}\n', '["a"]\n', 'null\n', PS.replace('paused', 'odd')])
def test_anything_else_is_refused(docker, text):
    docker.play(ps={'out': text})
    with pytest.raises(ComposeError, match='docker ps: its answer is not understood'):
        shop().observe()


@pytest.mark.parametrize('text', [CONFIG_1, CONFIG_2])
def test_services_are_read_from_what_both_generations_print(text):
    done, started = {'init': 'service_completed_successfully'}, {'core': 'service_started'}
    assert bc._parse_services(text) == {
        'core': Service(watched=False, depends_on=done),
        'init': Service(),
        'multi': Service(scale=2),
        'side': Service(network_of='core', depends_on=started),
        'zero': Service(scale=0),
    }


def test_commands_run_in_the_folder_where_it_began(docker, tmp_path, monkeypatch):
    stack = bc._Stack(FAST)
    (docker.folder / 'docker').write_text('#!/bin/sh\npwd\n')
    monkeypatch.chdir(str(docker.folder))
    assert (stack.compose('config'), bc._Stack(FAST).compose('config')) == (str(HERE) + '\n', str(docker.folder) + '\n')


def test_failed_stop_at_the_end_of_a_run_is_exit_code_1(docker):
    failing = {'code': 1, 'err': 'no way'}
    play_stack(docker, [SIDE], 'services: {side: {image: busybox}}', compose_stop=failing, stop=failing, kill=failing)
    host = subprocess.Popen([sys.executable, str(MODULE), '--prune', 'none'], stderr=subprocess.PIPE, universal_newlines=True)
    lines = iter(host.stderr)
    assert any('the stack is up' in line for line in lines)
    host.terminate()
    assert list(lines)[-1] == 'broapt_compose: docker kill side1: exit code 1: no way\n'
    assert host.wait(20) == 1
    host.stderr.close()


def test_signal_while_the_watcher_is_being_ended_is_only_noted(docker, monkeypatch):
    play_stack(docker, [SIDE], 'services: {side: {image: busybox}}')
    join = threading.Thread.join

    def join_interrupted(thread, *arguments):
        if thread.name == 'broapt-watchdog':
            os.kill(os.getpid(), signal.SIGTERM)
        join(thread, *arguments)

    monkeypatch.setattr(threading.Thread, 'join', join_interrupted)
    bc.register(FAST)
    with bc.docker_compose(FAST):
        pass
    assert ['rm', '--force', '--volumes', 'side1'] in docker.calls()


def test_signals_work_again_after_the_end(docker):
    play_stack(docker, [SIDE], 'services: {side: {image: busybox}}')
    bc.register(FAST)
    with bc.docker_compose(FAST):
        pass
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(10)


def test_service_with_a_profile_is_not_expected_of_compose_1():
    assert bc._parse_services('name: shop\nservices:\n  debug:\n    profiles:\n    - debug\n    scale: 2\n') == {
        'debug': Service(scale=2)
    }
    assert bc._parse_services('services:\n  debug:\n    profiles:\n    - debug\n    scale: 2\n') == {'debug': Service(scale=0)}


@pytest.mark.parametrize('streak, health', [(0, 'starting'), (3, 'unhealthy'), (10, 'unhealthy')])
def test_unhealthy_without_a_failure_is_what_docker_says_after_a_pause(docker, streak, health):
    unhealthy = line('core', 'running', 'Up 5 seconds (unhealthy)')
    play_stack(docker, [unhealthy, SIDE], inspect={'out': 'core1 {}\n'.format(streak)})
    assert [c.health for c in shop().observe()] == [health, '']
    assert docker.calls()[-1][-1:] == ['core1']


# -- the process layer -----------------------------------------------------------------------------------------------


def run(*command, limit=60, **kwargs):
    return bc._run(command, limit, '.', **kwargs)


def test_command_that_hangs_is_killed_with_its_whole_group_at_the_deadline(docker):
    docker.play(ps={'hang': True, 'child': True, 'out': 'half'})
    with pytest.raises(ComposeError, match='^docker ps: no answer within 0.5 s$') as caught:
        run('docker', 'ps', limit=0.5)
    assert (caught.value.returncode, caught.value.stdout) == (None, 'half')
    assert eventually(lambda: gone((docker.folder / 'child').read_text()))


def test_answer_is_returned_although_a_process_left_behind_holds_the_pipes(docker):
    docker.play(ps={'child': True, 'out': 'all\n'})
    assert run('docker', 'ps') == 'all\n'
    os.kill(int((docker.folder / 'child').read_text()), signal.SIGKILL)


def test_flood_on_standard_error_is_read_but_not_kept(docker):
    docker.play(ps={'flood': 100, 'err': 'the end', 'code': 3})
    with pytest.raises(ComposeError) as caught:
        run('docker', 'ps')
    assert len(caught.value.stderr) == bc._ERROR_LIMIT and caught.value.stderr.endswith('the end')


def test_endless_output_is_read_until_the_deadline_but_not_kept(docker):
    docker.play(ps={'endless': True})
    with pytest.raises(ComposeError, match='no answer within 1 s') as caught:
        run('docker', 'ps', limit=1)
    assert 0 < len(caught.value.stdout) <= bc._OUTPUT_LIMIT


def test_command_that_cannot_be_started_is_an_error_like_any_other(docker):
    (docker.folder / 'docker').chmod(0o644)
    for command, why in ((['docker'], 'Permission denied'), (['none'], 'command not found'), (['docker', '\0'], 'null')):
        with pytest.raises(ComposeError, match=why):
            run(*command)


def test_command_is_cancelled_at_once_when_the_flag_is_lowered(docker):
    docker.play(ps={'hang': True, 'child': True})
    timer = threading.Thread(target=lambda: eventually((docker.folder / 'child').exists) and bc.UP_FLAG.clear())
    timer.start()
    with pytest.raises(bc._Cancelled):
        run('docker', 'ps', flag=bc.UP_FLAG)
    timer.join()


def test_echo_shows_everything_and_the_error_still_tells_the_reason(docker, capfd):
    docker.play(compose={'out': 'built\n', 'err': 'Error: no space\n', 'code': 17})
    with pytest.raises(ComposeError, match='exit code 17: Error: no space'):
        run('docker', 'compose', show=bc._echo)
    assert sorted(capfd.readouterr().err.splitlines()) == ['Error: no space', 'built']


def test_frozen_program_gives_commands_the_library_path_of_before(docker, monkeypatch):
    (docker.folder / 'docker').write_text('#!/bin/sh\necho "${LD_LIBRARY_PATH-unset}"\n')
    monkeypatch.setenv('LD_LIBRARY_PATH', '/bundle')
    assert run('docker') == '/bundle\n'
    monkeypatch.setattr(sys, 'frozen', True, raising=False)
    assert run('docker') == 'unset\n'
    monkeypatch.setenv('LD_LIBRARY_PATH_ORIG', '/before')
    assert run('docker') == '/before\n'


def test_compose_is_found_by_asking_and_its_absence_is_told(docker):
    assert bc._Stack(Settings()).settings.compose_command == ('docker', 'compose')
    docker.play(compose={'code': 1, 'err': "docker: 'compose' is not a docker command."})
    with pytest.raises(ComposeError, match='no Compose found'):
        bc._Stack(Settings())
    shutil.copy(str(docker.folder / 'docker'), str(docker.folder / 'docker-compose'))
    docker.play(compose={'code': 1})
    assert bc._Stack(Settings()).settings.compose_command == ('docker-compose',)
    for name in ('docker', 'docker-compose'):
        (docker.folder / name).unlink()
    with pytest.raises(ComposeError, match='docker --version: command not found'):
        bc._Stack(Settings())


# -- decide ----------------------------------------------------------------------------------------------------------

SERVICES = {
    'core': Service(depends_on={'init': 'service_completed_successfully', 'db': 'service_healthy'}),
    'db': Service(),
    'init': Service(),
    'side': Service(network_of='core'),
}
NOW = 5000.0
NEVER = Settings(unhealthy=bc.Unhealthy.IGNORE)


def base():
    """Return the containers of a stack that is well, the newest first."""
    init = make('init', 'exited', exit_code=0)
    return {'side': make('side'), 'core': make('core'), 'db': make('db', health='healthy'), 'init': init}


def look(**changes):
    """Return the containers with some changes: containers, lists of them, or None; those with the id «new» are the newest."""
    changed = [c if isinstance(c, list) else [c] for c in {**base(), **changes}.values() if c]
    return sorted((c for group in changed for c in group), key=lambda c: c.id != 'new')


def found(containers, services=SERVICES, history=None, settings=FAST):
    actions = bc.decide(containers, services, NOW, history or History(), settings)
    return [(action.verb.name.lower(), action.label, action.cause) for action in actions]


ROWS = [
    ('a stack that is well needs nothing', {}, []),
    ('paused core is unpaused', {'core': make(state='paused')}, [('unpause', 'core', 'paused')]),
    ('killed db is started', {'db': make('db', 'exited')}, [('start', 'db', 'exited (137)')]),
    ('db that ended with 0 is started', {'db': make('db', 'exited', exit_code=0)}, [('start', 'db', 'exited (0)')]),
    ('created db is started', {'db': make('db', 'created')}, [('start', 'db', 'created')]),
    ('exited core waits for nothing', {'core': make(state='exited'), 'db': make('db', health='starting')},
     [('start', 'core', 'exited (137)')]),
    ('dead db is removed', {'db': make('db', 'dead')}, [('remove', 'db', 'dead')]),
    ('missing db is created', {'db': None}, [('create', 'db', 'missing')]),
    ('missing core is created while side waits for its network', {'core': None}, [('create', 'core', 'missing')]),
    ('missing side is created', {'side': None}, [('create', 'side', 'missing')]),
    ('missing side is not created before core runs', {'side': None, 'core': make(state='exited')},
     [('start', 'core', 'exited (137)')]),
    ('side of a core created anew is created anew', {'core': make(id='new')}, [('recreate', 'side', 'its network is gone')]),
    ('stopped side of a core created anew, too', {'core': make(id='new'), 'side': make('side', 'exited')},
     [('recreate', 'side', 'its network is gone')]),
    ('side of a core that somebody is about to replace is left alone', {'core': [make('core', 'created', id='new'), make()]}, []),
    ('side is restarted when core was started after it',
     {'core': make(since='5 seconds'), 'side': make('side', since='About a minute')},
     [('restart', 'side', 'its network is gone')]),
    ('side is restarted when core was started after it, which is named although it is unhealthy too',
     {'core': make(since='5 seconds'), 'side': make('side', since='About a minute', health='unhealthy')},
     [('restart', 'side', 'its network is gone')]),
    ('side that was started after core is left alone',
     {'core': make(since='2 hours'), 'side': make('side', since='3 minutes')}, []),
    ('side that was started in the same second as core is left alone',
     {'core': make(since='Less than a second'), 'side': make('side', since='Less than a second')}, []),
    ('stopped side waits for a core that does not run', {'core': make(state='exited'), 'side': make('side', 'exited')},
     [('start', 'core', 'exited (137)')]),
    ('restarting db is left to Docker', {'db': make('db', 'restarting', exit_code=1)}, []),
    ('removing db is left to Docker', {'db': make('db', 'removing')}, []),
    ('unhealthy db is restarted', {'db': make('db', health='unhealthy')}, [('restart', 'db', 'unhealthy')]),
    ('db whose health check starts is left alone', {'db': make('db', health='starting')}, []),
    ('failed one-shot is run again', {'init': make('init', 'exited', exit_code=2)}, [('start', 'init', 'exited (2)')]),
    ('unwatched db is never touched', {'db': make('db', 'exited', watched=False)}, []),
    ('service that the file does not declare is never touched', {'old': make('old', 'exited')}, []),
    ('replacement beside the running old one is left alone (2.x)', {'db': [make('db', 'created', id='new'), make('db')]}, []),
    ('of replacement and stopped old one, the new one is started (1.29)',
     {'db': [make('db', 'created', id='new'), make('db', 'exited')]}, [('start', 'db', 'created')]),
    ('second container of a service scaled by hand is watched', {'db': [make('db'), make('db', 'exited', number='2')]},
     [('start', 'db-2', 'exited (137)')]),
    ('paused and stopped at once are both repaired', {'core': make(state='paused'), 'db': make('db', 'exited')},
     [('unpause', 'core', 'paused'), ('start', 'db', 'exited (137)')]),
    ('all gone: all are created', {'core': None, 'db': None, 'init': None, 'side': None},
     [('create', 'db', 'missing'), ('create', 'init', 'missing')]),
]  # fmt: skip


@pytest.mark.parametrize('changes, actions', [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_decide(changes, actions):
    assert found(look(**changes)) == actions


@pytest.mark.parametrize('core', [make(state='created'), None], ids=['created', 'missing'])
@pytest.mark.parametrize(
    'changes, acts',
    [
        ({}, True),
        ({'db': make('db', health='starting')}, False),
        ({'init': make('init')}, False),
        ({'init': make('init', 'exited', exit_code=1)}, False),
    ],
)
def test_first_start_waits_until_what_it_depends_on_is_ready(core, changes, acts):
    actions = bc.decide(look(core=core, **changes), SERVICES, NOW, History(), FAST)
    assert ('core' in [action.service for action in actions]) == acts


@pytest.mark.parametrize('service', [None, Service(watched=False), Service(scale=0)], ids=['undeclared', 'unwatched', 'off'])
def test_first_start_does_not_wait_for_what_nobody_will_bring(service):
    services = {name: s for name, s in dict(SERVICES, init=service).items() if s}
    assert ('create', 'core', 'missing') in found(look(core=None, init=None), services)


def test_unpausing_that_fails_is_tried_less_and_less_often():
    history = History({}, {'core1': Streak(3, NOW - 9, NOW - 1)})
    (action,) = bc.decide(look(core=make(state='paused')), SERVICES, NOW, history, FAST)
    assert action.due == NOW + 4


def test_decide_ignores_unhealthy_if_told_so():
    assert found(look(db=make('db', health='unhealthy')), settings=NEVER) == []


def test_decide_counts_the_containers_of_a_scaled_service():
    services = dict(SERVICES, db=Service(scale=3))
    assert found(look(), services) == [('create', 'db', '2 of 3 missing')]


def test_fault_is_due_when_it_has_lasted_for_settle():
    settings, containers = FAST._replace(settle=3), look(db=make('db', 'exited'))
    (action,) = bc.decide(containers, SERVICES, NOW, History(), settings)
    assert (action.since, action.due) == (NOW, NOW + 3)
    (later,) = bc.decide(containers, SERVICES, NOW + 2, History(since={action.key: action.since}), settings)
    assert later.due == NOW + 3


def test_further_repairs_wait_longer_up_to_five_minutes_and_ten_seconds_of_running_clear_it():
    delays = []
    for count in range(14):
        history = History(streaks={'db': Streak(count, NOW, NOW)} if count else {})
        (action,) = bc.decide(look(db=make('db', 'exited')), SERVICES, NOW, history, FAST)
        assert action.streak.repairs == count
        delays.append(action.due - NOW)
    assert delays == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300, 300]
    history = History(streaks={'db': Streak(9, NOW - 99, NOW - 10)})
    (action,) = bc.decide(look(db=make('db', 'exited')), SERVICES, NOW, history, FAST)
    assert (action.due, action.streak.repairs) == (NOW, 0)


def test_first_start_of_a_container_does_not_count_as_a_repair(docker):
    play_stack(docker, [SIDE, line('core', 'created', 'Created')], PLAIN)
    with watch() as w:
        w.cycle()
        finish(w)
        assert repairs(docker) == [['start', 'core1']] and w.history.streaks == {}


def test_unpausing_never_waits_for_a_crash_loop():
    history = History(streaks={'db': Streak(9, NOW, NOW)})
    (action,) = bc.decide(look(db=make('db', 'paused')), SERVICES, NOW, history, FAST)
    assert action.due == NOW


@pytest.mark.parametrize('seed', range(300))
def test_invariants_hold_over_random_histories(seed):
    rng = random.Random(seed)
    now, history = NOW, History()
    for _ in range(20):
        now += rng.choice([0.01, 0.5, 1.0, 7.0])
        containers = []
        for name in [*SERVICES, 'stranger']:
            for number in range(rng.choice([0, 1, 1, 1, 2])):
                fields = {'number': str(number + 1), 'watched': rng.random() < 0.8, 'since': rng.choice(['', '5 minutes'])}
                containers.append(make(name, rng.choice(list(State)).value, health=rng.choice(['', 'unhealthy']), **fields))
        actions = bc.decide(containers, SERVICES, now, history, FAST._replace(settle=1))
        touched = [action.container for action in actions if action.container]
        assert len(touched) == len(set(touched)), 'never two actions on one container'
        by_id = {c.id: c for c in containers}
        for action in actions:
            assert action.service in SERVICES
            assert action.due >= action.since + 1, 'never before settle'
            assert not action.container or by_id[action.container].watched
            assert not action.container or by_id[action.container].state not in (State.RESTARTING, State.REMOVING)
        streaks = {a.line: Streak(a.streak.repairs + 1, a.streak.began, now) for a in actions if a.due <= now}
        history = History({a.key: a.since for a in actions if a.due > now}, dict(history.streaks, **streaks))


# -- the watcher -----------------------------------------------------------------------------------------------------


def test_each_container_is_repaired_by_a_command_of_its_own_and_neighbours_are_not_named(docker):
    lines = [line('core', 'exited', 'Exited (137) 1 second ago'), line('db', 'exited', 'Exited (0) 1 second ago'), SIDE]
    play_stack(
        docker, lines + [line('web', 'paused', 'Up 2 seconds (Paused)')], PLAIN + '  db:\n    image: b\n  web:\n    image: b\n'
    )
    with watch() as w:
        w.cycle()
        finish(w)
    assert sorted(repairs(docker)) == [['start', 'core1'], ['start', 'db1'], ['unpause', 'web1']]


def test_missing_services_are_created_by_one_command_without_touching_what_they_depend_on(docker):
    play_stack(docker, [SIDE], PLAIN + '  db:\n    image: b\n')
    with watch() as w:
        w.cycle()
        finish(w)
    assert repairs(docker) == [['compose', 'up', '--detach', '--no-recreate', '--no-deps', 'core', 'db']]


def test_compose_files_come_before_every_compose_command(docker, tmp_path):
    file = tmp_path / '-odd "name"\n.yml'
    file.write_text('')
    settings = Settings.load(docker_compose=[str(file)], compose_command='docker compose', settle=0)
    docker.play(compose={'out': ''})
    assert bc._Stack(settings).observe() == []
    assert docker.calls() == [['compose', '--file', str(file), 'ps', '--all', '--quiet']]


def test_check_is_one_command_whatever_the_number_of_containers(docker):
    services = ['s{}'.format(number) for number in range(100)]
    play_stack(docker, [line(name, 'running', 'Up 1 second') for name in services],
               'services:\n' + ''.join('  {}:\n    image: b\n'.format(name) for name in services))  # fmt: skip
    with watch() as w:
        w.cycle()
        w.cycle()
        before = len(docker.calls())
        for _ in range(3):
            w.cycle()
        assert [call[0] for call in docker.calls()[before:]] == ['ps'] * 3


def test_nothing_is_repaired_before_it_has_settled(docker):
    clock = Clock()
    play_stack(docker, [line('core', 'exited', 'Exited (1) 1 second ago'), SIDE], PLAIN)
    with watch(FAST._replace(settle=5), clock) as w:
        assert w.cycle() == 5
        clock.now += 4.9
        assert round(w.cycle(), 6) == 0.1
        assert repairs(docker) == []
        play_stack(docker, [line('core', 'running', 'Up 1 second'), SIDE], PLAIN)
        assert round(w.cycle()) == 3600  # it came back by itself: forgotten
        play_stack(docker, [line('core', 'exited', 'Exited (1) 1 second ago'), SIDE], PLAIN)
        assert w.cycle() == 5
        clock.now += 5
        w.cycle()
        finish(w)
    assert repairs(docker) == [['start', 'core1']]


def test_crash_loop_is_warned_of_from_the_third_repair_on(docker, caplog):
    clock = Clock()
    play_stack(docker, [line('core', 'exited', 'Exited (3) 1 second ago'), SIDE], PLAIN)
    caplog.set_level('INFO', 'broapt_compose')
    with watch(clock=clock) as w, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for _ in range(4):
            timeout = w.cycle()
            clock.now += timeout if timeout < 3600 else 0
            w.cycle()
            finish(w)
    assert repairs(docker) == [['start', 'core1']] * 4
    assert [str(w.message) for w in caught] == [
        'core: crash loop, exited (3) for the 3rd time in 1 s; next try in 2 s',
        'core: crash loop, exited (3) for the 4th time in 3 s; next try in 4 s',
    ]
    assert 'core: exited (3) -> started (0.00 s)' in caplog.messages


def test_container_that_cannot_be_started_is_brought_up_by_compose(docker, caplog):
    failure = {'code': 1, 'err': 'Error response from daemon: network gone\nError: failed to start containers: core1\n'}
    lines = [line('core', 'exited', 'Exited (3) 1 second ago'), line('side', 'exited', 'Exited (0) 1 second ago')]
    play_stack(docker, lines, PLAIN, start_core1=failure)
    caplog.set_level('INFO', 'broapt_compose')
    with watch() as w:
        w.cycle()
        finish(w)
    assert sorted(repairs(docker)) == [['compose', 'up', '--detach', '--no-deps', 'core'], ['start', 'core1'], ['start', 'side1']]
    assert sorted(re.sub(r'\d\.\d+ s', 'N s', message) for message in caplog.messages) == [
        'core: exited (3) -> brought up (N s)',
        'docker start core1: exit code 1: Error response from daemon: network gone; Error: failed to start containers: core1; '
        'bringing core up instead',
        'side: exited (0) -> started (N s)',
    ]


def test_slow_repair_holds_up_no_other_service_and_is_not_begun_twice(docker):
    lines = [line('core', 'running', 'Up 1 minute (unhealthy)'), SIDE]
    play_stack(docker, lines, PLAIN, restart={'hang': True}, inspect={})
    with watch() as w:
        w.cycle()
        assert eventually(lambda: ['restart', 'core1'] in docker.calls())
        play_stack(docker, [lines[0], line('side', 'exited', 'Exited (1) 1 second ago')], PLAIN)
        w.cycle()
        assert eventually(lambda: ['start', 'side1'] in docker.calls())
        assert repairs(docker) == [['restart', 'core1'], ['start', 'side1']]
        bc.UP_FLAG.value = False


def test_services_that_compose_failed_for_get_a_command_each(docker, caplog):
    play_stack(docker, [], PLAIN, ps={}, compose_up={'code': 1, 'err': 'no'})
    with watch() as w:
        w.stack.project = 'shop'
        w.cycle()
        finish(w)
    create = ['compose', 'up', '--detach', '--no-recreate', '--no-deps']
    assert repairs(docker) == [[*create, 'core', 'side'], [*create, 'core'], [*create, 'side']]
    assert caplog.messages == ['{}: missing, not created: docker {}: exit code 1: no'.format(name, ' '.join([*create, name]))
                               for name in ('core', 'side')]  # fmt: skip


def test_only_one_compose_command_runs_at_a_time(docker):
    play_stack(docker, [SIDE], PLAIN, compose_up={'hang': True})
    with watch() as w:
        w.cycle()
        assert eventually(lambda: len(repairs(docker)) == 1)
        play_stack(docker, [], PLAIN)
        w.stack.project = 'shop'
        w.cycle()
        assert len(w.repairs) == 2
        assert not eventually(lambda: len(repairs(docker)) > 1, seconds=1)
        bc.UP_FLAG.value = False


@pytest.mark.parametrize('play', [{'code': 1, 'err': 'Cannot connect'}, {'out': 'garbage\n'}, {'out': '["half'}])
def test_outage_is_one_warning_and_one_line_at_its_end_and_no_repair(docker, caplog, play):
    clock = Clock()
    lines = [line('core', 'exited', 'Exited (3) 1 second ago'), SIDE]
    play_stack(docker, lines, PLAIN)
    caplog.set_level('INFO', 'broapt_compose')
    with watch(FAST._replace(interval=10, settle=1), clock) as w, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        assert w.cycle() == 1
        play_stack(docker, lines, PLAIN, ps=play)
        pauses = []
        for _ in range(5):
            clock.now += 4
            pauses.append(w.cycle())
        assert pauses == [0.1, 4, 8, 10, 10]
        clock.now += 24
        assert repairs(docker) == []
        play_stack(docker, lines, PLAIN)
        assert w.cycle() <= 1  # what was seen before the outage does not count
    assert len(caught) == 1 and str(caught[0].message).startswith('Docker does not answer; trying again every 10 s: docker ps')
    assert caplog.messages[1:] == ['Docker answers again, after 40 s']


def test_unexpected_exception_is_logged_with_its_traceback_and_the_next_cycle_runs(docker, caplog, monkeypatch):
    play_stack(docker, [SIDE, line('core', 'running', 'Up 1 second')], PLAIN)
    cycles = []

    def broken(self):
        cycles.append(1)
        if len(cycles) > 2:
            bc.UP_FLAG.value = False
        raise RuntimeError('planted')

    monkeypatch.setattr(bc._Watch, 'cycle', broken)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        bc.watch_container(FAST._replace(interval=0.01))
    assert len(cycles) == 3 and caplog.text.count('RuntimeError: planted') == 3


def test_changed_definition_makes_the_compose_files_be_read_again(docker):
    play_stack(docker, [SIDE, line('core', 'running', 'Up 1 second')], PLAIN)
    with watch() as w:
        w.cycle()
        play_stack(
            docker,
            [SIDE, line('core', 'running', 'Up 1 second'), line('new', 'running', 'Up 1 second')],
            PLAIN + '  new:\n    a: b\n',
        )
        w.cycle()
        assert set(w.stack.services) == {'core', 'side', 'new'}


@contextlib.contextmanager
def following(w):
    """Let the watch follow the events in a thread."""
    thread = threading.Thread(target=w.follow_events)
    thread.start()
    try:
        yield
    finally:
        bc.UP_FLAG.value = False
        thread.join(20)
        assert not thread.is_alive()


def streams(docker):
    """The periods of the event streams that were opened."""
    return [(call[3], call[5]) for call in docker.calls() if call[0] == 'events']


@pytest.mark.parametrize('zone', ['+01:00', 'Z'])
def test_event_stream_is_bounded_by_the_engines_clock_and_the_next_one_begins_where_it_ends(docker, zone, monkeypatch):
    play_stack(docker, [SIDE], info={'out': '2026-11-23T15:09:35.9{}\n'.format(zone)}, events={})
    monkeypatch.setattr(bc, '_STREAM_LIFE', 4)  # so that a stream of no time at all has ended when it should
    with watch() as w, following(w):
        assert eventually(lambda: len(streams(docker)) >= 3)
    assert streams(docker)[:3] == [
        ('2026-11-23T15:09:34.9' + zone, '2026-11-23T15:09:39.9' + zone),
        ('2026-11-23T15:09:38.9' + zone, '2026-11-23T15:09:43.9' + zone),
        ('2026-11-23T15:09:42.9' + zone, '2026-11-23T15:09:47.9' + zone),
    ]
    assert sum(call[0] == 'info' for call in docker.calls()) == 1


def test_lost_event_stream_is_reopened_but_not_in_a_hurry(docker):
    play_stack(docker, [SIDE], events={})
    with watch(FAST._replace(interval=1.5)) as w, following(w):
        assert eventually(lambda: len(streams(docker)) == 1)
        assert not eventually(lambda: len(streams(docker)) > 1, seconds=1)
        assert eventually(lambda: len(streams(docker)) > 1)
        assert eventually(lambda: sum(call[0] == 'info' for call in docker.calls()) == 2), 'it does not know what it has missed'


def test_event_stream_that_is_silent_for_longer_than_it_may_live_is_replaced(docker, monkeypatch):
    play_stack(docker, [SIDE], events={'hang': True, 'child': True})
    monkeypatch.setattr(bc, '_STREAM_LIFE', -4)
    with watch() as w, following(w):
        assert eventually(lambda: len(streams(docker)) >= 3)


def test_event_wakes_the_watcher(docker):
    play_stack(docker, [SIDE], events={'out': 'abc\n', 'hang': True})
    with watch() as w, following(w):
        assert w.wake.wait(20)


def test_after_an_event_it_looks_again_soon_for_the_engine_tells_of_a_death_before_ps_shows_it(docker):
    clock = Clock()
    lines = [SIDE, line('core', 'running', 'Up 1 second')]
    play_stack(docker, lines, PLAIN)
    with watch(FAST._replace(settle=5), clock=clock) as w:
        assert round(w.cycle()) == 3600
        w.woken = clock.now
        pauses = []
        while not pauses or pauses[-1] < 60:
            pauses.append(w.cycle())
            clock.now += pauses[-1]
        assert [round(pause, 2) for pause in pauses[:-1]] == [0.01, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56]
        clock.now = w.woken + 0.5
        play_stack(docker, [SIDE, line('core', 'exited', 'Exited (1) 1 second ago')], PLAIN)
        w.cycle()
        assert w.history.since == {(Verb.START, 'core1'): w.woken}, 'the fault began with the event'
        play_stack(docker, lines, PLAIN)
        w.cycle()
        clock.now = w.woken + 2
        play_stack(docker, [SIDE, line('core', 'exited', 'Exited (1) 1 second ago')], PLAIN)
        w.cycle()
        assert w.history.since == {(Verb.START, 'core1'): clock.now}, 'not with an event of long ago: it has to settle'


def test_lowered_flag_ends_the_watcher_at_once_with_an_interval_of_an_hour(docker):
    play_stack(docker, [SIDE, line('core', 'running', 'Up 1 second')], PLAIN)
    thread = threading.Thread(target=bc.watch_container, args=(FAST,))
    thread.start()
    assert eventually(lambda: sum(call[0] == 'ps' for call in docker.calls()) > 1)
    bc.UP_FLAG.value = False
    thread.join(20)
    assert not thread.is_alive()


def test_watcher_recovers_when_no_process_can_be_started_for_a_while(docker, monkeypatch):
    clock, real = Clock(), subprocess.Popen
    play_stack(docker, [line('core', 'exited', 'Exited (3) 1 second ago'), SIDE], PLAIN)

    def exhausted(*_, **__):
        raise OSError(11, 'Resource temporarily unavailable')

    with watch(clock=clock) as w, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        monkeypatch.setattr(subprocess, 'Popen', exhausted)
        for _ in range(3):
            w.cycle()
        monkeypatch.setattr(subprocess, 'Popen', real)
        w.cycle()
        finish(w)
    assert len(caught) == 1 and 'Resource temporarily unavailable' in str(caught[0].message)
    assert repairs(docker) == [['start', 'core1']]


def test_interrupted_watch_container_leaves_no_thread_and_no_command(docker):
    play_stack(docker, [SIDE, line('core', 'exited', 'Exited (3) 1 second ago')], PLAIN, start={'hang': True})
    waiting = threading.Thread(target=lambda: eventually(lambda: repairs(docker)) and os.kill(os.getpid(), signal.SIGINT))
    waiting.start()
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        bc.watch_container(FAST)
    waiting.join()
    assert eventually(lambda: set(threading.enumerate()) <= before)


# -- the flag --------------------------------------------------------------------------------------------------------


def test_flag_that_is_raised_again_at_once_has_ended_the_watcher_all_the_same(docker):
    play_stack(docker, [SIDE], 'services: {side: {image: busybox}}')

    def toggle(_):
        bc.UP_FLAG.value = False
        bc.UP_FLAG.value = True

    thread = threading.Thread(target=bc._Watch(bc._Stack(FAST, toggle)).run)
    thread.start()
    thread.join(20)
    alive, bc.UP_FLAG.value = thread.is_alive(), False
    assert not alive


def test_flag_is_an_event_that_is_up_at_import_and_has_a_value():
    flag = bc.UpFlag()
    assert isinstance(bc.UP_FLAG, threading.Event) and flag.value is True and flag.is_set()
    flag.value = False
    assert flag.value is False and not flag.wait(0)
    flag.value = True
    assert flag.value is True


def test_lowering_the_flag_calls_whoever_waits_for_it_at_once_if_it_is_down_and_never_after_the_block():
    flag, calls = bc.UpFlag(), []
    with flag.when_lowered(lambda: calls.append('first')):
        flag.value = True
        assert calls == []
        flag.clear()
        assert calls == ['first']
        with flag.when_lowered(lambda: calls.append('second')):
            assert calls == ['first', 'second']
    flag.value = False
    assert calls == ['first', 'second']


# -- signals ---------------------------------------------------------------------------------------------------------


def test_first_signal_interrupts_and_further_ones_are_noted():
    bc.register()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    os.kill(os.getpid(), signal.SIGTERM)
    assert eventually(lambda: bc._Signals.noted == [signal.SIGTERM])
    bc._Signals.noted.clear()


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

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert errors == ['register() must be called in the main thread: Python handles signals there']


def test_called_without_a_signal_it_sends_the_kill_signal_to_this_process():
    bc.register(Settings(kill_signal=signal.SIGUSR1))
    with pytest.raises(KeyboardInterrupt):
        bc.flask_exit()
        time.sleep(60)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_in_a_request_the_shutdown_of_an_old_werkzeug_is_used():
    flask = pytest.importorskip('flask')
    calls = []
    app = flask.Flask(__name__)
    app.add_url_rule('/', 'end', lambda: bc.flask_exit() or 'bye')
    response = app.test_client().get('/', environ_overrides={'werkzeug.server.shutdown': lambda: calls.append('shutdown')})
    assert (response.status_code, calls) == (200, ['shutdown'])


def test_signal_that_the_kernel_gives_to_another_thread_ends_the_run_too(docker):
    play_stack(docker, [SIDE], 'services: {side: {image: busybox}}')
    code = """if True:
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
    environment = dict(os.environ, PYTHONPATH=str(HERE))
    assert subprocess.call([sys.executable, '-c', code], env=environment, timeout=30) == 0


# -- docker_compose and its parts, with a scripted docker ------------------------------------------------------------


def test_stop_ends_one_by_one_what_compose_cannot_then_kills_and_still_cleans_up(docker, caplog):
    lines = [line('core', 'running', 'Up 2 minutes'), SIDE]
    failing = {'code': 1, 'err': 'no way'}
    play_stack(docker, lines, PLAIN, compose_stop=failing, stop=failing, network_ls={'out': 'net1\n'})
    bc.stop_container(FAST)
    expected = [
        ['compose', 'stop'],
        ['stop', 'core1', 'side1'],
        ['kill', 'core1', 'side1'],
        ['rm', '--force', '--volumes', 'core1', 'side1'],
    ]
    assert repairs(docker)[:4] == expected
    assert ['network', 'rm', 'net1'] in docker.calls()
    assert not any('prune' in call for call in docker.calls())
    assert caplog.messages == [
        'docker compose stop: exit code 1: no way; stopping the containers one by one',
        'docker stop core1 side1: exit code 1: no way; killing the containers',
    ]


def test_stack_of_another_folder_with_the_same_project_name_is_not_ended(docker):
    other = SIDE.replace('side', 'other').replace('/shop', '/elsewhere')
    gone = line('gone', 'running', 'Up 2 minutes')  # not declared any more, but of this folder
    play_stack(docker, [SIDE, other, gone], PLAIN)
    bc.stop_container(FAST)
    assert ['stop', 'side1', 'gone1'] in docker.calls() and ['rm', '--force', '--volumes', 'side1', 'gone1'] in docker.calls()


def test_start_that_fails_before_the_first_container_leaves_no_network(docker):
    docker.play(compose_up={'code': 1, 'err': 'no such image'})
    with pytest.raises(ComposeError, match='no such image'), bc.docker_compose(FAST):
        raise AssertionError('entered')
    assert docker.calls()[-1] == ['compose', 'down']


def test_failed_clean_up_is_a_warning(docker):
    play_stack(docker, [SIDE], PLAIN, rm={'code': 1, 'err': 'no way'})
    with pytest.warns(ComposeWarning, match='the clean-up failed: docker rm'):
        bc.stop_container(FAST)


@pytest.mark.parametrize('once', [{'rm': 'No such container'}, {'network_rm': 'network net1 not found'}])
def test_clean_up_is_tried_again_for_somebody_else_may_have_removed_it(docker, caplog, once):
    plays = {command: {'code': 1, 'err': reason, 'once': True} for command, reason in once.items()}
    play_stack(docker, [SIDE], PLAIN, network_ls={'out': 'net1\n', 'once': 'network_rm' in once}, **plays)
    bc.stop_container(FAST)
    assert caplog.messages == []
    assert docker.calls().count(['rm', '--force', '--volumes', 'side1']) == 2
    assert docker.calls().count(['network', 'rm', 'net1']) == 1


def test_dangling_images_are_deleted_although_a_network_cannot_be(docker):
    play_stack(
        docker, [SIDE], PLAIN, network_ls={'out': 'net1\n'}, network_rm={'code': 1, 'err': 'in use'}, image_ls={'out': 'abc\n'}
    )
    with pytest.warns(ComposeWarning, match='the clean-up failed: docker network rm net1'):
        bc.stop_container(FAST)
    assert ['image', 'prune', '--force', '--filter=label=com.docker.compose.project=shop'] in docker.calls()


@pytest.mark.parametrize('prune, last', [('system', ['system', 'prune', '--volumes', '--force']), ('none', ['stop', 'side1'])])
def test_other_clean_ups(docker, prune, last):
    play_stack(docker, [SIDE], PLAIN)
    bc.stop_container(FAST._replace(prune=bc.Prune(prune)))
    assert docker.calls()[-1] == last


def test_longest_stop_grace_period_comes_on_top_of_the_timeout(docker):
    docker.play(inspect={'out': 'null\n120\n3\n'})
    assert shop().longest_grace(['a', 'b', 'c']) == 120
    docker.play(inspect={'out': 'null\n', 'code': 1})
    assert shop().longest_grace(['a']) == 10


@pytest.mark.parametrize('command, grace', [('stop', 30), ('restart', 30), ('start', 0)])
def test_stop_timeout_of_a_container_is_asked_for_only_when_the_time_is_up(docker, command, grace):
    docker.play(inspect={'out': '30\n'}, **{command: {'seconds': 1.5}})
    stack = bc._Stack(FAST._replace(timeout=1))
    with contextlib.ExitStack() if grace else pytest.raises(ComposeError, match='no answer within 1 s'):
        stack.docker(command, 'core1')
    asked = [['inspect', '--format', '{{json .Config.StopTimeout}}', 'core1']] if grace else []
    assert docker.calls() == [[command, 'core1'], *asked]
    docker.play()
    stack.docker(command, 'core1')
    assert docker.calls() == [[command, 'core1'], *asked, [command, 'core1']]


def test_time_that_the_question_for_the_stop_timeout_takes_counts(docker, monkeypatch):
    monkeypatch.setattr(bc, '_DEFAULT_GRACE', 1.5)
    docker.play(stop={'seconds': 3}, inspect={'hang': True})  # of the 2.5 seconds from the beginning, inspect takes one
    with pytest.raises(ComposeError, match='docker stop core1: no answer within 2.5 s'):
        bc._Stack(FAST._replace(timeout=1)).docker('stop', 'core1')


def test_grace_period_counts_although_a_container_cannot_be_unpaused(docker, caplog):
    lines = [line('core', 'paused', 'Up 2 minutes (Paused)'), SIDE]
    play_stack(docker, lines, PLAIN, unpause={'code': 1, 'err': 'gone'}, inspect={'out': '30\n'}, compose_stop={'seconds': 2.5})
    bc.stop_container(FAST._replace(timeout=2))
    assert caplog.messages == ['docker unpause core1: exit code 1: gone; stopping the stack nevertheless']


def test_stack_is_stopped_although_its_working_directory_is_gone(docker, tmp_path, monkeypatch):
    play_stack(docker, [SIDE], 'services: {side: {image: busybox}}')
    folder = tmp_path / 'release'
    folder.mkdir()
    monkeypatch.chdir(str(folder))
    with bc.docker_compose(FAST):
        os.chdir('/')
        folder.rmdir()
    assert ['rm', '--force', '--volumes', 'side1'] in docker.calls()


def test_called_without_a_signal_it_sends_the_kill_signal_that_is_handled_although_nothing_was_registered(docker):
    play_stack(docker, [SIDE], 'services: {side: {image: busybox}}')
    with pytest.raises(KeyboardInterrupt), bc.docker_compose(FAST._replace(kill_signal=signal.SIGUSR1)):
        bc.flask_exit()
        threading.Event().wait(20)
    assert ['rm', '--force', '--volumes', 'side1'] in docker.calls()


def test_clean_up_is_protected_although_the_body_has_changed_the_handlers(docker, monkeypatch):
    play_stack(docker, [SIDE], 'services: {side: {image: busybox}}')
    calls, stop = [], bc._Stack.stop

    def stop_interrupted(stack):
        os.kill(os.getpid(), signal.SIGTERM)
        stop(stack)

    def handler(signum, frame):
        calls.append(signum)

    monkeypatch.setattr(bc._Stack, 'stop', stop_interrupted)
    bc.register(FAST)
    with bc.docker_compose(FAST):
        signal.signal(signal.SIGTERM, handler)
    assert calls == [] and signal.getsignal(signal.SIGTERM) is handler
    assert ['rm', '--force', '--volumes', 'side1'] in docker.calls()


def test_flag_that_is_lowered_during_the_start_undoes_it(docker):
    play_stack(docker, [SIDE], PLAIN, compose_up={'hang': True})
    lowering = threading.Thread(
        target=lambda: eventually(lambda: ['compose', 'up', '--build', '--detach'] in docker.calls()) and bc.UP_FLAG.clear()
    )
    lowering.start()
    with pytest.raises(ComposeError, match='docker compose up: the flag was lowered'), bc.docker_compose(FAST):
        raise AssertionError('entered')
    lowering.join()
    assert ['rm', '--force', '--volumes', 'side1'] in docker.calls()


LEFT = """if True:
    import sys, threading, broapt_compose as bc
    settings = bc.Settings.load(settle=0, watcher=sys.argv[2], compose_command='docker compose', prune='none')
    def host():
        with bc.docker_compose(settings):
            entered.set()
            threading.main_thread().join()
            count = lambda: open(sys.argv[3]).read().count('"start"')
            before = count()
            while count() == before:
                pass
    if sys.argv[1] == 'thread':
        entered = threading.Event()
        threading.Thread(target=host).start()
        entered.wait()
    else:
        context = bc.docker_compose(settings)
        context.__enter__()
        threading.Event().wait(1)
"""


def test_host_whose_main_thread_has_ended_is_served_like_any_other(docker):
    play_stack(docker, [line('core', 'exited', 'Exited (3) 1 second ago')], 'services:\n  core:\n    image: busybox\n')
    command = [sys.executable, '-c', LEFT, 'thread', 'thread', str(docker.folder / 'calls')]
    assert subprocess.call(command, env=dict(os.environ, PYTHONPATH=str(HERE)), timeout=60) == 0
    assert ['start', 'core1'] in docker.calls() and ['compose', 'stop'] in docker.calls()


@pytest.mark.parametrize('watcher', ['thread', 'process'])
def test_host_that_ends_without_leaving_the_context_does_not_hang(docker, watcher):
    play_stack(docker, [SIDE], 'services: {side: {image: busybox}}')
    command = [sys.executable, '-c', LEFT, 'main', watcher]
    subprocess.call(command, env=dict(os.environ, PYTHONPATH=str(HERE)), timeout=60)


def test_failed_start_is_undone_and_its_error_comes_out(docker):
    play_stack(docker, [SIDE], PLAIN, compose_up={'code': 17, 'err': 'Error: no such image'})
    docker_ps = docker.calls
    with pytest.raises(ComposeError, match='docker compose up --build --detach: exit code 17: Error: no such image'):
        with bc.docker_compose(FAST._replace(prune=bc.Prune.NONE)):
            raise AssertionError('entered')
    assert ['compose', 'stop'] in docker_ps() and not bc.UP_FLAG.value


def test_what_the_engine_ends_only_after_its_start_was_cancelled_is_removed_too(docker):
    docker.play(compose_up={'hang': True}, compose_config={'out': PLAIN})

    def lower():
        assert eventually(lambda: ['compose', 'up', '--build', '--detach'] in docker.calls())
        bc.UP_FLAG.value = False
        threading.Event().wait(0.3)
        play_stack(docker, [SIDE], PLAIN)

    lowering = threading.Thread(target=lower)
    lowering.start()
    with pytest.raises(ComposeError, match='the flag was lowered'), bc.docker_compose(FAST):
        raise AssertionError('entered')
    lowering.join()
    assert ['rm', '--force', '--volumes', 'side1'] in docker.calls()


def test_watcher_process_is_there_before_the_body_begins(docker):
    play_stack(docker, [SIDE], 'services: {side: {image: busybox}}')
    with bc.docker_compose(FAST._replace(watcher=bc.Watcher.PROCESS)):
        assert len(multiprocessing.active_children()) == 1


def test_what_the_body_raises_comes_out_even_if_the_stop_fails(docker):
    play_stack(docker, [SIDE, line('core', 'running', 'Up 1 second')], PLAIN, compose_stop={'code': 1}, stop={'code': 1},
               kill={'code': 1})  # fmt: skip
    with pytest.warns(ComposeWarning, match='the stack could not be stopped: docker kill'):
        with pytest.raises(ZeroDivisionError):
            with bc.docker_compose(FAST._replace(prune=bc.Prune.NONE)):
                raise ZeroDivisionError


def test_nothing_is_stopped_if_it_fails_before_the_first_up(docker):
    docker.play(compose={'code': 15, 'err': 'yaml: line 3: no'})
    with pytest.raises(ComposeError, match='yaml: line 3: no'):
        with bc.docker_compose(FAST):
            raise AssertionError('entered')
    assert docker.calls() == [['compose', 'config']]


def test_lowered_flag_cancels_a_repair_that_hangs(docker):
    lines = [line('core', 'exited', 'Exited (3) 1 second ago'), SIDE]
    play_stack(docker, lines, PLAIN, start={'hang': True})
    with bc.docker_compose(FAST._replace(prune=bc.Prune.NONE)):
        assert eventually(lambda: ['start', 'core1'] in docker.calls())
    assert repairs(docker)[-2:] == [['compose', 'stop'], ['stop', 'side1']]


# -- the command line ------------------------------------------------------------------------------------------------


def run_module(*arguments, **kwargs):
    environment = dict(os.environ, PYTHONPATH=str(HERE), **kwargs.pop('env', {}))
    return subprocess.run([sys.executable, '-m', 'broapt_compose', *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, env=environment, stdin=subprocess.DEVNULL, timeout=120, **kwargs)  # fmt: skip


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['-i', '0'], "--interval: '0' is not a number of seconds greater than 0"),
        (['-s', 'KILL', 'check'], "--signal: 'KILL' is not a signal such as 15, TERM or SIGTERM, other than KILL and STOP"),
        (['-f', '/none'], "--file: ['/none'] is not a readable file (/none: No such file or directory)"),
        (['status', '--prune', 'all'], "--prune: 'all' is not project, system or none"),
        (['status', '--dry-run'], '--dry-run goes with check, --json with status; --help lists what is accepted'),
        (['--nonsense'], 'unrecognized arguments: --nonsense; --help lists what is accepted'),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(arguments, message):
    result = run_module(*arguments)
    assert (result.returncode, result.stdout, result.stderr) == (2, '', 'broapt_compose: {}\n'.format(message))


@pytest.mark.parametrize('command', ['run', 'check', 'status'])
def test_docker_that_fails_is_one_line_and_exit_code_1(docker, command):
    docker.play(compose_ps={'code': 1, 'err': 'permission denied while trying to connect\n'})
    result = run_module(command, env={'PATH': str(docker.folder)})
    assert (result.returncode, result.stdout) == (1, '')
    assert result.stderr.endswith('docker compose ps --all --quiet: exit code 1: permission denied while trying to connect\n')
    assert len(result.stderr.splitlines()) == 1
    (docker.folder / 'docker').unlink()
    result = run_module(command, env={'PATH': str(docker.folder)})
    assert (result.returncode, result.stderr) == (1, 'broapt_compose: docker --version: command not found\n')


def test_status_is_an_aligned_table_with_a_row_for_what_is_missing(docker):
    play_stack(docker, [line('core', 'exited', 'Exited (137) 5 seconds ago')], PLAIN)
    result = run_module('status')
    assert result.returncode == 1
    assert result.stdout == textwrap.dedent("""\
        SERVICE  CONTAINER    STATE         HEALTH  SINCE
        core     shop-core-1  exited (137)  -       5 seconds
        side     -            missing       -       -
        """)


def test_status_has_a_row_for_what_waits_for_the_network_of_another(docker):
    play_stack(docker, [line('core', 'exited', 'Exited (137) 5 seconds ago')], PLAIN + '    network_mode: service:core\n')
    assert run_module('status').stdout.splitlines()[2].split() == ['side', '-', 'missing', '-', '-']


def test_status_as_json(docker):
    play_stack(docker, [SIDE, line('core', 'running', 'Up 5 seconds (healthy)')], PLAIN)
    result = run_module('status', '--json')
    document = json.loads(result.stdout)
    assert (result.returncode, document['project'], document['ok']) == (0, 'shop', True)
    assert document['containers'][0] == {
        'service': 'core', 'container': 'shop-core-1', 'id': 'core1', 'state': 'running', 'health': 'healthy',
        'since': '5 seconds', 'watched': True, 'fault': False,
    }  # fmt: skip


@pytest.mark.parametrize('arguments', [['status'], ['status', '--json'], ['check', '--dry-run']], ids=' '.join)
def test_closed_standard_output_is_no_matter(docker, arguments):
    play_stack(docker, [SIDE], 'services: {side: {image: busybox}}')
    command = ['/bin/sh', '-c', '"$@" >&-', 'sh', sys.executable, str(MODULE), *arguments]
    result = subprocess.run(command, stderr=subprocess.PIPE, timeout=60)
    assert (result.returncode, result.stderr) == (0, b'')


def test_check_dry_run_says_what_would_be_done_and_does_nothing(docker):
    play_stack(docker, [line('core', 'paused', 'Up 5 seconds (Paused)')], PLAIN)
    result = run_module('check', '--dry-run')
    assert result.returncode == 0
    assert result.stdout == (
        'core: paused: would run `docker unpause core1`\n'
        'side: missing: would run `docker compose up --detach --no-recreate --no-deps side`\n'
    )
    assert repairs(docker) == []
    play_stack(docker, [line('core', 'running', 'Up 5 seconds'), SIDE], PLAIN)
    assert run_module('check', '--dry-run').stdout == 'core: running: nothing to do\nside: running: nothing to do\nall is well\n'


def test_check_repairs_and_tells_by_its_exit_code_whether_it_could(docker):
    play_stack(docker, [line('core', 'paused', 'Up 5 seconds (Paused)'), SIDE], PLAIN)
    result = run_module('check', '--settle', '0.1')
    assert (result.returncode, result.stdout) == (0, '')
    assert 'core: paused -> unpaused' in result.stderr
    play_stack(docker, [line('core', 'paused', 'Up 5 seconds (Paused)'), SIDE], PLAIN, unpause={'code': 1, 'err': 'no'})
    assert run_module('check', '--settle', '0').returncode == 1
    assert repairs(docker) == [['unpause', 'core1']] * 2


def test_check_that_is_interrupted_ends_the_repair_under_way(docker):
    play_stack(docker, [line('core', 'paused', 'Up 5 seconds (Paused)'), SIDE], PLAIN, unpause={'hang': True})
    check = subprocess.Popen([sys.executable, str(MODULE), 'check', '--settle', '0', '--timeout', '999'])
    assert eventually(lambda: repairs(docker) == [['unpause', 'core1']])
    check.send_signal(signal.SIGINT)
    assert check.wait(100) == 1


def test_help_tells_what_each_option_means_and_its_default():
    text = ' '.join(run_module('--help').stdout.split())
    assert '--settle SETTLE how long a fault must last before it is repaired, seconds (default: 1)' in text
    assert text.count('(default: ') == len(Settings._fields) and 'default: )' not in text


def test_module_documents_itself():
    for name in bc.__all__:
        assert getattr(bc, name).__doc__, name
    text = subprocess.check_output([sys.executable, '-m', 'pydoc', 'broapt_compose'], cwd=str(HERE), universal_newlines=True)
    assert 'BROAPT_COMPOSE_COMMAND' in text and Action.__doc__ and Verb.__doc__


# -- on a real engine: what is used by all of these tests ------------------------------------------------------------

COMPOSE = {'Compose 1.29': ('docker-compose',), 'Compose 2': ('docker', 'compose')}
ROUNDS = int(os.environ.get('BROAPT_TEST_ROUNDS', '2'))  # of each thing that people do by hand
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
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, timeout=120,
                            stdin=subprocess.DEVNULL, **kwargs)  # fmt: skip
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
                children.setdefault(int(file.read().rpartition(')')[2].split()[1]), []).append(int(entry))
    found = children.get(pid, [])
    for child in found:
        found.extend(children.get(child, []))
    return found


class Project:
    """A Compose project of its own on the real engine."""

    def __init__(self, folder, compose, environment=None):
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
        given = {'settle': 0, 'interval': 5, 'compose_command': (*self.compose_command, '-p', self.name), **given}
        return Settings.load(docker_compose=[str(self.file)], **given)

    def options(self, *more):
        """The same for the command line."""
        command = ' '.join(map(shlex.quote, [*self.compose_command, '-p', self.name]))
        return ['--file', str(self.file), '--compose-command', command, '--settle', '0', '--interval', '5', *more]

    @contextlib.contextmanager
    def watchdog(self, *options, start=(sys.executable, str(MODULE), 'run'), code=0):
        """Run the stack under the watchdog, in a process of its own; at the end see it exit as it should."""
        with Host([*start, *self.options(*options)], self.folder / 'log', env=self.environment) as host:
            assert host.says('the stack is up', seconds=60), host.log()
            yield host
            host.process.terminate()
            assert host.process.wait(60) == code, host.log()
            assert self.ids() == []

    def ids(self, *services):
        """Ids of all containers of these services, the oldest first; of all services if none is named."""
        form = '{{.ID}} {{.Label "com.docker.compose.service"}}'
        pairs = map(str.split, reversed(self.docker('ps', '-a', '--no-trunc', self.filter, '--format', form).splitlines()))
        return [ident for ident, service in pairs if not services or service in services]

    def look(self):
        """Return id -> (service, state, start time, restarts) of all containers."""
        ids = self.ids()
        labels = '{{index .Config.Labels "com.docker.compose.service"}}'
        form = '{{.Id}} ' + labels + ' {{.State.Status}} {{.State.StartedAt}} {{.RestartCount}}'
        lines = self.docker('inspect', '--format', form, *ids, code=None).splitlines() if ids else []  # one may be gone
        return {line.split()[0]: tuple(line.split()[1:]) for line in lines}

    def is_well(self, services=('core', 'far', 'once', 'pair', 'pair', 'side', 'well')):
        """Whether all runs that should: each service as often as it is named, and what runs once has ended."""
        shown = sorted((service, state) for service, state, *_ in self.look().values() if service != 'alone')
        return shown == [(service, 'exited' if service == 'once' else 'running') for service in services]

    def remove(self):
        for ident in self.ids():
            subprocess.run(
                ['docker', 'rm', '-fv', ident], env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        for kind in ('network', 'volume'):
            for name in self.docker(kind, 'ls', '-q', self.filter).split():
                self.docker(kind, 'rm', name)
        assert self.ids() == []


@pytest.fixture(scope='session')
def engine():
    """Make sure that there is an engine, or skip; with BROAPT_TEST_DOCKER=required, fail."""
    for command in (['docker', 'image', 'inspect', 'busybox'], *[[*compose, 'version'] for compose in COMPOSE.values()]):
        try:
            call(*command)
        except (AssertionError, OSError) as error:
            reason = 'no Docker engine with busybox and both Compose generations: {}'.format(error)
            (pytest.fail if os.environ.get('BROAPT_TEST_DOCKER') == 'required' else pytest.skip)(reason)


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


# -- on a real engine: repairs ---------------------------------------------------------------------------------------


# Each generation of Compose and each kind of watcher, but not each with each: that takes minutes and shows no more.
CROSSED = [('Compose 1.29', 'thread'), ('Compose 2', 'process'), ('Compose 2', 'thread')]


@pytest.fixture(scope='module', params=CROSSED, ids=' '.join)
def watched(request, engine, tmp_path_factory):
    """A stack under the watchdog, for one fault after the other."""
    project = Project(tmp_path_factory.mktemp('stack'), COMPOSE[request.param[0]]).write(STACK)
    try:
        with project.watchdog('--watcher', request.param[1], '--interval', '3600') as host:  # nothing but the events wakes it
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
    'one in the network of another removed': (['far'], lambda p: p.docker('rm', '-f', *p.ids('far'))),
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
    assert eventually(lambda: watched.is_well() and (fault == 'paused' or watched.look() != before), 60), (
        watched.look(),
        watched.log(),
    )
    after = watched.look()
    for ident, container in before.items():
        if container[0] not in concerned or fault == 'paused':
            assert after.get(ident) == container
    far = watched.ids('far')
    assert eventually(lambda: 'eth0' in watched.docker('exec', *watched.ids('far'), 'cat', '/proc/net/dev', code=None)), far
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
    assert (dry.returncode, project.look()) == (0, before)
    assert dry.stdout == 'core: running: nothing to do\nside: created: would run `docker start {}`\n'.format(*project.ids('side'))
    result = run_module('check', *project.options())
    assert (result.returncode, result.stdout) == (0, '')
    assert result.stderr.count('side: created -> started (') == 1
    after = project.look()
    assert sorted(after) == sorted(before) and [state for _, state, *_ in after.values()] == ['running', 'running']
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
    assert table[0].split() == ['SERVICE', 'CONTAINER', 'STATE', 'HEALTH', 'SINCE']
    assert [row.split()[:3:2] for row in table[1:]] == [['core', 'running'], ['side', 'running']]


@needs_docker
def test_unhealthy_container_is_left_alone_if_told_so(project_2):
    project = project_2.write(STACK)
    with project.watchdog('--unhealthy', 'ignore'):
        before = project.look()
        sicken(project)
        form = '{{.State.Health.Status}}'
        assert eventually(lambda: project.docker('inspect', '--format', form, *project.ids('well')) == 'unhealthy\n')
        project.docker('pause', *project.ids('core'))  # by its repair the watchdog shows that it has looked since
        assert eventually(lambda: project.look() == before)


@needs_docker
def test_healthy_container_is_not_restarted_because_it_was_paused(project_2):
    """From the pause on, until the next probe an hour later, Docker calls it unhealthy."""
    project = project_2.write(PAIR.replace('image', "healthcheck: {test: 'true', interval: 1h}, image", 1))
    with project.watchdog() as watchdog:
        before = project.look()
        project.docker('pause', *project.ids('core'))
        assert watchdog.says('core: paused -> unpaused')
        assert 'unhealthy' in project.docker('ps', project.filter)
        project.docker('kill', *project.ids('side'))  # by its repair the watchdog shows that it has looked since
        assert watchdog.says('side: exited (137) -> started')
        assert project.look()[project.ids('core')[0]] == before[project.ids('core')[0]] and 'restarted' not in watchdog.log()


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
                ident for ident, (service, *_) in project.look().items() if service == 'core' and ident != project.ids('core')[0]
            ]
            assert len(one_offs) == 2
            project.docker('kill', *project.ids('alone'), *other.ids('core'))
            project.docker('pause', *other.ids('side'), *one_offs[1:])
            strangers = {**other.look(), **{ident: project.look()[ident] for ident in [*one_offs, *project.ids('alone')]}}
            project.docker('kill', *project.ids('side'))
            assert eventually(lambda: [state for service, state, *_ in project.look().values() if service == 'side'] == ['running'])
            assert {**other.look(), **{ident: project.look()[ident] for ident in [*one_offs, *project.ids('alone')]}} == strangers
            project.docker('unpause', *one_offs[1:])
            project.docker('rm', '-f', *one_offs)
        assert sorted(state for _, state, *_ in other.look().values()) == ['exited', 'paused']
    finally:
        other.remove()


@needs_docker
def test_crash_loop_is_told_and_spread_while_neighbours_are_repaired_as_promptly_as_ever(project_2):
    project = project_2.write(PAIR + "  loop: {image: busybox, command: sh -c 'exit 7', restart: 'no'}\n")
    with project.watchdog() as watchdog:
        assert watchdog.says('for the 4th time', seconds=30)
        before = project.look()
        project.docker('kill', *project.ids('side'))
        assert watchdog.says('side: exited (137) -> started', seconds=3)
        assert project.look()[project.ids('core')[0]] == before[project.ids('core')[0]]
        log = watchdog.log()
    assert 'WARNING loop: crash loop, exited (7) for the 3rd time in ' in log and 'next try in 2 s' in log
    assert log.count('loop: exited (7) -> started') <= 5


@needs_docker
def test_container_that_docker_restarts_is_left_to_docker(project_2):
    project = project_2.write(PAIR + "  loop: {image: busybox, command: sh -c 'sleep 0.2; exit 7', restart: always}\n")
    with project.watchdog() as watchdog:
        assert eventually(lambda: int(project.look()[project.ids('loop')[0]][3]) >= 5)
        assert 'loop:' not in watchdog.log()


# -- on a real engine: people at work --------------------------------------------------------------------------------

BY_HAND = {
    'docker restart': lambda p: p.docker('restart', '-t', '1', *p.ids('core')),
    'docker commit': lambda p: p.docker('rmi', p.docker('commit', *p.ids('side')).strip()),
    'force-recreate': lambda p: p.compose('up', '-d', '--force-recreate', 'side'),
    'scale up and down': lambda p: (p.compose('up', '-d', '--scale', 'pair=4'), p.compose('up', '-d', '--scale', 'pair=2')),
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


# -- on a real engine: the end ---------------------------------------------------------------------------------------

STORE = PAIR.replace('image', "volumes: [/anonymous, 'named:/named'], image", 1) + 'volumes: {named: {}}\n'


def make_dangling_image(*labels):
    """Return the id of an image without a name."""
    changes = [part for label in labels for part in ('--change', 'LABEL ' + label)]
    archive = subprocess.Popen(['tar', 'c', '--files-from', '/dev/null'], stdout=subprocess.PIPE)
    made = subprocess.check_output(['docker', 'import', *changes, '-'], stdin=archive.stdout, universal_newlines=True)
    archive.communicate()
    return made.strip()


def list_belongings(project):
    """Return the ids or names of the project's containers, their volumes and its networks."""
    volumes = project.docker('inspect', '--format', '{{range .Mounts}}{{.Name}} {{end}}', *project.ids()).split()
    return {*project.ids(), *volumes, *project.docker('network', 'ls', '-q', '--no-trunc', project.filter).split()}


def existing(names):
    return {
        name
        for name in names
        if not subprocess.call(['docker', 'inspect', name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    }


@needs_docker
@pytest.mark.parametrize('prune', ['project', 'none'])
def test_clean_up_deletes_what_belongs_to_the_project_and_nothing_else(project, tmp_path_factory, prune):
    other = Project(tmp_path_factory.mktemp('other'), project.compose_command).write(STORE)
    project.write(STORE)
    label = 'com.docker.compose.project='
    images = [make_dangling_image(label + project.name), make_dangling_image(label + other.name), make_dangling_image('a=b')]
    names = [project.name + suffix for suffix in ('-container', '-volume', '-network')]
    try:
        other.compose('up', '-d')
        other.compose('stop')
        other.compose('run', '-d', 'core', 'true')
        project.docker('run', '--network', 'none', '--name', names[0], '-v', names[1] + ':/data', 'busybox', 'true')
        project.docker('network', 'create', names[2])
        strangers = list_belongings(other) | {*names, *images[1:]}
        with bc.docker_compose(project.settings(prune=prune)):
            belongings = list_belongings(project) | {images[0]}
            assert len(belongings) == 6  # two containers, two volumes, a network, an image
        assert existing(strangers) == strangers
        assert existing(belongings) == (belongings if prune == 'none' else {project.name + '_named'})
    finally:
        other.remove()
        project.docker('rm', '-f', names[0], code=None)
        project.docker('volume', 'rm', names[1], code=None)
        project.docker('network', 'rm', names[2], code=None)
        project.docker('rmi', '-f', *images, code=None)


@needs_docker
def test_image_that_a_rebuild_left_dangling_is_deleted_but_the_new_one_stays(project_2):
    project = project_2.write('services:\n  core: {build: ., command: sleep 10000, stop_signal: SIGKILL}\n')
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
    command = 'sh -c \'trap "sleep 5; echo in time > /out/end; exit" TERM; while :; do sleep 0.1; done\''
    slow = 'services:\n  core: {{image: busybox, command: {}, stop_grace_period: 1m, volumes: [".:/out"]}}\n'
    project.write(slow.format(json.dumps(command)))
    with bc.docker_compose(project.settings(timeout=4)):
        assert len(project.ids()) == 1
    assert (project.folder / 'end').read_text() == 'in time\n'
    assert project.ids() == []


@needs_docker
def test_stack_ends_gracefully_although_its_file_is_broken_by_then_or_lacks_a_service(project_2):
    command = 'sh -c \'trap "echo in time > /out/$0; exit" TERM; while :; do sleep 0.1; done\' {}'
    service = "  {}: {{image: busybox, command: {}, volumes: ['.:/out']}}\n"
    whole = 'services:\n' + ''.join(service.format(name, json.dumps(command.format(name))) for name in ('core', 'side'))
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
    with project.write(text.replace('N', '3')).watchdog('--settle', '1') as watchdog:  # people are at work
        project.write(text.replace('N', '1')).compose('up', '-d')
        project.docker('pause', *project.ids('side'))
        assert watchdog.says('side: paused -> unpaused')
        project.write(text.replace('N', '2')).compose('up', '-d')
        project.docker('rm', '-f', *project.ids('side'))
        assert watchdog.says('side: missing -> created')
        assert eventually(lambda: len(project.ids('core')) == 2) and 'crash loop' not in watchdog.log()


@needs_docker
def test_start_that_fails_is_undone_and_the_stack_can_be_entered_again(project):
    project.write(PAIR + '  bad: {image: busybox, command: /no/such/program}\n')
    with pytest.raises(ComposeError, match='/no/such/program') as caught, bc.docker_compose(project.settings()):
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
        project.write(PAIR.replace('side: {image: busybox', 'side: {build: .'))
        project.docker('rm', '-f', *project.ids('side'))
        assert eventually(lambda: any(' up --detach' in command_line(pid) for pid in descendants(watchdog.process.pid)))


@needs_docker
@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT], ids=lambda signum: signum.name)
def test_signal_at_any_moment_ends_in_a_complete_clean_up_and_exit_code_0(project_2, signum):
    project, chance = project_2.write(PAIR), random.Random(int(signum))
    for _ in range(ROUNDS):
        with Host([sys.executable, str(MODULE), '--verbose', *project.options()], project.folder / 'log') as host:
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
@pytest.mark.parametrize('watcher', ['thread', 'process'])
def test_ctrl_c_in_a_terminal_ends_all_in_order(project, watcher):
    import pty

    project.write(PAIR)
    pid, terminal = pty.fork()
    if not pid:
        os.execv(sys.executable, [sys.executable, str(MODULE), *project.options('--watcher', watcher)])
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


# -- on a real engine: deaths ----------------------------------------------------------------------------------------


def command_line(pid):
    try:
        with open('/proc/{}/cmdline'.format(pid), 'rb') as file:
            return file.read().replace(b'\0', b' ').decode()
    except OSError:
        return ''


def find_streams(host):
    """Return the ids of the `docker events` that run for the host."""
    return [pid for pid in descendants(host.process.pid) if 'docker events' in command_line(pid)]


@needs_docker
def test_watcher_process_that_is_killed_comes_back_with_a_warning(project_2):
    project = project_2.write(PAIR)
    with project.watchdog('--watcher', 'process', '--interval', '3600') as watchdog:
        for lines in (1, 2):
            assert eventually(lambda: find_streams(watchdog))
            watcher = next(pid for pid in descendants(watchdog.process.pid) if find_streams(watchdog)[0] in descendants(pid))
            os.kill(watcher, signal.SIGKILL)
            project.docker('kill', *project.ids('core'))
            assert watchdog.says('WARNING the watcher process has died (exit code -9); starting it again', lines, 3)
            assert watchdog.says('core: exited (137) -> started', lines)


@needs_docker
@pytest.mark.parametrize('watcher', ['thread', 'process'])
def test_host_that_is_killed_leaves_no_watcher_and_the_containers_as_they_are(project_2, watcher):
    project = project_2.write(PAIR)
    command = [sys.executable, str(MODULE), *project.options('--watcher', watcher)]
    with Host(command, project.folder / 'log') as host:
        assert eventually(lambda: find_streams(host))
        before, pids, streams = project.look(), descendants(host.process.pid), find_streams(host)
        host.process.kill()
        host.process.wait()
        assert eventually(lambda: all(gone(pid) for pid in set(pids) - set(streams)), 2.5)
        assert project.look() == before
        left = [command_line(pid).split() for pid in streams if not gone(pid)]
        limit = (datetime.datetime.utcnow() + datetime.timedelta(seconds=60)).isoformat()
        assert all(words[words.index('--until') + 1] < limit for words in left)  # where Docker itself ends it
    with project.watchdog():  # a new one takes over
        assert project.look() == before


# -- on a real engine: outages, and other engines --------------------------------------------------------------------


class Engine:
    """A second Docker engine, which a test may stop, kill and reach by other ways; it leaves the first one alone."""

    def __init__(self, options=(), scheme='unix'):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix='bt'))  # a socket's path has to be short
        self.bridge = self.folder.name[:15]
        self.options = [
            '--bridge=' + self.bridge,
            '--iptables=false',
            '--default-address-pool=base=10.233.128.0/17,size=24',
            *options,
        ]
        for option in ('data-root', 'exec-root', 'pidfile'):
            self.options += ['--{}={}'.format(option, self.folder / option)]
        socket_path = 'unix://{}'.format(self.folder / 'socket')
        self.environment = dict(os.environ, DOCKER_HOST=socket_path)
        self.options += ['--host=' + socket_path]
        self.process = None

    def start(self):
        containerd = self.folder / 'exec-root' / 'containerd' / 'containerd.pid'
        if containerd.exists():  # of a dockerd that was killed, and takes a zombie for alive
            assert eventually(lambda: not os.path.exists('/proc/' + containerd.read_text()))
        with (self.folder / 'log').open('a') as log:
            self.process = subprocess.Popen(['dockerd', *self.options], stdout=log, stderr=log, start_new_session=True)
        answers = ['docker', 'info']
        quiet = {'env': self.environment, 'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}
        assert eventually(lambda: subprocess.call(answers, **quiet) == 0, 60), (self.folder / 'log').read_text()[-2000:]

    def end(self, signum):
        self.process.send_signal(signum)
        self.process.wait(60)

    def __enter__(self):
        try:
            call('ip', 'link', 'add', self.bridge, 'type', 'bridge')
            call('ip', 'address', 'add', '10.233.0.1/24', 'dev', self.bridge)
            call('ip', 'link', 'set', self.bridge, 'up')
            self.start()
            saved = self.folder / 'busybox.tar'
            call('docker', 'save', '--output', str(saved), 'busybox')
            call('docker', 'load', '--input', str(saved), env=self.environment)
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
            for mount in sorted((line.split()[1] for line in file if str(self.folder) in line), reverse=True):
                call('umount', '--lazy', mount, code=None)
        shutil.rmtree(str(self.folder), ignore_errors=True)


@needs_docker
@pytest.mark.parametrize(
    'signum, options', [(signal.SIGTERM, ()), (signal.SIGKILL, ('--live-restore',))], ids=['stopped', 'killed with live-restore']
)
def test_outage_of_the_engine_is_told_once_and_all_runs_soon_after_its_end(engine, tmp_path, signum, options):
    with Engine(options) as second:
        project = Project(tmp_path, COMPOSE['Compose 2'], second.environment).write(STACK)
        with project.watchdog('--interval', '1') as watchdog:
            assert eventually(lambda: find_streams(watchdog))
            before = watchdog.log()
            second.end(signum)
            assert watchdog.says('WARNING Docker does not answer; trying again every 1 s: docker ')
            looks = threading.Event()
            assert not looks.wait(3)  # it tries some times more, in silence
            second.start()
            assert watchdog.says('INFO Docker answers again, after ')
            assert eventually(project.is_well), (project.look(), watchdog.log())
            assert eventually(lambda: find_streams(watchdog))
            project.docker('pause', *project.ids('core'))
            assert watchdog.says('core: paused -> unpaused')
            told = watchdog.log()[len(before) :]
        assert (told.count('WARNING'), told.count('answers again')) == (1, 1)
        assert len(told.splitlines()) < 20 and 'Traceback' not in told


def free_port():
    with contextlib.closing(socket.socket()) as sock:
        sock.bind(('127.0.0.1', 0))
        return sock.getsockname()[1]


def see_a_repair(project):
    """See the watchdog start what was killed, and exit in order."""
    with project.write(PAIR).watchdog() as watchdog:
        project.docker('kill', *project.ids('core'))
        assert watchdog.says('core: exited (137) -> started'), watchdog.log()


@needs_docker
def test_engine_behind_a_tcp_port_or_a_context_is_watched_like_any_other(engine, tmp_path):
    host = 'tcp://127.0.0.1:{}'.format(free_port())
    with Engine(['--host=' + host, '--tls=false']) as second:
        see_a_repair(Project(tmp_path, COMPOSE['Compose 1.29'], dict(os.environ, DOCKER_HOST=host)))
        environment = dict(os.environ, DOCKER_CONFIG=str(tmp_path / 'config'))
        call('docker', 'context', 'create', 'second', '--docker', 'host=' + second.environment['DOCKER_HOST'], env=environment)
        environment['DOCKER_CONTEXT'] = 'second'
        see_a_repair(Project(tmp_path, COMPOSE['Compose 2'], environment))


def make_certificates(folder):
    """Make what both sides of a TLS connection need, under the names that `docker` looks for."""
    (folder / 'san').write_text('subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n')
    new = ['openssl', 'req', '-newkey', 'rsa:2048', '-nodes', '-subj']
    call(*new, '/CN=ca', '-x509', '-keyout', 'ca-key.pem', '-out', 'ca.pem', cwd=str(folder))
    call(*new, '/CN=both', '-keyout', 'key.pem', '-out', 'request', cwd=str(folder))
    sign = ['openssl', 'x509', '-req', '-in', 'request', '-CA', 'ca.pem', '-CAkey', 'ca-key.pem', '-CAcreateserial']
    call(*sign, '-extfile', 'san', '-out', 'cert.pem', cwd=str(folder))


@needs_docker
def test_engine_that_wants_client_certificates_is_watched_like_any_other(engine, tmp_path):
    make_certificates(tmp_path)
    port = free_port()
    files = [
        '--tls{}={}'.format(kind, tmp_path / name)
        for kind, name in (('cacert', 'ca.pem'), ('cert', 'cert.pem'), ('key', 'key.pem'))
    ]
    with Engine(['--tlsverify', *files, '--host=tcp://127.0.0.1:{}'.format(port)]):
        environment = dict(os.environ, DOCKER_HOST='tcp://127.0.0.1:{}'.format(port))
        for name in ('REQUESTS_CA_BUNDLE', 'CURL_CA_BUNDLE'):  # they come before DOCKER_CERT_PATH for Compose 1.29
            environment.pop(name, None)
        assert b'client' in subprocess.run(['docker', 'ps'], env=environment, stderr=subprocess.PIPE).stderr.lower()
        environment.update(DOCKER_TLS_VERIFY='1', DOCKER_CERT_PATH=str(tmp_path))
        for compose in COMPOSE.values():
            see_a_repair(Project(tmp_path, compose, environment))


# -- on a real engine: hosts, service manager, packages --------------------------------------------------------------

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
    missing = pytest.mark.skipif(importlib.util.find_spec('flask') is None, reason='Flask is not installed')
    return [
        pytest.param(sys.executable, id='this', marks=missing),
        pytest.param(old, id='3.6', marks=pytest.mark.skipif(not old, reason=reason)),
    ]


@contextlib.contextmanager
def run_broapt(project, python, **const):
    """Run a Flask server as BroAPT does, with a copy of the module beside its const; it has to end with 0 and leave nothing."""
    shutil.copy(str(MODULE), str(project.folder / 'compose.py'))
    project.file.rename(project.folder / 'stack.yml')  # a name that Compose does not find by itself
    project.file = project.folder / 'stack.yml'
    values = {'DOCKER_COMPOSE': str(project.file), 'INTERVAL': 5, 'KILL_SIGNAL': 15}
    (project.folder / 'const.py').write_text(''.join('{} = {!r}\n'.format(*item) for item in values.items()))
    port = free_port()
    (project.folder / 'broaptd.py').write_text(HOST.format(port=port))
    environment = dict(os.environ, COMPOSE_PROJECT_NAME=project.name, BROAPT_SETTLE='0')
    environment.update(const, BROAPT_COMPOSE_COMMAND=' '.join(project.compose_command))
    address = 'http://127.0.0.1:{}/'.format(port)
    with Host([python, 'broaptd.py'], project.folder / 'log', cwd=str(project.folder), env=environment) as host:
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
def test_flask_server_of_broapt_ends_in_order_in_the_middle_of_a_repair(project_2, python, compose, watcher):
    project = project_2
    project.compose_command = COMPOSE[compose]
    with run_broapt(project.write(PAIR), python, BROAPT_WATCHER=watcher) as (host, _):
        project.docker('kill', *project.ids('core'))
        assert eventually(lambda: [state for _, state, *_ in project.look().values()] == ['running'] * 2)
        project.docker('rm', '-f', *project.ids('side'))
        assert eventually(lambda: any(' up --detach' in command_line(pid) for pid in descendants(host.process.pid)))
        host.process.terminate()


@needs_docker
@pytest.mark.parametrize('python', list_flask_pythons())
def test_flask_view_may_end_the_server(project_2, python):
    with run_broapt(project_2.write(PAIR), python) as (_, address):
        with contextlib.suppress(OSError, http.client.HTTPException):  # the newer servers end before the answer does
            urllib.request.urlopen(address + 'exit').read()


METHOD = """
import multiprocessing, os, sys, threading
import broapt_compose as bc

if __name__ == '__main__':
    multiprocessing.set_start_method(sys.argv[1])
    settings = bc.Settings.load(docker_compose=sys.argv[2], interval=3600, settle=0, watcher='process',
                                compose_command=sys.argv[3])
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
    arguments = [sys.executable, str(project.folder / 'host.py'), method, str(project.file), command]
    environment = dict(os.environ, PYTHONPATH=str(HERE))
    with Host(arguments, project.folder / 'log', env=environment, stdin=subprocess.PIPE) as host:
        assert host.says('up\n', seconds=60), host.log()
        project.docker('kill', *project.ids('core'))
        assert eventually(lambda: [state for _, state, *_ in project.look().values()] == ['running'] * 2)
        host.process.communicate(b'\n', 60)
        assert host.process.returncode == 0 and host.log().endswith('watcher gone []\n'), host.log()
        assert project.ids() == []


@contextlib.contextmanager
def service_manager(address):
    """Listen as systemd does; give a function that collects messages until one has come that contains a text."""
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
def test_service_manager_is_told_what_goes_on_and_is_fed_by_completed_checks_only(project_2, watcher, address):
    project, folder = project_2.write(PAIR), tempfile.mkdtemp(prefix='bt')
    address = address.format(folder)
    docker = project.folder / 'docker'  # stands before the real one, and fails while there is a file `broken`
    docker.write_text('#!/bin/sh\ntest ! -e {}/broken && exec {} "$@"\n'.format(folder, shutil.which('docker')))
    docker.chmod(0o755)
    path = '{}:{}'.format(project.folder, os.environ['PATH'])
    project.environment = dict(os.environ, NOTIFY_SOCKET=address, WATCHDOG_USEC='1000000', PATH=path)
    try:
        with service_manager(address) as read_until:
            with project.watchdog('--watcher', watcher, '--interval', '3600') as watchdog:
                assert 'READY=1' in read_until('2 of 2 running')
                assert set(read_until('running')) == {'STATUS=2 of 2 running\nWATCHDOG=1'}  # twice a WATCHDOG_USEC
                project.docker('pause', *project.ids('side'))
                assert 'STATUS=side: paused\nWATCHDOG=1' in read_until('paused')
                read_until('2 of 2 running')
                broken = pathlib.Path(folder, 'broken')
                broken.touch()
                assert watchdog.says('WARNING Docker does not answer')
                with pytest.raises(socket.timeout):
                    for _ in range(10):
                        read_until('2 of 2 running', seconds=4)
                broken.unlink()
                read_until('2 of 2 running')
            assert 'STOPPING=1' in read_until('STOPPING=1')
    finally:
        shutil.rmtree(folder)


def test_unit_file_of_the_readme_is_accepted_by_systemd(tmp_path):
    if not shutil.which('systemd-analyze'):
        pytest.skip('systemd-analyze is not installed')
    unit = re.search('```ini\n(.*?)```', (HERE / 'README.md').read_text(), re.DOTALL).group(1)
    (tmp_path / 'broapt.service').write_text(unit)
    result = subprocess.run(['systemd-analyze', 'verify', str(tmp_path / 'broapt.service')], stderr=subprocess.PIPE)
    assert (result.returncode, result.stderr) == (0, b'')


def need(*modules):
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip('{} is not installed'.format(module))


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """Build both packages, the wheel from the sdist as an installer does; give the wheel."""
    need('build', 'flit_core')
    folder = tmp_path_factory.mktemp('packages')
    for name in ('broapt_compose.py', 'test_broapt_compose.py', 'pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(str(HERE / name), str(folder))
    call(sys.executable, '-m', 'build', '--no-isolation', cwd=str(folder))
    return next((folder / 'dist').glob('*.whl'))


def test_wheel_holds_the_module_and_tells_all_about_it(wheel):
    with zipfile.ZipFile(str(wheel)) as archive:
        files = {name.rpartition('/')[2]: archive.read(name) for name in archive.namelist()}
    assert sorted(files) == ['LICENSE', 'METADATA', 'RECORD', 'WHEEL', 'broapt_compose.py', 'entry_points.txt']
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
        call(str(venv / 'bin' / 'python'), '-m', 'pip', 'install', '--no-index', '--no-deps', str(wheel))
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
    call(sys.executable, '-m', 'PyInstaller', '-F', '--paths', str(HERE), 'host.py', cwd=str(folder))
    return folder / 'dist' / 'host'


@needs_docker
@pytest.mark.parametrize('watcher', ['thread', 'process'])
def test_frozen_host_repairs_and_ends_in_order(frozen, project_2, watcher):
    project = project_2
    with project.write(PAIR).watchdog('--watcher', watcher, start=(str(frozen), 'run')) as host:
        project.docker('kill', *project.ids('core'))
        assert host.says('core: exited (137) -> started'), host.log()
        pids = descendants(host.process.pid)
        assert len(pids) >= (3 if watcher == 'process' else 2)  # the program in the program, the watcher, the event stream
    assert all(gone(pid) for pid in pids) and 'Traceback' not in host.log()


# -- on a real engine: names and secrets -----------------------------------------------------------------------------


@needs_docker
def test_odd_names_of_folders_files_and_services_are_only_names(project, monkeypatch):
    folder = project.folder / """-f "it's" $(touch x); `x` & ü\n*"""
    folder.mkdir()
    project.folder, project.file = folder, folder / '-x é.yml'
    project.write(PAIR.replace('core', 'Co.re_-1').replace('side', '0-_'))
    monkeypatch.chdir(str(folder))
    with bc.docker_compose(project.settings()):
        project.docker('kill', *project.ids())
        assert eventually(lambda: [state for _, state, *_ in project.look().values()] == ['running'] * 2)
        project.docker('rm', '-f', *project.ids('0-_'))
        assert eventually(lambda: [state for _, state, *_ in project.look().values()] == ['running'] * 2)
    assert sorted(os.listdir(str(folder))) == ['-x é.yml']


@needs_docker
def test_secrets_appear_nowhere(project_2):
    project = project_2
    text = PAIR + "  loop: {image: busybox, command: sh -c 'exit 7', environment: {TOKEN: canary-2, OTHER: '${CANARY}'}}\n"
    project.write(text)
    project.environment = dict(os.environ, CANARY='canary-1', DOCKER_PASSWORD='canary-3')
    with project.watchdog('--verbose') as watchdog:
        assert watchdog.says('crash loop')
        project.write('services: {core: {image: busybox, environment: {TOKEN: canary-4}, command: [}}')
        project.docker('rm', '-f', *project.ids('side'))
        assert watchdog.says('ERROR side: missing, not created')
        project.write(text)
        assert 'canary' not in watchdog.log()
    assert 'canary' not in watchdog.log()
