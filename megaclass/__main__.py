"""`python -m megaclass`: the same as the `megaclass` console script."""

import sys

from megaclass.cli import main

sys.exit(main())
