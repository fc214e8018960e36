"""A process's place among the ranks of a run: found before mlx is imported, and handed on as one."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from lockstep.model.blas import BlasChoice, prepare_blas
from lockstep.runtime.beats import Beat
from lockstep.runtime.environment import RankEnvironment
from lockstep.runtime.options import Deadlines
from lockstep.runtime.watchdog import Watchdog


@dataclass(frozen=True)
class Place:
    """This process as a rank."""

    env: RankEnvironment
    blas: BlasChoice
    watchdog: Watchdog = field(repr=False)

    @classmethod
    def take(cls, deadlines: Deadlines | None = None) -> Place:
        """Read the environment and prepare for mlx, which must not have been imported.

        Deadlines are those of the environment where none are given.
        """
        env = RankEnvironment.read(os.environ)
        beat = Beat.read(os.environ)
        watchdog = Watchdog(env.rank, deadlines or Deadlines.read(os.environ), beat)
        return cls(env, prepare_blas(env.local_size), watchdog)
