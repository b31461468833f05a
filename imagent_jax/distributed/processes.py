"""Several processes, one job: JAX's multi-controller runtime, and what its processes tell each other.

Every process runs the same program over one mesh of all devices. Updates are made by all together; rollouts, tools and images
are each process's own, on its own devices. With one process everything here is nothing.
"""

import contextlib
import ctypes
import glob
import importlib.util
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, get_mesh

from imagent_jax.config import DistributedConfig
from imagent_jax.distributed import watcher
from imagent_jax.distributed.mesh import GROUPS

RESTART = 75
"""Exit code of a process that was stopped from outside and should be started again (EX_TEMPFAIL of sysexits.h)."""
FAILED = 2
"""Exit code after a sentence about what is wrong: to start again would not help."""
GRACE, LONG_GRACE = 3.0, 40.0
"""Seconds to learn that another process has died, or its machine, before an error here is taken for this process's own."""
T = TypeVar("T")


# ---- starting, and noticing an end -------------------------------------------------------------------------------------


def start(cfg: DistributedConfig) -> "Watch | None":
    """Joins the processes of the job, where there are several: those that `cfg` names, or that the cluster does (TPU VMs,
    Slurm, Open MPI). To be called before any computation.

    Raises:
        ValueError: they did not find each other.
    """
    named = {
        "coordinator_address": cfg.coordinator or None, "num_processes": cfg.num_processes or None,
        "process_id": None if cfg.process_id < 0 else cfg.process_id,
    }  # fmt: skip
    if not any(value is not None for value in named.values()) and not _in_cluster():
        return None
    try:
        jax.distributed.initialize(**named, initialization_timeout=cfg.timeout_s)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"The processes of this job did not find each other ({' '.join(str(error).split())[:300]}); give every "
            "process the same distributed.coordinator and distributed.num_processes, and its own distributed.process_id."
        ) from error
    return Watch(cfg.coordinator) if jax.process_count() > 1 else None


def _in_cluster() -> bool:
    env = os.environ
    several = int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env or int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
    tpu = importlib.util.find_spec("libtpu") and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
    return several or bool(tpu) and "tpu" in env.get("JAX_PLATFORMS", "tpu")


class Watch(threading.Thread):
    """Ends this process once another process of the job has ended before its time, which `watcher.py` notices and says.

    Process 0 is linked with each of the others. The death of a process closes its links at once; that of a machine is found
    by TCP within 30 seconds. JAX's heartbeats take longer, and collectives of some backends wait for ever.

    Args:
        coordinator: host:port; default this machine's own address, as process 0 sees it.
    """

    def __init__(self, coordinator: str = ""):
        super().__init__(daemon=True)
        count, process = jax.process_count(), jax.process_index()
        own, links = np.zeros(128, np.uint8), {}
        if process == 0:
            server, token = socket.create_server(("", 0)), os.urandom(8)
            text = f"{coordinator.rpartition(':')[0] or _address()} {server.getsockname()[1]}".encode()
            own[: 8 + len(text)] = np.frombuffer(token + text, np.uint8)
        sent = multihost_utils.broadcast_one_to_all(own).astype(np.uint8).tobytes()
        token, (host, port) = sent[:8], sent[8:].rstrip(b"\0").decode().split()
        if process:
            link = socket.create_connection((host, int(port)), timeout=60)
            link.sendall(token + f"process {process} ({socket.gethostname()})".encode()[:120].ljust(120))
            links[link] = f"process 0 ({host})"
        while process == 0 and len(links) < count - 1:
            link, _ = server.accept()
            if (said := link.recv(128, socket.MSG_WAITALL))[:8] == token:
                links[link] = said[8:].decode().strip()
        for link in links:
            link.settimeout(None)
            link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
                if hasattr(socket, option):
                    link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        names = {link.fileno(): name for link, name in links.items()}
        self.watcher = subprocess.Popen(
            [sys.executable, "-I", "-S", watcher.__file__, json.dumps(names), str(process)], pass_fds=list(names),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        for link in links:  # it has them now
            link.close()
        libc = ctypes.CDLL(None)  # JAX aborts at once where it loses process 0; `run` shall be first
        libc.signal(signal.SIGABRT, libc.sleep)  # for as many seconds as the signal's number, 6
        self.start()

    def run(self) -> None:
        word = self.watcher.stdout.readline()
        if word == b"died\n":
            os._exit(RESTART)
        if word:
            time.sleep(GRACE)  # this process may have the same to say
            os._exit(FAILED)

    def close(self) -> None:
        """Policy from the others in peace, once all have done their work."""
        barrier("done")
        self._say(b"bye")

    def fail(self, grace: float = GRACE) -> None:
        """Ends this process, whose reason is said, and so the others: JAX's own end would wait for them. Where it turns out that
        another has died, `run` ends it for that."""
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(grace)
        self._say(b"failed")
        os._exit(FAILED)

    def _say(self, word: bytes) -> None:
        with contextlib.suppress(OSError):
            self.watcher.stdin.write(word)
            self.watcher.stdin.close()
        self.join()


def _address() -> str:
    """This machine's address as others see it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; the route to the outside tells the address
        return probe.getsockname()[0]


# ---- what processes tell each other ------------------------------------------------------------------------------------


def is_writer() -> bool:
    """Whether this is the process that writes logs."""
    return jax.process_index() == 0


def gather(value: T) -> list[T]:
    """What every process has given, in the order of processes."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(len(data), np.int32))
    padded = np.zeros(1 << (int(sizes.max()) - 1).bit_length(), np.uint8)  # few sizes to compile
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def barrier(name: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of what is to be done, in one piece."""
    own, count = jax.process_index(), jax.process_count()
    return items[len(items) * own // count : len(items) * (own + 1) // count]


def join(parts: list[T]) -> list[T]:
    """All processes' parts, in the order of `share`."""
    return [item for part in gather(parts) for item in part]


# ---- the mesh, and a process's part of it ------------------------------------------------------------------------------


def check_mesh(mesh: Mesh) -> None:
    """Every process must own as much of the mesh as any other, and whole copies of what `tensor` splits.

    Raises:
        ValueError: it does not.
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
    """The devices of each process, [processes, devices of one], in the order of the mesh."""
    count, tensor = jax.process_count(), mesh.shape["tensor"]
    blocks = mesh.devices.reshape(count, -1)
    alone = all(len({device.process_index for device in block}) == 1 for block in blocks)
    if blocks.shape[1] % tensor or not alone:
        raise ValueError(
            f"mesh.tensor={tensor} reaches over processes of {blocks.shape[1]} devices; choose one that divides that."
        )
    return blocks


def own_mesh() -> Mesh:
    """This process's part of the current mesh, groups over `data`: its rollouts run on it."""
    mesh = get_mesh()
    own = next(block for block in _blocks(mesh) if block[0].process_index == jax.process_index())
    return Mesh(own.reshape(-1, 1, mesh.shape["tensor"]), mesh.axis_names, axis_types=(AxisType.Auto,) * 3)


def alone() -> contextlib.AbstractContextManager:
    """For what a process computes by itself: within, the current mesh is `own_mesh`."""
    return jax.set_mesh(own_mesh()) if jax.process_count() > 1 else contextlib.nullcontext()


def own_copy(tree: Any) -> Any:
    """Arrays that every process holds whole (`gather_params`) on `own_mesh`; nothing moves."""
    mesh = own_mesh()

    def one(x):
        shards = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, NamedSharding(mesh, x.sharding.spec), shards)

    return jax.tree.map(one, tree)


def stack_rows(x: jax.Array, count: int) -> tuple[jax.Array, int]:
    """Rows that each process has on its own mesh, [F D] with F at most `count`, as one array [processes * count, D] on the
    current mesh, whole on every device, moved by one compiled program; and where this process's rows begin."""
    mesh, own = get_mesh(), own_mesh()
    blocks = _blocks(mesh)
    by_process = NamedSharding(Mesh(blocks, ("process", "device")), PartitionSpec("process"))
    with jax.set_mesh(own):
        local = jax.device_put(jnp.pad(x, ((0, count - x.shape[0]), (0, 0))), NamedSharding(own, PartitionSpec()))
    shards = [shard.data for shard in local.addressable_shards]
    rows = jax.make_array_from_single_device_arrays((len(blocks) * count, x.shape[1]), by_process, shards)
    first = [block[0].process_index for block in blocks].index(jax.process_index()) * count
    return jax.jit(_same, out_shardings=NamedSharding(mesh, PartitionSpec()))(rows), first


def _same(x):
    return x


def spread(x: np.ndarray) -> jax.Array:
    """Rows of every process, as many of each, as one array [processes * B, ...] on the current mesh, each process's on its
    own devices, over `data` and `fsdp`; their number must divide so."""
    place = NamedSharding(get_mesh(), PartitionSpec(GROUPS))
    return jax.make_array_from_process_local_data(place, x, (jax.process_count() * len(x), *x.shape[1:]))
