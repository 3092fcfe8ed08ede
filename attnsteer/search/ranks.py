"""Several processes of one search: `accelerate launch --multi_gpu` or `torchrun` starts them and numbers them."""

from __future__ import annotations

import os
from typing import Any


class Ranks:
    """This process among those of the search; alone, where no launcher says otherwise.

    Attributes:
        rank: number of this process, from 0.
        count: how many there are.
    """

    def __init__(self) -> None:
        self.rank, self.count = 0, 1
        self._state: Any = None
        if _launched() > 1:
            import torch
            from accelerate import PartialState

            # without the word that there is no GPU, each process would take itself for the only one
            self._state = PartialState(cpu=not torch.cuda.is_available())
            self.rank, self.count = self._state.process_index, self._state.num_processes

    def wait(self) -> None:
        """Until all processes are here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    @staticmethod
    def local() -> int | None:
        """Number of this process on its machine; None where it is the only one."""
        return int(os.environ.get("LOCAL_RANK", "0")) if _launched() > 1 else None


def _launched() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
