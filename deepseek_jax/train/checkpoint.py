"""Checkpoints: one atomic Orbax step directory holds everything a run needs."""

import contextlib
import errno
import logging
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from deepseek_jax import comm
from deepseek_jax.core import tree
from deepseek_jax.train.processes import of_first
from deepseek_jax.train.replicas import own_paths, replicated
from deepseek_jax.train.state import TrainState, evaluated

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _is_news(record: logging.LogRecord) -> bool:
  """Whether a log record says what no exception will.

  Orbax logs the errors of its threads, a screenful each, and raises them too.
  """
  return "orbax" not in record.pathname


class CheckpointError(OSError):
  """A checkpoint could not be written; earlier ones are untouched."""


class Checkpoints:
  """The checkpoints of one run, newest last.

  A step directory holds four items: `model` (parameters and other model state,
  all that evaluation needs), `training` (counters, optimizer and metric state),
  `data` (where the data stands) and `progress`, the last two plain JSON. Where
  the optimizer averages, `model` holds the averaged parameters and `training`
  the ones to go on from. Nothing depends on how arrays lie over devices and
  processes: a run may go on on others. Arrays are stored under their path,
  `params/stages/0/kernel`, so that a mismatch can be told by path. Orbax
  commits a step by renaming its directory: a process killed in the middle of a
  save leaves the previous step as the latest.

  Args:
    directory: Where to write; made when missing.
    keep: How many of the newest steps to keep, at least 1; the step last marked
      as best stays besides.
    read_only: Whether to leave the directory as it is.
  """

  def __init__(
    self, directory: pathlib.Path, *, keep: int = 2, read_only: bool = False
  ):
    self.directory = directory
    if directory.exists() and not directory.is_dir():
      raise ValueError(f"{directory} must be a directory, got a file.")
    if not read_only:
      of_first(lambda: _sweep(directory))
    logging.getLogger("absl").addFilter(_is_news)
    self._policy = _LatestAndBest(keep)
    self._manager = ocp.CheckpointManager(
      directory.absolute(),
      item_handlers={
        "model": ocp.StandardCheckpointHandler(),
        "training": ocp.StandardCheckpointHandler(),
        # Not Grain's handler, which writes a file for each process: the place
        # in the data is the same for any number of them.
        "data": ocp.JsonCheckpointHandler(),
        "progress": ocp.JsonCheckpointHandler(),
      },
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self._policy,
        create=not read_only,
        enable_async_checkpointing=True,
      ),
    )

  def latest(self) -> int | None:
    """Returns the newest committed step, or None."""
    return self._manager.latest_step()

  def best(self) -> int:
    """Returns the step with the best evaluation, or else the newest.

    Raises:
      ValueError: If there is no checkpoint.
    """
    step = self.latest()
    if step is None:
      raise ValueError(f"no checkpoint in {self.directory} yet.")
    with self._intact(step):
      progress = self._manager.restore(
        step, args=ocp.args.Composite(progress=ocp.args.JsonRestore())
      )["progress"]
    best = progress["stopping"]["best_step"]
    return step if best is None else best

  def save(
    self,
    state: TrainState,
    iterator: grain.DatasetIterator,
    progress: Mapping[str, Any],
    *,
    step: int,
    best_step: int | None,
  ) -> None:
    """Starts writing a step; returns as soon as its arrays are copied.

    Does nothing when the step is already there: a run is a pure function of
    its seed, so a second visit would write the same bytes.

    Args:
      state: Everything a step changes.
      iterator: Where the data stands.
      progress: Anything else, as JSON.
      step: The step's number.
      best_step: Step to keep however old it gets, or None.

    Raises:
      CheckpointError: If this or an earlier save could not be written.
    """
    self._policy.best_step = best_step
    if step in self._manager.all_steps():
      return
    model, training = _items(state)
    with self._explained(step):
      self._manager.save(
        step,
        args=ocp.args.Composite(
          model=ocp.args.StandardSave(model),
          training=ocp.args.StandardSave(training),
          data=ocp.args.JsonSave(iterator.get_state()),
          progress=ocp.args.JsonSave(dict(progress)),
        ),
      )

  def wait(self) -> None:
    """Blocks until everything is on disk.

    Raises:
      CheckpointError: If a save could not be written.
    """
    with self._explained(None):
      self._manager.wait_until_finished()

  def restore(
    self, step: int, like: TrainState, iterator: grain.DatasetIterator
  ) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state and the progress saved at a step; moves the iterator.

    Args:
      step: A committed step.
      like: State of the same structure; its shardings decide where arrays go.
      iterator: Is set to where the data stood.

    What every device keeps for itself in an exchange of gradients may be of
    another number of devices, see `comm.adapt`.

    Raises:
      ValueError: If the checkpoint is of another model or optimizer; lists the
        missing, extra and mis-shaped leaves by path.
    """
    model, training = _items(like)
    self._check(step, "model", model)
    training |= self._saved_by_others(step, like)
    self._check(step, "training", training)
    with self._intact(step):
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          model=ocp.args.StandardRestore(_abstract(model)),
          training=ocp.args.StandardRestore(_abstract(training)),
          data=ocp.args.JsonRestore(),
          progress=ocp.args.JsonRestore(),
        ),
      )
    iterator.set_state(restored["data"])
    # In this order: parameters in `training` are those before averaging.
    flat = {**restored["model"], **restored["training"]}
    leaves = [flat[path] for path in tree.leaf_paths(like)]
    state = jax.tree.unflatten(jax.tree.structure(like), leaves)
    return _adapted(state, like), restored["progress"]

  def _saved_by_others(
    self, step: int, like: TrainState
  ) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns as they were saved arrays of another number of devices."""
    own = own_paths(like)
    if not own:
      return {}
    with self._intact(step):
      saved = self._manager.item_metadata(step)["training"].tree
    found = {}
    for path, leaf in _flat(like).items():
      shape = tuple(saved[path].shape) if path in own & saved.keys() else None
      if shape is not None and shape != leaf.shape:
        found[path] = jax.ShapeDtypeStruct(
          shape, leaf.dtype, sharding=replicated(leaf.sharding)
        )
    return found

  def restore_model(self, step: int, params: Any, rest: Any) -> tuple[Any, Any]:
    """Returns the parameters and other model state saved at a step.

    Args:
      step: A committed step.
      params: Parameters of the same structure.
      rest: Other model state of the same structure.

    Raises:
      ValueError: If the checkpoint is of another model; lists the leaves.
    """
    like = {"params": params, "rest": rest}
    model = _flat(like)
    self._check(step, "model", model)
    with self._intact(step):
      flat = self._manager.restore(
        step,
        args=ocp.args.Composite(
          model=ocp.args.StandardRestore(_abstract(model))
        ),
      )["model"]
    both = jax.tree.unflatten(
      jax.tree.structure(like), [flat[path] for path in model]
    )
    return both["params"], both["rest"]

  def close(self) -> None:
    """Waits for pending saves and lets go of the directory."""
    try:
      with self._explained(None):
        self._manager.close()
    finally:
      logging.getLogger("absl").removeFilter(_is_news)

  def _check(self, step: int, item: str, wanted: Mapping[str, Any]) -> None:
    """Raises when a saved item has other leaves than wanted."""
    with self._intact(step):
      saved = {
        path: f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in self._manager.item_metadata(step)[item].tree.items()
      }
    ours = {path: _stored_type(leaf) for path, leaf in wanted.items()}
    problems = [
      *(f"missing {path} {ours[path]}" for path in ours.keys() - saved.keys()),
      *(f"extra {path} {saved[path]}" for path in saved.keys() - ours.keys()),
      *(
        f"{path} is {saved[path]}, wanted {ours[path]}"
        for path in ours.keys() & saved.keys()
        if ours[path] != saved[path]
      ),
    ]
    if problems:
      lines = "".join(f"\n  {problem}" for problem in sorted(problems))
      raise ValueError(
        f"checkpoint {step} in {self.directory} does not fit the {item} you "
        f"gave:{lines}\nUse the same model and optimizer, or another workdir."
      )

  @contextlib.contextmanager
  def _intact(self, step: int):
    """Turns whatever a damaged checkpoint raises into one clear error."""
    try:
      yield
    except Exception as error:
      reason = str(error).strip().splitlines() or [type(error).__name__]
      raise ValueError(
        f"checkpoint {step} in {self.directory} is missing or damaged "
        f"({reason[0][:200]}). Remove {self.directory / str(step)}, and "
        "result.json if there is one, to go on from an earlier checkpoint."
      ) from error

  @contextlib.contextmanager
  def _explained(self, step: int | None):
    """Turns a failed write into one clear error."""
    try:
      yield
    except Exception as error:
      reason = _full_disk(error)
      if reason is None:
        raise
      what = "a checkpoint" if step is None else f"checkpoint {step}"
      raise CheckpointError(
        reason.errno,
        f"{what} could not be written ({reason.strerror}); the latest intact "
        f"step is {self.latest()}. Free space and run again to go on from it",
        str(self.directory),
      ) from error


class _LatestAndBest(checkpoint_managers.PreservationPolicy):
  """Keeps the newest steps and the best one."""

  def __init__(self, keep: int):
    self.keep = keep
    self.best_step: int | None = None

  def should_preserve(
    self,
    checkpoints: Sequence[Any],
    *,
    context: checkpoint_managers.PreservationContext,
  ) -> Sequence[bool]:
    """Returns which of the checkpoints, oldest first, stay."""
    newest = len(checkpoints) - self.keep
    return [
      i >= newest or info.step == self.best_step
      for i, info in enumerate(checkpoints)
    ]


def _sweep(directory: pathlib.Path) -> None:
  """Removes what killed saves left behind.

  Orbax does so only for leftovers that already hold its metadata; a process
  killed earlier than that would block the next save of the same step.
  """
  for leftover in directory.glob("*.orbax-checkpoint-tmp*"):
    shutil.rmtree(leftover)


def _items(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns (model, training) as flat dicts from path to array."""
  params = evaluated(state)
  model = _flat({"params": params, "rest": state.rest})
  # What is averaged is another array under the same path, and goes into both.
  training = {
    path: leaf
    for path, leaf in _flat(state).items()
    if model.get(path) is not leaf
  }
  return model, training


def _adapted(state: TrainState, like: TrainState) -> TrainState:
  """Returns a state for the devices of `like`."""
  shapes = jax.tree.map(lambda x: x.shape, (state, like))
  if shapes[0] == shapes[1]:
    return state
  wanted = jax.tree.map(lambda x: x.sharding, like.opt_state)
  adapt = jax.jit(
    lambda given: comm.adapt(given, like.opt_state), out_shardings=wanted
  )
  return state._replace(opt_state=adapt(state.opt_state))


def _flat(nested: Any) -> dict[str, Any]:
  """Returns a flat dict from path to array."""
  leaves = jax.tree.leaves(nested)
  return dict(zip(tree.leaf_paths(nested), leaves, strict=True))


def _abstract(flat: Mapping[str, Any]) -> dict[str, Any]:
  return {
    path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    for path, leaf in flat.items()
  }


def _stored_type(leaf: jax.Array) -> str:
  """Returns type and shape as Orbax stores them: keys as their data."""
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.eval_shape(jax.random.key_data, leaf)
  return f"{leaf.dtype}{list(leaf.shape)}"


def _full_disk(error: BaseException | None) -> OSError | None:
  """Returns the full-disk error behind an exception, if there is one."""
  while error is not None:
    if isinstance(error, OSError) and error.errno in _FULL:
      return error
    # Tensorstore tells the code of the operating system in words only.
    for code in _FULL:
      if os.strerror(code) in str(error):
        return OSError(code, os.strerror(code))
    error = error.__cause__ or error.__context__
  return None
