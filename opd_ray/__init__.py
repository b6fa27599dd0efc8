"""opd_ray: on-policy distillation on Ray, with the blockwise policy-drift gate (arXiv 2606.24084)."""

__version__ = "0.3.0"
