"""`python -m jobs.benchmark WHAT ...`: one subcommand for each benchmark; WHAT --help lists its flags."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from jobs.cli import Parser, run_main
from pipeline.errors import JobError, nearest

# Subcommand -> module with add_arguments(parser), and the function that takes the parsed arguments and returns the
# exit code. Imported when asked for: a benchmark may need what another one does not.
BENCHMARKS = {
    "attention": ("jobs.benchmark.attention", "run"),
    "engine": ("jobs.benchmark.engine", "main"),
    "selection": ("jobs.benchmark.selection", "run"),
    "elementwise": ("jobs.benchmark.elementwise", "main"),
    "overhead": ("jobs.benchmark.overhead", "main"),
}


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark that the first argument names; its exit code. Raises JobError for a name that is not there."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: python -m jobs.benchmark {{{','.join(BENCHMARKS)}}} ...\n\n{__doc__}")
        return 0
    name, *rest = arguments
    if name not in BENCHMARKS:
        known = f"; there are {', '.join(BENCHMARKS)}"
        raise JobError(f"no benchmark is called {name!r}{nearest(name, BENCHMARKS) or known}")
    path, function = BENCHMARKS[name]
    module = importlib.import_module(path)
    parser = Parser(
        prog=f"python -m jobs.benchmark {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return int(getattr(module, function)(parser.parse_args(rest)))


if __name__ == "__main__":
    run_main(main)
