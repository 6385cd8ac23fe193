"""A linear VAE collapses where theory says, and free bits keep it from it. The model is that of benchmarks/linear_vae.py."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

PATH = Path(__file__).parents[2] / "benchmarks" / "linear_vae.py"


@pytest.fixture(scope="module")
def linear() -> Any:
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("linear_vae", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def x(linear: Any) -> torch.Tensor:
    """Points with the exact covariance."""
    return linear.data()


def test_the_data_have_the_eigenvalues_that_theory_uses(linear: Any, x: torch.Tensor) -> None:
    values = torch.linalg.eigvalsh(x.T @ x / len(x)).flip(0)
    torch.testing.assert_close(values, torch.tensor(linear.EIGENVALUES, dtype=x.dtype))


@pytest.mark.parametrize("beta", [1.0, 7.0, 15.0])
def test_variance_sigma_and_kl_follow_theory(linear: Any, x: torch.Tensor, beta: float) -> None:
    trained = linear.train(x, beta)
    for mode in range(linear.LATENTS):
        ratio = min(1.0, beta * linear.NOISE / linear.EIGENVALUES[mode])
        assert trained.variance[mode] == pytest.approx(1 - ratio, abs=2e-3)
        assert trained.sigma2[mode] == pytest.approx(ratio, abs=2e-3)
        assert trained.kl[mode] == pytest.approx(-0.5 * math.log(ratio), abs=2e-3)


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_a_mode_collapses_within_ten_percent_of_theory(linear: Any, x: torch.Tensor, mode: int) -> None:
    theory = linear.EIGENVALUES[mode] / linear.NOISE
    found = linear.collapse_beta(x, mode, theory / 5, theory * 5, halvings=6)
    assert found == pytest.approx(theory, rel=0.1)


def test_free_bits_keep_every_mode_active_where_all_collapse(linear: Any, x: torch.Tensor) -> None:
    beta = 1.5 * linear.EIGENVALUES[0] / linear.NOISE
    assert linear.train(x, beta).active == 0
    free = linear.train(x, beta, free_bits=0.25)
    assert free.active == linear.LATENTS
    assert all(kl < 0.3 * math.log(2) for kl in free.kl)  # held at what is free, not let go
