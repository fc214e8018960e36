"""Which architectures work cut into stages or slices. The table beside this file is written by a script
that tries each one (benchmarks/architectures.py); what is not known to be right is refused, never served
wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from lockstep.errors import UsageError

TABLE = "architectures.json"


@dataclass(frozen=True)
class Support:
    """What is known of one architecture, named by its module in mlx-lm. A reason means that it is refused."""

    name: str
    pipeline: str | None
    tensor: str | None
    batch: bool = True
    """False where mlx-lm itself fails with more than one sequence at a time."""

    def check_pipeline(self) -> None:
        """Raises UsageError unless this architecture is known to work in a pipeline."""
        if self.pipeline is not None:
            raise UsageError(
                f"model type {self.name} cannot run on more than one rank in a pipeline: {self.pipeline}; "
                "use -n 1" + ("" if self.tensor is not None else " or --parallel tensor")
            )

    def check_tensor(self) -> None:
        """Raises UsageError unless this architecture is known to work when its layers are cut."""
        if self.tensor is not None:
            remedy = "use -n 1" if self.pipeline is not None else "use --parallel pipeline"
            reason = self.tensor.removesuffix(f": {remedy}")
            raise UsageError(f"model type {self.name} cannot run in tensor parallel: {reason}; {remedy}")


def support(config: Mapping[str, Any]) -> Support:
    """What is known of the architecture of this config.json."""
    name = architecture(config)
    entry = json.loads((files("lockstep.model") / TABLE).read_text()).get(name)
    if entry is None:
        return Support(name, "it has not been tried", "it has not been tried")
    return Support(name, entry["pipeline"], entry["tensor"], entry["batch"])


def architecture(config: Mapping[str, Any]) -> str:
    """The module of mlx-lm that implements this config. Raises UsageError where there is no model_type."""
    from mlx_lm.utils import MODEL_ARCHITECTURE_REMAPPING, MODEL_REMAPPING

    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise UsageError("config.json has no model_type: not a model that mlx-lm can run")
    named = config.get("architectures") or ()
    for name in [named] if isinstance(named, str) else named:
        if remapped := MODEL_ARCHITECTURE_REMAPPING.get((kind, name)):
            return str(remapped)
    return str(MODEL_REMAPPING.get(kind, kind))
