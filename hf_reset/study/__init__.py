"""What the recipes share, so that their scripts stay lessons. In reading order:

* `options`: options from YAML and the command line, and what a recipe is as a command;
* `splits` and `columns`: raw rows, from files or by name, and the columns they are read by;
* `classification` and `instructions`: rows as a study of wrong labels or responses needs them;
* `models`: models and tokenizers by name, and their adapters;
* `arms`: the ways of training that are set beside one another;
* `runs`: the loop over arms and seeds, and training, watching and saving one run;
* `comparison` and `tail`: many methods on many data sets, and the upper layers of an encoder that they train;
* `cells`: a study in one file, which goes on where it was stopped;
* `small` and `passages`: small models on synthetic rows, to study the method, and first-passage times beside theory;
* `find_errors`: the wrong labels in a file, from one run on it.
"""
