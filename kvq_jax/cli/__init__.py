# SPDX-License-Identifier: Apache-2.0
"""The command line, `kvq`: one module a command.

Commands import jax and all that needs it when they run, so that `--help` doesn't wait for it.
Exit codes: 0 it worked; 1 the data, the model or the machine don't bear it; 2 a wrong call.
"""

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from kvq_jax.cli import options, terminal
from kvq_jax.cli.calibrate import calibrate
from kvq_jax.cli.chat import chat
from kvq_jax.cli.demo import demo
from kvq_jax.cli.evaluate import evaluate
from kvq_jax.cli.fits import fits
from kvq_jax.cli.generate import generate
from kvq_jax.cli.inspect import inspect
from kvq_jax.cli.methods import methods

# With OSError, what the library raises for what a user can mend. Anything else is a bug: its
# traceback is shown.
_EXPECTED = (ValueError, NotImplementedError, FloatingPointError)

app = typer.Typer(
    name="kvq",
    help="KV-cache quantization for JAX. Start with: kvq demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command()(generate)
app.command()(chat)
app.command("eval")(evaluate)
app.command()(calibrate)
app.command()(inspect)
app.command()(fits)
app.command()(methods)


def _print_version(wanted: bool) -> bool:
    if wanted:
        from importlib.metadata import version

        print(f"kvq-jax {version('kvq-jax')} (jax {version('jax')})")
        raise typer.Exit
    return wanted


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print versions."),
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code.

    Args:
      arguments: of the command line; None takes the process's.
    """
    try:
        code = app(arguments, prog_name="kvq", standalone_mode=False)
        sys.stdout.flush()  # here a closed pipe can still be dealt with
        return code or 0
    except options.UsageError as error:
        path = error.ctx.command_path if error.ctx else "kvq"
        message = error.format_message()  # empty for `kvq` alone, which has printed its help
        return _fail(2, f"{message}\nsee {path} --help") if message else 2
    except (KeyboardInterrupt, typer.Abort):
        print(file=sys.stderr)
        return 130  # what a shell reports for Ctrl-C
    except BrokenPipeError:
        # The reader has gone; keep Python from complaining when it flushes stdout at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(1, f"{error.filename}: {error.strerror}" if error.strerror else str(error))
    except _EXPECTED as error:
        return _fail(1, str(error))


def _fail(code: int, message: str) -> int:
    terminal.err.print("error:", style="bold red", end=" ")
    print(message, file=sys.stderr)
    return code
