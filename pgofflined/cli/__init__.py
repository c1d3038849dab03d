"""The command line.

Exit status: 0 done, 1 failed or refused, 64 wrong usage, 69 the daemon does not run (or cannot
start), 77 only root may, 78 the configuration has mistakes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NoReturn

from pgofflined import __version__
from pgofflined.cli import view
from pgofflined.config import DEFAULT_PATH, ConfigError, load
from pgofflined.control import client
from pgofflined.control.protocol import (
    MAX_PAGES,
    JobsReply,
    JobsRequest,
    OfflineReply,
    OfflineRequest,
    QueryReply,
    QueryRequest,
    Reply,
    Request,
    StatusReply,
    StatusRequest,
)
from pgofflined.core.errors import PortError
from pgofflined.core.frames import Mfn, parse_mfn
from pgofflined.core.pages import MFN_BITS
from pgofflined.core.policy import ControlPolicy, effective

_MAX_MFN: Final = Mfn((1 << MFN_BITS) - 1)

_EXIT_STATUS: Final = """\
exit status: 0 done; 1 failed or refused; 64 wrong usage; 69 the daemon does not run, or cannot
start; 77 only root may; 78 the configuration has mistakes
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
    status.set_defaults(perform=_status)

    query = commands.add_parser("query", help="what is known of one page")
    query.add_argument("mfn", type=_mfn, metavar="MFN", help="0x1a2b3, or 107187")
    _add_client_options(query)
    query.set_defaults(perform=_query)

    offline = commands.add_parser("offline", help="retire one page, by the same rules as any")
    offline.add_argument("mfn", type=_mfn, metavar="MFN", help="0x1a2b3, or 107187")
    _add_client_options(offline)
    offline.set_defaults(perform=_offline)

    jobs = commands.add_parser("jobs", help="the exchanges and migrations that run or wait")
    _add_client_options(jobs)
    jobs.set_defaults(perform=_jobs)

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
        return _fail(error, os.EX_UNAVAILABLE)
    if released:
        print(f"xl's monitors go on: processes {', '.join(map(str, released))}")
    return 0


def _status(options: argparse.Namespace) -> int:
    return _ask(options, StatusRequest(pages=options.pages))


def _query(options: argparse.Namespace) -> int:
    return _ask(options, QueryRequest(mfn=options.mfn))


def _offline(options: argparse.Namespace) -> int:
    return _ask(options, OfflineRequest(mfn=options.mfn))


def _jobs(options: argparse.Namespace) -> int:
    return _ask(options, JobsRequest())


def _ask(options: argparse.Namespace, request: Request) -> int:
    try:
        reply = client.ask(options.socket or _configured_socket(options.config), request)
    except client.NotRunning as error:
        return _fail(error, os.EX_UNAVAILABLE)
    except client.NotAllowed as error:
        return _fail(error, os.EX_NOPERM)
    except client.RequestFailed as error:
        return _fail(error, 1)
    print(view.as_json(reply) if options.json else "\n".join(_lines(reply)))
    return 1 if isinstance(reply, OfflineReply) and not reply.accepted else 0


def _lines(reply: Reply) -> list[str]:
    now = time.time()
    match reply:
        case StatusReply():
            return view.status(reply, now)
        case JobsReply():
            return view.jobs(reply, now)
        case QueryReply():
            return view.query(reply, now)
        case OfflineReply():
            return view.offline(reply)
        case _:
            raise AssertionError(f"the client gave {reply}")


def _configured_socket(config: Path) -> Path:
    """Where the daemon listens; the default where its configuration cannot be read."""
    try:
        return Path(load(config).policy.control.socket)
    except ConfigError:
        return Path(ControlPolicy().socket)


def _fail(error: Exception, status: int) -> int:
    print(f"pgofflined: {error}", file=sys.stderr)
    return status
