"""Check model types against transformers and write the table of docs/models.md: python -m tools.models"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from jobs.cli import Parser, run_main
from tools.models.check import Checked, check_type

RESULTS = Path(__file__).with_name("results.json")
SECONDS = 180.0
# Text models that are also published inside another wrapper than the one that transformers makes for it by default.
INSIDE = ("mistral3/ministral3",)


def all_types() -> list[str]:
    """The types of transformers' causal language models, and of those that also read images."""
    from transformers.models.auto import modeling_auto

    names = {
        *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }
    return sorted({*names, *INSIDE})


def checked(model_type: str, device: str = "cpu") -> Checked:
    """check_type() in a process of its own: some models end theirs, or never come to an end."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(model_type, device, there))
    child.start()
    there.close()
    try:
        found = here.recv() if here.poll(SECONDS) else Checked(model_type, "untested", f"took over {SECONDS:g} s")
    except EOFError:
        found = Checked(model_type, "untested", "its process died")
    child.kill()
    child.join()
    return found


def _child(model_type: str, device: str, there: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    there.send(check_type(model_type, device))


def read_results() -> tuple[str, list[Checked]]:
    """transformers' version and what was found, by type, as they were written last."""
    written = json.loads(RESULTS.read_text(encoding="utf-8"))
    return written["transformers"], [Checked(**each) for each in written["types"]]


def write_results(version: str, found: Iterable[Checked]) -> None:
    """The table, one line for each type, sorted."""
    lines = [json.dumps(each.to_dict(), ensure_ascii=False) for each in sorted(found, key=lambda each: each.model_type)]
    table = ",\n  ".join(lines)
    RESULTS.write_text(f'{{"transformers": {json.dumps(version)}, "types": [\n  {table}\n]}}\n', encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    """Check the types, print each and write the table anew; 1 if one gives other tokens than transformers."""
    about = "Read and continue tiny random models of every type here and in transformers, and write what was found."
    parser = Parser(prog="python -m tools.models", description=about, allow_abbrev=False)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model types (default: all); others keep their lines")
    parser.add_argument("--device", default="cpu", help="the engine's; other than cpu (default), nothing is written")
    options = parser.parse_args(arguments)
    given = options.types
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = {each.model_type: each for each in (read_results()[1] if given and RESULTS.is_file() else ())}
    for model_type in given or all_types():
        found[model_type] = checked(model_type, options.device)
        each = found[model_type]
        print(f"{each.model_type}: {' '.join(filter(None, (each.status, each.sparse, each.reason)))}", flush=True)
        if options.device == "cpu":
            write_results(transformers.__version__, found.values())  # an interrupted run loses nothing
    counts = {
        status: sum(each.status == status for each in found.values())
        for status in ("stem", "dense", "refused", "untested", "wrong")
    }
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    run_main(main)
