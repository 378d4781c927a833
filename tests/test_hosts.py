"""Several processes train as one does; what happens when one of them is told to stop, dies, hangs, or finds its input bad.

Real processes of two fake devices each, on the run of tests/tiny_hosts.py.
"""

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jaxlib
import numpy as np
import pytest
from jax._src import distributed

from dgpo_jax import hosts, session, train
from dgpo_jax.config import Config, HostsConfig, NoOptions, load, to_json
from dgpo_jax.launch import free_port
from dgpo_jax.processes import STOPPED_EARLY
from dgpo_jax.recipe import resolve

ROOT = Path(__file__).parent.parent
TINY = f"--config={ROOT / 'tests/tiny_hosts.py'}"
DEADLINE_S = 300
# What gloo's own threads say from within C++, in pieces that may come between each other.
GLOO = re.compile(r"\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|\d+")
HEARTBEAT_S, SLACK_S = 10, 10  # as in tiny_hosts.py; how much later than that the others may be gone, on a busy machine

FEW = "--config.iterations=4"  # an evaluation is due there anyway
MANY = "--config.iterations=10"
# Three prompts for two processes; one question in an evaluation, so that process 1 has none; as many draws as it takes.
UNEVEN = [
    "--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.rollout.prompts=3", "--config.rollout.dynamic-sampling=True",
    "--config.eval.problems=1", "--config.update.updates=1", "--config.iterations=2",
]  # fmt: skip
WIDE = ["--config.mesh.fsdp=4", "--config.mesh.tensor=2", "--config.iterations=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hosts")


# A third less to wait for the compiler. Newer ones end at a flag they do not know.
QUICK = ["--xla_cpu_use_fusion_emitters=false"] if jaxlib.version.__version_info__ < (0, 11) else []


def environment(devices, **more):
    """Of processes with so many fake devices; tests/conftest.py says where they keep what they compile."""
    flags = (
        f"--xla_force_host_platform_device_count={devices}", *QUICK,
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=600", "--xla_cpu_collective_call_terminate_timeout_seconds=1200",
    )  # fmt: skip
    return os.environ | {"XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(ROOT)} | more


class Running:
    """A process whose output, of both kinds, goes to a file."""

    def __init__(self, log, arguments, env):
        self.log = log
        with open(log, "w") as file:
            self.process = subprocess.Popen([sys.executable, "-m", *arguments], cwd=ROOT, env=env, stdout=file, stderr=file)
        self.pid = self.process.pid

    def said(self):
        return self.log.read_text()

    def ends(self):
        """Its exit code, when it has one."""
        try:
            return self.process.wait(DEADLINE_S)
        finally:
            self.process.kill()


def launched(folder, name, processes, arguments, options=(), **more):
    """The launcher of so many processes of two devices."""
    arguments = ["dgpo_jax.launch", f"--processes={processes}", *options, "--", *arguments]
    return Running(folder / f"{name}.log", arguments, environment(2, **more))


def without_launcher(folder, name, processes, arguments):
    """The processes themselves."""
    address = f"127.0.0.1:{free_port()}"
    return [
        Running(
            folder / f"{name}.{index}.log", arguments,
            environment(2, JAX_COORDINATOR_ADDRESS=address, DGPO_JAX_PROCESSES=str(processes), DGPO_JAX_PROCESS=str(index)),
        )
        for index in range(processes)
    ]  # fmt: skip


def wait_for(condition, why):
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, why()
        time.sleep(0.02)


def children(pid):
    """Process ids of what a launcher has started, in the order of their numbers."""
    return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def recorded(workdir):
    """Its lines of metrics without what depends on the clock and the machine."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key.split("/")[0] not in ("time", "speed", "memory")} for line in lines]


def texts(workdir):
    """What was answered, by file."""
    files = [*workdir.glob("rollouts/*"), *workdir.glob("eval/*")]
    return {file.name + file.parent.name: [json.loads(line)["response"] for line in file.read_text().splitlines()] for file in files}


def assert_alike(ours, theirs, without=()):
    """The same but for rounding: sums over devices are added up in another order."""
    assert [line["iteration"] for line in ours] == [line["iteration"] for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for key, value in ((key, value) for key, value in mine.items() if key not in without):
            # means of what is 0 but for rounding, or of its squares
            small = 1e-6 if key in ("gap/max", "gap/mean", "policy/kl_old") else 1e-7
            np.testing.assert_allclose(value, other[key], rtol=2e-5, atol=small, err_msg=f"{key} of iteration {mine['iteration']}")


@pytest.fixture(scope="module")
def two(folder):
    """Workdirs of runs by two processes: 'even', data 4, to the end; 'uneven'. Then process 1 has a fault."""
    arguments = ["tests.tiny_hosts", f"--workdir={folder}/even", MANY, "/", f"--workdir={folder}/uneven", *UNEVEN, "/", "fault"]
    process = launched(folder, "two", 2, arguments, ["--restarts=1"])
    assert process.ends() == 1, process.said()
    return folder


def test_a_fault_of_one_process_ends_all_with_its_traceback_and_nothing_is_started_again(two):
    said = (two / "two.log").read_text()  # and its exit code was 1, not that of the abort after JAX's farewell
    assert "[1] process 1 of 2 on " in said and "[1] KeyError: 'a key that is not there'" in said
    assert said.count("Traceback") == 1 and "starting all again" not in said and "process 1 (pid" in said


@pytest.fixture(scope="module")
def one(folder, two):
    """The same by one process with four devices, the first only so far; and 'gone_on', which does the third iteration of two processes' run."""
    shutil.copytree(two / "even", folder / "gone_on", ignore=shutil.ignore_patterns("tensorboard", "lock"))
    for checkpoint in (folder / "gone_on/checkpoints").iterdir():
        if checkpoint.name > "iteration_000002":
            shutil.rmtree(checkpoint)
    runs = [f"--workdir={folder}/one_even", FEW, "/", f"--workdir={folder}/one_uneven", *UNEVEN, "/", f"--workdir={folder}/gone_on", FEW]
    process = Running(folder / "one.log", ["tests.tiny_hosts", *runs], environment(4))
    assert process.ends() == 0, process.said()
    return folder


def test_two_processes_train_as_one_does(one):
    assert_alike(recorded(one / "even")[:5], recorded(one / "one_even"))
    answers = texts(one / "one_even")
    assert answers and {name: texts(one / "even")[name] for name in answers} == answers
    assert any(line["policy/tokens"] for line in recorded(one / "even")[1:])  # it has learned something


def test_shares_need_not_be_even(one):
    # How full the slots are: one process spreads three prompts over all of its replicas, two give theirs one and two.
    assert_alike(recorded(one / "uneven"), recorded(one / "one_uneven"), without=["rollout/slots_live"])
    assert texts(one / "uneven") == texts(one / "one_uneven")
    assert max(line.get("rollout/draws", 0) for line in recorded(one / "uneven")) > 1  # with draws more than one


def test_one_process_goes_on_where_two_stopped(one):
    assert "going on after iteration 2" in (one / "one.log").read_text()
    assert_alike(recorded(one / "gone_on"), recorded(one / "even")[:5])


def test_process_0_alone_writes_files_and_talks(two):
    assert len(list((two / "even/tensorboard").glob("events*"))) == 1
    said = (two / "two.log").read_text().partition("[1] process 1 of 2")[0]  # up to its fault
    assert said.count("first prompt, answer") == 2  # two runs
    others = " ".join(line.removeprefix("[1]") for line in said.splitlines() if line.startswith("[1]"))
    assert not GLOO.sub("", others).strip(), others


def test_four_processes_train_as_one_does(folder):
    arguments = ["dgpo_jax.train", TINY, f"--workdir={folder}/four", *WIDE]
    process = launched(folder, "four", 4, arguments)
    config = load([TINY, *WIDE])
    train.train(config, folder / "eight_devices")  # this process has as many devices
    assert process.ends() == 0, process.said()
    assert_alike(recorded(folder / "four"), recorded(folder / "eight_devices"))
    assert texts(folder / "four") == texts(folder / "eight_devices")
    assert "8 x cpu (data 1, fsdp 4, context 1, tensor 2), of 4 processes" in process.said()


def stopped_at(question, folder, arguments):
    """Without time to finish anything. Returns what was said and what is recorded."""
    process = launched(folder, question[0], 2, ["tests.tiny_hosts", "stop-at", *question, "/", *arguments, "--config.grace-seconds=0"])
    assert process.ends() == STOPPED_EARLY, process.said()
    return process.said(), recorded(folder / "chain")


def stopped_amid_updates(folder, arguments):
    said, metrics = stopped_at(("update", "6"), folder, arguments)  # 3 microbatches, scored and then learned from
    assert "after iteration 1 of 10 and 1 of 2 updates of the next;" in said and len(metrics) == 2


def stopped_in_a_rollout(folder, arguments):
    said, metrics = stopped_at(("chunk", "1"), folder, arguments)
    assert "after iteration 2 of 10;" in said and len(metrics) == 3  # the evaluation after it is done
    assert not (folder / "chain/rollouts/iteration_000003.jsonl").exists()


def one_is_signalled(folder, arguments):
    """Not the first, and no other."""
    first, second = processes = without_launcher(folder, "signalled", 2, ["dgpo_jax.train", TINY, *arguments])
    wait_for(lambda: (folder / "chain/rollouts/iteration_000004.jsonl").exists(), lambda: first.said() + second.said())
    second.process.terminate()
    codes = [running.ends() for running in processes]
    assert codes == [STOPPED_EARLY, STOPPED_EARLY], first.said() + second.said()
    assert "stopped (SIGTERM) and saved after iteration" in first.said()


def one_is_lost(folder, arguments):
    """As when its machine hangs, its connections open, until somebody restarts it: frozen, then killed. Nobody ends the other one."""
    first, second = without_launcher(folder, "lost", 2, ["dgpo_jax.train", TINY, *arguments, "--config.guard.silence-minutes=0.05"])
    wait_for(lambda: (folder / "chain/rollouts/iteration_000007.jsonl").exists(), lambda: first.said() + second.said())
    os.kill(second.pid, signal.SIGSTOP)
    began, before = time.monotonic(), len(first.said())
    try:
        code = first.ends()
        seconds = time.monotonic() - began
    finally:
        second.process.kill()
        second.process.wait()
    said = first.said()[before:]
    assert seconds < HEARTBEAT_S + SLACK_S, f"{seconds:.1f} s"
    assert "watchdog: nothing has moved for 3 s on process 0 of 2" in said and "waiting for" in said
    assert "unhealthy" in said and "heartbeats" in said  # JAX says so, in C++
    assert code == -signal.SIGABRT, said  # which nobody takes for bad input


def test_after_stops_anywhere_a_signal_to_one_process_and_a_kill_of_it_the_run_ends_as_if_nothing_had_happened(two):
    arguments = [f"--workdir={two}/chain", MANY]
    for trouble in (stopped_amid_updates, stopped_in_a_rollout, one_is_signalled, one_is_lost):
        trouble(two, arguments)
        assert len(recorded(two / "chain")) < 11, f"{trouble.__name__} came too late"
    last = launched(two, "last", 2, ["dgpo_jax.train", TINY, *arguments])
    assert last.ends() == 0, last.said()
    assert recorded(two / "chain") == recorded(two / "even")  # to the bit
    assert texts(two / "chain") == texts(two / "even")


@pytest.mark.parametrize(
    "settings, error",
    [
        # all of them find this
        (["--config.mesh.data=1", "--config.mesh.tensor=4", "--config.model.key-heads=4"], "mesh.tensor is 4, and devices of different processes would share a replica"),
        (["--workdir={folder}/taken"], "seed was 7 and is 0"),  # process 0 alone, while the others wait for it
    ],
)
def test_bad_input_ends_all_processes_with_one_message(settings, error, folder):
    (folder / "taken/checkpoints/iteration_000001").mkdir(parents=True, exist_ok=True)
    (folder / "taken/config.json").write_text(to_json(resolve(load([TINY, "--config.seed=7"]))))
    settings = [setting.format(folder=folder) for setting in settings]
    process = launched(folder, "bad", 2, ["dgpo_jax.train", TINY, f"--workdir={folder}/bad", *settings], ["--restarts=1"])
    assert process.ends() == 1
    said = process.said()
    assert said.count("error: ") == 1 and error in said.split("error: ")[1].split("\n")[0], said
    assert "Traceback" not in said and "starting all again" not in said and "detected fatal errors" not in said


@pytest.mark.parametrize("machine", [[], ["--machines=2", "--machine=1", "--coordinator=127.0.0.1:1"]])
def test_a_bad_command_line_is_refused_once_on_each_machine(machine, folder):
    process = launched(folder, "typo", 2, ["dgpo_jax.train", TINY, "--config.sead=1"], machine)
    assert process.ends() == 2
    assert process.said().count("Perhaps you meant") == 1, process.said()


@pytest.mark.parametrize("address", ["127.0.0.1", "[::1]"])
def test_a_coordinator_is_found_by_an_address_of_either_kind(address):
    family = socket.AF_INET6 if "[" in address else socket.AF_INET
    try:
        listener = socket.create_server((address.strip("[]"), 0), family=family)
    except OSError:
        pytest.skip(f"this machine has no {address}")
    with listener:
        hosts.find_coordinator(f"{address}:{listener.getsockname()[1]}", 0.0)


@pytest.mark.parametrize(
    "address, error",
    [
        (None, "JAX_COORDINATOR_ADDRESS=None is not HOST:PORT"),
        ("127.0.0.1", "is not HOST:PORT"),
        ("127.0.0.1:{free}", "nobody answers there"),  # where JAX itself would abort
    ],
)
def test_a_process_whose_coordinator_nobody_is_says_so(address, error, monkeypatch):
    monkeypatch.setenv("DGPO_JAX_PROCESSES", "2")
    monkeypatch.setenv("DGPO_JAX_PROCESS", "1")
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address.format(free=free_port()))
    clock = itertools.count()
    monkeypatch.setattr(hosts, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda _: None))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # this process goes on with what it has
    with pytest.raises(ValueError, match=re.escape(error)) as raised:
        hosts.join(HostsConfig(start_s=5))
    assert "process 1 of 2, 5 s" in str(raised.value) and "start all of them at once" in str(raised.value)


@pytest.mark.parametrize(
    "error, processes, lost",
    [
        # gloo, of a process whose peer was killed at work, and while they met
        (RuntimeError("INTERNAL: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:4711"), 2, True),
        (RuntimeError("UNKNOWN: Gloo context initialization failed: DEADLINE_EXCEEDED: GetKeyValue() timed out"), 2, True),
        (RuntimeError("UNAVAILABLE: failed to heartbeat the leader"), 2, True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4 GiB"), 2, False),  # the same the next time
        (RuntimeError("Gloo all-reduce failed"), 1, False),  # there was nobody else
        (ValueError("mesh.tensor is 4; the connection is yours"), 2, False),  # bad input
    ],
)
def test_the_loss_of_another_process_is_told_from_errors_that_stay(error, processes, lost, monkeypatch):
    monkeypatch.setattr(hosts, "count", lambda: processes)
    assert hosts.lost_a_process(error) is lost


@pytest.mark.parametrize("error, wanted", [(KeyError("a fault"), ""), (ValueError("bad input"), "1")])
def test_whoever_of_several_processes_shows_a_traceback_leaves_without_jaxs_farewell(error, wanted, monkeypatch, capfd):
    def story(config, workdir):
        monkeypatch.setattr(hosts, "count", lambda: 2)
        raise error

    monkeypatch.setattr(session, "parse_command", lambda *_, **__: (Config(), "workdir", NoOptions()))
    for setting_of_the_whole_process in ("set_flags", "use_compilation_cache"):
        monkeypatch.setattr(session, setting_of_the_whole_process, lambda **_: None)
    monkeypatch.setattr(hosts.os, "_exit", lambda code: sys.exit(f"left with {code}"))
    monkeypatch.setattr(hosts, "FAREWELL_S", 0.0)
    monkeypatch.setenv("DGPO_JAX_TRACEBACK", wanted)
    with pytest.raises(SystemExit, match="left with 1"):
        session.run_command("program", "", story)
    assert f"{type(error).__name__}: {error}" in capfd.readouterr().err


def test_where_jax_has_moved_its_messages_each_process_tells_of_its_error(monkeypatch):
    monkeypatch.setattr(hosts, "count", lambda: 2)
    monkeypatch.setattr(distributed, "global_state", None)
    assert hosts.says_it(ValueError("the same on all"))
    monkeypatch.delattr(distributed, "global_state")
    assert hosts.says_it(ValueError("the same on all"))
    assert not hosts.says_it(hosts.RefusedElsewhereError("what process 0 has said"))


@pytest.mark.parametrize("error", [ValueError("no"), FileNotFoundError(2, "No such file or directory", "x"), KeyError(), None])
def test_whatever_process_0_raises_the_others_are_told_and_it_raises_that(error, monkeypatch):
    told = []

    def function():
        if error is not None:
            raise error
        return 5

    def ask(process):
        monkeypatch.setattr(hosts, "count", lambda: 2)
        monkeypatch.setattr(hosts, "is_first", lambda: process == 0)
        monkeypatch.setattr(hosts, "gather", lambda value: [value] if process == 0 and not told.append(value) else told)
        return hosts.from_first(function)

    if error is None:
        assert ask(0) == ask(1) == 5
        return
    with pytest.raises(type(error)) as raised:
        ask(0)
    assert raised.value is error
    with pytest.raises(hosts.RefusedElsewhereError):
        ask(1)
