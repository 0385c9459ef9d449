"""Gradient averages in whole numbers of few bits, in bfloat16, and in signs."""

from collections.abc import Sequence

import optax

from deepseek_jax.comm.axes import Axes, AxisName
from deepseek_jax.comm.codecs import Halved, Largest, Rounded, Signs
from deepseek_jax.comm.exchange import MIN_SIZE, exchange
from deepseek_jax.comm.methods import Blockwise
from deepseek_jax.comm.two_shot import TwoShot
from deepseek_jax.core.arguments import (
  require_in,
  require_one_of,
  require_static,
)
from deepseek_jax.core.typing import PyTree


def int_all_reduce(
  axis_name: AxisName,
  *,
  bits: int = 8,
  block: int | None = None,
  error_feedback: bool = True,
  specs: PyTree | None = None,
  min_size: int = MIN_SIZE,
  exempt: Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
  """Averages gradients over devices in whole numbers of 8 or 4 bits.

  With g the gradient of a device and e what it has not sent yet, blocks of
  g + e are rounded to multiples of their largest element / 127 (or 7) and sent
  in two shots, see `TwoShot`; e becomes what rounding took away, and the mean
  that goes back has an error of its own. So nothing is lost: over steps, the
  sum of what is applied is the sum of the gradients, less what e holds.

  It does the all-reduce itself, so call `update` inside `jax.shard_map` with
  each device's own gradient, and `check_vma=False`:

      tx = optax.chain(comm.int_all_reduce("data"), optax.adam(1e-3))
      opt_state = comm.init(tx, params, mesh, "data")
      specs = comm.state_specs(opt_state, "data")

      @jax.jit
      @partial(jax.shard_map, mesh=mesh, in_specs=(P(), specs, P("data")),
               out_specs=(P(), specs), check_vma=False)
      def step(params, opt_state, batch):
        grads = jax.grad(loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

  With parameters in parts (fsdp), gather them for the loss, hand whole
  gradients and the parts to `update`, and say how they are cut in `specs`: a
  device gets its part of the mean, and the second shot is left out.

  It pays on slow links only: encoding takes time too, see the README.

  Args:
    axis_name: The mesh axis, or axes, over which the batch is split.
    bits: 8 or 4.
    block: Elements that share a scale of 4 bytes, even; 256 for 8 bits and 128
      for 4 when None.
    error_feedback: Whether what is not sent is kept for the next time: in
      float32, as large as the gradient, and once more over the number of
      devices. Not to be given up lightly with 4 bits.
    specs: A `PartitionSpec` for every parameter, or for all, of those that are
      cut over one axis of `axis_name`; None where all are whole.
    min_size: Parameters with fewer elements, and vectors such as norms and
      biases, are averaged in float32.
    exempt: Regular expressions of the paths of others that are.

  Returns:
    An `optax.GradientTransformationExtraArgs`. Updates are the mean, the same
    on all devices that hold the same part. Elements of a device's gradient that
    are not finite count as 0, and never get into what is kept. Its state is an
    `ExchangeState`; see `init` for making it and `state_specs` for its place.

  Raises:
    ValueError: If an argument is out of its range; at `init` and `update`,
      outside of a `shard_map` with these axes.

  References:
    Seide et al., "1-Bit Stochastic Gradient Descent", 2014 (error feedback)
    Karimireddy et al., "Error Feedback Fixes SignSGD", 2019,
    https://arxiv.org/abs/1901.09847
    Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", 2015,
    https://arxiv.org/abs/1511.04561
  """
  require_one_of((8, 4), bits=bits)
  block = (256 if bits == 8 else 128) if block is None else block
  codec = Rounded(bits, block)
  shots = TwoShot(Axes.of(axis_name, specs), codec, codec, error_feedback)
  return exchange(
    Blockwise(shots), specs=specs, min_size=min_size, exempt=exempt, warmup=0
  )


def bf16_all_reduce(
  axis_name: AxisName,
  *,
  error_feedback: bool = False,
  specs: PyTree | None = None,
  min_size: int = MIN_SIZE,
  exempt: Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
  """Averages gradients over devices in bfloat16; sums are in float32.

  Half of the bytes of float32, on every backend. The arguments, and how to use
  it, are those of `int_all_reduce`.

  Args:
    axis_name: The mesh axis, or axes, over which the batch is split.
    error_feedback: Whether what rounding takes away is kept.
    specs: Of parameters that are cut over one of the axes.
    min_size: Parameters with fewer elements are averaged in float32.
    exempt: Patterns of others that are.

  Returns:
    An `optax.GradientTransformationExtraArgs`, as `int_all_reduce` does.

  Raises:
    ValueError: As `int_all_reduce`.
  """
  shots = TwoShot(Axes.of(axis_name, specs), Halved(), Halved(), error_feedback)
  return exchange(
    Blockwise(shots), specs=specs, min_size=min_size, exempt=exempt, warmup=0
  )


def one_bit(
  axis_name: AxisName,
  *,
  block: int = 1024,
  warmup: int = 0,
  refresh: int = 64,
  specs: PyTree | None = None,
  min_size: int = MIN_SIZE,
  exempt: Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
  """Averages gradients over devices in one bit an element.

  What is sent of g + e is its sign, and the mean magnitude of each block, both
  from the devices and back to them, with error feedback on both sides; see
  `int_all_reduce` for how to use it.

  One bit cannot say zero. Elements that were zero in the gradients of all
  devices so far, as the embeddings of tokens that never came, stay zero: which
  those are is exchanged every `refresh` steps, and what other elements get
  meanwhile waits in e. It starts best when the optimizer's moments are known:
  let `warmup` cover the learning rate's.

  Args:
    axis_name: The mesh axis, or axes, over which the batch is split.
    block: Elements that share a scale of 4 bytes, a multiple of 8.
    warmup: Exchanges at the start that are in float32, at least 0.
    refresh: Exchanges between two looks at where zeros are, at least 1.
    specs: Of parameters that are cut over one of the axes.
    min_size: Parameters with fewer elements are averaged in float32.
    exempt: Patterns of others that are.

  Returns:
    An `optax.GradientTransformationExtraArgs`, as `int_all_reduce` does.

  Raises:
    ValueError: As `int_all_reduce`.

  References:
    Tang et al., "1-bit Adam", 2021, https://arxiv.org/abs/2102.02888 (errors on
    both sides, and the warm-up)
    Seide et al., "1-Bit Stochastic Gradient Descent", 2014
  """
  require_static(1, refresh=refresh)
  require_static(0, warmup=warmup)
  codec = Signs(block)
  shots = TwoShot(Axes.of(axis_name, specs), codec, codec, True)
  return exchange(
    Blockwise(shots, refresh, warmup),
    specs=specs,
    min_size=min_size,
    exempt=exempt,
    warmup=warmup,
  )


def top_k(
  axis_name: AxisName,
  *,
  fraction: int | float = 0.01,
  second_fraction: int | float | None = None,
  block: int = 1024,
  warmup: int = 0,
  specs: PyTree | None = None,
  min_size: int = MIN_SIZE,
  exempt: Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
  """Averages the largest elements of gradients over devices.

  Of every block of g + e the largest elements go to the device that averages
  them, and the largest of the means go to all, with error feedback on both
  sides; see `int_all_reduce` for how to use it. Unlike an all-gather of what
  devices chose, bytes do not grow with the number of devices.

  Args:
    axis_name: The mesh axis, or axes, over which the batch is split.
    fraction: Of a block that a device sends, in (0, 1]; one at least.
    second_fraction: Of the mean that goes back; four times as many when None,
      as devices choose different ones.
    block: Elements of a block, at most 65,536.
    warmup: Exchanges at the start that are in float32, at least 0.
    specs: Of parameters that are cut over one of the axes.
    min_size: Parameters with fewer elements are averaged in float32.
    exempt: Patterns of others that are.

  Returns:
    An `optax.GradientTransformationExtraArgs`, as `int_all_reduce` does.

  Raises:
    ValueError: As `int_all_reduce`.

  References:
    Stich et al., "Sparsified SGD with Memory", 2018,
    https://arxiv.org/abs/1809.07599
    Lin et al., "Deep Gradient Compression", 2018,
    https://arxiv.org/abs/1712.01887
  """
  if second_fraction is None:
    second_fraction = min(1.0, 4 * fraction)
  require_in("(0, 1]", fraction=fraction, second_fraction=second_fraction)
  require_static(1, block=block)
  first, second = (
    Largest(max(1, round(share * block)), block)
    for share in (fraction, second_fraction)
  )
  shots = TwoShot(Axes.of(axis_name, specs), first, second, True)
  return exchange(
    Blockwise(shots), specs=specs, min_size=min_size, exempt=exempt,
    warmup=warmup,
  )  # fmt: skip
