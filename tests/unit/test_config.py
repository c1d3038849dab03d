from __future__ import annotations

import re
import tomllib
from contextlib import suppress
from dataclasses import fields
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgofflined.config import EX_CONFIG, ConfigError, load, parse
from pgofflined.core.policy import (
    DomainDefault,
    Policy,
    SourceName,
    TcpAddress,
    UnixAddress,
)
from pgofflined.core.schedule import parse_window
from pgofflined.core.schema import SECTIONS
from pgofflined.core.units import AmountOfMemory, ShareOfMemory

SHIPPED = Path(__file__).parents[2] / "config" / "pgofflined.toml"


def problems_of(text: str) -> dict[str, str]:
    """What is reported of each key."""
    with pytest.raises(ConfigError) as caught:
        parse(text, name="test.toml")
    return {problem.key: str(problem) for problem in caught.value.problems}


def test_shipped_file_is_the_defaults() -> None:
    assert load(SHIPPED) == Policy()


def test_empty_file_is_the_defaults() -> None:
    assert parse("", name="empty") == Policy()


def test_shipped_file_holds_and_explains_every_key() -> None:
    text = SHIPPED.read_text()
    shipped = tomllib.loads(text)
    assert {name: set(keys) for name, keys in shipped.items()} == {
        name: set(keys) for name, keys in SECTIONS.items()
    }
    # Above each key, or the group of keys that it is in, stands a comment.
    for paragraph in text.split("\n\n"):
        if re.search(r"^\w+ = ", paragraph, re.MULTILINE):
            assert re.match(r"(\[\w+\]\n)?# \S", paragraph), paragraph


def test_every_field_of_the_policy_can_be_set() -> None:
    for section in fields(Policy):
        keys = {item.name for item in fields(getattr(Policy(), section.name))}
        assert keys == set(SECTIONS[section.name])


def test_every_key_reaches_the_policy() -> None:
    policy = parse(
        """
        [retire]
        enabled = false
        dry_run = true
        corrected_errors = 10
        window = "24h"
        max_tracked_pages = 500
        max_retired = "64MiB"
        [domains]
        default = "deny"
        allow = ["web-*"]
        deny = ["db"]
        [exchange]
        workers = 4
        acknowledge_timeout = "500ms"
        [relocation]
        target = "xen2.example"
        maintenance_windows = ["Sat,Sun 00:00-24:00", "22:00-06:00"]
        ssh_command = "ssh -p 2222"
        free_memory_reserve = "1GiB"
        [sources]
        order = ["mcelog"]
        [metrics]
        listen = "unix:/run/pgofflined/metrics.sock"
        [control]
        socket = "/run/other.sock"
        """,
        name="test.toml",
    )
    retire = policy.retire
    assert (retire.enabled, retire.dry_run, retire.corrected_errors) == (False, True, 10)
    assert (retire.window, retire.max_tracked_pages) == (86_400.0, 500)
    assert retire.max_retired == AmountOfMemory(size=64 << 20)
    assert policy.domains.default is DomainDefault.DENY
    assert (policy.domains.allow, policy.domains.deny) == (("web-*",), ("db",))
    assert (policy.exchange.workers, policy.exchange.acknowledge_timeout) == (4, 0.5)
    relocation = policy.relocation
    assert (relocation.target, relocation.ssh_command) == ("xen2.example", "ssh -p 2222")
    assert relocation.maintenance_windows == (
        parse_window("Sat,Sun 00:00-24:00"),
        parse_window("22:00-06:00"),
    )
    assert relocation.free_memory_reserve == 1 << 30
    assert policy.sources.order == (SourceName.MCELOG,)
    assert policy.metrics.listen == UnixAddress(path="/run/pgofflined/metrics.sock")
    assert policy.control.socket == "/run/other.sock"
    # What was not named keeps its default.
    assert policy.exchange.max_pages_per_suspend == 64


def test_half_a_percent_is_understood() -> None:
    policy = parse('retire.max_retired = "0.5%"', name="x")
    assert policy.retire.max_retired == ShareOfMemory(percent=Fraction(1, 2))


@pytest.mark.parametrize(
    ("listen", "expected"),
    [
        ("off", None),
        ("0.0.0.0:80", TcpAddress(host="0.0.0.0", port=80)),  # noqa: S104
        ("localhost:9709", TcpAddress(host="localhost", port=9709)),
        ("[::1]:9709", TcpAddress(host="::1", port=9709)),
    ],
)
def test_addresses_to_listen_on(listen: str, expected: TcpAddress | None) -> None:
    assert parse(f'metrics.listen = "{listen}"', name="x").metrics.listen == expected


@pytest.mark.parametrize(
    ("key", "least", "most"),
    [
        ("retire.corrected_errors", 1, 1000),
        ("retire.max_tracked_pages", 1, 10_000_000),
        ("exchange.workers", 1, 64),
        ("exchange.max_queued", 1, 1_000_000),
        ("exchange.max_pages_per_suspend", 1, 4096),
        ("exchange.attempts", 1, 1000),
        ("relocation.parallel", 1, 16),
        ("relocation.max_queued", 1, 32_768),
        ("relocation.attempts", 1, 1000),
    ],
)
def test_whole_numbers_are_taken_up_to_their_limits(key: str, least: int, most: int) -> None:
    section, field = key.split(".")
    for value in (least, most):
        policy = parse(f"{key} = {value}", name="x")
        assert getattr(getattr(policy, section), field) == value
    for value in (least - 1, most + 1):
        assert f"from {least} to {most}" in problems_of(f"{key} = {value}")[key]


def test_longest_socket_path_and_highest_port_are_taken() -> None:
    path = "/" + "x" * 106
    assert parse(f'control.socket = "{path}"', name="x").control.socket == path
    assert parse('metrics.listen = "h:65535"', name="x").metrics.listen == TcpAddress(
        host="h", port=65535
    )


@pytest.mark.parametrize(
    ("line", "key", "found", "allowed"),
    [
        ('retire.window = "72"', "retire.window", '"72"', '"72h"'),
        ("retire.window = 72", "retire.window", "72", '"72h"'),
        ('retire.window = "0s"', "retire.window", '"0s"', "from 1s to 365d"),
        ('retire.window = "366d"', "retire.window", '"366d"', "from 1s to 365d"),
        ("retire.corrected_errors = 0", "retire.corrected_errors", "0", "from 1 to 1000"),
        ("retire.corrected_errors = 2.0", "retire.corrected_errors", "2.0", "whole number"),
        ('retire.corrected_errors = "2"', "retire.corrected_errors", '"2"', "whole number"),
        ("retire.corrected_errors = true", "retire.corrected_errors", "true", "whole number"),
        ("retire.dry_run = 1", "retire.dry_run", "1", "true or false"),
        ('retire.dry_run = "yes"', "retire.dry_run", '"yes"', "true or false"),
        ('retire.max_retired = "0.1"', "retire.max_retired", '"0.1"', '"0.1%"'),
        ("retire.max_retired = 0.001", "retire.max_retired", "0.001", '"64MiB"'),
        ('retire.treshold = "2"', "retire.treshold", "an unknown key", "corrected_errors"),
        ('domains.default = "maybe"', "domains.default", '"maybe"', '"allow" or "deny"'),
        ('domains.allow = "web"', "domains.allow", '"web"', "a list"),
        ("domains.allow = [1]", "domains.allow", "[1]", "a list"),
        ('domains.deny = [""]', "domains.deny", "['']", "names or uuids"),
        ('domains.allow = ["web", ""]', "domains.allow", "''", "an empty pattern"),
        (r'domains.deny = ["a\tb"]', "domains.deny", "['a", "cannot be printed"),
        ('domains.deny = ["db[9-0]"]', "domains.deny", "db[9-0]", "no character"),
        (f'domains.deny = ["*{"x" * 65}"]', "domains.deny", "*xx", "more than 64"),
        ('domains.deny = ["a", "a"]', "domains.deny", "['a', 'a']", "different"),
        ('domains.dom0 = "move"', "domains.dom0", '"move"', '"report"'),
        ("exchange.workers = 65", "exchange.workers", "65", "from 1 to 64"),
        ('relocation.target = "-oProxyCommand=x"', "relocation.target", '"-oP', "host name"),
        ('relocation.target = "a b"', "relocation.target", '"a b"', "host name"),
        ('relocation.ssh_command = ""', "relocation.ssh_command", '""', "a command"),
        ("relocation.ssh_command = 'ssh \"'", "relocation.ssh_command", '"ssh ""', "a command"),
        ('relocation.maintenance_windows = ["night"]', "relocation.maintenance_windows", "night",
         "22:00-06:00"),
        ('relocation.free_memory_reserve = "256MB"', "relocation.free_memory_reserve", "256MB",
         "MiB"),
        ("sources.order = []", "sources.order", "[]", '"native" and "mcelog"'),
        ('sources.order = ["native", "native"]', "sources.order", "native", "none of them twice"),
        ('sources.order = ["edac"]', "sources.order", "edac", '"native"'),
        ('metrics.listen = "9709"', "metrics.listen", '"9709"', '"off"'),
        ('metrics.listen = "127.0.0.1:0"', "metrics.listen", ":0", '"off"'),
        ('metrics.listen = "127.0.0.1:65536"', "metrics.listen", ":65536", '"off"'),
        ('metrics.listen = "::1:9709"', "metrics.listen", "::1:9709", "[::1]"),
        ('metrics.listen = "unix:rel"', "metrics.listen", "unix:rel", "absolute path"),
        ('control.socket = "run/x"', "control.socket", '"run/x"', "absolute path"),
        (f'control.socket = "/{"x" * 107}"', "control.socket", "…", "107 bytes"),
        ('exchange.retry_first = "2h"', "exchange.retry_last", "3600 s", "7200 s"),
        ("surprise = 1", "surprise", "an unknown key", "[retire]"),
        ("[surprise]", "surprise", "an unknown section", "[retire]"),
        ("retire = 1", "retire", "1", "[retire]"),
        ("[[retire]]", "retire", "[{}]", "[retire]"),
    ],
)  # fmt: skip
def test_mistake_names_key_finding_and_remedy(
    line: str, key: str, found: str, allowed: str
) -> None:
    problems = problems_of(line)
    assert list(problems) == [key]
    finding, remedy = problems[key].split("; allowed is ")
    assert found in finding
    assert allowed in remedy


def test_all_mistakes_are_told_in_one_go() -> None:
    problems = problems_of(
        'surprise = 1\n[retire]\nwindow = 1\nwindows = 2\n[metrics]\nlisten = "x"\n[odd]\n'
    )
    assert list(problems) == [
        "surprise",
        "retire.window",
        "retire.windows",
        "metrics.listen",
        "odd",
    ]


def test_error_names_the_file() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("retire.window = 1\nretire.odd = 1", name="/etc/some.toml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert all(line.startswith("/etc/some.toml: retire.") for line in lines)


def test_what_is_not_toml_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("[retire]\nwindow = \n")
    with pytest.raises(ConfigError, match=r"broken\.toml: found what is not TOML: .*line 2"):
        load(path)


def test_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: found no readable file \(No such file"):
        load(tmp_path / "absent.toml")


def test_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Is a directory"):
        load(tmp_path)


def test_file_that_is_not_utf8_is_told(tmp_path: Path) -> None:
    path = tmp_path / "latin.toml"
    path.write_bytes(b"# caf\xe9\n")
    with pytest.raises(ConfigError, match="not UTF-8 at offset 5"):
        load(path)


def test_file_over_a_mebibyte_is_told(tmp_path: Path) -> None:
    path = tmp_path / "large.toml"
    path.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="more than 1 MiB"):
        load(path)
    path.write_bytes(b"#" * (1 << 20))
    assert load(path) == Policy()


def test_deep_nesting_is_an_error_like_any_other() -> None:
    with pytest.raises(ConfigError):
        parse("a = " + "[" * 100_000, name="deep.toml")


VALUES = st.recursive(
    st.one_of(
        st.booleans().map(lambda value: str(value).lower()),
        st.integers(-(2**70), 2**70).map(str),
        st.floats().map(str),
        st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), max_size=12).map(
            lambda text: "'" + text.replace("'", "") + "'"
        ),
        st.just("2024-01-01"),
    ),
    lambda inner: st.lists(inner, max_size=3).map(lambda items: "[" + ",".join(items) + "]"),
    max_leaves=6,
)
KEYS = st.sampled_from([f"{name}.{key}" for name, keys in SECTIONS.items() for key in keys])


@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_any_value_is_taken_or_told(settings: dict[str, str]) -> None:
    text = "\n".join(f"{key} = {value}" for key, value in settings.items())
    with suppress(ConfigError):
        assert isinstance(parse(text, name="x.toml"), Policy)


def test_exit_code_is_that_of_sysexits() -> None:
    assert EX_CONFIG == 78
