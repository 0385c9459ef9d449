"""Every shape as a matrix: where it is cut, and what stays together."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.optim.folding import fold, matrix_shape

SHAPES = st.lists(st.integers(1, 6), max_size=5).map(tuple)


@pytest.mark.parametrize(
  ("shape", "stacked", "expected"),
  [
    ((), 0, (1, 1, 1)),
    ((7,), 0, (1, 7, 1)),
    ((7, 1), 0, (1, 7, 1)),
    ((64, 32), 0, (1, 64, 32)),
    ((3, 3, 16, 32), 0, (1, 144, 32)),  # a convolution
    ((1, 1, 16, 32), 0, (1, 16, 32)),
    ((64, 4, 16), 0, (1, 64, 64)),  # a query
    ((4, 16, 64), 0, (1, 64, 64)),  # the output of attention
    ((2, 1, 2), 0, (1, 2, 2)),
    ((12, 64, 256), 1, (12, 64, 256)),
    ((2, 12, 64, 4, 16), 2, (24, 64, 64)),
    ((12, 64), 1, (12, 64, 1)),
    ((12, 64), 2, (768, 1, 1)),
  ],
)
def test_known_kernels_are_cut_where_they_should(shape, stacked, expected):
  assert matrix_shape(shape, stacked) == expected


@pytest.mark.parametrize("stacked", [-1, 3])
def test_stacks_of_axes_that_are_not_there_are_named(stacked):
  message = rf"stacked must be in \[0, 2\], got stacked={stacked}"
  with pytest.raises(ValueError, match=message):
    matrix_shape((3, 4), stacked)


@given(shape=SHAPES, stacked=st.integers(0, 5))
def test_no_cut_is_squarer_and_nothing_is_lost(shape, stacked):
  stacked = min(stacked, len(shape))
  found = matrix_shape(shape, stacked)
  assert math.prod(found) == math.prod(shape)
  assert found.stack == math.prod(shape[:stacked])
  for cut in range(stacked + 1, len(shape)):
    rows, columns = math.prod(shape[stacked:cut]), math.prod(shape[cut:])
    assert min(rows, columns) <= min(found.rows, found.columns)


def test_a_fold_keeps_stacks_rows_and_columns_apart():
  leaf = jnp.arange(2 * 6 * 2 * 3).reshape(2, 6, 2, 3)
  folded = fold(leaf, matrix_shape(leaf.shape, 1))
  assert folded.shape == (2, 6, 6)
  np.testing.assert_array_equal(folded[1, 4], leaf[1, 4].ravel())
