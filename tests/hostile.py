"""Programs that try to get out of the sandbox or to harm what is around it, by kind. A program does harm if it runs to its end.

`$name` is replaced by a fact of the test's own scratch world (`World` in test_hostile_programs.py): a secret file and its folder,
ports, sockets and a process.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Program:
    """One hostile program.

    Attributes:
        kind: what it attacks.
        code: ends without an exception only if the attack works.
        untried: why the attack is not tried without the sandbox; "" where it is, and must work.
        root: without the sandbox it works for root only.
        hangs: harm is not to end.
        strict: stopped by namespaces only; Landlock shows names and sizes of files.
    """

    kind: str
    code: str
    untried: str = ""
    root: bool = False
    hangs: bool = False
    strict: bool = False

    @property
    def name(self) -> str:
        """The kind and the beginning of the code."""
        return f"{self.kind}: {' '.join(self.code.split())[:70]}"


def programs(kind: str, *codes: str, **options) -> list[Program]:
    return [Program(kind, code, **options) for code in codes]


ABSENT = (38, 93, 94, 97)
"""Errors by which a kernel says that it was built without a system call, a protocol, a kind or a family of sockets."""

# ---- the network --------------------------------------------------------------------------------------------------------

FAMILIES = {"unix": 1, "inet": 2, "inet6": 10, "netlink": 16, "packet": 17, "rds": 21, "can": 29, "tipc": 30, "bluetooth": 31,
            "alg": 38, "vsock": 40, "kcm": 41, "qipcrtr": 42, "smc": 43, "xdp": 44}  # fmt: skip
TYPES = {"alg": 5, "packet": 3, "netlink": 3, "can": 3, "bluetooth": 3, "rds": 5, "xdp": 3, "kcm": 2, "qipcrtr": 2}
NETWORK = [
    *(Program("network", f"import socket\nsocket.socket({number}, {TYPES.get(name, 1)})  # {name}",
              root=name in ("packet", "xdp", "bluetooth", "can")) for name, number in FAMILIES.items()),
    *programs(
        "network",
        "import socket\nsocket.create_connection(('127.0.0.1', $port)).sendall(b'$secret')",
        "import socket\nsocket.socket(2, 2).sendto(b'$secret', ('127.0.0.1', $udp))",
        "import socket\nsocket.socket(1, 1).connect('$unix')",
        "import socket\nsocket.socket(1, 1).connect('\\0$abstract')",
        "import socket\ns = socket.socket()\ns.bind(('127.0.0.1', 0))\ns.listen()",
        "import socket\nsocket.socket(1, 1).bind('\\0$abstract-own')",
        "import socket\nsocket.create_server(('', 0))",
        "import socket\nsocket.gethostbyname('localhost')",
        "import socket\nsocket.getaddrinfo('localhost', 80)",
        "import socket\nsocket.socketpair()",
        "import socket\nassert len(socket.if_nameindex()) >= 1",
        "import urllib.request\ntry:\n    urllib.request.urlopen('http://127.0.0.1:$port/', timeout=3)\nexcept ConnectionResetError:\n    pass  # connected",
        "import http.client\nhttp.client.HTTPConnection('127.0.0.1', $port, timeout=3).request('GET', '/')",
        "import asyncio\nasyncio.run(asyncio.open_connection('127.0.0.1', $port))",
        "import asyncio\nasyncio.run(asyncio.sleep(0))  # a loop has a socket",
        "import ctypes\nassert ctypes.CDLL(None).socket(2, 1, 0) >= 0",
        "import ctypes\nassert ctypes.CDLL(None).syscall(41, 2, 1, 0) >= 0  # socket",
        "import ctypes\nassert ctypes.CDLL(None).syscall(53, 1, 1, 0, ctypes.create_string_buffer(8)) >= 0  # socketpair",
        "from multiprocessing.connection import Client\nClient(('127.0.0.1', $port), 'AF_INET').fileno()",
        "import socketserver\nsocketserver.TCPServer(('127.0.0.1', 0), None)",
        "import logging.handlers\nlogging.handlers.SysLogHandler(('127.0.0.1', $udp)).socket.fileno()",
        "import ssl, socket\nssl.create_default_context().wrap_socket(socket.socket(), server_hostname='x').fileno()",
    ),
]  # fmt: skip

# ---- reading ------------------------------------------------------------------------------------------------------------

FILES = ["/etc/passwd", "/etc/hostname", "/etc/hosts", "/proc/self/environ", "/proc/self/maps", "/proc/self/status", "/proc/1/status",
         "/proc/self/mountinfo", "/proc/net/tcp", "/proc/cpuinfo", "/proc/$pid/environ", "/proc/$pid/cmdline", "/proc/$pid/maps",
         "/proc/self/cwd/../../../../../etc/passwd", "/proc/self/root/etc/passwd", "/proc/self/fd/../../$pid/environ",
         "/proc/sys/kernel/hostname", "/sys/kernel/mm/transparent_hugepage/enabled", "/dev/urandom", "/dev/zero", "/bin/sh",
         "$repository/pyproject.toml", "$repository/imagent_jax/tools/sandbox/host.py", "$package"]  # fmt: skip
READING = [
    *(Program("reading", f"assert open('{path}', 'rb').read(1)") for path in FILES),
    Program("reading", "assert open('/etc/shadow', 'rb').read(1)", root=True),
    Program("reading", "assert open('/proc/1/maps', 'rb').read(1)", untried="some machines refuse it to root as well"),
    *programs(
        "reading",
        "assert '$secret' in open('$file').read()",
        "assert b'$secret' in __import__('os').read(__import__('os').open('$file', 0), 99)",
        "import pathlib\nassert '$secret' in pathlib.Path('$file').read_text()",
        "import linecache\nassert '$secret' in linecache.getline('$file', 1)",
        "import mmap\nwith open('$file', 'rb') as f:\n    assert b'$secret' in mmap.mmap(f.fileno(), 0, prot=1)[:]",
        "import shutil\nshutil.copyfile('$file', 'path_to_output_image.jpg')",
        "import os\nos.symlink('$file', 'link')\nassert '$secret' in open('link').read()",
        "import os\nos.link('$file', 'link')\nassert '$secret' in open('link').read()",
        "import os\nassert '$secret' in open(os.path.relpath('$file')).read()",
        "import os\nos.chdir('$folder')\nassert '$secret' in open('secret').read()",
        "import os\nassert 'secret' in os.listdir('$folder')",
        "import os\nassert [e.name for e in os.scandir('$folder')]",
        "import glob\nassert glob.glob('$folder/*')",
        "import os\nassert list(os.walk('$folder'))",
        "import os\nassert os.listdir('/home') is not None",
        "import os\nassert '1' in os.listdir('/proc')",
        "import os\nassert len(os.listdir('/')) > 5",
        "import ctypes\nc = ctypes.CDLL(None)\nc.fopen.restype = ctypes.c_void_p\nassert c.fopen(b'$file', b'r')",
        "import ctypes\nassert ctypes.CDLL(None).syscall(2, b'$file', 0) >= 0  # open",
        "import ctypes\nassert ctypes.CDLL(None).syscall(257, -100, b'$file', 0) >= 0  # openat",
        "import ctypes, struct\nassert ctypes.CDLL(None).syscall(437, -100, b'$file', struct.pack('QQQ', 0, 0, 0), 24) >= 0  # openat2",
        "import ctypes\nctypes.CDLL('$library')",
        "import importlib.util\ns = importlib.util.spec_from_file_location('m', '$module')\ns.loader.exec_module("
        "importlib.util.module_from_spec(s))",
        "import runpy\nrunpy.run_path('$module')",
        "import tokenize\ntokenize.open('$file').close()",
        "import fileinput\nassert '$secret' in next(fileinput.input('$file'))",
        "import csv\nassert list(csv.reader(open('$file')))",
        "import zipimport, shelve, netrc\nnetrc.netrc('$netrc')",
        "import pwd\nassert pwd.getpwnam('root').pw_dir",
        "import grp\nassert grp.getgrall()",
        "import os\nassert os.path.expanduser('~root') != '~root'",
    ),
    *programs("reading names", "import os\nassert os.path.exists('$file')", "import os\nassert os.stat('$file').st_size",
              "import os\nassert os.access('$file', os.R_OK)", "import shutil\nassert shutil.which('true', path='/bin')", strict=True),
]  # fmt: skip

# ---- writing ------------------------------------------------------------------------------------------------------------

WRITING = [
    *programs(
        "writing",
        "open('$file', 'w').write('x')",
        "open('$file', 'a').write('x')",
        "open('$file', 'r+').write('x')",
        "open('$folder/new', 'x').write('x')",
        "import os\nos.truncate('$file', 0)",
        "import os\nos.unlink('$file')",
        "import os\nos.rename('$file', '$folder/other')",
        "open('mine', 'w').write('x')\nimport os\nos.replace('mine', '$file')",
        "import os\nos.chmod('$file', 0)",
        "import os\nos.utime('$file', (0, 0))",
        "import os\nos.setxattr('$file', 'user.x', b'x')",
        "import os\nos.mkdir('$folder/new')",
        "import os\nos.symlink('/', '$folder/link')",
        "import os\nos.link('$file', '$folder/link')",
        "import os\nos.mkfifo('$folder/fifo')",
        "import shutil\nshutil.rmtree('$folder')",
        "import os\nos.open('$folder', os.O_TMPFILE | os.O_RDWR)",
        "open('/tmp/../$folder/new', 'w').write('x')",
        "open('/var/tmp/imagent_hostile', 'w').write('x')\nimport os\nos.unlink('/var/tmp/imagent_hostile')",
        "open('/dev/shm/imagent_hostile', 'w').write('x')\nimport os\nos.unlink('/dev/shm/imagent_hostile')",
        "import os\nopen(os.__file__, 'r+').close()",
        "open('$package', 'r+').close()",
        "import ctypes\nassert ctypes.CDLL(None).syscall(85, b'$folder/new', 0o644) >= 0  # creat",
        "import ctypes\nassert ctypes.CDLL(None).syscall(76, b'$file', 0) == 0  # truncate",
        "import ctypes\nassert ctypes.CDLL(None).syscall(316, -100, b'$file', -100, b'$folder/other', 0) == 0  # renameat2",
        "import tempfile\ntempfile.NamedTemporaryFile(dir='$folder').name",
        "import pickle\npickle.dump(1, open('$folder/new', 'wb'))",
        "import logging\nlogging.FileHandler('$folder/log')",
        "import dbm.dumb\ndbm.dumb.open('$folder/db', 'c')",
        "import os\nos.mknod('$folder/node')",
    ),
    Program("writing", "open('$packages/hostile.py', 'w').close()", untried="it would change this Python"),
    Program("writing", "import os\nos.chown('$file', 1, 1)", root=True),
    Program("writing", "import os\nos.mknod('$folder/disk', 0o60600, os.makedev(254, 0))", root=True),
]  # fmt: skip

# ---- filling ------------------------------------------------------------------------------------------------------------

FILLING = programs(
    "filling",
    "with open('path_to_output_image.jpg', 'wb') as f:\n    for _ in range(40):\n        f.write(bytes(1 << 20))",
    "open('path_to_output_image.jpg', 'wb').truncate(1 << 36)",
    "import os\nos.posix_fallocate(os.open('path_to_output_image.jpg', os.O_RDWR | os.O_CREAT), 0, 1 << 26)",
    "import os\nos.pwrite(os.open('path_to_output_image.jpg', os.O_RDWR | os.O_CREAT), b'x', 1 << 30)",
    "for i in range(40):\n    open(f'part{i}', 'wb').write(bytes(1 << 20))",
    "for i in range(4200):\n    open(f'inode{i}', 'w').close()",
    "import os\nfor i in range(4200):\n    os.mkdir(f'folder{i}')",
    "import os\nfor i in range(4200):\n    os.symlink('x', f'link{i}')",
    "import os\nopen('a', 'w').close()\nfor i in range(4200):\n    os.link('a', f'hard{i}')",
    "import os\nfor i in range(4200):\n    os.mkdir('d')\n    os.chdir('d')",
    "kept = [open('path_to_output_image.jpg', 'wb') for _ in range(200)]",
    "import os\nkept = [os.dup(1) for _ in range(200)]",
    "import os\nkept = [os.pipe() for _ in range(100)]",
    "import os\nos.memfd_create('x')",
    "import multiprocessing.shared_memory as m\nm.SharedMemory(create=True, size=1 << 20).unlink()",
)

# ---- memory -------------------------------------------------------------------------------------------------------------

MEMORY = [
    *programs(
        "memory",
        "kept = bytearray(300 << 20)",
        "kept = 'x' * (300 << 20)",
        "kept = [0] * (40 << 20)",
        "kept = []\nfor i in range(30):\n    kept.append(bytes(10 << 20))",
        "kept = 'x'\nfor _ in range(29):\n    kept += kept",
        "kept = list(range(10**7))",
        "kept = {i: [i] for i in range(3 * 10**6)}",
        "import mmap\nkept = mmap.mmap(-1, 300 << 20)",
        "import mmap\nkept = mmap.mmap(-1, 300 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE",
        "import zlib\nc = zlib.compressobj()\nd = b''.join(c.compress(bytes(1 << 20)) for _ in range(300)) + c.flush()\n"
        "kept = zlib.decompress(d)",
        "import io, zipfile\nb = io.BytesIO()\nwith zipfile.ZipFile(b, 'w', 8) as z, z.open('x', 'w') as f:\n    for _ in range(300):\n"
        "        f.write(bytes(1 << 20))\nkept = zipfile.ZipFile(b).read('x')",
        "import gzip, io\nb = io.BytesIO()\nwith gzip.open(b, 'w') as f:\n    for _ in range(300):\n        f.write(bytes(1 << 20))\n"
        "kept = gzip.decompress(b.getvalue())",
        "import bz2\nc = bz2.BZ2Compressor()\nd = b''.join(c.compress(bytes(1 << 20)) for _ in range(150)) + c.flush()\n"
        "kept = bz2.decompress(d) * 2",
        "import ctypes\nc = ctypes.CDLL(None)\nc.malloc.restype = ctypes.c_void_p\nassert c.malloc(ctypes.c_size_t(300 << 20))",
        "import ctypes\nassert ctypes.CDLL(None).mlockall(1) == 0\nkept = bytearray(300 << 20)",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nkept = bytearray(300 << 20)",
        "import struct\nkept = struct.pack(f'{300 << 20}x')",
        "kept = 1 << (8 * (300 << 20))",
        "kept = ('%' + str(300 << 20) + 'd') % 1",
        "import itertools\nkept = list(itertools.repeat(0, 40 << 20))",
        "from collections import deque\nkept = deque(range(10**7))",
        "import array\nkept = array.array('d', bytes(300 << 20))",
        "class A:\n    pass\nkept = [A() for _ in range(4 * 10**6)]",
    ),
    *programs(
        "image bombs",
        "from PIL import Image\nImage.new('RGB', (12000, 12000)).load()",
        "import numpy as np\nkept = np.ones(40 << 20)",
        "import numpy as np\nkept = np.arange(40 << 20)",
        "import io\nfrom PIL import Image\nImage.MAX_IMAGE_PIXELS = None\nb = io.BytesIO()\nImage.new('1', (20000, 20000)).save(b, 'PNG')\n"
        "Image.open(b).convert('RGB').load()",
        "from PIL import Image\nImage.new('L', (10, 10)).resize((20000, 20000)).load()",
        "import cv2, numpy as np\nkept = cv2.resize(np.zeros((10, 10, 3), np.uint8), (12000, 12000))",
        "import cv2, numpy as np\nkept = cv2.copyMakeBorder(np.zeros((9, 9, 3), np.uint8), 6000, 6000, 6000, 6000, 0)",
        "import scipy.ndimage as n, numpy as np\nkept = n.zoom(np.zeros((100, 100)), 60, order=0)",
    ),
]  # fmt: skip

# ---- time ---------------------------------------------------------------------------------------------------------------

TIME = programs(
    "time",
    "while True:\n    pass",
    "while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n        pass",
    "import signal\nfor s in range(1, 32):\n    try:\n        signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError):\n        pass\n"
    "while True:\n    pass",
    "sum(range(10**13))",
    "10 ** (10 ** 9)",
    "import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
    "import ctypes\nctypes.CDLL(None).sleep(1000)",
    "import ctypes\nctypes.CDLL(None).poll(None, 0, -1)",
    "import select\nselect.select([], [], [])",
    "import threading\nl = threading.Lock()\nl.acquire()\nl.acquire()",
    "import threading\nthreading.Event().wait()",
    "import queue\nqueue.Queue().get()",
    "while True:\n    print('x' * 1000)",
    "import sys\nwhile True:\n    sys.stderr.write('x')",
    "class A:\n    def __del__(self):\n        while True:\n            pass\nA()",
    "class A(Exception):\n    def __str__(self):\n        while True:\n            pass\ntry:\n    raise A\nexcept A as e:\n    str(e)",
    "def f():\n    try:\n        f()\n    finally:\n        f()\nf()",
    "for _ in iter(int, 1):\n    pass",
    "import itertools\nall(itertools.count(1))",
    "import math\nmath.factorial(10**7)",
    "x = set()\nwhile True:\n    x = {len(x)}",
    "import collections\ncollections.deque(iter(int, 1), maxlen=0)",
    "import sys\nsys.settrace(lambda *a: None)\nwhile True:\n    pass",
    "import fractions\nx = fractions.Fraction(1, 3)\nwhile True:\n    x = (x * x).limit_denominator(99) + 1",
    hangs=True,
)
