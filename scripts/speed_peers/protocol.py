"""The side of a contender's process: one JSON request a line on stdin, one JSON reply a line on what was stdout.

These processes run in the contenders' own environments, which do not have hf-quant: nothing here may import it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

Handler = Callable[..., dict[str, Any]]


def serve(handlers: dict[str, Handler]) -> None:
    """Answer requests ``{"do": name, argument: value, ...}`` until stdin closes.

    A handler that raises is answered with ``{"failed": reason}`` and its traceback goes to stderr, as does everything
    that libraries print: file descriptor 1 is redirected, so that only replies reach the pipe.
    """
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)
        for line in sys.stdin:
            print(json.dumps(answer(handlers, line)), file=replies, flush=True)


def answer(handlers: dict[str, Handler], line: str) -> dict[str, Any]:
    """The reply to one request."""
    request = json.loads(line)
    try:
        return handlers[request.pop("do")](**request)
    except Exception as error:  # whatever a library raises is this contender's result
        sys.excepthook(type(error), error, error.__traceback__)
        return {"failed": f"{type(error).__name__}: {error}"}
