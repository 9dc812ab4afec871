"""What a recipe hands back: ``results.json``, a Markdown report, a figure. Shared by all recipes.

* :mod:`hf_reset.report.results`: the results file, the environment record, peak memory;
* :mod:`hf_reset.report.tables`: tables of mean ± standard deviation, and the report around them;
* :mod:`hf_reset.report.plots`: the figure (matplotlib is imported only when one is drawn);
* :mod:`hf_reset.report.plan`: what `hf-reset plan` prints and draws.
"""
