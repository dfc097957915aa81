"""A page read back: its data, and the numbers in its pictures."""

import base64
import io
import json
import re

import numpy as np
import torch
from PIL import Image


def data(html):
    """What the page's scripts read."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    return json.loads(text)


def floats(text, *shape):
    """base64 of float32 as a tensor."""
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").copy()).view(*shape)


def picture(url):
    """A data URL as a PIL picture."""
    kind, text = url.split(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    assert f"image/{image.format.lower()}" == kind.removeprefix("data:")
    return image


def coordinates(stored, count, height, width):
    """The planes (K, height, width) of one of a picture's two sets of features."""
    image = picture(stored["image"])
    assert image.mode == "L" and set(image.info) <= {"icc_profile"}
    levels, columns = np.asarray(image), stored["columns"]
    assert levels.shape == (-(-count // columns) * height, columns * width)
    planes = [
        levels[k // columns * height :, k % columns * width :][:height, :width].astype(np.float32) for k in range(count)
    ]
    scale, offset = (torch.tensor(stored[name])[:, None, None] for name in ("scale", "offset"))
    return torch.from_numpy(np.stack(planes)) * scale + offset
