"""Whitened ways against inverse roots of whole covariances."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from farcli.forecasters import whitening
from farcli.forecasters.whitening import whitened


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def over_root(covariance: np.ndarray) -> np.ndarray:
    """(C / mean eigenvalue + .1)^(−1/2), by Denman's and Beavers's iteration: no eigenvectors."""
    size = len(covariance)
    root, inverse = covariance / (np.trace(covariance) / size) + 0.1 * np.eye(size), np.eye(size)
    for _ in range(40):
        root, inverse = (root + np.linalg.inv(inverse)) / 2, (inverse + np.linalg.inv(root)) / 2
    return inverse


def by_hand(way: np.ndarray, moves: np.ndarray) -> np.ndarray:
    left, right = sum(move @ move.T for move in moves), sum(move.T @ move for move in moves)
    found = over_root(left) @ way @ over_root(right)
    return found * np.linalg.norm(way) / np.linalg.norm(found)


@pytest.mark.parametrize("shape", [(3, 4), (2, 40), (40, 2), (1, 6), (6, 1), (4, 2, 3, 3)])
def test_matrices_are_taken_over_the_roots_of_both_covariances(shape: tuple[int, ...]) -> None:
    scale = normal(int(np.prod(shape)), seed=1).exp()
    moves_MD = normal(5, len(scale), seed=2) * scale
    way_D = moves_MD.sum(0) + normal(len(scale), seed=3)  # not in the span of the moves
    matrix = (shape[0], -1)
    expected = by_hand(way_D.view(matrix).numpy(), moves_MD.view(5, *matrix).numpy())
    found_D = whitened(way_D, moves_MD, shape)
    np.testing.assert_allclose(found_D.view(matrix).numpy(), expected, rtol=1e-6, atol=1e-9)
    single_D = whitened(way_D.float(), moves_MD.float(), shape)
    assert single_D.dtype == torch.float32
    torch.testing.assert_close(single_D.double(), found_D, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(7,), ()])
def test_vectors_are_divided_by_the_roots_of_mean_squares(shape: tuple[int, ...]) -> None:
    size = int(np.prod(shape))
    moves_MD, way_D = normal(4, size, seed=4) * torch.arange(1, size + 1), normal(size, seed=5)
    square_D = moves_MD.square().mean(0)
    expected_D = way_D / (square_D / square_D.mean() + 0.1).sqrt()
    expected_D *= way_D.norm() / expected_D.norm()
    torch.testing.assert_close(whitened(way_D, moves_MD, shape), expected_D)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 6), columns=st.integers(1, 9), count=st.integers(1, 7), seed=st.integers(0, 999))
def test_turning_either_side_turns_what_is_found(rows: int, columns: int, count: int, seed: int) -> None:
    moves, way = normal(count, rows, columns, seed=seed), normal(rows, columns, seed=seed + 1)
    left, right = (torch.linalg.qr(normal(size, size, seed=seed + 2))[0] for size in (rows, columns))
    plain = whitened(way.flatten(), moves.flatten(1), (rows, columns)).view(rows, columns)
    turned_moves, turned_way = left @ moves @ right, left @ way @ right
    turned = whitened(turned_way.flatten(), turned_moves.flatten(1), (rows, columns)).view(rows, columns)
    torch.testing.assert_close(turned, left @ plain @ right, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(torch.linalg.norm(plain), torch.linalg.norm(way))


def test_a_quiet_direction_gains_on_a_noisy_one() -> None:
    noise = torch.tensor([[10.0, 0.0], [0.0, 0.1]], dtype=torch.float64)  # by row
    moves = noise @ normal(6, 2, 5, seed=6)
    way = torch.ones(2, 5, dtype=torch.float64)
    found = whitened(way.flatten(), moves.flatten(1), (2, 5)).view(2, 5)
    assert found[1].norm() > 3 * found[0].norm()


def test_a_side_that_is_too_long_is_scaled_by_its_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whitening, "LARGEST_SIDE", 3)
    moves, way = normal(2, 2, 8, seed=7) * torch.arange(1, 9), normal(2, 8, seed=8)
    right = moves.square().sum((0, 1))
    expected = (way / (right / right.mean() + 0.1).sqrt()).numpy()
    expected = torch.as_tensor(over_root(sum(move @ move.T for move in moves.numpy())) @ expected)
    expected *= way.norm() / expected.norm()
    found = whitened(way.flatten(), moves.flatten(1), (2, 8)).view(2, 8)  # 2 × 2 samples of 8, 16 of 2
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_where_there_is_no_noise_to_speak_of_the_way_stays(value: float) -> None:
    way_D = normal(6, seed=9)
    assert torch.equal(whitened(way_D, torch.full((3, 6), value), (2, 3)), way_D)
    assert torch.equal(whitened(torch.zeros(6), normal(3, 6), (2, 3)), torch.zeros(6))
    dead = normal(3, 2, 3)
    dead[:, 1] = 0.0  # a unit that never moves
    assert whitened(way_D, dead.flatten(1), (2, 3)).isfinite().all()
