"""The launcher: who is started with what, who is said to have died, what is left. Its processes here need no JAX; those of tests/test_hosts.py do."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dgpo_jax.processes import STOPPED_EARLY

ROOT = Path(__file__).parent.parent
DEADLINE_S = 60

# What a process does, told from the outside by files: NAME.begin says that it runs, and holds its pid.
CHILD = """
import os, signal, sys, time
from pathlib import Path

index, folder = int(os.environ["DGPO_JAX_PROCESS"]), Path(sys.argv[1])
what = dict(argument.split("=", 1) for argument in sys.argv[2:]).get(str(index), "wait")

def mark(name):
    (folder / f"{index}.tmp").write_text(str(os.getpid()))
    (folder / f"{index}.tmp").rename(folder / f"{index}.{name}")

def saves(*_):
    mark("signalled")
    sys.exit(75)

if what == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
elif what != "plain":
    signal.signal(signal.SIGTERM, saves)
(folder / "starts").open("a").write(f"{index}\\n")
print("process", os.environ["DGPO_JAX_PROCESSES"], os.environ.get("CUDA_VISIBLE_DEVICES", "all"), flush=True)
mark("begin")
if what == "once" and (folder / "starts").read_text().split().count(str(index)) > 1:
    what = "exit 0"
if what in ("killed", "once"):
    os.kill(os.getpid(), signal.SIGKILL)
if what.startswith("exit"):
    sys.exit(int(what.split()[1]))
while what.startswith("follow"):  # ends because of process 1, gone or hung, as collectives do
    time.sleep(0.01)
    if (folder / "1.begin").exists() and set("ZT") & set(Path(f"/proc/{(folder / '1.begin').read_text()}/stat").read_text().split()):
        os.kill(os.getpid(), signal.SIGABRT) if what == "follow by abort" else sys.exit(1)
while what == "leave on request":
    time.sleep(0.01)
    if (folder / "request").exists():
        sys.exit(1)
if what == "last words":
    os.write(1, b"x" * 60000 + b"\\nno newline")
    sys.exit(0)
time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    return tmp_path


def start(folder, *options, **environment):
    """The launcher; options in front of `--`, what processes do behind it."""
    options = list(options)
    border = options.index("--")
    command = [sys.executable, "-m", "dgpo_jax.launch", *options[:border], "--", "child", str(folder), *options[border + 1 :]]
    path = f"{ROOT}:{folder}"
    return subprocess.Popen(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": path} | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process):
    """(exit code, stdout, stderr) in the end."""
    said, errors = process.communicate(timeout=DEADLINE_S)
    return process.returncode, said, errors


def wait_for(condition):
    end = time.monotonic() + DEADLINE_S
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def pids(folder, count):
    """Of the processes, once all of them run."""
    files = [folder / f"{index}.begin" for index in range(count)]
    wait_for(lambda: all(file.exists() for file in files))
    return [int(file.read_text()) for file in files]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_every_process_is_told_its_number_and_its_gpus_and_the_others_lines_are_numbered(folder):
    code, said, errors = finish(start(folder, "--processes=3", "--gpus=6", "--", "0=exit 0", "1=exit 0", "2=last words", CUDA_VISIBLE_DEVICES="7,6,5,4,3,2,1"))
    assert code == 0
    assert said == "process 3 7,6\n"
    assert "[1] process 3 5,4\n" in errors and "[2] process 3 3,2\n" in errors
    assert "[2] no newline" in errors  # also what is said last, behind more than a pipe holds


def test_a_second_machine_goes_on_counting_where_the_first_ends(folder):
    code, said, errors = finish(
        start(folder, "--processes=2", "--machines=2", "--machine=1", "--coordinator=10.0.0.1:8476", "--", "2=exit 0", "3=exit 0")
    )
    assert (code, said) == (0, "")
    assert "[2] process 4 all\n" in errors and "[3] process 4 all\n" in errors


def test_a_killed_process_is_named_and_takes_the_others_along(folder):
    process = start(folder, "--processes=2", "--")
    first, second = pids(folder, 2)
    os.kill(second, signal.SIGKILL)
    code, _, errors = finish(process)
    assert code == 128 + signal.SIGKILL
    assert f"process 1 (pid {second})" in errors and "killed by SIGKILL" in errors and "ending the other 1" in errors
    assert not alive(first)


def test_the_killed_one_is_named_although_another_ended_because_of_it_before_anybody_looked(folder):
    process = start(folder, "--processes=2", "--", "0=follow")
    first, second = pids(folder, 2)
    os.kill(process.pid, signal.SIGSTOP)  # it does not look
    os.kill(second, signal.SIGKILL)
    wait_for(lambda: not alive(first) and not alive(second))
    os.kill(process.pid, signal.SIGCONT)
    code, _, errors = finish(process)
    assert code == 128 + signal.SIGKILL and f"process 1 (pid {second})" in errors and "process 0" not in errors


def test_of_a_hung_process_and_those_that_jax_aborted_for_it_the_hung_one_is_named(folder):
    process = start(folder, "--processes=3", "--", "0=follow by abort", "2=follow by abort")
    hung = pids(folder, 3)[1]
    os.kill(hung, signal.SIGSTOP)
    code, _, errors = finish(process)
    assert code == 128 + signal.SIGABRT and not alive(hung)
    assert errors.count("killed by SIGABRT, as JAX does to those that lost another one") == 1
    assert errors.endswith(f" above): process 1 (pid {hung})\n") and "likely what was lost" in errors


def test_a_process_that_left_with_an_error_is_named_although_jax_aborted_another_because_of_it(folder):
    process = start(folder, "--processes=2", "--restarts=1", "--", "0=follow by abort", "1=leave on request")
    first, second = pids(folder, 2)
    os.kill(process.pid, signal.SIGSTOP)  # it does not look
    (folder / "request").touch()
    wait_for(lambda: not alive(first) and not alive(second))
    os.kill(process.pid, signal.SIGCONT)
    code, _, errors = finish(process)
    assert code == 1 and f"process 1 (pid {second})" in errors and "process 0" not in errors and "starting all again" not in errors


@pytest.mark.parametrize(
    "does, code, starts",
    [
        ("once", 0, 2),  # killed the first time only
        ("killed", 128 + signal.SIGKILL, 3),  # the restarts are used up
        ("exit 76", 76, 3),  # the watchdog ended it
        ("exit 1", 1, 1),  # bad input stays bad
        ("exit 2", 2, 1),
        ("exit 75", STOPPED_EARLY, 1),  # it was to stop
    ],
)
def test_what_may_go_better_the_next_time_is_started_again(does, code, starts, folder):
    result = finish(start(folder, "--processes=1", "--restarts=2", "--", f"0={does}"))
    assert result[0] == code
    assert (folder / "starts").read_text().split() == ["0"] * starts
    assert result[2].count("starting all again") == starts - 1


@pytest.mark.parametrize("first, second", [(75, 76), (76, 75)])
def test_a_stop_that_the_watchdog_of_one_process_asked_for_is_started_again_whoever_ends_first(first, second, folder):
    code, _, errors = finish(start(folder, "--processes=2", "--restarts=1", "--", f"0=exit {first}", f"1=exit {second}"))
    assert code == 76 and errors.count("starting all again") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_as_sigterm_and_the_exit_code_is_that_of_a_run_that_stopped_early(number, folder):
    process = start(folder, "--processes=2", "--restarts=3", "--")
    pids(folder, 2)
    process.send_signal(number)
    code, _, errors = finish(process)
    assert code == STOPPED_EARLY and "starting all again" not in errors and "killed" not in errors
    assert (folder / "0.signalled").exists() and (folder / "1.signalled").exists()


def test_processes_that_had_nothing_to_save_yet_count_as_stopped_early(folder):
    process = start(folder, "--processes=2", "--restarts=1", "--", "0=plain", "1=plain")
    pids(folder, 2)
    process.terminate()
    assert finish(process)[0] == STOPPED_EARLY
    assert len((folder / "starts").read_text().split()) == 2


def test_whoever_does_not_stop_in_the_grace_period_is_killed(folder):
    process = start(folder, "--processes=2", "--grace-seconds=0.3", "--restarts=1", "--", "1=deaf")
    pids(folder, 2)
    process.terminate()
    code, _, errors = finish(process)
    assert code in (STOPPED_EARLY, 128 + signal.SIGKILL) and "process 1 " in errors and "killed by SIGKILL" in errors


def test_a_second_interrupt_ends_it_at_once(folder):
    process = start(folder, "--processes=2", "--", "0=deaf", "1=deaf")
    pids(folder, 2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None  # the first one waits for the run to save
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 128 + signal.SIGKILL


def test_nothing_is_left_of_a_launcher_that_was_killed(folder):
    process = start(folder, "--processes=2", "--", "0=deaf", "1=deaf")
    children = pids(folder, 2)
    process.kill()
    process.communicate(timeout=DEADLINE_S)
    wait_for(lambda: not any(alive(pid) for pid in children))


@pytest.mark.parametrize(
    "options, said",
    [
        (["--processes=0"], "--processes=0"),
        (["--machines=2", "--machine=2"], "--machine=2: there are 2; give 0 to 1"),
        (["--machines=2"], "give HOST:PORT of machine 0"),
        (["--processes=2", "--gpus=3"], "cannot share them evenly"),
        (["--gpus=2"], "CUDA_VISIBLE_DEVICES=0 has 1"),
        (["--gpus=-2"], "--gpus=-2"),
        (["--restarts=-1"], "--restarts=-1"),
        (["--grace-seconds=nan"], "--grace-seconds=nan"),
        (["--proceses=2"], "--processes"),  # what was meant
        (["--processes=two"], "two"),
    ],
)
def test_bad_options_start_nothing_and_say_what_is_wrong(options, said, folder):
    code, out, errors = finish(start(folder, *options, "--", CUDA_VISIBLE_DEVICES="0"))
    assert code == 2 and said in out + errors and "Traceback" not in errors
    assert not (folder / "starts").exists()


@pytest.mark.parametrize("arguments", [[], ["--processes=2"], ["--processes=2", "--"]])
def test_a_launcher_without_a_command_says_how_to_give_one(arguments):
    result = subprocess.run(
        [sys.executable, "-m", "dgpo_jax.launch", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=DEADLINE_S
    )
    assert result.returncode == 2 and "no command given; try" in result.stderr
