"""AnyUp behaves as nn.Modules do, its operators as torch's do, and it takes shapes and dtypes of every kind."""

import copy
import io
import pickle
import pkgutil
from importlib import import_module

import pytest
import tiny
import torch
from torch import nn

from anyup_fast import ops
from anyup_fast.ops.windows import window_bounds_op
from anyup_fast.plain import blocks as plain_blocks

DTYPES = {torch.float32: 1e-6, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def inputs(size=(20, 22), grid=(4, 5), channels=8, images=1, maps=1):
    generator = torch.Generator().manual_seed(5)
    image = torch.randn(images, 3, *size, generator=generator)
    return image, torch.randn(maps, channels, *grid, generator=generator)


def distance(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def restored(model):
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = tiny.model(seed=7)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    return other


COPIES = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "deepcopy": copy.deepcopy,
    "state_dict": restored,
    "DataParallel": lambda model: nn.DataParallel(copy.deepcopy(model)),
    "train and eval": lambda model: copy.deepcopy(model).train().eval(),
    "half and back": lambda model: copy.deepcopy(model).double().float(),
    "Sequential": lambda model: nn.Sequential(copy.deepcopy(model))[0],
}


@pytest.mark.parametrize("way", COPIES)
@torch.no_grad()
def test_copies_give_the_same_and_share_nothing(way):
    model, given = tiny.model(), inputs()
    expected = model(*given)
    other = COPIES[way](model)
    assert torch.equal(other(*given), expected)
    for parameter in other.parameters():
        parameter.zero_()
    assert torch.equal(model(*given), expected)


@pytest.mark.parametrize("rule", ["ratio", "neighborhood"])
@torch.no_grad()
def test_a_pickle_keeps_the_configuration(rule):
    model = tiny.model(window_rule=rule, head_mode="split", window_ratio=0.3, kernel_size=3)
    other = pickle.loads(pickle.dumps(model))
    assert (other.head_mode, other.window_ratio, other.cross_decode.window_rule) == ("split", 0.3, rule)
    assert torch.equal(other(*inputs()), model(*inputs()))


@torch.no_grad()
def test_a_prepared_image_can_be_copied():
    prepared = tiny.model().prepare(*inputs())
    fresh = copy.deepcopy(prepared)
    expected = prepared.region(3, 2, 12, 18)
    for other in (fresh, copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert torch.equal(other.region(3, 2, 12, 18), expected)


def test_names_modes_and_dtypes_are_those_of_a_module():
    model = tiny.model()
    names = list(model.state_dict())
    assert names == [name for name, _ in model.named_parameters()] and not list(model.buffers())
    assert model.train().training and not model.eval().training
    for move, dtype in ((model.half, torch.float16), (model.bfloat16, torch.bfloat16), (model.double, torch.float64)):
        assert {parameter.dtype for parameter in move().parameters()} == {dtype}
    assert {parameter.dtype for parameter in model.to(torch.float32).parameters()} == {torch.float32}
    assert list(model.state_dict()) == names


@torch.no_grad()
def test_training_mode_changes_nothing():
    model, given = tiny.model(), inputs()
    assert torch.equal(model.train()(*given), model.eval()(*given))


@pytest.mark.parametrize("of_model", DTYPES)
@pytest.mark.parametrize("of_image", DTYPES)
@pytest.mark.parametrize("of_features", DTYPES)
@torch.no_grad()
def test_every_mix_of_dtypes(of_model, of_image, of_features):
    image, features = inputs()
    model = tiny.model().to(of_model)
    image, features = image.to(of_image), features.to(of_features)
    out = model(image, features)
    assert out.dtype == of_features
    expected = copy.deepcopy(model).double()(image.double(), features.double())
    assert distance(out, expected) < max(DTYPES[dtype] for dtype in (of_model, of_image, of_features))


@pytest.mark.parametrize("of_image, of_features", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_gradients_of_mixed_dtypes(of_image, of_features):
    image, features = inputs()
    model = tiny.model()
    image, features = image.to(of_image).requires_grad_(), features.to(of_features).requires_grad_()
    model(image, features).float().square().sum().backward()
    assert (image.grad.dtype, features.grad.dtype) == (of_image, of_features)
    wide = [tensor.detach().double().requires_grad_() for tensor in (image, features)]
    copy.deepcopy(model).double()(*wide).square().sum().backward()
    assert distance(image.grad, wide[0].grad) < 2e-2 and distance(features.grad, wide[1].grad) < 2e-2


@pytest.mark.parametrize(
    "size, grid, output",
    [((20, 22), (1, 1), None), ((9, 9), (1, 7), (30, 4)), ((12, 40), (5, 3), (40, 12)), ((6, 6), (9, 9), (3, 50))],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_aspect_ratio(size, grid, output, dtype):
    image, features = inputs(size, grid)
    model = tiny.model()
    given = features.to(dtype).requires_grad_()
    out = model(image, given, output)
    assert out.shape[2:] == (output or size) and out.dtype == dtype
    out.float().sum().backward()
    assert torch.isfinite(given.grad).all()
    expected = copy.deepcopy(model).double()(image.double(), given.detach().double(), output)
    assert distance(out, expected) < max(1e-6, DTYPES[dtype])
    if grid == (1, 1):
        assert torch.equal(out, given.detach().expand_as(out)), "a single cell is all there is to see"


def many(tensor):
    return tensor.expand(3, *tensor.shape[1:]).contiguous()


BATCHES = {"one map": {"images": 3}, "one image": {"maps": 3}}
CALLS = {
    "plain call": lambda model, *given: model(*given),
    "output size": lambda model, *given: model(*given, (31, 17)),
    "q_chunk_size": lambda model, *given: model(*given, q_chunk_size=7),
    "vis_attn": lambda model, *given: torch.cat(model(*given, vis_attn=True), 1),
    "max_memory": lambda model, *given: model(*given, max_memory=40 << 20),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("call", CALLS)
@torch.no_grad()
def test_a_single_image_or_map_serves_a_batch(batch, call):
    model, given = tiny.model(), inputs(**BATCHES[batch])
    out = CALLS[call](model, *given)
    expanded = [tensor if len(tensor) == 3 else many(tensor) for tensor in given]
    expected = CALLS[call](model, *expanded)
    assert out.shape == expected.shape and distance(out, expected) < 1e-6


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("config", [{}, {"head_mode": "split", "window_rule": "neighborhood"}, {"kernel_size": 3}])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_where_one_serves_a_batch(batch, config, autocast):
    model, given = tiny.model(**config), inputs(**BATCHES[batch])
    parameters = [parameter for name, parameter in model.named_parameters() if "out_proj" not in name]
    results = []
    for expand in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in given]
        used = [tensor if len(tensor) == 3 or not expand else many(tensor) for tensor in leaves]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(*used)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), (*leaves, *parameters))))
    tolerance = 5e-2 if autocast else 1e-4
    for actual, expected in zip(*results, strict=True):
        assert actual.shape == expected.shape and distance(actual, expected) < tolerance


@pytest.mark.parametrize("batch", BATCHES)
@torch.no_grad()
def test_a_prepared_batch_of_one_and_many(batch):
    model, given = tiny.model(), inputs(**BATCHES[batch])
    whole = model(*given)
    region = model.prepare(*given).region(3, 2, 12, 18)
    assert distance(region, whole[..., 3:15, 2:20]) < 1e-6


@pytest.mark.parametrize("rule", ["ratio", "neighborhood"])
@pytest.mark.parametrize("ratio", [0, 0.1, 0.4, 1.0])
@pytest.mark.parametrize("head_mode", ["mean", "split"])
@torch.no_grad()
def test_vis_attn_with_any_window(rule, ratio, head_mode):
    model, given = tiny.model(window_rule=rule, window_ratio=ratio, head_mode=head_mode), inputs()
    out, picture = model(*given, (17, 31), vis_attn=True)
    assert distance(out, model(*given, (17, 31))) < 1e-6
    assert picture.shape == (1, 3, 17, 31) and 0 <= picture.min() and picture.max() <= 1 + 1e-6
    down, across = picture[0, 0].mean(1), picture[0, 1].mean(0)
    assert (down[-1] > down[0] and across[-1] > across[0]) or ratio in (0, 1.0)


def _differentiable(*tensors):
    return [tensor.requires_grad_() for tensor in tensors]


def operators():
    """Every registered operator with arguments for `opcheck`."""
    torch.manual_seed(0)
    model = tiny.model(lfu_dim=16)
    image, features = inputs((12, 10), (2, 3))
    guide, keys = model.guidance_weights(), model.key_weights()
    x, convolved = torch.randn(2, 6, 7, 32), torch.randn(2, 6, 7, 32)
    projection = [tensor.detach().clone() for tensor in model.query_projection()]
    freqs, convs = guide.freqs.detach(), [guide.query_conv.detach(), guide.key_conv.detach()]
    plain = [tensor.detach() for tensor in guide.flat()]
    block = [tensor.detach().clone() for tensor in guide.image[0] if tensor is not None]
    skipped = [tensor.detach().clone() for tensor in keys.features[0]]
    basis = torch.randn(16, 1, 5, 5)
    _, hidden, statistics = plain_blocks.res_block(x, guide.image[0], 8)
    query, key, value = torch.randn(1, 5, 6, 2, 8), torch.randn(1, 3, 4, 2, 8), torch.randn(1, 3, 4, 6)
    bounds = window_bounds_op(5, 3, 0.2), window_bounds_op(6, 4, 0.2)
    return {
        "window_bounds": (9, 4, 0.1),
        "neighborhood_bounds": (9, 4, 0.1),
        "windowed_attention": (*_differentiable(query, key, value), *bounds, 0.3, "mean", "torch"),
        "windowed_attention_backward": (
            torch.randn(1, 5, 6, 6),
            *(tensor.detach() for tensor in (query, key, value)),
            *bounds,
            0.3,
            "split",
            True,
            "torch",
        ),
        "guidance": (image, plain, 7, 5, 2, 3, torch.float32, "torch"),
        "project_queries": (x, *projection, 1e-7, "torch"),
        "project_keys": (
            torch.randn(2, 6, 7, 32),
            torch.randn(2, 16, 6, 7),
            [tensor.detach() for tensor in keys.flat()],
            1e-7,
            torch.float32,
            "torch",
        ),
        "convolve_and_project": (*_differentiable(x.clone(), *(tensor.clone() for tensor in projection)), 1e-7),
        "project_queries_backward": (x, x, convolved, *projection, 1e-7),
        "res_block": (torch.randn(2, 6, 7, 16, requires_grad=True), _differentiable(*skipped), 8),
        "res_block_backward": (x, x, hidden, statistics, block),
        "pooled_block": (
            torch.randn(2, 6, 7, 32, requires_grad=True),
            _differentiable(*(tensor.clone() for tensor in block)),
            2,
            3,
            8,
        ),
        "pooled_block_backward": (torch.randn(2, 2, 3, 32), x, hidden, statistics, torch.randn(2, 2, 3, 32), block),
        "project_pixels": _differentiable(image.clone(), torch.randn(32, 3)),
        "project_pixels_backward": (torch.randn(1, 12, 10, 32), image, torch.randn(32, 3), True),
        "branches": _differentiable(x.clone(), freqs.clone(), *(conv.clone() for conv in convs)),
        "branches_backward": (x, x, x, freqs, *convs),
        "pooled": (*_differentiable(x.clone()), 3, 9),
        "pooled_backward": (torch.randn(2, 3, 9, 32), x),
        "unit_channels": (features.clone(), "torch"),
        "feature_unification": (*_differentiable(features.clone(), basis.clone()), "torch"),
        "feature_unification_backward": (torch.randn(1, 16, 2, 3), features, basis, "torch", True),
    }


def registered():
    """Every operator that the modules of anyup_fast.ops register, by its name."""
    parts = [import_module(f"anyup_fast.ops.{part.name}") for part in pkgutil.iter_modules(ops.__path__)]
    made = [made for part in parts for made in vars(part).values() if isinstance(made, torch.library.CustomOpDef)]
    return {one._qualname.removeprefix("anyup_fast::"): one for one in made}


def test_every_operator_is_checked():
    assert set(operators()) == set(registered())


def turned(argument):
    """The same numbers with the axes of every tensor in the opposite order in memory."""
    if isinstance(argument, (list, tuple)):
        return [turned(part) for part in argument]
    if not isinstance(argument, torch.Tensor):
        return argument
    axes = tuple(reversed(range(argument.ndim)))
    return argument.detach().permute(axes).contiguous().permute(axes).requires_grad_(argument.requires_grad)


def outputs_and_gradients(operator, arguments):
    outputs = operator(*arguments)
    outputs = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
    leaves = [
        tensor for tensor in torch.utils._pytree.tree_leaves(arguments) if getattr(tensor, "requires_grad", False)
    ]
    if leaves:
        outputs += torch.autograd.grad(outputs[0].square().sum(), leaves)
    return outputs


# In another layout what it says of shapes and strides; where gradients are registered does not depend on that.
@pytest.mark.parametrize("layout, checks", [(list, {}), (turned, {"test_utils": ("test_schema", "test_faketensor")})])
@pytest.mark.parametrize("name", operators())
def test_opcheck(name, layout, checks):
    torch.library.opcheck(registered()[name], tuple(layout(operators()[name])), **checks)


@pytest.mark.parametrize("name", operators())
def test_operators_give_the_same_in_every_layout(name):
    arguments = operators()[name]
    expected = outputs_and_gradients(registered()[name], arguments)
    for actual, one in zip(outputs_and_gradients(registered()[name], turned(arguments)), expected, strict=True):
        assert actual.shape == one.shape and actual.is_contiguous()
        torch.testing.assert_close(
            actual, one, rtol=1e-4, atol=1e-5 * max(one.numel() and one.abs().max().item(), 1e-3)
        )
