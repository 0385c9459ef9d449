"""Meshes that a model cannot use are refused in one line."""

import jax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import deepseek_jax as dj
from deepseek_jax import models, nn
from deepseek_jax.parallel import MeshSpec
from deepseek_jax.train import plan
from deepseek_jax.train.mesh_checks import check_mesh


def model(**options):
  return nnx.eval_shape(
    lambda: models.LanguageModel(
      64, features=8, num_heads=2, rngs=nnx.Rngs(0), **options
    )
  )


class Plain(nnx.Module):
  def __init__(self):
    self.layers = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0))])


SCAN = {"scan": True, "num_layers": 4}
GOOD = {
  "no axis": ({"fsdp": 8, "tensor": 2, "stage": 1}, {}),
  "layers": ({"stage": 2}, SCAN | {"repeats": 2}),
  "experts": ({"expert": 4}, {"experts": 8}),
  "both": ({"stage": 4, "expert": 2}, SCAN | {"experts": 2}),
  "told elsewhere": ({"stage": 2}, {}),
}
BAD = {
  "layers": (
    {"stage": 2}, SCAN | {"num_layers": 3},
    r"^num_layers must be a multiple of mesh.stage .* = 2, got num_layers=3\.$",
  ),
  "repeats": (
    {"stage": 4}, SCAN | {"repeats": 2},
    r"^num_layers .*= 4 \* 2 \* 1 = 8, got num_layers=4\.$",
  ),
  "pattern": (
    {"stage": 4}, SCAN | {"attention": ("full", "dynamic")},
    r"^num_layers .*= 4 \* 1 \* 2 = 8, got num_layers=4\.$",
  ),
  "experts": (
    {"expert": 4}, {"experts": 6},
    "^experts must be a multiple of mesh.expert=4, .*got experts=6",
  ),
  "no experts": (
    {"expert": 4}, {},
    "^mesh.expert must be 1 .*MixtureOfExperts.*LanguageModel.*expert=4",
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_meshes_that_fit_pass(name):
  sizes, options = GOOD[name]
  check_mesh(sizes, model(**options))


@pytest.mark.parametrize("name", BAD)
def test_numbers_that_do_not_divide_are_told_by_their_fields(name):
  sizes, options, said = BAD[name]
  with pytest.raises(ValueError, match=said):
    check_mesh(sizes, model(**options))


def test_an_axis_that_cuts_nothing_is_refused_unless_rules_name_it():
  for axis in ("stage", "expert"):
    with pytest.raises(
      ValueError, match=rf"mesh.{axis} must be 1 .*got {axis}"
    ):
      check_mesh({axis: 2}, Plain())
    rules = [("head", PartitionSpec(None, ("data", axis)))]
    check_mesh({axis: 2}, Plain(), rules)
    with pytest.raises(ValueError, match=axis):
      check_mesh({axis: 2}, Plain(), [(".*", PartitionSpec("data"))])


def test_a_stack_counts_whatever_it_is_called():
  linear = lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0))
  holder = Plain()
  holder.body = nn.LayerStack([linear(), linear()], scan=True)
  check_mesh({"stage": 2}, holder)


@pytest.mark.parametrize(("axis", "size"), [("stage", 2), ("expert", 4)])
def test_a_plan_of_the_classifier_refuses_what_would_idle(axis, size):
  asked = dj.train.Experiment(
    data=dj.train.Data(batch_size=16), mesh=MeshSpec(**{axis: size})
  )
  with pytest.raises(ValueError, match=rf"^mesh.{axis} must be 1 .*Classifier"):
    plan.Plan.of(asked).dry_run(jax.devices())
