"""The flags of jobs.evaluate, and what is chosen where they leave it open."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from jobs.cli import Parser
from jobs.evaluate.arms import ARMS, ENGINE_ARMS, block_size_for
from jobs.evaluate.haystacks import KINDS, TASKS
from jobs.evaluate.results import BY_EXACTNESS
from kernels.block_sparse_attention_fp8 import BLOCK_SIZES as FP8_BLOCK_SIZES
from pipeline.errors import JobError, nearest
from stem_core.config import BLOCK_SIZES

CPU_ARMS = ("dense", "stem", "sampled", "window")
ENGINE_DEFAULT_ARMS = ("dense", "stem", "sampled")
GPU_ARMS = ARMS
ARMS_HELP = (
    f"all, or of {', '.join(ARMS)}, also as name:field=value,...; ideas beyond Stem go behind the name: +mean lets "
    "dropped blocks in as their means, +adaptive and +threshold let heads and rows share a budget, +heads the heads of "
    "a row (of sample, sampled, oracle)"
)
ENGINE_HELP = (
    f"answer with the product's engine, in each of {', '.join(BY_EXACTNESS)} that is named, and compare them; without "
    "KL, mass and needle blocks"
)


@dataclass(frozen=True)
class Options:
    """A comparison as it will run; see --help for the meaning of each field."""

    model: str
    tokenizer: str
    revision: str | None
    load_format: str
    device: torch.device
    precision: str
    engine: tuple[str, ...]
    lengths: tuple[int, ...]
    tasks: tuple[str, ...]
    arms: tuple[str, ...]
    densities: tuple[float, ...]
    dense_tails: tuple[int, ...]
    dense_layers: int
    block_sizes: tuple[int, ...]
    documents: int
    questions: int
    probed: int
    seed: int
    style: str
    essay: str
    chunk_tokens: int
    cache_gib: float | None
    time_limit: float
    plots: bool | None
    output: Path

    def block_sizes_for(self, length: int) -> tuple[int, ...]:
        """--block-sizes, or the one that cuts `length` into enough blocks."""
        smallest = min(FP8_BLOCK_SIZES) if "fp8" in self.engine else 0
        return self.block_sizes or (max(smallest, block_size_for(length)),)

    @property
    def kinds(self) -> list[str]:
        """Kinds of documents that the tasks need, in the order of the tasks."""
        wanted = [kind for task in self.tasks for kind in KINDS if task in KINDS[kind].tasks]
        return list(dict.fromkeys(wanted))


def parser(description: str) -> argparse.ArgumentParser:
    flags = Parser(prog="python -m jobs.evaluate", description=description, allow_abbrev=False)
    add = flags.add_argument
    add("--model", metavar="PATH_OR_ID", help="model folder or hub id")
    add("--tokenizer", metavar="PATH_OR_ID", help="where it is not the model's own")
    add("--revision", help="of the model on the hub")
    add("--load-format", choices=("auto", "dummy"), default="auto", help="dummy: random weights from config.json alone")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--precision", default="auto", choices=("auto", "bf16", "fp16", "fp32"), help="of weights and attention")
    add("--engine", nargs="+", choices=BY_EXACTNESS, default=[], metavar="PRECISION", help=ENGINE_HELP)
    add("--lengths", type=int, nargs="+", default=[4096, 16384], metavar="TOKENS", help="most tokens of a prompt")
    add("--tasks", nargs="+", default=["all"], metavar="TASK", help=f"all, or of {', '.join(TASKS)}")
    add("--arms", nargs="+", metavar="ARM", help=ARMS_HELP)
    add("--densities", type=float, nargs="+", default=[0.25], help="of the arms that have no budget of their own")
    add("--dense-tail", type=int, nargs="+", default=[0], metavar="BLOCKS", help="blocks at the end that see all")
    add("--dense-layers", type=int, default=2, help="leading layers that are dense (default: 2, as Stem does)")
    add("--block-sizes", type=int, nargs="+", metavar="B", help="default: the largest that gives 256 blocks or more")
    add("--documents-per-cell", type=int, metavar="N", help="documents of each kind and length")
    add("--questions", type=int, metavar="N", help="questions of a kind to a document; 1 is closest to RULER")
    add("--probed-documents", type=int, default=1, metavar="N", help="of each kind: retained mass, needle blocks")
    add("--seed", type=int, default=0)
    add("--style", choices=("auto", "ruler", "report"), default="auto", help="report: as models/tiny-reader was taught")
    add("--essay", type=Path, metavar="FILE", help="a text for essay-like filler instead of reports")
    add("--chunk-tokens", type=int, metavar="N", help="prompt tokens at once (default: 32768 on a CPU, 16384 on a GPU)")
    add("--cache-gib", type=float, help="of keys and values held (default: 2 on a CPU, half the free memory of a GPU)")
    add("--time-limit", type=float, default=float("inf"), metavar="SECONDS", help="start no more documents after this")
    add("--plots", action=argparse.BooleanOptionalAction, help="PNG files beside the rows (unset: if matplotlib is)")
    add("--output", type=Path, default=Path("evaluation"), metavar="DIR", help="rows, tables, plots")
    add("--report", type=Path, nargs="+", metavar="DIR", help="run nothing: report on these evaluations' rows together")
    return flags


def options_of(flags: argparse.Namespace, device: torch.device) -> Options:
    """The options with every default filled in for the device. Raises JobError for what does not fit."""
    tasks = list(TASKS) if flags.tasks == ["all"] else flags.tasks
    for task in tasks:
        if task not in TASKS:
            hint = nearest(task, TASKS) or f"; there are {', '.join(TASKS)}"
            raise JobError(f"--tasks: {task!r} is not a task{hint}")
    on_gpu = device.type == "cuda"
    arms = flags.arms or list(ENGINE_DEFAULT_ARMS if flags.engine else GPU_ARMS if on_gpu else CPU_ARMS)
    if flags.engine and flags.precision != "auto":
        raise JobError(f"--precision {flags.precision} does not go with --engine, which names its own precisions")
    for size in flags.block_sizes or ():
        if size not in BLOCK_SIZES:
            raise JobError(f"--block-sizes: {size} is not one of {', '.join(map(str, BLOCK_SIZES))}")
    for name in ("lengths", "documents_per_cell", "questions", "chunk_tokens"):
        values = getattr(flags, name)
        if values is not None and min(values if isinstance(values, list) else [values]) < 1:
            raise JobError(f"--{name.replace('_', '-')} must be at least 1, got {values}")
    if any(not 0 < density <= 1 for density in flags.densities):
        raise JobError(f"--densities must lie in (0, 1], got {flags.densities}")
    return Options(
        model=flags.model,
        tokenizer=flags.tokenizer or flags.model,
        revision=flags.revision,
        load_format=flags.load_format,
        device=device,
        precision=flags.precision,
        engine=tuple(dict.fromkeys(flags.engine)),
        lengths=tuple(flags.lengths),
        tasks=tuple(tasks),
        arms=tuple(arms) if arms != ["all"] else ENGINE_ARMS if flags.engine else ARMS,
        densities=tuple(flags.densities),
        dense_tails=tuple(flags.dense_tail),
        dense_layers=flags.dense_layers,
        block_sizes=tuple(flags.block_sizes or ()),
        documents=flags.documents_per_cell or (20 if on_gpu else 1),
        questions=flags.questions or (4 if on_gpu else 2),
        probed=flags.probed_documents,
        seed=flags.seed,
        style=flags.style,
        essay=flags.essay.read_text(encoding="utf-8") if flags.essay else "",
        chunk_tokens=flags.chunk_tokens or (16384 if on_gpu else 32768),
        cache_gib=flags.cache_gib,
        time_limit=flags.time_limit,
        plots=flags.plots,
        output=flags.output,
    )
