"""The command line.

Exit status: 0 done, 1 failed or refused, 64 wrong usage, 69 the daemon does not run (or cannot
start), 75 not at its end yet or too busy, 77 only root may, 78 the configuration has mistakes.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NoReturn

from pgofflined import __version__
from pgofflined.cli import asking
from pgofflined.config import DEFAULT_PATH, ConfigError, load
from pgofflined.control.protocol import MAX_PAGES
from pgofflined.core.conditions import ConditionCode
from pgofflined.core.errors import PortError
from pgofflined.core.frames import Mfn, parse_mfn
from pgofflined.core.pages import MFN_BITS
from pgofflined.core.policy import effective
from pgofflined.core.units import parse_duration

_MAX_MFN: Final = Mfn((1 << MFN_BITS) - 1)
_MAX_DOMID: Final = 0x7FF0  # DOMID_FIRST_RESERVED, xen/include/public/xen.h

_EXIT_STATUS: Final = """\
exit status: 0 done; 1 failed or refused; 64 wrong usage; 69 the daemon does not run, or cannot
start; 75 too busy, try again later; 77 only root may; 78 the configuration has mistakes
"""
_OFFLINE_STATUS: Final = """\
exit status: 0 the page is out of use, or without --wait: it was taken; 1 it is not retired, or
stays in use; 75 with --wait: it is still under way; and as for the other commands
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and exit as sysexits.h has it."""
        self.print_usage(sys.stderr)
        self.exit(os.EX_USAGE, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the arguments say; gives the exit status."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if options.command == "demo":
        return _demo(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    perform: Callable[[argparse.Namespace], int] = options.perform
    try:
        return perform(options)
    except BrokenPipeError:
        # Whoever reads us, head perhaps, has had enough.  Python would complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pgofflined",
        description="Retires failing memory pages on Xen hosts while their owners run on.",
        epilog=_EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pgofflined {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    run = commands.add_parser("run", help="run the daemon in the foreground (systemd does)")
    _add_config(run)
    run.set_defaults(perform=_run)

    status = commands.add_parser("status", help="what needs somebody, and how things stand")
    _add_client_options(status)
    status.add_argument(
        "--pages", type=_page_count, default=50, metavar="N", help="list so many pages at most (50)"
    )
    status.set_defaults(perform=asking.status)

    query = commands.add_parser("query", help="what is known of one page")
    query.add_argument("mfn", type=_mfn, metavar="MFN", help="0x1a2b3, or 107187")
    _add_client_options(query)
    query.set_defaults(perform=asking.query)

    _add_offline(commands)
    _add_acknowledge(commands)

    jobs = commands.add_parser("jobs", help="the exchanges and migrations that run or wait")
    _add_client_options(jobs)
    jobs.set_defaults(perform=asking.jobs)

    check = commands.add_parser("check-config", help="check a configuration file and explain it")
    check.add_argument("file", type=Path, nargs="?", default=DEFAULT_PATH, metavar="FILE")
    check.add_argument("--quiet", action="store_true", help="print errors and warnings only")
    check.add_argument("--strict", action="store_true", help="exit status 1 if there is a warning")
    check.set_defaults(perform=_check_config)

    release = commands.add_parser(
        "release-monitors", help="let xl's monitors go on that a killed daemon has left stopped"
    )
    release.set_defaults(perform=_release_monitors)

    recover = commands.add_parser(
        "recover", help="end what a daemon that does not run any more has left of exchanges"
    )
    recover.add_argument(
        "--after-stop",
        action="store_true",
        help="as systemd runs it: once, and again in a minute, where a restart may come first",
    )
    recover.set_defaults(perform=_recover)

    # Its options are its own business, --help included.
    commands.add_parser("demo", help="see it at work on a simulated host", add_help=False)
    return parser


def _add_offline(commands: argparse._SubParsersAction[_Parser]) -> None:
    offline = commands.add_parser(
        "offline",
        help="retire one page, by the same rules as any",
        epilog=_OFFLINE_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    offline.add_argument("mfn", type=_mfn, metavar="MFN", help="0x1a2b3, or 107187")
    offline.add_argument(
        "--wait", action="store_true", help="until it is out of use, or stays where it is"
    )
    offline.add_argument(
        "--timeout",
        type=_seconds,
        default=3600.0,
        metavar="TIME",
        help="wait no longer than this (1h); 90s, 10m, 2h",
    )
    _add_client_options(offline)
    offline.set_defaults(perform=asking.offline)


def _add_acknowledge(commands: argparse._SubParsersAction[_Parser]) -> None:
    acknowledge = commands.add_parser(
        "acknowledge", help="say that you know of what `status` lists; it counts no more then"
    )
    acknowledge.add_argument(
        "code",
        type=_code,
        metavar="CODE",
        help="as `status` names it, or `all`; see docs/runbook.md",
    )
    acknowledge.add_argument("--mfn", type=_mfn, metavar="MFN", help="of this page only")
    acknowledge.add_argument("--domid", type=_domid, metavar="N", help="of this guest only")
    _add_client_options(acknowledge)
    acknowledge.set_defaults(perform=asking.acknowledge)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, default=DEFAULT_PATH, metavar="FILE", help=f"{DEFAULT_PATH}"
    )


def _add_client_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs: one JSON document")
    parser.add_argument(
        "--socket", type=Path, metavar="PATH", help="the daemon's, if not as configured"
    )
    _add_config(parser)


def _mfn(untrusted_text: str) -> str:
    try:
        return f"{parse_mfn(untrusted_text, max_mfn=_MAX_MFN):#x}"
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _page_count(untrusted_text: str) -> int:
    if untrusted_text.isascii() and untrusted_text.isdigit() and int(untrusted_text) <= MAX_PAGES:
        return int(untrusted_text)
    raise argparse.ArgumentTypeError(f"give a number from 0 to {MAX_PAGES}")


def _seconds(untrusted_text: str) -> float:
    try:
        return parse_duration(untrusted_text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _code(untrusted_text: str) -> ConditionCode | None:
    """None stands for any."""
    if untrusted_text == "all":
        return None
    try:
        return ConditionCode(untrusted_text)
    except ValueError:
        codes = ", ".join(code.value for code in ConditionCode if code.can_be_acknowledged)
        raise argparse.ArgumentTypeError(f"no such code; give `all` or one of {codes}") from None


def _domid(untrusted_text: str) -> int:
    if untrusted_text.isascii() and untrusted_text.isdigit() and int(untrusted_text) < _MAX_DOMID:
        return int(untrusted_text)
    raise argparse.ArgumentTypeError(f"give a number from 0 to {_MAX_DOMID - 1}")


def _run(options: argparse.Namespace) -> int:
    from pgofflined.daemon import run

    return run(options.config)


def _demo(arguments: Sequence[str]) -> int:
    from pgofflined.demo import main as demo_main

    return demo_main(arguments)


def _check_config(options: argparse.Namespace) -> int:
    try:
        found = load(options.file)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return os.EX_CONFIG
    for line in found.warnings:
        print(f"warning: {line}", file=sys.stderr)
    if not options.quiet:
        print(f"{options.file} can be used; it means:", *effective(found.policy), sep="\n")
    return 1 if found.warnings and options.strict else 0


def _recover(options: argparse.Namespace) -> int:
    from pgofflined.afterstop import main as recover_main

    return recover_main(after_stop=options.after_stop)


def _release_monitors(options: argparse.Namespace) -> int:
    from pgofflined.xen.hypervisor import release_monitors

    del options
    try:
        released = release_monitors()
    except PortError as error:
        return asking.fail(error, os.EX_UNAVAILABLE)
    if released:
        print(f"xl's monitors go on: processes {', '.join(map(str, released))}")
    return 0
