"""The flags of jobs.audit, and the arms that they ask for."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from jobs.cli import Parser, add_job_flags
from jobs.known.report import read_essay
from jobs.known.results import BY_EXACTNESS
from jobs.measurement import dummy_copy
from pipeline.engine.config import EngineConfig
from pipeline.engine.model.loading import context_limit, load_config, load_precision
from pipeline.errors import JobError
from pipeline.job.configs import make_engine_config
from pipeline.settings.config import JobConfig, read_job_file
from pipeline.settings.shared import PRECISIONS, Sampling
from stem_core.config import DEFAULT_PRESET, PRESETS

# What of a job the audit decides itself (greedy outputs, one engine at a time) or takes several of.
OWN = ("output", "attention", "preset", "budget", "precision", "seed")
UNUSED = (
    *(item.name for item in fields(Sampling)),
    "keep_columns", "stop", "schema", "workers", "deadline", "max_attempts", "flush_documents", "flush_seconds",
    "compact", "resume", "retry_failed", "force", "dry_run", "ray_address",
)  # fmt: skip
DEFAULT_PRESETS = (DEFAULT_PRESET, "release")
GPU_SAMPLE, CPU_SAMPLE = 24, 4
# Documents with known answers.
GPU_KNOWN, CPU_KNOWN = 8, 1
# Prompts of these lengths are timed besides the documents. `sampled` attends densely up to 8,576 tokens.
GPU_LENGTHS = (4096, 6144, 8192, 12288, 16384, 32768)
CPU_LENGTHS = (4096, 12288)


@dataclass(frozen=True)
class Limits:
    """How like dense an arm's outputs must be to be recommended: means over the documents.

    agreement: share of the tokens of dense's answer that the arm also puts first, reading along. rouge: ROUGE-L of what
    it writes itself. lost: share of what dense finds of known answers that may be lost.
    """

    agreement: float = 0.95
    rouge: float = 0.9
    lost: float = 0.05


@dataclass(frozen=True)
class Arm:
    """One way to run: dense or a preset, with its own budget or another, in one precision."""

    name: str
    preset: str
    budget: float | None
    precision: str
    config: EngineConfig

    @property
    def dense(self) -> bool:
        """Whether all attention is dense."""
        return self.config.attention is None


@dataclass(frozen=True)
class Options:
    """An audit as it will run; see --help for the meaning of each field. job: of the arms' settings, the common ones.

    context: tokens of prompt and output that the model takes. own_tokenizer: outputs can be read as text.
    stop_ids: of the tokenizer, besides the model's own.
    """

    job: JobConfig
    arms: tuple[Arm, ...]
    context: int
    tokenizer: str
    own_tokenizer: bool
    sample: int
    seed: int
    lengths: tuple[int, ...]
    kl_tokens: int
    limits: Limits
    show: int
    known: int
    essay: str
    output: Path
    stop_ids: tuple[int, ...] = ()

    @property
    def random_weights(self) -> bool:
        """Whether outputs mean nothing."""
        return self.job.load_format == "dummy"


def parser(description: str) -> Parser:
    """The command line: the settings of a job that the audit takes over, and its own."""
    flags = Parser(prog="python -m jobs.audit", description=description, allow_abbrev=False)
    add_job_flags(flags, without=(*OWN, *UNUSED))
    add = flags.add_argument_group("audit").add_argument
    add("--output", type=Path, default=Path("audit"), metavar="DIR", help="for page, rows, figures (default: audit)")
    add(
        "--sample",
        type=int,
        metavar="N",
        help=f"documents to compare, of all lengths (default: {GPU_SAMPLE}; on a CPU {CPU_SAMPLE})",
    )
    add(
        "--preset",
        nargs="+",
        choices=PRESETS,
        help=f"what to compare with dense (default: {' '.join(DEFAULT_PRESETS)})",
    )
    add(
        "--budget",
        nargs="+",
        type=float,
        metavar="X",
        help="share of the blocks, in place of the presets' own; each with each preset",
    )
    add(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        help="each is run; all are compared with dense in the most exact one",
    )
    add("--lengths", nargs="*", type=int, metavar="N", help="prompt lengths to time besides the documents")
    add(
        "--kl-tokens",
        type=int,
        default=64,
        metavar="N",
        help="tokens of dense's answer that the others read along (default: 64)",
    )
    add(
        "--least-agreement",
        type=float,
        default=Limits.agreement,
        metavar="X",
        help="share of equal tokens that a recommendation needs (default: 0.95)",
    )
    add(
        "--least-rouge",
        type=float,
        default=Limits.rouge,
        metavar="X",
        help="ROUGE-L that a recommendation needs (default: 0.9)",
    )
    add(
        "--known",
        type=int,
        metavar="N",
        help=f"documents with known answers to read besides (default: {GPU_KNOWN}; on a CPU {CPU_KNOWN})",
    )
    add("--essay", type=Path, metavar="FILE", help="a text in UTF-8 for these, in place of the documents' own")
    add("--show", type=int, default=5, metavar="N", help="documents of each arm to show beside dense (default: 5)")
    add("--seed", type=int, default=0, help="seed of the sample (default: 0)")
    add("--tokenizer", metavar="PATH_OR_ID", help="if it is not the model's own; outputs are then shown as token ids")
    add("--report", type=Path, metavar="DIR", help="run nothing, only write the page of an earlier audit again")
    return flags


def options_of(flags: argparse.Namespace) -> Options:
    """What runs, every default filled in for the device. Raises JobError for what does not fit."""
    given = read_job_file(flags.config) if flags.config else {}
    presets = flags.preset or ([given["preset"]] if "preset" in given else list(DEFAULT_PRESETS))
    budgets = flags.budget or [given.get("budget")]
    precisions = flags.precision or [given.get("precision", "auto")]
    known = {item.name for item in fields(JobConfig)} - {*OWN, *UNUSED}
    values = {name: value for name, value in (given | vars(flags)).items() if name in known}
    _check(flags)
    folder = (
        str(dummy_copy(values.get("model", ""), flags.output / "shape"))
        if values.get("load_format") == "dummy"
        else None
    )
    jobs = {
        (preset, budget, precision): JobConfig(
            **values, output=str(flags.output), preset=preset, budget=budget, precision=precision
        )
        for precision in precisions
        for preset in presets
        for budget in budgets
    }
    first = next(iter(jobs.values()))
    found = _arms(jobs, folder)
    on_gpu = found[0].config.torch_device().type == "cuda"
    lengths = (GPU_LENGTHS if on_gpu else CPU_LENGTHS) if flags.lengths is None else flags.lengths
    return Options(
        job=first,
        arms=tuple(found),
        context=found[0].config.max_context or context_limit(load_config(found[0].config)),
        tokenizer=flags.tokenizer or first.model,
        own_tokenizer=flags.tokenizer is None,
        sample=flags.sample or (GPU_SAMPLE if on_gpu else CPU_SAMPLE),
        seed=flags.seed,
        lengths=tuple(sorted(set(lengths))),
        kl_tokens=flags.kl_tokens,
        limits=Limits(flags.least_agreement, flags.least_rouge),
        show=flags.show,
        known=flags.known if flags.known is not None else GPU_KNOWN if on_gpu else CPU_KNOWN,
        essay=read_essay(flags.essay) if flags.essay else "",
        output=flags.output,
    )


def _check(flags: argparse.Namespace) -> None:
    for name in ("sample", "kl_tokens", "lengths"):
        values = getattr(flags, name)
        if any(value < 1 for value in (values if isinstance(values, list) else [values]) if value is not None):
            raise JobError(f"--{name.replace('_', '-')} must be at least 1, got {values}")
    for name in ("known", "show"):
        if (getattr(flags, name) or 0) < 0:
            raise JobError(f"--{name} must be at least 0, got {getattr(flags, name)}")
    for name in ("least_agreement", "least_rouge"):
        if not 0 <= getattr(flags, name) <= 1:
            raise JobError(f"--{name.replace('_', '-')} must lie in 0..1, got {getattr(flags, name)}")


def _arms(jobs: dict[Any, JobConfig], folder: str | None) -> list[Arm]:
    """Dense first, then presets and budgets, in each precision from the most exact one down."""
    found: dict[str, Arm] = {}
    for (preset, budget, _), job in jobs.items():
        config = make_engine_config(job, job.device)
        config = replace(config, model=folder or config.model)
        precision = load_precision(config).name
        config = replace(config, precision=precision)
        shown = preset if budget is None else f"{preset}@{budget:g}"
        for name, made in (("dense", replace(config, attention=None)), (shown, config)):
            full = f"{name}-{precision}"
            found.setdefault(
                full, Arm(full, name.partition("@")[0], None if name == "dense" else budget, precision, made)
            )
    return sorted(found.values(), key=lambda arm: (BY_EXACTNESS.index(arm.precision), not arm.dense))
