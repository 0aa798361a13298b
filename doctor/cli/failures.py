"""Errors as a user meets them: a sentence, a hint, an exit code, and no traceback unless DOCTOR_DEBUG=1 asks for it.

Exit 1: findings. 2: the work could not be done (usage, files, machine, or a bug in doctor). 130: interrupted.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import click

from doctor.cli import stderr, usage
from doctor.core.errors import CheckpointNotReady, DoctorError, MachineError
from doctor.core.messages import _

INTERRUPTED = _("Interrupted.")
DEFECT: str = _("internal error (a bug in doctor): report it with what DOCTOR_DEBUG=1 prints.")
# What a base installation has not: `check`, `fix`, `explain`, `render` and reports do without.
OF_EXTRA = ("accelerate", "torch", "transformers", "tokenizers", "safetensors", "scipy", "greenlet", "yaml")
INSTALL: str = _("`pip install 'checkpoint-doctor[quantize]'` brings it.")


@contextmanager
def shown() -> Iterator[None]:
    """Inside it whatever escapes is printed and ends the process with its exit code."""
    try:
        yield
    except (click.exceptions.Abort, KeyboardInterrupt):
        end(INTERRUPTED, "", 130)
    except click.exceptions.Exit:
        raise
    except click.ClickException as error:
        usage.in_language(error).show()
        sys.exit(2)
    except BrokenPipeError:  # `doctor check | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)
    except CheckpointNotReady as error:
        end(error.message, error.hint, 1)
    except DoctorError as error:
        end(error.message, error.hint, 2)
    except ModuleNotFoundError as error:
        absent = of_extra(error)
        if absent is None:
            end(f"{type(error).__name__}: {error}", DEFECT, 2)
        end(absent.message, absent.hint, 2)
    except (OSError, MemoryError) as error:
        end(f"{type(error).__name__}: {error}", "", 2)
    except Exception as error:
        end(
            f"{type(error).__name__}: {error}",
            DEFECT,
            2,
        )


def of_extra(error: Exception) -> MachineError | None:
    """What to say of a module that only the extra brings; None for any other error."""
    module = (getattr(error, "name", "") or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if module not in OF_EXTRA:
        return None
    return MachineError(_("{module} is not installed, and this needs it.", module=module), INSTALL)


def end(message: str, hint: str, code: int) -> NoReturn:
    """Print an error and its hint on stderr, and exit."""
    if os.environ.get("DOCTOR_DEBUG") == "1" and sys.exc_info()[0] is not None and code != 130:
        import traceback

        traceback.print_exc()
    if code == 130:
        stderr.line(message)
    else:
        stderr.error(message, hint)
    sys.exit(code)
