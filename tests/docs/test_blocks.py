"""Every block of Python of every page: what it names is there; those of README and docs/usage.md are run."""

import ast
import importlib.util
import inspect
from importlib import import_module

import documents
import numpy as np
import pytest
import tiny
import torch
from tree import ROOT

import anyup_fast
from anyup_fast import encoders, ops

# Packages that a page's "before" imports, which nobody has to have.
FOREIGN = {"anyup"}
RUN = ("README.md", "docs/usage.md")


def resolve(name):
    """The object of a dotted name; AttributeError or ModuleNotFoundError where it isn't there."""
    module, *rest = name.split(".")
    value = import_module(module)
    for part in rest:
        if not hasattr(value, part) and inspect.ismodule(value):
            import_module(f"{value.__name__}.{part}")
        value = getattr(value, part)
    return value


def dotted(node):
    """ "a.b.c" of an expression of names, or None."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *parts[::-1]]) if isinstance(node, ast.Name) else None


def faults(source):
    """Sentences about imports, names of the package and arguments of its functions that a block names in vain."""
    tree, found, known = ast.parse(source), [], {}
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            top = module.split(".")[0]
            if top not in FOREIGN and importlib.util.find_spec(top) is None:
                found.append(f"no package {top}")
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "anyup_fast":
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for name in anyup_fast.__all__:
        known.setdefault(name, f"anyup_fast.{name}")
    known |= {"anyup_fast": "anyup_fast", "load_encoder": "anyup_fast.encoders.load_encoder"}
    for node in ast.walk(tree):
        name = dotted(node.func if isinstance(node, ast.Call) else node)
        top = name and name.split(".")[0]
        if top not in known:
            continue
        full = known[top] + name.removeprefix(top)
        try:
            value = resolve(full)
        except (AttributeError, ModuleNotFoundError):
            found.append(f"no {full}")
            continue
        if isinstance(node, ast.Call) and callable(value):
            parameters = inspect.signature(value).parameters.values()
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
                taken = {parameter.name for parameter in parameters}
                found += [f"{full} takes no {key.arg!r}" for key in node.keywords if key.arg and key.arg not in taken]
    return found


@pytest.mark.parametrize("name", [name for name, text in documents.pages().items() if documents.blocks(text, "python")])
def test_what_the_blocks_of_a_page_name_is_there(name):
    blocks = documents.blocks(documents.pages()[name], "python")
    told = [(block, sorted(set(faults(block)))) for block in blocks]
    assert [(block, fault) for block, fault in told if fault] == []


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import anyup_slow", "no package anyup_slow"),
        ("anyup_fast.upscale(image)", "no anyup_fast.upscale"),
        ("from anyup_fast.ops import nothing\nnothing()", "no anyup_fast.ops.nothing"),
        ("anyup_fast.load_image('a.jpg', colour=3)", "anyup_fast.load_image takes no 'colour'"),
        ("prepare(image, features, weight='x')", "anyup_fast.prepare takes no 'weight'"),
    ],
)
def test_a_name_that_is_not_there_is_told(source, said):
    assert said in faults(source)


def test_languages_of_blocks_are_known():
    """A block without a language is looked at by nobody."""
    known = {"bash", "python", "bibtex", "text"}
    found = {(name, lang) for name, text in documents.pages().items() for _, lang, _ in documents.FENCE.findall(text)}
    assert {pair for pair in found if pair[1] not in known} == set()


def attention():
    """What the sentences on the attention in docs/usage.md speak of, small."""
    generator = torch.Generator().manual_seed(1)
    inside = []
    for pixels, cells in ((4, 2), (6, 3)):
        first, last = ops.window_bounds(pixels, cells, 0.1).T[:, :, None]
        inside.append((torch.arange(cells) >= first) & (torch.arange(cells) < last))
    q, k = torch.randn(4, 6, 2, 8, generator=generator), torch.randn(2, 3, 2, 8, generator=generator)
    v = torch.randn(2, 3, 5, generator=generator)
    return {"rows_in_window": inside[0], "cols_in_window": inside[1], "q": q, "k": k, "v": v, "d": 8}


@pytest.mark.parametrize("page", RUN)
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    """In order, in one place, on a photograph of 56 pixels and with a small encoder under every name."""
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    pytest.importorskip("zarr")
    monkeypatch.chdir(tmp_path)
    small = encoders.load_encoder(tiny.encoder_folder(tmp_path / "encoder"))
    monkeypatch.setattr(encoders, "_load", lambda name, *rest: small)
    monkeypatch.setattr(encoders, "_loaded", {})
    tiny.photograph(tmp_path / "photo.jpg", (56, 70))
    np.save("scan.npy", np.random.default_rng(0).integers(0, 255, (56, 70, 3), np.uint8))
    generator = torch.Generator().manual_seed(0)
    names = {
        "anyup_fast": anyup_fast,
        "np": np,
        "torch": torch,
        "classes": torch.randn(5, 4, 5, generator=generator),
        "linear": torch.nn.Linear(32, 4),
        "points": torch.tensor([[3, 5], [10, 2]]),
        "images": torch.randn(1, 3, 28, 28, generator=generator),
        "features": torch.randn(1, 8, 2, 2, generator=generator),
        **attention(),
        "my_network": torch.nn.Conv2d(3, 32, 14, stride=14).eval(),
    }
    blocks = documents.blocks(documents.pages()[page], "python")
    assert blocks
    sentences = [block for block in blocks if block.startswith("inside = ")]
    for block in (block for block in blocks if block not in sentences):
        for large, little in (("448", "56"), ("224", "28"), ("100", "10"), ("80", "8"), ("64", "32")):
            block = block.replace(f"={large}", f"={little}").replace(f"({large}, {large})", f"({little}, {little})")
        exec(compile(block, page, "exec"), names)
    assert names["image"].shape == (3, 56, 70) and names["lr_features"].shape == (32, 4, 5)
    assert names["hr_features"].shape[-2:] in ((56, 70), (28, 28)) and names["hr_features"].isfinite().all()
    if page == "README.md":
        assert (tmp_path / "comparison.png").stat().st_size > 0
        torch.testing.assert_close(names["patch"], names["prepared"].full()[..., 10:42, 8:40])
    else:
        assert (tmp_path / "logits.zarr").is_dir() and len(sentences) == 1
        windows = ops.window_bounds(4, 2, 0.1), ops.window_bounds(6, 3, 0.1)
        given = [names[name][None].float() for name in "qkv"]
        exec(compile(sentences[0], page, "exec"), names)  # as the page says: the attention
        torch.testing.assert_close(names["hr_features"], ops.windowed_attention(*given, *windows)[0])


def test_files_that_the_blocks_read_are_made_above():
    assert (ROOT / "docs" / "usage.md").is_file() and set(RUN) <= set(documents.pages())
