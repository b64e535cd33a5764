"""StemlineStage in a real Ray Data pipeline: every row in gives one row out, whatever becomes of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from pipeline import StemlineStage
from pipeline.errors import JobError
from pipeline.results.rows import result_schema

FAKE = {"engine_factory": "fake_engine:FakeEngine", "max_new_tokens": 8}


@pytest.fixture
def stage(model: Path) -> Iterator[Any]:
    """Makes a stage in this process."""
    made = []

    def make(**settings: Any) -> StemlineStage:
        made.append(StemlineStage(model=model, **(FAKE | settings)))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_dataset_through_the_real_engine(model: Path) -> None:
    import ray

    data = ray.data.DataContext.get_current()
    data.enable_progress_bars = False
    items = [{"id": f"d{i}", "text": f"document {i} " * (i + 1) if i != 7 else "", "n": i} for i in range(19)]
    stage = {"model": str(model), "max_new_tokens": 2, "keep_columns": ["n"], "attention": "dense"}
    out = ray.data.from_items(items, override_num_blocks=3).map_batches(
        StemlineStage, fn_constructor_kwargs=stage, batch_size=4, concurrency=1
    )
    table = pa.concat_tables(pa.table(block) for block in out.iter_batches(batch_size=None, batch_format="pyarrow"))
    rows = {row["document_id"]: row for row in table.to_pylist()}
    assert table.num_rows == len(rows) == 19
    assert {row["n"] for row in rows.values()} == set(range(19))
    assert {name for name, row in rows.items() if row["status"] != "ok"} == {"d7"}
    assert "0 bytes" in rows["d7"]["error"]
    assert all(name == f"d{row['n']}" for name, row in rows.items())
    assert all(row["output_tokens"] == 2 or row["finish_reason"] == "stop" for row in rows.values() if row["n"] != 7)
    assert rows["d18"]["prompt_tokens"] > rows["d0"]["prompt_tokens"]
    expected = result_schema([pa.field("n", pa.int64())])
    assert [(field.name, field.type) for field in table.schema] == [(field.name, field.type) for field in expected]


FORMATS = {"numpy": dict, "pandas": pd.DataFrame, "pyarrow": pa.table}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_batch_of_each_format(stage: Any, kind: str) -> None:
    """Rows keep their order, their kept columns and their number, also where ids or texts occur more than once."""
    columns: dict[str, Any] = {
        "name": ["a", "b", "a", "c", "a"],
        "body": ["one", None, "three three", "RAISE", "one"],
        "n": [1, 2, 3, 4, 5],
    }
    if kind == "numpy":
        columns = {name: np.array(values, dtype=object) for name, values in columns.items()}
    work = stage(text_column="body", id_column="name", keep_columns=["n"], columns=["document_id", "status", "output"])
    table = work(FORMATS[kind](columns))
    assert table.column_names == ["document_id", "status", "output", "n"]
    assert table.to_pydict() == {
        "document_id": ["a", "b", "a", "c", "a"],
        "status": ["ok", "error", "ok", "error", "ok"],
        "output": ["the answer", None, "the answer", None, "the answer"],
        "n": [1, 2, 3, 4, 5],
    }
    assert work(FORMATS[kind](columns))["status"].to_pylist() == ["ok", "error", "ok", "error", "ok"]


def test_ids_come_from_a_column_or_from_the_text(stage: Any) -> None:
    work = stage(columns=["document_id", "prompt_tokens"])
    assert work({"text": ["x"], "document_id": [3]})["document_id"].to_pylist() == ["3"]
    assert work({"text": ["x"], "id": np.array(["mine"])})["document_id"].to_pylist() == ["mine"]
    first, second, same, odd = work({"text": ["x", "y", b"x", None]})["document_id"].to_pylist()
    assert first == same
    assert len({first, second, odd}) == 3
    assert len(first) == 16
    assert work({"text": []}).num_rows == 0


def test_numbers_of_rows_do_not_depend_on_luck(stage: Any) -> None:
    work = stage(columns=["document_id"])
    ids = np.random.default_rng(0).integers(0, 5, 40).astype(str)
    assert work({"id": ids, "text": ids})["document_id"].to_pylist() == ids.tolist()


@pytest.mark.parametrize(
    ("settings", "batch", "message"),
    [
        ({"text_column": "body"}, {"text": ["x"]}, "no column 'body'; it has text"),
        ({"id_column": "name"}, {"text": ["x"]}, "no column 'name'"),
        ({"keep_columns": ["n"]}, {"text": ["x"]}, "no column 'n'"),
        ({"keep_columns": ["output"]}, {}, "results have a column of that name"),
        ({"columns": ["outputs"]}, {}, "columns: 'outputs' is not a result column"),
        ({"workers": 2}, {}, "workers is a setting of the job"),
    ],
)
def test_mistakes_end_the_execution(stage: Any, settings: dict[str, Any], batch: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        stage(**settings)(batch)


def test_a_broken_machine_raises_where_a_broken_document_does_not(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    work = stage()
    assert work({"text": ["RAISE", "fine"]})["status"].to_pylist() == ["error", "ok"]
    assert work({"text": ["fine"]})["status"].to_pylist() == ["ok"]
    monkeypatch.setenv("FAKE_ENGINE", "NOSTART")
    lost = work({"text": ["RAISE", "fine"]})
    assert set(lost["status"].to_pylist()) == {"error"}
    assert "does not start" in lost["error"][1].as_py()
    with pytest.raises(RuntimeError, match="does not start"):
        work({"text": ["fine"]})


def test_it_gives_the_whole_row_schema(stage: Any) -> None:
    assert stage()({"text": ["x"]}).schema == result_schema()
