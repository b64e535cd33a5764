"""Train the bundled model: python -m tools.train_demo_model --output FOLDER [--seconds 400]

From scratch on synthetic reports, on one GPU (on a CPU it runs, but learns nothing in reasonable time). FOLDER becomes
a transformers model folder with training.json beside it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.cli import Parser, run_main
from pipeline.errors import JobError
from tools.train_demo_model.tokenizer import train_tokenizer
from tools.train_demo_model.train import Settings, parse_stages, train

STAGES = "512:0.12,2048:0.32,8192:0.6,16384:0.85,32768:1"


def main(arguments: Sequence[str]) -> int:
    """Train as the command line asks; the exit code. Raises JobError."""
    parser = Parser(prog="python -m tools.train_demo_model", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seconds", type=float, default=400.0, help="of training, start and compilation apart")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", default=STAGES, help="document length:share of the time at which it ends, ...")
    parser.add_argument("--para", type=float, default=0.3, help="share of facts that open a paragraph of their own")
    parser.add_argument("--tokenizer", type=Path, default=Path("models/tiny-reader"), help="folder to take it from")
    parser.add_argument("--new-tokenizer", action="store_true", help="train one, into --output, instead")
    parser.add_argument("--workers", type=int, default=max(1, min(14, (os.cpu_count() or 2) - 2)))
    options = parser.parse_args(arguments)
    if options.workers < 1:
        raise JobError(f"--workers must be at least 1, got {options.workers}")
    tokenizer = options.tokenizer
    if options.new_tokenizer:
        tokenizer = options.output
        train_tokenizer(tokenizer, options.seed)
    if not (tokenizer / "tokenizer.json").is_file():
        raise JobError(f"--tokenizer {tokenizer}: no tokenizer.json there; give another folder or --new-tokenizer")
    try:
        stages = parse_stages(options.stages)
    except (ValueError, IndexError) as error:
        raise JobError(f"--stages: {error}; expected LENGTH:SHARE,... like {STAGES}") from None
    settings = Settings(
        tokenizer=tokenizer,
        output=options.output,
        seconds=options.seconds,
        seed=options.seed,
        stages=stages,
        paragraphs=options.para,
        workers=options.workers,
        check_lengths=tuple(length for length, _ in stages),
    )
    metrics = train(settings)
    print(f"{metrics['steps']:,} steps, {metrics['tokens'] / 1e6:.0f} M tokens in {options.output}", flush=True)
    sys.stdout.flush()
    os._exit(0)  # the thread that feeds batches may wait for workers that are gone


if __name__ == "__main__":
    run_main(main)
