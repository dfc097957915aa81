"""Prepared images: every part equals the whole, costs no more than itself, and survives interruption."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import nn

import anyup_fast
from anyup_fast import AnyUp, parts
from anyup_fast.heads import linear_head
from anyup_fast.image import normalize
from anyup_fast.ops import choice
from anyup_fast.plain import guidance as plain_guidance
from anyup_fast.prepared import Prepared
from anyup_fast.stores import Store

SIZES = [((40, 53), (4, 6)), ((31, 31), (9, 5)), ((64, 48), (1, 1)), ((20, 90), (3, 7))]


@pytest.fixture(scope="module")
def model():
    """Shipped weights, or those named by ANYUP_FAST_REFERENCE."""
    folder = os.environ.get("ANYUP_FAST_REFERENCE")
    weights = Path(folder, "weights", "anyup_multi_backbone.pth") if folder else "embedded"
    return AnyUp.from_pretrained(weights).requires_grad_(False)


def inputs(size=(40, 53), grid=(4, 6), batch=2, channels=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(batch, 3, 5, 5, generator=generator)
    image = nn.functional.interpolate(low, size, mode="bicubic") + 0.1 * torch.randn(
        batch, 3, *size, generator=generator
    )
    return image, torch.randn(batch, channels, *grid, generator=generator)


def distance(actual, expected):
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def boxes(size, generator):
    """The corners, the whole, a single pixel and a random box."""
    height, width = size
    yield 0, 0, 1, 1
    yield height - 1, width - 1, 1, 1
    yield 0, 0, height, width
    for _ in range(3):
        top, left = (int(torch.randint(n, (), generator=generator)) for n in size)
        high, wide = (
            int(torch.randint(1, n - at + 1, (), generator=generator)) for n, at in zip(size, (top, left), strict=True)
        )
        yield top, left, high, wide


@pytest.mark.parametrize("size, grid", SIZES)
@pytest.mark.parametrize("output", [None, (61, 80), (17, 20), (40, 20), (9, 130)])
def test_parts_equal_the_whole(model, size, grid, output):
    image, features = inputs(size, grid)
    full = model(image, features, output)
    height, width = full.shape[-2:]
    prepared = model.prepare(image, features)
    generator = torch.Generator().manual_seed(1)
    for top, left, high, wide in boxes((height, width), generator):
        part = prepared.region(top, left, high, wide, output)
        assert distance(part, full[..., top : top + high, left : left + wide]) < 1e-5
    points = torch.stack([torch.randint(n, (2, 20), generator=generator) for n in (height, width)], -1)
    points[:, 0], points[:, 1] = 0, torch.tensor([height - 1, width - 1])
    expected = torch.stack([full[b][:, points[b, :, 0], points[b, :, 1]].T for b in range(2)])
    assert distance(prepared.at(points, output), expected) < 1e-5
    streamed = torch.zeros_like(full)
    for (top, left, high, wide), tile in prepared.stream((16, 30), output):
        streamed[..., top : top + high, left : left + wide] = tile
    assert distance(streamed, full) < 1e-5
    assert distance(prepared.full(output), full) < 1e-5
    assert torch.equal(model.prepare(image, features).full(output), full)


def test_tiles_with_statistics_of_their_own_are_something_else(model):
    image, features = inputs((64, 64), (8, 8), batch=1)
    whole = model(image, features)[..., :32, :32]
    alone = model(image[..., :32, :32], features[..., :4, :4])
    assert distance(alone, whole) > 1e-2
    # Nor is it the window alone: the same keys and values, with statistics of the tile.
    prepared, wrong = (model.prepare(image, features) for _ in range(2))
    wrong.region(0, 0, 1, 1)
    wrong._shared["norms"] = model.guided(image[..., :32, :32], features[..., :4, :4], (0, 0))[2]
    assert distance(wrong.region(0, 0, 32, 32), whole) > 1e-2
    assert distance(prepared.region(0, 0, 32, 32), whole) < 1e-5


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(7, 5),
        lambda: nn.Linear(7, 5, bias=False),
        lambda: nn.Conv2d(7, 5, 1),
        lambda: (torch.randn(5, 7), torch.randn(5)),
        lambda: (torch.randn(5, 7), None),
        lambda: torch.randn(5, 7),
    ],
)
def test_a_head_on_the_low_res_features_is_the_head_on_the_output(model, make):
    torch.manual_seed(0)
    head = make()
    image, features = inputs()
    full, prepared = model(image, features), model.prepare(image, features)
    weight, bias = linear_head(head, 7)
    expected = torch.einsum("kc,bchw->bkhw", weight, full)
    expected = expected if bias is None else expected + bias[:, None, None]
    headed = prepared.head(head)
    assert headed.channels == 5 and not headed.full().requires_grad
    assert distance(headed.full(), expected) < 1e-5
    assert distance(headed.region(3, 4, 9, 8), expected[..., 3:12, 4:12]) < 1e-5
    points = torch.tensor([[0, 0], [39, 52], [7, 9]])
    assert distance(headed.at(points), expected[:, :, points[:, 0], points[:, 1]].transpose(1, 2)) < 1e-5
    labels = prepared.head(head, argmax=True)
    assert torch.equal(labels.full(), headed.full().argmax(1))
    assert torch.equal(labels.region(3, 4, 9, 8), headed.region(3, 4, 9, 8).argmax(1))
    assert torch.equal(labels.at(points), headed.at(points).argmax(-1))
    assert distance(prepared.full(), full) < 1e-5, "the prepared image itself is as before"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_and_regions_in_low_precision(dtype):
    image, features = inputs((48, 48), (6, 6), batch=1)
    weight = torch.randn(3, 7)
    exact = AnyUp.from_pretrained().prepare(image, features).head(weight)
    model = AnyUp.from_pretrained().to(dtype)
    headed = model.prepare(image.to(dtype), features.to(dtype)).head(weight.to(dtype))
    assert headed.full().dtype == headed.region(0, 0, 5, 5).dtype == dtype
    assert distance(headed.full(), exact.full()) < 2e-2
    assert distance(headed.region(7, 8, 20, 30), exact.region(7, 8, 20, 30)) < 2e-2
    points = torch.tensor([[0, 0], [20, 31]])
    with torch.autocast("cpu", dtype):  # on a CPU it changes products in bfloat16
        headed = AnyUp.from_pretrained().prepare(image, features).head(weight)
        answers = headed.full(), headed.region(7, 8, 20, 30), headed.at(points), headed.attention(3, 4)
    expected = exact.full(), exact.region(7, 8, 20, 30), exact.at(points), exact.attention(3, 4)
    most = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert all(distance(*pair) < most for pair in zip(answers, expected, strict=True))


def test_normalized_points_name_the_pixel_they_lie_in(model):
    prepared = model.prepare(*inputs())
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.5, 0.25], [39.99 / 40, 1.01 / 53]])
    pixels = torch.tensor([[0, 0], [39, 52], [20, 13], [39, 1]])
    assert torch.equal(prepared.at(points, align="normalized"), prepared.at(pixels))


def test_attention_of_a_pixel_sums_to_one_inside_its_window(model):
    image, features = inputs((64, 64), (16, 16))
    prepared = model.prepare(image, features)
    weights = prepared.attention(30, 5)
    assert weights.shape == (2, 16, 16)
    assert torch.allclose(weights.sum((1, 2)), torch.ones(2))
    (rows, cols) = model.cross_decode.bounds((64, 64), (16, 16))
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[rows[30, 0] : rows[30, 1], cols[5, 0] : cols[5, 1]] = True
    assert (weights[:, ~inside] == 0).all() and (weights[:, inside] > 0).all()
    at = torch.einsum("bhw,bchw->bc", weights, features)
    assert distance(at, prepared.at(torch.tensor([[30, 5]]))[:, 0]) < 1e-5
    assert distance(prepared.attention_map(), model(image, features, vis_attn=True)[1]) < 1e-5


def test_a_second_answer_pays_for_itself_only(model, monkeypatch):
    image, features = inputs()
    calls = []
    original = AnyUp.guided
    monkeypatch.setattr(AnyUp, "guided", lambda *arguments: calls.append(1) or original(*arguments))
    prepared = model.prepare(image, features)
    assert calls == []
    prepared.region(0, 0, 3, 3)
    headed = prepared.head(torch.randn(2, 7))
    headed.at(torch.tensor([[1, 1]])), headed.full(), prepared.attention(2, 2), list(prepared.stream(32))
    assert calls == [1]
    late = model.prepare(image, features)
    late.head(torch.randn(2, 7)).full()
    late.region(0, 0, 2, 2)
    assert calls == [1, 1]


def test_nothing_of_full_resolution_is_kept(model):
    image, features = inputs((200, 200), (8, 8), batch=1)
    prepared = model.prepare(image, features)
    prepared.full()
    kept = [t for t in prepared._shared.values() if isinstance(t, torch.Tensor)]
    assert kept and sum(t.numel() for t in kept) < 200 * 200


class Rows:
    """A picture that gives rows and counts the pixels it has given."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.read, self.longest = array, array.shape, array.dtype, 0, 0

    def __getitem__(self, rows):
        part = self.array[rows]
        self.read += part.shape[0] * part.shape[1]
        self.longest = max(self.longest, part.shape[0])
        return part


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_picture_that_is_read_gives_what_the_tensor_gives(model, dtype, monkeypatch):
    monkeypatch.setattr(plain_guidance, "BLOCK", 500)
    rng = np.random.default_rng(0)
    scale = np.iinfo(dtype).max if np.dtype(dtype).kind == "u" else 1
    array = (np.kron(rng.random((6, 7, 3)), np.ones((8, 9, 1))) * scale).astype(dtype)
    image = normalize(torch.from_numpy(array.astype(np.float32) / np.float32(scale)).permute(2, 0, 1)[None])
    _, features = inputs(grid=(5, 4), batch=1)
    picture = Rows(array)
    prepared = model.prepare(picture, features)
    full = model(image, features)
    assert distance(prepared.region(5, 6, 20, 21), full[..., 5:25, 6:27]) < 1e-5
    assert 9 * 48 * 63 <= picture.read <= 10 * 48 * 63 and picture.longest <= 22
    points = torch.tensor([[0, 0], [47, 62], [20, 30]])
    assert distance(prepared.at(points), full[:, :, points[:, 0], points[:, 1]].transpose(1, 2)) < 1e-5
    assert distance(prepared.full((30, 100)), model(image, features, (30, 100))) < 1e-5


@pytest.mark.parametrize(
    "picture, words",
    [
        (np.zeros((4, 5), np.uint8), "need \\(H, W, 3\\)"),
        (np.zeros((4, 5, 3), np.int16), "need uint8, uint16"),
        ([[1]], "need \\(H, W, 3\\)"),
        (np.full((4, 5, 3), np.nan, np.float32), "not finite"),
        (np.full((4, 5, 3), 200.0, np.float32), "leave \\[0, 1\\]"),
    ],
)
def test_pictures_that_cannot_be_read_are_named(model, picture, words):
    with pytest.raises(ValueError, match=f"image: .*{words}"):
        model.prepare(picture, torch.randn(1, 4, 2, 2)).region(0, 0, 1, 1)
    with pytest.raises(ValueError, match="one feature map"):
        model.prepare(np.zeros((4, 5, 3), np.uint8), torch.randn(2, 4, 2, 2))


def test_streams_fill_tensors_and_arrays(model, tmp_path):
    prepared = model.prepare(*inputs())
    full = prepared.full()
    assert distance(prepared.stream(20, out=torch.zeros_like(full)), full) < 1e-5
    array = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.float32, tuple(full.shape))
    assert distance(torch.from_numpy(np.array(prepared.stream(20, out=array))), full) < 1e-5
    with pytest.raises(ValueError, match="out: need shape"):
        prepared.stream(20, out=torch.zeros(1, 2, 3))


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
@pytest.mark.parametrize("argmax", [False, True])
def test_an_interrupted_stream_is_recognised_and_finished(model, tmp_path, suffix, argmax, monkeypatch):
    zarr = pytest.importorskip("zarr") if suffix == ".zarr" else None
    image, features = inputs()
    prepared = model.prepare(image, features).head(torch.eye(7)[:4], argmax=argmax)
    path = tmp_path / f"made{suffix}"
    original, seen = Prepared.region, []

    def stopping(self, *box):
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.append(box)
        return original(self, *box)

    monkeypatch.setattr(Prepared, "region", stopping)
    with pytest.raises(KeyboardInterrupt):
        prepared.stream(16, out=path)
    partial = tmp_path / f"made{suffix}.partial"
    assert not path.exists() and partial.exists()
    with pytest.raises(FileExistsError, match="unfinished"):
        prepared.stream(16, out=path)
    with pytest.raises(ValueError, match="other settings: tile"):
        prepared.stream(20, out=path, resume=True)
    with pytest.raises(ValueError, match="other settings: content"):
        model.prepare(image, features).head(2 * torch.eye(7)[:4], argmax=argmax).stream(16, out=path, resume=True)
    # A tile whose line was cut off is not taken for done.
    progress = tmp_path / f"made{suffix}.partial.jsonl"
    progress.write_text(progress.read_text()[:-3])
    seen.clear()
    monkeypatch.setattr(Prepared, "region", lambda self, *box: seen.append(box) or original(self, *box))
    assert prepared.stream(16, out=path, resume=True) == path
    assert len(seen) == 12 - 4 and not partial.exists() and not progress.exists()
    made = np.load(path) if suffix == ".npy" else np.asarray(zarr.open_array(store=str(path), mode="r"))
    full = prepared.full()
    if argmax:
        assert made.dtype == np.uint8 and np.array_equal(made, full.numpy())
    else:
        assert distance(torch.from_numpy(made), full) < 1e-5
    with pytest.raises(FileExistsError, match="exists"):
        prepared.stream(16, out=path)


def test_a_store_that_is_not_begun_is_started_by_resume(tmp_path):
    store = Store(tmp_path / "x.npy", (2, 4, 4), "float32", (2, 4), {}, resume=True)
    store.write((0, 0, 2, 4), np.ones((2, 2, 4), np.float32))
    lines = (tmp_path / "x.npy.partial.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == [0, 0, 2, 4]
    assert np.load(tmp_path / "x.npy.partial")[:, :2].min() == 1
    with pytest.raises(ValueError, match="must end in"):
        Store(tmp_path / "x.raw", (2, 4, 4), "float32", (2, 4), {})


def test_tiles_stay_within_the_memory(model):
    prepared = model.prepare(*inputs((300, 300), (20, 20), 1))
    small = next(iter(prepared.stream(max_memory=160 << 20)))[0]
    large = next(iter(prepared.stream(max_memory=2 << 30)))[0]
    assert small[2] < large[2] == 300
    with pytest.raises(ValueError, match="need at least"):
        prepared.stream(max_memory=1 << 20)
    with pytest.raises(ValueError, match="max_memory: tiles of"):
        prepared.stream(tile=512, max_memory=1 << 20)


@pytest.mark.parametrize("vis_attn", [False, True])
@pytest.mark.parametrize("output", [None, (50, 30)])
def test_forward_within_a_memory(model, output, vis_attn):
    image, features = inputs()
    expected = model(image, features, output, vis_attn=vis_attn)
    enough = model.estimate_memory(image.shape, features.shape, output)
    assert torch.equal(model(image, features, output, max_memory=2 * enough), model(image, features, output))
    with pytest.raises(ValueError, match=r"too few, the least that suffices is \d+") as caught:
        model(image, features, output, vis_attn=vis_attn, max_memory=1 << 20)
    least = int(str(caught.value).split()[-1])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(AnyUp, "estimate_memory", lambda *arguments: least + 1)
        frugal = model(image, features, output, vis_attn=vis_attn, max_memory=least)
    pairs = zip(frugal, expected, strict=True) if vis_attn else [(frugal, expected)]
    assert all(distance(*pair) < 1e-5 for pair in pairs)
    with pytest.raises(ValueError, match="max_memory: need a positive"):
        model(image, features, max_memory=0)
    with pytest.raises(ValueError, match="gradients are recorded"):
        model(image.clone().requires_grad_(), features, max_memory=1 << 40)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda p: p.region(0, 0, 0, 4), "empty or leaves"),
        (lambda p: p.region(0, 50, 4, 4), "empty or leaves"),
        (lambda p: p.region(-1, 0, 4, 4), "empty or leaves"),
        (lambda p: p.region(0, 0, 20, 4, (10, 10)), "empty or leaves"),
        (lambda p: p.region(0.5, 0, 4, 4), "whole numbers"),
        (lambda p: p.at(torch.tensor([[40, 0]])), "lies outside"),
        (lambda p: p.at(torch.tensor([[0, -1]])), "lies outside"),
        (lambda p: p.at(torch.tensor([[0.5, 0.5]])), "whole numbers"),
        (lambda p: p.at(torch.tensor([[1, 1]]), align="normalized"), "floats in"),
        (lambda p: p.at(torch.tensor([[1.5, 0.5]]), align="normalized"), "lies outside"),
        (lambda p: p.at(torch.tensor([[float("nan"), 0.5]]), align="normalized"), "lies outside"),
        (lambda p: p.at(torch.zeros(3, 4, 2, dtype=torch.long)), "need \\(2, N, 2\\)"),
        (lambda p: p.at(torch.tensor([[1, 1]]), align="corner"), "'pixel' or 'normalized'"),
        (lambda p: p.head(nn.Linear(6, 2)), "\\(K, 7\\)"),
        (lambda p: p.head(nn.Conv2d(7, 2, 3)), "1x1"),
        (lambda p: p.head(nn.ReLU()), "got ReLU"),
        (lambda p: p.head((torch.randn(3, 7), torch.randn(2))), "bias has to be"),
        (lambda p: p.stream(tile=0), "tile: need"),
        (lambda p: p.attention(40, 0), "lies outside"),
    ],
)
def test_what_cannot_be_asked_for_is_named(model, call, words):
    with pytest.raises(ValueError, match=words):
        call(model.prepare(*inputs()))


def test_a_configuration_of_plain_layers_cannot_be_prepared():
    with pytest.raises(ValueError, match="kernel_size 3"):
        AnyUp(qk_dim=32, kernel_size=3).prepare(*inputs())


def test_the_verb_takes_single_images_and_names(model):
    image, features = inputs(batch=1)
    prepared = anyup_fast.prepare(image[0], features[0], weights=model)
    assert distance(prepared.region(0, 0, 5, 5), model(image, features)[..., :5, :5]) < 1e-5
    twice = anyup_fast.prepare(torch.cat((image, image.flip(3))), features, weights=model)
    assert distance(twice.region(0, 0, 5, 5)[1:], model(image.flip(3), features)[..., :5, :5]) < 1e-5
    with pytest.raises(ValueError, match="batch size"):
        anyup_fast.prepare(image.expand(2, -1, -1, -1), features.expand(3, -1, -1, -1), weights=model)


@pytest.fixture
def interpreted(monkeypatch):
    """Tensors on the CPU count as those of a GPU; Triton's kernels are interpreted."""
    if torch.cuda.is_available():
        pytest.skip("kernels are not interpreted here")
    monkeypatch.setattr(choice, "_GPUS", ("cpu",))
    monkeypatch.setattr(choice, "_installation_fault", choice.cache(lambda kind: None))
    choice.forget_faults()
    yield
    choice.forget_faults()


@torch.no_grad()
@pytest.mark.parametrize("most", [parts.MOST_BYTES, 40 * 32 * 4])
def test_kernels_answer_once_the_norms_are_known(interpreted, monkeypatch, most):
    monkeypatch.setattr(parts, "MOST_BYTES", most)
    made = tiny.model()
    generator = torch.Generator().manual_seed(0)
    image, features = torch.randn(1, 3, 12, 10, generator=generator), torch.randn(1, 8, 3, 2, generator=generator)
    plain = made.prepare(image, features, backend="torch")
    prepared = made.prepare(image, features)
    fused = []
    right = parts.guided_queries
    monkeypatch.setattr(parts, "guided_queries", lambda *a, **k: fused.append(right(*a, **k)) or fused[-1])
    for ask, calls in (
        (lambda one: one.full(), 0),
        (lambda one: one.full(), 1),
        (lambda one: one.full((5, 7)), 1),
        (lambda one: one.region(1, 2, 7, 6), 1 if most > 1e6 else 2),
        (lambda one: one.region(1, 2, 3, 2, (6, 5)), 1 if most > 1e6 else 0),
    ):
        fused.clear()
        out = ask(prepared)
        assert torch.allclose(out, ask(plain), atol=2e-5), f"{(out - ask(plain)).abs().max()}"
        assert sum(query is not None for query in fused) == calls
