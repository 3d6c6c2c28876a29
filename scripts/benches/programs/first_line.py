import sys
import time

print(time.time(), sys.executable)
