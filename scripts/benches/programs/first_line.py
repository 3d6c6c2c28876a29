import sys
import time

print(time.monotonic_ns(), sys.executable)
