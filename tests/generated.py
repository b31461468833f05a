"""Programs and turns of the kind that policies write, and random changes to them."""

import json
import random
import re

REAL = """
im = images[1]
w, h = im.size
left, right = im.crop((0, 0, w // 2, h)), im.crop((w // 2, 0, w, h))
print(left.size, right.size)
show(right.resize((w, h)))
---
import numpy as np
a = np.asarray(images[2].convert('L')).astype(float)
print(a.mean(), a.std(), a.shape)
mask = a > a.mean()
print('bright part', mask.mean())
show(mask)
---
import cv2
import numpy as np
img = np.array(images[1])
gray = cv2.cvtColor(img, cv2.COLOR_RGB2GRAY)
edges = cv2.Canny(gray, 50, 150)
contours, _ = cv2.findContours(edges, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
print(len(contours))
for c in contours[:3]:
    x, y, w, h = cv2.boundingRect(c)
    cv2.rectangle(img, (x, y), (x + w, y + h), (255, 0, 0), 1)
show(img)
---
from PIL import ImageDraw, ImageEnhance
im = ImageEnhance.Contrast(images[1]).enhance(1.5)
draw = ImageDraw.Draw(im)
draw.rectangle((2, 2, 12, 12), outline='red')
number = show(im)
print('shown as', number)
---
def diff(a, b):
    a, b = a.resize((16, 16)), b.resize((16, 16))
    return sum(abs(x - y) for p, q in zip(a.getdata(), b.getdata()) for x, y in zip(p, q))
for i in range(1, len(images) + 1):
    for j in range(i + 1, len(images) + 1):
        print(i, j, diff(images[i], images[j]))
---
import scipy.ndimage as ndi
import numpy as np
a = np.asarray(images[2])[:, :, 0] > 100
labels, count = ndi.label(a)
print(count, [int((labels == i).sum()) for i in range(1, min(count, 4) + 1)])
show((labels * 40).astype(np.uint8))
---
from PIL import Image
image = Image.open('path_to_input_image.jpg')
image.rotate(-90, expand=True).save('path_to_output_image.jpg')
---
import cv2
image = cv2.imread('path_to_input_image.jpg')
cv2.imwrite('path_to_output_image.jpg', cv2.rotate(image, cv2.ROTATE_180))
---
import cv2
import numpy as np
image = cv2.imread('path_to_input_image.jpg')
lighter = np.clip(image.astype(np.float32) * 2.5 + 10, 0, 255).astype(np.uint8)
cv2.imwrite('path_to_output_image.jpg', lighter)
---
import cv2
image = cv2.imread('path_to_input_image.jpg')
hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
hsv[:, :, 2] = (hsv[:, :, 2] * 0.4).astype('uint8')
cv2.imwrite('path_to_output_image.jpg', cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR))
---
import cv2
image = cv2.imread('path_to_input_image.jpg')
soft = cv2.GaussianBlur(image, (0, 0), 3)
cv2.imwrite('path_to_output_image.jpg', cv2.addWeighted(image, 1.8, soft, -0.8, 0))
---
import cv2
image = cv2.imread('path_to_input_image.jpg')
cv2.imwrite('path_to_output_image.jpg', cv2.fastNlMeansDenoisingColored(cv2.medianBlur(image, 3), None, 5, 5, 3, 7))
---
from PIL import Image
image = Image.open('path_to_input_image.jpg')
width, height = image.size
box = (width * 100 // 1000, height * 250 // 1000, width * 600 // 1000, height * 750 // 1000)
image.crop(box).resize((64, 64), Image.LANCZOS).save('path_to_output_image.jpg')
---
import cv2
img = cv2.imread('path_to_input_image.jpg')
h, w = img.shape[:2]
m = cv2.getRotationMatrix2D((w / 2, h / 2), 45, 1.0)
cv2.imwrite('path_to_output_image.jpg', cv2.warpAffine(img, m, (w, h)))
---
counts = {}
for p in images[1].getdata():
    key = tuple(c // 64 for c in p)
    counts[key] = counts.get(key, 0) + 1
for key, n in sorted(counts.items(), key=lambda kv: -kv[1])[:5]:
    print(key, n)
---
import random, time, json
t = time.time()
random.seed(7)
state = {'seen': [random.randint(1, len(images)) for _ in range(5)], 't': t}
try:
    state['x'] = 1 / (state['seen'][0] - state['seen'][0])
except ZeroDivisionError as error:
    state['x'] = str(error)
print(json.dumps(state))
""".strip().split("\n---\n")
WORDS = ["0", "1", "-1", "2**31", "10**9", "None", "''", "[]", "images", "show", "print", "while True:", "del", "not", "lambda: 0", "raise",
         "return", "yield", "await", "global", "import os", "os._exit", "np.zeros", "*", "**", "(", ")", ":", "\n", "    ", "=", "\\", "\0",
         "'", '"', "#", "é", "\ud800", "exec", "open", "input", "range", "len", "self", "class A:", "1e400", "..."]  # fmt: skip


def changed(rng: random.Random) -> str:
    """A program, or two in one, with up to four random changes of its tokens."""
    tokens = re.findall(r"\w+|\s+|[^\w\s]", "\n".join(rng.sample(REAL, rng.randint(1, 2))))
    for _ in range(rng.randint(1, 4)):
        at, other = rng.randrange(len(tokens)), rng.randrange(len(tokens))
        numbers = [i for i, token in enumerate(tokens) if token.isdigit()]
        if numbers and rng.random() < 0.7:
            tokens[rng.choice(numbers)] = str(rng.choice((0, 1, 2, 3, 7, 64, 255, 1000, 10**6)))
            continue
        change = rng.randrange(6)
        if change == 0:
            del tokens[at : at + rng.randint(1, 6)]
        elif change == 1:
            tokens.insert(at, rng.choice(WORDS))
        elif change == 2:
            tokens[at] = rng.choice(WORDS)
        elif change == 3:
            tokens[at], tokens[other] = tokens[other], tokens[at]
        elif change == 4:
            tokens[at:at] = tokens[min(at, other) : max(at, other)][:40]
        else:
            tokens[at] *= 2
        tokens = tokens or ["pass"]
    return "".join(tokens)


# ---- turns ----------------------------------------------------------------------------------------------------------

TOOLS = {
    "visual_reflection": {"images": [[1], [2, 1], [], [3], [1, 1], [99]], "resolution": ["low", "high", "medium", None]},
    "visual_confirmation": {"image": [1, 2, 3, 0, "1"], "bbox_2d": [[0, 0, 500, 500], [10.5, 20, 30, 1000], [9, 9, 1, 1], [0, 0, 1]],
                            "label": ["the sign", "", 7]},
    "image_zoom_in_tool": {"bbox_2d": [[0, 0, 1000, 1000], "all"], "label": ["x"], "img_idx": [0, 1, 5, -1, 1.0, True]},
    "python": {"code": [*REAL, "", 3]},
    "search": {"query": ["who built the tower", "\u4e07\u91cc\u957f\u57ce", "", "x" * 600, None]},
    "unknown": {"a": [1]},
}  # fmt: skip
"""Names of tools, and values of their arguments, most of them good."""
PIECES = ["<tool_call>", "</tool_call>", "<tool_response>", "<answer>", "</answer>", "<|im_end|>", "<|image_pad|>", "{", "}", "[", "]",
          '"', "'", ",", ":", "\\", "\n", "\0", " ", "null", "true", "NaN", "-Infinity", "1e999", "9" * 5000, "[" * 2000, '{"a":' * 500,
          '"name"', '"arguments"', '"name": "python",', "\ud800", "\\ud800", "\\u0000", "\u0665", "\u202e", "\x1b[0m", "```python", "\ufeff"]  # fmt: skip


def turn(rng: random.Random) -> str:
    """The text of a turn: a call, an answer or neither, in two of three cases with up to four random changes."""
    kind = rng.random()
    name = rng.choice([*TOOLS])
    arguments = {key: rng.choice(values) for key, values in TOOLS[name].items() if rng.random() < 0.95}
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=rng.random() < 0.5)
    text = f"Let me see.\n<tool_call>\n{body}\n</tool_call>"
    if kind > 0.75:
        text = rng.choice(("So <answer>7</answer><|im_end|>", "<answer></answer>", "I cannot tell.<|im_end|>", "", text * 2))
    for _ in range(rng.randint(1, 4) if rng.random() < 0.67 else 0):
        at, other = rng.randint(0, len(text)), rng.randint(0, len(text))
        first, last = min(at, other), max(at, other)
        change = rng.randrange(5)
        if change < 2:
            text = text[:at] + rng.choice(PIECES) + text[at:]
        elif change == 2:
            text = text[:at] + text[at + rng.randint(1, 8) :]
        elif change == 3:
            text = text[:at] + text[first:last] + text[at:]
        else:
            text = text.replace(rng.choice(PIECES[:24]), rng.choice(PIECES), 1)
    return text
