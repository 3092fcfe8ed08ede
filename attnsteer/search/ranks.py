"""Several processes of one search: `accelerate launch --multi_gpu` or `torchrun` starts them and numbers them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..errors import SteeringError
from ..lines import identity


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

    def gathered(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their numbers."""
        if self._state is None:
            return [value]
        from accelerate.utils import gather_object

        return list(gather_object([value]))

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Refuse a search whose processes would write their scores under different names.

        Raises:
            SteeringError: some settings differ between processes; in all of them, says which.
        """
        own = {name: identity({name: value}) for name, value in settings.items()}
        others = self.gathered(own)
        apart = sorted(name for name in own if any(other.get(name) != own[name] for other in others))
        if apart:
            raise SteeringError(
                f"The {self.count} processes of this search do not agree on its settings ({', '.join(apart)}): give "
                "all of them the same, and an objective of yours an attribute settings that says on what it depends."
            )

    @staticmethod
    def local() -> int | None:
        """Number of this process on its machine; None where it is the only one."""
        return int(os.environ.get("LOCAL_RANK", "0")) if _launched() > 1 else None


def _launched() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
