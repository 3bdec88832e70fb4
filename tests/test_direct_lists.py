"""Lists of payloads that the compiled module decodes where they lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gck
from gck.errors import ArgumentError, CorruptPayloadError, LayoutError, ShapeMismatchError
from gck.ops import decode, direct
from tests.cases import one_nan
from tests.test_direct import Ways, inputs, needs_table, same, variants

RANKS = 11  # more than are added up together


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Ways:
    return Ways(monkeypatch)


def payloads_of(make: Any, n: int, ranks: int) -> list[Any]:
    """Of gradients of other sizes, too, so that their memory is of no order."""
    made = []
    for rank in range(ranks):
        grad, err = inputs(n + rank)
        made.append(make(grad[:n].clone(), err[:n].clone()))
    return made[::2][::-1] + made[1::2]


def with_fields(payload: Any, *fields: torch.Tensor) -> Any:
    return type(payload)(*fields, *payload[len(fields) :])


@needs_table
@variants
@pytest.mark.parametrize("ranks", [1, 2, RANKS])
@pytest.mark.parametrize("n", [1, 7, 1000, 70_001])
def test_the_bytes_of_the_long_way(
    make: Any, n: int, ranks: int, ways: Ways, monkeypatch: pytest.MonkeyPatch
) -> None:
    payloads = payloads_of(make, n, ranks)
    dense = ways.long(lambda: gck.decompress(payloads))
    added = ways.long(lambda: gck.decompress_add_(dense.clone(), payloads, 0.3))

    def not_to_be_copied(*_: Any) -> None:
        raise AssertionError("payloads were put into one buffer")

    monkeypatch.setattr(decode, "_bodies", not_to_be_copied)
    assert same(one_nan(ways.short(lambda: gck.decompress(payloads))), one_nan(dense))
    out = torch.full((n,), 3.0)
    version = out._version
    assert ways.short(lambda: gck.decompress(payloads, out)) is out
    assert out._version > version
    assert torch.equal(one_nan(out), one_nan(dense))
    assert ways.short(lambda: gck.decompress_add_(out, payloads, 0.3)) is out
    assert torch.equal(one_nan(out), one_nan(added))
    assert ways.short(lambda: gck.decompress_add_(out, [payloads[0]] * 3)) is out  # the same one again


@needs_table
@variants
def test_messages_that_came_one_by_one(make: Any, ways: Ways) -> None:
    """As a server of many clients gets them."""
    payloads = payloads_of(make, 5000, RANKS)
    received = [gck.from_bytes(gck.to_bytes(payload)) for payload in payloads]
    dense = ways.short(lambda: gck.decompress(received))
    assert dense is not None
    assert same(one_nan(dense), one_nan(ways.long(lambda: gck.decompress(payloads))))


@needs_table
@variants
def test_fields_of_their_own(make: Any, ways: Ways) -> None:
    """Where fields lie at other distances than in the first payload, all are put into one buffer."""
    payloads = payloads_of(make, 1000, 3)
    dense = ways.long(lambda: gck.decompress(payloads))
    memory = torch.zeros(3 * payloads[0].nbytes + 300, dtype=torch.uint8)
    place, apart = 0, []
    for field in payloads[1].fields:
        lies = memory[place : place + field.nbytes].view(field.dtype).view(field.shape)
        place += (field.nbytes + 15) // 16 * 16 + 64  # further than in a body
        apart.append(lies.copy_(field))
    given = [payloads[0], with_fields(payloads[1], *apart), payloads[2]]
    alone = len(apart) == 1  # a field has no distance to itself
    assert (ways.short(lambda: gck.decompress(given)) is not None) == alone or not apart[1].numel()
    assert same(one_nan(gck.decompress(given)), one_nan(dense))
    # All of them so: it is the same distance again.
    alike = [with_fields(payload, *apart) for payload in payloads]
    assert ways.short(lambda: gck.decompress(alike)) is not None
    assert same(one_nan(gck.decompress(alike)), one_nan(ways.long(lambda: gck.decompress([payloads[1]] * 3))))


@needs_table
def test_a_list_that_another_thread_changes_meanwhile(ways: Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it has been looked at, no one can take payloads out of it."""
    payloads = payloads_of(gck.sign_ef_, 1000, 3)
    dense = gck.decompress(payloads)
    look = direct._decoder

    def looking(payload: Any) -> Any:
        seen = look(payload)
        if payload is payloads_given[-1]:
            changed.clear()
            changed.extend([None, (1,), ()])
        return seen

    payloads_given, changed = payloads, list(payloads)
    monkeypatch.setattr(direct, "_decoder", looking)
    assert torch.equal(ways.short(lambda: gck.decompress(changed)), dense)
    assert changed == [None, (1,), ()]


@needs_table
def test_arrays_and_whole_numbers(ways: Ways) -> None:
    payloads = payloads_of(gck.sign_ef_, 1000, 3)
    for given in (payloads, payloads[0]):
        out = torch.ones(1000)
        array = out.clone().numpy()
        assert ways.short(lambda given=given, out=out: gck.decompress_add_(out, given, 2)) is out
        wanted = ways.long(lambda given=given: gck.decompress_add_(torch.ones(1000), given, 2))
        assert torch.equal(out, wanted)
        assert gck.decompress_add_(array, given, 2.0) is array
        assert torch.equal(torch.from_numpy(array), out)


@needs_table
@variants
@pytest.mark.parametrize("n", [1, 1000, 70_001])
def test_a_weight_each(make: Any, n: int, ways: Ways) -> None:
    """The bytes of one after the other, in one pass and otherwise."""
    payloads = payloads_of(make, n, RANKS)
    weights = [0.3, -2.0, 1, 0.0, 1e-3, 7.0, 1.0, 0.5, 1 / 3, 2.5, -0.1]
    base = torch.linspace(-2, 3, n)
    wanted = base.clone()
    for payload, weight in zip(payloads, weights, strict=True):
        gck.decompress_add_(wanted, payload, weight)
    for way in (ways.short, ways.long):
        out = base.clone()
        assert way(lambda out=out: gck.decompress_add_(out, payloads, weights)) is out
        assert torch.equal(one_nan(out), one_nan(wanted))
    array = base.clone().numpy()
    assert gck.decompress_add_(array, payloads, tuple(weights)) is array  # type: ignore[arg-type]
    assert torch.equal(one_nan(torch.from_numpy(array)), one_nan(wanted))
    ones = [torch.zeros(n), torch.zeros(n)]
    gck.decompress_add_(ones[0], payloads, [1.0] * RANKS)
    gck.decompress_add_(ones[1], payloads)
    assert torch.equal(*map(one_nan, ones))


@needs_table
def test_weights_that_do_not_fit(ways: Ways) -> None:
    out = torch.ones(64)
    signs = gck.sign_ef_(*inputs(64), 32)
    topk = gck.topk_ef_(*inputs(64), k=3)
    beyond = topk._replace(indices=topk.indices.clone())
    beyond.indices[1] = 64
    for payload, weights, error, text in (
        (signs, [1.0], ArgumentError, "got 1 numbers and one payload$"),
        ([signs], [], ArgumentError, "got 0 numbers and 1 payloads$"),
        ([], [], ArgumentError, r"at least one, got \[\]$"),
        ([signs, signs], [1.0], ArgumentError, "got 1 numbers and 2 payloads$"),
        ([signs, signs], [1.0, float("nan")], ArgumentError, "must be a finite number of fp32, got nan$"),
        ([signs, signs], [1.0, True], ArgumentError, "must be a finite number of fp32, got True$"),
        ([signs, topk], [1.0, 1.0], ShapeMismatchError, "payload 1 must be of the kind"),
        ([topk, beyond], [1.0, 1.0], CorruptPayloadError, "^decompress_add_: payload 1: indices must ascend"),
        ([topk, topk._replace(values=out[:3])], [1.0, 1.0], LayoutError, "overlap in memory"),
    ):
        with pytest.raises(error, match=text):
            gck.decompress_add_(out, payload, weights)  # type: ignore[arg-type]
        assert torch.equal(out, torch.ones(64))


@needs_table
def test_lists_that_are_left_to_others(ways: Ways) -> None:
    out = torch.ones(64)
    signs, other = gck.sign_ef_(*inputs(64), 32), gck.sign_ef_(*inputs(64), 64)
    values = gck.random_k_ef_(*inputs(64), k=3, seed=1)
    codes, means = gck.quantize_ef_(*inputs(64), 2, 64), gck.quantize_ef_(*inputs(64), 2, 64, scale="mean")
    topk = gck.topk_ef_(*inputs(64), k=3)
    beyond = topk._replace(indices=topk.indices.clone())
    beyond.indices[1] = 64
    for wrong in (
        [],
        [signs, other],
        [signs, signs._replace(numel=65)],
        [signs, signs._replace(numel=True)],
        [signs, None],
        [signs, topk],
        [signs, [signs]],
        [values, values._replace(seed=2)],
        [values, values._replace(seed=True)],
        [codes, means],
        [topk, gck.topk_ef_(*inputs(64), k=4)],
        [topk, topk._replace(values=topk.values.double())],
        [topk, topk._replace(values=topk.values.to("meta"))],
        [topk, beyond],
    ):
        ways.both_refuse(lambda wrong=wrong: gck.decompress(wrong, out), out)
        ways.both_refuse(lambda wrong=wrong: gck.decompress_add_(out, wrong), out)
    every = gck.topk_ef_(*inputs(64), k=64)
    ways.both_refuse(lambda: gck.decompress([topk, topk, topk], topk.values), *topk.fields)
    ways.both_refuse(lambda: gck.decompress([every, every], every.values), *every.fields)
