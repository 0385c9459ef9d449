"""The report of a run: one page that stands alone."""

from deepseek_jax.train.report.page import write_report as write_report
