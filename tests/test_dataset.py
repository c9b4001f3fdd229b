"""Splits, and the datasets that need neither a download nor files."""

from __future__ import annotations

import builtins
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from math import pi
from typing import Any

import numpy as np
import pytest
import torch

from vae_cli.axes.dataset import Dataset, Digits, LinearGaussian, Shapes, Split, Splits, digits
from vae_cli.axes.dataset.shapes import HEART_REACH, MARGIN, PERIODS, RADIUS, identifiable, render
from vae_cli.axes.dataset.split import partition
from vae_cli.core.errors import UserError

EIGENVALUES = [8.0, 5.0, 3.0, 2.0, 0.7, 0.5, 0.3, 0.1, 0.05]

DATASETS: dict[str, Callable[..., Dataset]] = {
    "digits": Digits,
    "linear_gaussian": lambda **settings: LinearGaussian(eigenvalues=EIGENVALUES, images=300, test=40, **settings),
    "shapes": lambda **settings: Shapes(side=16, images=300, test=40, **settings),
}


@pytest.fixture(params=DATASETS)
def make(request: pytest.FixtureRequest) -> Callable[..., Dataset]:
    return DATASETS[request.param]


def contents(split: Split) -> torch.Tensor:
    return split.batch(torch.arange(len(split)))


def rows(split: Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in contents(split)}


def assert_same(one: Splits, other: Splits) -> None:
    for a, b in zip(one[:3], other[:3], strict=True):
        assert torch.equal(contents(a), contents(b))


# -- every dataset --------------------------------------------------------------------------------------------------


def test_images_have_the_promised_shape_and_range(make: Callable[..., Dataset]) -> None:
    dataset = make(validation=50)
    splits = dataset.load()
    assert len(splits.validation) == 50
    for split in splits[:3]:
        images = contents(split)
        assert images.dtype == torch.float32
        assert images.shape == (len(split), *dataset.shape)
        if "unit_interval" in dataset.provides:
            assert 0 <= images.min() < images.max() <= 1
        if "levels" in dataset.provides:
            assert split.images.dtype == torch.uint8
        if "labels" in dataset.provides:
            assert splits.classes is not None
            labels = split.batch_labels(torch.arange(len(split)))
            assert labels.dtype == torch.int64
            assert set(labels.tolist()) <= set(range(len(splits.classes)))
        else:
            with pytest.raises(ValueError, match="no labels"):
                split.batch_labels(torch.arange(1))


def test_splits_depend_on_the_split_seed_alone(make: Callable[..., Dataset]) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    first = make(validation=50, split_seed=3).load()
    torch.manual_seed(2)
    np.random.seed(2)
    make(validation=20, split_seed=4).load()  # other calls in between must not matter
    dataset = make(validation=50, split_seed=3)
    assert_same(first, dataset.load())
    assert_same(first, dataset.load())
    assert rows(make(validation=50, split_seed=4).load().validation) != rows(first.validation)


def test_without_validation_all_images_are_for_training(make: Callable[..., Dataset]) -> None:
    some, none = make(validation=50).load(), make(validation=0).load()
    assert len(none.validation) == 0
    assert len(none.train) == len(some.train) + 50
    assert contents(none.validation).shape == (0, *make(validation=0).shape)
    assert torch.equal(contents(none.test), contents(some.test))


def test_a_split_without_training_images_is_refused(make: Callable[..., Dataset]) -> None:
    training = len(make(validation=0).load().train)
    for validation in (training, training + 1):
        with pytest.raises(UserError, match=rf"validation={validation} .*only {training} images .*{training - 1}\."):
            make(validation=validation)


# -- splits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "validation", "test"), [(10, 0, 0), (10, 9, 0), (100, 20, 30), (2, 0, 1)])
def test_partition_is_disjoint_and_exhaustive(count: int, validation: int, test: int) -> None:
    parts = partition(count, validation, 0, test)
    assert [len(part) for part in parts] == [count - validation - test, validation, test]
    assert sorted(torch.cat(parts).tolist()) == list(range(count))


def test_held_out_images_do_not_depend_on_other_sizes() -> None:
    _, validation, test = (set(part.tolist()) for part in partition(100, 20, 0, test=10))
    assert validation == set(partition(100, 20, 0, test=30)[1].tolist())
    assert validation < set(partition(100, 40, 0)[1].tolist())
    assert test == set(partition(100, 0, 0, test=10)[2].tolist())
    assert validation != set(range(80, 100))
    assert validation != set(partition(100, 20, 1, test=10)[1].tolist())


def test_the_same_images_are_held_out_in_every_version() -> None:
    assert partition(10, 4, 0)[1].tolist() == [7, 9, 2, 4]


def test_a_seed_of_any_size() -> None:
    assert len(partition(10, 4, 2**70)[1]) == 4


def levels_split() -> Split:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (700, 3, 20, 40), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(700) % 7, torch.randperm(700, generator=generator)[:650])


def test_batch_is_the_images_divided_by_255() -> None:
    split = levels_split()
    positions = torch.tensor([5, 0, 649, 5])
    naive = torch.stack([split.images[split.index[p]].float() / 255 for p in positions])
    assert torch.equal(split.batch(positions), naive)
    assert split.batch_labels(positions).tolist() == [int(split.index[p]) % 7 for p in positions]
    assert split.batch(torch.tensor([], dtype=torch.int64)).shape == (0, 3, 20, 40)


def test_float_images_are_returned_as_they_are_and_cannot_be_changed_through_a_batch() -> None:
    split = Split(torch.randn(6, 1, 2, 2) * 100, None, torch.tensor([4, 2]))
    batch = split.batch(torch.tensor([1, 0]))
    assert torch.equal(batch, split.images[[2, 4]])
    batch.zero_()
    assert split.images[2].abs().sum() > 0


@pytest.mark.parametrize("kind", ["levels", "float"])
def test_mean_is_the_mean_of_the_splits_own_images(kind: str) -> None:
    split = levels_split()  # 1.6 MB: more than one step
    if kind == "float":
        split = replace(split, images=torch.randn(700, 3, 20, 40))
    mean = split.mean()
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, contents(split).double().mean(0).float(), rtol=1e-6, atol=1e-6)


def test_an_empty_split_has_no_mean() -> None:
    with pytest.raises(ValueError, match="empty"):
        replace(levels_split(), index=torch.tensor([], dtype=torch.int64)).mean()


def test_splits_that_share_an_array_share_it_on_the_device() -> None:
    there = Digits(validation=10).load().to("meta")
    assert there.train.images is there.validation.images is there.test.images
    assert there.train.labels is there.test.labels
    for split in there[:3]:
        assert split.images.device == split.index.device == torch.device("meta")


# -- digits ---------------------------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = Digits().load()
    monkeypatch.setattr(digits, "find_spec", lambda name: None)
    slow = Digits().load()
    assert_same(fast, slow)
    assert fast.train.labels is not None
    assert slow.train.labels is not None
    assert torch.equal(fast.train.labels, slow.train.labels)
    assert [len(split) for split in fast[:3]] == [1300, 200, 297]
    assert len(set(fast.train.images.flatten().tolist())) == 17
    assert fast.train.images.max() == 255
    assert sorted(torch.cat([split.index for split in fast[:3]]).tolist()) == list(range(1797))


def test_digits_are_read_without_importing_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def guarded(name: str, *args: Any, **kwargs: Any) -> Any:
        assert not name.startswith("sklearn")
        return real(name, *args, **kwargs)

    assert importlib.util.find_spec("sklearn")
    monkeypatch.setattr(builtins, "__import__", guarded)
    Digits().load()


# -- linear_gaussian ------------------------------------------------------------------------------------------------


def test_every_split_has_exactly_the_covariance() -> None:
    dataset = LinearGaussian(eigenvalues=EIGENVALUES, images=400, test=50, validation=10, split_seed=2)
    assert dataset.shape == (1, 3, 3)
    vectors = dataset.eigenvectors
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(9, dtype=torch.float64))
    torch.testing.assert_close(dataset.covariance @ vectors, vectors * dataset.eigenvalues)
    for split in dataset.load()[:3]:
        data = contents(split).flatten(1).double()
        torch.testing.assert_close(data.mean(0), torch.zeros(9, dtype=torch.float64), atol=1e-6, rtol=0)
        torch.testing.assert_close(data.T @ data / len(data), dataset.covariance, atol=1e-5, rtol=0)


def test_splits_of_linear_gaussian_share_no_image() -> None:
    """Whitening changes the images a little, so a shared image would be near, not equal."""
    dataset = LinearGaussian(eigenvalues=EIGENVALUES, images=3000, test=1000, validation=1000)
    scale = dataset.eigenvectors / dataset.eigenvalues.sqrt()
    parts = [contents(split).flatten(1).double() @ scale for split in dataset.load()[:3]]
    assert [len(part) for part in parts] == [2000, 1000, 1000]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        distance = torch.cdist(parts[one], parts[other])
        assert min(distance.amin(0).median(), distance.amin(1).median()) > 0.6


def test_rotations_differ_with_the_split_seed() -> None:
    one, other = (LinearGaussian(eigenvalues=EIGENVALUES, split_seed=seed).eigenvectors for seed in (0, 1))
    assert not torch.allclose(one.abs(), other.abs(), atol=1e-2)


def test_an_odd_number_of_eigenvalues_is_a_row_of_pixels() -> None:
    assert LinearGaussian(eigenvalues=[2, 1]).shape == (1, 1, 2)
    assert LinearGaussian(eigenvalues=[2]).load().train.images.shape == (9000, 1, 1, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eigenvalues": []}, r"dataset\.eigenvalues=\[2,1\]"),
        ({"test": 9}, "9 test images .* 9 eigenvalues.* 10 images"),
        ({"images": 30, "validation": 9}, r"9 validation images .* dataset\.validation=0"),
        ({"images": 30, "validation": 21}, "9 training images"),
    ],
)
def test_too_few_images_for_a_covariance(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LinearGaussian(**{"eigenvalues": EIGENVALUES, **settings})


# -- shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [16, 32, 61])
def test_the_factors_describe_the_images(side: int) -> None:
    dataset = Shapes(side=side, images=300, test=60, validation=0)
    images = dataset.load().train.images[:, 0].double() / 255
    shape, scale, _, x, y = dataset.factors.double().T
    pixels = (torch.arange(side) + 0.5) * 2 / side - 1
    mass = images.sum((1, 2))
    tolerance = 0.2 * 2 / side  # a fifth of a pixel
    torch.testing.assert_close((images.sum(1) @ pixels.double()) / mass, MARGIN * (2 * x - 1), atol=tolerance, rtol=0)
    torch.testing.assert_close((images.sum(2) @ pixels.double()) / mass, MARGIN * (2 * y - 1), atol=tolerance, rtol=0)
    unit_area = torch.tensor([2.0, pi / 2, (1 + pi / 4) / HEART_REACH**2], dtype=torch.float64)
    area = unit_area[shape.long()] * (RADIUS * scale) ** 2
    torch.testing.assert_close(mass * (2 / side) ** 2, area, rtol=0, atol=0.25 * 2 / side * RADIUS)
    assert images[:, 0].max() == images[:, -1].max() == images[:, :, 0].max() == images[:, :, -1].max() == 0


def test_factors_belong_to_their_images_and_fill_their_ranges() -> None:
    dataset = Shapes(side=8, images=500, test=60, validation=100)
    splits = dataset.load()
    for split in splits[:3]:
        labels = split.batch_labels(torch.arange(len(split)))
        assert torch.equal(labels, dataset.factors[split.index, 0].long())
    assert splits.classes == ("square", "ellipse", "heart")
    assert dataset.factors.shape == (560, len(dataset.factor_names))
    torch.testing.assert_close(dataset.factors.amin(0), torch.tensor([0, 0.5, 0, 0, 0]), atol=0.05, rtol=0)
    torch.testing.assert_close(dataset.factors.amax(0), torch.tensor([2, 1, 2 * pi, 1, 1]), atol=0.05, rtol=0)
    assert (torch.corrcoef(dataset.factors.T) - torch.eye(5)).abs().max() < 0.2
    assert sorted(torch.cat([split.index for split in splits[:3]]).tolist()) == list(range(560))


def test_orientation_turns_counterclockwise() -> None:
    upright = np.array([[kind, 1, 0, 0.5, 0.5] for kind in range(3)], dtype=np.float32)
    turned = upright.copy()
    turned[:, 2] = pi / 2
    before, after = render(upright, 64), render(turned, 64)
    assert np.abs(np.rot90(before, axes=(2, 3)).astype(int) - after).max() <= 2
    # Upright, the ellipse is wide and the heart stands on its tip.
    assert before[1, 0].any(0).sum() > before[1, 0].any(1).sum()
    lines = np.flatnonzero(before[2, 0].any(1))
    assert before[2, 0, lines[0] + 2].sum() > 2 * before[2, 0, lines[-1] - 2].sum()


def test_sprites_turned_by_their_period_are_the_same_image_and_have_the_same_identifiable_factors() -> None:
    angles = torch.linspace(0.1, 1.4, 7)
    factors = torch.cat([torch.tensor([[kind, 0.8, angle, 0.4, 0.7] for angle in angles]) for kind in range(3)])
    turned = factors.clone()
    turned[:, 2] += torch.tensor(PERIODS)[factors[:, 0].long()]
    same = identifiable(factors)
    torch.testing.assert_close(identifiable(turned), same, atol=1e-5, rtol=0)
    assert np.abs(render(factors.numpy(), 32).astype(int) - render(turned.numpy(), 32)).max() <= 1
    assert torch.equal(same[:, [0, 1, 3, 4]], factors[:, [0, 1, 3, 4]])
    # Half a period away, the images differ: no smaller part of the angle would identify them.
    turned[:, 2] += torch.tensor(PERIODS)[factors[:, 0].long()] / 2
    assert np.abs(render(factors.numpy(), 32).astype(int) - render(turned.numpy(), 32)).max((1, 2, 3)).min() > 100


def test_splits_have_their_own_identifiable_factors() -> None:
    dataset = Shapes(side=8, images=3000, test=60, validation=100)
    splits = dataset.load()
    assert splits.factors is not None
    assert tuple(factor.name for factor in splits.factors) == dataset.factor_names
    assert splits.to("cpu").factors == splits.factors
    for split in splits.to("cpu")[:3]:
        positions = torch.arange(len(split)).flip(0)
        assert torch.equal(split.batch_factors(positions), identifiable(dataset.factors)[split.index[positions]])
    orientation, shape = splits.train.batch_factors(torch.arange(2900))[:, [2, 0]].T
    for kind in range(3):  # uniform, and independent of the shape
        assert float((orientation[shape == kind]).quantile(0.25)) == pytest.approx(0.25, abs=0.04)
        assert float((orientation[shape == kind]).quantile(0.75)) == pytest.approx(0.75, abs=0.04)


def test_other_datasets_have_no_factors() -> None:
    splits = Digits().load()
    assert splits.factors is splits.test.factors is splits.to("cpu").test.factors is None
    with pytest.raises(ValueError, match="factors of variation of these images are not known"):
        splits.test.batch_factors(torch.tensor([0]))


def test_more_training_images_do_not_change_the_test_images() -> None:
    few, many = (Shapes(side=8, images=images, test=20, validation=0).load() for images in (30, 50))
    assert torch.equal(contents(few.test), contents(many.test))
