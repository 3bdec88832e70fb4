"""The benchmark of what compressors cost a training: a short one, and what is made of its curves."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import gck
from bench.convergence import __main__ as convergence
from bench.convergence import cases, report, training
from bench.convergence.language import CONTEXT, LanguageModel, load_text
from gck.compressor import Compressor
from gck.kernels.quantize import Quantize
from gck.kernels.random_k import RandomK

NAMES = ["signs", "random-k 1 %"]


@pytest.mark.slow
def test_a_small_training(tmp_path: Path) -> None:
    convergence.main(steps=12, seeds=2, workers=2, only=NAMES, jobs=2, out=tmp_path)
    content = json.loads((tmp_path / "convergence.json").read_text())
    assert (tmp_path / "convergence.png").stat().st_size > 1000
    records = {record["name"]: record for record in content["records"]}
    assert set(records) == {cases.BASELINE, *NAMES}
    losses = {name: [curve[-1][1] for curve in record["curves"]] for name, record in records.items()}
    assert len({loss for found in losses.values() for loss in found}) == 6  # each trained on its own way
    firsts = [[curve[0][1] for curve in record["curves"]] for record in records.values()]
    assert firsts[0] == firsts[1] == firsts[2]  # from the same weights, on the same text
    assert firsts[0][0] != firsts[0][1]
    assert all(
        loss < first - 0.1 for found in losses.values() for loss, first in zip(found, firsts[0], strict=True)
    )
    budgets = content["dense_losses_by_steps"]
    assert [list(of_seed) for of_seed in budgets] == [["3", "6", "8", "10", "12"]] * 2
    assert [of_seed["12"] for of_seed in budgets] == losses[cases.BASELINE]
    above = records["random-k 1 %"]["above_dense"]["mean"]
    expected = [a - b for a, b in zip(losses["random-k 1 %"], losses[cases.BASELINE], strict=True)]
    assert above == pytest.approx(sum(expected) / 2)


def test_names_are_checked(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="no compressor 'sign'; there are: dense, 8 bits"):
        convergence.main(only=["sign"], out=tmp_path)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel()


def test_what_is_compressed_is_what_the_hook_compresses(model: LanguageModel) -> None:
    state = gck.ddp.HookState(gck.Sign(), model=model)
    kinds = [cases.is_compressed(parameter) for parameter in model.parameters()]
    assert kinds == [not state.bypassed(parameter) for parameter in model.parameters()]
    assert set(kinds) == {True, False}


LOCAL = [name for name, case in cases.CASES.items() if case.local_steps > 1]


@pytest.mark.parametrize("name", [name for name in cases.CASES if name not in LOCAL])
def test_one_step(name: str, model: LanguageModel) -> None:
    """Ranks end with the mean of what they sent, keep the rest if they should, and send what is said."""
    settings = cases.Settings(workers=4)
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(1)
    grads = [[torch.randn(p.shape, generator=generator) for p in parameters] for _ in range(4)]
    means = [sum(parts) / 4 for parts in zip(*[[g.clone() for g in mine] for mine in grads], strict=True)]
    ranks = training.Ranks(name, 5, settings, parameters)
    got = ranks.reduce(1, grads)
    exchanged = 16 * 4 if name.startswith("random-k") else 0  # ranks tell each other its seed
    assert all(abs(sent - cases.sent_nbytes(name, settings)) <= exchanged for sent in ranks.group.bytes_sent)
    for parameter, mean, given in zip(parameters, means, got, strict=True):
        close = torch.allclose(given, mean, atol=1e-6)
        assert close == (name == cases.BASELINE or not cases.is_compressed(parameter))
    kept = any(state.worker is not None for state in ranks.states[0])
    assert kept == (name != cases.BASELINE and ranks.case.feedback)


def test_local_steps_end_with_the_mean_of_what_each_rank_trained() -> None:
    settings, text = cases.Settings(workers=2, steps=2, look_every=1, held_out=8), load_text()
    curve = training.train("15 local steps", 3, settings)
    torch.manual_seed(3)
    first = LanguageModel()
    trained = []
    for rank in range(2):
        model = copy.deepcopy(first)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
        for step in (1, 2):
            optimizer.zero_grad()
            places = text.batches(2, 2, settings.batch, 3)[step - 1][rank]
            model.loss(*text.windows(places)).backward()
            optimizer.param_groups[0]["lr"] = settings.learning_rate_at(step)
            optimizer.step()
        trained.append(model)
    mean = copy.deepcopy(first)
    with torch.no_grad():
        for parameter, *both in zip(*(each.parameters() for each in (mean, *trained)), strict=True):
            parameter.copy_(sum(both) / 2)
    held_out = text.held_out(8)
    assert [step for step, _ in curve] == [0, 1, 2]
    assert curve[0][1] == cases.look(first, held_out)
    assert curve[-1][1] == pytest.approx(cases.look(mean, held_out), abs=1e-5)
    assert curve[-1][1] != pytest.approx(cases.look(trained[0], held_out), abs=1e-5)


@pytest.mark.parametrize("name", LOCAL)
def test_exchanges_of_local_steps(name: str) -> None:
    """Each way trains, and sends in a step what is said, less than 15 times as much in an exchange."""
    settings = cases.Settings(workers=2, steps=1, held_out=8)
    assert training.train(name, 0, settings)[-1][1] < training.train(name, 0, settings)[0][1]
    dense = cases.sent_nbytes(cases.BASELINE, settings)
    assert cases.sent_nbytes(name, settings) <= dense // 15


def options(name: str, step: int, rank: int, seed: int) -> Compressor:
    return cases.CASES[name].at(step, rank, seed)


def test_what_is_drawn() -> None:
    """Rounding by each rank for itself, places by all alike; anew at every step and in every training."""
    places = [(step, rank, seed) for step in (1, 2) for rank in (0, 1) for seed in (0, 1)]
    rounding, choice = [], []
    for place in places:
        rounded, chosen = options("4 bits, stochastic", *place), options("random-k 1 %", *place)
        assert isinstance(rounded, Quantize)
        assert isinstance(chosen, RandomK)
        rounding.append(rounded.seed)
        choice.append((place[0], place[2], chosen.seed))
    assert len(set(rounding)) == 8
    assert len(set(choice)) == len({seed for *_, seed in choice}) == 4


@pytest.mark.parametrize(
    ("loss", "steps"),
    [(5.0, 0), (4.0, 10), (3.5, 15), (3.0, 20), (2.75, 30), (2.5, 40), (2.4, math.inf), (math.nan, math.nan)],
)
def test_steps_that_a_dense_training_takes(loss: float, steps: float) -> None:
    budgets = {40: 2.5, 10: 4.0, 20: 3.0}
    assert report.steps_of_dense(budgets, loss) == pytest.approx(steps, nan_ok=True)


def test_summary_of_curves() -> None:
    curves: Mapping[str, Any] = {
        "dense": [[(0, 5.0), (40, 2.0)], [(0, 5.0), (40, 3.0)]],
        "signs": [[(0, 5.0), (40, 2.5)], [(0, 5.0), (40, 3.1)]],
        "8 bits": [[(0, 5.0), (40, 1.9)], [(0, 5.0), (40, 3.0)]],
        "4 bits": [[(0, 5.0), (40, 2.5)], [(0, 5.0), (7, math.nan)]],
    }
    budgets = [{20: 3.0, 40: 2.0}, {20: 4.0, 40: 3.0}]
    settings = cases.Settings(steps=40)
    dense, signs, eight, four = report.summary(curves, budgets, settings)
    assert dense["above_dense"] == {"mean": 0, "standard_deviation": 0}
    assert signs["above_dense"]["mean"] == pytest.approx(0.3)
    assert signs["dense_steps"]["mean"] == pytest.approx((30 + 38) / 2)
    assert eight["above_dense"]["mean"] == pytest.approx(-0.05)
    assert eight["dense_steps"] is None  # more than were tried
    assert four["loss"] is four["above_dense"] is four["dense_steps"] is None
    assert four["curves"][1][-1] == [7, None]
    (_, mixed) = report.summary({n: curves[n] for n in ("dense", "signs")}, [budgets[0], {40: 3.0}], settings)
    assert mixed["dense_steps"] is None  # of one seed fewer than were tried, of the other a number
    rows = [list(column.cells) for column in report.table([dense, signs, eight, four], settings).columns]
    assert rows[3][3] == "diverged"
    assert [cell.split(" ")[0] for cell in rows[5]] == ["", "34", "", ""]


def test_text_is_held_out() -> None:
    text = load_text()
    assert text.train.numel() > 4 * text.validation.numel() > 400_000
    train, validation = bytes(text.train.tolist()), bytes(text.validation.tolist())
    for start in range(0, len(validation) - 2000, len(validation) // 20):
        assert validation[start : start + 2000] not in train


def test_windows() -> None:
    text = load_text()
    read, following = text.windows(torch.tensor([7, 1000]))
    assert read.shape == following.shape == (2, CONTEXT)
    assert torch.equal(read[0], text.train[7 : 7 + CONTEXT].long())
    assert torch.equal(read[:, 1:], following[:, :-1])
    assert torch.equal(text.held_out(3)[1][-1], text.validation[-CONTEXT:].long())


def test_a_byte_is_not_told_by_those_after_it(model: LanguageModel) -> None:
    read, following = load_text().held_out(2)
    changed = read.clone()
    changed[:, -1] = 0
    all_but_the_last = following.clone()
    all_but_the_last[:, -1] = -100  # which cross_entropy ignores
    with torch.no_grad():
        before = model.loss(read, all_but_the_last).item()
        assert model.loss(changed, all_but_the_last).item() == pytest.approx(before, rel=1e-6)
        assert model.loss(changed, following) != model.loss(read, following)
