"""Make the table of docs/encoders.md: `python docs/encoders.py` writes it, from tiny models at random weights.

Strides, tokens left out and sizes are what the loaded encoder says; the rest stands in `ROWS`.
"""

import contextlib
import io
import logging
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "encoders.md"
BEGIN, END = "<!-- made by docs/encoders.py -->", "<!-- end -->"

OWN = "of its preprocessor_config.json"
FINAL = "blocks; the last with the final norm"
BLOCKS = "blocks, as they are"
STAGES = "stages, each at its stride"
HUB, PAGES = "by their names on the hub", "see its page"
FILES = "`weights=` a `.pth` of its authors, or a checkout"


class Row(NamedTuple):
    """A line of the table.

    Attributes:
        family: its title. aliases: beginnings of the short names that are its. others: what else one may type.
        key: of tests/support/families.py, the model that the row is measured on; "" for a family of our own.
        patch: pixels of a patch in the released models; "" where the stages have strides of their own.
        statistics, licence, layer: in words.
    """

    family: str
    aliases: tuple
    others: str
    key: str
    patch: str
    statistics: str
    licence: str
    layer: str


ROWS = (
    Row("DINOv2", ("dinov2_",), "", "", "14", "ImageNet", "Apache-2.0", "blocks, each with the final norm"),
    Row("EfficientNet-Lite0", ("efficientnet_",), "", "", "", "127/255, 128/255", "Apache-2.0", "blocks"),
    Row("DINOv3 ViT", ("dinov3_vit",), FILES, "dinov3-vit", "16", OWN, "DINOv3 License, gated", FINAL),
    Row("DINOv3 ConvNeXt", ("dinov3_convnext_",), FILES, "dinov3-convnext", "", OWN, "DINOv3 License, gated",
        "stages; the last with the final norm"),
    Row("DINO", ("dino_",), "", "vit", "8, 16", OWN, "Apache-2.0", FINAL),
    Row("CLIP", ("clip_",), "`project=True`", "clip", "14, 16, 32", OWN, "MIT", BLOCKS),
    Row("MetaCLIP 2", ("metaclip2_",), "`project=True`", "metaclip-2", "14", OWN, "CC-BY-NC-4.0", BLOCKS),
    Row("SigLIP, SigLIP 2", ("siglip",), "`project=True`; not the NaFlex variants", "siglip", "14, 16", OWN,
        "Apache-2.0", FINAL),
    Row("AIMv2", ("aimv2_",), "", "aimv2", "14", OWN, PAGES, FINAL),
    Row("RADIO", ("radio_",), "", "radio", "16", OWN, "NVIDIA Open Model License", BLOCKS),
    Row("SAM", ("sam_",), "", "sam-vision", "16", OWN, "Apache-2.0", "blocks; the last is the neck's map"),
    Row("SAM 2", ("sam2_", "sam2."), "", "sam2-vision", "", OWN, "Apache-2.0", "stages; the last is the neck's map"),
    Row("SAM 3", ("sam3",), "", "sam3-vision", "14", OWN, "SAM License, gated", "blocks; the last is the neck's map"),
    Row("MAE", ("mae_",), "", "vit-mae", "14, 16", OWN, PAGES, "blocks, nothing masked; the last with the final norm"),
    Row("Hiera", ("hiera_",), "", "hiera", "", OWN, "CC-BY-NC-4.0", STAGES),
    Row("I-JEPA", ("ijepa_",), "", "ijepa", "14", OWN, "CC-BY-NC-4.0", FINAL),
    Row("Pixio", ("pixio_",), "", "pixio", "16", OWN, "FAIR Noncommercial Research License, gated", FINAL),
    Row("Depth Anything V2", ("depth_anything_",), "", "depth-anything", "14", OWN,
        "Apache-2.0 (small), CC-BY-NC-4.0 (base, large)", "blocks of its DINOv2"),
    Row("ViT, DeiT, BEiT", (), HUB, "vit", "14, 16, 32", OWN, PAGES, FINAL),
    Row("Swin", (), HUB, "swin", "", OWN, PAGES, STAGES),
    Row("ConvNeXt, ResNet", (), HUB, "convnext", "", OWN, PAGES, STAGES),
    Row("SegFormer", (), HUB, "segformer", "", OWN, PAGES, STAGES),
    Row("timm", (), "`timm:NAME`, `timm/NAME`", "", "", "of its pretrained_cfg", PAGES,
        "blocks, or stages, of `forward_intermediates`"),
    Row("your own", (), "`wrap_encoder(NETWORK)`, `package.module:function`", "", "", "`mean=`, `std=`", "yours",
        "of `layer=[NAMES]`, submodules"),
)  # fmt: skip
# of families of our own, which are not measured: strides, tokens left out
WRITTEN = {
    "DINOv2": ("its patch", "1, with `_reg` 5"),
    "EfficientNet-Lite0": ("8, 16 or 32, as named", "0"),
    "timm": ("found out", "found out"),
    "your own": ("found out", "found out"),
}
LEFT_OUT = {"dinov3-convnext": "1, the mean"}


def measured(key):
    """(strides of the layers, tokens left out, only size or None) of the tiny model `key`, loaded from a folder."""
    import families
    import torch
    import transformers

    from anyup_fast.encoders import load_encoder

    torch.manual_seed(0)
    model = families.alive(families.FAMILIES[key](transformers))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
        encoder = load_encoder(folder + "/")
    return [layout.stride for layout in encoder.layouts], encoder.prefix_tokens, encoder.native


def told(row):
    """The row as a line of the table."""
    only = ""
    if row.key:
        found, prefix, native = measured(row.key)
        strides = "its patch" if len(set(found)) == 1 else ", ".join(map(str, found))
        prefix = LEFT_OUT.get(row.key, str(prefix))
        only = "" if native is None else "; one size, smaller pictures are padded to it"
    else:
        strides, prefix = WRITTEN[row.family]
    patch = f" ({row.patch})" if row.patch else ""
    names = ", ".join(f"`{name}`" for name in names_of(row)) or ""
    named = "; ".join(filter(None, (names, row.others)))
    cells = row.family, named, f"{strides}{patch}{only}", prefix, row.statistics, row.licence, row.layer
    return f"| {' | '.join(cells)} |"


def names_of(row):
    """The registered names that are of this row."""
    from anyup_fast.encoders import list_encoders

    return [name for name in list_encoders() if name.startswith(row.aliases)] if row.aliases else []


def table():
    """The whole table, in Markdown."""
    logging.getLogger("anyup_fast").setLevel(logging.ERROR)
    heads = "family", "how it is named", "strides", "tokens left out", "mean, std", "licence of the weights", "`layer`"
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *map(told, ROWS)]
    return "\n".join(lines)


def page(text):
    """`text` of the page with its table made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
