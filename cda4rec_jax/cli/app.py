"""From the command line to a command, and from an error to one message and an exit code."""

import errno
import os
import sys
from collections.abc import Sequence

import tyro
from rich.console import Console

from cda4rec_jax import __version__
from cda4rec_jax.cli.arguments import ARGUMENT_TYPES
from cda4rec_jax.cli.commands import COMMANDS, Command
from cda4rec_jax.cli.console import Stopped
from cda4rec_jax.errors import UserError

OK, OUTPUT_CLOSED, BAD_INPUT, STOPPED = 0, 1, 2, 130

DESCRIPTION = """Recommend with two agents, a cloud model and a model on the user's device, and a planner that divides the work.

`cda4rec COMMAND --help` explains the flags of a command; `cda4rec --version` prints the version."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: without the name of the program; None takes those of the process.

    Returns:
        0; 2 for anything that the user can mend, after one message on stderr; 130 after Ctrl-C; 1, silently, where nobody reads the
        output any more (``cda4rec ... | head``).
    """
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        _forget_output()
        return OUTPUT_CLOSED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _forget_output()
        where = f" ({error.filename})" if error.filename else ""
        print(f"cda4rec: {error.strerror}{where}: free some, or write elsewhere", file=sys.stderr)
        return BAD_INPUT
    return code


def _forget_output() -> None:
    """Python writes what is left when it ends, and would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        print(f"cda4rec {__version__}")
        return OK
    errors = Console(stderr=True, highlight=False)
    try:
        parse(arguments).run()
    except SystemExit as end:  # tyro has printed the help, or what is wrong and the nearest flag
        return end.code if isinstance(end.code, int) else BAD_INPUT
    except UserError as error:
        errors.print(f"cda4rec: {error}", style="red", markup=False, soft_wrap=True)
        return BAD_INPUT
    except Stopped as stopped:
        errors.print(f"cda4rec: {stopped}", markup=False, soft_wrap=True)
        return STOPPED
    except KeyboardInterrupt:
        errors.print("cda4rec: stopped")
        return STOPPED
    return OK


def parse(arguments: Sequence[str]) -> Command:
    """The command that the arguments describe. Raises SystemExit after printing help (code 0) or what is wrong (code 2)."""
    return tyro.extras.subcommand_cli_from_dict(
        dict(COMMANDS),
        prog="cda4rec",
        description=DESCRIPTION,
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
        registry=ARGUMENT_TYPES,
    )
