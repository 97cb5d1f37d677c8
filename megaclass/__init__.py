"""megaclass: trains classifiers with millions of classes whose weight matrix is sharded over ranks.

Importing the package is cheap on purpose: nothing heavy (torch, the readers) is loaded until a submodule that needs it
is imported, so that a mistake in a configuration is reported in well under two seconds.
"""

__version__ = "0.1.0"
