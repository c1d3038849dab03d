"""Exchanging pages of running PV guests: ``exchange``; ``recover`` for what was cut off."""

from pgofflined.exchanger.recovery import recover
from pgofflined.exchanger.runner import exchange

__all__ = ["exchange", "recover"]
