"""Nearest neighbors, classifiers and mixtures against scikit-learn and scipy, and where these have no answer."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.linear_model import LogisticRegression
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from vae_cli.core.errors import UserError
from vae_cli.metrics.classifiers import ROWS, nearest, predict_by_neighbors, predict_linearly
from vae_cli.runs.mixture import Mixture, fit_mixture


def clusters(count: int, dimensions: int = 5, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return overlapping clusters of codes on different scales, and their labels 10, 11, 12 ..."""
    torch.manual_seed(0)
    centers, units = 2 * torch.randn(classes, dimensions), 10.0 ** torch.arange(-2, dimensions - 2)
    torch.manual_seed(seed)
    labels = torch.randint(classes, (count,))
    return (centers[labels] + torch.randn(count, dimensions)) * units, labels + 10


def test_a_linear_classifier_predicts_what_scikit_learn_predicts() -> None:
    (codes, labels), (queries, truth) = clusters(800), clusters(500, seed=1)
    codes[:, 2], queries[:, 2] = 7.0, 7.0  # a dimension that does not vary
    expected = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(codes, labels).predict(queries)
    predicted = predict_linearly(codes, labels, queries)
    assert 0.7 < (predicted == truth).double().mean() < 1
    assert (predicted == torch.from_numpy(expected)).double().mean() > 0.995


def test_neighbors_vote_as_in_scikit_learn() -> None:
    (codes, labels), (queries, _) = clusters(800), clusters(2 * ROWS + 1, seed=1)
    expected = KNeighborsClassifier(10).fit(codes, labels).predict(queries)
    assert torch.equal(predict_by_neighbors(codes, labels, queries, 10), torch.from_numpy(expected))


def test_of_labels_with_equally_many_votes_the_smallest_wins() -> None:
    codes, labels = torch.tensor([[0.0], [1.0], [2.0], [9.0]]), torch.tensor([5, 3, 8, 1])
    assert predict_by_neighbors(codes, labels, torch.tensor([[1.0]]), 3).tolist() == [3]


def test_a_point_is_not_its_own_neighbor_but_its_twin_is() -> None:
    points = torch.tensor([[0.0], [0.0], [3.0], [7.0]])
    distances, rows = nearest(points, 1)
    assert distances[:, 0].tolist() == [0, 0, 3, 4]
    assert rows[:2, 0].tolist() == [1, 0]
    distances, rows = nearest(points, 2, torch.tensor([[6.0]]))
    assert distances.tolist() == [[1, 3]]
    assert rows.tolist() == [[3, 2]]


def test_the_density_of_a_mixture_is_the_weighted_sum_of_its_gaussians() -> None:
    torch.manual_seed(0)
    factors = torch.randn(3, 4, 4).double().tril()
    factors.diagonal(dim1=1, dim2=2).abs_().add_(0.1)
    mixture = Mixture(torch.tensor([0.5, 0.2, 0.3]).double(), torch.randn(3, 4).double(), factors)
    codes = torch.randn(20, 4).double()
    parts = [
        weight * torch.from_numpy(multivariate_normal(mean, factor @ factor.T).pdf(codes))
        for weight, mean, factor in zip(*mixture, strict=True)
    ]
    torch.testing.assert_close(mixture.log_prob(codes), torch.stack(parts).sum(0).log())


@pytest.mark.parametrize(("dimensions", "components"), [(1, 4), (5, 4), (5, 10), (20, 10)])
def test_a_mixture_fits_codes_as_well_as_scikit_learn(dimensions: int, components: int) -> None:
    codes, _ = clusters(2000, dimensions)
    unit = codes.double() / codes.double().std(0)
    fitted = fit_mixture(unit, components)
    expected = GaussianMixture(components, random_state=0).fit(unit.numpy()).score(unit.numpy())
    assert float(fitted.log_prob(unit).mean()) == pytest.approx(expected, abs=0.05)
    other_units = fit_mixture(codes, components)
    torch.testing.assert_close(other_units.means / codes.double().std(0), fitted.means, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("components", [1, 3])
def test_a_mixture_can_be_fitted_to_codes_that_are_all_equal(components: int) -> None:
    fitted = fit_mixture(torch.full((50, 3), 2.0), components)
    torch.testing.assert_close(fitted.draw(10), torch.full((10, 3), 2.0))
    assert float(fitted.weights.sum()) == pytest.approx(1)


@pytest.mark.parametrize(("codes", "components", "message"), [(1, 1, "--from prior"), (3, 3, "--components 3 is too")])
def test_too_few_codes_for_a_mixture_are_refused(codes: int, components: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit_mixture(torch.randn(codes, 2), components)
