"""The kernels of the guidance network against the plain layers in float64: natively on a GPU, else interpreted."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from anyup_fast.kernels import guidance
from anyup_fast.kernels.tiling import Device
from torch.utils._python_dispatch import TorchDispatchMode

from anyup_fast.model import AnyUp
from anyup_fast.plain import guidance as plain_guidance
from anyup_fast.plain.weights import Block, GuidanceWeights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Largest difference from float64 over the largest number expected.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2.5e-3}


def network(dim=32, channels=3, seed=0):
    """A model in float64 with peaky random weights that float32 holds exactly, and the weights as kernels take them."""
    torch.manual_seed(seed)
    model = AnyUp(qk_dim=dim, input_dim=channels).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter + 0.5 * torch.randn_like(parameter) if parameter.ndim == 1 else 1.5 * parameter)
    weights = GuidanceWeights(*parts(model.image_encoder), model.rope.freqs, *parts(model.query_encoder),
                              *parts(model.key_encoder))  # fmt: skip
    flat = [tensor.detach().clone().to(DEVICE) for tensor in weights.flat()]
    return model.double(), GuidanceWeights.from_flat(flat)


def parts(encoder):
    first, *modules = encoder
    blocks = []
    for module in modules:
        norm_in, _, conv_in, norm_out, _, conv_out = module.block
        matrices = conv_in.weight.flatten(1), norm_out.weight, norm_out.bias, conv_out.weight.flatten(1)
        blocks.append(Block(norm_in.weight, norm_in.bias, *matrices))
    return first.weight.flatten(1), tuple(blocks)


def picture(batch, size, dtype=torch.float32, channels=3, offset=0.0, seed=1):
    """An image inside a buffer full of NaN, channels in another order in memory than in shape."""
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(batch, channels, *size, generator=generator) + offset).to(dtype)
    buffer = torch.full((batch + 2, size[0] + 3, channels + 2, size[1] + 5), math.nan, dtype=dtype, device=DEVICE)
    view = buffer[1:-1, 1 : size[0] + 1, 1:-1, 2 : size[1] + 2].transpose(1, 2)
    return view.copy_(values)


def expected(model, image, output_size, key_size):
    with torch.no_grad():
        guide = model.guidance(image.double().cpu())
        key = F.adaptive_avg_pool2d(model.key_encoder(guide), key_size)
        return tuple(x.permute(0, 2, 3, 1) for x in (model.queries(guide, output_size), key))


def errors(out, wanted):
    assert all(torch.isfinite(x).all() for x in out)
    return [((x.double().cpu() - y).abs().max() / y.abs().max()).item() for x, y in zip(out[:2], wanted, strict=True)]


def check(size, output_size, key_size, *, batch=1, dim=32, dtype=torch.float32, channels=3, offset=0.0):
    model, weights = network(dim, channels)
    image = picture(batch, size, dtype, channels, offset)
    out = guidance.guidance_fwd(image, weights, output_size, key_size, dtype=dtype)[:2]
    assert [x.dtype for x in out] == [dtype, torch.float32] and all(x.is_contiguous() for x in out)
    assert [tuple(x.shape) for x in out] == [(batch, *output_size, dim), (batch, *key_size, dim)]
    found = errors(out, expected(model, image, output_size, key_size))
    assert max(found) <= TOLERANCE[dtype], f"errors {found}"


pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize(("dim", "output_size"), [(32, (11, 13)), (32, (5, 4)), (128, (6, 9))])
def test_products_in_halves(dim, output_size, monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(Device, "of", lambda _: Device("cuda", (9, 0), 232448, "H100"))
    check((11, 13), output_size, (5, 7), dim=dim, batch=2)
    _, weights = network(dim)
    assert guidance.prepared(weights, torch.float32, True).matrices[0].dtype == torch.float16


def test_products_in_halves_of_large_norms(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(Device, "of", lambda _: Device("cuda", (9, 0), 232448, "H100"))
    model, weights = network(32)
    with torch.no_grad():  # activations beyond the range of float16, weights that bring them back
        for blocks, given in ((model.image_encoder, weights.image), (model.query_encoder, weights.query)):
            for block, tensors in zip([b for b in blocks if hasattr(b, "block")], given, strict=True):
                norm, conv = block.block[3], block.block[5]
                norm.weight *= 2.0**24
                norm.bias *= 2.0**24
                conv.weight *= 2.0**-24
                tensors.norm_out_weight.copy_(norm.weight)
                tensors.norm_out_bias.copy_(norm.bias)
                tensors.conv_out.copy_(conv.weight.flatten(1))
    image = picture(1, (9, 10), torch.float32)
    out = guidance.guidance_fwd(image, weights, (9, 10), (2, 3), dtype=torch.float32)[:2]
    assert max(errors(out, expected(model, image, (9, 10), (2, 3)))) <= TOLERANCE[torch.float32]


SIZES = {
    "equal, divisible": ((12, 8), (12, 8), (3, 2)),
    "several tiles, not divisible": ((11, 13), (11, 13), (5, 7)),
    "output smaller": ((14, 9), (5, 4), (4, 9)),
    "output a little smaller": ((9, 10), (7, 9), (2, 3)),
    "output larger": ((7, 9), (15, 11), (3, 3)),
    "output taller and narrower": ((8, 9), (11, 4), (8, 1)),
    "keys finer than the image": ((6, 5), (6, 5), (7, 11)),
    "keys of one cell, wide bins": ((5, 37), (5, 37), (1, 1)),
    "one pixel wide": ((21, 1), (21, 1), (4, 1)),
    "one pixel wide, from the side": ((1, 19), (3, 7), (1, 5)),
    "one pixel": ((1, 1), (1, 1), (1, 1)),
}


@pytest.mark.parametrize("output_size", [(9, 14), (3, 4), (0, 0)])
def test_norms_are_those_of_plain_pytorch(output_size):
    model, weights = network()
    image = picture(2, (9, 14))
    query, _, norms = guidance.guidance_fwd(image, weights, output_size, (2, 3), dtype=torch.float32)
    _, _, expected = plain_guidance.guidance(image, model.guidance_weights(), output_size, (2, 3), dtype=torch.float64)
    assert tuple(query.shape) == (2, *output_size, 32) and norms.dtype == torch.float32
    assert ((norms - expected).abs().max() / expected.abs().max()).item() < 2e-6


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_sizes(sizes):
    check(*sizes)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_dtypes_and_batches(dtype):
    check((9, 8), (9, 8), (4, 3), batch=3 if dtype == torch.float32 else 2, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_width_of_the_published_weights(dtype):
    check((9, 11), (4, 5), (3, 4), dim=128, dtype=dtype)


@pytest.mark.parametrize("dim", [64, 256])
def test_other_widths(dim):
    check((5, 6), (5, 6), (2, 2), dim=dim)


@pytest.mark.parametrize("channels", [1, 5])
def test_other_images(channels):
    check((6, 7), (6, 7), (2, 3), channels=channels)


@pytest.mark.parametrize("num_groups", [1, 32])
def test_other_groups(num_groups):
    model, weights = network()
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = num_groups
    image = picture(1, (5, 6))
    for dtype in (torch.float32, torch.float16):
        out = guidance.guidance_fwd(image, weights, (5, 6), (2, 2), dtype=dtype, num_groups=num_groups)[:2]
        assert max(errors(out, expected(model, image, (5, 6), (2, 2)))) <= TOLERANCE[dtype]


def test_an_image_far_from_zero():
    check((8, 9), (8, 9), (3, 3), offset=100.0, dim=128)


def test_an_image_without_contrast():
    model, weights = network()
    image = torch.full((1, 3, 9, 8), 0.7, device=DEVICE)
    out = guidance.guidance_fwd(image, weights, (9, 8), (2, 2), dtype=torch.float32)[:2]
    assert max(errors(out, expected(model, image, (9, 8), (2, 2)))) <= TOLERANCE[torch.float32]


def test_the_image_of_one_dtype_the_network_of_another():
    model, weights = network()
    weights = GuidanceWeights.from_flat([tensor.double() for tensor in weights.flat()])
    for image in (picture(1, (5, 6), torch.float16), picture(1, (5, 6), torch.float64)):
        out = guidance.guidance_fwd(image, weights, (5, 6), (2, 2), dtype=torch.float32)[:2]
        assert max(errors(out, expected(model, image, (5, 6), (2, 2)))) <= TOLERANCE[torch.float32]


def test_strided_weights_of_several_dtypes():
    model, weights = network()
    strided = []
    for i, tensor in enumerate(weights.flat()):
        wide = tensor.double() if i % 2 else tensor
        spread = torch.full([2 * n for n in tensor.shape], math.nan, dtype=wide.dtype, device=DEVICE)
        strided.append(spread[tuple(slice(1, None, 2) for _ in tensor.shape)].copy_(wide))
    image = picture(1, (6, 7))
    out, plain = (
        guidance.guidance_fwd(image, given, (3, 2), (3, 3), dtype=torch.float32)
        for given in (GuidanceWeights.from_flat(strided), weights)
    )
    assert all(torch.equal(a, b) for a, b in zip(out, plain, strict=True))
    assert max(errors(out, expected(model, image, (3, 2), (3, 3)))) <= TOLERANCE[torch.float32]


def test_two_runs_are_equal_to_the_bit_and_leave_their_arguments_alone():
    _, weights = network()
    image, sizes = picture(1, (11, 9), torch.bfloat16), ((11, 9), (5, 4), (1, 1))
    before = [x.clone() for x in (image, *weights.flat())]
    runs = [guidance.guidance_fwd(image, weights, *sizes[1:], dtype=torch.bfloat16)[:2] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((image, *weights.flat()), before, strict=True))


def test_images_of_a_batch_do_not_meet():
    _, weights = network()
    image = picture(2, (6, 11))
    image[1] *= 50
    together = guidance.guidance_fwd(image, weights, (6, 11), (2, 3), dtype=torch.float32)[:2]
    for i in range(2):
        alone = guidance.guidance_fwd(image[i : i + 1], weights, (6, 11), (2, 3), dtype=torch.float32)[:2]
        for a, b in zip(together, alone, strict=True):
            # the last product takes the cells of all images: BLAS, in the interpreter, may round a row by its place
            assert torch.allclose(a[i : i + 1], b, rtol=0, atol=2**-22 * b.abs().max().item())


@pytest.mark.parametrize("dtype, ready", [(torch.float32, False), (torch.float16, True)], ids=str)
def test_parts_of_an_image_whose_norms_are_known(dtype, ready):
    _, weights = network()
    if ready:
        weights = guidance.prepared(weights, dtype)
    image = picture(2, (9, 14), dtype)
    query, _, norms = guidance.guidance_fwd(image, weights, (9, 14), (2, 3), dtype=dtype)
    for rows, cols in ((slice(2, 7), slice(3, 12)), (slice(8, 9), slice(0, 1)), (slice(0, 9), slice(0, 14))):
        box = image[:, :, rows, cols]
        given = box, weights, norms, tuple(box.shape[2:])
        out = guidance.guided_queries_fwd(*given, dtype=dtype, whole=(9, 14), place=(rows.start, cols.start))
        assert out.dtype == dtype and out.shape == query[:, rows, cols].shape
        gap = (out.float() - query[:, rows, cols].float()).abs().max() / query.float().abs().max()
        assert gap <= TOLERANCE[dtype], f"{gap}"


@pytest.mark.parametrize("output_size", [(3, 4), (8, 13), (11, 15)])
def test_norms_that_are_known_serve_outputs_of_other_sizes(output_size):
    _, weights = network()
    image = picture(1, (9, 14))
    query, _, norms = guidance.guidance_fwd(image, weights, output_size, (2, 3), dtype=torch.float32)
    out = guidance.guided_queries_fwd(image, weights, norms, output_size, dtype=torch.float32, whole=(9, 14))
    assert out.shape == query.shape
    assert (out - query).abs().max() <= TOLERANCE[torch.float32] * query.abs().max()


def test_weights_made_ready_keep_a_limited_number_of_tables(monkeypatch):
    monkeypatch.setattr(guidance, "TABLES", 2)
    _, weights = network()
    ready = guidance.prepared(weights, torch.float32)
    for width in (3, 4, 5, 3):
        image = picture(1, (4, width))
        out = guidance.guidance_fwd(image, ready, (4, width), (2, 2), dtype=torch.float32)
        plain = guidance.guidance_fwd(image, weights, (4, width), (2, 2), dtype=torch.float32)
        assert all(map(torch.equal, out, plain)) and (4, width) in ready.tables and len(ready.tables) <= 2


class Alive(TorchDispatchMode):
    """Collects how many numbers the tensors of floats made inside hold, one entry for each tensor made by `empty`."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket is torch.ops.aten.empty and result.is_floating_point():
            self.made.append(result.numel())
        return result


@pytest.mark.parametrize(("output_size", "most"), [((8, 8), 3), ((4, 3), 3), ((9, 8), 4)])
def test_three_pictures_are_made_and_the_output(output_size, most):
    _, weights = network()
    image = picture(1, (8, 8))
    with Alive() as alive:
        guidance.guidance_fwd(image, weights, output_size, (2, 2), dtype=torch.float32)
    assert len([n for n in alive.made if n >= 8 * 8 * 32]) == most


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((3, 128, torch.float32), None),
        ((16, 32, torch.bfloat16), None),
        ((3, 256, torch.float16), None),
        ((3, 128, torch.float64), "needs float32, bfloat16 or float16, got float64"),
        ((17, 128, torch.float32), "needs an image of 1 to 16 channels, got 17"),
        ((3, 96, torch.float32), "needs a qk_dim of 32, 64, 128 or 256, got 96"),
        ((3, 128, torch.float32, 3), "needs groups of 1 to 32 channels, a power of two of them, got 3 of 128"),
        ((3, 256, torch.float32, 4), "needs groups of 1 to 32 channels, a power of two of them, got 4 of 256"),
    ],
)
def test_what_the_kernels_cover(arguments, reason):
    assert guidance.why_not_guidance(*arguments) == reason


def test_what_they_do_not_cover_is_refused():
    _, weights = network(dim=16)
    with pytest.raises(ValueError, match="needs a qk_dim of 32, 64, 128 or 256, got 16"):
        guidance.guidance_fwd(picture(1, (4, 4)), weights, (4, 4), (2, 2), dtype=torch.float32)


def test_tiles_follow_from_the_device_alone():
    old, new = (Device("cuda", capability, 166912) for capability in ((8, 0), (9, 0)))
    for dtype in TOLERANCE:
        for dim in guidance.DIMS:
            for sizes in (*guidance.tile_sizes(dtype, dim, old), *guidance.tile_sizes(dtype, dim, new)):
                assert dim % sizes["BLOCK_K"] == 0 and dim % sizes.get("BLOCK_N", 1) == 0
                assert sizes.get("BLOCK_N", dim) >= dim // 8, "whole groups"
    assert guidance.tile_sizes(torch.float32, 128, old) != guidance.tile_sizes(torch.float32, 128, new)


# Of up to five channels the image's convolution is one product of two parts each.
@pytest.mark.parametrize(("capability", "channels"), [((8, 0), 3), ((9, 0), 3), ((9, 0), 5), ((9, 0), 6)])
def test_tiles_of_other_devices(capability, channels, monkeypatch):
    monkeypatch.setattr(Device, "of", classmethod(lambda cls, device: cls("cuda", capability, 166912)))
    check((9, 11), (4, 5), (3, 3), channels=channels)


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow("bfloat16 has the same turns"))],
    ids=str,
)
def test_programs_that_work_on_several_tiles(dtype, monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(Device, "of", classmethod(lambda cls, device: cls("cuda", (9, 0), 232448)))
    monkeypatch.setattr(guidance, "PER_PROCESSOR", 0)
    check((12, 17), (12, 17), (3, 3), batch=2, dtype=dtype, offset=2.0)


# Each breaks one place that images of these sizes need: (what stands in the source, what replaces it).
BROKEN = [
    ("gap = groups * inside - mean[None, :, None] * inside", "gap = groups - mean[None, :, None]"),
    ("gaps + (tl.where(mask_p, x - mean, 0.0),)", "gaps + (x - mean,)"),
    ("((i + 1) * height + n_rows - 1) // n_rows", "((i + 1) * height) // n_rows"),
    ("mask = (mask_j & (line < stop) & (col < right))[:, None]", "mask = (mask_j & (col < right))[:, None]"),
    ("line < stop) & (col < right)", "line < stop) & (col < width)"),
    ("spread = tl.sum(tl.maximum(variance, 0.0) + gap * gap, 1)", "spread = tl.sum(tl.maximum(variance, 0.0), 1)"),
    ("count * a * b + c", "c"),
    ("count * mean * mean + spread / PER_GROUP", "spread / PER_GROUP"),
    ("second_half = _narrow(upper * cos + lower * sin,", "second_half = _narrow(upper * cos - lower * sin,"),
    ("_rotation(table_ptr, row, col, mask_p, HALF + offs_h, D)", "_rotation(table_ptr, row, col, mask_p, offs_h, D)"),
]


@pytest.mark.skipif(DEVICE != "cpu", reason="reads outside of what is there")
@pytest.mark.parametrize(("old", "new"), BROKEN, ids=range(len(BROKEN)))
def test_a_broken_kernel_is_caught(old, new, broken):
    assert Path(guidance.__file__).read_text(encoding="utf-8").count(old) == 1
    module = broken(guidance, old, new)
    model, weights = network()
    image, sizes = picture(1, (8, 11), offset=1.0), ((8, 11), (3, 3))
    out = module.guidance_fwd(image, weights, *sizes, dtype=torch.float32)[:2]
    wanted = expected(model, image, *sizes)
    found = [((x.double().cpu() - y).abs().max() / y.abs().max()).item() for x, y in zip(out[:2], wanted, strict=True)]
    assert not max(found) <= 100 * TOLERANCE[torch.float32]


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_many_tiles(dtype):
    check((150, 133), (75, 60), (9, 10), batch=2, dim=128, dtype=dtype)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_it_can_be_captured_in_a_graph_and_waits_for_nothing():
    _, weights = network(128)
    image = picture(1, (60, 50), torch.bfloat16)
    wanted = guidance.guidance_fwd(image, weights, (60, 50), (5, 4), dtype=torch.bfloat16)[:2]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = guidance.guidance_fwd(image, weights, (60, 50), (5, 4), dtype=torch.bfloat16)[:2]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(out, wanted, strict=True))


def test_models_of_other_widths_launch_kernels_of_their_own(monkeypatch):
    keys = []

    class Noted(guidance.Launches):
        def __init__(self, key):
            keys.append(key)
            super().__init__(key)

    monkeypatch.setattr(guidance, "Launches", Noted)
    for dim in (32, 64, 32):
        guidance.guidance_fwd(picture(1, (4, 5)), network(dim)[1], (4, 5), (2, 3), dtype=torch.float32)
    assert keys[0] == keys[2] != keys[1]
