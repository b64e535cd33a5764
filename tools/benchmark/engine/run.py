"""What a benchmark of the engine found so far, phase by phase, and the file that holds it."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from jobs.measurement import stamp
from pipeline.engine import EngineConfig
from stem_core.errors import first_line
from tools.benchmark.engine.report import ratios


class Run:
    """The results so far, and the file that holds them."""

    def __init__(self, arguments: argparse.Namespace, config: EngineConfig) -> None:
        self.arguments = arguments
        self.folder = Path(arguments.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.begin = time.perf_counter()
        self.results: dict[str, Any] = {
            "shape": arguments.shape,
            "stamp": stamp(config.torch_device(), arguments.commit),
            "arguments": vars(arguments) | {},
            "engine": {},
            "vllm": {},
            "skipped": [],
            "failed": [],
        }

    def phase(self, name: str, what: Callable[[], None]) -> None:
        """Run a phase if it was asked for and time is left; write what there is. What it raises is noted."""
        kind = name.split(":")[0]
        if kind not in self.arguments.phases:
            return
        elapsed = time.perf_counter() - self.begin
        if elapsed > self.arguments.limit_seconds:
            self.results["skipped"].append(f"{name}: {elapsed:.0f} s had passed")
        else:
            print(f"[{elapsed:6.1f} s] {name}", flush=True)
            try:
                what()
            except torch.OutOfMemoryError as error:
                self.results["skipped"].append(f"{name}: {first_line(error)}")
            except Exception as error:  # the other phases' figures must not be lost with this one's
                self.results["failed"].append(f"{name}: {type(error).__name__}: {error}")
                print(f"{name} FAILED: {type(error).__name__}: {error}", flush=True)
        self.write()

    def write(self) -> None:
        """engine.json, whole or not at all."""
        self.results["seconds"] = time.perf_counter() - self.begin
        self.results["ratios"] = ratios(self.results)
        temporary = self.folder / "engine.json.tmp"
        temporary.write_text(json.dumps(self.results, indent=1))
        temporary.replace(self.folder / "engine.json")
