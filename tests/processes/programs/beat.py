"""`beat.py FOLDER`: append the time to a file named after its fence and peer, twenty times a second, and heed no SIGTERM."""

import os
import signal
import sys
import time
from pathlib import Path

signal.signal(signal.SIGTERM, signal.SIG_IGN)
name = f"{os.environ['MESHQ_FENCE']}@{os.environ['MESHQ_PEER']}"
with (Path(sys.argv[1]) / name).open("a", buffering=1) as file:
    while True:
        print(time.clock_gettime(time.CLOCK_BOOTTIME), file=file)
        time.sleep(0.05)
