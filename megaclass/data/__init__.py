"""Reading data sets: the manifest, the order of samples, the readers and the augmentation.

Everything here is about one data set on disk and one sequence of batches; nothing knows about classifiers, losses or
training. A data set is a folder with a `dataset.json` (see `manifest.py`) and tar shards; it is made by
`megaclass.prepare` (`megaclass data ...`).
"""
