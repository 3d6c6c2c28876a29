"""hold.py FOLDER [CODE]: says that it runs, waits for FOLDER/go, leaves a result and exits with CODE.

FOLDER/started-<fence> is made with "x": a claim that starts twice fails here (promise P2).
"""

import os
import sys
import time
from pathlib import Path

folder, code = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
fence = os.environ["MESHQ_FENCE"]
with (folder / f"started-{fence}").open("x") as mark:
    mark.write(os.environ["MESHQ_PEER"])
print(f"holding on {os.environ['MESHQ_PEER']}", flush=True)
while not (folder / "go").exists():
    time.sleep(0.05)
(Path(os.environ["MESHQ_OUTPUT_DIR"]) / "result.txt").write_text(fence)
print("released", flush=True)
sys.exit(code)
