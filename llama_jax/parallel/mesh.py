"""The only maker of a mesh: how many devices work on which axis."""

import dataclasses
import math

import jax
from jax.sharding import AxisType, Mesh

from llama_jax import errors

AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
  """Devices on each mesh axis; one of them may be -1, "all that are left".

  Attributes:
    data: copies of the model, each with its part of the batch.
    fsdp: parts of every weight, which also split the batch.
    tensor: parts of heads, MLP width and vocabulary.
  """

  data: int
  fsdp: int
  tensor: int

  def __post_init__(self):
    sizes = {axis: getattr(self, axis) for axis in AXES}
    for axis, size in sizes.items():
      if size != -1 and size < 1:
        raise errors.ConfigError(
          f"parallel.{axis}={size} must be 1 or more, or -1 for the devices"
          " that are left."
        )
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
      named = " and ".join(f"parallel.{axis}=-1" for axis in free)
      raise errors.ConfigError(f"{named}: only one axis may be -1; set one.")

  def resolve(self, num_devices: int) -> "ParallelConfig":
    """The same with -1 filled in; raises where the devices do not fit."""
    sizes = {axis: getattr(self, axis) for axis in AXES}
    taken = math.prod(size for size in sizes.values() if size != -1)
    shown = ", ".join(f"parallel.{axis}={sizes[axis]}" for axis in AXES)
    if -1 in sizes.values():
      if num_devices % taken:
        raise errors.ConfigError(
          f"{shown}: {taken} does not divide the {num_devices} devices;"
          f" use axes whose product is one of {divisors(num_devices)}."
        )
      sizes = {
        axis: num_devices // taken if size == -1 else size
        for axis, size in sizes.items()
      }
    elif taken != num_devices:
      raise errors.ConfigError(
        f"{shown} need {taken} devices and there are {num_devices};"
        " set one axis to -1 to use them all."
      )
    return ParallelConfig(**sizes)


def divisors(number: int) -> list[int]:
  """Whole numbers that divide number, ascending."""
  return [d for d in range(1, number + 1) if number % d == 0]


def check(parallel: ParallelConfig, dimensions: dict[str, dict[str, int]]):
  """Refuses a mesh that does not divide what it would split.

  Args:
    parallel: resolved sizes.
    dimensions: for each mesh axis ("batch" stands for data * fsdp), the
      dimensions it splits: knob -> size.
  """
  sizes = {axis: getattr(parallel, axis) for axis in AXES}
  sizes["batch"] = parallel.data * parallel.fsdp
  for axis, split in dimensions.items():
    for knob, size in split.items():
      if size % sizes[axis] == 0:
        continue
      common = [
        d
        for d in divisors(math.gcd(*split.values()))
        if d <= jax.device_count()
      ]
      given = (
        f"parallel.data={parallel.data} x parallel.fsdp={parallel.fsdp}"
        if axis == "batch"
        else f"parallel.{axis}={sizes[axis]}"
      )
      raise errors.ConfigError(
        f"{given} does not divide {knob}={size};"
        f" use one of {', '.join(map(str, common))}."
      )


def make(parallel: ParallelConfig, devices=None) -> Mesh:
  """A mesh of all devices (or these); enter it with jax.set_mesh."""
  devices = jax.devices() if devices is None else devices
  sizes = parallel.resolve(len(devices))
  # Linen raises on the Explicit axes that jax.make_mesh gives by default.
  return jax.make_mesh(
    tuple(getattr(sizes, axis) for axis in AXES),
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
    devices=devices,
  )
