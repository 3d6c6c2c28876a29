"""Fails in its first attempt, succeeds in the second."""

import os
import sys

attempt = os.environ["MESHQ_ATTEMPT"]
print(f"attempt {attempt}")
sys.exit(3 if attempt == "1" else 0)
