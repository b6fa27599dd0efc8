"""Reports of a finished run: the table at its end, and plots of its metrics."""

from opd_ray.report.table import gap_closed, results_table

__all__ = ["gap_closed", "results_table"]
