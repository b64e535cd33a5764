"""Measure kernels, engine and pipeline: python -m tools.benchmark WHAT"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from jobs.cli import Parser, run_main
from pipeline.errors import JobError, nearest

# Subcommand -> module with add_arguments(parser), and the function that takes the parsed arguments and returns the
# exit code. Imported when asked for: a benchmark may need what another one does not.
BENCHMARKS = {
    "attention": ("tools.benchmark.attention", "run"),
    "accumulation": ("tools.benchmark.accumulation", "run"),
    "engine": ("tools.benchmark.engine", "main"),
    "selection": ("tools.benchmark.selection", "run"),
    "elementwise": ("tools.benchmark.elementwise", "main"),
    "overhead": ("tools.benchmark.overhead", "main"),
    "scaling": ("tools.benchmark.scaling", "main"),
    "schema": ("tools.benchmark.schema", "main"),
    "lookup": ("tools.benchmark.lookup", "main"),
}
ABOUT = {
    "attention": "one attention layer: dense baselines, FlexAttention, our kernels; from which length Stem is faster",
    "accumulation": "what sums of fp8 products lose: linears, scores, decode attention; the logits of a model",
    "engine": "first token, decode, memory and a job of documents, beside Hugging Face generate",
    "selection": "choosing the blocks, and decode attention",
    "elementwise": "norms, activations, rotary embeddings, quantisation",
    "overhead": "what the pipeline adds to the engine, for each document",
    "scaling": "documents an hour of the whole pipeline by the number of GPUs of one machine",
    "schema": "answers by a schema: whether all are valid, and what a decode step costs more",
    "lookup": "prompt lookup on a real model: seconds of decoding saved, and outputs that part",
}


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark that the first argument names; its exit code. Raises JobError for a name that is not there."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m tools.benchmark WHAT [flags]; WHAT --help lists its flags\n")
        print("\n".join(f"  {name:12} {about}" for name, about in ABOUT.items()))
        return 0
    name, *rest = arguments
    if name not in BENCHMARKS:
        known = f"; there are {', '.join(BENCHMARKS)}"
        raise JobError(f"no benchmark is called {name!r}{nearest(name, BENCHMARKS) or known}")
    path, function = BENCHMARKS[name]
    module = importlib.import_module(path)
    parser = Parser(
        prog=f"python -m tools.benchmark {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return int(getattr(module, function)(parser.parse_args(rest)))


if __name__ == "__main__":
    run_main(main)
