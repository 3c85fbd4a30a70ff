"""Translate with a few rows of the embedding: KS-Lottery (Yuan et al., arXiv 2402.02801), on real parallel text.

    make ks-lottery    (installs the packages whose text is read, then runs python -m benchmarks ks-lottery)

The text is what installed packages carry: the gettext catalogues of Django, Wagtail, Horizon, Mayan, Plone and pretix,
English into --language, or pairs of your own, --pairs. The model is a small Llama that the program trains first on
text of all the languages (see translating/decoder.py for what it reads), or any causal language model,
--model. A prompt is a line "en: sentence" and the beginning of the next, ":", which does not say into which language;
the answer is what comes after, until the end token. Output is scored as a whole and up to its first line break, since
much of what a small tuning gains can be that the model learns to stop.

Methods, all on the same batches with as many steps, each with its own learning rate: nothing, all weights, the input
embedding, the rows of the ticket, the ticket's rows moved over without training, and for comparison as many rows of
largest shift, of most frequent tokens, at random, and one single row, that of the token before the answer. The ticket
is the 2 % of the rows with the smallest p-values; how many of all have p < alpha is reported.

Rates are searched by chrF on the validation split, with the first language and the first seed. Every language and seed
is added to the results file as soon as it is done; starting again continues there.
Results: --out, and beside it the same name with .md, .png, _pvalues.png and _ranked.png.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .finetuning.config import Config
from .finetuning.text_task import DataError
from .finetuning.training import load_model, silence
from .models import MODEL_HELP, model_folder
from .study import Content, Study, positive, program
from .translating import decoder, parallel_text, plots, tables
from .translating.decoder import Recipe
from .translating.lottery import Job, Lottery, Settings
from .translating.parallel_text import Pair, ParallelText

LANGUAGES = ("de", "es")
SEEDS = (0, 1, 2)


def arguments(add: Callable[..., Any]) -> None:
    add("--language", action="append", help=f"repeatable [{', '.join(LANGUAGES)}]")
    add(
        "--pairs",
        type=Path,
        help='file of lines "source<TAB>target"; one --language names the target [catalogues]',
    )
    add("--model", help=f"{MODEL_HELP}, of a causal language model [a small one, trained first]")
    add("--seed", type=int, action="append", help=f"repeatable [{', '.join(map(str, SEEDS))}]")
    add("--epochs", type=positive, default=2, help="of tuning [%(default)s]")
    add("--batch-size", type=positive, default=32, help="[%(default)s]")
    add("--tuning-pairs", type=positive, default=10_000, help="at most so many for each language [%(default)s]")
    add("--validation-pairs", type=positive, default=200, help="at most so many [%(default)s]")
    add("--test-pairs", type=positive, default=500, help="at most so many [%(default)s]")
    add("--max-new-tokens", type=positive, default=48, help="of an answer [%(default)s]")
    add("--alpha", type=float, default=0.05, help="level of the test [%(default)s]")
    add("--model-steps", type=positive, default=Recipe.steps, help="to train the default model for [%(default)s]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[%(default)s]")
    add("--cache", type=Path, default=Path("out/ks_lottery"), help="folder for the default model [%(default)s]")


def few(pairs: Sequence[Pair], most: int) -> list[Pair]:
    """At most so many of them, drawn once and for all."""
    return list(pairs) if len(pairs) <= most else random.Random(0).sample(list(pairs), most)


def texts_of(args: argparse.Namespace) -> list[ParallelText]:
    if args.pairs is None:
        return parallel_text.from_packages(args.language or LANGUAGES)
    if len(args.language or ()) > 1:
        raise DataError(f"--language: {args.pairs.name} is of one language, got {', '.join(args.language)}")
    return [parallel_text.from_file(args.pairs, *(args.language or ["target"]))]


def measure(args: argparse.Namespace, origin: Content) -> Content:
    silence()
    texts, seconds = texts_of(args), 0.0
    for text in texts:
        sizes = ", ".join(f"{count:,} {split}" for split, count in text.sizes.items())
        print(f"en → {text.language}: {sizes} pairs of {text.source}")
    if args.model is None:
        recipe = Recipe(steps=args.model_steps)
        folder, seconds = decoder.make(texts, recipe, args.cache)
        name = f"a Llama of {recipe.layers} layers, {recipe.width} wide, trained here for {recipe.steps} steps"
        tuning = [decoder.divide(text)[1] for text in texts]
    else:
        folder, name, tuning = model_folder(args.model), Path(args.model).name, [text.pairs["train"] for text in texts]
    model, tokenizer = load_model(Config("dense", str(folder), task="causal-lm", device=args.device), 0)
    jobs = [
        Job(
            text.language,
            few(pairs, args.tuning_pairs),
            few(text.pairs["validation"], args.validation_pairs),
            few(text.pairs["test"], args.test_pairs),
        )
        for text, pairs in zip(texts, tuning, strict=True)
    ]
    settings = Settings(args.epochs, args.batch_size, args.alpha, args.max_new_tokens, tuple(args.seed or SEEDS))
    described = {
        "model": name,
        "source": texts[0].source,
        "tuning_pairs": {job.language: len(job.tuning) for job in jobs},
        "test_pairs": {job.language: len(job.test) for job in jobs},
    }
    study = Study(args.out, {**vars(settings), **described}, origin, rates={}, search_seconds=0.0)
    study.content["model_seconds"] = seconds
    lottery = Lottery(study, model, tokenizer, jobs, settings)
    lottery.search()
    for seed in settings.seeds:
        for job in jobs:
            lottery.run(job, seed)
    return study.content


main = program(
    "ks-lottery",
    __doc__,
    arguments,
    measure,
    tables.markdown,
    plots.draw,
    small=(
        *("--epochs", "1", "--tuning-pairs", "32", "--validation-pairs", "8", "--test-pairs", "8", "--seed", "0"),
        *("--language", "de", "--max-new-tokens", "8", "--model-steps", "10", "--cache", "out/small/ks_lottery"),
    ),
)
