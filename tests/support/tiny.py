"""Small stand-ins made on the spot: an encoder, a checkpoint, photographs and cut-outs."""

import numpy as np
import torch
from PIL import Image

from anyup_fast.checkpoints import save_checkpoint
from anyup_fast.model import AnyUp

CONFIG = {"qk_dim": 32}


def encoder_folder(path):
    """A random two-layer DINOv2 with patch 14 and 32 channels, as a folder; its name as an encoder."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14, mlp_ratio=2
    )
    transformers.Dinov2Model(config).save_pretrained(path)
    statistics = '"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]'
    (path / "preprocessor_config.json").write_text(f'{{"image_processor_type": "BitImageProcessor", {statistics}}}')
    return f"hf:{path}"


def model(seed=0, **config):
    torch.manual_seed(seed)
    return AnyUp(**{**CONFIG, **config}).eval()


def checkpoint(path, seed=0):
    save_checkpoint(path, model(seed).state_dict(), CONFIG)
    return path


def photograph(path, size=(80, 100), seed=0):
    """A picture with two flat halves and some noise."""
    rng = np.random.default_rng(seed)
    picture = np.full((*size, 3), rng.integers(40, 200, 3))
    picture[:, size[1] // 2 :] = rng.integers(40, 200, 3)
    Image.fromarray((picture + rng.integers(-9, 10, picture.shape)).astype(np.uint8)).save(path)
    return path


def cutout(path, size=(40, 30), seed=0):
    """An opaque ellipse on nothing."""
    rows, cols = np.ogrid[-1 : 1 : size[0] * 1j, -1 : 1 : size[1] * 1j]
    picture = np.zeros((*size, 4), np.uint8)
    picture[..., :3] = np.random.default_rng(seed).integers(0, 256, 3)
    picture[..., 3] = 255 * (rows**2 + cols**2 <= 0.9)
    Image.fromarray(picture).save(path)
    return path


def picture_folders(root, scenes=3, stamps=3):
    """Folders of photographs and of cut-outs below `root`."""
    folders = root / "scenes", root / "stamps"
    for folder, count, make in zip(folders, (scenes, stamps), (photograph, cutout), strict=True):
        folder.mkdir(parents=True)
        for index in range(count):
            make(folder / f"{'abcdefghij'[index]}picture.png", seed=index)
    return folders
