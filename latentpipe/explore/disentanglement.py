"""How well each latent stands for one known factor: MIG, SAP and DCI, on codes N D and factors N K (integers from 0).

All three are 1 for a code that holds every factor in a latent of its own, and near 0 for one that says nothing or mixes all.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from latentpipe.evaluate.results import Score
from latentpipe.utils.errors import UserError

BINS = 20
TREES = 20
RESAMPLES = 200


def mig(codes: np.ndarray, factors: np.ndarray) -> float:
    """Mutual information gap (Chen et al., "Isolating Sources of Disentanglement in VAEs", arXiv:1802.04942, equation 6).

    Mean over factors of ``(I(first latent; factor) - I(second latent; factor)) / H(factor)``, first and second by mutual
    information. Latents are cut into 20 bins of equal width, as Locatello et al. (arXiv:1811.12359) do; so a code of noise has
    a small information of its own, the same for all latents, which the gap takes off.
    """
    codes, factors = _checked(codes, factors)
    gaps = []
    for factor in factors.T:
        known = np.sort([information(_binned(code), factor) for code in codes.T])
        second = known[-2] if len(known) > 1 else 0.0
        gaps.append((known[-1] - second) / entropy(factor))
    return float(np.mean(gaps))


def sap(codes: np.ndarray, factors: np.ndarray, nominal: tuple[int, ...] = ()) -> float:
    """Separated attribute predictability (Kumar et al., arXiv:1711.00848, section 3).

    Mean over factors of the gap between the two latents that predict it best, each alone: by the squared correlation where
    the factor's values have an order, by the balanced accuracy (beyond chance, 0 to 1) of thresholds where it is `nominal`
    (columns, such as shape): those of a decision tree with one leaf for each value.
    """
    codes, factors = _checked(codes, factors)
    gaps = []
    for column, factor in enumerate(factors.T):
        score = _threshold_score if column in nominal else _squared_correlation
        known = np.sort([score(code, factor) for code in codes.T])
        gaps.append(known[-1] - (known[-2] if len(known) > 1 else 0.0))
    return float(np.mean(gaps))


def dci(codes: np.ndarray, factors: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Disentanglement, completeness, informativeness (Eastwood and Williams, ICLR 2018, section 2).

    One random forest predicts each factor; R (D K) holds the importance of each latent for each factor. Disentanglement:
    1 less the entropy of a latent's importances over factors (base K), a mean weighted by the latent's share; completeness: 1
    less the entropy over latents (base D), mean over factors; informativeness: the forests' accuracy on the half of the
    pictures that they have not seen, mean over factors. Needs scikit-learn.
    """
    codes, factors = _checked(codes, factors)
    try:
        from sklearn.ensemble import RandomForestClassifier
    except ImportError:
        raise UserError("DCI needs scikit-learn: pip install 'latentpipe[explore]'.") from None
    order = np.random.default_rng(seed).permutation(len(codes))
    seen, unseen = order[: len(order) // 2], order[len(order) // 2 :]
    importance, accuracy = np.zeros((codes.shape[1], factors.shape[1])), []
    for column, factor in enumerate(factors.T):
        # every split sees every latent: else those that say nothing would win some of them
        forest = RandomForestClassifier(TREES, max_features=None, max_depth=12, random_state=seed)
        forest.fit(codes[seen], factor[seen])
        importance[:, column] = forest.feature_importances_
        accuracy.append(forest.score(codes[unseen], factor[unseen]))
    return *concentration(importance), float(np.mean(accuracy))


def concentration(importance: np.ndarray) -> tuple[float, float]:
    """Disentanglement and completeness of importances D K, not negative (`dci`); a latent that is of no use does not count."""
    total = importance.sum()
    if not total:
        return 0.0, 0.0
    latents, factors = importance.shape
    shares = importance.sum(1) / total
    by_latent = 1 - _entropies(importance) / np.log(factors) if factors > 1 else np.ones(latents)
    by_factor = 1 - _entropies(importance.T) / np.log(latents) if latents > 1 else np.ones(factors)
    return float(shares @ by_latent), float(by_factor.mean())


def scored(metric: Callable[[np.ndarray, np.ndarray], float], codes: np.ndarray, factors: np.ndarray, seed: int = 0) -> Score:
    """A metric with its 95 % bootstrap interval over pictures, the resamples' mean moved onto the value."""
    random, value = np.random.default_rng(seed), metric(codes, factors)
    values = []
    for _ in range(RESAMPLES):
        rows = random.integers(0, len(codes), len(codes))
        values.append(metric(codes[rows], factors[rows]))
    low, high = np.quantile(np.array(values) - np.mean(values) + value, (0.025, 0.975))
    return Score(value, float(low), float(high), len(codes), "", "higher")


def information(first: np.ndarray, second: np.ndarray) -> float:
    """Mutual information in nats of two rows of integers from 0 (N each), from their counts."""
    joint = np.zeros((first.max() + 1, second.max() + 1))
    np.add.at(joint, (first, second), 1 / len(first))
    expected = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    held = joint > 0
    return float((joint[held] * np.log(joint[held] / expected[held])).sum())


def entropy(values: np.ndarray) -> float:
    """Entropy in nats of integers from 0."""
    return float(_entropies(np.bincount(values)[None].astype(np.float64))[0])


def _entropies(weights: np.ndarray) -> np.ndarray:
    """Entropy in nats of each row, taken as a distribution; 0 for a row of zeros."""
    sums = weights.sum(1, keepdims=True)
    shares = weights / np.where(sums > 0, sums, 1)
    return -(shares * np.log(np.where(shares > 0, shares, 1))).sum(1)


def _binned(code: np.ndarray) -> np.ndarray:
    """A latent as one of 20 bins of equal width between its ends."""
    low, high = code.min(), code.max()
    if low == high:
        return np.zeros(len(code), np.int64)
    return np.minimum(((code - low) / (high - low) * BINS).astype(np.int64), BINS - 1)


def _squared_correlation(code: np.ndarray, factor: np.ndarray) -> float:
    return 0.0 if code.std() == 0 else float(np.corrcoef(code, factor)[0, 1] ** 2)


def _threshold_score(code: np.ndarray, factor: np.ndarray) -> float:
    try:
        from sklearn.tree import DecisionTreeClassifier
    except ImportError:
        raise UserError("SAP of a nominal factor needs scikit-learn: pip install 'latentpipe[explore]'.") from None
    kinds = np.unique(factor)
    tree = DecisionTreeClassifier(max_leaf_nodes=len(kinds), class_weight="balanced", random_state=0).fit(code[:, None], factor)
    right = tree.predict(code[:, None]) == factor
    accuracy = np.mean([right[factor == kind].mean() for kind in kinds])
    return float((accuracy - 1 / len(kinds)) / (1 - 1 / len(kinds)))


def _checked(codes: np.ndarray, factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    codes, factors = np.asarray(codes, np.float64), np.asarray(factors)
    if codes.ndim != 2 or factors.ndim != 2 or len(codes) != len(factors) or not np.issubdtype(factors.dtype, np.integer):
        raise ValueError(f"Expected codes N D and integer factors N K; given {codes.shape} and {factors.dtype} {factors.shape}.")
    if not np.isfinite(codes).all():
        raise UserError("The latents hold values that are not finite; 'latentpipe health' says more about the VAE.")
    constant = [column for column in range(factors.shape[1]) if factors[:, column].min() == factors[:, column].max()]
    if constant or factors.min() < 0:
        raise UserError(f"Each factor needs two values and more, from 0; columns {constant or 'below 0'} have not.")
    return codes, factors
