"""Checkpoints where the disk misbehaves: a write that fails costs that checkpoint alone, and what is damaged is not read.

Faults are real ones where that is possible: a limit on file sizes, a file system that is full, permissions, a folder moved
away. Root is above permissions, so that tests of these give up that one right.
"""

import asyncio
import contextlib
import ctypes
import json
import math
import os
import resource
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from dgpo_jax import activity
from dgpo_jax.checkpoint import Checkpoints, locate, meetings, peek, saving, storage
from dgpo_jax.checkpoint.folders import Entry, find_sound, flaw_of, superseded
from dgpo_jax.checkpoint.meetings import Meetings, PartMissingError, patience
from dgpo_jax.checkpoint.storage import Storage, checkpoint_bytes, describe_storage, forecast, require_room
from dgpo_jax.manifest import write_manifest

REPOSITORY = Path(__file__).parent.parent
NUMBERS = 50_000  # in a state: 200 kB


def make_state(value):
    return {"weights": jax.random.normal(jax.random.key(0), (NUMBERS,)) + value}


def make_abstract():
    return {"weights": jax.ShapeDtypeStruct((NUMBERS,), jnp.float32, sharding=SingleDeviceSharding(jax.devices()[0]))}


def names(directory):
    return sorted(path.name for path in Path(directory).iterdir())


def make_folder(directory, iteration, score=None, attempt=1, finished=True):
    """A checkpoint as far as names and manifests go; its only array is a text."""
    path = Entry.of(directory, iteration, attempt).path
    (path / "state/d").mkdir(parents=True)
    (path / "state/d/0").write_text(f"weights of iteration {iteration}")
    (path / "details.json").write_text(json.dumps({"iteration": iteration, "score": score, "extra": {"at": iteration}}))
    if finished:
        write_manifest(path)
    return path


def assert_holds(checkpoints, value, iteration):
    restored = checkpoints.restore(make_abstract())
    assert restored.iteration == iteration
    assert np.array_equal(restored.state["weights"], make_state(value)["weights"])


# --- a write that fails ---


@contextlib.contextmanager
def files_limited_to(size):
    """In bytes; the system call that goes beyond fails as on a full disk, with 'File too large'."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit, host_arrays", [
    (20_000, None),  # the arrays, which Orbax writes in the background
    (500_000, {"waiting": np.zeros(100_000)}),  # those of the host, before save returns
])  # fmt: skip
def test_a_save_that_fails_costs_that_checkpoint_and_nothing_else(tmp_path, caplog, limit, host_arrays):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, make_state(1), {})
        checkpoints.wait(required=True)
        with files_limited_to(limit):
            checkpoints.save(2, make_state(2), {}, host_arrays)
            checkpoints.wait()
        assert checkpoints.failure.startswith("iteration 2: File too large")
        assert "the checkpoint of iteration 2 was not written" in caplog.text
        assert "the one of iteration 1 is intact; the next save tries again" in caplog.text
        assert "Traceback" not in caplog.text  # Orbax would log three of them
        assert names(tmp_path) == ["iteration_000001"]  # the half that was written is no longer in the way of the next
        with pytest.raises(RuntimeError, match=r"the last checkpoint was not written .* iteration 2: File too large.* iteration 1 is intact"):
            checkpoints.wait(required=True)
        assert_holds(checkpoints, 1, iteration=1)
        checkpoints.save(2, make_state(2), {})
        checkpoints.wait(required=True)
        assert checkpoints.failure is None
        assert_holds(checkpoints, 2, iteration=2)
    assert names(tmp_path) == ["iteration_000002"]


@pytest.mark.parametrize("error, words", [
    (OSError(5, "Input/output error", "/disk/state"), "Input/output error: /disk/state"),
    (ValueError("RESOURCE_EXHAUSTED: Failed to write 7 bytes: No space left on device [os_error_code='28']"), "No space left on device (free some"),
    (ValueError("a handler that refuses"), "ValueError: a handler that refuses"),
])  # fmt: skip
def test_a_save_that_fails_before_it_returns_is_told_in_words(tmp_path, monkeypatch, error, words):
    def fail(*arguments):
        raise error

    with Checkpoints(tmp_path) as checkpoints:
        with monkeypatch.context() as patched:
            patched.setattr(saving.ocp.StandardCheckpointer, "save", fail)
            checkpoints.save(1, make_state(1), {})
        assert checkpoints.failure.startswith(f"iteration 1: {words}")
        assert names(tmp_path) == []
        checkpoints.save(1, make_state(1), {})
        assert_holds(checkpoints, 1, iteration=1)


def test_a_device_that_fails_ends_the_run(tmp_path, monkeypatch):
    # It is no fault of the disk: the state is lost, and what would be saved next too.
    def fail(*arguments):
        raise jax.errors.JaxRuntimeError("INTERNAL: the chip is gone")

    monkeypatch.setattr(saving.ocp.StandardCheckpointer, "save", fail)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(jax.errors.JaxRuntimeError):
        checkpoints.save(1, make_state(1), {})


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB: room for four checkpoints, less what a test puts there."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount")
    if not mounted or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk; the limit on file sizes above stands for it")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_survived_until_there_is_room_again(small_disk, caplog):
    with Checkpoints(small_disk, keep=1) as checkpoints:
        checkpoints.save(1, make_state(1), {})
        checkpoints.wait(required=True)
        someone_else = small_disk / "a data set"
        someone_else.write_bytes(bytes(700_000))
        free = os.statvfs(small_disk).f_bavail
        for iteration in (2, 3):
            checkpoints.save(iteration, make_state(iteration), {})
            checkpoints.wait()
            assert f"iteration {iteration}: No space left on device (free some" in checkpoints.failure
        assert os.statvfs(small_disk).f_bavail == free
        assert "iteration 1 is intact" in caplog.text
        someone_else.unlink()
        checkpoints.save(4, make_state(4), {})
        assert_holds(checkpoints, 4, iteration=4)
    assert names(small_disk) == ["iteration_000004"]


def test_a_lost_directory_is_made_again_unless_the_disk_that_it_was_on_is_gone(tmp_path, caplog):
    workdir = tmp_path / "disk" / "run"
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(1, make_state(1), {})
        checkpoints.wait()
        shutil.rmtree(workdir / "checkpoints")
        checkpoints.save(2, make_state(2), {})
        assert_holds(checkpoints, 2, iteration=2)

        workdir.rename(tmp_path / "unmounted")  # made again, it would fill the disk below
        checkpoints.save(3, make_state(3), {})
        assert checkpoints.failure == f"iteration 3: No such file or directory: {workdir / 'checkpoints'}"
        assert "there is no other one" in caplog.text and not workdir.exists()

        (tmp_path / "unmounted").rename(workdir)
        checkpoints.save(4, make_state(4), {})
        assert_holds(checkpoints, 4, iteration=4)


@pytest.mark.parametrize("lost", ["", "details.json", "state", "host.npz"])
def test_what_is_lost_while_it_is_written_does_not_count_as_finished(tmp_path, monkeypatch, lost):
    finish = saving.ocp.StandardCheckpointer.wait_until_finished

    def finish_and_lose(checkpointer):
        finish(checkpointer)
        path = tmp_path / "iteration_000002" / lost
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), {})
        checkpoints.wait()
        monkeypatch.setattr(saving.ocp.StandardCheckpointer, "wait_until_finished", finish_and_lose)
        checkpoints.save(2, make_state(2), {}, {"waiting": np.arange(5)})
        checkpoints.wait()
        assert "No such file or directory" in checkpoints.failure
        assert names(tmp_path) == ["iteration_000001"]
        assert_holds(checkpoints, 1, iteration=1)


# --- permissions ---


@contextlib.contextmanager
def subject_to_permissions():
    """Gives up root's right to read and write whatever it likes, CAP_DAC_OVERRIDE, in this thread and those it starts."""
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0)
    rights, fewer = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits
    assert libc.capget(header, rights) == 0
    fewer[:] = rights
    fewer[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(header, fewer) == 0
    try:
        yield
    finally:
        assert libc.capset(header, rights) == 0


@pytest.fixture
def permissions(tmp_path):
    with subject_to_permissions():
        yield
    for path in [tmp_path, *tmp_path.rglob("*")]:
        path.chmod(0o700)


def test_in_a_read_only_folder_nothing_is_lost_and_writing_goes_on_when_it_is_over(tmp_path, caplog, permissions):
    with Checkpoints(tmp_path) as checkpoints:
        for iteration in (1, 2):
            checkpoints.save(iteration, make_state(iteration), {})
        checkpoints.wait()
        (tmp_path / "iteration_000002/details.json").write_text("{}")
        tmp_path.chmod(0o555)
        assert_holds(checkpoints, 1, iteration=1)
        assert "nor can they be renamed (Permission denied" in caplog.text
        assert "iteration_000002 (details.json has 2 bytes where" in caplog.text
        checkpoints.save(2, make_state(2), {})
        assert "iteration 2: Permission denied" in checkpoints.failure
        assert names(tmp_path) == ["iteration_000001", "iteration_000002"]

        tmp_path.chmod(0o755)
        checkpoints.save(2, make_state(2), {})  # not refused for the damaged one, nor is that one taken for it
        assert_holds(checkpoints, 2, iteration=2)
    assert names(tmp_path) == ["iteration_000001", "iteration_000002", "iteration_000002.bad"]


def test_an_old_checkpoint_that_cannot_be_deleted_is_told_once_and_the_save_counts(tmp_path, caplog, permissions):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, make_state(1), {})
        checkpoints.wait()
        (tmp_path / "iteration_000001").chmod(0o555)
        for iteration in (2, 3):
            checkpoints.save(iteration, make_state(iteration), {})
            checkpoints.wait(required=True)
            assert checkpoints.failure is None
        assert_holds(checkpoints, 3, iteration=3)
    assert names(tmp_path) == ["iteration_000001", "iteration_000003"]
    assert caplog.text.count("iteration_000001 is no longer needed and cannot be deleted: Permission denied") == 1


def test_a_file_that_cannot_be_read_makes_its_checkpoint_unsound(tmp_path, permissions):
    for name in ("manifest.json", "details.json", "state/d/0", "state/d"):
        path = make_folder(tmp_path, 1)
        (path / name).chmod(0)
        assert "Permission denied" in flaw_of(path)
        (path / name).chmod(0o700)
        shutil.rmtree(path)


def test_what_the_disk_does_not_tell_is_not_deleted(tmp_path, permissions):
    # A folder whose manifest cannot be looked at may be finished: it is no leftover.
    for iteration in (1, 2, 3):
        path = make_folder(tmp_path, iteration)
    path.chmod(0)
    with pytest.raises(PermissionError):
        superseded(tmp_path, keep=1, keep_best=0)


def test_a_folder_of_checkpoints_that_cannot_be_read_is_told_so(tmp_path, permissions):
    make_folder(tmp_path, 1)
    with Checkpoints(tmp_path) as checkpoints:
        tmp_path.chmod(0)
        with pytest.raises(ValueError, match=r"cannot be read: Permission denied.*make it readable"):
            peek(tmp_path)
        with pytest.raises(ValueError, match=r"cannot be read: Permission denied.*make it readable"):
            checkpoints.restore(make_abstract())


# --- damage ---


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def lose(path):
    path.unlink()


def put_a_folder_there(path):
    path.unlink()
    path.mkdir()


def put_a_pipe_there(path):
    path.unlink()
    os.mkfifo(path)  # whoever reads it waits for ever


DAMAGES = (cut, empty, flip, lengthen, lose, put_a_folder_there, put_a_pipe_there)


def test_every_damage_to_every_file_of_a_checkpoint_is_found(tmp_path):
    with Checkpoints(tmp_path / "whole") as checkpoints:
        checkpoints.save(1, make_state(1), {}, {"waiting": np.arange(5)})
    whole, copy = tmp_path / "whole/iteration_000001", tmp_path / "iteration_000001"
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert len(files) > 5
    for name in files:
        for damage in DAMAGES:
            if damage in (cut, empty, flip) and not (whole / name).stat().st_size:
                continue
            shutil.copytree(whole, copy)
            damage(copy / name)
            assert flaw_of(copy) is not None, f"{damage.__name__} {name}"
            if name.name == "details.json":
                assert peek(tmp_path) is None, damage.__name__
            shutil.rmtree(copy)


@pytest.mark.parametrize("text, reason", [
    ("", "manifest.json is damaged"),
    ("\x00" * 100, "manifest.json is damaged"),
    ("null", "manifest.json is damaged"),
    ("[1, 2]", "manifest.json is damaged"),
    ("{}", "does not list details.json"),
    ('{"state/d/0": [22, "00000000"]}', "does not list details.json"),
    ('{"details.json": 7}', "manifest.json is damaged"),
    ('{"details.json": [1, 2, 3]}', "manifest.json is damaged"),
    ('{"details.json": ["x", null]}', "details.json has"),
    ('{"nobody\\u0000": [1, "0"]}', "manifest.json is damaged"),
    ('{"../../outside": [1, "0"]}', "outside of the folder"),
    ('{"/etc/passwd": [1, "0"]}', "outside of the folder"),
    ("[" * 100_000, "manifest.json is damaged"),  # deeper than Python's parser goes
])  # fmt: skip
def test_a_manifest_of_garbage_is_told_so_and_the_checkpoint_before_it_is_used(tmp_path, text, reason):
    sound = make_folder(tmp_path, 1)
    (make_folder(tmp_path, 2) / "manifest.json").write_text(text)
    (entry, [(passed_over, why)]) = find_sound(tmp_path)
    assert entry.path == sound and passed_over.iteration == 2 and reason in why
    assert peek(tmp_path) == (1, {"at": 1})


def test_a_manifest_that_is_no_text_is_told_so(tmp_path):
    (make_folder(tmp_path, 1) / "manifest.json").write_bytes(b"\xff\xfe\xff")
    assert "manifest.json cannot be read" in flaw_of(tmp_path / "iteration_000001")


@pytest.mark.parametrize("in_the_way", ["nothing", "folder", "file"])
@pytest.mark.parametrize("damaged", ["details", "a file of its name"])
def test_what_is_set_aside_takes_the_place_of_what_was_before(tmp_path, caplog, damaged, in_the_way):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), {})
        checkpoints.wait()
        if damaged == "details":
            (make_folder(tmp_path, 2) / "details.json").write_text("garbage")
        else:
            (tmp_path / "iteration_000002").write_text("a file")
        if in_the_way == "folder":
            (tmp_path / "iteration_000002.bad/state").mkdir(parents=True)
        elif in_the_way == "file":
            (tmp_path / "iteration_000002.bad").write_text("an older one")
        assert_holds(checkpoints, 1, iteration=1)
        assert names(tmp_path) == ["iteration_000001", "iteration_000002.bad"]
        assert "details.json has 7 bytes" in caplog.text or "it is a file, not a folder" in caplog.text
        (tmp_path / "iteration_000003.bad").write_text("the newer one is for a look")
        checkpoints.save(2, make_state(2), {})
    assert names(tmp_path) == ["iteration_000001", "iteration_000002", "iteration_000003.bad"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew_unasked(tmp_path):
    for iteration, damage in ((1, flip), (2, lose)):
        damage(make_folder(tmp_path, iteration) / "details.json")
    make_folder(tmp_path, 3, finished=False)
    for _ in range(2):  # whoever starts it again, or a cluster that does, meets the same answer
        with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="and the run would begin anew") as told:
            checkpoints.restore(make_abstract())
        for reason in ("iteration_000001 (details.json is damaged", "iteration_000002 (a file is missing", "iteration_000003 (it was never"):
            assert reason in str(told.value)
        assert f"delete or move {tmp_path} to begin anew on purpose" in str(told.value)
        assert names(tmp_path) == ["iteration_000001", "iteration_000002", "iteration_000003"]
    with pytest.raises(ValueError, match=r"--checkpoint .* iteration_000003 \(it was never finished"):
        locate(tmp_path)


def test_a_run_that_was_killed_in_its_first_save_begins_anew(tmp_path, caplog):
    make_folder(tmp_path, 1, finished=False)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(make_abstract()) is None
        assert "it was never finished" in caplog.text
        checkpoints.save(1, make_state(1), {})
        assert_holds(checkpoints, 1, iteration=1)


def test_evaluation_says_which_newer_checkpoints_it_passed_over(tmp_path, caplog):
    make_folder(tmp_path, 1)
    flip(make_folder(tmp_path, 2) / "state/d/0")
    assert locate(tmp_path).name == "iteration_000001"
    assert "newer ones are not sound: iteration_000002 (0 is damaged" in caplog.text


# --- the best besides the newest ---


@pytest.mark.parametrize("name", ["manifest.json", "details.json"])
def test_a_pipe_in_a_checkpoint_is_not_waited_for(tmp_path, name, pipe):
    pipe(make_folder(tmp_path, 1) / name)
    assert "cannot be read: [Errno 22] Not a regular file" in flaw_of(tmp_path / "iteration_000001")
    assert peek(tmp_path) is None


@pytest.mark.parametrize("keep, keep_best, scores, kept", [
    (1, 1, [0.5, 0.9, 0.1, 0.2], [2, 4]),
    (2, 1, [0.5, 0.9, 0.1, 0.2], [2, 3, 4]),
    (2, 1, [0.5, 0.1, 0.2, 0.9], [3, 4]),  # the best is among the newest
    (1, 2, [0.5, 0.9, 0.1, 0.2], [1, 2, 4]),
    (1, 1, [0.9, 0.9, 0.1, 0.1], [2, 4]),  # of two alike the newer
    (1, 1, [0.9, None, None, None], [1, 4]),  # one without a score is not the best of any
    (1, 1, [None, None, None, None], [4]),
    (1, 1, [-3.0, -5.0, -4.0, None], [1, 4]),
    (1, 0, [0.9, 0.1, 0.1, 0.1], [4]),
    (1, 9, [0.9, 0.1, None, 0.1], [1, 2, 4]),  # fewer have a score than would be kept
    (1, 1, [0.9, "1.0", 0.1, 0.1], [1, 4]),  # an edited one is none, and nothing else stops for it
    (1, 1, [0.9, True, math.nan, math.inf], [1, 4]),
])  # fmt: skip
def test_the_best_are_kept_besides_the_newest(tmp_path, keep, keep_best, scores, kept):
    paths = [make_folder(tmp_path, iteration, score) for iteration, score in enumerate(scores, start=1)]
    gone = superseded(tmp_path, keep, keep_best)
    assert [iteration for iteration, path in enumerate(paths, start=1) if path not in gone] == kept


def test_a_checkpoint_saved_again_counts_with_its_newer_score_and_a_leftover_with_none(tmp_path):
    first, again = make_folder(tmp_path, 1, score=0.9), make_folder(tmp_path, 1, score=0.1, attempt=2)
    best, _ = make_folder(tmp_path, 2, score=0.5), make_folder(tmp_path, 4, score=0.2)
    leftover = make_folder(tmp_path, 3, score=1.0, finished=False)
    assert {*superseded(tmp_path, keep=1, keep_best=1)} == {first, again, leftover}
    assert best.exists()


def test_a_checkpoint_of_an_older_version_has_no_score(tmp_path):
    path = make_folder(tmp_path, 1)
    (path / "details.json").write_text('{"iteration": 1, "extra": {}}')
    write_manifest(path)
    with Checkpoints(tmp_path, keep=1, keep_best=1) as checkpoints:
        assert checkpoints.best_score() is None


def test_scores_are_kept_with_their_checkpoints_and_outlive_a_restart(tmp_path):
    with Checkpoints(tmp_path, keep=1, keep_best=1) as checkpoints:
        assert checkpoints.best_score() is None
        for iteration, score in ((1, 0.1), (2, np.float32(0.7)), (3, float("nan")), (4, None)):
            checkpoints.save(iteration, make_state(iteration), {}, score=score)
            assert checkpoints.best_score() == (0.1 if iteration == 1 else float(np.float32(0.7)))  # 1 and 2 while being written
        checkpoints.wait(required=True)
    assert names(tmp_path) == ["iteration_000002", "iteration_000004"]
    with Checkpoints(tmp_path, keep=1, keep_best=1) as checkpoints:
        assert checkpoints.best_score() == float(np.float32(0.7))
        assert_holds(checkpoints, 4, iteration=4)  # a run goes on from the newest, not from the best
        with pytest.raises(ValueError, match="already holds iteration 4"):
            checkpoints.save(3, make_state(3), {}, score=0.9)


def test_a_best_that_could_not_be_written_is_not_the_best(tmp_path):
    with Checkpoints(tmp_path, keep_best=1) as checkpoints:
        checkpoints.save(1, make_state(1), {}, score=0.1)
        checkpoints.wait()
        with files_limited_to(20_000):
            checkpoints.save(2, make_state(2), {}, score=0.9)
            checkpoints.wait()
        assert checkpoints.best_score() == 0.1


def test_a_negative_number_of_best_ones_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep_best is -1"):
        Checkpoints(tmp_path, keep_best=-1)


# --- several processes ---

PROCESS = """
    import logging, os, resource, sys, time
    from pathlib import Path
    import jax, jax.numpy as jnp, numpy as np
    from jax.experimental import multihost_utils
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    port, number, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, number)
    logging.basicConfig(level=logging.WARNING)
    from dgpo_jax import hosts
    from dgpo_jax.checkpoint import Checkpoints, meetings
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("fsdp",)), PartitionSpec("fsdp"))
    abstract = {"weights": jax.ShapeDtypeStruct((8000,), jnp.float32, sharding=sharding)}

    def state(value):
        noise = np.random.default_rng(0).normal(size=8000).astype(np.float32)  # Orbax would make constants small
        return {"weights": jax.make_array_from_callback((8000,), sharding, lambda index: (noise + value)[index])}

    def together(name, act=None):
        if number == 0 and act:
            act()
        multihost_utils.sync_global_devices(name)

    disk, mine = folder / "disk", folder / f"disk_of_{number}"  # each has its own way to the disk, and can lose it alone
    disk.mkdir(exist_ok=True)
    run = disk / "run"

    def point_to(place):
        mine.unlink(missing_ok=True)
        mine.symlink_to(place)

    point_to(disk)
    with Checkpoints(mine / "run/checkpoints", keep=1, keep_best=1) as checkpoints:
        first = state(1.0)
        with jax.transfer_guard("disallow"):  # as in the loop of a run
            checkpoints.save(1, first, {}, score=0.1)
            checkpoints.wait(required=True)
            assert checkpoints.best_score() == 0.1, checkpoints.best_score()

        together("move away", lambda: run.rename(folder / "elsewhere"))
        checkpoints.save(2, state(2.0), {}, score=0.9)
        assert checkpoints.failure.startswith("iteration 2: "), checkpoints.failure
        try:
            checkpoints.wait(required=True)
        except RuntimeError as error:
            print("told", error, flush=True)
        else:
            sys.exit("the last save failed and nobody said so")
        together("put back", lambda: (folder / "elsewhere").rename(run))

        for iteration, failing in ((3, 1), (4, 0)):  # the arrays of one process alone cannot be written
            unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
            if number == failing:
                resource.setrlimit(resource.RLIMIT_FSIZE, (500, unlimited[1]))
            checkpoints.save(iteration, state(iteration), {}, score=0.9)
            checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
            print("failure", checkpoints.failure, flush=True)

        def lose_after_meeting(wanted):
            meet, numbers = checkpoints._meetings.meet, iter((1, 2))
            def meet_and_lose(**arguments):
                meet(**arguments)
                if next(numbers) == wanted:
                    del checkpoints._meetings.meet
                    point_to(folder / "nowhere")
            checkpoints._meetings.meet = meet_and_lose

        losses = {  # of the whole disk, for one process alone
            5: (1, lambda: point_to(folder / "nowhere")),
            6: (1, lambda: point_to("x" * 300)),  # an error also for who only asks what is there, like a server that is gone
            7: (0, lambda: lose_after_meeting(1)),  # all parts are written, and process 0 cannot put them in place
            8: (0, lambda: lose_after_meeting(2)),  # nor can it finish what is in place, which it alone knows of until all are asked
        }
        for iteration, (failing, lose) in losses.items():
            together("before")
            if number == failing:
                lose()
            began = time.monotonic()
            checkpoints.save(iteration, state(iteration), {}, score=0.9)
            checkpoints.wait()
            assert time.monotonic() - began < 60, "whoever is not told waits ten minutes"
            print("failure", checkpoints.failure, flush=True)
            try:
                checkpoints.wait(required=True)
            except RuntimeError as error:
                print("insisted", error, flush=True)
            else:
                sys.exit("a save failed and nobody said so")
            point_to(disk)
            finished = [path.parent.name for path in run.glob("checkpoints/*/manifest.json")]
            assert finished == ["iteration_000001"], finished
        keys = hosts.told(meetings.FAILED)
        assert len(keys) == 2, keys  # as many as processes, however many saves have failed

        checkpoints.save(9, state(9.0), {}, score=0.05)
        checkpoints.wait(required=True)
        assert checkpoints.failure is None
        together("damage", lambda: (run / "checkpoints/iteration_000009/details.json").write_text("{}"))
        restored = checkpoints.restore(abstract)
        assert restored.iteration == 1 and checkpoints.best_score() == 0.1
        for shard, wanted in zip(restored.state["weights"].addressable_shards, first["weights"].addressable_shards, strict=True):
            assert np.array_equal(shard.data, wanted.data)
        together("damage all", lambda: (run / "checkpoints/iteration_000001/details.json").write_text("{}"))
        try:
            checkpoints.restore(abstract)
        except ValueError as error:
            print("refused", error, flush=True)
        together("end")
"""


def test_what_fails_on_one_process_leaves_no_other_one_waiting(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROCESS), str(port), str(number), str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for number in (0, 1)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for number, (process, (out, err)) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, err[-3000:]
        for iteration, failing, fault in (
            (3, 1, "File too large"), (4, 0, "File too large"),
            (5, 1, "No such file or directory"), (6, 1, "File name too long"), (7, 0, "No such file or directory"),
        ):  # fmt: skip
            why = fault if number == failing else f"process {failing} could not write its part: {fault}"
            assert f"failure iteration {iteration}: {why}" in out, out
        alone = "" if number == 0 else "process 0: "
        assert f"checkpoints: {alone}iteration 8: No such file or directory" in out.rpartition("insisted")[2], out
        assert f"told the last checkpoint was not written to {tmp_path}/disk_of_{number}/run/checkpoints: iteration 2: " in out
        assert "begin anew" in out.partition("refused")[2]


class Service:
    """Stands for JAX's coordination service: whoever is waited for comes, or not, and what is said is kept."""

    def __init__(self):
        self.met, self.under_way, self.said, self.late, self.deaf = [], [], {}, False, False

    def wait(self, *, key, timeout_ms):
        self.met.append(key)
        self.under_way.append(activity.describe())
        if self.late:
            raise RuntimeError(  # in JAX 0.10.2's words
                "DEADLINE_EXCEEDED: Barrier timed out. Id: checkpoint 1, meeting 1::0. This usually happens because a task triggered the"
                " barrier too early or too slowly.\n# of tasks that reached the barrier: 2/4.\nThe first task at the barrier: 2. Some"
                " timed out task names:\n1\n3\n\n\nRPC: /xla.coordination.CoordinationService/Barrier"
            )

    def key_value_set(self, key, value, allow_overwrite):
        if self.deaf:
            raise RuntimeError("UNAVAILABLE")
        assert allow_overwrite or key not in self.said
        self.said[key] = value

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.said.items() if key.startswith(prefix)]


@pytest.fixture
def service(monkeypatch):
    stand_in = Service()
    monkeypatch.setattr(meetings.ocp.multihost, "get_barrier_sync_fn", lambda: stand_in.wait)
    monkeypatch.setattr(meetings.hosts, "coordination_client", lambda: stand_in)
    monkeypatch.setattr(meetings.hosts, "count", lambda: 4)
    return stand_in


def meetings_of(monkeypatch, process, save):
    """One process in one save: whose it is counts at the moment when it says that it failed."""
    monkeypatch.setattr(meetings, "_saves", iter([save]))
    monkeypatch.setattr(meetings.hosts.jax, "process_index", lambda: process)
    found = Meetings()
    found.begin(f"iteration_00000{save}", 600)
    return found


def test_one_that_failed_says_why_and_comes_to_the_meetings_it_has_not_been_at(monkeypatch, service):
    failed = meetings_of(monkeypatch, 3, save=5)
    failed.meet(key="written", timeout_ms=1)
    failed.fail("Stale file handle")
    assert service.met == ["checkpoint 5, meeting 1", "checkpoint 5, meeting 2"]
    told = meetings_of(monkeypatch, 0, save=5)
    with pytest.raises(PartMissingError, match=r"^process 3 could not write its part: Stale file handle$"):
        told.meet(key="written", timeout_ms=1)
    told.fail("process 3 could not")
    assert service.met[2:] == ["checkpoint 5, meeting 1", "checkpoint 5, meeting 2"]  # nobody waits for it either
    meetings_of(monkeypatch, 2, save=5).fail("Permission denied")
    with pytest.raises(PartMissingError, match=r"process 2 could not .* \(nor could 1 more\): Permission denied"):  # those that were told are none
        meetings_of(monkeypatch, 1, save=5).meet(key="written", timeout_ms=1)


def test_what_was_said_of_one_save_does_not_count_for_the_next_and_does_not_pile_up(monkeypatch, service):
    for save in range(3):
        meetings_of(monkeypatch, 1, save).fail(f"fault {save}")
    assert service.said == {"dgpo_jax/checkpoint_failed/1": "2 fault 2"}
    after = meetings_of(monkeypatch, 0, save=3)
    for _ in range(2):
        after.meet(key="written", timeout_ms=1)


def test_after_the_last_meeting_nobody_takes_a_checkpoint_apart_that_process_0_may_have_finished(monkeypatch, service):
    late = meetings_of(monkeypatch, 1, save=5)
    for _ in range(2):
        late.meet(key="written", timeout_ms=1)
    late.fail("Input/output error")  # such as a process whose network disk shows an older state of the folder
    assert not service.said and len(service.met) == 2


def test_nobody_waits_twice_for_one_that_did_not_come_and_no_later_save_meets_under_the_same_name(monkeypatch, service):
    service.late = True
    waiting = meetings_of(monkeypatch, 0, save=5)
    with pytest.raises(PartMissingError, match=r"^waiting for all to write their parts: process 1, 3 did not come in 10 minutes; the disk hangs"):
        waiting.meet(key="written", timeout_ms=1)
    waiting.fail("not in time")
    assert len(service.met) == 1
    service.late = False
    next_one = meetings_of(monkeypatch, 0, save=6)
    for _ in range(2):
        next_one.meet(key="written", timeout_ms=1)
    assert len(set(service.met)) == 3


def test_a_version_of_jax_without_the_service_is_told_at_the_start(tmp_path, monkeypatch, service):
    monkeypatch.setattr(meetings.hosts, "coordination_client", lambda: None)
    with pytest.raises(RuntimeError, match=r"several processes cannot agree on checkpoints and stops; use JAX 0\.10\.2 to 0\.12"):
        Checkpoints(tmp_path)


def test_one_that_cannot_say_that_it_failed_does_not_come(monkeypatch, service, caplog):
    # The others would take the checkpoint for whole: better that they wait in vain.
    service.deaf = True
    meetings_of(monkeypatch, 1, save=5).fail("Stale file handle")
    assert service.met == []
    assert "the other processes may not know that this one could not write its part: RuntimeError: UNAVAILABLE" in caplog.text


def test_what_is_waited_for_has_a_name_for_the_watchdog(monkeypatch, service):
    waiting = meetings_of(monkeypatch, 0, save=5)
    waiting.meet(key="written", timeout_ms=120_000)
    waiting.fail("No space left on device")  # while it put the whole in place
    assert "iteration_000005: waiting for all to write their parts (gives up in 2 minutes)" in service.under_way[0]
    assert "iteration_000005: waiting for process 0 to put it in place (gives up in 10 minutes)" in service.under_way[1]


@pytest.mark.parametrize("size, seconds", [
    (200_000, 600),  # the smallest has ten minutes
    (135_000_000 * 12, 632),  # float32 weights and two moments
    (7_000_000_000 * 12, 2280),  # at 50 MB/s; 20 minutes, which Orbax gives, would take 70
])  # fmt: skip
def test_a_save_has_the_time_that_a_slow_disk_takes(size, seconds):
    assert patience(size) == seconds


def test_a_disk_that_hangs_is_given_up_and_told_in_words(tmp_path, monkeypatch):
    # What Orbax's write waits for, here for ever, is cut off by the deadline that it is given.
    monkeypatch.setattr(saving, "patience", lambda size: 1 if size == NUMBERS * 4 else 600)
    released = threading.Event()
    threading.Timer(20, released.set).start()  # without a deadline the write below fails otherwise, instead of never

    async def hang(*arguments, **settings):
        while not released.is_set():
            await asyncio.sleep(0.05)
        raise OSError(5, "Input/output error")

    with Checkpoints(tmp_path) as checkpoints:
        with monkeypatch.context() as patched:
            patched.setattr("orbax.checkpoint._src.path.atomicity._create_paths", hang)
            checkpoints.save(1, make_state(1), {})
            checkpoints.wait()
        assert checkpoints.failure == "iteration 1: not in time; the disk hangs, or is slower than 50 MB/s"
        released.set()
        checkpoints.save(2, make_state(2), {})
        assert_holds(checkpoints, 2, iteration=2)


# --- the forecast ---


def test_a_checkpoint_takes_about_what_was_forecast(tmp_path):
    state = make_state(0) | {"half": jnp.zeros((100, 7), jnp.bfloat16), "update": jnp.int32(1)}
    assert checkpoint_bytes(state) == NUMBERS * 4 + 100 * 7 * 2 + 4
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
    taken = forecast(tmp_path, checkpoint_bytes(state), 2, 1).held
    assert taken == sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert 0.8 < taken / checkpoint_bytes(state) < 1.1


def test_the_forecast_counts_all_that_will_be_kept_and_the_one_being_written(tmp_path):
    found = forecast(tmp_path / "not" / "yet", 1000, keep=2, keep_best=1)
    assert found[:3] == (1000, 4000, 0)
    assert abs(found.free - shutil.disk_usage(tmp_path).free) < 2**30  # others use this disk meanwhile


def test_what_is_there_already_is_counted_whether_finished_or_not(tmp_path):
    paths = [make_folder(tmp_path, 1), make_folder(tmp_path, 2, finished=False)]
    (tmp_path / "iteration_000003.bad").mkdir()
    (tmp_path / "iteration_000003.bad/0").write_bytes(bytes(10_000))
    (tmp_path / "something else").write_bytes(bytes(10_000))  # not ours to delete
    finished = sum(path.stat().st_size for folder in paths for path in folder.rglob("*") if path.is_file())
    assert forecast(tmp_path, 1000, 2, 1).held == finished + 10_000


@pytest.mark.parametrize("held, free, expected", [
    (0, 4000, None),  # exactly enough
    (0, 3999, "0.0 MiB too small"),
    (3000, 1000, None),  # what is there will be deleted, each after the next is complete
    (2999, 1000, "0.0 MiB too small"),
    (0, None, None),  # a mounted bucket
    (9000, 999, ValueError),  # what is there is deleted too late for the next one
])  # fmt: skip
def test_room_is_asked_for_before_the_first_iteration(held, free, expected):
    found = Storage(each=1000, most_at_once=4000, held=held, free=free)
    if expected is ValueError:
        with pytest.raises(ValueError, match=r"run: 0.0 MiB of disk are free, but one checkpoint takes 0.0 MiB; free some, or choose a --workdir"):
            require_room("run", found)
    else:
        warning = require_room("run", found)
        assert warning == expected or expected in warning


def test_the_plan_says_what_checkpoints_take():
    gib = 2**30
    assert describe_storage(Storage(gib, 4 * gib, 0, 100 * gib)) == "1.0 GiB each, at most 4 at once: 4.0 GiB; 100.0 GiB of disk are free"
    assert describe_storage(Storage(2**20, 2**22, 2**20, None)) == (
        "1.0 MiB each, at most 4 at once: 4.0 MiB, 1.0 MiB of it there already; the disk does not say what is free"
    )


def test_a_disk_without_blocks_does_not_say_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.os, "statvfs", lambda path: os.statvfs_result((4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255)))
    assert forecast(tmp_path, 1000, 2, 1).free is None
