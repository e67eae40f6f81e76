"""The `peftfast` command."""

import logging
import signal
import sys

import typer

from peftfast.cli import bench, compare, convert, demo, info, merge, plan, train
from peftfast.cli.errors import UserError
from peftfast.cli.processes import rank

app = typer.Typer(
    name="peftfast",
    help="Fine-tune language models with PEFT, faster.",
    add_completion=False,
    pretty_exceptions_enable=False,
    # --lora_r is how much of the field spells --lora-r.
    context_settings={"token_normalize_func": lambda token: token.replace("_", "-")},
)
app.command("train")(train.command)
app.command("demo")(demo.command)
app.command("convert")(convert.command)
app.command("compare")(compare.command)
app.command("plan")(plan.command)
app.command("merge")(merge.command)
app.command("info")(info.command)
app.command("bench")(bench.command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 if all went well, 2 and one sentence on stderr for bad input."""
    # bitsandbytes asks, when it is imported, for a package with products that run on our kernels here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # As an exception, so that a run that is told to end takes its temporary folder with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        code = app(args=arguments or sys.argv[1:] or ["--help"], standalone_mode=False)
    except UserError as error:
        code = _refuse(str(error))
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        # typer carries its own copy of click, so its errors over options are known by their method alone.
        if not hasattr(error, "format_message"):
            raise
        code = _refuse(error.format_message())
    sys.exit(code)


def _refuse(sentence: str) -> int:
    who = f"peftfast, process {rank()}" if rank() else "peftfast"
    print(f"{who}: {sentence}", file=sys.stderr)
    return 2
