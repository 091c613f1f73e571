"""Damage the files that every reader reads, at random, and count what happens.

    python -m benchmarks.mutations [--count 20000] [--seed 0] [--readers model lora]

Run it from the root of the repository. Each mutation changes one or two files of a
directory: cut, flipped, swapped or deleted; values of another type, size or meaning. A
reader must refuse it with one clear error or read something else. Counted are
tracebacks, more than 5 seconds, more than 1 GiB, and silent acceptance: what is wrong
is accepted, or what means something else is read as the original. Any of these makes
the exit status 1.
"""

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

from tests.mutations import FAULTS, fingerprint, try_one
from tests.readers import READERS

KINDS = ("refused", "read", *FAULTS)


def main() -> None:
    """Run the mutations and print the table."""
    parser = argparse.ArgumentParser(description="Damage files at random.")
    parser.add_argument("--count", type=int, default=20000, help="over all readers")
    parser.add_argument("--seed", type=int, default=0)
    names = [reader.name for reader in READERS]
    parser.add_argument("--readers", nargs="+", choices=names, default=names)
    parser.add_argument("--show", type=int, default=5, help="faults of each kind")
    options = parser.parse_args()
    chosen = [reader for reader in READERS if reader.name in options.readers]
    print("| reader | " + " | ".join(KINDS) + " | ms each |")
    print("|---" * (len(KINDS) + 2) + "|")
    total, faults = Counter[str](), []
    for reader in chosen:
        count = -(-options.count // len(chosen))
        counts = Counter[str]()
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            original, folder = Path(scratch, "original"), Path(scratch, "mutated")
            original.mkdir()
            reader.make(original)
            expected = fingerprint(reader.read(original))
            for number in range(count):
                rng = Random(f"{options.seed} {reader.name} {number}")
                what, verdict = try_one(reader, original, folder, expected, rng)
                counts[verdict.kind] += 1
                if verdict.kind in FAULTS:
                    faults.append((reader.name, number, verdict, what))
        milliseconds = 1000 * (time.perf_counter() - start) / count
        cells = [str(counts[kind]) for kind in KINDS]
        print(
            f"| {reader.name} | {' | '.join(cells)} | {milliseconds:.0f} |", flush=True
        )
        total += counts
    print("| all | " + " | ".join(str(total[kind]) for kind in KINDS) + " | |")
    for kind in FAULTS:
        for name, number, verdict, what in [
            fault for fault in faults if fault[2].kind == kind
        ][: options.show]:
            print(f"{kind}: {name} {number}: {what}\n    {verdict.detail}")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
