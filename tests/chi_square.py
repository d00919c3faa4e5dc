"""The chi-square and Kolmogorov-Smirnov tests that the distributions here are verified by."""

import math

import torch

FALSE_ALARM = 1e-9


def chi_square_p_value(observed, expected, *, num_fitted=0):
    """Upper tail of Pearson's statistic; cells of expectation below 5 are pooled into one."""
    observed, expected = observed.double().flatten(), expected.double().flatten()
    small = expected < 5
    if small.any():
        observed = torch.cat([observed[~small], observed[small].sum()[None]])
        expected = torch.cat([expected[~small], expected[small].sum()[None]])
        if expected[-1] == 0:
            assert observed[-1] == 0, "something impossible was drawn"
            observed, expected = observed[:-1], expected[:-1]
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1 - num_fitted) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def ks_p_value(uniforms):
    """Two-sided Kolmogorov-Smirnov against U(0, 1), by its asymptotic bound."""
    ordered = uniforms.double().flatten().sort().values
    n = len(ordered)
    grid = torch.arange(n + 1, dtype=torch.float64) / n
    distance = float(torch.maximum(grid[1:] - ordered, ordered - grid[:-1]).max())
    return min(1.0, 2 * math.exp(-2 * n * distance**2))


def uniform_p_value(uniforms, num_cells=256):
    cells = (uniforms.flatten() * num_cells).long()
    observed = torch.bincount(cells, minlength=num_cells)
    return chi_square_p_value(observed, torch.full((num_cells,), cells.numel() / num_cells))


def pair_p_value(first, second, num_cells=16):
    """Are two uniforms independent? Chi-square on the square cut into cells."""
    cells = (first.flatten() * num_cells).long() * num_cells + (second.flatten() * num_cells).long()
    observed = torch.bincount(cells, minlength=num_cells**2)
    return chi_square_p_value(observed, torch.full((num_cells**2,), cells.numel() / num_cells**2))
