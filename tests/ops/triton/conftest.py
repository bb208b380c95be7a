"""Settings of kernel tests; the interpreter's run only in processes that have it."""

import os

# Without it cuBLAS is not deterministic, and operator tests ask PyTorch for what is.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
