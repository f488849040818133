"""The command ``fusedhead``: one table of subcommands, each with its own help.

    fusedhead run train.py                  run a program with fusedhead in place of Inductor
    fusedhead explain package.module:step   what became of every head of one function
    fusedhead estimate train.py             the same and its memory before anything is compiled or allocated
    fusedhead env                           what a report of a fault needs
    fusedhead tune                          time the tiles on this machine's GPU
    fusedhead rules                         what is fused and what is left

A subcommand is a module with ``add_arguments(parser)``, and ``execute(given, parser, rest)``, which returns the exit
code.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from fusedhead.version import __version__


class Command(NamedTuple):
    module: str
    help: str
    epilog: str = ""
    runs_a_program: str = ""  # the usage where a program follows with arguments of its own, which may look like ours


PROGRAM = "(script.py | -m module) [arguments of the program ...]"
COMMANDS = {
    "run": Command(
        "fusedhead.run.program",
        "run a program with fusedhead in place of Inductor",
        "The program is not changed. With a launcher: torchrun ... -m fusedhead run train.py, or accelerate launch -m "
        "fusedhead run train.py. Processes that the program itself starts afresh (spawn) call fusedhead.enable().",
        PROGRAM,
    ),
    "explain": Command(
        "fusedhead.run.explain_function",
        "say what became of every head of one function",
        "FUNCTION is called without arguments. If it returns a tuple, (model, x, y), the first is compiled and called "
        "with the rest; otherwise FUNCTION itself is compiled and called again.",
    ),
    "estimate": Command(
        "fusedhead.run.estimate_program",
        "say what a program's heads would hold and take, without compiling and without memory",
        "The program runs on fake tensors, which have sizes and no numbers: until it ends, or asks for a number.",
        PROGRAM,
    ),
    "env": Command("fusedhead.run.environment", "print what a report of a fault needs"),
    "tune": Command("fusedhead.tune", "time the kernels' tiles on this machine's GPU and keep the fastest"),
    "rules": Command("fusedhead.rules.__main__", "print what is fused and what is left to Inductor"),
}
BROKEN_PIPE = 141  # the exit code that a shell gives a process ended by SIGPIPE


def parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the command, and those of its subcommands."""
    top = argparse.ArgumentParser(
        prog="fusedhead",
        description="A torch.compile backend that never builds the logits. `fusedhead COMMAND --help` has more.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"fusedhead {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    by_command = {}
    for name, command in COMMANDS.items():
        usage = f"fusedhead {name} [options] {command.runs_a_program}" if command.runs_a_program else None
        by_command[name] = commands.add_parser(
            name,
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            usage=usage,
            epilog=command.epilog or None,
            allow_abbrev=False,
        )
        import_module(command.module).add_arguments(by_command[name])
    return top, by_command


def split(command: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split our arguments from the program and its arguments, which may look like ours."""
    takes_value = {flag for action in command._actions if action.nargs is None for flag in action.option_strings}
    rest = list(arguments)
    command_words: list[str] = []
    while rest and rest[0].startswith("-") and rest[0] != "-":
        command_words.append(rest.pop(0))
        if command_words[-1] in takes_value and rest:
            command_words.append(rest.pop(0))
        if command_words[-1] == "-m":
            break
    return command_words, rest


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. Without a command, show the help."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    top, by_command = parsers()
    if not words:
        top.print_help()
        return 0
    name = words[0]
    rest: list[str] = []
    if name in COMMANDS and COMMANDS[name].runs_a_program:
        command_words, rest = split(by_command[name], words[1:])
        words = [name, *command_words]
    namespace = top.parse_args(words)
    if namespace.command is None:
        top.print_help()
        return 0
    execute = import_module(COMMANDS[namespace.command].module).execute
    if rest or COMMANDS[namespace.command].runs_a_program:
        return execute(namespace, by_command[namespace.command], rest)
    try:
        code = execute(namespace, by_command[namespace.command], rest)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `fusedhead rules | head`
        close_output()
        return BROKEN_PIPE


def close_output() -> None:
    """Redirect stdout where its pipe has been closed, so that the flush at exit does not fail either."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
