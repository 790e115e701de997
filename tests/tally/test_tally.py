"""The laws of a tally, bit for bit, and its sums and counts, judged by rational arithmetic."""

from __future__ import annotations

import io
import itertools
import math
from collections import Counter
from fractions import Fraction
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import UNIT, UNSUMMED, Batch, batches, partitions, relaxed, tally_of
from xent_metrics import GroupTally, Tally, functional
from xent_metrics.losses import TargetLosses
from xent_metrics.losses.target_losses import IGNORED, LIMIT, TARGET_OUT_OF_RANGE
from xent_metrics.readings import ExactReading, GroupReading
from xent_metrics.tally import tally_groups, tally_losses, tally_mean
from xent_metrics.tally.limbs import NUM_LIMBS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

COUNT_OF = {math.inf: "positive_infinite", -math.inf: "negative_infinite"}


def bits(tally: Tally) -> list[int]:
    """Return the numbers of a sum; adding, if only zero, is what makes them canonical."""
    return (tally + Tally.zero()).state.tolist()


def units(x: float) -> int:
    """Return what a tally adds for a float."""
    return round(Fraction(x) * UNIT)


def times(tally: Tally, factor: int) -> Tally:
    """Add a tally to itself, by Horner's rule on the bits of `factor`."""
    total = Tally.zero()
    for bit in f"{factor:b}":
        total = total + total + (tally if bit == "1" else Tally.zero())
    return total


def expected_totals(batch: Batch) -> Counter[str]:
    """Work out everything but the sums over sequences, a target at a time."""
    weight = torch.ones_like(batch.losses) if batch.weight is None else batch.weight
    expected: Counter[str] = Counter()
    for row, row_weight in zip(batch.losses.tolist(), weight.tolist(), strict=True):
        before = expected["weight"]
        for loss, w in zip(row, row_weight, strict=True):
            product = loss * w
            if w == 0:
                expected["ignored"] += 1
                continue
            expected["scored"] += 1
            if math.isnan(product):
                expected["nan"] += 1
            elif abs(product) >= LIMIT:
                expected["positive_infinite" if product > 0 else "negative_infinite"] += 1
            else:
                expected["loss"] += units(product)
                expected["weight"] += units(w)
        expected["sequences"] += expected["weight"] > before
    return expected


@relaxed
@given(batches())
def test_zero_is_the_identity(batch: Batch) -> None:
    """Adding no targets changes no bit."""
    tally = batch.tally()
    total = tally + Tally.zero()

    assert torch.equal((Tally.zero() + tally).state, total.state)
    assert torch.equal((total + Tally.zero()).state, total.state)
    assert total.totals() == tally.totals()
    assert torch.equal(batch.rows([]).tally().state, Tally.zero().state)


@relaxed
@given(batches(), batches(), batches())
def test_add_is_commutative_and_associative(first: Batch, second: Batch, third: Batch) -> None:
    """`+` gives the same bits in either order and for either bracketing."""
    a, b, c = first.tally(), second.tally(), third.tally()

    assert torch.equal((a + b).state, (b + a).state)
    assert torch.equal(((a + b) + c).state, (a + (b + c)).state)


@relaxed
@given(batches(), st.data())
def test_any_partition_gives_the_same_bits(batch: Batch, data: st.DataObject) -> None:
    """However whole sequences are dealt into batches, and in whichever order, the tally is the same."""
    parts = data.draw(partitions(len(batch.losses)))
    tallies = [batch.rows(rows).tally() for rows in parts]
    ranks = Tally(torch.stack([tally.state for tally in tallies]).sum(0))

    assert bits(sum(tallies, Tally.zero())) == bits(batch.tally())
    assert bits(ranks) == bits(batch.tally())


@relaxed
@given(batches())
def test_totals_are_rational_sums(batch: Batch) -> None:
    """Loss and weight are sums of `round(x * 2**64)` over float64 products; every target is counted once."""
    totals = batch.tally().totals()._asdict()
    expected = expected_totals(batch)

    assert {name: totals[name] for name in expected} == expected
    assert totals["scored"] + totals["ignored"] == batch.losses.numel()
    assert totals["out_of_range"] == totals["invalid_weight"] == 0


@relaxed
@given(
    batches(
        losses=st.builds(math.ldexp, st.integers(1 - 2**24, 2**24 - 1), st.integers(-36, -3)),
        weight=st.sampled_from([0.0, 1.0, 2.0, 4.0]),
    )
)
def test_sequence_sums_are_exact(batch: Batch) -> None:
    """Sums of products are exact where loss and weight of a sequence are multiples of `2**-36`."""
    weight = torch.ones_like(batch.losses) if batch.weight is None else batch.weight
    products = (batch.losses * weight).tolist()
    losses = [sum(map(Fraction, row)) * 2**36 for row in products]
    norms = [sum(map(Fraction, row)) * 2**36 for row in weight.tolist()]
    totals = batch.tally().totals()

    assert totals.loss_loss == sum(s * s for s in losses)
    assert totals.loss_weight == sum(s * w for s, w in zip(losses, norms, strict=True))
    assert totals.weight_weight == sum(w * w for w in norms)
    assert totals.wide_sequences == 0


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("value", UNSUMMED)
def test_unsummed_losses_are_only_counted(value: float, weighted: bool) -> None:
    """A loss that no limb can hold is counted, and adds nothing to any sum, as if it were not scored."""
    losses = torch.tensor([[value, 1.5], [2.0, -3.0]], dtype=torch.float64)
    weight = torch.tensor([[1.0, 0.5], [1.0, 2.0]], dtype=torch.float64) if weighted else None
    mask = torch.tensor([[0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    totals = tally_of(losses, weight).totals()
    without = tally_of(losses, mask if weight is None else mask * weight).totals()
    kind = "nan" if math.isnan(value) else COUNT_OF[math.copysign(math.inf, value)]

    assert totals == without._replace(scored=4, ignored=0, **{kind: 1})


def test_product_beyond_the_limit_is_counted() -> None:
    """A finite loss whose weighted value reaches `2**94` is counted as infinite."""
    totals = tally_of(torch.tensor([LIMIT / 4, LIMIT / 4]), torch.tensor([4.0, 2.0])).totals()

    assert (totals.positive_infinite, totals.loss, totals.weight) == (1, units(LIMIT / 2), units(2.0))


@relaxed
@given(batches(), st.data())
def test_mask_is_a_weight_of_0_or_1(batch: Batch, data: st.DataObject) -> None:
    """A boolean mask gives the bits of the same numbers as weights, whatever the loss of what it leaves out."""
    shape = batch.losses.shape
    flat = data.draw(st.lists(st.booleans(), min_size=shape.numel(), max_size=shape.numel()))
    mask = torch.tensor(flat, dtype=torch.bool).view(shape)
    tally = tally_of(batch.losses, mask)

    assert bits(tally) == bits(tally_of(batch.losses, mask.double()))
    for hidden in (math.nan, math.inf, 0.0):
        assert bits(tally) == bits(tally_of(batch.losses.masked_fill(~mask, hidden), mask))
    assert tally.totals().ignored == (~mask).sum()


def test_every_target_is_counted_once() -> None:
    """A target that is ignored, out of range and of invalid weight is counted as one of these, ignored first."""
    kinds = [(ignored, outside, w) for ignored in (0, 1) for outside in (0, 1) for w in (0.0, 1.0, -1.0)]
    ignored, outside, weight = torch.tensor(kinds, dtype=torch.float64).T.unsqueeze(1)
    losses = TargetLosses(torch.full_like(weight, 0.25)).marked(IGNORED, ignored.bool())
    totals = tally_losses(losses.marked(TARGET_OUT_OF_RANGE, outside.bool()).weighted(weight)).totals()

    assert (totals.ignored, totals.invalid_weight + totals.out_of_range, totals.scored) == (8, 3, 1)
    assert totals.invalid_weight
    assert totals.out_of_range
    assert (totals.loss, totals.weight) == (units(0.25), units(1.0))


@pytest.mark.parametrize("bad", [-1.0, -5e-324, math.nan, math.inf, -math.inf, 2.0**47])
def test_invalid_weight(bad: float) -> None:
    """A weight that is negative, not finite or huge is counted, with its loss left out; the functions raise."""
    losses, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[bad, 0.5]], dtype=torch.float64)
    totals = tally_losses(TargetLosses(losses).weighted(weight)).totals()

    assert (totals.invalid_weight, totals.scored, totals.loss, totals.weight) == (1, 1, units(1.0), units(0.5))
    with pytest.raises(ValueError, match=r"`weight` must hold finite numbers that are not negative"):
        tally_of(losses, weight)


def test_denominators_multiply_the_weight() -> None:
    """What a target adds to the denominator is its denominator (a class weight) times its weight."""
    norm = torch.tensor([[0.1, 2.0], [0.0, 3.0]])
    weight = torch.tensor([[0.7, 1.0], [5.0, 0.0]], dtype=torch.float64)
    losses = TargetLosses(torch.ones(2, 2), norm)
    unweighted, weighted = tally_losses(losses).totals(), tally_losses(losses.weighted(weight)).totals()

    assert unweighted.weight == sum(map(units, norm.flatten().tolist()))
    assert weighted.weight == units(norm[0, 0].item() * 0.7) + units(2.0)
    assert (weighted.scored, weighted.ignored, weighted.sequences) == (3, 1, 1)


@pytest.mark.parametrize("shape", [(1, 140_001), (20_001, 1), (9_001, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_batches(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The sums stay exact in large batches, with every bit of every value set, of any magnitude, and for a mixture."""
    full = [torch.nextafter(torch.tensor(2.0**e, dtype=dtype), torch.zeros((), dtype=dtype)) for e in range(-66, 95, 8)]
    mixture = torch.stack([*full, -full[-1] / 2, -full[3], torch.tensor(1 / 3, dtype=dtype), -full[9], -full[10]])
    size = math.prod(shape)
    for pattern in (*(x.view(1) for x in full), -full[-1].view(1), -full[8].view(1), mixture):
        losses = pattern.repeat(-(-size // len(pattern)))[:size].view(shape)
        values = [units(x) for x in pattern.tolist()]
        whole, rest = divmod(size, len(values))

        assert tally_of(losses).totals().loss == whole * sum(values) + sum(values[:rest])


def test_large_batches_split_anywhere() -> None:
    """Many rows, and rows of many targets, give the same bits however the rows are dealt."""
    generator = torch.Generator().manual_seed(1)
    for shape in ((3, 70_000), (20_000, 4)):
        batch = Batch(torch.randn(shape, generator=generator) * 8, torch.rand(shape, generator=generator).double())
        whole = batch.tally()
        rows = torch.randperm(shape[0], generator=generator)
        parts = [batch.rows(part).tally() for part in rows.split(-(-shape[0] // 3))]

        assert bits(sum(parts, Tally.zero())) == bits(whole)
        assert whole.totals().sequences == shape[0]
        assert whole.totals().weight == sum(units(w) for w in batch.weight.flatten().tolist())


@pytest.mark.parametrize("sign", [1, -1])
def test_totals_just_below_the_bound(sign: int) -> None:
    """Sums may come as close to `2**127` nats as `2**33` of the largest losses do, of either sign; then they stay."""
    largest = sign * math.nextafter(LIMIT, 0.0)
    tally = tally_of(torch.tensor([largest], dtype=torch.float64))
    for doubling in range(1, 34):
        tally = tally + tally

        assert tally.totals().loss == units(largest) << doubling
        assert tally.totals().scored == tally.totals().sequences == 1 << doubling
    assert (tally + Tally(-tally.state)).totals() == Tally.zero().totals()
    assert (tally + tally).totals().loss == sign * (2 ** (127 + 64) - 1)
    stacked = Tally.stack(tally, tally)  # Where nothing is read, they wrap.
    assert (stacked + stacked).unbind()[0].totals().loss == (units(largest) << 34) - sign * 2 ** (128 + 64)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_sum_of_2_to_110_nats_reads_as_infinite(sign: int) -> None:
    """One just below it is exact; one that is larger than its limbs stays so; one that has wrapped is infinite too."""
    tally = tally_of(torch.tensor([sign * 2.0**93], dtype=torch.float64))
    below = times(tally, 2**17 - 1)
    assert ExactReading(below.totals()).cross_entropy == sign * 2.0**93
    for number in (2**17, 2**33, 2**34 - 1, 2**35, 2**40 + 1):
        reading = ExactReading(times(tally, number).totals())
        assert reading.cross_entropy == sign * math.inf
        assert math.isnan(reading.cross_entropy_stderr)
    large = times(tally, 3 * 2**32)
    wrapped = Tally.stack(large, large) + Tally.stack(large, large)
    assert math.isinf(ExactReading(wrapped.unbind()[0].totals()).cross_entropy)
    groups = tally_groups(TargetLosses(torch.tensor([[sign * 2.0**93, 1.0]])), torch.tensor([[0, 1]]), 2)
    for _ in range(17):
        groups = groups + groups
    assert GroupReading(groups.totals()).in_unit("nats") == [sign * math.inf, 1.0]


@pytest.mark.parametrize("loss", [2.0**26 - 2.0**-26, -(2.0**26) + 2.0**-26, -(2.0**-64), 2.0**60])
def test_many_ranks_may_be_added_at_once(loss: float) -> None:
    """`2**31` canonical states can be added as plain integers before they are made canonical."""
    tally = tally_of(torch.tensor([loss], dtype=torch.float64)) + Tally.zero()
    ranks = Tally(tally.state * 2**31)

    assert (ranks + Tally.zero()).totals() == tuple(2**31 * total for total in tally.totals())
    assert bits(ranks) == bits(times(tally, 2**31))


def test_ten_trillion_tokens() -> None:
    """At `10**13` tokens the count and the mean are still exact."""
    losses = torch.randn(1000, generator=torch.Generator().manual_seed(2)).exp()
    tally = times(tally_of(losses), 10**10)
    exact = sum(map(Fraction, losses.tolist())) / 1000

    assert tally.totals().scored == tally.totals().sequences == 10**13
    assert tally.totals().loss == exact * 10**13 * UNIT
    assert ExactReading(tally.totals()).cross_entropy == float(exact)
    assert (tally + tally_of(torch.tensor([1.0]))).totals().scored == 10**13 + 1


@pytest.mark.parametrize("edge", [2.0**26, -(2.0**26), 2.0**40, -(2.0**90)])
def test_wide_sequences(edge: float) -> None:
    """A sequence of `2**26` nats (or of that weight) or more is counted as wide; one just below is multiplied."""
    narrow = math.copysign(abs(edge) - 2.0**-26 if abs(edge) == 2.0**26 else 2.0, edge)
    wide = tally_of(torch.tensor([[edge], [1.0]], dtype=torch.float64)).totals()
    fits = tally_of(torch.tensor([[narrow], [1.0]], dtype=torch.float64)).totals()
    heavy = tally_of(torch.tensor([[0.0], [1.0]]), torch.tensor([[min(abs(edge), 2.0**46)], [1.0]])).totals()

    assert (wide.wide_sequences, heavy.wide_sequences, fits.wide_sequences) == (1, 1, 0)
    assert wide.loss == units(edge) + units(1.0)
    assert wide.loss_loss == heavy.loss_loss == 2**72
    assert fits.loss_loss == (Fraction(narrow) ** 2 + 1) * 2**72


def test_sequences_are_rows() -> None:
    """A sequence is a row of the target, further dimensions included; where there are none, each target is its own."""
    losses = torch.arange(24.0)
    cubes = tally_of(losses.view(2, 3, 4))

    assert bits(cubes) == bits(tally_of(losses.view(2, 12)))
    assert bits(tally_of(losses)) == bits(tally_of(losses.view(24, 1)))
    assert (cubes.totals().sequences, tally_of(losses).totals().sequences) == (2, 24)
    assert cubes.totals().loss == tally_of(losses).totals().loss


def test_ignored_index_through_the_function() -> None:
    """`ignore_index` leaves a target out as a weight of 0 does, whatever its loss."""
    losses, target = torch.tensor([[math.nan, 1.0], [2.0, 4.0]]), torch.tensor([[-100, 3], [0, 9]])
    tally = functional.tally(losses, target, input="losses")

    assert bits(tally) == bits(tally_of(losses, target != -100))


@relaxed
@given(batches())
def test_save_and_load(batch: Batch) -> None:
    """A tally is one int64 tensor, which `torch.load` reads without running any code."""
    tally = batch.tally()
    file = io.BytesIO()
    torch.save(tally.state, file)
    file.seek(0)
    loaded = Tally(torch.load(file, weights_only=True))

    assert loaded.state.dtype == torch.int64
    assert loaded.totals() == tally.totals()
    assert torch.equal((loaded + tally).state, (tally + tally).state)


def test_restart_from_a_file(tmp_path: Path) -> None:
    """Half of the data, a file, and the other half give the bits of all the data."""
    losses = torch.randn(10, 3, generator=torch.Generator().manual_seed(3))
    torch.save(tally_of(losses[:4]).state, tmp_path / "tally.pt")
    resumed = Tally(torch.load(tmp_path / "tally.pt", weights_only=True)) + tally_of(losses[4:])

    assert bits(resumed) == bits(tally_of(losses))


def test_foreign_states_are_refused() -> None:
    """A state of another dtype or size is refused, with what it should be and what it was."""
    state = Tally.zero().state
    for wrong in (state.float(), state.int(), state[:-1], torch.cat([state, state]), state[0]):
        with pytest.raises(ValueError, match=r"`state` must be an int64 tensor of \d+ numbers, got torch\.\w+ of"):
            Tally(wrong)


@relaxed
@given(batches(min_rows=1), st.data())
def test_any_partition_gives_every_group_the_same_bits(batch: Batch, data: st.DataObject) -> None:
    """However targets are dealt into batches, the sums of every group are the same, and canonical."""
    group = torch.arange(batch.losses.numel()).view(batch.losses.shape) % 3
    weight = torch.full_like(batch.losses, 0.75, dtype=torch.float64) if batch.weight is None else batch.weight

    def tally(rows: list[int]) -> GroupTally:
        return tally_groups(TargetLosses(batch.losses[rows]).weighted(weight[rows]), group[rows], 3)

    parts = data.draw(partitions(len(group)))
    total = sum(map(tally, parts), GroupTally.zero(3))
    again = sum(map(tally, reversed(parts)), GroupTally.zero(3))

    assert torch.equal(total.state, (tally([*range(len(group))]) + GroupTally.zero(3)).state)
    assert torch.equal(total.state, again.state)
    for limbs in total.state[: 2 * NUM_LIMBS].unflatten(0, (2, NUM_LIMBS)):
        assert ((limbs[1:] >= 0) & (limbs[1:] < 2**32)).all()


def test_only_tallies_of_a_kind_are_added() -> None:
    """What would be broadcast, or is no tally, is refused."""
    one, groups = Tally.zero(), GroupTally.zero(34)
    for first, other in ((one, groups), (groups, one), (one, one.state), (groups, None)):
        with pytest.raises(TypeError, match=r"`\+` must add a \w*Tally to its kind, got"):
            first + other
    for first, other in ((one, Tally.zero(num_tallies=2)), (groups, GroupTally.zero(33))):
        with pytest.raises(ValueError, match=r"`\+` must add tallies of one shape, got \(\d+"):
            first + other
    for first, other in ((one, Tally.zero("meta")), (GroupTally.zero(34, "meta"), groups)):
        with pytest.raises(ValueError, match=r"`\+` must add tallies on one device, got \w+ and \w+; move"):
            first + other
    for wrong in (groups.state.float(), groups.state[:-1], groups.state[0]):
        with pytest.raises(ValueError, match=r"`state` must be an int64 tensor of 18 rows, got"):
            GroupTally(wrong)


@pytest.mark.parametrize("shape", [(1, 64), (64, 1), (8, 8), (16, 16)])  # Few targets are tallied another way.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_seen_of_a_batch_changes_nothing(
    shape: tuple[int, int], dtype: torch.dtype, hide_values: Callable[[], None]
) -> None:
    """A look at the values, which spares limbs and masks, gives the bits of a tally that was made without one."""
    generator = torch.Generator().manual_seed(4)
    sizes = [2.0**e for e in (-70, -30, 0, 14, 19.999999, 20, 20.000001, 26, 31, 33, 60)]  # 64 targets of 2**20 nats.
    batches: list[TargetLosses] = []
    weights: list[torch.Tensor | None] = []
    for size, weigh, special in itertools.product(sizes, (None, 1.0, 2.0**19, 2.0**46), (None, math.nan, math.inf)):
        losses = (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * size
        losses[0, -1] = size if special is None else special
        weight = None if weigh is None else torch.rand(shape, generator=generator, dtype=torch.float64) * weigh
        ignored = torch.rand(shape, generator=generator) < (0.3 if weigh != 1.0 else 0)
        batches.append(TargetLosses(losses.to(dtype)).marked(IGNORED, ignored))
        weights.append(weight)

    def tallies() -> list[bytes]:
        pairs = zip(batches, weights, strict=True)
        return [bits(tally_losses(losses.weighted(weight)) + Tally.zero()) for losses, weight in pairs]

    seen = tallies()
    hide_values()

    assert seen == tallies()


def test_a_mean_over_a_negative_number_of_targets_is_invalid() -> None:
    """So many targets are counted, which no other count can cancel."""
    bad = tally_mean(torch.tensor(1.0), torch.tensor(-5))
    assert (bad + tally_mean(torch.tensor(1.0), torch.tensor(5))).totals().invalid_weight == 5


@pytest.mark.parametrize("length", [2, 300])
@pytest.mark.parametrize("ignored", [False, True])
def test_a_tally_is_where_its_losses_are(length: int, ignored: bool) -> None:
    """Whatever device new tensors are made on."""
    losses, group = torch.ones(2, length), torch.zeros(2, length, dtype=torch.int64)
    status = torch.full((2, length), IGNORED, dtype=torch.int8) if ignored else None
    with torch.device("meta"):
        batch = TargetLosses(losses, None, status)
        tally, groups = tally_losses(batch), tally_groups(batch, group, 3)
        assert {x.state.device.type for x in (tally, tally + tally, groups + groups)} == {"cpu"}
