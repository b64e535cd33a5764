"""tools.train_demo_model: its documents, its model against transformers', and a few steps that learn."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from pipeline.errors import JobError
from tools.train_demo_model import batches
from tools.train_demo_model.__main__ import main
from tools.train_demo_model.batches import BatchPlan, BatchSource, make_batch
from tools.train_demo_model.documents import ASSISTANT, END, TARGET, DocumentMaker
from tools.train_demo_model.facts import Counts, ask_magic, make_facts
from tools.train_demo_model.model import Reader, Shape
from tools.train_demo_model.optimizer import Muon, orthogonalised
from tools.train_demo_model.tokenizer import train_tokenizer, vocabulary_size
from tools.train_demo_model.train import Settings, make_optimizer, parse_stages

TOKENIZER = Path(__file__).parents[2] / "models/tiny-reader"
TINY = Shape(hidden=64, layers=2, heads=2, kv_heads=1, head_dim=32, mlp=128)


@cache
def maker(paragraphs: float = 0.3) -> DocumentMaker:
    return DocumentMaker(TOKENIZER, paragraphs, pool=0.01)


@pytest.mark.parametrize("length", [256, 700, 4096])
def test_documents(length: int) -> None:
    kinds: Counter[str] = Counter()
    for seed in range(12):
        document = maker().document(length, seed, skip_to=8000)
        again = maker().document(length, seed, skip_to=8000)
        assert np.array_equal(document.ids, again.ids)
        assert len(document.ids) == len(document.mask) == len(document.positions) == length
        assert (np.diff(document.positions) >= 1).all()
        assert document.positions[-1] < 8000
        marked = np.zeros(length, bool)
        for span in document.spans:
            kinds[span.kind] += 1
            marked[span.first : span.last] = True
            if span.kind != "again":
                assert document.ids[span.first - 1] == ASSISTANT
                assert document.ids[span.last - 1] == END
        assert np.array_equal(document.mask == TARGET, marked)
    assert {"summary", "note", "hop1"} <= set(kinds)


def test_answers_can_be_found_in_the_document() -> None:
    text = maker().tokenizer.decode
    for seed in range(8):
        document = maker().document(2048, seed)
        end = min(span.first for span in document.spans if span.kind != "again")
        told = text(document.ids[:end].tolist())
        for span in document.spans:
            answer = text(document.ids[span.first : span.last].tolist())
            parts = [part.split(". ", 1)[1] for part in answer.split("\n")] if span.kind == "summary" else [answer]
            if span.kind.startswith("multi"):
                parts = answer.split(", ")
            if span.kind.startswith("hop"):
                parts = [part.removeprefix("lot ") for part in answer.split(", ")]
            if answer != "No key findings.":
                assert all(part in told for part in parts), (span.kind, answer)


def test_findings_open_paragraphs() -> None:
    def opening(paragraphs: float) -> int:
        decode = maker(paragraphs).tokenizer.decode
        texts = [decode(maker(paragraphs).document(2048, seed).ids.tolist()) for seed in range(10)]
        return sum(
            text.count(f"\n\n{mark}") for text in texts for mark in ("Key finding", "Main finding", "Key result")
        )

    assert opening(0.0) == 0
    assert opening(0.5) > 5


def test_facts() -> None:
    facts = make_facts(Random(3), Counts(findings=4, notes=3, magic=6, codes=2, chains=5, repeats=2))
    placed = facts.placed(Random(4))
    assert sorted(map(id, placed)) == sorted(map(id, facts.needles))
    said = [needle.text.split(": ", 1)[1] for needle in placed if needle.family == "findings"]
    assert said == facts.findings  # in order, whatever stands between them
    for needle in placed:
        if needle.target is not None:
            first = next(other for other in placed if other.family == needle.family)
            assert first is not needle
            assert needle.text[slice(*needle.target)] in first.text
    asked = ask_magic(["a-b", "c-d", "e-f"], ["1", "2", "3"])
    assert (asked.kind, asked.answer) == ("multiquery", "1, 2, 3")
    assert "for a-b, c-d and e-f mentioned" in asked.text


def test_batch_scores_targets_first() -> None:
    documents = maker().batch(512, 3, seed=1)
    batch = make_batch(documents, BatchPlan(tokens=1536, rows=700), np.random.default_rng(0))
    ids, _, rows, target, weight = batch.arrays
    assert np.array_equal(target, np.roll(ids, -1, 1).ravel()[rows])
    kinds = np.stack([document.mask for document in documents]).ravel()
    assert (kinds[rows[: batch.targets] + 1] == TARGET).all()
    assert batch.targets == sum((document.mask[1:] == TARGET).sum() for document in documents)
    assert weight[: batch.targets].sum() == pytest.approx(1.0)
    assert 0 < weight[batch.targets :].sum() <= 0.1


class BrokenMaker:
    def batch(self, *_: object) -> None:
        raise MemoryError("no room for a document")


def test_workers_that_die_end_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "PATIENCE_SECONDS", 0.1)
    source = BatchSource(BrokenMaker(), [256], BatchPlan(), 2, 0)  # type: ignore[arg-type]
    source.start(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="processes that make documents have died"):
        source.next()
    source.close()


def test_exported_model_is_transformers_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model = Reader(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.05 * torch.randn_like(parameter)).bfloat16().float())
    model.export(tmp_path, TOKENIZER)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(5, 2000, (2, 50))
    logits = loaded(ids).logits.flatten(0, 1)
    rows, best = torch.arange(100), logits.argmax(-1)
    positions = torch.arange(50).expand(2, 50)
    loss, right = model(ids, positions, rows, best, torch.full((100,), 0.01))
    assert right.float().mean() > 0.98
    assert float(loss) == pytest.approx(float(torch.nn.functional.cross_entropy(logits, best)), abs=1e-3)
    chat = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|bos|><|user|>x<|end|><|assistant|>"


def test_orthogonalised() -> None:
    torch.manual_seed(0)
    for shape in ((3, 32, 64), (2, 64, 32)):
        singular = torch.linalg.svdvals(orthogonalised(torch.randn(shape)))
        scale = max(1.0, shape[1] / shape[2]) ** 0.5
        assert (singular / scale > 0.5).all()
        assert (singular / scale < 1.4).all()


def test_every_parameter_is_trained() -> None:
    torch.manual_seed(0)
    model = Reader(TINY)
    optimizer = make_optimizer(model, Settings(TOKENIZER, Path("unused")))
    assert isinstance(optimizer, Muon)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    batch = make_batch(maker().batch(256, 1, seed=0), BatchPlan(rows=256), np.random.default_rng(0))
    for _ in range(2):  # the first leaves what stands behind output projections of zero
        model(*batch.to(torch.device("cpu")).arrays)[0].backward()
        optimizer.step(1.0, 0.9)
        model.zero_grad()
    for old, parameter in zip(before, model.parameters(), strict=True):
        assert not torch.equal(old, parameter)


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    """The whole run, workers and stages included, with tiny settings."""
    script = f"""
import json, os
from pathlib import Path
from tools.train_demo_model.train import BatchPlan, Settings, Shape, train
settings = Settings(
    Path({str(TOKENIZER)!r}), Path({str(tmp_path)!r}), seconds=12.0, stages=((256, 0.7), (512, 1.0)),
    shape=Shape(hidden=64, layers=1, heads=2, kv_heads=1, head_dim=32, mlp=128),
    plan=BatchPlan(tokens=512, rows=256, skip_to=800), workers=1, check_lengths=(256,), check_batches=1,
    check_every=1e9, pool=0.005,
)
train(settings)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=TOKENIZER.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "training.json").read_text())
    losses = [loss for _, loss, _ in metrics["losses"]]
    assert len(losses) >= 2
    assert losses[-1] < losses[0] - 0.3
    assert metrics["steps"] * 512 == metrics["tokens"] == sum(metrics["tokens_by_length"].values())
    assert set(metrics["tokens_by_length"]) <= {"256", "512"}
    assert (tmp_path / "model.safetensors").exists()


def test_new_tokenizer(tmp_path: Path) -> None:
    train_tokenizer(tmp_path, seed=1, documents=60)
    assert vocabulary_size(tmp_path) == 2048
    tokens = DocumentMaker(tmp_path, pool=0.005).tokenizer
    assert tokens.encode(" 12,410\n").tokens == ["Ġ", "1", "2", ",", "4", "1", "0", "Ċ"]
    text = "<|user|>A report.<|end|>"
    assert tokens.decode(tokens.encode(text).ids, skip_special_tokens=False) == text


def test_user_errors(tmp_path: Path) -> None:
    assert parse_stages("512:0.5,2048:1") == ((512, 0.5), (2048, 1.0))
    with pytest.raises(JobError, match=r"no tokenizer\.json"):
        main(["--output", str(tmp_path), "--tokenizer", str(tmp_path)])
    with pytest.raises(JobError, match="--workers must be at least 1"):
        main(["--output", str(tmp_path), "--workers", "0"])
    with pytest.raises(ValueError, match="at least 256 tokens, got 128"):
        maker().document(128, seed=0)
    with pytest.raises(JobError, match="must rise to 1"):
        main(["--output", str(tmp_path), "--tokenizer", str(TOKENIZER), "--stages", "512:0.5,2048:0.4"])
