"""The command `detune`: each subcommand parses and calls one public function.

torch is imported inside the subcommands, so that `detune --help` answers at once.
"""

import logging
import os
import sys
import traceback
from contextlib import suppress

import click

import detune
from detune.cli.adapters import extract, pack, unpack
from detune.cli.audit import audit
from detune.cli.bench import bench
from detune.cli.defend import defend
from detune.cli.options import METHODS
from detune.cli.publish import push
from detune.cli.recovery import compare, demo, family, inspect, recover
from detune.cli.signals import Interrupted, leave, signals_raised
from detune.cli.terminal import Formatter, say
from detune.errors import DetuneError, cure_of

__all__ = ["METHODS", "cli", "main"]

CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2", "urllib3")
"""Options by which the Hub is asked."""

INTERRUPTED, NOTHING_KEPT = "detune: interrupted, nothing unfinished passes for a result", "nothing is kept"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(detune.__version__, prog_name="detune")
@click.option("-v", "--verbose", count=True, help="Log what is done; twice for every tensor.")
def cli(verbose: int) -> None:
    """Recover a base model's weights from merged LoRA fine-tunes of it.

    A MODEL is a directory in Hugging Face layout, a diffusers pipeline, a .safetensors file, a Hub id (id@revision),
    or BASE+ADAPTER, a LoRA merged on the fly.
    """
    levels = (logging.WARNING, logging.INFO, logging.DEBUG)
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter("%(levelname)s %(name)s: %(message)s"))
    for library in CLIENTS:
        # They log addresses with signatures in them.
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.basicConfig(level=levels[min(verbose, 2)], handlers=[handler])
    if not verbose:
        # It tells of every retry, twice; what counts comes in the one line at the end.
        os.environ.setdefault("HF_HUB_VERBOSITY", "critical")


for command in (recover, inspect, family, compare, audit, extract, pack, unpack, push, demo, defend, bench):
    cli.add_command(command)


def main() -> None:
    """Entry point: an error of the user's is one line on stderr and exit code 2, a signal one line and its own code."""
    try:
        with signals_raised():
            code = cli(standalone_mode=False)
        sys.exit(code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except DetuneError as error:
        say("; ".join((f"detune: error: {error}", *_notes(error))), err=True)
        sys.exit(2)
    except Interrupted as error:
        with suppress(OSError):
            say("; ".join((INTERRUPTED, *(_notes(error) or [NOTHING_KEPT]))), err=True)
        leave(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        say(INTERRUPTED, err=True)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone, as in `detune inspect ... | head`: not an error worth a word.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        # A disk that is full or refuses, at a place that has no word of its own for it.
        place, why = error.filename or "a file", error.strerror or str(error)
        told = DetuneError(f"cannot read or write {place}", why, cure_of(error, "check the disk"))
        say(f"detune: error: {told}", err=True)
        sys.exit(2)
    except Exception as error:
        if _is_of_the_disk(error):
            say(f"detune: error: {DetuneError('cannot write a file', str(error), 'check the disk')}", err=True)
            sys.exit(2)
        # Ours to mend. Python would end with 1, by which `audit` says that something is given away.
        traceback.print_exc()
        sys.exit(2)


def _is_of_the_disk(error: Exception) -> bool:
    """Whether it is what safetensors, which PEFT and transformers write with, makes of an OSError."""
    safetensors = sys.modules.get("safetensors")
    return safetensors is not None and isinstance(error, safetensors.SafetensorError) and "I/O error" in str(error)


def _notes(error: BaseException) -> list[str]:
    """The words that an error was given on its way, as `kept_for_later` does."""
    return getattr(error, "__notes__", [])
