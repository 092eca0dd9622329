"""Choices that several parts share and the command line offers by name. Standard library only."""

from typing import Literal

Buffers = Literal["keep", "forecast"]
"""BatchNorm statistics in a forecast: the last observed ones, or forecast like weights."""

EvalBuffers = Literal["stored", "reestimate"]
"""BatchNorm statistics when a loss is measured: as forecast or recorded, or taken anew from training data."""
