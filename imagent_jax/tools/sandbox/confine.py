"""Confinement of a process on Linux: a private root, namespaces or Landlock, limits, and a filter of system calls.

Runs in the process that starts workers (`zygote.py`) and in the workers, before any code of the policy. Standard library only.
"""

import ctypes
import importlib.util
import os
import resource
import signal
import struct
import sysconfig

HOME = "/sandbox"
"""The only folder in which a worker of the namespaces backend can write."""
NOBODY = 65534
LIBRARIES = ("numpy", "PIL", "cv2", "scipy")

_libc = ctypes.CDLL(None, use_errno=True)
_libc_with_gil = ctypes.PyDLL(None, use_errno=True)
_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x20000,
    0x2000000,
    0x4000000,
    0x8000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
_NOSUID, _NODEV, _NOEXEC, _BIND, _REC, _PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000

# Numbers of x86-64. What is not named here fails: among others every call that makes a process, a thread, a socket or a
# namespace, sends a signal, changes an owner or a mode, or looks at another process.
_ALLOWED = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
    "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "pread64": 17,
    "pwrite64": 18, "readv": 19, "writev": 20, "access": 21, "select": 23, "sched_yield": 24, "mremap": 25, "madvise": 28,
    "dup": 32, "dup2": 33, "nanosleep": 35, "getpid": 39, "exit": 60, "uname": 63, "fsync": 74, "fdatasync": 75,
    "truncate": 76, "ftruncate": 77, "getdents": 78, "getcwd": 79, "chdir": 80, "rename": 82, "mkdir": 83, "rmdir": 84,
    "creat": 85, "unlink": 87, "readlink": 89, "umask": 95, "gettimeofday": 96, "getrlimit": 97, "getrusage": 98, "times": 100,
    "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110, "sigaltstack": 131, "statfs": 137,
    "fstatfs": 138, "gettid": 186, "time": 201, "futex": 202, "sched_getaffinity": 204, "getdents64": 217,
    "restart_syscall": 219, "fadvise64": 221, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230,
    "exit_group": 231, "openat": 257, "mkdirat": 258, "newfstatat": 262, "unlinkat": 263, "renameat": 264, "readlinkat": 267,
    "faccessat": 269, "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "fallocate": 285, "dup3": 292, "renameat2": 316,
    "copy_file_range": 326, "statx": 332, "rseq": 334, "faccessat2": 439,
}  # fmt: skip
_ALLOWED_WITH = {  # call: (argument, its allowed values)
    72: (1, (0, 1, 2, 3, 4, 1030)),  # fcntl: copies of descriptors and their flags; not the owner of its signals
    302: (0, (0,)),  # prlimit64: of the process itself
}
_REFUSED = {16: 25, 318: 38, 435: 38}  # call: error. ioctl: ENOTTY; getrandom and clone3: ENOSYS, so that callers do without
_CLONE, _PIVOT_ROOT, _CAPSET = 56, 155, 126
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446
_LIST, _READ, _WRITE = 1 << 3, 1 << 2 | 1 << 3, 1 << 1 | 1 << 14  # Landlock: list folders; read them and files; change files
_LEAST_LANDLOCK = 3  # the first that restricts truncation


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _syscall(number: int, what: str, *arguments) -> int:
    return _check(_libc.syscall(number, *arguments), what)


def _prctl(option: int, *arguments: int) -> None:
    _check(_libc.prctl(option, *(ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0)[:4])), "prctl")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, data)]
    _check(_libc.mount(*encoded[:3], ctypes.c_ulong(flags), encoded[3]), f"mount {target}")


def _mount_attributes(path: str, attributes: int) -> None:
    """Add attributes (1 read-only, 2 nosuid, 4 nodev, 8 noexec) to a mount and all below it."""
    _syscall(_MOUNT_SETATTR, "mount_setattr", -100, path.encode(), 0x8000, struct.pack("4Q", attributes, 0, 0, 0), 32)


def places(own: str) -> dict[str, list[str]]:
    """The folders of Python and of the libraries, and `own`, a folder of modules that a worker imports.

    Returns:
        `path`: for sys.path. `visible`: what workers see. `hidden`: other packages, inside of it. `readable`: for Landlock.
    Raises:
        ValueError: a library is missing.
    """
    standard = list(dict.fromkeys(os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")))
    hidden = [f"{folder}/{name}" for folder in standard for name in ("site-packages", "dist-packages")]
    packages = []
    for name in LIBRARIES:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"The tool 'python' needs {name}; pip install 'imagent-jax[sandbox]'.")
        packages.append(spec.submodule_search_locations[0])
    parents = list(dict.fromkeys(os.path.dirname(package) for package in packages))
    packages += [entry.path for parent in parents for entry in os.scandir(parent) if entry.name.endswith(".libs")]
    inner = [entry.path for folder in standard for entry in os.scandir(folder) if entry.path not in hidden]
    listed = [f"{folder}/" for folder in standard]
    return {"path": [own, *parents], "visible": standard + packages, "hidden": hidden, "readable": inner + packages + listed}


# ---- the process that starts workers ------------------------------------------------------------------------------------


def enter_private_root(visible: list[str], hidden: list[str]) -> None:
    """Move this process into namespaces of its own, with a root that holds `visible`, read-only, and nothing else.

    There is no network interface, no /proc, /dev, /etc or home folder. An ordinary user needs user namespaces; root needs none.

    Args:
        visible: folders, shown at their own paths.
        hidden: folders among them that are shown empty, so that `visible` may name parts of them.

    Raises:
        OSError: the kernel or the container refuses.
    """
    uid, gid = os.geteuid(), os.getegid()
    user = _NEWUSER if uid else 0
    _check(_libc.unshare(user | _NEWNS | _NEWNET | _NEWIPC | _NEWUTS | _NEWCGROUP), "unshare")
    if user:
        for name, line in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
    _mount("none", "/", None, _REC | _PRIVATE)
    root = "/sys"  # a folder that every system has and that `visible` does not need
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "mode=0755")
    for path in visible:
        if os.path.isdir(path) and not os.path.exists(root + path):
            os.makedirs(root + path)
            _mount(path, root + path, None, _BIND | _REC)
            for inner in hidden:
                if os.path.isdir(root + inner) and inner.startswith(path + "/"):
                    _mount("tmpfs", root + inner, "tmpfs", _NOSUID | _NODEV, "mode=0755")
    os.mkdir(root + HOME)
    if not os.path.exists(root + "/tmp"):
        os.symlink(HOME, root + "/tmp")
    os.chdir(root)
    _syscall(_PIVOT_ROOT, "pivot_root", b".", b".")
    _check(_libc.umount2(b".", 2), "umount")  # MNT_DETACH: the old root
    os.chdir("/")
    _mount_attributes("/", 1 | _NOSUID | _NODEV)


def start_process(namespaces: bool) -> int:
    """Fork; with `namespaces`, the child is the first process of its own process and mount namespaces. Returns as `os.fork`."""
    ctypes.pythonapi.PyOS_BeforeFork()
    pid = _libc_with_gil.syscall(_CLONE, ctypes.c_ulong((_NEWPID | _NEWNS if namespaces else 0) | signal.SIGCHLD), 0, 0, 0, 0)
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
    else:
        ctypes.pythonapi.PyOS_AfterFork_Parent()
    return _check(pid, "clone")


# ---- a worker -----------------------------------------------------------------------------------------------------------


def confine_worker(limits: dict[str, int], base_bytes: int, folder: str | None, readable: list[str]) -> None:
    """Give up all rights that a worker does not need. There is no way back.

    Args:
        limits: `cpu_s`, `memory_mb`, `files`, `disk_mb`.
        base_bytes: address space that the process has before any code runs.
        folder: None: mount a private folder (namespaces). Else the worker's folder, whose existing files alone it may write
            (Landlock); `readable` are the paths that it may read, and those ending in "/" the folders that it may only list.
    """
    disk = limits["disk_mb"] << 20
    if folder is None:
        options = f"size={disk},nr_inodes=4096,mode=0700,uid={NOBODY},gid={NOBODY}"
        _mount("tmpfs", HOME, "tmpfs", _NOSUID | _NODEV | _NOEXEC, options)
    os.chdir(folder or HOME)
    ruleset = None if folder is None else _landlock_rules(folder, readable)
    for kind, most in (
        (resource.RLIMIT_CPU, limits["cpu_s"]),
        (resource.RLIMIT_AS, base_bytes + (limits["memory_mb"] << 20)),
        (resource.RLIMIT_FSIZE, disk),
        (resource.RLIMIT_NOFILE, limits["files"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_STACK, 16 << 20),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    _drop_rights(become_nobody=folder is None and os.geteuid() == 0)
    _prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no worker outlives the process that started it
    _prctl(38, 1)  # PR_SET_NO_NEW_PRIVS
    if ruleset is not None:
        _syscall(_LANDLOCK_RESTRICT, "landlock_restrict_self", ruleset, 0)
        os.close(ruleset)
    filter_calls()


def _drop_rights(become_nobody: bool) -> None:
    if become_nobody:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _syscall(_CAPSET, "capset", header, nothing)


def landlock_version() -> int:
    """The kernel's version of Landlock; below `_LEAST_LANDLOCK` it is of no use here.

    Raises:
        OSError: too old, or none.
    """
    version = _syscall(_LANDLOCK_CREATE, "landlock", None, 0, 1)
    if version < _LEAST_LANDLOCK:
        raise OSError(f"Landlock has version {version}; {_LEAST_LANDLOCK} (Linux 6.2) is needed")
    return version


def _landlock_rules(folder: str, readable: list[str]) -> int:
    handled = (1 << (16 if landlock_version() >= 5 else 15)) - 1
    ruleset = _syscall(_LANDLOCK_CREATE, "landlock_create_ruleset", struct.pack("Q", handled), 8, 0)
    for path, rights in [(path, _LIST if path.endswith("/") else _READ) for path in readable] + [(folder, _READ | _WRITE)]:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rights &= -1 if os.path.isdir(path) else ~_LIST
        _syscall(_LANDLOCK_ADD, "landlock_add_rule", ruleset, 1, struct.pack("=Qi", rights, parent), 0)
        os.close(parent)
    return ruleset


def filter_calls() -> None:
    """Let only the system calls of `_ALLOWED` through; others fail with EPERM, or end the process where made in another ABI."""
    load, equal, at_least, ret = 0x20, 0x15, 0x35, 0x06
    allow, kill, permission = 0x7FFF0000, 0x80000000, 0x00050001
    program = [(load, 0, 0, 4), (equal, 1, 0, 0xC000003E), (ret, 0, 0, kill), (load, 0, 0, 0)]
    program += [(at_least, 0, 1, 0x40000000), (ret, 0, 0, kill)]
    for number in _ALLOWED.values():
        program += [(equal, 0, 1, number), (ret, 0, 0, allow)]
    for number, error in _REFUSED.items():
        program += [(equal, 0, 1, number), (ret, 0, 0, 0x00050000 | error)]
    for number, (argument, values) in _ALLOWED_WITH.items():
        checks = [(load, 0, 0, 16 + 8 * argument)]
        for value in values:
            checks += [(equal, 0, 1, value), (ret, 0, 0, allow)]
        program += [(equal, 0, len(checks) + 1, number), *checks, (ret, 0, 0, permission)]
    program += [(ret, 0, 0, permission)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    whole = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)))
    _prctl(22, 2, ctypes.addressof(whole))
