"""pulse.py FOLDER SECONDS: lives for so long and writes down when, into FOLDER/<fence>, in seconds of CLOCK_BOOTTIME.

Its lines: "began AT PEER TASK" first; "AT" ten times a second; "ended AT" last. A second start under the same fence shows as a
second "began". Each line is one write, so what is there is true however the process dies.
"""

import os
import sys
import time

PULSE_SECONDS = 0.1


def now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def main() -> None:
    folder, seconds = sys.argv[1], float(sys.argv[2])
    mark = os.open(os.path.join(folder, os.environ["MESHQ_FENCE"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    began = now()
    os.write(mark, f"began {began:.6f} {os.environ['MESHQ_PEER']} {os.environ['MESHQ_TASK_ID']}\n".encode())
    while now() < began + seconds:
        time.sleep(PULSE_SECONDS)
        os.write(mark, f"{now():.6f}\n".encode())
    os.write(mark, f"ended {now():.6f}\n".encode())


main()
