"""tools.shapes: the config of a shape, as models of random weights are made from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import JobError
from tools.shapes import main


def test_the_command_writes_a_config(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shape, layers in (("llama-8b", 32), (str(model), 8)):
        assert main([shape, str(tmp_path / "made")]) == 0
        assert capsys.readouterr().out == f"{tmp_path / 'made/config.json'}\n"
        config = json.loads((tmp_path / "made/config.json").read_text(encoding="utf-8"))
        assert (config["num_hidden_layers"], config["eos_token_id"]) == (layers, None)
    with pytest.raises(JobError, match=r"'llama-9b' is neither llama-3.1-8b, .* nor a folder with a config.json"):
        main(["llama-9b", str(tmp_path / "made")])
