"""The kernels of the keys against the plain layers in float64: natively on a GPU, else in Triton's interpreter."""

import math

import pytest
import torch
import torch.nn.functional as F
from anyup_fast.kernels import keys
from anyup_fast.kernels.tiling import Device
from torch.utils._python_dispatch import TorchDispatchMode

from anyup_fast.layers import RMS_EPS, rms_norm
from anyup_fast.model import AnyUp
from anyup_fast.plain.weights import KeyWeights, cast

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Largest difference over the largest number expected; measured in the interpreter: 8e-7, 3e-3, 4e-4.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
DEVICES = [
    Device("cuda", (9, 0), 232448, "H100"),
    Device("cuda", (8, 9), 101376, "RTX"),
    Device("hip", (9, 4), 65536, "MI300", "gfx942"),
]

pytestmark = pytest.mark.usefixtures("poisoned")


def network(dim=32, filters=None, seed=0):
    """A model in float64 with peaky random weights that float32 holds exactly."""
    torch.manual_seed(seed)
    model = AnyUp(qk_dim=dim, lfu_dim=filters).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(parameter + 0.5 * torch.randn_like(parameter) if parameter.ndim == 1 else 1.5 * parameter)
    return model.double()


def bordered(x):
    """`x` inside a buffer full of NaN."""
    buffer = torch.full([n + 2 for n in x.shape], math.nan, dtype=x.dtype, device=DEVICE)
    view = buffer[tuple(slice(1, -1) for _ in x.shape)]
    return view.copy_(x)


def sources(size, dim, filters, batches=(2, 2), seed=1):
    """What the image gives, (B, h, w, D), and what the unification gives, (B, M, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    from_image = torch.randn(batches[0], *size, dim, generator=generator)
    from_features = (1 + 3e-3 * torch.randn(batches[1], filters, *size, generator=generator)) / filters
    batch = max(batches)
    return [bordered(x).expand(batch, *x.shape[1:]) for x in (from_image, from_features)]


def expected(model, from_image, from_features):
    """The same by the plain layers."""
    from_features = from_features.double().cpu()
    _, *blocks = model.key_features_encoder
    for block in blocks:
        from_features = block(from_features)
    both = torch.cat((from_image.double().cpu().permute(0, 3, 1, 2), from_features), 1)
    norm, weight, bias = model.cross_decode.projection(1)
    return F.linear(rms_norm(model.aggregation(both).permute(0, 2, 3, 1), norm), weight, bias)


def error_of(out, wanted):
    """Largest difference over the largest |expected|; infinite if not finite."""
    if not torch.isfinite(out).all():
        return math.inf
    return ((out.double().cpu() - wanted).abs().max() / wanted.abs().max()).item()


def solve(model, given, dtype=torch.float32, module=keys, **options):
    weights = cast(model.key_weights(), torch.float32)
    weights = KeyWeights.from_flat([tensor.to(DEVICE) for tensor in weights.flat()])
    out = module.project_keys_fwd(*given, weights, eps=RMS_EPS, dtype=dtype, **options)
    assert out.dtype == dtype and out.shape == given[0].shape and out.is_contiguous()
    return out


def check(size, dim=32, filters=32, dtype=torch.float32, batches=(2, 2), **options):
    model, given = network(dim, filters), sources(size, dim, filters, batches)
    error = error_of(solve(model, given, dtype, **options), expected(model, *given))
    assert error <= TOLERANCE[dtype], f"error {error:.2e}"


@pytest.mark.parametrize("size", [(5, 9), (1, 1), (1, 7), (40, 1), (2, 2), (4, 8), (9, 8)])
def test_sizes(size):
    check(size)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_what_is_stored(dtype):
    check((5, 7), dtype=dtype)


@pytest.mark.parametrize(("dim", "filters"), [(128, 128), (64, 32), (32, 64), (32, 16)])
def test_widths(dim, filters):
    check((4, 9), dim, filters)


@pytest.mark.parametrize("batches", [(1, 1), (1, 3), (3, 1)])
def test_one_image_for_all_features_or_the_reverse(batches):
    check((4, 9), batches=batches)


@pytest.mark.parametrize("few", [1, 2])
def test_many_tiles_are_put_together_first(few, monkeypatch):
    monkeypatch.setattr(keys, "FEW_TILES", few)
    monkeypatch.setattr(keys, "TILES", 2)
    check((9, 13))


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
def test_the_plan_of_every_device(device, monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(Device, "of", lambda _: device)
    check((3, 5))
    layer, merge = keys.plan(device, 128, 128)
    assert layer["PRECISION"] == merge["PRECISION"] == ("tf32x3" if device.kind == "cuda" else "ieee")


@pytest.mark.parametrize("origin", [1.0, 4e3])
def test_numbers_far_from_zero_keep_their_digits(origin):
    model, (from_image, from_features) = network(), sources((6, 7), 32, 32)
    far = (from_features - 1 / 32) * origin * 32 + origin / 32
    given = from_image, far.float()
    # The numbers themselves are rounded to about 1 part in 50,000 of what sets them apart.
    assert error_of(solve(model, given), expected(model, *given)) <= 2e-4


class Counted(TorchDispatchMode):
    """Counts what PyTorch computes, allocations and views aside, and what of it is float64."""

    def __init__(self):
        super().__init__()
        self.computed, self.float64 = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, out))
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in leaves):
            self.float64.append(function)
        aten = torch.ops.aten
        if function.overloadpacket not in (aten.empty, aten.slice, aten.fill_):  # the last poisons what is allocated
            self.computed.append(function)
        return out


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(("few", "launches"), [(keys.FEW_TILES, 11), (1, 19)])
def test_launches_do_not_depend_on_the_batch(batch, few, launches, monkeypatch):
    monkeypatch.setattr(keys, "FEW_TILES", few)
    launched = []
    monkeypatch.setattr(keys.Launches, "__call__", lambda self, kernel, *_, **__: launched.append(kernel))
    given = [torch.zeros(batch, 6, 7, 32), torch.zeros(batch, 32, 6, 7)]
    weights = keys.prepared(cast(network().key_weights(), torch.float32))
    with Counted() as counted:
        keys.project_keys_fwd(*given, weights, eps=RMS_EPS, dtype=torch.float32, ready=True)
    assert len(launched) == launches <= 20 and counted.computed == counted.float64 == []


def test_two_runs_are_equal_to_the_bit_and_leave_their_arguments_alone():
    model, given = network(), sources((5, 9), 32, 32)
    before = [x.clone() for x in given]
    first = solve(model, given)
    assert torch.equal(first, solve(model, given)) and all(map(torch.equal, before, given))


def test_weights_made_ready_are_what_is_made_of_them_else():
    model, given = network(), sources((5, 9), 32, 32)
    weights = cast(model.key_weights(), torch.float32)
    ready = keys.prepared(KeyWeights.from_flat([tensor.to(DEVICE) for tensor in weights.flat()]))
    out = keys.project_keys_fwd(*given, ready, eps=RMS_EPS, dtype=torch.float32, ready=True)
    assert torch.equal(out, solve(model, given))
    assert all(part.is_contiguous() and part.data_ptr() % 16 == 0 for part in ready.flat())


def test_weights_of_other_dtypes_and_places():
    model, given = network(), sources((4, 5), 32, 32)
    flat = [tensor.bfloat16() for tensor in model.key_weights().flat()]
    askew = [torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view_as(t).copy_(t).to(DEVICE) for t in flat]
    for parameter, rounded in zip(model.key_weights().flat(), flat, strict=True):
        parameter.copy_(rounded)
    out = keys.project_keys_fwd(*given, KeyWeights.from_flat(askew), eps=RMS_EPS, dtype=torch.float32)
    assert error_of(out, expected(model, *given)) <= TOLERANCE[torch.float32]


def test_reasons():
    assert keys.why_not_keys(128, 128) is None
    assert keys.why_not_keys(96, 128) == "needs a qk_dim of 32, 64 or 128, got 96"
    assert keys.why_not_keys(128, 100) == "needs 16, 32, 64, 128 or 256 filters, got 100"
    assert keys.why_not_keys(128, 128, 32).endswith("at most 16, got 32")


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", [(2, 70, 5, 7), (1, 1, 1, 1), (1, 64, 1, 33), (3, 130, 2, 2)])
def test_unit_channels(shape, dtype):
    features = bordered(torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype))
    features[0, :, 0, 0] *= 1e-3
    for given in (features, features.transpose(2, 3), features.contiguous(), torch.zeros_like(features)):
        out = keys.unit_channels_fwd(given)
        assert out.dtype == torch.float32 and out.shape == given.shape
        assert torch.allclose(out.cpu().double(), F.normalize(given.cpu().double(), dim=1), rtol=3e-7, atol=1e-30)


# What stands in the source and what replaces it: each breaks something that a small grid needs.
BROKEN = [
    ("inside = mask_p.to(tl.float32)[:, None, None]", "inside = (mask_p | True).to(tl.float32)[:, None, None]"),
    ("total += spread / PER_GROUP + gap * gap * share[None, :]", "total += spread / PER_GROUP"),
    ("place = tl.where(place < 0, -place, place)", "place = tl.where(place < 0, 0, place)"),
    ("2 * n - 2 - place", "n - 1"),
    ("tl.load(w_ptrs + D * D)", "tl.load(w_ptrs)"),
    ("col = _reflected(j + tap % 3 - 1, width)", "col = _reflected(j + tap % 3 - 1, height)"),
    ("mask = (offs_p < n_cells * has_skip)[:, None]", "mask = (offs_p < n_cells)[:, None]"),
    ("(1.0 / D) + eps", "(1.0 / D) + 1.0"),
]


@pytest.mark.skipif(DEVICE != "cpu", reason="reads outside of what is there")
@pytest.mark.parametrize(("old", "new"), BROKEN, ids=range(len(BROKEN)))
def test_a_broken_kernel_is_caught(old, new, broken):
    model, given = network(), sources((5, 9), 32, 32)
    out = solve(model, given, module=broken(keys, old, new))
    assert not error_of(out, expected(model, *given)) <= 100 * TOLERANCE[torch.float32]


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_it_can_be_captured_in_a_graph_and_waits_for_nothing():
    model, given = network(128, 128), sources((20, 30), 128, 128)
    wanted = solve(model, given)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = solve(model, given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    assert torch.equal(out, wanted)
