"""The translation experiment of KS-Lottery: its text, its errors, and a small run of it from end to end."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("sacrebleu")
pytest.importorskip("matplotlib")

from benchmarks import ks_lottery  # noqa: E402
from benchmarks.finetuning.text_task import DataError  # noqa: E402
from benchmarks.translating import catalogues, contenders, decoder, lottery, parallel_text, prompts, tables  # noqa: E402

ENTRIES = {
    "": "Content-Type: text/plain; charset=UTF-8\n",
    "verb\x04Open the file": "Datei öffnen",
    "%d new rule\x00%d new rules": "%d neue Regel\x00%d neue Regeln",
    "Delete the rule": "Regel löschen",
}

PO = """
msgid ""
msgstr "Content-Type: text/plain; charset=UTF-8\\n"

#: file.py:3
msgctxt "verb"
msgid "Open the file"
msgstr "Datei öffnen"

#, python-format
msgid "%d new rule"
msgid_plural "%d new rules"
msgstr[0] "%d neue Regel"
msgstr[1] "%d neue Regeln"

#, fuzzy
msgid "Not checked yet"
msgstr "Stimmt nicht"
msgid ""
"Delete "
"the \\"rule\\""
msgstr ""
"Regel \\"löschen\\""

#~ msgid "Long gone"
#~ msgstr "Längst vorbei"
"""


# ---- data


def write_mo(path: Path, entries: dict[str, str], order: str = "<") -> Path:
    """A compiled catalogue, as msgfmt writes it."""
    keys, values = ([text.encode() for text in side] for side in (entries.keys(), entries.values()))
    tables_at, count = 28, len(entries)
    data, table = b"", []
    for text in keys + values:
        table += [len(text), tables_at + 16 * count + len(data)]
        data += text + b"\0"
    head = struct.pack(f"{order}7I", 0x950412DE, 0, count, tables_at, tables_at + 8 * count, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + struct.pack(f"{order}{len(table)}I", *table) + data)
    return path


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_compiled_catalogue_is_read_as_gettext_reads_it(tmp_path: Path, order: str) -> None:
    path = write_mo(tmp_path / "de" / "LC_MESSAGES" / "django.mo", ENTRIES, order)
    assert list(catalogues.read(path)) == [
        ("Open the file", "Datei öffnen"),
        ("%d new rule", "%d neue Regel"),
        ("Delete the rule", "Regel löschen"),
    ]
    import gettext

    with path.open("rb") as file:
        translation = gettext.GNUTranslations(file)
    assert translation.gettext("Delete the rule") == "Regel löschen"
    assert translation.pgettext("verb", "Open the file") == "Datei öffnen"
    (tmp_path / "wrong.mo").write_bytes(b"no catalogue at all")
    with pytest.raises(ValueError, match=r"wrong\.mo is no compiled gettext catalogue"):
        list(catalogues.read_mo(tmp_path / "wrong.mo"))


def test_a_source_catalogue_is_read_without_fuzzy_and_obsolete_entries(tmp_path: Path) -> None:
    path = tmp_path / "django.po"
    path.write_text(PO, encoding="utf-8")
    assert list(catalogues.read(path)) == [
        ("Open the file", "Datei öffnen"),
        ("%d new rule", "%d neue Regel"),
        ('Delete the "rule"', 'Regel "löschen"'),
    ]


def test_catalogues_are_found_by_language_and_a_compiled_one_goes_first(tmp_path: Path) -> None:
    for locale in ("de", "de_DE", "de_AT", "pt-BR"):
        write_mo(tmp_path / "app" / "locale" / locale / "LC_MESSAGES" / "a.mo", ENTRIES)
    for name in ("a.po", "b.po"):
        (tmp_path / "app" / "locale" / "de" / "LC_MESSAGES" / name).write_text(PO, encoding="utf-8")
    found = catalogues.find(tmp_path)
    assert {language: [path.name for path in paths] for language, paths in found.items()} == {
        "de": ["a.mo", "b.po", "a.mo"],
        "de_AT": ["a.mo"],
        "pt_BR": ["a.mo"],
    }


def test_pairs_are_cleaned_and_there_is_one_for_each_source() -> None:
    pairs = [
        ("Delete the rule", "Regel entfernen"),
        ("Delete the rule", "Regel löschen"),
        (" Delete  the rule", "Regel\nlöschen"),
        ("Same thing", "Same thing"),
        ("Word", "Wort"),
        ("Hello %(name)s there", "Hallo %(name)s"),
        ("See <b>this</b> one", "Sieh das"),
        ("label_title of it", "Titel davon"),
        ("Go to https://x.org now", "Geh hin"),
        ("100 % of it", "100 % davon"),
        (" ".join(["very"] * 17), "sehr lang"),
        ("Not translated", ""),
    ]
    assert parallel_text.clean(pairs) == [("100 % of it", "100 % davon"), ("Delete the rule", "Regel löschen")]


def sentences(count: int = 160) -> list[tuple[str, str]]:
    """A toy language: words of the source, spelt backwards."""
    draw, words = random.Random(0), ["rule", "file", "page", "user", "date", "open", "delete", "change", "new", "old"]
    drawn = {" ".join(draw.choices(words, k=draw.randint(2, 4))) for _ in range(3 * count)}
    return [(text, " ".join(word[::-1] for word in text.split())) for text in sorted(drawn)][:count]


def test_no_source_is_in_two_splits_however_it_is_written() -> None:
    pairs = [(form(source), target) for source, target in sentences() for form in (str, str.title, "{}!".format)]
    text = parallel_text.split("de", parallel_text.clean(pairs), "here")
    assert sum(text.sizes.values()) == len(set(pairs)) == 3 * 160
    where: dict[str, set[str]] = {}
    for split, found in text.pairs.items():
        for source, _ in found:
            where.setdefault(source.lower().rstrip("!"), set()).add(split)
    assert len(where) == 160
    assert all(len(splits) == 1 for splits in where.values())


def test_the_default_model_reads_no_pair_that_is_tuned_with_or_tested() -> None:
    text = parallel_text.split("de", sentences(), "here")
    together, tuning = decoder.divide(text)
    assert sorted(together + tuning) == sorted(text.pairs["train"])
    assert not {source for source, _ in together} & {source for source, _ in tuning}
    beside, lines = set(), set()
    for document in (document for seed in range(3) for document in decoder.documents([text], random.Random(seed))):
        marked = [line for line in document if ": " in line]
        assert marked in ([], document)
        lines |= set(document) - set(marked)
        beside |= {
            (one.removeprefix("en: "), other.removeprefix("de: "))
            for one, other in zip(marked[::2], marked[1::2], strict=True)
        }
    assert beside == set(together)
    assert lines <= {line for pair in text.pairs["train"] for line in pair}


# ---- prompts and scores


def save_model(folder: Path) -> Path:
    """A tiny Llama with random weights, and a byte-level tokenizer."""
    text = parallel_text.split("de", sentences(), "here")
    tokenizer = decoder.train_tokenizer([text], 300)
    model: Any = decoder.build(decoder.Recipe(width=64, layers=1, heads=2), tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def loaded(tmp_path: Path) -> tuple[Any, Any]:
    folder = save_model(tmp_path / "model")
    return (
        transformers.AutoModelForCausalLM.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
    )


def test_only_the_answer_and_its_end_are_targets(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    (batch,) = prompts.batches(tokenizer, [("open file", "nepo elif"), ("new", "wen")], 2)
    for row, target in enumerate(("nepo elif", "wen")):
        labels, ids = batch["labels"][row], batch["input_ids"][row]
        counted = labels != -100
        assert tokenizer.decode(ids[counted]) == f" {target}</s>"
        assert torch.equal(labels[counted], ids[counted])
        assert tokenizer.decode(ids[~counted & (batch["attention_mask"][row] == 1)]).endswith("\n:")
    orders = [
        [b["input_ids"].tolist() for b in prompts.batches(tokenizer, sentences(9), 2, seed)] for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]


def test_translations_do_not_depend_on_what_else_is_in_the_batch(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    model.eval()
    sources = ["open the old file", "rule", "new page"]
    written = prompts.translate(model, tokenizer, sources, 6)
    for source, text in zip(sources, written, strict=True):
        ids = prompts.prompt_ids(tokenizer, source)
        start = len(ids)
        while len(ids) < start + 6 and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert text == tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_scores_of_the_first_line_ignore_what_comes_after() -> None:
    references = ["Die alte Regel ist gelöscht", "Eine neue Datei wird geöffnet"]
    scores = prompts.score([references[0] + "\nand so on and on", references[1]], references)
    assert [scores["chrf_first_line"], scores["bleu_first_line"]] == pytest.approx([100, 100])
    assert scores["chrf"] < 95
    assert scores["one_line"] == 0.5


# ---- contenders


def test_every_contender_tunes_as_many_rows_as_the_ticket_has(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    batches = prompts.batches(tokenizer, sentences(32), 8, seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with contenders.tuned(model, contenders.EMBED, 0.03, batches, 2) as embed:
        ticket = contenders.Ticket.draw(embed, 0.05)
        chosen = contenders.choose(embed, ticket, batches, before_answer=7, seed=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    count = len(tokenizer) * 2 // 100
    rows = {name: next(iter(selection.values())).positions.long() for name, selection in chosen.items()}
    assert ticket.counts["none"] > count
    assert ticket.pvalues[rows[contenders.TICKET]].max() <= ticket.pvalues.sort().values[count]
    assert {name: len(positions) for name, positions in rows.items()} == {
        **dict.fromkeys((contenders.TICKET, contenders.SHIFT, contenders.FREQUENCY, contenders.RANDOM), count),
        contenders.ONE_ROW: 1,
    }
    assert rows[contenders.ONE_ROW].tolist() == [7]
    with contenders.tuned(model, contenders.EMBED, 1e-9, batches[:1], 1) as embed:
        ticket = contenders.Ticket.draw(embed, 0.05)
    assert (ticket.counts["none"], len(ticket.rows)) == (0, count)
    with contenders.tuned(model, contenders.FULL, 1e-3, batches, 1) as nothing:
        assert nothing is None
        assert not any(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ---- whole runs


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{source}\t{target}\n" for source, target in sentences()), encoding="utf-8")
    return path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rate a contender, large enough for a ticket."""
    monkeypatch.setattr(lottery, "best_rate", lambda score, rates: (score(rates[1]), rates[1])[1])
    for name, rate in contenders.CONTENDERS.items():
        monkeypatch.setitem(contenders.CONTENDERS, name, rate and 0.03)


def arguments(tmp_path: Path, pairs: Path, *more: str) -> list[str]:
    small = (
        "--epochs",
        "1",
        "--batch-size",
        "16",
        "--test-pairs",
        "6",
        "--validation-pairs",
        "4",
        "--max-new-tokens",
        "8",
    )
    return ["--pairs", str(pairs), "--out", str(tmp_path / "out" / "ks.json"), "--device", "cpu", *small, *more]


def test_the_program_from_end_to_end(
    quick: None, tmp_path: Path, pairs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "model")
    argv = arguments(tmp_path, pairs, "--model", str(model), "--language", "back", "--seed", "0", "--seed", "1")
    assert ks_lottery.main(argv) == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "ks.json").read_text())
    assert [(run["language"], run["seed"]) for run in content["runs"]] == [("back", 0), ("back", 1)]
    for run in content["runs"]:
        assert list(run["contenders"]) == list(contenders.CONTENDERS)
        assert run["contenders"][contenders.EMBED]["agreement"]["share"] == 1
        width, rows = 64, run["ticket"]["rows"]
        assert {name: entry["trained"] for name, entry in run["contenders"].items() if name != contenders.FULL} == {
            **dict.fromkeys((contenders.TICKET, contenders.TRANSFER, contenders.SHIFT), rows * width),
            **dict.fromkeys((contenders.FREQUENCY, contenders.RANDOM), rows * width),
            contenders.UNTUNED: 0,
            contenders.EMBED: run["ticket"]["of"] * width,
            contenders.ONE_ROW: width,
        }
        levels = run["ticket"]["levels"]
        assert levels == sorted(levels, reverse=True)
        assert sum(count for _, _, count in levels) == run["ticket"]["of"]
    assert list(content["rates"][contenders.EMBED]["rows_below_alpha"]) == ["0.03"]
    assert "| embed tuning" in printed
    assert "| a ticket of at most 2 % of the rows" in printed
    assert (tmp_path / "out" / "ks.md").read_text() in printed
    for plot in ("ks.png", "ks_pvalues.png", "ks_ranked.png"):
        assert (tmp_path / "out" / plot).stat().st_size > 5000

    monkeypatch.setattr(contenders, "tuned", None)  # everything is in the file: nothing may be tuned again
    assert ks_lottery.main(argv) == 0
    assert ks_lottery.main([*argv, "--epochs", "2"]) == 2
    assert "was measured with other settings" in capsys.readouterr().err


def test_the_default_model_is_trained_once(tmp_path: Path) -> None:
    text = parallel_text.split("back", sentences(), "here")
    recipe = decoder.Recipe(vocabulary=300, width=32, layers=1, heads=2, context=32, batch_size=4, steps=3)
    folder, seconds = decoder.make([text], recipe, tmp_path)
    record = json.loads((folder / "pretraining.json").read_text())
    assert len(record["losses"]) == 3
    assert decoder.make([text], recipe, tmp_path) == (folder, seconds)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight


def test_shares_of_the_gain_are_between_untuned_and_embed_tuned() -> None:
    scores = {contenders.UNTUNED: 10.0, contenders.EMBED: 30.0, contenders.TICKET: 25.0}
    run = {"contenders": {name: {"scores": {"chrf": value}} for name, value in scores.items()}}
    assert tables.gained([run], contenders.TICKET, "chrf") == [0.75]


# ---- errors


def test_a_language_that_is_not_there_names_those_that_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mo(tmp_path / "locale" / "de" / "LC_MESSAGES" / "a.mo", ENTRIES)
    write_mo(tmp_path / "locale" / "es" / "LC_MESSAGES" / "a.mo", ENTRIES)
    monkeypatch.setattr(parallel_text, "installed", lambda: {"sacrebleu": tmp_path})
    monkeypatch.setattr(parallel_text, "PACKAGES", {"sacrebleu": "sacrebleu"})
    assert ks_lottery.main(["--language", "fr"]) == 2
    assert "--language: there are no translations into 'fr'; there are de, es" in capsys.readouterr().err
    assert ks_lottery.main(["--language", "de"]) == 2
    assert "2 usable pairs are too few" in capsys.readouterr().err
    monkeypatch.setattr(parallel_text, "installed", dict)
    assert ks_lottery.main([]) == 2
    assert "pip install --no-deps sacrebleu, as `make ks-lottery` does, or use --pairs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("one\ttwo\n\nonly one\n", "line 3 of pairs.tsv has 1 columns, expected source<TAB>target"),
        ("one\ttwo\tthree\n", "line 1 of pairs.tsv has 3 columns"),
        ("open file\tnepo elif\n", "1 usable pairs are too few"),
        (None, "there is no file"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "pairs.tsv"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message.replace("(", r"\(")):
        parallel_text.from_file(path, "de")


def test_a_file_is_of_one_language(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ks_lottery.main(["--pairs", str(pairs), "--language", "de", "--language", "es"]) == 2
    assert "--language: pairs.tsv is of one language, got de, es" in capsys.readouterr().err
