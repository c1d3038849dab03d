"""The folder in which a module is mutated: a copy of what its tests need."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.mutants.selection import Group

_UNDERNEATH: Final = Path(__file__).with_name("underneath.py")
# What tests read beside the code: of files that are shipped, and of what is written about them.
_BESIDE: Final = ("bench", "config", "docs", "prometheus", "scripts", "systemd")
_READ: Final = (*_BESIDE, "Makefile", "README.md")
_COPIED: Final = ("pgofflined", "tests", *_READ)
# mutmut's exit codes of mutants that survived, that no test came by, and that took too long
# (mutmut/stats.py): on a busy machine that may be for no fault of theirs.
_NOT_KILLED: Final = frozenset({0, 33, 24, -24, 36, 152, 255})
# A mutant that takes so much longer (wall clock, seconds) than its tests take without it hangs, and
# is noticed by that.  There is room for what else a machine does meanwhile.
_SETTINGS: Final = {
    "source_paths": ["pgofflined"],
    "also_copy": _READ,
    # Where mypy has seen to it that nothing comes by.
    "do_not_mutate_patterns": ["assert_never"],
    "pytest_add_cli_args": ["-p", "no:cacheprovider"],
    "timeout_constant": 20.0,
    "timeout_multiplier": 2.0,
    "use_git_change_detection": False,
    "track_dependencies": False,
    "use_setproctitle": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One change of one line, and what the tests made of it."""

    module: str
    function: str
    was: str
    becomes: str
    status: str
    difference: str

    @property
    def key(self) -> str:
        """What names it in the list of explained mutants, also after changes elsewhere."""
        return f"{self.module} {self.function}: {self.was} => {self.becomes}"


class Workplace:
    """Where the modules of a group are mutated, or some of them."""

    def __init__(self, root: Path, build: Path, group: Group, modules: Sequence[str]) -> None:
        self._root = root
        self._folder = build / group.name
        self._results = self._folder / "results.json"
        self._group = group
        self._modules = tuple(modules)

    def prepare(self, *, again: bool) -> None:
        """Copy everything anew; ``again`` keeps the verdicts of mutants that tests have killed."""
        if not again:
            shutil.rmtree(self._folder, ignore_errors=True)
        before = self._sources()
        for name in _COPIED:
            _copy(self._root / name, self._folder / name)
        shutil.rmtree(self._folder / "mutants/tests", ignore_errors=True)
        (self._folder / "mutants/mutmut-stats.json").unlink(missing_ok=True)
        # mutmut leaves alone what is there, and mutates what is newer than its own copy.
        for path in (self._folder / "pgofflined").rglob("*.py"):
            name = str(path.relative_to(self._folder))
            copy = self._folder / "mutants" / name
            if name in self._modules:
                path.write_text(without_properties(path.read_text()))
                self._forget_all_but_killed(name)
            else:
                copy.unlink(missing_ok=True)
        # What types refuse is known of what was tried and has not changed; it takes minutes.
        self._configure(check_types=self._sources() != before or not self._results.exists())

    def _sources(self) -> dict[str, str]:
        paths = {name: self._folder / name for name in self._modules}
        return {name: path.read_text() for name, path in paths.items() if path.exists()}

    def _configure(self, *, check_types: bool) -> None:
        settings = {
            **_SETTINGS,
            "only_mutate": self._modules,
            "pytest_add_cli_args_test_selection": self._group.tests,
            # What strict types refuse never reaches a test.
            "type_check_command": self._type_check() if check_types else [],
        }
        lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        # mutmut writes such comments, and a code that is enabled here cannot be disabled.
        ours = (self._root / "pyproject.toml").read_text().replace(', "ignore-without-code"', "")
        (self._folder / "pyproject.toml").write_text("\n".join([ours, "[tool.mutmut]", *lines, ""]))

    def _type_check(self) -> list[str]:
        return [
            *(sys.executable, "-m", "mypy", "--output", "json"),
            *("--follow-imports", "silent", "--disable-error-code", "unused-ignore"),
            *("--cache-dir", str(self._folder.parent / ".mypy_cache")),
            *self._modules,
        ]

    def _forget_all_but_killed(self, module: str) -> None:
        path = self._folder / "mutants" / f"{module}.meta"
        if not path.exists():
            return
        found = json.loads(path.read_text())
        codes = found["exit_code_by_key"]
        for name in [name for name, code in codes.items() if code in _NOT_KILLED]:
            codes[name] = None
        path.write_text(json.dumps(found))

    def run(self) -> list[Mutant]:
        """Try their mutants.  Raises CalledProcessError if that was not possible."""
        self._results.unlink(missing_ok=True)
        with (self._folder / "log").open("w") as log:
            subprocess.run(
                [sys.executable, _UNDERNEATH, self._results.name],
                cwd=self._folder,
                # CI is what has hypothesis draw the same examples each time, without a time limit.
                env={**os.environ, "CI": "true", "PYTHONPATH": ""},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=True,
            )
        return [_mutant(found) for found in json.loads(self._results.read_text())]


def _copy(source: Path, target: Path) -> None:
    if source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)
        return
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))


def _mutant(found: dict[str, str]) -> Mutant:
    lines = found["difference"].splitlines()
    changed = {
        sign: " ".join(
            " ".join(line[1:].split())
            for line in lines
            if line.startswith(sign) and not line.startswith(sign * 3)
        )
        for sign in "-+"
    }
    name = found["name"].rpartition("__mutmut_")[0].rpartition(".")[2]
    return Mutant(
        module=found["module"],
        function=name.removeprefix("x").removeprefix("_").strip("ǁ").replace("ǁ", "."),
        was=changed["-"],
        becomes=changed["+"],
        status=found["status"],
        difference=found["difference"],
    )


def without_properties(source: str) -> str:
    """The same module, with the body of each property in a method of its own.

    mutmut leaves decorated functions as they are.
    """
    lines = source.splitlines(keepends=True)
    for node in reversed(
        [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    ):
        if [ast.unparse(decorator) for decorator in node.decorator_list] != ["property"]:
            continue
        head = lines[node.lineno - 1]
        body = head.replace(f"def {node.name}(", f"def _of_{node.name}(")
        lines[node.lineno - 1] = f"{head.rstrip()} return self._of_{node.name}()\n{body}"
    return "".join(lines)
