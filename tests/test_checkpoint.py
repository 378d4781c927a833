"""Checkpoints: what is read back is bit for bit what was saved, and what is not whole is never read."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dgpo_jax.checkpoint import Checkpoints, locate, peek, read_params, saving
from dgpo_jax.manifest import write_manifest
from dgpo_jax.types import TrainState

REPOSITORY = Path(__file__).parent.parent


def make_sharding(fsdp=1, tensor=1):
    devices = np.array(jax.devices()[: fsdp * tensor]).reshape(fsdp, tensor)
    return NamedSharding(Mesh(devices, ("fsdp", "tensor")), PartitionSpec("fsdp", "tensor"))


def make_state(value=0.0, sharding=None):
    """A state with what is easily lost: -0.0, NaN payloads, subnormals, a moment in bfloat16, nested tuples."""
    odd = np.array([0x80000000, 0x7FC12345, 0x00000001, 0xFF800000] * 16, np.uint32).view(np.float32).reshape(8, 8)
    weights = jax.random.normal(jax.random.key(3), (64, 32)) + value
    place = lambda array: array if sharding is None else jax.device_put(array, sharding)  # noqa: E731
    params = {"embed": place(weights), "layers": {"odd": place(odd), "minus_zero": place(np.full((8, 8), -0.0, np.float32))}}
    moments = ({"embed": place(weights.astype(jnp.bfloat16))}, (), place(weights**2))
    return jax.tree.map(jnp.asarray, TrainState(update=jnp.int32(7), params=params, opt_state=moments))


def make_abstract(state, sharding=None):
    """Scalars and whatever has no second axis go to the first device, the rest to `sharding`."""
    sharding = sharding or make_sharding()
    plain = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding if leaf.ndim == 2 else plain), state
    )


def bits(tree):
    return [(leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def save_two(directory):
    """Iterations 1 and 2, told apart by their weights; returns both states."""
    states = make_state(1.0), make_state(2.0)
    with Checkpoints(directory) as checkpoints:
        for iteration, state in enumerate(states, start=1):
            checkpoints.save(iteration, state, {"position": iteration})
    return states


def names(directory):
    return sorted(path.name for path in Path(directory).iterdir())


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_byte(folder):
    path = largest_file(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(folder):
    path = largest_file(folder)
    path.write_bytes(path.read_bytes()[:-1])


def lose_a_file(folder):
    largest_file(folder).unlink()


def lose_the_manifest(folder):
    (folder / "manifest.json").unlink()


def garble_the_manifest(folder):
    (folder / "manifest.json").write_text("[1, 2]")


def empty_the_manifest(folder):
    (folder / "manifest.json").write_text("{}")


def change_the_details(folder):
    text = (folder / "details.json").read_text()
    (folder / "details.json").write_text(text.replace('"position": 2', '"position": 3'))


def test_an_empty_directory_restores_nothing(tmp_path):
    with Checkpoints(tmp_path / "none" / "yet") as checkpoints:
        assert checkpoints.restore(make_abstract(make_state())) is None
    assert peek(tmp_path / "none" / "yet") is None
    assert peek(tmp_path / "not there") is None


def test_what_is_read_back_is_bit_for_bit_what_was_saved(tmp_path):
    state, extra = make_state(), {"position": [3, 0.1], "settings": {"lr": 1e-6}, "note": "é"}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(12, state, extra)
        restored = checkpoints.restore(make_abstract(state))
    assert (restored.iteration, restored.extra, restored.host_arrays) == (12, extra, {})
    assert peek(tmp_path) == (12, extra)
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert bits(restored.state) == bits(state)


HOST_ARRAYS = {
    "rollout.response": np.arange(6, dtype=np.int32).reshape(2, 3),  # names with a dot, as of experience
    "rollout.response_mask": np.array([[True, True, False], [True, False, False]]),
    "old_logprobs": np.array([[-0.0, np.nan, np.inf]], np.float32),
    "nothing": np.zeros((0, 5), np.float32),
}


def test_arrays_of_the_host_are_read_back_bit_for_bit_and_only_where_some_were_saved(tmp_path):
    state = make_state()
    with Checkpoints(tmp_path) as checkpoints:
        for iteration, host_arrays in ((1, HOST_ARRAYS), (2, None), (3, {})):
            checkpoints.save(iteration, state, {}, host_arrays)
            restored = checkpoints.restore(make_abstract(state))
            assert restored.iteration == iteration and bits(restored.state) == bits(state)
            assert restored.host_arrays.keys() == (host_arrays or {}).keys()
            assert bits(restored.host_arrays) == bits(host_arrays or {})
    assert "host.npz" not in names(tmp_path / "iteration_000002")


def test_arrays_of_the_host_may_change_as_soon_as_save_returns(tmp_path):
    state, array = make_state(), np.ones(100_000)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {}, {"array": array})
        array[:] = 0
        assert checkpoints.restore(make_abstract(state)).host_arrays["array"].all()


def flip_a_byte_of_the_host_arrays(folder):
    content = bytearray((folder / "host.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "host.npz").write_bytes(content)


def lose_the_host_arrays(folder):
    (folder / "host.npz").unlink()


@pytest.mark.parametrize("damage, reason", [
    (flip_a_byte_of_the_host_arrays, "host.npz is damaged"),
    (lose_the_host_arrays, "a file is missing"),  # not taken for a checkpoint that never had any
])  # fmt: skip
def test_a_checkpoint_whose_host_arrays_are_damaged_is_set_aside(tmp_path, caplog, damage, reason):
    state = make_state()
    with Checkpoints(tmp_path) as checkpoints:
        for iteration in (1, 2):
            checkpoints.save(iteration, state, {}, {"iteration": np.full(1000, iteration)})
        checkpoints.wait()
        damage(tmp_path / "iteration_000002")
        restored = checkpoints.restore(make_abstract(state))
    assert restored.iteration == 1 and (restored.host_arrays["iteration"] == 1).all()
    assert names(tmp_path) == ["iteration_000001", "iteration_000002.bad"]
    assert reason in caplog.text


@pytest.mark.parametrize("fsdp, tensor", [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (2, 4), (8, 1)])  # 1, 2, 4 and 8 devices
def test_what_8_devices_saved_as_4x2_is_read_by_other_numbers_and_shapes_of_them(tmp_path, fsdp, tensor):
    state = make_state(sharding=make_sharding(4, 2))
    target = make_abstract(state, make_sharding(fsdp, tensor))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        restored = checkpoints.restore(target).state
    assert bits(restored) == bits(state)
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
        assert leaf.sharding == wanted.sharding


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    # Orbax writes from views of the device buffers on CPU; an update that reuses them must not reach the file.
    state = {"weights": jnp.arange(4_000_000.0), "more": jnp.ones((1000, 1000))}
    wanted, abstract = jax.tree.map(np.array, state), make_abstract(state)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 1, tree), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        jax.block_until_ready(overwrite(state))
        restored = checkpoints.restore(abstract).state
    assert bits(restored) == bits(wanted)


def test_save_copies_state_where_implicit_transfers_are_forbidden(tmp_path, monkeypatch):
    # On CPU nothing is copied, so no guard would complain; on an accelerator Orbax's copy is an implicit transfer.
    guards, save, state = [], saving.ocp.StandardCheckpointer.save, make_state()

    def spy(*arguments):
        guards.append(jax.config.jax_transfer_guard_device_to_host)
        return save(*arguments)

    monkeypatch.setattr(saving.ocp.StandardCheckpointer, "save", spy)
    with Checkpoints(tmp_path) as checkpoints, jax.transfer_guard("disallow"):
        checkpoints.save(1, state, {})
    assert guards == ["allow"]


@pytest.mark.parametrize(
    "damage, reason",
    [
        (flip_a_byte, "damaged"),  # Orbax alone reads this without a word
        (truncate, "bytes where"),
        (lose_a_file, "missing"),
        (lose_the_manifest, "never finished"),
        (garble_the_manifest, "manifest.json is damaged"),
        (empty_the_manifest, "manifest.json is damaged"),
        (change_the_details, "details.json is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(tmp_path, caplog, damage, reason):
    older, newer = save_two(tmp_path)
    damage(tmp_path / "iteration_000002")
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(make_abstract(older))
        assert (restored.iteration, restored.extra) == (1, {"position": 1})
        assert bits(restored.state) == bits(older)
        assert names(tmp_path) == ["iteration_000001", "iteration_000002.bad"]
        assert reason in caplog.text

        # Iteration 2 comes round again: it must be written, though Orbax would skip a folder it has seen.
        checkpoints.save(2, newer, {"position": 2})
        restored = checkpoints.restore(make_abstract(older))
    assert restored.iteration == 2
    assert bits(restored.state) == bits(newer)


def test_of_those_set_aside_only_the_last_stays_once_there_is_something_new(tmp_path):
    # They are as large as checkpoints.
    state, _ = save_two(tmp_path)
    for iteration in (2, 3):
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(iteration, state, {})
            checkpoints.wait()
            flip_a_byte(tmp_path / f"iteration_{iteration:06d}{'.2' if iteration == 2 else ''}")
            assert checkpoints.restore(make_abstract(state)).iteration == 1
    assert names(tmp_path) == ["iteration_000001", "iteration_000002.2.bad", "iteration_000003.bad"]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, {})
    assert names(tmp_path) == ["iteration_000001", "iteration_000003", "iteration_000003.bad"]


def test_peek_passes_over_unfinished_and_short_ones_and_renames_nothing(tmp_path):
    save_two(tmp_path)
    truncate(tmp_path / "iteration_000002")
    assert peek(tmp_path) == (1, {"position": 1})
    assert names(tmp_path) == ["iteration_000001", "iteration_000002"]


def test_the_newest_two_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for iteration in (9, 10, 100, 1_000_000):  # the last has more digits than names are padded to
            checkpoints.save(iteration, make_state(iteration), {})
    assert names(tmp_path) == ["iteration_000100", "iteration_1000000"]
    assert peek(tmp_path)[0] == 1_000_000


@pytest.mark.parametrize("keep, iteration", [(1, 2), (1, 1)])  # a later one, and the same one saved again
def test_the_old_checkpoint_stays_until_the_new_one_is_complete(tmp_path, monkeypatch, keep, iteration):
    may_finish, write_manifest = threading.Event(), saving.write_manifest
    state, again = make_state(1.0), make_state(2.0)
    with Checkpoints(tmp_path, keep=keep) as checkpoints:
        checkpoints.save(1, state, {"which": "first"})
        checkpoints.wait()
        monkeypatch.setattr(saving, "write_manifest", lambda path: may_finish.wait() and write_manifest(path))
        checkpoints.save(iteration, again, {"which": "second"})
        assert peek(tmp_path) == (1, {"which": "first"})
        assert len(names(tmp_path)) == 2
        may_finish.set()
        assert bits(checkpoints.restore(make_abstract(state)).state) == bits(again)
    assert len(names(tmp_path)) == 1


def test_saving_an_iteration_again_does_not_push_out_an_older_iteration(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for iteration in (1, 2, 2, 2):
            checkpoints.save(iteration, make_state(), {})
    assert names(tmp_path) == ["iteration_000001", "iteration_000002.3"]


def test_saving_an_iteration_older_than_the_newest_is_refused(tmp_path):
    save_two(tmp_path)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="already holds iteration 2"):
        checkpoints.save(1, make_state(), {})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=leaf.sharding), r"float32\[64, 32\] in .* bfloat16\[64, 32\] here"),
        (lambda leaf: jax.ShapeDtypeStruct((64, 16), leaf.dtype, sharding=leaf.sharding), r"float32\[64, 16\] here"),
        (lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), "no sharding for params/embed"),
        (lambda leaf: {"table": leaf}, r"params/embed is float32\[64, 32\] in .* absent here \(1 other"),
    ],
)  # fmt: skip
def test_other_dtypes_shapes_or_names_are_refused(tmp_path, change, message):
    state, _ = save_two(tmp_path)
    target = make_abstract(state)
    target.params["embed"] = change(target.params["embed"])
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match=message):
        checkpoints.restore(target)
    assert names(tmp_path) == ["iteration_000001", "iteration_000002"]  # sound, only not ours: nothing is set aside


@pytest.mark.parametrize("keep, directory, message", [
    (0, "fine", "give at least 1"),
    (2, "file/below", "cannot be written"),  # stands for a read-only disk, which root in a container cannot have
    (2, "gs://bucket/run", "mount the bucket"),  # would make a local folder named 'gs:'
])  # fmt: skip
def test_settings_that_cannot_work_are_refused_at_construction(tmp_path, monkeypatch, keep, directory, message):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(ValueError, match=message):
        Checkpoints(directory, keep=keep)


def test_extra_that_is_not_json_is_refused_before_anything_is_written(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(TypeError, match="not JSON serializable"):
        checkpoints.save(1, make_state(), {"array": np.zeros(3)})
    assert names(tmp_path) == []


def test_every_name_of_a_checkpoint_is_durable_before_its_manifest_counts(tmp_path, monkeypatch):
    state = tmp_path / "run" / "state" / "d"
    state.mkdir(parents=True)
    (state / "0").write_bytes(b"weights")
    synced, sync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: synced.add(os.readlink(f"/proc/self/fd/{handle}")) or sync(handle))
    write_manifest(tmp_path / "run")
    assert {str(path) for path in (state / "0", state, state.parent, tmp_path / "run", tmp_path)} <= synced


SAVER = """
    import sys, time
    import jax.numpy as jnp
    import numpy as np
    from dgpo_jax.checkpoint import Checkpoints
    first = int(sys.argv[2])
    with Checkpoints(sys.argv[1]) as checkpoints:
        for iteration in range(first, first + 1000):
            checkpoints.save(
                iteration, {"weights": jnp.full((500_000,), float(iteration))}, {"iteration": iteration},
                {"waiting": np.full(10_000, iteration)},
            )
            print(iteration, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_usable_checkpoint(tmp_path):
    abstract = make_abstract({"weights": jnp.zeros(500_000)})
    directory, latest = tmp_path / "checkpoints", -1
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}
    for delay_s in (0.0, 0.011, 0.023, 0.041):  # a save of this size takes about 40 ms: before, within and after it
        command = [sys.executable, "-c", textwrap.dedent(SAVER), str(directory), str(latest + 1)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
            for _ in range(3):  # when save n returns, save n - 1 is complete
                complete = int(process.stdout.readline()) - 1
            time.sleep(delay_s)
            process.send_signal(signal.SIGKILL)
        with Checkpoints(directory) as checkpoints:
            restored = checkpoints.restore(abstract)
        latest = restored.iteration
        assert latest == restored.extra["iteration"] >= complete
        assert bool((restored.state["weights"] == latest).all())
        assert (restored.host_arrays["waiting"] == latest).all()


def test_details_say_which_arrays_a_checkpoint_holds(tmp_path):
    save_two(tmp_path)
    details = json.loads((tmp_path / "iteration_000002" / "details.json").read_text())
    assert details["arrays"]["params/embed"] == "float32[64, 32]"
    assert details["arrays"]["opt_state/0/embed"] == "bfloat16[64, 32]"


# --- weights alone ---


@pytest.mark.parametrize("below", ["", "checkpoints", "checkpoints/iteration_000002"])
def test_the_newest_weights_of_a_run_are_read_without_the_optimizers_state(tmp_path, below):
    _, state = save_two(tmp_path / "checkpoints")
    iteration, params = read_params(locate(tmp_path / below), make_abstract(state).params)
    assert iteration == 2 and bits(params) == bits(state.params)


def test_the_weights_of_an_older_iteration_are_read_where_it_is_named(tmp_path):
    state, _ = save_two(tmp_path / "checkpoints")
    iteration, params = read_params(locate(tmp_path / "checkpoints/iteration_000001"), make_abstract(state).params)
    assert iteration == 1 and bits(params) == bits(state.params)


def test_weights_are_read_onto_another_mesh(tmp_path):
    _, state = save_two(tmp_path / "checkpoints")
    sharding = make_sharding(fsdp=4, tensor=2)
    _, params = read_params(locate(tmp_path), make_abstract(state, sharding).params)
    assert bits(params) == bits(state.params) and params["embed"].sharding == sharding


def test_a_damaged_checkpoint_of_a_run_is_passed_over_and_left_where_it_is(tmp_path):
    save_two(tmp_path / "checkpoints")
    flip_a_byte(tmp_path / "checkpoints/iteration_000002")
    assert locate(tmp_path).name == "iteration_000001"
    assert names(tmp_path / "checkpoints") == ["iteration_000001", "iteration_000002"]  # the run may be alive: it is its to rename
    with pytest.raises(ValueError, match="is damaged"):
        locate(tmp_path / "checkpoints/iteration_000002")


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no finished checkpoint there; name the workdir"):
        locate(tmp_path)


def test_weights_of_another_model_are_refused(tmp_path):
    _, state = save_two(tmp_path / "checkpoints")
    other = make_abstract(state).params | {"embed": jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=make_sharding())}
    with pytest.raises(ValueError, match=r"params/embed is float32\[64, 32\] in the checkpoint and float32\[64, 16\] here"):
        read_params(locate(tmp_path), other)
