"""Flipped bits in what a job wrote: none passes unseen. python -m tools.faults flips does thousands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from result_rows import make_row

from pipeline import read_results
from pipeline.errors import JobError
from pipeline.results.parts import encode, recover
from pipeline.results.rows import result_schema, to_table
from pipeline.results.store import Store
from tools.faults.flips import flips


def test_no_flipped_bit_is_silent(tmp_path: Path) -> None:
    found = flips(tmp_path / "job", 120)
    assert sum(found.values()) == 120
    assert not [place for place, what in found if what == "silent"]
    assert found["page", "detected"]
    assert found["footer", "detected"]
    assert found["manifest", "detected"]


@pytest.mark.parametrize("column", ["output", "status", "year", "density_by_layer"])
def test_a_renamed_column_in_a_footer_is_found(tmp_path: Path, column: str) -> None:
    """As a flipped bit renames it; readers would take it for one that an earlier version did not have."""
    schema = result_schema([pa.field("year", pa.int64())])
    row: Any = make_row("a", "x", "ok", output="words", kept={"year": pa.array([5])})
    data = encode(to_table([row], schema))
    at = data.rindex(column.encode())
    path = tmp_path / "part-000000-00000000.parquet"
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(JobError, match=r"its content is not what its checksum says.*sets damaged parts aside"):
        read_results(tmp_path)
    assert "damaged" in recover(Store(str(tmp_path)))[0]


def test_parts_of_earlier_versions_are_read_and_may_lack_no_column_that_they_all_had(tmp_path: Path) -> None:
    table = to_table([make_row("a", "x", "ok", output="words")], result_schema())
    path = tmp_path / "part-000000-00000000.parquet"
    pq.write_table(table.drop(["output_error"]), path)
    assert read_results(tmp_path)["output"].to_pylist() == ["words"]
    pq.write_table(table.rename_columns(["ouqput" if name == "output" else name for name in table.column_names]), path)
    with pytest.raises(JobError, match="it has no column output"):
        read_results(tmp_path)
