"""Metrics for claim 2 (neighbours): how fast decoded images change with the code, and what they change into."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from vae_cli.metrics.base import BATCH, Figure, MeasuredRun, Metric, mean_figure, parts_of_mean, undefined
from vae_cli.metrics.classifiers import nearest
from vae_cli.metrics.derivatives import (
    MAX_DIRECTIONS,
    PIXELS_DIFFERENTIATED,
    frobenius_norm,
    largest_singular_value,
    variance_after_linear_maps,
)
from vae_cli.model.distributions import location
from vae_cli.runs.codes import between

PATH_STEPS = 16
CODE_DRAWS = 5  # per image
CODE_STEP = 0.5  # in units of the aggregate standard deviation
NEIGHBOURS = 10
PIXELS_KEPT = 1 << 24  # pixels in one batch of interpolation paths: 64 MiB

NO_LABELS = "the images have no labels"
ONE_IMAGE = "there is only one test image"

PIXEL_UNIT = "pixel values"  # between 0 and 1


def pairs(subject: MeasuredRun, count: int) -> tuple[Tensor, Tensor] | None:
    """Return random pairs of different test images, as two tensors (count,): the row indices of the first and
    the second image of each pair. The pairs are the same for all runs on a dataset. Returns None if there are fewer
    than two images."""
    images = len(subject.codes().loc)
    if images < 2:
        return None
    generator = torch.Generator().manual_seed(subject.stream("pairs"))
    first = torch.randint(images, (count,), generator=generator)
    second = (first + torch.randint(1, images, (count,), generator=generator)) % images
    return first, second


def in_spread(subject: MeasuredRun, codes: Tensor) -> Tensor:
    """Return codes (N, D) with each dimension divided by its aggregate standard deviation. Dimensions that vary only by
    rounding errors are set to 0."""
    moves = subject.spread > 1e-6 * subject.codes().loc.abs().amax(0)
    return torch.where(moves, codes / torch.where(moves, subject.spread, 1.0), 0.0)


def mean_images(subject: MeasuredRun, z: Tensor) -> Tensor:
    """Return the likelihood's means (B, C, H, W) at codes (B, D), in float32 whatever the network's precision: rounding
    to bfloat16 would hide the small differences between images that are measured here."""
    likelihood = subject.model.likelihood(subject.model.decoder(z))
    return likelihood.mean


class Jacobian(Metric):
    """How fast the mean image changes with the code, at budget.points codes of each of three kinds: locs of test
    images, midpoints between the locs of random pairs, and draws from the prior.

    J = d E[x|z'] / d z' with z' = z / a and a_j the aggregate standard deviation (`MeasuredRun.spread`), so that sigma
    modes whose codes differ in scale can be compared. (Arvanitidis et al., Latent Space Oddity, ICLR 2018, use J^T J as
    a metric for the length of curves.)

    jacobian_frobenius_*  mean of |J|_F, the root of the sum of squared derivatives: exact up to 256 dimensions,
                          estimated beyond (see frobenius_norm)
    jacobian_norm_*       mean of the largest singular value, a lower bound, accurate to about 0.1 % (see
                          largest_singular_value)
    jacobian_ratio        sqrt(E tr(J_z C J_z^T) / tr Cov(g(z))), with J_z = dg / dz at the noisy codes z ~ q(z|x) of
                          test images, g the mean image and C = Cov(z): how fast the image changes with the code,
                          relative to a linear decoder whose images vary as much. It is 1 for a linear decoder, whatever
                          C is, and at least 1 for any decoder if z is normal (Poincare inequality: Chernoff, A note on
                          an inequality involving the normal distribution, 1981). It does not depend on the scale or the
                          rotation of the codes
    jacobian_ratio_means  the same at the locs, without the noise; for a point mass, the two are equal

    The first two grow with the variance of the decoded images: for a linear decoder and uncorrelated codes, the
    Frobenius norm is the root of that variance. Their unit contains the noise of the sigma mode. Both are in pixel
    values per unit of z', where the size of an image change is the root of its sum of squares over
    pixels. Standard errors are over codes.
    """

    claim = "neighbours"
    decodes = (
        *(f"jacobian_{size}_{place}" for size in ("frobenius", "norm") for place in ("codes", "halfway", "prior")),
        *("jacobian_ratio", "jacobian_ratio_means"),
    )

    def compute(self) -> dict[str, Figure]:
        places = self._places()
        reason = self._reason()
        figures: dict[str, Figure] = {}
        for name, z in places.items():
            if reason or z is None:
                both = undefined(reason or ONE_IMAGE), undefined(reason or ONE_IMAGE)
            else:
                both = self._norms(z)
            figures[f"jacobian_frobenius_{name}"], figures[f"jacobian_norm_{name}"] = both
        codes = self.subject.codes()
        for name, z in (("jacobian_ratio", codes.z), ("jacobian_ratio_means", codes.loc)):
            figures[name] = undefined(reason) if reason else self._ratio(z)
        return figures

    def _ratio(self, codes: Tensor) -> Figure:
        """Return the Jacobian's size at the first budget.points of the codes (N, D), relative to a linear decoder whose
        images of these codes vary as much."""
        subject = self.subject
        images = torch.cat([mean_images(subject, part).flatten(1).double() for part in codes.split(BATCH)])
        variance = (images - images.mean(0)).square().sum(1)
        reach = 1e-12 * float(images.square().sum(1).mean())
        if len(codes) < 2 or not float(variance.mean()) > reach:
            return undefined(ONE_IMAGE if len(codes) < 2 else "all codes decode to the same image")
        places = codes[: subject.budget.points]
        at_places, of_codes = variance_after_linear_maps(lambda z: mean_images(subject, z), places, codes)
        ratio = float((at_places.mean() / variance.mean()).sqrt())
        # An image moves three means: the one over Jacobians, and both variances.
        moves = -parts_of_mean(variance) / variance.mean()
        for values in (at_places, of_codes):
            moves[: len(values)] += parts_of_mean(values) / values.mean()
        moves = moves.cpu() * ratio / 2
        return Figure(ratio, "", len(places), float(moves.square().sum().sqrt()), parts=moves)

    def _places(self) -> dict[str, Tensor | None]:
        subject, count = self.subject, self.subject.budget.points
        loc = subject.codes().loc
        chosen = pairs(subject, count)
        halfway = None if chosen is None else (loc[chosen[0]] + loc[chosen[1]]) / 2
        return {"codes": loc[:count], "halfway": halfway, "prior": subject.model.prior().sample((count,))}

    def _reason(self) -> str:
        """Return the reason why the Jacobian is not defined; an empty string if it is."""
        if not (self.subject.spread > 0).any():
            return "the codes of all images are equal, so the aggregate standard deviation is 0"
        with torch.enable_grad():
            mean = mean_images(self.subject, self.subject.codes().loc[:1].clone().requires_grad_())
        return "" if mean.requires_grad else "the likelihood's mean has no gradient"

    def _norms(self, z: Tensor) -> tuple[Figure, Figure]:
        frobenius, largest, converged = [], [], []

        def function(codes: Tensor) -> Tensor:
            return mean_images(self.subject, codes)

        for part in z.split(max(1, PIXELS_DIFFERENTIATED // math.prod(self.subject.run.shape))):
            frobenius.append(frobenius_norm(function, part, self.subject.spread))
            value, done = largest_singular_value(function, part, self.subject.spread)
            largest.append(value)
            converged.append(done)
        estimated = f"estimated in {MAX_DIRECTIONS} random directions" if z.shape[1] > MAX_DIRECTIONS else ""
        left = int((~torch.cat(converged)).sum())
        late = f"the power iteration did not converge at {left} of {len(z)} codes" if left else ""
        return mean_figure(torch.cat(frobenius), PIXEL_UNIT, estimated), mean_figure(
            torch.cat(largest), PIXEL_UNIT, late
        )


class Interpolation(Metric):
    """How the mean image changes along the straight line between two codes: images x_0 ... x_16 at 17 points from one
    loc to the other, for budget.pairs random pairs of test images.

    path_length_over_chord               sum_i |x_i - x_(i-1)| / |x_16 - x_0|: at least 1, and 1 for a straight path
    largest_step_over_mean               max_i |x_i - x_(i-1)| / mean_i |x_i - x_(i-1)|: 1 if all steps are equal, 16
                                         if there is a single jump
    midpoint_distance_to_training        root mean squared difference, over pixels, between x_8 and the nearest
                                         training image
    reconstruction_distance_to_training  the same for x_0 and x_16, the reconstructions: the baseline for the midpoints

    All are means over pairs (the last one also over the two ends of each pair) with standard errors. Pairs whose ends
    decode to the same image, up to rounding, have no chord and are excluded from the first two. Training images are
    used before any binarization. At most budget.train_images of them are searched; with fewer, distances are larger.
    """

    claim = "neighbours"
    decodes = (
        *("path_length_over_chord", "largest_step_over_mean"),
        *("midpoint_distance_to_training", "reconstruction_distance_to_training"),
    )

    def compute(self) -> dict[str, Figure]:
        names = "path_length_over_chord", "largest_step_over_mean"
        distances = "midpoint_distance_to_training", "reconstruction_distance_to_training"
        chosen = pairs(self.subject, self.subject.budget.pairs)
        if chosen is None:
            return {name: undefined(ONE_IMAGE) for name in (*names, *distances)}
        loc, pixels = self.subject.codes().loc, math.prod(self.subject.run.shape)
        ratios, midpoint_distance, end_distance = [], [], []
        rows = max(1, PIXELS_KEPT // ((PATH_STEPS + 1) * pixels))
        for first, second in zip(chosen[0].split(rows), chosen[1].split(rows), strict=True):
            path = self._decode(between(loc[first], loc[second], PATH_STEPS + 1, "linear"))
            ratios.append(step_ratios(path))
            midpoint, *ends = self._nearest(path[[PATH_STEPS // 2, 0, PATH_STEPS]].flatten(0, 1)).chunk(3)
            midpoint_distance.append(midpoint)
            end_distance += ends
        length, largest = torch.cat(ratios, 1)
        has_chord = length.isfinite()
        if has_chord.any():
            note = "" if has_chord.all() else f"excluding {int((~has_chord).sum())} pairs that decode to the same image"
            figures = [mean_figure(length[has_chord], note=note), mean_figure(largest[has_chord], note=note)]
        else:
            figures = [undefined("all codes decode to the same image")] * 2
        return dict(zip(names, figures, strict=True)) | {
            distances[0]: mean_figure(torch.cat(midpoint_distance), PIXEL_UNIT),
            distances[1]: mean_figure(torch.cat(end_distance), PIXEL_UNIT),
        }

    def _decode(self, z: Tensor) -> Tensor:
        """Return the mean images (T, P, pixels) of codes (T, P, D)."""
        images = [mean_images(self.subject, part).flatten(1) for part in z.flatten(0, 1).split(BATCH)]
        return torch.cat(images).unflatten(0, z.shape[:2])

    def _nearest(self, images: Tensor) -> Tensor:
        """Return the root mean squared difference of each image (M, pixels) from its nearest training image, (M,)."""
        best = torch.full((len(images),), math.inf, device=images.device)
        for training in self._training_images():
            candidate = training[torch.cdist(images, training).argmin(1)]
            # cdist uses a matrix product: exact enough to find the nearest image, too coarse for the distance itself.
            best = torch.minimum(best, (candidate - images).square().mean(1))
        return best.sqrt()

    def _training_images(self) -> Iterator[Tensor]:
        train = self.subject.splits.train
        for positions in self.subject.positions("train").split(BATCH):
            yield train.batch(positions).to(self.subject.device).flatten(1)


def step_ratios(path: Tensor) -> Tensor:
    """Return two ratios for each of P paths (T, P, pixels), float64 (2, P): length / chord and largest step / mean
    step. They are NaN if the ends of the path differ only by rounding."""
    steps = torch.stack([(b - a).double().norm(dim=1) for a, b in pairwise(path)])
    chord = (path[-1] - path[0]).double().norm(dim=1)
    # float32 has a relative rounding error of 6e-8.
    has_chord = chord > 1e-5 * torch.maximum(path[0].norm(dim=1), path[-1].norm(dim=1))
    ratios = torch.stack([steps.sum(0) / chord, steps.amax(0) / steps.mean(0)])
    return torch.where(has_chord, ratios, math.nan)


class ClassChange(Metric):
    """How often codes near an image's code decode to a different class, according to the feature net (`features.py`).

    class_change_by_noise    share of draws z ~ q(z|x) whose mean image is classified differently from that of loc
    class_change_from_label  share of these draws whose class differs from the image's label; as a baseline, the note
                             gives the same share for reconstructions from loc. Both include the net's mistakes
    class_change_by_step     share of codes z = loc + a epsilon / 2 whose class differs from that of loc, with
                             epsilon ~ N(0, I) and a the aggregate standard deviation: the same step for every sigma
                             mode, including a point mass

    Each share is estimated from 5 draws for each of budget.pictures / 5 test images; it is unbiased, with a standard
    error over images. The first two are not defined for a point mass. Without labels, none of the three is defined.
    """

    claim = "neighbours"
    decodes = ("class_change_by_noise", "class_change_from_label", "class_change_by_step")

    def compute(self) -> dict[str, Figure]:
        from vae_cli.metrics.features import feature_net

        subject = self.subject
        names = "class_change_by_noise", "class_change_from_label", "class_change_by_step"
        net, labels = feature_net(subject), subject.codes().labels
        if net is None or labels is None:
            return {name: undefined("the images have no labels, or they all have the same label") for name in names}
        found: dict[str, list[Tensor]] = {name: [] for name in (*names, "floor")}
        for x, rows in subject.batches("test", max(1, subject.budget.pictures // CODE_DRAWS)):
            posterior, own = subject.model.encode(x), labels[rows]
            loc = location(posterior)
            reconstructed = net.classes(subject.decode(loc).clamp(0, 1))
            steps = [loc + CODE_STEP * subject.spread * torch.randn_like(loc) for _ in range(CODE_DRAWS)]
            stepped = torch.stack([net.classes(subject.decode(z).clamp(0, 1)) for z in steps])
            found["class_change_by_step"].append(share(stepped != reconstructed))
            found["floor"].append((reconstructed != own).double())
            if subject.has_noise:
                drawn = [net.classes(subject.decode(posterior.rsample()).clamp(0, 1)) for _ in range(CODE_DRAWS)]
                found["class_change_by_noise"].append(share(torch.stack(drawn) != reconstructed))
                found["class_change_from_label"].append(share(torch.stack(drawn) != own))
        floor = float(torch.cat(found.pop("floor")).mean())
        note = f"{floor:.1%} for codes without noise; the feature net's accuracy is {net.accuracy:.1%}"
        return {
            name: mean_figure(torch.cat(values), note=note if name == "class_change_from_label" else "")
            if values
            else undefined("all draws for an image are the same, since there is no noise")
            for name, values in found.items()
        }


def share(hits: Tensor) -> Tensor:
    """Return the share of draws that are hits, for each image, float64 (B,); `hits` is bool (draws, B)."""
    return hits.double().mean(0)


class NeighbourLabels(Metric):
    """Whether neighboring codes belong to the same class.

    neighbour_label_agreement  share of the 10 nearest other test images (by Euclidean distance of loc in units of the
                               aggregate standard deviation) that have the image's label, averaged over test images
    neighbour_label_chance     the exact expected value for random other images: sum_c n_c (n_c - 1) / (N (N - 1))

    Not defined without labels. The standard error over images is slightly too small, since images share neighbors.
    """

    claim = "neighbours"

    def compute(self) -> dict[str, Figure]:
        names = "neighbour_label_agreement", "neighbour_label_chance"
        codes = self.subject.codes()
        images = len(codes.loc)
        if codes.labels is None or images < 2:
            reason = NO_LABELS if codes.labels is None else ONE_IMAGE
            return {name: undefined(reason) for name in names}
        labels = codes.labels
        _, near = nearest(in_spread(self.subject, codes.loc), min(NEIGHBOURS, images - 1))
        agreement = (labels[near] == labels[:, None]).double().mean(1)
        same = labels.unique(return_counts=True)[1].double()
        chance = float((same * (same - 1)).sum() / (images * (images - 1)))
        return {names[0]: mean_figure(agreement), names[1]: Figure(chance, count=images)}
