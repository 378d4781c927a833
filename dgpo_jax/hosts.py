"""Several processes that train one model: how they join, what each does alone, how they agree.

Every process runs the same program on its own devices. Weights, updates and checkpoints span all of them. Each answers
its own share of the prompts and checks its own answers, at its own pace; then `gather` gives everyone all of them, so that
what follows, advantages to packing plan, is computed by each for itself and comes out the same. Process 0 owns the files
that are not checkpoints.

One process alone is the same program: everything here then returns its argument.
"""

import contextlib
import os
import pickle
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dgpo_jax import activity
from dgpo_jax.config import HostsConfig
from dgpo_jax.processes import ADDRESS, COUNT, INDEX, LOCAL_INDEX
from dgpo_jax.sharding import MESH_AXES

FAREWELL_S = 3.0  # that a process which found an error waits for others which may have found the same
_SIGNS_OF_LOSS = (
    "gloo", "coordination", "heartbeat", "connection closed", "connection reset", "socket closed", "remote process exited",
)  # fmt: skip
_SMALLEST_MESSAGE = 2**16  # bytes; messages are padded to a power of two, so that few programs are compiled


class RefusedElsewhereError(ValueError):
    """What process 0 refused, on the others."""


def launched() -> bool:
    """Whether `dgpo_jax.launch` started this process."""
    return COUNT in os.environ


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Of the processes of `dgpo_jax.launch` only the first of each machine is heard inside: they read the same command line and files."""
    if os.environ.get(LOCAL_INDEX, "0") == "0":
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def join(settings: HostsConfig) -> None:
    """Joins the other processes, if there are to be any. Before anything else asks JAX for a device.

    Raises:
        ValueError: they cannot be found, or did not come in time.
    """
    if not launched() and settings.cluster == "none":
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # read by CPUs only
    given = {}
    if launched():
        given = dict(
            coordinator_address=os.environ.get(ADDRESS), num_processes=int(os.environ[COUNT]), process_id=int(os.environ[INDEX]),
            cluster_detection_method="deactivate",
        )  # fmt: skip
    try:
        if given.get("process_id"):
            find_coordinator(given["coordinator_address"], settings.start_s)
        jax.distributed.initialize(
            **given, initialization_timeout=settings.start_s, heartbeat_timeout_seconds=settings.heartbeat_s,
            shutdown_timeout_seconds=max(settings.heartbeat_s, 60),
        )  # fmt: skip
    except (RuntimeError, ValueError, OSError) as error:
        where = f"{given['coordinator_address']}, process {given['process_id']} of {given['num_processes']}" if given else "hosts.cluster=auto"
        raise ValueError(
            f"the processes of this run did not find each other ({where}, {settings.start_s} s): {str(error).splitlines()[0]};"
            " start all of them at once, with python -m dgpo_jax.launch or under a TPU pod, Slurm, Kubernetes or Open MPI."
        ) from error


def find_coordinator(address: str | None, seconds: float) -> None:
    """Waits until somebody listens there. JAX would, where nobody ever does, abort the process in C++.

    Raises:
        OSError: nobody does, after so long, or this is no address.
    """
    host, _, port = (address or "").rpartition(":")
    if not host or not port.isdigit():
        raise OSError(f"{ADDRESS}={address} is not HOST:PORT")
    host = host.removeprefix("[").removesuffix("]")  # which IPv6 needs beside a port, and a socket refuses
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=1.0).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise OSError(f"nobody answers there ({error.strerror or error})") from error
        time.sleep(0.2)


def count() -> int:
    """Processes of this run."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this is process 0, which writes metrics and talks."""
    return jax.process_index() == 0


def name() -> str:
    """Such as 'process 1 of 4 on tpu-vm-1'; '' where there is one only."""
    return f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}" if count() > 1 else ""


def share_of(number: int) -> slice:
    """Which of so many things, in order, are this process's."""
    here, all_of_them = jax.process_index(), jax.process_count()
    return slice(number * here // all_of_them, number * (here + 1) // all_of_them)


def gather(value: Any) -> list[Any]:
    """What each process passed, in their order, on every process. Anything that pickle takes, numpy arrays above all.

    Every process must call it, in the same order among other collective calls.
    """
    if count() == 1:
        return [value]
    with activity.doing("waiting for the other processes"):
        return _all_gather(value)


def _all_gather(value: Any) -> list[Any]:
    message = np.frombuffer(pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL), np.uint8)
    with jax.transfer_guard("allow"):  # process_allgather puts numpy arrays on the devices by itself
        sizes = multihost_utils.process_allgather(np.int32(message.size))
        padded = np.zeros(max(_SMALLEST_MESSAGE, 1 << int(sizes.max() - 1).bit_length()), np.uint8)
        padded[: message.size] = message
        messages = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(messages, sizes, strict=True)]


def from_first(function: Callable[[], Any]) -> Any:
    """Has process 0 alone call the function; all return what it returned. If it raised, it raises that, and the others RefusedElsewhereError."""
    if count() == 1:
        return function()
    result, raised = None, None
    if is_first():
        try:
            result = function()
        except Exception as error:  # whatever it is, the others must not wait for an answer
            raised = error
    result, failed = gather((result, raised and (str(raised) or type(raised).__name__)))[0]
    if raised is not None:
        raise raised
    if failed is not None:
        raise RefusedElsewhereError(failed)
    return result


def local_mesh(mesh: Mesh) -> Mesh:
    """This process's devices, as a mesh for decoding: replicas of its own along `data`, `tensor` as in the mesh.

    Raises:
        ValueError: the devices of a replica are not all of one process.
    """
    if count() == 1:
        return mesh
    replicas = mesh.devices.reshape(-1, mesh.shape["tensor"])
    here = [all(device.process_index == jax.process_index() for device in replica) for replica in replicas]
    if sum(here) * replicas.shape[1] != jax.local_device_count():
        raise ValueError(
            f"mesh.tensor is {mesh.shape['tensor']}, and devices of different processes would share a replica, which each process"
            f" samples with; it has {jax.local_device_count()} devices: make mesh.tensor a divisor of that."
        )
    return Mesh(replicas[here].reshape(-1, 1, 1, mesh.shape["tensor"]), MESH_AXES, axis_types=mesh.axis_types)


def localise(tree: Any, shardings: Any) -> Any:
    """Arrays that every replica has whole, as arrays of this process's devices alone; nothing is copied.

    Args:
        shardings: of the results, over `local_mesh`; a tree like the first.
    """
    if count() == 1:
        return tree

    def here(array, sharding):
        parts = {shard.device: shard.data for shard in array.addressable_shards}
        return jax.make_array_from_single_device_arrays(array.shape, sharding, [parts[device] for device in sharding.mesh.devices.flat])

    return jax.tree.map(here, tree, shardings)


def says_it(error: Exception) -> bool:
    """Whether this process is the one to tell of an error that ends it: process 0 speaks for those that found the same.

    Bad input is bad for all of them, and one message is read where sixty-four are not. Who found another error speaks for itself.
    """
    if count() == 1:
        return True
    if isinstance(error, RefusedElsewhereError):
        return False
    client, key = coordination_client(), "dgpo_jax/error"
    if client is None:
        return True
    try:
        if is_first():
            client.key_value_set(key, str(error), allow_overwrite=True)
            return True
        return client.blocking_key_value_get(key, int(FAREWELL_S * 1000)) != str(error)
    except RuntimeError:  # process 0 has found none, or is gone
        return True


def tell(topic: str, text: str) -> None:
    """Leaves a text where all processes can read it, whatever they are doing, in place of this one's last on the topic.

    Raises:
        RuntimeError: the service that keeps it is gone, or not where this version of JAX has it.
    """
    _service().key_value_set(f"dgpo_jax/{topic}/{jax.process_index()}", text, allow_overwrite=True)


def told(topic: str) -> dict[int, str]:
    """What each process has left on the topic, by its number; nothing is waited for. Raises as `tell`."""
    return {int(key.rpartition("/")[2]): text for key, text in _service().key_value_dir_get(f"dgpo_jax/{topic}/")}


def exchange(topic: str, text: str) -> dict[int, str]:
    """Tells it, and returns what the other processes told last; nothing where that cannot be had."""
    if count() == 1:
        return {}
    try:
        tell(topic, text)
        return {process: theirs for process, theirs in told(topic).items() if process != jax.process_index()}
    except RuntimeError:
        return {}


def _service() -> Any:
    client = coordination_client()
    if client is None:
        raise RuntimeError(
            f"JAX {jax.__version__} keeps its coordination service elsewhere, and without it several processes cannot agree on"
            " checkpoints and stops; use JAX 0.10.2 to 0.12."
        )
    return client


def coordination_client() -> Any:
    """Of the service at which the processes met; None where there is none, or JAX has moved it.

    It has no public name, and the public ways for processes to talk need all of them, while here one may be at work.
    """
    try:
        from jax._src import distributed
    except ImportError:
        return None
    return getattr(getattr(distributed, "global_state", None), "client", None)


def lost_a_process(error: Exception) -> bool:
    """Whether the error tells of another process's death, so that starting again may help.

    There is no class for it: gloo (CPUs), NCCL (GPUs) and JAX's coordination service say it in words.
    """
    return count() > 1 and isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS_OF_LOSS)


def leave(code: int) -> NoReturn:
    """Ends this process. With others, without the farewell in which JAX waits for them: they may wait for us.

    Process 0 waits a moment for those that leave too: without it JAX aborts them, with a page of its own about a lost leader.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if count() > 1:
        if is_first():
            time.sleep(FAREWELL_S)
        os._exit(code)
    raise SystemExit(code)
