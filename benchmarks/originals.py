"""Memory of decoded originals at several `images.originals_gb`: `python benchmarks/originals.py [--tasks 64]`.

Tasks of 8 photographs of 4 megapixels (JPEG) begin in an environment each, a process for each setting. Reports the largest
resident memory of each, what the files themselves take, and the processor time of decoding one. Writes
benchmarks/results/originals.json.
"""

import io
import json
import sys
import time

import common
import numpy as np
from PIL import Image

SIZE, IMAGES = (2310, 1732), 8
ROOMS = ("inf", "4", "1")


def photograph(seed: int) -> bytes:
    """A smooth random picture as JPEG, about as large as a photograph's file."""
    rng, out = np.random.default_rng(seed), io.BytesIO()
    small = Image.fromarray(rng.integers(0, 256, (SIZE[1] // 6, SIZE[0] // 6, 3), np.uint8))
    small.resize(SIZE, Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
    return out.getvalue()


def held(room: str, tasks: int) -> dict:
    """Begin all tasks and hold their environments, as a step of training does."""
    from imagent_jax.config import ImagesConfig
    from imagent_jax.images.decode import read_image
    from imagent_jax.images.originals import Originals
    from imagent_jax.rollout.environment import ToolEnvironment
    from imagent_jax.tools import ToolSettings, tools_by_name
    from imagent_jax.types import Task

    memory = common.PeakMemory()
    settings = ToolSettings(originals=Originals(float(room) * 1e9))
    tools, size, files, environments = tools_by_name(["visual_confirmation"]), ImagesConfig(), 0, []
    for n in range(tasks):
        images = tuple(photograph(n * IMAGES + i)[:] for i in range(IMAGES))
        files += sum(map(len, images))
        environment = ToolEnvironment(tools, settings, size)
        environment.reset(Task(str(n), "?", images, "1"))
        for entry in environment.images:
            entry.source.decoded()
        environments.append(environment)
    began = time.process_time()
    read_image(images[0])
    return {"decode_cpu_ms": round(1e3 * (time.process_time() - began), 1), "files_gb": round(files / 1e9, 2)} | memory.read()


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--tasks", type=int, default=64)
    parser.add_argument("--room", help="measure this setting, in this process")
    args = parser.parse_args()
    if args.room:
        print(json.dumps(held(args.room, args.tasks)))
        return
    rooms = {room: common.child(__file__, ["--tasks", args.tasks, "--room", room]) for room in ROOMS}
    for room, figures in rooms.items():
        print(f"images.originals_gb {room}: {figures}")
    common.report("originals", args, {"tasks": args.tasks, "rooms": rooms})


if __name__ == "__main__":
    sys.exit(main())
