"""Measure memory read bandwidth with a few threads, and from it the highest decode speed a weight size allows.

A decode step at batch 1 reads every weight once, so `bandwidth / weight bytes` bounds tokens per second. The buffer is
as large as the weights and is read again and again: what stays in a large last-level cache counts for both.

    python benchmarks/read_bandwidth.py 538 92 87        # megabytes of weights that a step reads
"""

import argparse
import statistics
import threading
import time

import numpy as np

ROUNDS = 7


def read_together(parts: list[np.ndarray], sweeps: int) -> float:
    """Let one thread read each part `sweeps` times and return the seconds from the first start to the last end."""
    barrier = threading.Barrier(len(parts))
    marks: list[float] = []

    def read(part: np.ndarray) -> None:
        barrier.wait()
        marks.append(time.perf_counter())
        for _ in range(sweeps):
            part.max()
        marks.append(time.perf_counter())

    threads = [threading.Thread(target=read, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(marks) - min(marks)


def measure_bandwidth(size: int, threads: int, sweeps: int) -> tuple[float, float]:
    """Return (median, best) bytes per second over a buffer of `size` bytes."""
    parts = np.array_split(np.ones(size // 8, dtype=np.int64), threads)
    read_together(parts, 2)
    rates = [sweeps * size / read_together(parts, sweeps) for _ in range(ROUNDS)]
    return statistics.median(rates), max(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("megabytes", nargs="*", type=float, default=[538.0, 92.0], help="weights read in a step, 1e6")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sweeps", type=int, default=8)
    arguments = parser.parse_args()
    print("| weights MB | median GB/s | best GB/s | tok/s at median | tok/s at best |\n|---:|---:|---:|---:|---:|")
    for megabytes in arguments.megabytes:
        size = int(megabytes * 1e6)
        median, best = measure_bandwidth(size, arguments.threads, arguments.sweeps)
        print(f"| {megabytes:g} | {median / 1e9:.1f} | {best / 1e9:.1f} | {median / size:.0f} | {best / size:.0f} |")


if __name__ == "__main__":
    main()
