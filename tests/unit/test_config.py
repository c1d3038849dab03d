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
from pgofflined.core.units import AmountOfMemory, ShareOfMemory, parse_duration

SHIPPED = Path(__file__).parents[2] / "config" / "pgofflined.toml"


def problems_of(text: str) -> dict[str, str]:
    """What is reported of each key."""
    with pytest.raises(ConfigError) as caught:
        parse(text, name="test.toml")
    return {problem.key: str(problem) for problem in caught.value.problems}


def warnings_of(text: str) -> dict[str, str]:
    """What is doubted of each key."""
    found = parse(text, name="test.toml")
    assert len(found.warnings) == len(found.doubts)
    return {doubt.key: str(doubt) for doubt in found.doubts}


def test_shipped_file_is_the_defaults() -> None:
    assert load(SHIPPED).policy == Policy()


def test_empty_file_is_the_defaults() -> None:
    assert parse("", name="empty").policy == Policy()


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
        ask_unannounced = ["old-*", "0f8fad5b-d9cb-469f-a165-70867728950e"]
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
    ).policy
    retire = policy.retire
    assert (retire.enabled, retire.dry_run, retire.corrected_errors) == (False, True, 10)
    assert (retire.window, retire.max_tracked_pages) == (86_400.0, 500)
    assert retire.max_retired == AmountOfMemory(size=64 << 20)
    assert policy.domains.default is DomainDefault.DENY
    assert (policy.domains.allow, policy.domains.deny) == (("web-*",), ("db",))
    assert (policy.exchange.workers, policy.exchange.acknowledge_timeout) == (4, 0.5)
    assert policy.exchange.ask_unannounced == ("old-*", "0f8fad5b-d9cb-469f-a165-70867728950e")
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
    policy = parse('retire.max_retired = "0.5%"', name="x").policy
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
    assert parse(f'metrics.listen = "{listen}"', name="x").policy.metrics.listen == expected


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
        policy = parse(f"{key} = {value}", name="x").policy
        assert getattr(getattr(policy, section), field) == value
    for value in (least - 1, most + 1):
        assert f"from {least} to {most}" in problems_of(f"{key} = {value}")[key]


def test_longest_socket_path_and_highest_port_are_taken() -> None:
    path = "/" + "x" * 106
    assert parse(f'control.socket = "{path}"', name="x").policy.control.socket == path
    assert parse('metrics.listen = "h:65535"', name="x").policy.metrics.listen == TcpAddress(
        host="h", port=65535
    )


@pytest.mark.parametrize(
    ("key", "least", "below", "most", "above"),
    [
        ("retire.window", "1s", "999ms", "365d", "366d"),
        ("exchange.acknowledge_timeout", "100ms", "99ms", "2m", "121s"),
        ("exchange.suspend_timeout", "100ms", "99ms", "2m", "121s"),
        ("exchange.max_blackout", "10ms", "9ms", "20s", "21s"),
        ("exchange.scrub_wait", "1s", "999ms", "1h", "3601s"),
        ("relocation.time_limit", "1s", "999ms", "7d", "8d"),
    ],
)
def test_durations_are_taken_up_to_their_limits(
    key: str, least: str, below: str, most: str, above: str
) -> None:
    section, field = key.split(".")
    for text in (least, most):
        policy = parse(f'{key} = "{text}"', name="x").policy
        assert getattr(getattr(policy, section), field) == parse_duration(text)
    for text in (below, above):
        assert f"from {least} to {most}" in problems_of(f'{key} = "{text}"')[key]


def test_texts_and_lists_are_taken_up_to_their_limits() -> None:
    longest = "ssh " + "x" * 1020
    policy = parse(f'relocation.ssh_command = "{longest}"', name="x").policy
    assert policy.relocation.ssh_command == longest
    assert list(problems_of(f'relocation.ssh_command = "{longest}x"')) == ["relocation.ssh_command"]
    names = ", ".join(f'"d{number}"' for number in range(1000))
    assert len(parse(f"domains.deny = [{names}]", name="x").policy.domains.deny) == 1000
    assert list(problems_of(f'domains.deny = [{names}, "x"]')) == ["domains.deny"]


@pytest.mark.parametrize("path", ["/saves", "/var/lib/pgofflined/saves", "/a..b/.c"])
def test_directories_that_are_taken(path: str) -> None:
    policy = parse(f'relocation.save_directory = "{path}"', name="x").policy
    assert policy.relocation.save_directory == path


@pytest.mark.parametrize(
    ("line", "key", "found", "allowed"),
    [
        ('relocation.save_directory = "saves"', "relocation.save_directory", '"saves"', "absolute"),
        ('relocation.save_directory = "/my saves"', "relocation.save_directory", "/my saves",
         "without blanks"),
        ('relocation.save_directory = "/a;b"', "relocation.save_directory", "/a;b", "absolute"),
        ('relocation.save_directory = "/a/"', "relocation.save_directory", "/a/", "absolute"),
        ('relocation.save_directory = "/a/../b"', "relocation.save_directory", "/a/../b",
         "absolute"),
        ('relocation.save_directory = "/.."', "relocation.save_directory", "/..", "absolute"),
        ('control.socket = "/run/"', "control.socket", '"/run/"', "absolute path"),
        ('metrics.listen = "[::1:9709"', "metrics.listen", "[::1:9709", "[::1]"),
        ('metrics.listen = "::1]:9709"', "metrics.listen", "::1]:9709", "[::1]"),
        ('metrics.listen = "127.0.0.1:٩٧٠٩"', "metrics.listen", "127", '"off"'),
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
        ("domains.allow = [1]", "domains.allow", "1", "a list"),
        ('domains.deny = [""]', "domains.deny", '""', "names or uuids"),
        ('domains.allow = ["web", ""]', "domains.allow", '""', "an empty pattern"),
        (r'domains.deny = ["a\tb"]', "domains.deny", '"a?b"', "cannot be printed"),
        ('domains.deny = ["db[9-0]"]', "domains.deny", "db[9-0]", "no character"),
        (f'domains.deny = ["*{"x" * 65}"]', "domains.deny", "*xx", "more than 64"),
        ('domains.deny = ["a", "a"]', "domains.deny", '"a" twice', "different"),
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
        ("[[retire]]", "retire", "[a table]", "[retire]"),
        # More digits than Python writes in tens.
        (f"exchange.max_queued = 0x{'F' * 6000}", "exchange.max_queued", "0xfff", "1000000"),
        (f"domains.deny = [0x{'F' * 6000}]", "domains.deny", "0xfff", "names"),
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


@pytest.mark.parametrize("key", ["domains.allow", "domains.deny", "exchange.ask_unannounced"])
@pytest.mark.parametrize(
    ("pattern", "remedy"),
    [
        ("web[1-3", "written [[]"),
        ("web1-3]", "written []]"),
        ("web[]", "written [[]"),
        ("web[!]", "written [[]"),
        ("web[3-1]", "no character"),
        ("", "empty"),
    ],
)
def test_a_pattern_with_a_broken_bracket_is_a_mistake_in_every_list(
    key: str, pattern: str, remedy: str
) -> None:
    section, name = key.split(".")
    problems = problems_of(f'[{section}]\n{name} = [\n  "good-*",\n  "{pattern}",\n]\n')
    assert list(problems) == [key]
    assert problems[key].startswith(f'line 2: {key}: found "{pattern}"; ')
    assert remedy in problems[key]


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("[retir]", "did you mean [retire]?"),
        ("[Metrics]", "did you mean [metrics]?"),
        ("[retire]\nwindw = 1", 'did you mean "window"?'),
        ("[retire]\nDry_Run = true", 'did you mean "dry_run"?'),
        ("[domains]\nallowed = []", 'did you mean "allow"?'),
        ("[retire]\nlisten = 1", "it belongs below [metrics]"),
        ("[sources]\nattempts = 1", "it belongs below [exchange] or [relocation]"),
        ("window = 1", "it belongs below [retire]"),
    ],
)
def test_an_unknown_name_is_asked_about(text: str, meant: str) -> None:
    [told] = problems_of(text).values()
    assert meant in told


@pytest.mark.parametrize("text", ["[surprise]", "[retire]\nsurprise = 1", "surprise = 1"])
def test_nothing_is_suggested_that_is_not_near(text: str) -> None:
    [told] = problems_of(text).values()
    assert "did you mean" not in told
    assert "belongs" not in told


def test_all_mistakes_are_told_in_one_go() -> None:
    problems = problems_of(
        'surprise = 1\n[retire]\nwindow = 1\nwindows = 2\n[metrics]\nlisten = "x"\n[odd]\n'
    )
    assert [text.partition(":")[0] for text in problems.values()] == [
        f"line {number}" for number in (1, 3, 4, 6, 7)
    ]
    assert list(problems) == [
        "surprise",
        "retire.window",
        "retire.windows",
        "metrics.listen",
        "odd",
    ]


def test_error_names_the_file_and_the_line() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("retire.window = 1\nretire.odd = 1", name="/etc/some.toml")
    lines = str(caught.value).splitlines()
    assert [line.partition(": retire.")[0] for line in lines] == [
        "/etc/some.toml: line 1",
        "/etc/some.toml: line 2",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("# first\r\n[retire]\r\nwindow = 1\r\n", 3),
        ('[ "retire" ] # heading\n  "window" = 1', 2),
        ("retire . window = 1", 1),
        ("retire = { enabled = true, window = 1 }", 1),
        ('[domains]\nallow = [\n# window = 2\n"x",\n]\n[retire]\nwindow = 1', 7),
        # Where it is not certain nothing is said.
        ('[domains]\nallow = ["""\n[retire]\nwindow = 2\n"""]\n[retire]\nwindow = 1', None),
        ('[retire]\nwindow = 1\n[domains]\nallow = [\n["x"]\n]', None),
    ],
)
def test_the_line_is_told_where_it_is_certain(text: str, line: int | None) -> None:
    told = problems_of(text)["retire.window"]
    assert told.startswith("retire.window: " if line is None else f"line {line}: retire.window: ")


@given(st.data())
def test_a_line_that_is_told_is_the_right_one(data: st.DataObject) -> None:
    lines = data.draw(
        st.lists(
            st.sampled_from(
                ["", "# window = 7", "[domains]", "dry_run = 1", "allow = [", '"a",', "]", "'''",
                 '["b"]', 'deny = ["""', '"""]', "[[domains]]", "retire.window = 2"]
            ),
            max_size=9,
        )
    )  # fmt: skip
    text = "\n".join([*lines, "[retire]", "window = 1"])
    try:
        parse(text, name="x")
    except ConfigError as error:
        told = [each for each in error.problems if each.key == "retire.window"]
        assert all(each.line in (None, len(lines) + 2) for each in told)


@pytest.mark.parametrize(
    ("text", "line", "column", "told"),
    [
        ("[retire]\nwindow = \n", 2, 10, 'the value after "=" is missing; found window ='),
        ("[retire]\nwindow = 72h\n", 2, 12, 'in quotation marks: "72h"'),
        ("relocation.target = localhost\n", 1, 21, 'in quotation marks: "localhost"'),
        ("retire.dry_run = True\n", 1, 18, "true or false, in small letters"),
        ("retire.dry_run = yes # now\n", 1, 18, "true or false, in small letters"),
        ("[retire]\n[retire]\n", 2, 8, "there twice; put all its keys under one"),
        ("retire.dry_run = true\nretire.dry_run = true\n", 2, 22, "is there twice; keep one"),
        ("window: 72h\n", 1, 7, 'followed by "="'),
        ("[retire\n", 1, 8, "end with ]"),
        ('[domains]\nallow = ["a" "b"]\n', 2, 14, "a comma is missing"),
        ('control.socket = "/run\n', 1, 23, "no quotation mark at its end"),
        ("\ncontrol.socket = '/run\n[retire]\n\n", 2, None, "no quotation mark at its end"),
        ("domains.deny = [\n'a',\n[retire]\nwindow = '1s'\n", 3, 2, "is the ] missing"),
        ("retire.enabled = true\n\ndomains.deny = [\n'a',\n", 3, None, "has no ] at its end"),
        ('control.socket = "C:\\query"\n', 1, 23, "a backslash has a meaning"),
        ("\ufeff[retire]\n", 1, 1, "byte order mark"),
        ("retire.dry_run = true retire.enabled = true\n", 1, 23, "one key"),
        ("-- what?\n= 1\n", 1, 4, 'followed by "="'),
        ("[retire]\nwindow", 2, None, 'followed by "="'),
    ],
)
def test_what_is_not_toml_is_told_in_plain_words_with_its_place(
    tmp_path: Path, text: str, line: int, column: int | None, told: str
) -> None:
    path = tmp_path / "broken.toml"
    path.write_text(text, newline="")
    with pytest.raises(ConfigError) as caught:
        load(path)
    [message] = str(caught.value).splitlines()
    place = f"line {line}" if column is None else f"line {line}, column {column}"
    assert message.startswith(f"{path}: {place}: ")
    assert told in message


def test_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: there is no such file; give the path"):
        load(tmp_path / "absent.toml")


def test_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this is a directory"):
        load(tmp_path)


def test_file_that_may_not_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    # Root, as which these tests may run, is refused nothing.
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConfigError, match="permission denied; run as root"):
        load(tmp_path / "pgofflined.toml")


def test_file_that_is_not_utf8_is_told_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "latin.toml"
    path.write_bytes(b"# \xc3\xa9t\xc3\xa9\n# \xc3\xa9 caf\xe9\n")
    with pytest.raises(ConfigError, match="line 2, column 8: the byte 0xe9 is no text in UTF-8"):
        load(path)


def test_file_over_a_mebibyte_is_told(tmp_path: Path) -> None:
    path = tmp_path / "large.toml"
    path.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="more than 1 MiB"):
        load(path)
    path.write_bytes(b"#" * (1 << 20))
    assert load(path).policy == Policy()


@pytest.mark.parametrize(
    ("text", "key", "told"),
    [
        ('relocation.save_directory = "/tmp/saves"', "relocation.save_directory", "everybody"),
        ('relocation.save_directory = "/tmp"', "relocation.save_directory", "everybody"),
        ('relocation.save_directory = "/./tmp/x"', "relocation.save_directory", "everybody"),
        ('relocation.save_directory = "/var/tmp/x"', "relocation.save_directory", "everybody"),
        ('relocation.save_directory = "/dev/shm/x"', "relocation.save_directory", "everybody"),
        ('relocation.save_directory = "/run/saves"', "relocation.save_directory", "in memory"),
        ('relocation.save_directory = "/root/x"', "relocation.save_directory", "ProtectHome="),
        ('metrics.listen = "0.0.0.0:9709"', "metrics.listen", "nor a password"),
        ('metrics.listen = "[::]:9709"', "metrics.listen", "nor a password"),
        ('metrics.listen = "192.0.2.1:9709"', "metrics.listen", "nor a password"),
        ('metrics.listen = "xen1.example:9709"', "metrics.listen", "nor a password"),
        ('metrics.listen = "unix:/srv/m.sock"', "metrics.listen", "ReadWritePaths="),
        ('control.socket = "/tmp/c.sock"', "control.socket", "ReadWritePaths="),
        ('domains.allow = ["web"]', "domains.allow", "it has no effect"),
        ('domains.default = "deny"', "domains.default", "no domain is allowed"),
        (
            'domains = { default = "deny", allow = ["a", "b"], deny = ["b"] }',
            "domains.allow",
            '"b" has no effect',
        ),
        ('retire.max_retired = "0%"', "retire.max_retired", "no page is ever retired"),
        ('retire.max_retired = "4095B"', "retire.max_retired", "no page is ever retired"),
        ('retire.max_retired = "11%"', "retire.max_retired", "more than 10 %"),
        ('exchange.ask_unannounced = ["a", "**"]', "exchange.ask_unannounced", "every domain"),
        (
            'relocation = { enabled = false, target = "spare" }',
            "relocation.target",
            "it has no effect",
        ),
        (
            "relocation = { enabled = false, save_restore = true }",
            "relocation.save_restore",
            "it has no effect",
        ),
        (
            'relocation.ssh_command = "ssh -o StrictHostKeyChecking=no"',
            "relocation.ssh_command",
            "host key",
        ),
    ],
)
def test_what_is_legal_and_hardly_meant_is_a_warning(text: str, key: str, told: str) -> None:
    warnings = warnings_of(f"# first\n{text}")
    assert list(warnings) == [key]
    assert warnings[key].startswith(f"line 2: {key}: ")
    assert told in warnings[key]


@pytest.mark.parametrize(
    "text",
    [
        "",
        'relocation.save_directory = "/var/lib/pgofflined/saves"',
        'relocation.save_directory = "/tmpfs"',
        'relocation.save_directory = "/srv/tmp"',
        'metrics.listen = "127.0.0.2:1"',
        'metrics.listen = "[::1]:1"',
        'metrics.listen = "localhost:1"',
        'metrics.listen = "off"',
        'metrics.listen = "unix:/run/pgofflined/m.sock"',
        'domains = { default = "deny", allow = ["a"], deny = ["b"] }',
        'domains.deny = ["b"]',
        'retire.max_retired = "10%"',
        'retire.max_retired = "1TiB"',
        'exchange.ask_unannounced = ["*-old"]',
        'relocation.target = "spare"',
        "relocation.enabled = false",
    ],
)
def test_what_may_be_meant_is_no_warning(text: str) -> None:
    assert warnings_of(text) == {}


@pytest.mark.parametrize(("mode", "told"), [(0o644, False), (0o664, True), (0o646, True)])
def test_a_file_that_others_may_change_is_a_warning(
    tmp_path: Path, mode: int, *, told: bool
) -> None:
    path = tmp_path / "pgofflined.toml"
    path.touch()
    path.chmod(mode)
    found = load(path)
    assert bool(found.warnings) is told
    assert all(f"chmod go-w {path}" in line for line in found.warnings)


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
        assert isinstance(parse(text, name="x.toml").policy, Policy)


@given(st.text(st.sampled_from("[]{}=\"'\\n\\t\\r\\\\#.,a1 -:\ufeff\u2028"), max_size=40))
def test_any_text_is_taken_or_told(text: str) -> None:
    with suppress(ConfigError):
        parse(text, name="x.toml")


def test_the_shipped_file_gives_no_warning() -> None:
    assert parse(SHIPPED.read_text(), name="shipped").warnings == ()


def test_exit_code_is_that_of_sysexits() -> None:
    assert EX_CONFIG == 78
