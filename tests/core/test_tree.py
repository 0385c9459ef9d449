"""Laws of parameter paths and of ordered rules."""

import collections
import re

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.core import (
  label_tree,
  leaf_paths,
  map_with_paths,
  mask_tree,
  match_rules,
  multiplier_tree,
)

Pair = collections.namedtuple("Pair", ["left", "right"])
MODEL = {
  "head": {"bias": 0, "kernel": 0},
  "stages": [{"bias": 0, "kernel": 0}, {"bias": 0, "kernel": 0}],
}

names = st.text("abc_", min_size=1, max_size=3)
trees = st.recursive(
  st.integers(0, 9),
  lambda inner: (
    st.dictionaries(names, inner, max_size=3) | st.lists(inner, max_size=3)
  ),
  max_leaves=12,
)
patterns = st.sampled_from(["a.*", ".*b", "[a-c]/.*", "c", ".*/0", ".*_.*"])
tables = st.lists(st.tuples(patterns, st.integers()), max_size=5)


def test_paths_join_keys_indices_and_attributes():
  tree = {"x": [1, {"y": 2}], "z": Pair(3, {7: 4})}
  assert leaf_paths(tree) == ["x/0", "x/1/y", "z/left", "z/right/7"]


def test_path_of_a_bare_leaf_is_empty_and_of_no_leaf_is_absent():
  assert leaf_paths(1.0) == [""]
  assert leaf_paths({"a": None, "b": optax.MaskedNode()}) == []


def test_equal_paths_are_an_error():
  with pytest.raises(ValueError, match="'a/b'"):
    leaf_paths({"a/b": 1, "a": {"b": 2}})


@settings(max_examples=50, deadline=None)
@given(trees)
def test_paths_are_unique_and_in_leaf_order(tree):
  paths = leaf_paths(tree)
  assert len(set(paths)) == len(paths) == len(jax.tree.leaves(tree))
  by_map = jax.tree.leaves(map_with_paths(lambda path, x: (path, x), tree))
  assert by_map[::2] == paths
  assert by_map[1::2] == jax.tree.leaves(tree)


@settings(max_examples=100, deadline=None)
@given(tables, trees)
def test_the_first_matching_rule_decides(rules, tree):
  values = match_rules(rules, tree, default=None, allow_unused=True)
  structure = jax.tree.structure(tree)
  for path, value in zip(
    leaf_paths(tree), structure.flatten_up_to(values), strict=True
  ):
    matching = [v for p, v in rules if re.fullmatch(p, path)]
    assert value == (matching[0] if matching else None)


@settings(max_examples=50, deadline=None)
@given(tables, tables, trees)
def test_a_table_falls_back_on_the_next(first, second, tree):
  joined = match_rules(first + second, tree, default=-1, allow_unused=True)
  rest = match_rules(second, tree, default=-1, allow_unused=True)
  missing = object()
  taken = match_rules(first, tree, default=missing, allow_unused=True)
  assert joined == jax.tree.map(
    lambda a, b: b if a is missing else a, taken, rest
  )


@settings(max_examples=50, deadline=None)
@given(st.lists(patterns, max_size=3), trees)
def test_a_mask_is_the_union_of_its_patterns(some, tree):
  def mask(pattern):
    return match_rules(
      [(pattern, True)], tree, default=False, allow_unused=True
    )

  union = jax.tree.map(lambda _: False, tree)
  for pattern in some:
    union = jax.tree.map(lambda a, b: a or b, union, mask(pattern))
  rules = [(pattern, True) for pattern in some]
  assert match_rules(rules, tree, default=False, allow_unused=True) == union


def test_every_uncovered_leaf_is_listed_with_its_near_miss():
  with pytest.raises(ValueError, match="2 of 6 uncovered") as error:
    label_tree([("stages/./.*", "a"), ("heads/bias", "b")], MODEL)
  assert "'head/bias'  (near miss: 'heads/bias')" in str(error.value)
  assert "'head/kernel'" in str(error.value)
  assert "'stages/0/bias'" not in str(error.value)


def test_a_pattern_must_match_the_whole_path():
  with pytest.raises(ValueError, match=r"near miss: 'bias'"):
    label_tree([("bias", "a"), (".*kernel", "b")], MODEL)
  # "head" is found in "overhead/x", but it does not match it.
  tree = {"head": {"x": 0}, "overhead": {"x": 0}}
  assert mask_tree(["head/.*"], tree)["overhead"]["x"] is False


def test_a_rule_that_matches_nothing_is_listed_with_its_near_miss():
  with pytest.raises(ValueError, match=r"1 of 2") as error:
    match_rules([("haed/bias", 0), (".*", 1)], MODEL)
  assert "'haed/bias'  (near miss: 'head/bias')" in str(error.value)


def test_a_rule_whose_leaves_are_taken_is_reported_as_a_collision():
  with pytest.raises(ValueError, match="every rule") as error:
    match_rules([(".*", 1), ("head/.*", 2)], MODEL)
  assert "'head/.*': an earlier rule '.*' takes 'head/bias'" in str(error.value)


def test_values_may_be_anything_even_trees_and_none():
  spec = jax.sharding.PartitionSpec("x", None)
  values = match_rules([("head/.*", spec), (".*", None)], MODEL)
  assert values["head"]["bias"] is spec
  assert values["stages"][0]["bias"] is None


def test_a_tree_without_leaves_has_nothing_to_decide():
  assert multiplier_tree([(".*", 1.0)], {"a": optax.MaskedNode()}) == {
    "a": optax.MaskedNode()
  }


def test_labels_drive_a_partition():
  labels = label_tree([("head/.*", "fast"), (".*", "slow")], MODEL)
  params = jax.tree.map(lambda _: np.ones(2, np.float32), MODEL)
  tx = optax.partition({"fast": optax.sgd(1.0), "slow": optax.sgd(0.5)}, labels)
  updates, _ = tx.update(params, tx.init(params))
  np.testing.assert_array_equal(updates["head"]["bias"], -1.0)
  np.testing.assert_array_equal(updates["stages"][1]["kernel"], -0.5)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: match_rules([("(", 1)], MODEL), "regular expression"),
    (lambda: mask_tree("head/.*", MODEL), "sequence of strings"),
    (lambda: multiplier_tree([(".*", -1.0)], MODEL), "not negative"),
    (lambda: multiplier_tree([(".*", float("nan"))], MODEL), "finite"),
  ],
)
def test_wrong_tables_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
