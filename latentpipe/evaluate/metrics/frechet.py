"""Frechet and kernel distances between two sets of features (N, D), with bootstrap intervals over pictures.

Both depend on the features, and the Frechet distance on N: figures compare only at the same features and the same N.
Intervals are for features of the same pictures in the same order (originals and reconstructions): each resample draws
pictures, with both their features. A resample holds about 63 % of the pictures, and a Frechet distance grows as pictures
get fewer; so the resamples' mean is moved onto the value, and the interval is one of the distance at this N.
"""

from __future__ import annotations

import numpy as np

from latentpipe.utils.errors import UserError


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)), at least 0 (Heusel et al. 2017, section 2; Dowson, Landau 1982).

    Features (N, D) and (M, D), sample covariances (N - 1). With factors C = R' R the last trace is the sum of the singular
    values of R_a R_b': the roots of the eigenvalues of a symmetric matrix, so N <= D, where covariances are singular,
    needs no correction. The estimate is biased upwards, the more the smaller N is; it is 0 for a set and itself.
    UserError below 2 pictures.
    """
    _check(a, b)
    return _frechet(a, b, np.ones(len(a)), np.ones(len(b)))


def kernel_distance(a: np.ndarray, b: np.ndarray, subsets: int = 100, size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation over random subsets of the squared MMD (KID: Binkowski et al., ICLR 2018, section 4).

    Kernel (x.y / D + 1)^3, unbiased estimate, which may be negative; features (N, D) and (M, D). Each subset draws `size`
    rows of each set (at most the smaller set) without replacement. The deviation says how subsets differ, not how sure
    the mean is; for reconstructions see `kernel_score`. UserError below 2 pictures.
    """
    _check(a, b)
    random = np.random.default_rng(seed)
    size = min(size, len(a), len(b))
    values = []
    for _ in range(subsets):
        x, y = (rows[random.choice(len(rows), size, replace=False)] for rows in (a, b))
        once = np.ones(size)
        values.append(_apart(_kernel(x, x), once) + _apart(_kernel(y, y), once) - 2 * _kernel(x, y).mean())
    return float(np.mean(values)), float(np.std(values))


def resamples(n: int, size: int) -> int:
    """How many resamples an interval from `n` pictures and `size` features is made of: fewer where each costs more."""
    rank = min(n, size)
    if rank <= 256:
        return 500
    return 100 if rank <= 1024 else 50


def frechet_score(a: np.ndarray, b: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """`frechet` of features of the same pictures, and its 95 % interval: (value, low, high)."""
    return _interval(frechet(a, b), _frechets(a, b, seed), 0.0)


def paired_frechet(reference: np.ndarray, a: np.ndarray, b: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """frechet(reference, a) - frechet(reference, b) under the same resamples: (difference, low, high); below 0: a is nearer."""
    difference = frechet(reference, a) - frechet(reference, b)
    return _interval(difference, _frechets(reference, a, seed) - _frechets(reference, b, seed))


def kernel_score(a: np.ndarray, b: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """The squared MMD of features of the same pictures, with the kernel of KID, and its 95 % interval: (value, low, high).

    `kernel_distance` takes its sets for independent: pairs of a picture and its own reconstruction bias it by O(1 / N), so
    that among few pictures a worse reconstruction can score better. They are left out here (Gretton et al. 2012, eq. 4):
    unbiased for originals and reconstructions, 0 for a perfect one, and all pairs are used instead of subsets.
    """
    _check_paired(a, b)
    return _interval(*_kernels(a, b, seed))


def paired_kernel(reference: np.ndarray, a: np.ndarray, b: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """The difference of `kernel_score` of a and of b under the same resamples: (difference, low, high); below 0: a is nearer."""
    _check_paired(reference, a)
    _check_paired(reference, b)
    (first, firsts), (second, seconds) = _kernels(reference, a, seed), _kernels(reference, b, seed)
    return _interval(first - second, firsts - seconds)


def _interval(value: float, values: np.ndarray, least: float = -np.inf) -> tuple[float, float, float]:
    """Percentile interval of resampled `values`, their mean moved onto `value`."""
    low, high = np.quantile(values - values.mean() + value, (0.025, 0.975))
    return value, max(float(low), least), float(high)


def _frechets(a: np.ndarray, b: np.ndarray, seed: int) -> np.ndarray:
    """Frechet distances of resamples; the same seed and N draw the same pictures."""
    _check_paired(a, b)
    return np.array([_frechet(a, b, counts, counts) for counts in _draws(len(a), resamples(*a.shape), seed)])


def _kernels(a: np.ndarray, b: np.ndarray, seed: int) -> tuple[float, np.ndarray]:
    """The squared MMD, and those of resamples."""
    kernels = _kernel(a, a), _kernel(a, b), _kernel(b, b)
    draws = _draws(len(a), resamples(*a.shape), seed)
    return _paired_mmd(*kernels, np.ones(len(a))), np.array([_paired_mmd(*kernels, counts) for counts in draws])


def _draws(n: int, times: int, seed: int) -> np.ndarray:
    """(times, n): how often each of n pictures is in a resample; one of a single picture has no spread and is drawn again."""
    random = np.random.default_rng(seed)
    drawn = random.multinomial(n, np.full(n, 1 / n), size=times)
    while (single := drawn.max(1) == n).any():
        drawn[single] = random.multinomial(n, np.full(n, 1 / n), size=int(single.sum()))
    return drawn.astype(np.float64)


def _frechet(a: np.ndarray, b: np.ndarray, counts_a: np.ndarray, counts_b: np.ndarray) -> float:
    """`frechet` of rows that count `counts` times."""
    mean_a, root_a = _moments(a, counts_a)
    mean_b, root_b = _moments(b, counts_b)
    shared = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    value = np.square(mean_a - mean_b).sum() + np.square(root_a).sum() + np.square(root_b).sum() - 2 * shared
    return max(float(value), 0.0)


def _moments(rows: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D) and a factor R (r, D), R' R = covariance, r = min(distinct rows, D)."""
    kept = counts > 0
    rows, counts = rows[kept].astype(np.float64), counts[kept]
    total = counts.sum()
    mean = counts @ rows / total
    root = (rows - mean) * np.sqrt(counts / (total - 1))[:, None]
    return mean, root if len(root) <= root.shape[1] else np.asarray(np.linalg.qr(root, mode="r"))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(x.y / D + 1)^3 for each pair of rows."""
    return (x.astype(np.float64) @ y.T.astype(np.float64) / x.shape[1] + 1) ** 3


def _paired_mmd(xx: np.ndarray, xy: np.ndarray, yy: np.ndarray, counts: np.ndarray) -> float:
    """The squared MMD over pairs of different pictures (Gretton et al., JMLR 13, 2012, eq. 4), each counted `counts` times."""
    first, second, between = (_apart(kernel, counts) for kernel in (xx, yy, xy))
    return first + second - 2 * between


def _apart(kernel: np.ndarray, counts: np.ndarray) -> float:
    """Mean of a kernel (n, n) off its diagonal; a row is never paired with itself, nor with its copies."""
    squares = np.square(counts)
    return float((counts @ kernel @ counts - squares @ np.diag(kernel)) / (counts.sum() ** 2 - squares.sum()))


def _check(a: np.ndarray, b: np.ndarray) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"Expected features (N, D) and (M, D); given {a.shape} and {b.shape}.")
    if min(len(a), len(b)) < 2:
        raise UserError(f"A distance between sets needs 2 pictures and more; given {len(a)} and {len(b)}.")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UserError("The features hold values that are not finite; look for NaN in the pictures or the reconstructions.")


def _check_paired(a: np.ndarray, b: np.ndarray) -> None:
    _check(a, b)
    if len(a) != len(b):
        raise ValueError(f"An interval needs features of the same pictures; given {len(a)} and {len(b)}.")
