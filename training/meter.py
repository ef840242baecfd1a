"""Means of named scalars over the steps of an epoch, kept on the device until they are read."""

from typing import Any

import torch
from torch import Tensor


class Meter:
    """Adds up scalars by name; reading it is the only time an epoch waits for the device."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.names: list[str] = []
        self._before: list[Tensor] = []

    @classmethod
    def of(cls, state: dict[str, Any] | None) -> "Meter":
        """A meter that goes on from `state()`; a fresh one for None."""
        meter = cls()
        if state is not None:
            meter.names, meter._before = list(state["names"]), [state["rows"]]
        return meter

    def state(self) -> dict[str, Any]:
        """What it has seen, on the CPU."""
        return {"names": self.names, "rows": self._table()}

    def _table(self) -> Tensor:
        return torch.cat([*self._before, torch.stack(self.rows).cpu()])

    def add(self, values: dict[str, Tensor]) -> None:
        """The scalars of one step; the same names in each."""
        self.names = list(values)
        self.rows.append(torch.stack([v.detach().float() for v in values.values()]))

    def read(self) -> tuple[dict[str, float], int | None]:
        """The means, and the first step at which a value was not finite."""
        table = self._table()
        bad = (~table.isfinite()).any(1).nonzero().flatten().tolist()
        return dict(zip(self.names, table.mean(0).tolist(), strict=True)), bad[0] if bad else None
