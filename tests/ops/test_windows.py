"""Both window rules against oracles written in NumPy and in plain Python."""

import numpy as np
import pytest
import torch

from anyup_fast.ops import neighborhood_bounds, window_bounds

SIZES = (
    *((n, k) for n in (1, 2, 7, 13, 28, 63, 112, 224, 448, 518, 720, 1080, 2160) for k in range(1, 130)),
    *((n, k) for n in range(1, 150) for k in (1, 2, 3, 5, 8, 14, 16, 27, 32, 37, 64)),
    *((n, k) for n in (720, 1080, 2160, 3840, 4320) for k in (160, 256, 270, 512)),
)


def float_rule(n_query, n_key, ratio, dtype):
    one, ratio = dtype(1), dtype(ratio)
    position = (np.arange(n_query).astype(dtype) + dtype(0.5)) / dtype(n_query)
    start = np.floor(np.clip(position - ratio, dtype(0), one) * dtype(n_key))
    end = np.ceil(np.clip(position + ratio, dtype(0), one) * dtype(n_key))
    return np.stack((start, end), 1).astype(np.int32)


@pytest.mark.parametrize("ratio", [0.1, 0.05, 0.25, 1 / 3, 0.7])
def test_window_bounds_equal_the_float32_rule_for_thousands_of_sizes(ratio):
    assert len(set(SIZES)) > 3000
    for n_query, n_key in SIZES:
        bounds = window_bounds(n_query, n_key, ratio)
        assert bounds.dtype == torch.int32 and bounds.device.type == "cpu"
        np.testing.assert_array_equal(bounds.numpy(), float_rule(n_query, n_key, ratio, np.float32))


@pytest.mark.parametrize("n_query, n_key", [(720, 64), (1080, 80), (2160, 160)])
def test_float64_gives_other_windows_so_the_comparison_can_fail(n_query, n_key):
    expected = float_rule(n_query, n_key, 0.1, np.float64)
    assert (window_bounds(n_query, n_key, 0.1).numpy() != expected).any()


def test_windows_are_never_empty_and_are_monotone():
    for n_query, n_key in SIZES:
        for bounds in (window_bounds(n_query, n_key, 0.1), neighborhood_bounds(n_query, n_key, 0.1)):
            start, end = bounds.numpy().T
            assert (0 <= start).all() and (start < end).all() and (end <= n_key).all()
            assert (np.diff(start) >= 0).all() and (np.diff(end) >= 0).all()


@pytest.mark.parametrize("rule", [window_bounds, neighborhood_bounds])
@pytest.mark.parametrize("ratio", [0, -1, 0.0])
def test_no_ratio_means_every_key(rule, ratio):
    assert rule(3, 7, ratio).tolist() == [[0, 7]] * 3


def test_default_dtype_does_not_change_the_windows():
    expected = window_bounds(720, 64, 0.1).clone()
    torch.set_default_dtype(torch.float64)
    try:
        window_bounds.cache_clear()
        assert torch.equal(window_bounds(720, 64, 0.1), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("ratio", [0.1, 0.03, 0.25, 0.49])
def test_neighborhood_bounds_equal_the_rule_cell_by_cell(ratio):
    for n_key in range(3, 130):
        for scale in (1, 2, 14, 16):
            size = max(3, round(2 * ratio * n_key))
            size = min(size if size % 2 else size + 1, n_key)
            expected = []
            for i in range(n_key * scale):
                start = i // scale - size // 2
                start = min(max(start, 0), n_key - size)
                expected.append([start, start + size])
            assert neighborhood_bounds(n_key * scale, n_key, ratio).tolist() == expected


@pytest.mark.parametrize("n_key, size", [(9, 5), (10, 5), (11, 7), (13, 7), (15, 9), (6, 3)])
def test_neighborhood_sizes_are_rounded_then_made_odd(n_key, size):
    # 4.5 -> 4 -> 5, 5.5 -> 6 -> 7, 7.5 -> 8 -> 9: truncation would give 5 for 11 keys.
    assert (neighborhood_bounds(4 * n_key, n_key, 0.25).diff(dim=1) == size).all()


def test_neighborhood_outside_its_range():
    assert neighborhood_bounds(8, 2, 0.1).tolist() == [[0, 2]] * 8, "fewer than three keys: all of them"
    assert neighborhood_bounds(2, 8, 0.1).tolist() == [[1, 4], [5, 8]], "the key under the query's centre"
    assert neighborhood_bounds(11, 5, 0.1)[-1].tolist() == [2, 5], "past the last whole cell: the last key"
    assert neighborhood_bounds(4, 8, 0.5).tolist() == [[0, 8]] * 4
