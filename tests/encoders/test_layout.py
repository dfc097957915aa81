import pytest
import torch
from torch.nn import functional as F

from anyup_fast.encoders.layout import Layout, as_map, check_order, find_layout, probe_sizes

BATCH = 2


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def maps(image, patch=8, channels=6):
    """Patch means times a random matrix, with a little of the whole picture in each, (B, C, h, w)."""
    found = torch.einsum("cd,bdhw->bchw", noise(channels, 3, seed=1), F.avg_pool2d(image, patch))
    return found + 0.1 * found.mean((2, 3), keepdim=True)


def tokens(image, patch=8, channels=6, front=0, back=0):
    """The same as tokens, with some of no cell."""
    found = maps(image, patch, channels).flatten(2).transpose(1, 2)
    extra = found.mean(1, keepdim=True)
    return torch.cat([extra.expand(-1, front, -1), found, extra.expand(-1, back, -1)], 1)


def found_by(run, unit=8, **options):
    sizes = probe_sizes(unit)
    return find_layout([run(noise(BATCH, 3, *size)) for size in sizes], sizes, BATCH, **options)


GOOD = {
    "channels first": (lambda x: maps(x), Layout("channels first", 8, 6)),
    "channels last": (lambda x: maps(x).permute(0, 2, 3, 1), Layout("channels last", 8, 6)),
    "tokens": (lambda x: tokens(x), Layout("tokens", 8, 6)),
    "a class token": (lambda x: tokens(x, front=1), Layout("tokens", 8, 6, 1)),
    "registers": (lambda x: tokens(x, front=5), Layout("tokens", 8, 6, 5)),
    "ten registers": (lambda x: tokens(x, patch=4, front=10), Layout("tokens", 4, 6, 10)),
    "as many channels as rows": (lambda x: maps(x, channels=4), Layout("channels first", 8, 4)),
    "as many channels as columns": (lambda x: maps(x, channels=6).permute(0, 2, 3, 1), Layout("channels last", 8, 6)),
    "as many channels as tokens": (lambda x: tokens(x, channels=24), Layout("tokens", 8, 24)),
    "every pixel": (lambda x: maps(x, patch=1), Layout("channels first", 1, 6)),
    "a finer grid": (lambda x: maps(x, patch=2), Layout("channels first", 2, 6)),
}


@pytest.mark.parametrize("case", GOOD)
def test_layout_is_found_and_undone(case):
    run, layout = GOOD[case]
    assert found_by(run) == layout
    image = noise(3, 3, 16, 40)
    result = as_map(run(image), layout, (16, 40), batch=3)
    assert result.is_contiguous()
    torch.testing.assert_close(result, maps(image, layout.stride, layout.channels))
    check_order(run, layout, noise(1, 3, 32, 48))


def test_shapes_serve_as_well_as_tensors():
    sizes = probe_sizes(16)[:2]
    assert find_layout([(2, 25, 4), (2, 36, 4)], sizes) == Layout("tokens", 16, 4, 1)


BAD = {
    "pooled": (lambda x: maps(x).mean((2, 3)), "one vector an image"),
    "a fixed grid": (lambda x: F.adaptive_avg_pool2d(maps(x), (5, 5)), "does not follow the picture"),
    "a fixed number of tokens": (lambda x: tokens(x)[:, :18], "does not follow the picture"),
    "turned maps": (lambda x: maps(x).transpose(2, 3), "rows and columns are exchanged"),
    "turned maps, channels last": (lambda x: maps(x).permute(0, 3, 2, 1), "rows and columns are exchanged"),
    "channels before tokens": (lambda x: tokens(x).transpose(1, 2), r"x.transpose\(1, 2\)"),
    "no batch": (lambda x: maps(x)[0], "first axis does not follow the batch"),
    "half the batch": (lambda x: maps(x)[:1], "first axis does not follow the batch"),
    "batch after tokens": (lambda x: tokens(x).transpose(0, 1), "first axis does not follow the batch"),
    "tokens of both pictures together": (lambda x: tokens(x).flatten(0, 1)[None], "first axis does not follow"),
    "heads": (lambda x: tokens(x).unflatten(2, (2, 3)).transpose(1, 2), "no stride"),
    "one token more in large pictures": (lambda x: tokens(x, front=int(x.shape[2] > 32)), "no stride"),
    "a stride for each axis": (lambda x: F.avg_pool2d(x, (8, 4)), "no stride"),
    "five axes": (lambda x: maps(x)[:, None], "need tokens"),
    "channels that follow the picture": (lambda x: maps(x, channels=x.shape[2]), "no stride"),
}


@pytest.mark.parametrize("case", BAD)
def test_nothing_else_is_taken(case):
    run, message = BAD[case]
    with pytest.raises(RuntimeError, match=f"^mine gave .*pixels: .*{message}"):
        found_by(run, name="mine")


def test_another_number_of_prefix_tokens_is_refused():
    assert found_by(lambda x: tokens(x, front=1), prefix=1).prefix == 1
    with pytest.raises(RuntimeError, match="5 tokens beside a grid of 8 pixels a cell, not prefix_tokens=1"):
        found_by(lambda x: tokens(x, front=5), prefix=1)


@pytest.mark.parametrize(
    "sizes, batch", [([(8, 16)], 2), ([(8, 16), (16, 8)], 2), ([(8, 8), (8, 16)], 2), ([(8, 16), (16, 24)], 1)]
)
def test_sizes_that_decide_nothing_are_refused(sizes, batch):
    with pytest.raises(ValueError, match="sizes: need two that are not square"):
        find_layout([(batch, 6, 1, 2)] * len(sizes), sizes, batch)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((3, 11, 6), "does not follow the grid"),
        ((3, 12, 7), "does not follow the grid"),
        ((2, 11, 6), "does not follow the batch"),
        ((3, 6, 2, 5), "does not follow the grid"),
        ((), "does not follow the batch"),
    ],
)
def test_an_output_that_does_not_fit_later_is_refused(shape, message):
    with pytest.raises(RuntimeError, match=f"^mine gave .* for H = 16, W = 40, not .*{message}"):
        as_map(torch.zeros(shape), Layout("tokens", 8, 6, 2), (16, 40), batch=3, name="mine")


DISORDER = {
    "by columns": (lambda x: maps(x).transpose(2, 3).flatten(2).transpose(1, 2), "by columns, not by rows"),
    "registers at the end": (lambda x: tokens(x, back=4), "with 4 tokens of no cell at the end"),
    "a mirrored picture": (lambda x: tokens(x.flip(3), front=1), "mirrored"),
    "upside down": (lambda x: maps(x.flip(2)), "upside down"),
}


@pytest.mark.parametrize("case", DISORDER)
def test_an_order_that_shapes_do_not_show_is_found_by_what_changes(case):
    run, message = DISORDER[case]
    with pytest.raises(RuntimeError, match=f"^mine changes another place .* {message}"):
        check_order(run, found_by(run), noise(1, 3, 32, 48), name="mine")
