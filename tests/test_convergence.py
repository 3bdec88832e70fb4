"""The benchmark of what compressors cost a training: a short one, and what is made of its curves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer

from bench.convergence import __main__ as convergence
from bench.convergence import report, training
from bench.convergence.language import CONTEXT, LanguageModel, load_text

NAMES = ["signs", "signs, no residuals", "low rank, 4", "random-k 1 %"]


def test_a_small_training(tmp_path: Path) -> None:
    convergence.main(steps=25, seeds=1, workers=2, only=NAMES, jobs=2, out=tmp_path)
    content = json.loads((tmp_path / "convergence.json").read_text())
    assert (tmp_path / "convergence.png").stat().st_size > 1000
    records = {record["name"]: record for record in content["records"]}
    assert set(records) == {training.BASELINE, *NAMES}
    losses = {name: record["loss"]["mean"] for name, record in records.items()}
    assert len(set(losses.values())) == len(losses)  # each trained on its own way
    first, *others = [record["curves"][0][0][1] for record in records.values()]
    assert set(others) == {first}  # from the same weights, on the same text
    assert all(loss < first - 0.1 for loss in losses.values())  # and learnt
    assert losses[training.BASELINE] == min(losses.values())
    assert (
        records["random-k 1 %"]["nbytes"] < records["signs"]["nbytes"] < records[training.BASELINE]["nbytes"]
    )
    assert 0 < records["random-k 1 %"]["dense_steps"] < records["signs"]["dense_steps"] < 25


def test_names_are_checked(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="no compressor 'sign'; there are: dense, 8 bits"):
        convergence.main(only=["sign"], out=tmp_path)


@pytest.mark.parametrize(
    ("loss", "step"), [(5.0, 0), (4.0, 0), (3.5, 5), (3.0, 10), (2.6, 18), (2.2, 27.5), (1.0, 30)]
)
def test_steps_that_a_dense_training_takes(loss: float, step: float) -> None:
    """On the line between two looks, the first that are as low; all, if none is."""
    dense = [(0, 4.0), (10, 3.0), (20, 2.5), (25, 2.7), (30, 1.7)]
    assert report.equal_step(dense, loss) == pytest.approx(step)


def test_text_is_held_out() -> None:
    text = load_text()
    assert text.train.numel() > 5 * text.validation.numel() > 500_000
    read, following = text.windows(torch.tensor([7, 1000]))
    assert read.shape == following.shape == (2, CONTEXT)
    assert bytes(read[0].tolist()) == bytes(text.train[7 : 7 + CONTEXT].tolist())
    assert torch.equal(read[:, 1:], following[:, :-1])
    held = text.held_out(3)[1][-1]
    assert torch.equal(held, text.validation[-CONTEXT:].long())


def test_a_byte_is_not_told_by_those_after_it() -> None:
    torch.manual_seed(0)
    model = LanguageModel()
    read, following = load_text().held_out(2)
    with torch.no_grad():
        whole = model.loss(read, following)
        changed = read.clone()
        changed[:, -1] = 0
        last = torch.full_like(following, -100)
        last[:, :-1] = following[:, :-1]
        assert model.loss(changed, last).item() == pytest.approx(model.loss(read, last).item(), rel=1e-6)
        assert model.loss(changed, following) != whole
