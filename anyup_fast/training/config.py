"""Everything that a run of training depends on, checked before anything is computed."""

import os
from dataclasses import dataclass, field

OPTIMIZERS = ("adamw", "muon")
SHRINKS = (4, 2, 1)  # pictures give features at a quarter, at half and at all of their size
LEAST_CELLS = 8  # low-res cells of a crop along one axis, where the grid has so many


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on; two runs with equal settings on one machine give the same weights."""

    scenes: str | os.PathLike
    stamps: str | os.PathLike | None = None
    held_out: bool = True  # keep a fifth of scenes and stamps away from training
    encoders: tuple = ("dinov2_vits14",)  # "name" or "name:layer"; one named twice is drawn twice as often
    pictures: int = 600
    size: int = 448
    plain_share: float = 0.2  # pictures without cut-outs
    crop: tuple = (0.4, 1.0)  # least and greatest side of a picture's crop, as a share of the photograph's shorter side
    shapes_share: float = 0.0  # of the cut-outs are drawn shapes and strokes, filled from another photograph
    camouflage_share: float = 0.0  # of the cut-outs get colours near those of the ground that they cover
    steps: int = 4000
    batch: int = 4
    guide_pixels: int = 12544  # pixels of a guide, at most
    optimizer: str = "adamw"  # or "muon": the matrices' updates made orthogonal, AdamW for the rest
    lr: float = 6e-4
    warmup: int = 100
    weight_decay: float = 1e-5
    clip: float = 1.0
    ema: float = 0.998
    main_weight: float = 1.0
    dense_weight: float = 0.5
    mask_weight: float = 0.0  # weight of "mask"
    segment_weight: float = 0.0  # weight of "segment"
    large_share: float = 0.0  # of the steps: guides of four times the pixels, a quarter of the pictures
    region: int = 48  # pixels along each axis of the part of a guide that is decoded at its own resolution
    window_ratio: float = 0.1
    bf16: bool = True
    seed: int = 0
    draws: int = 0  # another number: other draws over the pictures of the same seed
    native_share: float = 0.3  # of the steps: features of the full picture at a guide's resolution, no finer target
    native_weight: float = 0.0  # weight of "native"
    spread_weight: float = 0.0  # weight of "spread"
    smooth_weight: float = 0.0  # weight of "smooth"
    degraded_share: float = 0.0  # of the steps show a blurred, noisy or JPEG-compressed guide
    variety_share: float = 0.0  # of the steps show features as another encoder might have made them
    recolour_share: float = 0.0  # of the steps show every instance of a guide in random colours of its own
    spot_share: float = 0.0  # of the recoloured instances carry spots of another colour
    noise_share: float = 0.0  # of the steps show features with noise, up to as large as they are; targets without
    consistency_weight: float = 0.1  # of "consistency", the paper's
    consistency_share: float = 0.1  # of the steps compute "consistency"; its weight there makes up for the others
    max_cells: int = 24  # low-res cells of a crop along one axis, at most
    init: str | None = None  # weights to go on from, as for AnyUp.from_pretrained
    model: dict = field(default_factory=dict)

    def __post_init__(self):
        for name in ("pictures", "size", "steps", "batch", "guide_pixels", "region"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.draws < 0:
            raise ValueError(f"draws: must be 0 or more, got {self.draws}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer: need one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if not 0 < self.lr < 1:
            raise ValueError(f"lr: must lie between 0 and 1, got {self.lr}")
        shares = (
            "plain_share",
            "shapes_share",
            "camouflage_share",
            "native_share",
            "degraded_share",
            "noise_share",
            "large_share",
            "variety_share",
            "recolour_share",
            "spot_share",
        )
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: must lie from 0 to 1, got {getattr(self, name)}")
        if len(self.crop) != 2 or not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(f"crop: need the least and the greatest share, above 0 and at most 1, got {self.crop}")
        if not 0 < self.consistency_share <= 1:
            raise ValueError(f"consistency_share: must be above 0 and at most 1, got {self.consistency_share}")
        if self.max_cells < LEAST_CELLS:
            raise ValueError(f"max_cells: must be at least {LEAST_CELLS}, got {self.max_cells}")
        if not self.encoders or isinstance(self.encoders, str) or not all(isinstance(e, str) for e in self.encoders):
            raise ValueError(f"encoders: need a tuple with at least one name, got {self.encoders!r}")
        if self.size % max(SHRINKS):
            raise ValueError(f"size: must be a multiple of {max(SHRINKS)} pixels, got {self.size}")
