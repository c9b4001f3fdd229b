"""Claim 2: the noise keeps neighbours alike. How fast images change with the code, and into what."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.func import jvp, vjp

from vae_cli.metrics.base import BATCH, Figure, MeasuredRun, Metric, mean_figure, undefined
from vae_cli.runs.codes import between

DIRECTIONS = 256  # in which the decoder is differentiated for the Frobenius norm, at most
TOLERANCE = 1e-5  # relative change of a singular value at which the power iteration ends
ITERATIONS = 200
STEPS = 16  # of a path
DRAWS = 5  # codes drawn of an image
STEP = 0.5  # in units of the aggregate standard deviation
NEIGHBOURS = 10
PLACES_NUMBERS = 1 << 17  # pixels that are differentiated together: a graph holds many numbers for each
NUMBERS = 1 << 24  # pixels that are kept together: 64 MiB

NO_LABELS = "the images have no labels"
ONE_IMAGE = "there is only one test image"

PIXELS = "pixel values"  # where a pixel goes from 0 to 1


def pairs(subject: MeasuredRun, count: int) -> tuple[Tensor, Tensor] | None:
    """The rows (count,) of two different test images each, the same for every run of a dataset; None where there are no
    two images."""
    images = len(subject.codes().loc)
    if images < 2:
        return None
    generator = torch.Generator().manual_seed(subject.stream("pairs"))
    first = torch.randint(images, (count,), generator=generator)
    second = (first + torch.randint(1, images, (count,), generator=generator)) % images
    return first, second


def in_spread(subject: MeasuredRun, codes: Tensor) -> Tensor:
    """Codes (N, D) in units of the aggregate standard deviation. A dimension in which nothing but rounding moves is
    left at 0: it has no unit."""
    moves = subject.spread > 1e-6 * subject.codes().loc.abs().amax(0)
    return torch.where(moves, codes / torch.where(moves, subject.spread, 1.0), 0.0)


def mean_images(subject: MeasuredRun, z: Tensor) -> Tensor:
    """The likelihood's means (B, C, H, W) at codes (B, D), in float32 whatever the network's precision: what is
    measured are differences between near images, which rounding to bfloat16 would drown."""
    likelihood = subject.model.likelihood(subject.model.decoder(z))
    return likelihood.mean


def frobenius_norm(function: Callable[[Tensor], Tensor], z: Tensor, unit: Tensor) -> Tensor:
    """|J|_F of the Jacobian J = d function(z) / d (z / unit) at each of the codes z (B, D), float64 (B,).

    One forward derivative for each column of J, so it is exact, for up to R = DIRECTIONS dimensions. Beyond, the root
    of the mean of |J v|^2 over R random directions v of signs (Hutchinson 1990): the mean is unbiased, with a relative
    standard deviation of at most sqrt(2 / R), so the norm's is at most 1 / sqrt(2 R), 4.4 %, and its bias -0.1 %.
    """
    dimensions = z.shape[1]
    exact = dimensions <= DIRECTIONS
    total = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    for direction in range(min(dimensions, DIRECTIONS)):
        if exact:
            tangent = torch.zeros_like(z)
            tangent[:, direction] = 1
        else:
            tangent = torch.randint_like(z, 2) * 2 - 1
        pushed = jvp(function, (z,), (unit * tangent,))[1]
        total += pushed.flatten(1).double().square().sum(1)
    return (total if exact else total / DIRECTIONS).sqrt()


def largest_singular_value(function: Callable[[Tensor], Tensor], z: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """The largest singular value of J = d function(z) / d (z / unit) at each of the codes z (B, D), (B,), and whether
    it has converged, bool (B,).

    Power iteration v <- J^T J v / |J^T J v| from a random start, one forward and one reverse derivative each, until
    |J v| changes by less than TOLERANCE of itself, or ITERATIONS have passed. |J v| comes from below: where the second
    singular value is nearly as large, what is given lies between the two.
    """
    value = torch.zeros(len(z), device=z.device)
    left = torch.arange(len(z), device=z.device)  # the places that have not converged
    v = torch.randn_like(z)
    for _ in range(ITERATIONS):
        v = v / v.norm(dim=1, keepdim=True).clamp_min(1e-30)
        pushed = jvp(function, (z[left],), (unit * v,))[1].detach()
        norm = pushed.flatten(1).norm(dim=1)
        moves = (norm - value[left]).abs() > TOLERANCE * norm
        value[left] = norm
        left = left[moves]
        if not len(left):
            break
        # Not the images but their directions go back, so that small derivatives do not vanish when they are squared.
        direction = pushed[moves] / norm[moves].reshape(-1, 1, 1, 1)
        v = unit * vjp(function, z[left])[1](direction)[0].detach()
    return value, torch.ones_like(value, dtype=torch.bool).index_fill(0, left, False)


class Jacobian(Metric):
    """How fast the mean image changes with the code, at budget.points codes of test images (loc), half-way between the
    locs of as many random pairs, and at as many draws of the prior.

    J = d E[x|z'] / d z' with z' = z / a, a_j the aggregate standard deviation (`MeasuredRun.spread`), so that modes
    whose codes differ in scale compare (Arvanitidis et al., Latent Space Oddity, 2018, measure curves by J^T J).
    `jacobian_frobenius_*` is the mean of |J|_F = sqrt(sum of the squared derivatives), exact up to 256 dimensions and
    estimated beyond (see frobenius_norm), `jacobian_norm_*` that of the largest singular value, to about 1e-3 of itself
    from below (see largest_singular_value). Both in pixel values per unit of z', root of the sum over pixels. The error
    is that of the mean over the places.
    """

    claim = "neighbours"

    def compute(self) -> dict[str, Figure]:
        places = self._places()
        reason = self._reason()
        figures: dict[str, Figure] = {}
        for name, z in places.items():
            if reason or z is None:
                both = undefined(reason or ONE_IMAGE), undefined(reason or ONE_IMAGE)
            else:
                with warnings.catch_warnings():
                    # What torch says of its own code at its first forward derivative.
                    warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated")
                    both = self._norms(z)
            figures[f"jacobian_frobenius_{name}"], figures[f"jacobian_norm_{name}"] = both
        return figures

    def _places(self) -> dict[str, Tensor | None]:
        subject, count = self.subject, self.subject.budget.points
        loc = subject.codes().loc
        chosen = pairs(subject, count)
        halfway = None if chosen is None else (loc[chosen[0]] + loc[chosen[1]]) / 2
        return {"codes": loc[:count], "halfway": halfway, "prior": subject.model.prior().sample((count,))}

    def _reason(self) -> str:
        """Why there is no Jacobian, or nothing where there is one."""
        if not (self.subject.spread > 0).any():
            return "the codes of all images are the same, so there is no unit to measure them in"
        with torch.enable_grad():
            mean = mean_images(self.subject, self.subject.codes().loc[:1].clone().requires_grad_())
        return "" if mean.requires_grad else "the likelihood gives no gradient of its mean"

    def _norms(self, z: Tensor) -> tuple[Figure, Figure]:
        frobenius, largest, converged = [], [], []

        def function(codes: Tensor) -> Tensor:
            return mean_images(self.subject, codes)

        for part in z.split(max(1, PLACES_NUMBERS // math.prod(self.subject.run.shape))):
            frobenius.append(frobenius_norm(function, part, self.subject.spread))
            value, done = largest_singular_value(function, part, self.subject.spread)
            largest.append(value)
            converged.append(done)
        estimated = f"estimated in {DIRECTIONS} random directions" if z.shape[1] > DIRECTIONS else ""
        left = int((~torch.cat(converged)).sum())
        late = f"not converged at {left} of {len(z)} places" if left else ""
        return mean_figure(torch.cat(frobenius), PIXELS, estimated), mean_figure(torch.cat(largest), PIXELS, late)


class Interpolation(Metric):
    """What lies between two codes: along straight lines between the locs of budget.pairs random pairs of test images,
    the mean image at 17 points x_0 ... x_16.

    path_length_over_chord        sum_i |x_i - x_(i-1)| / |x_16 - x_0|: 1 is straight, and it is never less
    largest_step_over_mean        max_i |x_i - x_(i-1)| / mean_i |x_i - x_(i-1)|: 1 is even, 16 is one jump
    midpoint_distance_to_training root mean squared difference, over pixels, of x_8 from the nearest training image
    reconstruction_distance_to_training  the same of x_0 and x_16: what it is where there is an image, the floor

    All are means over pairs (the last over both ends), with their standard errors. Pairs whose ends decode into one
    image, up to rounding, have no chord and are left out of the first two. The training images are the dataset's own,
    before a likelihood binarizes them, up to budget.train_images of them: with fewer the distances are larger.
    """

    claim = "neighbours"

    def compute(self) -> dict[str, Figure]:
        names = "path_length_over_chord", "largest_step_over_mean"
        distances = "midpoint_distance_to_training", "reconstruction_distance_to_training"
        chosen = pairs(self.subject, self.subject.budget.pairs)
        if chosen is None:
            return {name: undefined(ONE_IMAGE) for name in (*names, *distances)}
        loc, pixels = self.subject.codes().loc, math.prod(self.subject.run.shape)
        ratios, midpoint_distance, end_distance = [], [], []
        rows = max(1, NUMBERS // ((STEPS + 1) * pixels))
        for first, second in zip(chosen[0].split(rows), chosen[1].split(rows), strict=True):
            path = self._decode(between(loc[first], loc[second], STEPS + 1, "linear"))
            ratios.append(step_ratios(path))
            midpoint, *ends = self._nearest(path[[STEPS // 2, 0, STEPS]].flatten(0, 1)).chunk(3)
            midpoint_distance.append(midpoint)
            end_distance += ends
        length, largest = torch.cat(ratios, 1)
        has_chord = length.isfinite()
        if has_chord.any():
            note = "" if has_chord.all() else f"without {int((~has_chord).sum())} pairs that decode into one image"
            figures = [mean_figure(length[has_chord], note=note), mean_figure(largest[has_chord], note=note)]
        else:
            figures = [undefined("all codes decode into one image")] * 2
        return dict(zip(names, figures, strict=True)) | {
            distances[0]: mean_figure(torch.cat(midpoint_distance), PIXELS),
            distances[1]: mean_figure(torch.cat(end_distance), PIXELS),
        }

    def _decode(self, z: Tensor) -> Tensor:
        """Mean images (T, P, pixels) of codes (T, P, D)."""
        images = [mean_images(self.subject, part).flatten(1) for part in z.flatten(0, 1).split(BATCH)]
        return torch.cat(images).unflatten(0, z.shape[:2])

    def _nearest(self, images: Tensor) -> Tensor:
        """The root mean squared difference of images (M, pixels) from the nearest training image each, (M,)."""
        best = torch.full((len(images),), math.inf, device=images.device)
        for training in self._training_images():
            candidate = training[torch.cdist(images, training).argmin(1)]
            # cdist finds the nearest one through a matrix product, which is too coarse for the distance itself.
            best = torch.minimum(best, (candidate - images).square().mean(1))
        return best.sqrt()

    def _training_images(self) -> Iterator[Tensor]:
        train = self.subject.splits.train
        for positions in self.subject.positions("train").split(BATCH):
            yield train.batch(positions).to(self.subject.device).flatten(1)


def step_ratios(path: Tensor) -> Tensor:
    """Of paths (T, P, pixels), their length over their chord and their largest step over the mean one, float64 (2, P);
    not a number where the ends differ by no more than rounding does."""
    steps = torch.stack([(b - a).double().norm(dim=1) for a, b in pairwise(path)])
    chord = (path[-1] - path[0]).double().norm(dim=1)
    # float32 rounds a pixel by 6e-8 of itself.
    has_chord = chord > 1e-5 * torch.maximum(path[0].norm(dim=1), path[-1].norm(dim=1))
    ratios = torch.stack([steps.sum(0) / chord, steps.amax(0) / steps.mean(0)])
    return torch.where(has_chord, ratios, math.nan)


class ClassChange(Metric):
    """How often a code near an image's is decoded into another class, by the feature net (`metric.features`).

    class_change_by_noise    draws z ~ q(z|x) whose mean image is of another class than that of loc
    class_change_from_label  such draws whose class is not the image's own; its floor, in the note, is the same share of
                             the reconstructions from loc, in which the net's own mistakes are
    class_change_by_step     z = loc + a epsilon / 2, epsilon ~ N(0, I), a the aggregate standard deviation, whose class
                             is not that of loc: the same step for every mode, a point mass too

    Shares of 5 draws each for budget.pictures / 5 test images; unbiased, and the error is that of the mean over images.
    The first two are not defined for a point mass, none without labels.
    """

    claim = "neighbours"

    def compute(self) -> dict[str, Figure]:
        from vae_cli.metrics.features import feature_net

        subject = self.subject
        names = "class_change_by_noise", "class_change_from_label", "class_change_by_step"
        net, labels = feature_net(subject), subject.codes().labels
        if net is None or labels is None:
            return {name: undefined("the images have no labels, or one label only") for name in names}
        found: dict[str, list[Tensor]] = {name: [] for name in (*names, "floor")}
        for x, rows in subject.batches("test", max(1, subject.budget.pictures // DRAWS)):
            posterior, own = subject.model.encode(x), labels[rows]
            loc = posterior.mean
            reconstructed = net.classes(subject.decode(loc).clamp(0, 1))
            steps = [loc + STEP * subject.spread * torch.randn_like(loc) for _ in range(DRAWS)]
            stepped = torch.stack([net.classes(subject.decode(z).clamp(0, 1)) for z in steps])
            found["class_change_by_step"].append(share(stepped != reconstructed))
            found["floor"].append((reconstructed != own).double())
            if subject.has_noise:
                drawn = [net.classes(subject.decode(posterior.rsample()).clamp(0, 1)) for _ in range(DRAWS)]
                found["class_change_by_noise"].append(share(torch.stack(drawn) != reconstructed))
                found["class_change_from_label"].append(share(torch.stack(drawn) != own))
        note = (
            f"{float(torch.cat(found.pop('floor')).mean()):.1%} without noise; the net is right for {net.accuracy:.1%}"
        )
        return {
            name: mean_figure(torch.cat(values), note=note if name == "class_change_from_label" else "")
            if values
            else undefined("a point mass has no draws")
            for name, values in found.items()
        }


def share(hits: Tensor) -> Tensor:
    """The share of hits (draws, B) among the draws, float64 (B,)."""
    return hits.double().mean(0)


class NeighbourLabels(Metric):
    """Whether near codes are of one class.

    neighbour_label_agreement  the share of the 10 nearest other test images (Euclidean distance of loc in units of the
                               aggregate standard deviation) that have an image's label, averaged over test images
    neighbour_label_chance     the same of random other images, sum_c n_c (n_c - 1) / (N (N - 1)), exact

    Not defined without labels. The error is the standard error over images, a little small since they share neighbours.
    """

    claim = "neighbours"

    def compute(self) -> dict[str, Figure]:
        from sklearn.neighbors import NearestNeighbors

        names = "neighbour_label_agreement", "neighbour_label_chance"
        codes = self.subject.codes()
        images = len(codes.loc)
        if codes.labels is None or images < 2:
            reason = NO_LABELS if codes.labels is None else ONE_IMAGE
            return {name: undefined(reason) for name in names}
        labels = codes.labels.cpu()
        loc = in_spread(self.subject, codes.loc).cpu().numpy()
        # Asked for no code in particular, it gives the neighbours of each without itself.
        found = NearestNeighbors(n_neighbors=min(NEIGHBOURS, images - 1)).fit(loc).kneighbors(return_distance=False)
        agreement = (labels[torch.from_numpy(found)] == labels[:, None]).double().mean(1)
        same = labels.unique(return_counts=True)[1].double()
        chance = float((same * (same - 1)).sum() / (images * (images - 1)))
        return {names[0]: mean_figure(agreement), names[1]: Figure(chance, count=images)}
