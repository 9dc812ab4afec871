"""What the recipes share, so that their scripts stay lessons. In reading order:

* `runs`: options, files of data, and the loop over arms and seeds;
* `classification` and `instructions`: rows as a study of wrong labels or responses needs them.
"""
