"""Moves a running PV guest off bad pages: exchange() is the whole public surface."""

from pgofflined.exchanger.runner import exchange

__all__ = ["exchange"]
