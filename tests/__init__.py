"""The tests. Without a GPU, Triton's kernels are run by its interpreter, which must be chosen before it is imported."""

import os
import shutil

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
