"""The configuration file: TOML to ``core.policy.Policy``, every problem named at once."""

from pgofflined.config.problems import ConfigError, Doubt, Mistake, Problem
from pgofflined.config.reading import DEFAULT_PATH, EX_CONFIG, Configuration, load, parse

__all__ = [
    "DEFAULT_PATH",
    "EX_CONFIG",
    "ConfigError",
    "Configuration",
    "Doubt",
    "Mistake",
    "Problem",
    "load",
    "parse",
]
