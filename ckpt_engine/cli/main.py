"""The `ckpt-engine` command. Exit status: 0 done, 1 failed (one message on stderr), 2 bad usage.

Under `torchrun`, which wants a module: `torchrun -m ckpt_engine.cli.main update ...`
"""

from __future__ import annotations

import functools
import logging
import traceback
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from importlib.util import find_spec
from typing import Annotated, Any, ParamSpec

import typer

from ckpt_engine import __version__
from ckpt_engine.cli import Verbose
from ckpt_engine.cli.compat import compat
from ckpt_engine.cli.convert_metadata import convert_metadata
from ckpt_engine.cli.doctor import doctor
from ckpt_engine.cli.inspect import inspect_checkpoint
from ckpt_engine.cli.plan import plan_update
from ckpt_engine.cli.report import report
from ckpt_engine.cli.serve import serve
from ckpt_engine.cli.update import UpdateCommand, update
from ckpt_engine.errors import CkptEngineError, ConfigError, UpdateError

P = ParamSpec("P")

# Plain text, not rich's panels: most of it ends up in the log of a launcher.
app = typer.Typer(
    name="ckpt-engine",
    help="Puts new weights into running LLM inference engines, in place.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class DemoSize(str, Enum):
    SMALL = "small"
    TINY = "tiny"


class DemoEngine(str, Enum):
    EMBEDDED = "embedded"
    VLLM = "vllm"


def demo(
    engine: Annotated[
        DemoEngine,
        typer.Option(help="embedded: two small engines of this package. vllm: vLLM's server, if installed."),
    ] = DemoEngine.EMBEDDED,
    size: Annotated[DemoSize, typer.Option(help="Size of the demo's model.")] = DemoSize.SMALL,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the demo's files.")] = False,
    verbose: Verbose = False,
) -> None:
    """Update two small engines on this machine's CPU.

    Then check that they hold and generate with the new weights.
    """
    from ckpt_engine.cli.demo import run_demo

    options: dict[str, Any] = {"size": size.value, "keep": keep}
    if engine is DemoEngine.VLLM:
        if find_spec("vllm") is None:
            raise ConfigError("--engine vllm: vLLM is not installed here; see `make demo ENGINE=vllm`")
        from ckpt_engine_vllm.demo import VllmDemo

        # Two starts of vLLM, on two cores.
        options |= {"kind": VllmDemo, "timeout": 900}
    # Its last line on stdout is JSON: nothing is printed after it.
    raise typer.Exit(run_demo(**options))


def reported(command: Callable[P, None]) -> Callable[P, None]:
    """`command`, whose expected errors become one message and exit status 1."""

    @functools.wraps(command)  # typer reads the parameters through it
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        verbose = bool(kwargs.get("verbose"))
        try:
            _log(verbose)
            command(*args, **kwargs)
        except BrokenPipeError:
            raise  # `| head` is no error to report; typer ends quietly
        except (CkptEngineError, OSError) as error:
            if verbose:
                typer.echo(traceback.format_exc().rstrip(), err=True)
            typer.echo(_describe(error), err=True)
            raise typer.Exit(1) from None

    return run


def _log(verbose: bool) -> None:
    """Raises ConfigError: bad settings."""
    from ckpt_engine import logs
    from ckpt_engine.settings import load_settings

    log_format = load_settings().log_format
    if verbose or log_format == "json":
        logs.to_stderr(log_format, logging.INFO if verbose else logging.WARNING)


def _describe(error: Exception) -> str:
    text = str(error) or type(error).__name__
    if isinstance(error, UpdateError):
        # The remote traceback is part of its text; --verbose has shown it.
        text = replace(error.record, traceback="").describe()
    return f"{_who()}error: {text}"


def _who() -> str:
    """Whose line it is, where the ranks of a launcher share one stderr."""
    from ckpt_engine.settings import load_settings

    try:
        settings = load_settings()
    except ConfigError:  # the error at hand, then
        return ""
    return f"[rank {settings.rank}] " if (settings.world_size or 1) > 1 else ""


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ckpt-engine {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Puts new weights into running LLM inference engines, in place."""


app.command("update", cls=UpdateCommand)(reported(update))
app.command("serve")(reported(serve))
app.command("inspect")(reported(inspect_checkpoint))
app.command("plan")(reported(plan_update))
app.command("report")(reported(report))
app.command("doctor")(reported(doctor))
app.command("convert-metadata")(reported(convert_metadata))
app.command("compat")(reported(compat))
app.command("demo")(reported(demo))


def main() -> None:
    """The entry point."""
    app(prog_name="ckpt-engine")


if __name__ == "__main__":
    main()
