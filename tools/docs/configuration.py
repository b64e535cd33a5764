"""docs/configuration.md: every setting of a job, and what the presets are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import Field
from typing import Any

import yaml

from pipeline.job.manifest import READING
from pipeline.settings.config import GROUPS, STEM_OVERRIDES, JobConfig, declared, flag, from_mapping
from pipeline.settings.vllm import NOT_HERE, OURS
from stem_core.budget import prompt_budget
from stem_core.config import DENSE_BELOW, PRESETS, StemConfig
from stem_core.estimators import ESTIMATORS
from stem_core.settings import bounds, kind_of
from tools.docs.markdown import table

REQUIRED = ("input", "output", "model")
# Settings that decide whether a folder's results are of the same job, although they are no setting of the output.
READ_ANEW = (*READING, "prompt_file", "system")
TYPES = {
    "str": "text",
    "int": "whole number",
    "float": "number",
    "bool": "true or false",
    "list": "a name or a list of names",
    "columns": "a name or a list of names",
    "texts": "a text or a list of texts",
    "stops": "a text or a list of texts",
    "questions": "file, or a list of questions",
    "map": "mapping; JSON after the flag",
    "auto_int": "whole number or `auto`",
    "shard": "`i/n`",
    "switch": "text",
    "schema": "a file, or JSON",
    "date": "date, `2026-11-28`",
    "encoding": "encoding, `cp1252`",
}
HUGE = 1_000_000  # upper limits that nobody meets are left out
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
EXAMPLE = """\
input: [reports/2024, reports/2025.parquet]
output: results
model: Qwen/Qwen3-8B
keep_columns: [year, author]        # columns of the Parquet file, copied into the results

question: What went wrong, and what was done about it?
chat_template_args: {enable_thinking: false}
too_long: truncate
max_new_tokens: 400

preset: sampled
budget: 0.25                        # in place of the preset's share
precision: bf16
workers: 4
"""


def configuration_page() -> str:
    """The text of docs/configuration.md."""
    example = JobConfig(**from_mapping(yaml.safe_load(EXAMPLE), "the example"))  # raises if it is no valid job
    parts = [_INTRO, _COMBINING, "## An example\n", f"```yaml\n{EXAMPLE}```\n", _example_note(example)]
    header = ("flag", "YAML key", "type", "default", "values", "meaning")
    for name, about in GROUPS.items():
        rows = [_setting(item) for item in declared() if item.metadata["group"] == name]
        parts += [f"## {name.capitalize()}\n", about + "\n", table(header, rows) + "\n"]
    return "\n".join([*parts, _stem_section(), _vllm_section()])


_NEEDED = ", ".join(f"`{flag(name)}`" for name in REQUIRED)
_INTRO = f"""\
# Configuration

Every setting of `python -m jobs.summarize` (and of `jobs.submit`, which takes the same).
{_NEEDED} are needed, all others have defaults. In Python, the YAML keys are the arguments' names:
`pipeline.run_job(input=..., output=..., model=...)`.

This page is written by `python -m tools.docs` from the code; do not edit it by hand.
"""
_COMBINING = """\
## How settings combine

1. A flag wins over the same key in the file of `--config`, and that wins over the default.
2. `--preset` fills in Stem's fields. A single attention setting, such as `block_size`, replaces the preset's
   value, whether it comes from a flag or from the file. So with `block_size: 64` in the file, `--preset release`
   is `release` with blocks of 64.
3. `--budget X` takes the place of the preset's schedule: layers that are not dense keep that share of the causal
   blocks.
4. With `--attention dense` the preset plays no part, and single attention settings are refused.

The file holds `key: value` lines. `-` and `_` in keys are the same; a key that is not a setting is refused,
with the one that was probably meant. `null` is allowed where the default is unset or the preset's. Paths, in the file
too, start at the folder in which the command runs. Settings that are true or false have two flags, `--compact`
and `--no-compact`.

Settings marked with a star decide what the results are. A job goes on in a folder that holds results only if they
are as they were, or with `--force` ([what a resume replaces](results.md#what-a-resume-replaces)); all others may
change from run to run.
"""


def _example_note(config: JobConfig) -> str:
    stem = config.stem()
    assert stem is not None
    return (
        "`python -m jobs.summarize --config job.yaml --max-new-tokens 600` runs it with longer outputs.\n"
        f"Its attention is the preset `{config.preset}` at a density of {stem.density}.\n"
        "With `--dry-run`, it only prints the plan.\n"
    )


def _setting(item: Field[Any]) -> tuple[str, ...]:
    rules, name = item.metadata, item.name
    kind = kind_of(item)
    negative = f", `--no-{flag(name)[2:]}`" if kind == "bool" else ""
    star = " *" if rules["changes_output"] or name in READ_ANEW else ""
    # What there is more to say of Stem's settings stands with the presets.
    meaning = rules["meaning"] if name in STEM_OVERRIDES else in_full(item)
    return f"`{flag(name)}`{negative}{star}", f"`{name}`", TYPES[kind], _default(item), _values(item), meaning


def _default(item: Field[Any]) -> str:
    if item.name in REQUIRED:
        return "needed"
    if item.default in (None, ()):
        return "the preset's" if item.name in STEM_OVERRIDES else "unset"
    return f"`{yaml.safe_dump(item.default).splitlines()[0]}`"


def _values(item: Field[Any]) -> str:
    rules: Mapping[str, Any] = item.metadata
    if rules["divides_block"]:
        return "divisors of `block_size`"
    if rules["high"] is not None and rules["high"] > HUGE:
        rules = {**rules, "high": None}
    choices = ", ".join(f"`{choice}`" for choice in rules["choices"])
    return choices or bounds(rules).removeprefix("in ").replace("..", " to ")


def in_full(item: Field[Any]) -> str:
    """All that is said of a setting."""
    return "; ".join(filter(None, (item.metadata["meaning"], item.metadata["more"])))


def _stem_section() -> str:
    named = tuple(f"`{name}`" for name in PRESETS)
    rows = []
    for name in StemConfig().to_dict():
        item = StemConfig.__dataclass_fields__[name]
        setting = "budget" if name in ("schedule", "density") else name
        values = [_plain(getattr(preset, name)) for preset in PRESETS.values()]
        rows.append((f"`{name}`", f"`{flag(setting)}`", *values, _values(item), in_full(item)))
    estimators = []
    for name, estimator in ESTIMATORS.items():
        cost = f"{estimator.cost(StemConfig(estimator=name)):.2%}"
        limits = str(estimator.largest_block), str(estimator.least_fp8_head)
        estimators.append((f"`{name}`", estimator.meaning, cost, *limits))
    header = ("estimator", "scores", "cost", "largest block", "smallest head in fp8")
    densities = []
    for length in LENGTHS:
        shares = [f"{prompt_budget(length, preset).density:.2f}" for preset in PRESETS.values()]
        densities.append((f"{length:,}", *shares))
    fields_table = table(("field", "flag", *named, "values", "meaning"), rows)
    return f"""\
## Stem's fields and presets

A preset is a named `StemConfig` (`stem_core/config.py`). `sampled` is ours and the default: it loses least on real
models. `paper` follows the text of the Stem paper and `release` its published code, for those who want the published
algorithm: they lose many facts that a document states once. In Python:
`StemConfig.preset("sampled", block_size=64)`.

{fields_table}

Estimators ([what they compute](algorithm.md)); cost is their flops as a share of dense attention's, as they are set by
default:

{table(header, estimators)}

`--budget 0.25` is `schedule` `density` with `density` 0.25. Below {DENSE_BELOW:,} tokens dense attention is
faster, so the presets leave shorter prompts dense; `sampled` those up to {_longest_dense():,} tokens, of which it
would leave out less than its scores cost.

Share of the causal key blocks that the presets read, in each layer that is not dense, by tokens of the prompt
(1.00 is dense):

{table(("tokens", *named), densities)}

What a document's prefill did read, over all layers, is the column [`density`](results.md#columns) of its row.
"""


def _longest_dense() -> int:
    """Tokens of the longest prompt of which the preset sampled leaves nothing out."""
    stem = PRESETS["sampled"]
    return next(n for n in range(stem.dense_below, 1 << 20) if prompt_budget(n + 1, stem).budgets is not None)


def _vllm_section() -> str:
    rows = [
        (", ".join(f"`{theirs}`" for theirs, name in OURS.items() if name == ours), f"`{flag(ours)}`")
        for ours in dict.fromkeys(OURS.values())
    ]
    reasons = dict.fromkeys(NOT_HERE.values())
    missing = [
        (
            ", ".join(f"`{name}`" for name in NOT_HERE if NOT_HERE[name] == why),
            re.sub(r"(--[a-z-]+(?: auto| fp8| FACTOR)?)", r"`\1`", why),
        )
        for why in reasons
    ]
    return f"""\
## vLLM's names

Whoever gives one of these names as a flag or a setting is told the same. `temperature`, `top_p`, `top_k`, `min_p`,
`repetition_penalty`, `seed`, `stop`, `revision`, `trust_remote_code` and `load_format` have the same names in both.
Only `block_size` is another thing here (tokens in a block of the sparse attention), and `top_k` is left out where vLLM
takes -1 or 0. The defaults differ: vLLM's `SamplingParams()` samples at temperature 1 and ends after 16 tokens, and its
server samples as the model's `generation_config.json` says; here outputs are greedy and end after
{JobConfig.max_new_tokens} tokens. The files of `vllm run-batch` are answered by
[`jobs.batch`](inputs.md#openai-batch-files).

{table(("in vLLM, or Ray Data LLM", "here"), rows)}

{table(("in vLLM, and not here", "in its place"), missing)}
"""


def _plain(value: Any) -> str:
    return "-" if value is None else f"{value}"
