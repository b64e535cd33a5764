"""Stemline as a stage of a Ray Data pipeline: python examples/ray_data.py [OUTPUT]"""

import os
import sys
from pathlib import Path
from tempfile import mkdtemp

import pyarrow.parquet as pq
import ray

from pipeline import StemlineStage

ROOT = Path(__file__).parents[1]
OUTPUT = Path(sys.argv[1] if len(sys.argv) > 1 else mkdtemp(prefix="ray-data-")).absolute()


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # for Ray's workers
    ray.init(address=os.environ.get("RAY_ADDRESS", "local"), log_to_driver=False)
    text = (ROOT / "examples/documents/newton-opticks-planted.txt").read_text(encoding="utf-8")
    dataset = ray.data.from_items(
        [
            {"id": "opticks", "text": text, "year": 1730},
            {"id": "blank", "text": " " * 200, "year": 2025},  # comes out as a row that says so
        ]
    )
    rows = dataset.map_batches(
        StemlineStage,
        fn_constructor_kwargs={
            "model": str(ROOT / "models/tiny-reader"),
            "question": "List the key findings in order.",
            "keep_columns": ["year"],
            "columns": ["document_id", "status", "error", "output", "density"],
            # Settings of the job, as in examples/demo.yaml.
            "preset": "sampled", "budget": 0.3, "block_size": 16, "dense_layers": 0,
        },
        batch_size=8,  # documents that are in the engine together
        compute=ray.data.ActorPoolStrategy(size=1),  # actors, each with a model; on GPUs with num_gpus=1
    )  # fmt: skip
    rows.write_parquet(str(OUTPUT))

    for row in pq.read_table(OUTPUT).to_pylist():
        print(f"{row['document_id']} ({row['year']}): {row['status']} {row['error']}\n{row['output'] or ''}\n")
