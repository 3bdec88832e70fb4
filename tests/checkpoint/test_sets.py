"""Which files are loaded, which are removed, and when: ranks save without waiting for one another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import gck
from gck.checkpoint import sets
from gck.checkpoint.sets import path_of
from gck.errors import CorruptPayloadError, StateMismatchError


def state_of(value: float) -> gck.ErrorFeedback:
    state = gck.ErrorFeedback()
    state.worker_for(torch.ones(3)).fill_(value)
    return state


def save(directory: Path, step: int, rank: int, world_size: int = 2, **options: Any) -> None:
    """The residual says which step, rank and attempt it is of."""
    value = 100 * step + rank + options.pop("mark", 0)
    gck.save_state(directory, state_of(value), rank=rank, world_size=world_size, step=step, **options)


def load(directory: Path, rank: int, world_size: int = 2, **options: Any) -> tuple[int | None, float | None]:
    state = gck.ErrorFeedback()
    loaded = gck.load_state(directory, state, rank=rank, world_size=world_size, **options)
    step = None if loaded is None else loaded.step
    return step, None if state.worker is None else float(state.worker[0])


def names(directory: Path) -> list[tuple[int, int]]:
    return sorted((int(p.name[4:16]), int(p.name[22:27])) for p in directory.iterdir())


def test_nothing_to_load(tmp_path: Path) -> None:
    assert load(tmp_path, 0) == (None, None)
    assert load(tmp_path / "not there", 0) == (None, None)
    assert gck.saved_steps(tmp_path / "not there") == []
    save(tmp_path, 10, rank=1)
    assert load(tmp_path, 0) == (None, None)
    with pytest.raises(StateMismatchError, match=r"step 10 is not complete .*of 2 ranks, \[0\] are missing"):
        load(tmp_path, 1, step=10)


def test_newest_step_of_all_ranks(tmp_path: Path) -> None:
    """Rank 0 has saved step 100, rank 1 only 90."""
    for step in (80, 90, 100):
        save(tmp_path, step, rank=0)
        if step < 100:
            save(tmp_path, step, rank=1)
    assert gck.saved_steps(tmp_path) == [80, 90]
    assert load(tmp_path, 1, read_only=True) == (90, 9001)
    assert load(tmp_path, 0, read_only=True) == (90, 9000)
    assert load(tmp_path, 0, step=80, read_only=True) == (80, 8000)
    assert (100, 0) in names(tmp_path)


def test_older_sets_go_when_newer_ones_are_complete(tmp_path: Path) -> None:
    for step in (10, 20):
        for rank in (0, 1):
            save(tmp_path, step, rank)
    save(tmp_path, 30, rank=0)
    assert names(tmp_path) == [(10, 0), (10, 1), (20, 0), (20, 1), (30, 0)]
    save(tmp_path, 30, rank=1)  # which completes it: rank 1 removes its own
    assert names(tmp_path) == [(10, 0), (20, 0), (20, 1), (30, 0), (30, 1)]
    save(tmp_path, 40, rank=0)
    assert names(tmp_path) == [(20, 0), (20, 1), (30, 0), (30, 1), (40, 0)]
    save(tmp_path, 40, rank=1, keep=1)
    assert names(tmp_path) == [(20, 0), (30, 0), (40, 0), (40, 1)]


def test_a_complete_set_is_on_the_disk_before_older_ones_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last name may have been given by another rank, whose own sync has not come yet."""
    events: list[str] = []
    unlink = Path.unlink

    def logged(path: Path, missing_ok: bool = False) -> None:
        events.append(f"unlink {path.suffix}")
        unlink(path, missing_ok)

    for step in (10, 20):
        for rank in (0, 1):
            save(tmp_path, step, rank)
    monkeypatch.setattr(Path, "unlink", logged)
    monkeypatch.setattr(sets, "sync_directory", lambda _: events.append("sync"))
    save(tmp_path, 30, rank=0, keep=1)
    assert events == ["unlink .tmp", "sync", "unlink .safetensors"]


def test_a_crash_at_any_save_leaves_a_complete_set(tmp_path: Path) -> None:
    """Saves of 3 ranks in every order that synchronous training allows, seen after each of them."""
    generator = torch.Generator().manual_seed(0)
    done = [0, 0, 0]
    for _ in range(60):
        behind = min(done)
        ready = [rank for rank in range(3) if done[rank] == behind]
        rank = ready[int(torch.randint(len(ready), (1,), generator=generator))]
        done[rank] += 1
        save(tmp_path, done[rank], rank, world_size=3, keep=1)
        steps = gck.saved_steps(tmp_path)
        assert (steps[-1] if steps else 0) == min(done)
        assert len(names(tmp_path)) <= 3 + 3 + 3


def test_files_of_a_run_that_ended_complete_nothing_later(tmp_path: Path) -> None:
    """Rank 0 saved step 20 and died; the run goes on from 10, and rank 1 comes to 20 first."""
    for rank in (0, 1):
        save(tmp_path, 10, rank)
    save(tmp_path, 20, rank=0)
    for rank in (0, 1):
        assert load(tmp_path, rank) == (10, 1000 + rank)
    save(tmp_path, 20, rank=1, mark=5)
    assert gck.saved_steps(tmp_path) == [10]
    save(tmp_path, 20, rank=0, mark=5)
    assert load(tmp_path, 0) == (20, 2005)


def test_going_back_on_purpose(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        for rank in (0, 1):
            save(tmp_path, step, rank, keep=3)
    assert load(tmp_path, 0, step=10) == (10, 1000)
    # A crash here, before rank 1 has loaded: nobody goes on from a step that was given up.
    assert gck.saved_steps(tmp_path) == [10]
    assert load(tmp_path, 1) == (10, 1001)
    assert names(tmp_path) == [(10, 0), (10, 1)]


def test_later_steps_of_another_run(tmp_path: Path) -> None:
    """What is saved would be pushed out by them, at once or later."""
    for step in (12, 16):
        save(tmp_path, step, rank=0)
        save(tmp_path, step, rank=1)
    save(tmp_path, 20, rank=1)  # which the run did not come to finish
    before = names(tmp_path)
    for options in ({}, {"keep": 5}):
        with pytest.raises(StateMismatchError, match=r"later steps than 4: \[12, 16\], of another run"):
            save(tmp_path, 4, rank=0, **options)
    assert names(tmp_path) == before
    assert load(tmp_path, 1, step=12) == (12, 1201)
    save(tmp_path, 13, rank=1)
    assert names(tmp_path) == [(12, 0), (12, 1), (13, 1), (16, 0)]
    save(tmp_path, 13, rank=0)  # the later set has lost the file of rank 1
    lone = tmp_path / "rank"
    for step in (12, 16):
        save(lone, step, rank=0, shared=False)
    with pytest.raises(StateMismatchError, match=r"\[12, 16\]"):
        save(lone, 4, rank=0, shared=False)
    save(lone, 14, rank=0, shared=False)
    assert names(lone) == [(14, 0), (16, 0)]


def test_saving_a_step_again(tmp_path: Path) -> None:
    for rank in (0, 1):
        save(tmp_path, 10, rank)
        save(tmp_path, 10, rank, mark=7)
    assert load(tmp_path, 1) == (10, 1008)


def test_other_world_sizes_in_one_directory(tmp_path: Path) -> None:
    for rank in range(5):
        save(tmp_path, 10, rank, world_size=5)
    save(tmp_path, 20, rank=4, world_size=5)
    with pytest.raises(
        StateMismatchError, match=r"step 10 was saved by 5 ranks, this world has 2; reshard=T"
    ):
        load(tmp_path, 0)
    for rank in (0, 1):
        assert load(tmp_path, rank, reshard=True)[0] == 10
    assert names(tmp_path) == [(10, rank) for rank in range(5)]
    for rank in (0, 1):
        save(tmp_path, 10, rank)
    assert load(tmp_path, 0) == (10, 1000)  # this world's own, not the other's
    for step in (11, 12):
        for rank in (0, 1):
            save(tmp_path, step, rank)
    save(tmp_path, 13, rank=0)
    # Rank 0 has removed those of ranks 0, 2 and 4, rank 1 the others.
    assert names(tmp_path) == [(11, 0), (11, 1), (12, 0), (12, 1), (13, 0)]


def test_a_directory_a_rank(tmp_path: Path) -> None:
    homes = [tmp_path / "0", tmp_path / "1"]
    for step in (10, 20, 30):
        save(homes[0], step, 0, shared=False)
        if step < 30:
            save(homes[1], step, 1, shared=False)
    mine = [gck.saved_steps(home, rank=rank, world_size=2) for rank, home in enumerate(homes)]
    assert mine == [[20, 30], [10, 20]]
    common = max(set(mine[0]) & set(mine[1]))
    for rank, home in enumerate(homes):
        assert load(home, rank, step=common, shared=False) == (20, 2000 + rank)
    assert gck.saved_steps(homes[0], rank=0, world_size=2) == [20]


def test_a_directory_that_is_not_shared_although_it_was_said_to_be(tmp_path: Path) -> None:
    """It would go on as if nothing had been saved. Whoever looks is told, also of nodes of several ranks."""
    for ranks in ([1], [1, 3]):
        home = tmp_path / str(len(ranks))
        for step in (10, 20):
            for rank in ranks:
                save(home, step, rank, world_size=4)
            # Others may have been killed before they saved.
            assert load(home, 1, world_size=4) == (None, None)
        for step in (30, 40):
            for rank in ranks:
                save(home, step, rank, world_size=4)
            for rank in range(4):
                steps = r"of every step \(\[10, 20, 30(, 40)?\]\); .* shared=False"
                with pytest.raises(StateMismatchError, match=steps):
                    load(home, rank, world_size=4)
        assert load(home, 1, world_size=4, step=40, shared=False) == (40, 4001)
    strange = tmp_path / "1/gck-000000000050-rank-00001-of-2147483647.safetensors"
    strange.write_bytes(b"?")
    assert load(tmp_path / "1", 1, world_size=4) == (None, None)


def test_other_files_do_not_matter(tmp_path: Path) -> None:
    for rank in (0, 1):
        save(tmp_path, 10, rank)
    others = (
        "gck-000000000020-rank-00000-of-00001.safetensors.bak",
        "gck-20-rank-0-of-1.safetensors",
        "gck-000000000020-rank-00003-of-00002.safetensors",
        "gck-0000000000020-rank-00000-of-00001.safetensors",
        "gck-000000000020-rank-00000-of-2147483647.safetensors",
        ".gck-rank-00000-of-00001.tmp",
        "model-20.pt",
    )
    for name in others:
        (tmp_path / name).write_bytes(b"?")
    assert gck.saved_steps(tmp_path) == [10]
    assert load(tmp_path, 0, read_only=True) == (10, 1000)
    save(tmp_path, 30, 0)
    assert set(others) <= set(os.listdir(tmp_path))


def test_a_renamed_file(tmp_path: Path) -> None:
    save(tmp_path, 10, 0, world_size=1)
    path_of(tmp_path, 10, 0, 1).rename(path_of(tmp_path, 20, 0, 1))
    with pytest.raises(CorruptPayloadError, match="was written as step 10 of rank 0 of 1: it was renamed"):
        load(tmp_path, 0, world_size=1)


def test_a_file_where_the_directory_should_be(tmp_path: Path) -> None:
    """Not as if nothing had been saved yet: training would begin anew."""
    (tmp_path / "state").write_text("x")
    with pytest.raises(NotADirectoryError):
        gck.load_state(tmp_path / "state", gck.ErrorFeedback(), rank=0, world_size=1)
    assert gck.load_state(tmp_path / "other", gck.ErrorFeedback(), rank=0, world_size=1) is None
