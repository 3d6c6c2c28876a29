"""count.py FOLDER [CODE]: says that it runs, prints a numbered line every 20 ms until FOLDER/go is there, exits with CODE."""

import itertools
import os
import sys
import time
from pathlib import Path

folder, code = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
with (folder / f"started-{os.environ['MESHQ_FENCE']}").open("x") as mark:
    mark.write(os.environ["MESHQ_PEER"])
for number in itertools.count():
    print(f"{os.environ['MESHQ_ATTEMPT']}: {number}", flush=True)
    if (folder / "go").exists():
        break
    time.sleep(0.02)
print("the end", flush=True)
sys.exit(code)
