"""Laws of placement: every array is placed, and mistakes are named by path."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from deepseek_jax import models, nn, optim, parallel
from deepseek_jax.core import tree as tree_lib

MESH = AbstractMesh((2, 2, 2), ("stage", "fsdp", "tensor"))
TREE = {
  "layers": {"layers": {"0": {"kernel": jnp.ones((4, 6, 8))}}},
  "head": {"kernel": jnp.ones((6, 8)), "bias": jnp.ones(8)},
}


def _language(**options):
  options = {"features": 16, "num_layers": 2, "num_heads": 2} | options
  return models.LanguageModel(32, rngs=nnx.Rngs(0), **options)


def _dynamic(**options):
  return {
    "attention": "dynamic",
    "attention_options": {"block_size": 8, "window": 16, **options},
  }


def _classifier(**options):
  return models.Classifier(
    (8, 8, 1),
    10,
    channels=(4, 4),
    lstm_features=16,
    rngs=nnx.Rngs(0),
    **options,
  )


_SCHEDULE = [[0, None], [5, 2]]
MODELS = {
  "full": (parallel.LANGUAGE_MODEL, lambda: _language(num_kv_heads=1)),
  "untied": (
    parallel.LANGUAGE_MODEL,
    lambda: _language(tied=False, scan=True, dropout=0.1),
  ),
  "experts": (
    parallel.LANGUAGE_MODEL,
    lambda: _language(
      experts=4, experts_options={"num_shared": 1}, scan=True, hidden=8
    ),
  ),
  "dynamic": (
    parallel.LANGUAGE_MODEL,
    lambda: _language(**_dynamic(learn_window=True, schedule=_SCHEDULE)),
  ),
  **{
    name: (
      parallel.LANGUAGE_MODEL,
      lambda name=name: _language(activation=name, num_layers=1),
    )
    for name in nn.SPARSE_ACTIVATIONS
  },
  "classifier": (
    parallel.CLASSIFIER,
    lambda: _classifier(norm="batch", bidirectional=True, lstm_layers=2),
  ),
  "dynamic classifier": (
    parallel.CLASSIFIER,
    lambda: _classifier(norm="layer", pooling="attention", **_dynamic()),
  ),
}


def _state(build):
  """The shapes of a model's parameters and of its other state."""

  def split():
    _, params, rest = nnx.split(build(), nnx.Param, ...)
    return nnx.to_pure_dict(nnx.as_pure(params)), nnx.to_pure_dict(
      nnx.as_pure(rest)
    )

  return jax.eval_shape(split)


@pytest.fixture(scope="module")
def states():
  return {name: _state(build) for name, (_, build) in MODELS.items()}


def test_every_array_of_every_model_has_a_rule_of_its_own(states):
  for name, (table, _) in MODELS.items():
    named = table[: -len(parallel.DEFAULT)]
    for part in states[name]:
      tree_lib.match_rules(named, part, allow_unused=True)


def test_every_rule_of_every_table_decides_something(states):
  for table in (parallel.LANGUAGE_MODEL, parallel.CLASSIFIER):
    paths = [
      path
      for name, (its_table, _) in MODELS.items()
      for part in states[name]
      for path in tree_lib.leaf_paths(part)
      if its_table is table
    ]
    named = table[: -len(parallel.DEFAULT)]
    tree_lib.match_rules(named, dict.fromkeys(paths, 0.0))


def test_a_block_reads_by_columns_and_writes_by_rows(states):
  found = parallel.specs(states["untied"][0], parallel.LANGUAGE_MODEL, MESH)
  layer = found["layers"]["layers"][0]
  for name in ("query", "key", "value"):
    assert layer["attention"][name]["kernel"] == P("stage", "fsdp", "tensor")
  assert layer["attention"]["out"]["kernel"] == P("stage", "tensor", "fsdp")
  forward = layer["feed_forward"]
  assert forward["gate"]["kernel"] == P("stage", "fsdp", "tensor")
  assert forward["inward"] == P("stage", "tensor", "fsdp")
  assert forward["outward"]["kernel"] == P("stage", "tensor", "fsdp")
  assert layer["attention_norm"]["scale"] == P("stage")
  assert found["embedding"]["embedding"] == P("tensor", "fsdp")
  assert found["head"]["kernel"] == P("fsdp", "tensor")
  assert found["norm"]["scale"] == P()


def test_experts_are_cut_from_each_other_and_within(states):
  mesh = AbstractMesh((2,) * 4, ("stage", "fsdp", "expert", "tensor"))
  found = parallel.specs(states["experts"][0], parallel.LANGUAGE_MODEL, mesh)
  forward = found["layers"]["layers"][0]["feed_forward"]
  for name in ("gate", "up"):
    assert forward["experts"][name] == P("stage", "expert", "fsdp", "tensor")
  assert forward["experts"]["down"] == P("stage", "expert", "tensor", "fsdp")
  assert forward["router"]["kernel"] == P("stage")
  assert forward["shared"]["inward"] == P("stage", "tensor", "fsdp")


def test_on_one_device_everything_is_whole(states):
  mesh = AbstractMesh((1,) * 7, parallel.AXES)
  for name, (table, _) in MODELS.items():
    found = parallel.joint_specs(states[name], table, mesh)
    assert {*jax.tree.leaves(found)} == {P()}


def test_specs_speak_of_one_layer_of_a_stack():
  rules = [
    ("layers/.*", P(None, ("fsdp", "tensor"))),
    ("head/kernel", P("tensor")),
    (".*", P()),
  ]
  found = parallel.specs(TREE, rules, MESH)
  stacked = found["layers"]["layers"]["0"]["kernel"]
  assert stacked == P("stage", None, ("fsdp", "tensor"))
  assert found["head"] == {"kernel": P("tensor"), "bias": P()}
  flat = AbstractMesh((4,), ("fsdp",))
  found = parallel.specs(TREE, rules, flat)
  assert found["layers"]["layers"]["0"]["kernel"] == P(None, None, "fsdp")


def test_the_users_rules_decide_first():
  rules = parallel.merge([("head/bias", P("tensor"))], parallel.DEFAULT)
  assert parallel.specs(TREE, rules, MESH)["head"] == {
    "kernel": P(),
    "bias": P("tensor"),
  }


@pytest.mark.parametrize(
  ("rules", "said"),
  [
    ([("head/.*", P())], [r"cover every leaf.*\n.*layers/layers/0/kernel"]),
    (
      [("hat/kernel", P()), ("head/.*", P())],
      ["layers/layers/0/kernel", r"'hat/kernel'  \(near miss: 'head/kernel'"],
    ),
    ([("head/.*", P()), ("head/bias", P()), (".*", P())], ["an earlier rule"]),
    (
      [(".*", P("tensr"))],
      [r"rule '.*': .*got 'tensr'; did you mean 'tensor'"],
    ),
    ([(".*", P(("fsdp", "fsdp")))], ["one dimension only, got 'fsdp' twice"]),
    ([(".*", parallel.Largest(("fdsp",)))], ["did you mean 'fsdp'"]),
    ([(".*", "fsdp")], ["must be a PartitionSpec, Preferred or Largest"]),
    ([(".*", P(None, "tensor"))], [r"'head/bias': .*names 2 dim.*has 1"]),
    (
      [(".*kernel", P("fsdp", None)), (".*", P(("fsdp", "tensor", "stage")))],
      [],
    ),
    (
      [(".*kernel", P(("fsdp", "tensor"), None)), (".*", P(None, None))],
      [
        "got 3 that they do not",
        r"'head/bias': .*names 2 dim",
        r"'head/kernel': dimension 0 of size 6 does not divide over fsdp=2 \* "
        "tensor=2; make it a multiple of 4, cut it in 2 instead",
        "'layers/layers/0/kernel': dimension 1 of size 6",
      ],
    ),
  ],
)
def test_mistakes_in_rules_are_named_all_at_once(rules, said):
  if not said:
    parallel.specs(TREE, rules, MESH)
    return
  with pytest.raises(ValueError, match=said[0]) as error:
    parallel.specs(TREE, rules, MESH)
  for text in said[1:]:
    error.match(text)


def test_layers_that_do_not_divide_over_the_stages_are_named():
  mesh = AbstractMesh((3,), ("stage",))
  with pytest.raises(ValueError, match=r"dimension 0 of size 4 .*stage=3"):
    parallel.specs(TREE, [(".*", P())], mesh)


def test_a_preferred_cut_holds_where_it_fits():
  place = lambda shape, *dims: parallel.specs(
    {"x": jax.ShapeDtypeStruct(shape, jnp.float32)},
    [("x", parallel.Preferred(P(*dims)))],
    AbstractMesh((4, 2), ("fsdp", "tensor")),
  )["x"]
  assert place((8, 6), "fsdp", "tensor") == P("fsdp", "tensor")
  # Small and indivisible: whole.
  assert place((6, 6), "fsdp", "tensor") == P(None, "tensor")
  assert place((8, 5), "fsdp", "tensor") == P("fsdp")
  assert place((6, 6), ("tensor", "fsdp")) == P("tensor")
  # Large: fsdp cuts what it can, and tensor is an error.
  assert place((514, 512), "fsdp", "tensor") == P(None, ("tensor", "fsdp"))
  with pytest.raises(ValueError, match=r"dimension 1 of size 513 .*tensor=2"):
    place((512, 513), "fsdp", "tensor")
  # Nothing more to cut: nobody's fault.
  assert place((515, 514), "fsdp", "tensor") == P(None, "tensor")


def test_what_is_large_is_cut_along_its_largest_dimension():
  rules, mesh = parallel.DEFAULT, AbstractMesh((4,), ("fsdp",))
  found = parallel.specs(
    {
      "wide": jnp.zeros((128, 1024)),
      "odd": jnp.zeros((128, 1023)),
      "none": jnp.zeros((511, 513)),
      "small": jnp.zeros((8, 8)),
    },
    rules,
    mesh,
  )
  assert found == {
    "wide": P(None, "fsdp"),
    "odd": P("fsdp"),
    "none": P(),
    "small": P(),
  }


def test_a_rule_may_decide_leaves_of_either_tree():
  found = parallel.joint_specs(
    [{"kernel": jnp.ones(4)}, {"threshold": jnp.ones(4)}],
    [("kernel", P("fsdp")), ("threshold", P())],
    MESH,
  )
  assert found == [{"kernel": P("fsdp")}, {"threshold": P()}]


@pytest.mark.parametrize(
  "tx",
  [
    optax.adamw(0.1),
    optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)),
    optax.multi_transform(
      {"all": optax.adam(0.1)},
      lambda params: jax.tree.map(lambda _: "all", params),
    ),
    optax.inject_hyperparams(optax.adam)(0.1),
  ],
)
def test_moments_lie_as_their_parameters_do(tx):
  params = {"a": {"kernel": jnp.ones((8, 6))}, "kernel": jnp.ones((8, 6))}
  specs = {"a": {"kernel": P("fsdp")}, "kernel": P(None, "tensor")}
  state = tx.init(params)
  placed = parallel.state_specs(state, params, specs, MESH)
  pairs = zip(tree_lib.leaf_paths(state), jax.tree.leaves(placed), strict=True)
  counts = {P("fsdp"): 0, P(None, "tensor"): 0, P(): 0}
  for path, spec in pairs:
    counts[spec] += 1
    moment = path.endswith("kernel")
    expected = P("fsdp") if path.endswith("a/kernel") else P(None, "tensor")
    assert spec == (expected if moment else P()), path
  assert counts[P("fsdp")] == counts[P(None, "tensor")] >= 1


def test_the_memory_of_every_optimizer_shrinks_with_fsdp():
  params = {"kernel": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
  specs = {"kernel": P("fsdp")}
  mesh = parallel.make_mesh(parallel.MeshSpec(data=1, fsdp=8))
  for tx in (
    optim.deepseek(),
    optim.scale_by_whitening("soap"),
    optax.adam(0.1),
  ):
    state = jax.eval_shape(tx.init, params)
    placed = parallel.state_specs(state, params, specs, mesh)
    shaped = jax.tree.map(
      lambda x, spec: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec)
      ),
      state,
      placed,
    )
    large = [x for x in jax.tree.leaves(shaped) if x.size >= 2**16]
    assert large
    for leaf in large:
      assert parallel.device_bytes(leaf) == leaf.size * leaf.dtype.itemsize / 8


def test_other_state_of_a_stack_is_cut_over_its_stages():
  state = {"rest": {"layers": {"layers": {0: {"count": jnp.zeros(4)}}}}}
  placed = parallel.state_specs(state, {}, {}, MESH)
  assert jax.tree.leaves(placed) == [P("stage")]


def test_a_parameter_that_is_no_tree_has_moments_too():
  state = optax.trace(0.9).init(jnp.ones((4, 2)))
  placed = parallel.state_specs(state, jnp.ones((4, 2)), P("fsdp"), MESH)
  assert placed.trace == P("fsdp")
