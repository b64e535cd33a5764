# %% [markdown]
# # Summarise documents and look at what the sparse prefill read
# The cells of this file run one by one in VS Code, Jupyter (through jupytext) and Spyder, or all at once:
# `python examples/notebook.py`.

# %%
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import read_results, summarize
from stem_core import StemConfig, prompt_budget

ROOT = Path.cwd() if (Path.cwd() / "examples").is_dir() else Path(__file__).parents[1]

# %% [markdown]
# ## Summarise
# The settings are those of `examples/demo.yaml`: small blocks, since the documents are short. The last document is
# empty: it gets a row like the others, and the row says what is wrong.

# %%
documents = {path.name: path for path in sorted((ROOT / "examples/documents").glob("*-planted.txt"))}
table = summarize(
    documents | {"nothing": ""},
    model=ROOT / "models/tiny-reader",
    question="List the key findings in order.",
    preset="sampled",
    budget=0.3,
    block_size=16,
    dense_layers=0,
)
for row in table.to_pylist():
    print(f"{row['document_id']}: {row['status']} {row['error']}\n{row['output'] or ''}\n")

# %% [markdown]
# ## Keep the rows
# They have the columns of a job's results, so what reads those reads these: `read_results`, pandas, DuckDB.

# %%
folder = Path(mkdtemp(prefix="summaries-"))
pq.write_table(table, folder / "part-000000.parquet")
results = read_results(folder)
print(results.select(["document_id", "status", "prompt_tokens", "attention", "density"]).to_pandas())

# %% [markdown]
# ## Density
# The share of the key blocks that the prefill read; dense attention reads all of them.

# %%
ok = results.filter(pc.equal(results["status"], "ok"))
for row in ok.to_pylist():
    bar = "#" * round(40 * row["density"])
    print(f"{row['document_id']:<28} {row['prompt_tokens']:>7,} tokens  {bar:<40} {row['density']:.3f}")

# %% [markdown]
# What the presets would read of longer prompts, in their sparse layers, is known without running anything: the budgets
# depend on the length alone.

# %%
lengths = [8192, 16384, 32768, 65536, 131072]
print("tokens  ", *(f"{length:>8,}" for length in lengths))
for preset in ("sampled", "paper", "release"):
    densities = [prompt_budget(length, StemConfig.preset(preset)).density for length in lengths]
    print(f"{preset:<8}", *(f"{density:>8.3f}" for density in densities))

# %% [markdown]
# How many blocks each query block may read, from the prompt's start to its end, at 32,768 tokens:

# %%
budgets = prompt_budget(32768, StemConfig.preset("sampled")).budgets
for first in np.linspace(0, len(budgets) - 1, 9).astype(int):
    print(f"block {first:>3} of {len(budgets)}: {'#' * (budgets[first] // 2)} {budgets[first]} of {first + 1}")
