"""The figures shown in the terminal table and the report, in addition to the headline figures of the register."""

from __future__ import annotations

from vae_cli.config.claims import ClaimName, entry

# The columns of the terminal table, the most important first; the terminal shows as many as fit.
TERMINAL = (
    "rate",
    "distortion",
    "elbo",
    "frechet_flow",
    "frechet_vae",
    "elbo_gaussian_prior",
    "noise_probe_tolerance",
    "scale_mean",
    "jacobian_frobenius_halfway",
    "frechet_prior",
    "frechet_mixture",
    "mig",
)
# Figures in the table of a claim's section, in addition to the claim's headline figures. "iw_bound_k" stands for the
# importance-weighted bound with the largest K that any run has.
BESIDE_HEADLINES: dict[ClaimName, tuple[str, ...]] = {
    "bits": ("rate_bits",),
    "neighbours": ("jacobian_frobenius_codes", "jacobian_frobenius_prior"),
    "shortcuts": ("linear_probe_loc", "nearest_neighbour_z"),
    "scale": ("rate_scale",),
    "price": ("elbo_mixture_prior", "iw_bound_k"),
}
# The columns of the table that compares weights of the regularizer; those that no run has are left out.
OVER_WEIGHTS = (
    *("rate", "distortion", "elbo", "elbo_gaussian_prior", "scale_mean", "active_units"),
    *("mig", "dci_disentanglement"),
)
# The sources of decoded codes, as in the name frechet_prior.
SOURCES = ("prior", "aggregate", "mixture", "reconstructions", "midpoints")


def source_title(source: str) -> str:
    """Return the display name of a source of codes, such as 'fitted mixture' for 'mixture'."""
    return entry(f"precision_{source}").title.partition(", ")[2] or source
