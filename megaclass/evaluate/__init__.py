"""Judging embeddings of classes that were never trained on.

How the pieces follow each other: `embed` turns a split into unit-length embeddings over all ranks (`folder` does the
same for a folder of images), `verification`, `identification`, `retrieval` and `one_shot` are one protocol each, and
`judge` runs those asked for and makes the table for people. `baselines` gives the same treatment to raw pixels and to
the untrained backbone. `metrics` holds what can be said of scores alone; `similarity`, `draws` and `class_order` are
what the protocols share.

Every protocol is a pure function of its arrays: what it draws depends on the labels and sources, never on the
embeddings, the rank or the machine, so that two backbones are judged on the same pairs and trials.
"""
