"""Which tasks a device has, where each task's examples are one block of the batch."""

import math
from typing import NamedTuple

import numpy as np


class Blocks(NamedTuple):
    """A batch of B examples, B / k of each task in turn, that n devices share in turn.

    Example j is of task j k // B and on device j n // B. A group is the largest number of examples
    that divides the blocks of both, so that it is of one task and on one device.

    Attributes:
      groups: number of groups on each device, k / gcd(k, n).
      slots: the most tasks that a device has: 1 if k divides n, k / n if n divides k, and at most
        ceil(k / n) + 1 otherwise.
      tasks: (n, groups) int, the task of each group, ascending on each device.
    """

    groups: int
    slots: int
    tasks: np.ndarray

    @property
    def first(self) -> np.ndarray:
        """(n,) the first task of each device: that of its slot 0; slot s is of task first + s."""
        return self.tasks[:, 0]

    @property
    def one_each(self) -> bool:
        """Whether each group of a device has a slot of its own, the same on all devices.

        That is more than slots == groups: with k = 2 and n = 3 the tasks are
        [[0, 0], [0, 1], [1, 1]].
        """
        return np.array_equal(self.tasks, self.first[:, None] + np.arange(self.slots))


def blocks(k: int, n: int) -> Blocks:
    """The `Blocks` of k tasks on n devices; they do not depend on the size of the batch."""
    groups = math.lcm(k, n) // n
    tasks = np.arange(n * groups).reshape(n, groups) * k // (n * groups)
    slots = int((tasks[:, -1] - tasks[:, 0]).max()) + 1
    return Blocks(groups, slots, tasks)
