"""``python -m benchmarks`` is ``python -m benchmarks.head``."""

from benchmarks.head import main

if __name__ == "__main__":
    main()
