"""Multi-process jobs: JAX's multi-controller runtime, process supervision and exchange of data between processes.

Every process runs the same program over one mesh of all devices. All processes perform an update together. Each process
runs its own rollouts, tools and image preparation on its own devices. With a single process, all functions here are no-ops.
"""

import contextlib
import glob
import importlib.util
import os
import pickle
import re
import sys
import time
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, get_mesh

from imagent_jax.config import DistributedConfig
from imagent_jax.distributed.mesh import GROUPS

RESTART = 75
"""Exit code of a process that was stopped from outside and should be restarted (EX_TEMPFAIL of sysexits.h)."""
FAILED = 2
"""Exit code after an error that was printed as one sentence; a restart would fail again."""
GRACE = 3.0
"""Seconds to wait, after an error in this process, before it ends."""
T = TypeVar("T")


# ---- start-up and supervision ------------------------------------------------------------------------------------------


def start(cfg: DistributedConfig) -> None:
    """Join the processes of a multi-process job. Call it before any JAX computation.

    When a process dies, JAX aborts the others (SIGABRT), whatever they are waiting for, and prints the number of the dead one:
    after `heartbeat_s`, or at once where process 0 died.

    Args:
        cfg: coordinator, number of processes and index of this process. Unset fields are detected from the cluster (TPU VMs,
            Slurm, Open MPI).
    Raises:
        ValueError: the processes could not connect to each other.
    """
    named: dict[str, Any] = {
        "coordinator_address": cfg.coordinator or None,
        "num_processes": cfg.num_processes or None,
        "process_id": None if cfg.process_id < 0 else cfg.process_id,
    }
    if not any(value is not None for value in named.values()) and not _in_cluster():
        return
    try:
        jax.distributed.initialize(**named, initialization_timeout=cfg.timeout_s, heartbeat_timeout_seconds=cfg.heartbeat_s)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"The processes of this job did not find each other ({' '.join(str(error).split())[:300]}); give every "
            "process the same distributed.coordinator and distributed.num_processes, and its own distributed.process_id."
        ) from error


def _in_cluster() -> bool:
    env = os.environ
    several = int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env or int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
    tpu = importlib.util.find_spec("libtpu") and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
    return several or bool(tpu) and "tpu" in env.get("JAX_PLATFORMS", "tpu")


def several() -> bool:
    """Return whether this process has joined a job of several."""
    return jax.distributed.is_initialized()


def leave() -> None:
    """Leave a job that ended normally: wait until all processes have. JAX ends the others of a job that one left before."""
    barrier("done")


def fail(error: Exception, cfg: DistributedConfig) -> None:
    """End this process after an error that was printed, and thereby the job: JAX ends the other processes.

    An error of JAX's runtime, such as a connection reset, may come from the death of another process. JAX then ends this process
    with the number of the dead one; this function waits for that. Other errors may occur in all processes, each of which prints
    its own within `GRACE` seconds.
    """
    of_runtime = not isinstance(error, (ValueError, OSError)) or bool(re.match(r"[A-Z_]+: ", str(error)))
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(cfg.heartbeat_s + GRACE if of_runtime else GRACE)
    os._exit(FAILED)


# ---- exchange between processes ----------------------------------------------------------------------------------------


def is_writer() -> bool:
    """Return whether this process writes logs (process 0 only)."""
    return jax.process_index() == 0


def gather(value: T) -> list[T]:
    """Return the values given by all processes, ordered by process index. `value` must be picklable."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(len(data), np.int32))
    padded = np.zeros(1 << (int(sizes.max()) - 1).bit_length(), np.uint8)  # powers of two bound the number of compiled sizes
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def barrier(name: str) -> None:
    """Wait until all processes have reached this barrier."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def share(items: Sequence[T]) -> Sequence[T]:
    """Return this process's contiguous part of `items`."""
    own, count = jax.process_index(), jax.process_count()
    return items[len(items) * own // count : len(items) * (own + 1) // count]


def join(parts: list[T]) -> list[T]:
    """Concatenate the parts of all processes, in the order of `share`."""
    return [item for part in gather(parts) for item in part]


# ---- this process's part of the mesh -----------------------------------------------------------------------------------


def check_mesh(mesh: Mesh) -> None:
    """Check that the mesh covers all devices and that no `tensor` group crosses a process boundary.

    Raises:
        ValueError: either condition is violated.
    """
    if jax.process_count() == 1:
        return
    if mesh.size != jax.device_count():
        raise ValueError(
            f"The mesh has {mesh.size} of the {jax.device_count()} devices of {jax.process_count()} processes; set "
            "mesh.data or mesh.fsdp to -1 for all of them."
        )
    _blocks(mesh)


def _blocks(mesh: Mesh) -> np.ndarray:
    """Return the devices of each process, [processes, devices per process], in mesh order."""
    count, tensor = jax.process_count(), mesh.shape["tensor"]
    blocks = mesh.devices.reshape(count, -1)
    alone = all(len({device.process_index for device in block}) == 1 for block in blocks)
    if blocks.shape[1] % tensor or not alone:
        raise ValueError(
            f"mesh.tensor={tensor} reaches over processes of {blocks.shape[1]} devices; choose one that divides that."
        )
    return blocks


def own_mesh() -> Mesh:
    """Return the mesh of this process's devices, with groups split over `data`. Rollouts of this process run on it."""
    mesh = get_mesh()
    own = next(block for block in _blocks(mesh) if block[0].process_index == jax.process_index())
    return Mesh(own.reshape(-1, 1, mesh.shape["tensor"]), mesh.axis_names, axis_types=(AxisType.Auto,) * 3)


def alone() -> contextlib.AbstractContextManager:
    """Return a context manager that makes `own_mesh` the current mesh, for computations of this process alone."""
    return jax.set_mesh(own_mesh()) if jax.process_count() > 1 else contextlib.nullcontext()


def own_copy(tree: Any) -> Any:
    """Return arrays that are replicated over all processes (`gather_params`) as arrays on `own_mesh`, without any transfer."""
    mesh = own_mesh()

    def one(x):
        shards = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, NamedSharding(mesh, x.sharding.spec), shards)

    return jax.tree.map(one, tree)


def stack_rows(x: jax.Array) -> jax.Array:
    """Stack equally many rows of all processes into one replicated array. One compiled program moves the rows.

    Args:
        x: this process's rows on its own mesh, [F D].
    Returns:
        Array [processes * F, D], replicated over the current mesh; this process's rows begin at `place() * F`.
    """
    mesh, own = get_mesh(), own_mesh()
    blocks = _blocks(mesh)
    by_process = NamedSharding(Mesh(blocks, ("process", "device")), PartitionSpec("process"))
    with jax.set_mesh(own):
        local = jax.device_put(x, NamedSharding(own, PartitionSpec()))
    shards = [shard.data for shard in local.addressable_shards]
    rows = jax.make_array_from_single_device_arrays((len(blocks) * len(x), x.shape[1]), by_process, shards)
    return jax.jit(_same, out_shardings=NamedSharding(mesh, PartitionSpec()))(rows)


def place() -> int:
    """Return the place of this process among the processes of the current mesh."""
    return [block[0].process_index for block in _blocks(get_mesh())].index(jax.process_index())


def _same(x):
    return x


def spread(x: np.ndarray) -> jax.Array:
    """Concatenate equally many rows of every process into one array on the current mesh.

    Each process's rows stay on its own devices, split over `data` and `fsdp`, which must divide the number of rows.

    Args:
        x: rows of this process, [B, ...].
    Returns:
        Array [processes * B, ...].
    """
    place = NamedSharding(get_mesh(), PartitionSpec(GROUPS))
    return jax.make_array_from_process_local_data(place, x, (jax.process_count() * len(x), *x.shape[1:]))
