"""Importing mlx-lm's models without its tokenizers: a rank that never sees text need not load transformers.

That is 3 of the 4 seconds and 100 of the 150 MB that `import mlx_lm` takes; a rank that is started again
after a failure is back that much sooner.
"""

from __future__ import annotations

import importlib.util
import sys
import types

PACKAGE = "mlx_lm"
TOKENIZERS = "mlx_lm.tokenizer_utils"


def leave_out_tokenizers() -> None:
    """From now on, `mlx_lm` is its submodules alone, and has no tokenizers. Call before it is imported."""
    if PACKAGE in sys.modules:
        return
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.submodule_search_locations is not None, "mlx-lm is not installed"
    package = types.ModuleType(PACKAGE, "mlx-lm without what its __init__ imports")
    package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations)
    sys.modules[PACKAGE] = package
    tokenizers = types.ModuleType(TOKENIZERS, "left out: see lockstep.model.light")
    vars(tokenizers).update(TokenizerWrapper=_LeftOut, load=_LeftOut)
    sys.modules[TOKENIZERS] = tokenizers


class _LeftOut:
    """Stands for what this process said that it would not use."""

    def __init__(self, *arguments: object, **options: object) -> None:
        raise AssertionError("this process has left out mlx-lm's tokenizers")
