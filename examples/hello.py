"""The smallest task: says where it runs and leaves a file behind.

meshq submit examples/hello.py --wait
"""

import os
import platform
from pathlib import Path

outputs = Path(os.environ.get("MESHQ_OUTPUT_DIR", "outputs"))
outputs.mkdir(parents=True, exist_ok=True)

greeting = f"Hello from {os.environ.get('MESHQ_PEER', 'here')}: Python {platform.python_version()} on {platform.machine()}"
print(greeting, flush=True)
(outputs / "hello.txt").write_text(greeting + "\n")
