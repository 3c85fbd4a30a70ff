"""Elements, rows, columns and blocks of an encoder that classifies: the study of grains.py on another task.

    python -m benchmarks grains-text

MiniLM names the subpackage that a docstring of scipy or sympy comes from, by a classifier over the mean of its states.
Contenders, the search of rates, and what a run says are those of `python -m benchmarks grains`; all train the
classifier too, with one rate. The score is accuracy.
"""

from __future__ import annotations

from functools import partial

from . import grains
from .comparing.runs import measure, rows_of
from .comparing.tasks import Classification
from .study import Content, program


def table(content: Content) -> str:
    source = content["settings"]["data"]
    return rows_of(content, grains.CONTENDERS, "grains-text", f"MiniLM, subpackages of {source}", higher=True)


main = program(
    "grains-text",
    __doc__,
    grains.arguments,
    partial(measure, make_task=Classification, contenders=grains.CONTENDERS),
    table,
    small=grains.SMALL,
)
