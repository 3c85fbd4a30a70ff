"""Elements, rows, columns and blocks of a language model: the study of grains.py with another model or task.

    python -m benchmarks grains-language --model gemma3-270m --task summary --out out/gemma_summary.json

Contenders, the search of rates, and what a run says are those of `python -m benchmarks grains`; the tasks are those of
language_tasks.py. The score is the mean loss of a token of the answers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from . import grains
from .grain_tasks import completion
from .language_tasks import TASKS
from .models import MODEL_HELP
from .study import Content, program


def arguments(add: Callable[..., Any]) -> None:
    add("--model", default="smollm2", help=f"{MODEL_HELP}, of a causal language model [%(default)s]")
    add("--task", default="summary", choices=list(TASKS), help="[%(default)s]")
    grains.arguments(add)


def table(content: Content) -> str:
    settings = content["settings"]
    return grains.rows_of(content, "grains-language", f"{settings['model']}, {settings['task']}", higher=False)


main = program(
    "grains-language",
    __doc__,
    arguments,
    partial(grains.measure, make_task=completion),
    table,
    small=grains.SMALL,
)
