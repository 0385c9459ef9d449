"""Laws of cuts: contiguous, complete, and none better."""

import itertools

import numpy as np
import pytest

from deepseek_jax import parallel


def best_of_all(costs, groups):
  """The cheapest dearest group, by looking at every cut there is."""
  places = itertools.combinations(range(1, len(costs)), groups - 1)
  cut = lambda ends: itertools.pairwise((0, *ends, len(costs)))
  return min(max(sum(costs[i:j]) for i, j in cut(ends)) for ends in places)


@pytest.mark.parametrize("seed", range(40))
def test_no_cut_of_all_is_better(seed):
  rng = np.random.default_rng(seed)
  layers = int(rng.integers(1, 13))
  costs = rng.exponential(size=layers) * rng.integers(0, 2, layers)
  costs[rng.integers(layers)] = rng.choice([1e-6, 1.0, 30.0])
  for groups in range(1, layers + 1):
    cut = parallel.cut_layers(costs.tolist(), groups)
    found = cut.group_costs.max()
    np.testing.assert_allclose(
      found, best_of_all(costs.tolist(), groups), rtol=1e-12
    )
    assert [i for group in cut.groups for i in group] == list(range(layers))
    assert all(cut.groups)
    np.testing.assert_allclose(cut.stage_costs.sum(), costs.sum())


def test_stages_of_several_groups_hold_every_sth():
  costs = [3.0, 1, 1, 1, 2, 2, 1, 1]
  cut = parallel.cut_layers(costs, stages=2, repeats=2)
  assert cut.group_costs.shape == (2, 2)
  assert cut.group_costs.max() == best_of_all(costs, 4)
  of = lambda groups: sum(costs[i] for group in groups for i in group)
  told = [of(cut.groups[stage::2]) for stage in (0, 1)]
  np.testing.assert_allclose(cut.stage_costs, told)


@pytest.mark.parametrize(("stages", "repeats"), [(4, 1), (2, 3), (3, 2)])
def test_equal_layers_leave_the_bubble_of_the_schedule(stages, repeats):
  microbatches = 2 * stages
  cut = parallel.cut_layers([2.5] * (stages * repeats * 3), stages, repeats)
  even = parallel.cut_evenly([2.5] * (stages * repeats * 3), stages, repeats)
  assert cut.imbalance == even.imbalance == 1
  np.testing.assert_allclose(
    [cut.bubble(microbatches), even.bubble(microbatches)],
    parallel.bubble(stages, microbatches, repeats),
  )


def test_the_bubble_grows_by_what_stages_wait():
  # Two visits of 1 each wait for 3: of four ticks of 3, each stage idles one.
  cut = parallel.cut_layers([1.0, 3.0], stages=2)
  assert cut.imbalance == 1.5
  np.testing.assert_allclose(cut.bubble(2), 1 - 2 * (1 + 3) / (2 * 3 * 3))
  # Two groups a stage: what they cost by tick, idle ones too, by hand.
  cut = parallel.cut_layers([1.0, 2.0, 2.0, 1.0], stages=2, repeats=2)
  assert cut.group_costs.tolist() == [[1, 2], [2, 1]]
  one, two = [1, 1, 2, 2, 1], [1, 2, 2, 1, 1]
  ticks = sum(map(max, zip(one, two, strict=True)))
  np.testing.assert_allclose(cut.bubble(2), 1 - 2 * 6 / (2 * ticks))


def test_it_says_what_it_found():
  told = parallel.cut_layers([1, 1, 2, 4], stages=2).describe(microbatches=4)
  for part in ("stage 0 | cost 4", "layers 0-2", "layers 3", "20.0%"):
    assert part in told
  assert "bubble" not in str(parallel.cut_layers([1, 1], stages=2))


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (([1.0, float("nan")], 1), r"^costs must be finite.*nan"),
    (([1.0, -1.0], 1), r"^costs must be finite.*-1.0"),
    (([0.0, 0.0], 1), "not all 0"),
    (([], 1), "not all 0"),
    (([1.0], 2), r"^stages \* repeats must be at most.*2 \* 1 = 2 for 1"),
    (([1.0] * 5, 2, 3), r"2 \* 3 = 6 for 5"),
    (([1.0], 0), "^stages must be .*got stages=0"),
  ],
  ids=str,
)
def test_what_cannot_be_cut_is_named(arguments, said):
  with pytest.raises(ValueError, match=said):
    parallel.cut_layers(*arguments)


def test_layers_that_make_no_equal_numbers_are_refused():
  with pytest.raises(ValueError, match=r"multiple of .* 2 \* 2 = 4, got 6"):
    parallel.cut_evenly([1.0] * 6, 2, 2)
