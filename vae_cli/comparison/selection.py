"""Which figures the table on the terminal and the report show, beyond what the register of figures can say."""

from __future__ import annotations

from vae_cli.config.claims import ClaimName, entry

# The table on the terminal, most telling first: it shows as many as fit.
TERMINAL = (
    "rate",
    "distortion",
    "elbo",
    "elbo_gaussian_prior",
    "noise_probe_tolerance",
    "scale_mean",
    "jacobian_frobenius_halfway",
    "frechet_prior",
    "frechet_mixture",
)
# Figures that a claim's section shows in its table, beyond the claim's headline figures. "iw_bound_k" stands for the
# importance-weighted bound of the largest K that a run has.
BESIDE_HEADLINES: dict[ClaimName, tuple[str, ...]] = {
    "bits": ("rate_bits",),
    "neighbours": ("jacobian_frobenius_codes", "jacobian_frobenius_prior"),
    "shortcuts": ("linear_probe_loc", "nearest_neighbour_z"),
    "scale": ("rate_scale",),
    "price": ("elbo_mixture_prior", "iw_bound_k"),
}
# The table over the weights of the regularizer.
OVER_WEIGHTS = ("rate", "distortion", "elbo", "elbo_gaussian_prior", "scale_mean", "active_units")
# Where the decoded codes come from, as the names of figures end.
SOURCES = ("prior", "aggregate", "mixture", "reconstructions", "midpoints")


def source_title(source: str) -> str:
    """Return what the register calls a source of codes: 'fitted mixture' for 'mixture'."""
    return entry(f"precision_{source}").title.partition(", ")[2] or source
