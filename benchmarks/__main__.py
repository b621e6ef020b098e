import signal
import sys

from benchmarks.cli import main

if __name__ == "__main__":
    # After SIGTERM every `finally` runs, so that servers started here are ended.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    raise SystemExit(main())
