"""The inside of a worker: runs the code of one trajectory, call by call. Started by `zygote.py`; nothing here is trusted.

Messages are a length (4 bytes, little-endian), a JSON object of that length, and raw pixels where the object announces them.
"""

import ast
import datetime
import io
import json
import os
import random
import re
import struct
import sys
import threading
import time

import cv2
import decode
import numpy as np
import numpy.fft  # noqa: F401 - imported here once, so that no worker has to; so are the next
import numpy.linalg  # noqa: F401
import numpy.random  # noqa: F401
import scipy.ndimage  # noqa: F401
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps  # noqa: F401

SHOWN_SIDE, FRAMES, MESSAGE, NAME = 16384, 3, 300, 80
"""Largest side of a shown image, frames of a traceback that are reported, characters of its message and of names in it."""
FOLDER = "/sandbox"
"""The worker's folder, as it is called in what code printed and raised."""
INPUT, OUTPUT = "path_to_input_image.jpg", "path_to_output_image.jpg"


# ---- messages -----------------------------------------------------------------------------------------------------------


Image.init()


class Wire:
    """The two pipes to the trainer."""

    def __init__(self, incoming: int, outgoing: int):
        self._incoming, self._outgoing = incoming, outgoing

    def read(self, count: int) -> bytes:
        parts = []
        while count:
            part = os.read(self._incoming, min(count, 1 << 20))
            if not part:
                os._exit(0)  # the trajectory has ended
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def receive(self) -> dict:
        return json.loads(self.read(struct.unpack("<I", self.read(4))[0]))

    def send(self, message: dict, *payload: bytes) -> None:
        for part in (frame(message), *payload):
            view = memoryview(part)
            while view:
                view = view[os.write(self._outgoing, view) :]

    def fetch(self, number: int) -> Image.Image:
        """The trajectory's image of a number."""
        self.send({"want": number})
        width, height = self.receive()["size"]
        return Image.frombytes("RGB", (width, height), self.read(width * height * 3))


def frame(message: dict) -> bytes:
    """A message as it is sent."""
    text = json.dumps(message).encode()
    return struct.pack("<I", len(text)) + text


# ---- what code sees -----------------------------------------------------------------------------------------------------


class Images:
    """The trajectory's images by number, from 1. Pixels are fetched when they are first used; every use gets a copy."""

    def __init__(self, wire):
        self._wire, self._count, self._kept = wire, 0, {}

    def __len__(self):
        return self._count

    def __iter__(self):
        return (self[number] for number in range(1, self._count + 1))

    def __getitem__(self, number):
        if not isinstance(number, (int, np.integer)) or not 1 <= number <= self._count:
            valid = f"image numbers are 1 to {self._count}" if self._count else "there are no images"
            raise KeyError(f"there is no images[{number!r}]; {valid}")
        number = int(number)
        if number not in self._kept:
            self._keep(number, self._wire.fetch(number))
        return self._kept[number].copy()

    def _keep(self, number, image):
        image.info = {"number": number}
        self._kept[number] = image

    def _begin(self, count):
        """Start a call: forget what the last call showed in vain."""
        self._count = count
        self._kept = {number: image for number, image in self._kept.items() if number <= count}


class Shown:
    """The images that a call shows."""

    def __init__(self, images: Images):
        self._images, self._room, self._pixels = images, 0, 0
        self._items = []

    def _begin(self, room, pixels):
        self._room, self._pixels, self._items = room, pixels, []

    def show(self, image, parent=None):
        """Show an image: PIL, NumPy (RGB), or the path of a file. Returns its number."""
        rgb = to_rgb(image)
        if parent is None:
            parent = image.info.get("number") if isinstance(image, Image.Image) else None
        if len(self._items) >= self._room:
            raise ValueError("no more images can be shown")
        if not 1 <= min(rgb.size) <= max(rgb.size) <= SHOWN_SIDE or rgb.width * rgb.height > self._pixels:
            raise ValueError(f"an image of {rgb.width} x {rgb.height} pixels is too large to show")
        self._pixels -= rgb.width * rgb.height
        self._items.append((rgb, parent if type(parent) is int and 1 <= parent <= self._images._count else None))
        number = self._images._count = self._images._count + 1
        self._images._keep(number, rgb)
        return number


def to_rgb(image):
    """A shown thing as an RGB image of its own, by the rules of `images/decode.py`."""
    if isinstance(image, (str, os.PathLike)):
        with open(image, "rb") as file:
            return decode.read_image(file.read())
    if not isinstance(image, Image.Image):
        image = Image.fromarray(to_bytes(np.asarray(image)))
    rgb = decode.to_rgb(image)
    return image.copy() if rgb is image else rgb


def to_bytes(array):
    """An array as uint8 [h, w], [h, w, 3] or [h, w, 4]. Truth values and floats up to 1 span black to white."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or array.dtype.kind not in "biuf":
        raise ValueError(f"show takes an image or an array [h, w] or [h, w, 3], got {array.dtype} {list(array.shape)}")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    array = np.nan_to_num(array)
    if array.dtype.kind == "b" or (array.dtype.kind == "f" and array.size and array.max() <= 1):
        array = array * 255.0
    return np.clip(array, 0, 255).round().astype(np.uint8)


class Printed(io.TextIOBase):
    """Standard output and error of a call, up to a number of characters."""

    def __init__(self, most: int):
        self._most = most
        self._begin()

    def _begin(self):
        self._parts, self._kept, self._total = [], 0, 0

    def writable(self):
        return True

    def write(self, text):
        self._total += len(text)
        if part := text[: max(self._most - self._kept, 0)]:
            self._parts.append(part)
            self._kept += len(part)
        return len(text)

    def _text(self):
        cut = self._total - self._kept
        return without_addresses("".join(self._parts)) + (f"\n... {cut} more characters" if cut > 0 else "")


# ---- clock and entropy --------------------------------------------------------------------------------------------------


class Clock:
    """Simulated time: every reading takes a millisecond, and sleeping takes no real time."""

    def __init__(self, start: int):
        self.start = self.now_ns = start * 10**9

    def read_ns(self, *_):
        self.now_ns += 10**6
        return self.now_ns

    def since_ns(self, *_):
        return self.read_ns() - self.start

    def sleep(self, seconds):
        if seconds < 0:
            raise ValueError("sleep length must be non-negative")
        self.now_ns += int(seconds * 10**9)


class TickMeter:
    """`cv2.TickMeter` by another clock."""

    def __init__(self):
        self.reset()

    def reset(self):
        self._begun = self._last = self._total = self._count = 0

    def start(self):
        self._begun = cv2.getTickCount()

    def stop(self):
        if self._begun:
            self._last, self._begun = cv2.getTickCount() - self._begun, 0
            self._total, self._count = self._total + self._last, self._count + 1

    getCounter = lambda self: self._count  # noqa: E731
    getTimeTicks, getLastTimeTicks = lambda self: self._total, lambda self: self._last
    getTimeMicro, getLastTimeMicro = lambda self: self._total / 1e3, lambda self: self._last / 1e3
    getTimeMilli, getLastTimeMilli = lambda self: self._total / 1e6, lambda self: self._last / 1e6
    getTimeSec, getLastTimeSec = lambda self: self._total / 1e9, lambda self: self._last / 1e9
    getAvgTimeSec = lambda self: self._total / 1e9 / max(self._count, 1)  # noqa: E731
    getAvgTimeMilli = lambda self: self._total / 1e6 / max(self._count, 1)  # noqa: E731
    getFPS = lambda self: self._count * 1e9 / self._total if self._total else 0.0  # noqa: E731


def seed_world(seed: int) -> None:
    """Make time, entropy and the process's numbers, as Python code reads them, functions of `seed`."""
    clock, entropy = Clock(1_700_000_000), random.Random(seed)
    time.time_ns, time.sleep = clock.read_ns, clock.sleep
    time.time = lambda: clock.read_ns() / 1e9
    for name in ("monotonic", "perf_counter", "process_time", "thread_time"):
        setattr(time, f"{name}_ns", clock.since_ns)
        setattr(time, name, lambda: clock.since_ns() / 1e9)
    time.clock_gettime_ns = lambda kind: clock.read_ns() if kind == time.CLOCK_REALTIME else clock.since_ns()
    time.clock_gettime = lambda kind: time.clock_gettime_ns(kind) / 1e9
    for name in ("gmtime", "localtime", "ctime"):
        plain = getattr(time, name)
        setattr(time, name, lambda seconds=None, plain=plain: plain(time.time() if seconds is None else seconds))
    for name, given in (("strftime", 1), ("asctime", 0)):
        plain = getattr(time, name)
        setattr(time, name, lambda *a, plain=plain, given=given: plain(*a, *([time.gmtime()] if len(a) == given else [])))

    class Seeded(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(time.time(), tz)

        @classmethod
        def utcnow(cls):
            utc = datetime.timezone.utc  # noqa: UP017 - a server may have Python 3.10
            return cls.fromtimestamp(time.time(), utc).replace(tzinfo=None)

        today = now

    Seeded.__name__ = Seeded.__qualname__ = "datetime"
    datetime.datetime = Seeded

    os.urandom = random._urandom = entropy.randbytes
    os.getrandom = lambda size, flags=0: entropy.randbytes(size)
    plain_seed = random.Random.seed
    random.Random.seed = lambda self, a=None, version=2: plain_seed(self, entropy.randbytes(32) if a is None else a, version)
    random.seed = random._inst.seed  # it was bound to the plain one
    random.seed(seed)
    np.random.seed(seed % 2**32)
    cv2.setRNGSeed(seed % 2**31)
    cv2.getTickCount = cv2.getCPUTickCount = clock.since_ns
    cv2.getTickFrequency, cv2.TickMeter = lambda: 1e9, TickMeter
    os.getpid, os.getppid, threading.get_native_id = lambda: 1, lambda: 0, lambda: 1


# ---- calls --------------------------------------------------------------------------------------------------------------


def without_addresses(text: str) -> str:
    """Text in which objects, as `repr` writes them, have no address: it would differ from run to run."""
    return re.sub(r" at 0x[0-9a-fA-F]{6,16}(?=>)", " at 0x0", text)


def describe(error: BaseException, sources: dict[str, str]) -> str:
    """An exception in a line: its type and message, and the innermost lines of the calls' own code that it passed."""
    lines = []
    if isinstance(error, SyntaxError) and error.filename in sources:
        lines, message = [(error.filename, error.lineno or 0, "")], str(error.msg)
    else:
        message, trace = str(error), error.__traceback__
        while trace is not None:
            code = trace.tb_frame.f_code
            if code.co_filename in sources:
                lines = [*lines[1 - FRAMES :], (code.co_filename, trace.tb_lineno, code.co_name)]
            trace = trace.tb_next
    told = []
    for name, number, function in lines:
        text = sources[name].splitlines()[number - 1 : number] if number else []
        where = f" in {function[:NAME]}" if function not in ("", "<module>") else ""
        told.append(f"line {number}{where}: {text[0].strip()[:NAME] if text else ''}")
    message = without_addresses(message)
    kind = type(error).__name__[:NAME]
    head = f"{kind}: {message[:MESSAGE]}" if message else kind
    return head + (f" ({'; '.join(told)})" if told else "")


class Session:
    """The calls of one trajectory."""

    def __init__(self, wire, printed: int):
        self.wire, self.printed, self.folder = wire, Printed(printed), os.getcwd()
        self.images = Images(wire)
        self.shown = Shown(self.images)
        self.names = {"__name__": "__main__", "images": self.images, "show": self.shown.show}
        self.sources: dict[str, str] = {}

    def call(self, request: dict) -> None:
        """Run the code of a request and send the result."""
        code, name = request["code"], f"<call {len(self.sources) + 1}>"
        self.sources[name] = code
        self.images._begin(request["count"])
        self.shown._begin(request["room"], request["pixels"])
        self.printed._begin()
        sys.stdout = sys.stderr = self.printed
        error = None
        try:
            if INPUT in code and len(self.images):
                self.images[1].save(INPUT, "PNG", compress_level=1)
            self.run(code, name)
            self.show_output(code)
        except SystemExit as end:
            error = f"SystemExit: {str(end.code)[:MESSAGE]}"
        except BaseException as raised:  # noqa: BLE001 - whatever the code raises is its result
            error = describe(raised, self.sources)
        items = [] if error else self.shown._items
        shown = [[rgb.width, rgb.height, parent] for rgb, parent in items]
        text, error = (said and said.replace(self.folder, FOLDER) for said in (self.printed._text(), error))
        reply = {"text": text, "error": error, "shown": shown}
        self.wire.send(reply, *(rgb.tobytes() for rgb, _ in items))
        self.shown._items = items = []

    def run(self, code: str, name: str) -> None:
        """Run code to its end, which may be an exit without an error."""
        try:
            exec(compile(ast.parse(code, name), name, "exec"), self.names)
        except SystemExit as end:
            if end.code:
                raise

    def show_output(self, code: str) -> None:
        """Show the file in which code of Visual-ARFT's form leaves its image."""
        if OUTPUT in code and os.path.exists(OUTPUT) and os.path.getsize(OUTPUT):
            self.shown.show(OUTPUT, parent=1 if INPUT in code and len(self.images) else None)
            os.truncate(OUTPUT, 0)


def begin(wire, seed: int, printed: int) -> Session:
    """Begin a trajectory, whose clock and entropy come from `seed`."""
    os.environ.clear()
    sys.argv[:] = [""]
    seed_world(seed)
    wire.send({"ready": True})
    return Session(wire, printed)


def serve(incoming: int, outgoing: int, seed: int, printed: int) -> None:
    """Answer requests until the trainer closes the pipe."""
    session = begin(Wire(incoming, outgoing), seed, printed)
    while True:
        session.call(session.wire.receive())
