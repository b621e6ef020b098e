from benchmarks.cli import main
from sglang_auf.process import end_on_sigterm

if __name__ == "__main__":
    end_on_sigterm()  # servers that were started here are ended
    raise SystemExit(main())
