"""The flags of jobs.evaluate, and what is chosen where they leave it open."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from jobs.cli import Parser
from jobs.evaluate.arms import AGAIN, ARMS, CONTROLS
from jobs.evaluate.haystacks import KINDS, TASKS
from jobs.known.report import read_essay
from jobs.known.results import BY_EXACTNESS
from pipeline.errors import JobError, nearest
from stem_core.config import BLOCK_SIZES

CPU_ARMS = ("dense", "sampled")
GPU_ARMS = ("dense", AGAIN, "sampled", "release")
# Plain text, with no question: how far predictions are from dense's.
TEXT = "text"
USUAL_TASKS = ("essay", "report", TEXT)
ARMS_HELP = (
    f"of {', '.join(ARMS)}, also as name:field=value,... with fields of StemConfig; {AGAIN} is dense attention in "
    f"chunks of another length, the floor of every comparison; {', '.join(CONTROLS)} are controls"
)
TASKS_HELP = f"all, kinds of documents ({', '.join((*KINDS, TEXT))}), or tasks ({', '.join(TASKS)})"
PRECISIONS_HELP = f"one or more of {', '.join(BY_EXACTNESS)}, also as bf16,fp8; compared question by question"
FP8_MODEL_HELP = (
    "the same model as stored in fp8: read in its place in fp8, so that its weights' rounding is compared, too"
)
BLOCK_HELP = "cut prompts into blocks of B tokens, sparse at any length: for small models (unset: as presets say)"


@dataclass(frozen=True)
class Options:
    """A comparison as it will run; see --help for the meaning of each field."""

    model: str
    fp8_model: str | None
    tokenizer: str
    revision: str | None
    load_format: str
    rope_scaling: float | None
    device: torch.device
    precisions: tuple[str, ...]
    lengths: tuple[int, ...]
    tasks: tuple[str, ...]
    arms: tuple[str, ...]
    block_size: int | None
    documents: int
    texts: int
    questions: int
    seed: int
    style: str
    essay: str
    chunk_tokens: int
    time_limit: float
    plots: bool | None
    output: Path

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
    add("--rope-scaling", type=float, metavar="FACTOR", help="stretch the model's context by YaRN")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--precision", nargs="+", default=["auto"], metavar="PRECISION", help=PRECISIONS_HELP)
    add("--fp8-model", metavar="PATH_OR_ID", help=FP8_MODEL_HELP)
    add("--lengths", type=int, nargs="+", default=[16384, 32768], metavar="TOKENS", help="most tokens of a prompt")
    add("--tasks", nargs="+", default=list(USUAL_TASKS), metavar="TASK", help=TASKS_HELP)
    add("--arms", nargs="+", metavar="ARM", help=ARMS_HELP)
    add("--block-size", type=int, metavar="B", help=BLOCK_HELP)
    add("--documents-per-cell", type=int, metavar="N", help="documents of each kind and length")
    add("--texts", type=int, metavar="N", help="stretches of plain text of each length")
    add("--questions", type=int, metavar="N", help="questions of a kind to a document; 1 is closest to RULER")
    add("--seed", type=int, default=0)
    add("--style", choices=("auto", "ruler", "report"), default="auto", help="report: as models/tiny-reader was taught")
    add("--essay", type=Path, metavar="FILE", help="a text in UTF-8: the filler of documents, and the plain text")
    add("--chunk-tokens", type=int, metavar="N", help="prompt tokens at once (default: as in a job)")
    add("--time-limit", type=float, default=float("inf"), metavar="SECONDS", help="start no more documents after this")
    add("--plots", action=argparse.BooleanOptionalAction, help="PNG files beside the rows (unset: if matplotlib is)")
    add("--output", type=Path, default=Path("evaluation"), metavar="DIR", help="rows, tables, plots")
    add("--report", type=Path, nargs="+", metavar="DIR", help="run nothing: report on these evaluations' rows together")
    return flags


def options_of(flags: argparse.Namespace, device: torch.device) -> Options:
    """The options with every default filled in for the device. Raises JobError for what does not fit."""
    on_gpu = device.type == "cuda"
    for name in ("lengths", "documents_per_cell", "texts", "questions", "chunk_tokens"):
        values = getattr(flags, name)
        if values is not None and min(values if isinstance(values, list) else [values]) < 1:
            raise JobError(f"--{name.replace('_', '-')} must be at least 1, got {values}")
    if flags.block_size is not None and flags.block_size not in BLOCK_SIZES:
        raise JobError(f"--block-size: {flags.block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}")
    if flags.rope_scaling is not None and not 1 < flags.rope_scaling <= 64:
        raise JobError(f"--rope-scaling must be above 1 and at most 64, got {flags.rope_scaling}")
    precisions = _precisions(flags.precision)
    if flags.fp8_model and ("fp8" not in precisions or flags.load_format == "dummy"):
        raise JobError(
            f"--fp8-model is read in fp8, and has weights; got --precision {' '.join(precisions)} and --load-format "
            f"{flags.load_format}: give --precision bf16 fp8"
        )
    return Options(
        model=flags.model,
        fp8_model=flags.fp8_model,
        tokenizer=flags.tokenizer or flags.model,
        revision=flags.revision,
        load_format=flags.load_format,
        rope_scaling=flags.rope_scaling,
        device=device,
        precisions=precisions,
        lengths=tuple(flags.lengths),
        tasks=_tasks(flags.tasks),
        arms=tuple(flags.arms or (GPU_ARMS if on_gpu else CPU_ARMS)),
        block_size=flags.block_size,
        documents=flags.documents_per_cell or (20 if on_gpu else 1),
        texts=flags.texts or (8 if on_gpu else 1),
        questions=flags.questions or (4 if on_gpu else 2),
        seed=flags.seed,
        style=flags.style,
        essay=read_essay(flags.essay) if flags.essay else "",
        chunk_tokens=flags.chunk_tokens or 16896,
        time_limit=flags.time_limit,
        plots=flags.plots,
        output=flags.output,
    )


def _precisions(asked: list[str]) -> tuple[str, ...]:
    names = [name for part in asked for name in part.split(",") if name]
    for name in names:
        if name not in (*BY_EXACTNESS, "auto"):
            raise JobError(f"--precision: {name!r} is not one of auto, {', '.join(BY_EXACTNESS)}")
    return tuple(sorted(set(names), key=("auto", *BY_EXACTNESS).index))


def _tasks(asked: list[str]) -> tuple[str, ...]:
    known = {task: (task,) for task in (*TASKS, TEXT)} | {name: kind.tasks for name, kind in KINDS.items()}
    known["all"] = (*TASKS, TEXT)
    for task in asked:
        if task not in known:
            hint = nearest(task, known) or f"; there are {', '.join(known)}"
            raise JobError(f"--tasks: {task!r} is not a task{hint}")
    return tuple(dict.fromkeys(task for name in asked for task in known[name]))
