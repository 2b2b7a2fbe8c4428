"""Time and memory of one program over catalogues of different sizes.

    python bench/catalogue.py BUNDLE [--documents 1000 10000 100000] [--length 32] [--repeats 15]

Each size has a process of its own, which loads the program, trains and searches, with eight
queries of half to all of LENGTH tokens. Memory is the process's anonymous memory (smaps) after
training or after searching, whichever is more, less what it was when the runtime was imported;
program, documents and theta are in it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

from carpool.bundle import Bundle
from carpool.measuring import anonymous_bytes, median_seconds
from carpool_device.batches import Batch
from carpool_device.runtime import DeviceProgram
from carpool_device.tokenizer import QueryTokenizer


def measure(path: Path, documents: int, *, length: int, repeats: int) -> str:
    """A row of the table."""
    generator = np.random.default_rng(0)
    import executorch.runtime  # noqa: F401, PLC0415  before the first look at memory

    before = anonymous_bytes()
    bundle = Bundle.open(path)
    program = DeviceProgram.load(bundle)
    manifest = bundle.manifest
    frozen = bundle.corpus()
    rows = generator.standard_normal((documents, manifest.model.hidden_size), dtype=np.float32)
    frozen["documents"] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    del rows
    more = documents - manifest.documents.count
    values = manifest.layout.num_values + more * manifest.program.values_per_document
    theta = 0.05 * generator.standard_normal(values, dtype=np.float32)
    lengths = generator.integers(length // 2, length + 1, size=8)
    lengths[0] = length
    tokenizer: QueryTokenizer = program.tokenizer
    tokens = tokenizer.pack([generator.integers(1000, 20000, size=n) for n in lengths])
    batch = Batch(
        tokens=tokens,
        labels=generator.integers(0, documents, size=8),
        example_weights=np.full(8, 1 / 8, dtype=np.float32),
    )
    step = median_seconds(
        lambda: program.gradients(theta, batch, l2_clip_norm=1.0, frozen=frozen), repeats=repeats
    )
    trained = anonymous_bytes()
    search = median_seconds(lambda: program.scores(theta, tokens, frozen=frozen), repeats=repeats)
    memory = (max(trained, anonymous_bytes()) - before) / 2**20
    return f"| {documents:,} | {1000 * step:.0f} | {1000 * search:.0f} | {memory:.0f} |"


def main() -> None:
    """Prints the table, or one row of it in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--documents", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        documents = options.documents[0]
        row = measure(options.bundle, documents, length=options.length, repeats=options.repeats)
        print(row)
        return
    print("| documents | training step, ms | search of 8 queries, ms | anonymous memory, MiB |")
    print("|---:|---:|---:|---:|")
    for documents in options.documents:
        command = [sys.executable, __file__, str(options.bundle), "--one"]
        for name, value in (
            ("--documents", documents),
            ("--length", options.length),
            ("--repeats", options.repeats),
        ):
            command += [name, str(value)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603  this file
        print(done.stdout.strip(), flush=True)


if __name__ == "__main__":
    main()
