"""Keeps the tests that need Triton's interpreter out of processes that have Triton without it."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
