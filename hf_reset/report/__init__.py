"""What a recipe hands back: `results.json`, a Markdown report, a figure. In reading order:

* `results`: the results file, the one source of all the others;
* `environment`: where a run took place, and its peak memory;
* `tables`: tables of mean ± standard deviation, and the report around them;
* `plots`: the figure (matplotlib is imported only when one is drawn);
* `reading`: how the arms compare, and whether validation could choose, in words;
* `classification` and `instructions`: the report of each recipe, with its columns and curves;
* `model_card`: the card of a saved model;
* `paper`: figures and tables of the studies of the paper's experiments;
* `suspects`: the report of `hf-reset find-errors`;
* `plan`: what `hf-reset plan` prints and draws.
"""
