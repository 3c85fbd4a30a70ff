"""The fine-tuning program: its data, its errors, and small runs of it from end to end."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from benchmarks import __main__ as benchmarks_main  # noqa: E402
from benchmarks import finetune, study  # noqa: E402
from benchmarks.finetuning import config, text_task, training, trainings  # noqa: E402
from benchmarks.gating import report as gates  # noqa: E402
from benchmarks.reducing import report as laser  # noqa: E402
from benchmarks.translating import tables as ks_lottery  # noqa: E402

WORDS = [f"word{i}" for i in range(40)]


# ---- data


@pytest.fixture
def package(tmp_path: Path) -> Path:
    sources = {
        "algebra/rings.py": '"""All about rings and the ideals in them."""\ndef f():\n    """Short one."""\n',
        "algebra/fields.py": 'class Field:\n    """A field has inverses of all elements."""\n'
        '    def get(self):\n        """The same words stand in two subpackages."""\n',
        "calculus/limits.py": 'def limit():\n    """The same words stand in two subpackages."""\n'
        'def limit2():\n    """Compute a limit from both its sides."""\n'
        'def limit3():\n    """Compute a limit from both its sides."""\n',
        "calculus/tests/test_limits.py": 'def test():\n    """This text belongs to a test of limits."""\n',
        "_vendored/thing.py": '"""This text was written for another package."""\n',
        "toplevel.py": '"""This module lies in no subpackage at all."""\n',
    }
    for name, source in sources.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return tmp_path


def test_docstrings_are_labelled_by_their_subpackage_and_cleaned_of_repeats(package: Path) -> None:
    rows = text_task.label_texts(text_task.docstrings(package, "pkg"), min_words=5, min_texts=1)
    assert rows == [
        ("A field has inverses of all elements.", "pkg.algebra"),
        ("All about rings and the ideals in them.", "pkg.algebra"),
        ("Compute a limit from both its sides.", "pkg.calculus"),
    ]
    rows = text_task.label_texts(text_task.docstrings(package, "pkg"), min_words=5, min_texts=2)
    assert {label for _, label in rows} == {"pkg.algebra"}


def test_prose_keeps_what_is_said_and_drops_what_gives_the_label_away() -> None:
    doc = """Title of it
    ===========

    Return a :class:`~.Ring` as in scipy.sparse.linalg or :func:`sympy.polys.ring`, see SymPy.

    >>> from sympy import ring
    x**2

    .. math:: sympy
    Both are fine.

    Parameters
    ----------
    scale : as in scipy
    """
    text = text_task.prose(doc)
    assert text == "Title of it Return a Ring as in or , see . Both are fine."


def test_a_text_is_in_the_same_split_for_ever() -> None:
    # sha256("text 0") begins with 822b, below 80 % of ffff, and so on
    assert [text_task.split_of(f"text {i}") for i in (0, 25, 22)] == ["train", "validation", "test"]
    counts = Counter(text_task.split_of(f"text {i}") for i in range(5000))
    assert 0.78 < counts["train"] / 5000 < 0.82
    assert 0.08 < counts["test"] / 5000 < 0.12


@pytest.mark.parametrize("seed", [None, 3])
def test_batches_hold_every_text_once_and_little_padding(seed: int | None) -> None:
    draw = random.Random(0)
    encoded = [([i + 1] * draw.randint(2, 30), i) for i in range(203)]
    batches = text_task.make_batches(encoded, 8, 0, causal=False, seed=seed)
    seen = []
    for batch in batches:
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"].tolist(), strict=True):
            seen.append(label)
            assert ids[mask == 1].tolist() == encoded[label][0]
            assert not ids[mask == 0].any()
    assert sorted(seen) == list(range(203))
    real = sum(len(ids) for ids, _ in encoded)
    assert sum(batch["input_ids"].numel() for batch in batches) < 1.15 * real
    again = text_task.make_batches(encoded, 8, 0, causal=False, seed=seed)
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(batches, again, strict=True))
    if seed is not None:
        other = text_task.make_batches(encoded, 8, 0, causal=False, seed=seed + 1)
        assert [b["labels"].tolist() for b in batches] != [b["labels"].tolist() for b in other]


def test_padding_is_no_target_of_a_causal_model() -> None:
    (batch,) = text_task.make_batches([([5, 6, 7], 0), ([8, 9], 0)], 2, 0, causal=True)
    assert batch["labels"].tolist() == [[8, 9, -100], [5, 6, 7]]


# ---- whole runs, on tiny models


def write_rows(path: Path, count: int = 120) -> Path:
    draw = random.Random(1)
    rows = [
        {"text": " ".join(draw.choices(WORDS, k=draw.randint(4, 9))), "label": f"class {i % 3}"} for i in range(count)
    ]
    if path.suffix == ".csv":
        path.write_text("label,text\n" + "".join(f"{row['label']},{row['text']}\n" for row in rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_model(folder: Path, kind: str) -> Path:
    """A tiny model with random weights, and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", "[EOS]", *WORDS])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=42, n_embd=16, n_layer=2, n_head=2, n_positions=32)
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=42, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.BertConfig(
            vocab_size=42, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        )
        model = transformers.BertModel(config)
    model.save_pretrained(folder)
    if kind == "mean-pooled":
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return folder


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process, one thread: starting Python anew for each would take longer than the runs."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(finetune, "in_fresh_process", lambda function, *arguments: function(*arguments))
    yield
    torch.set_num_threads(threads)


def arguments(tmp_path: Path, kind: str, data: Path) -> list[str]:
    model = save_model(tmp_path / "model", kind)
    return [
        *("--model", str(model), "--data", str(data), "--out", str(tmp_path / "out"), "--device", "cpu"),
        *("--steps", "2", "--batch-size", "8", "--step-time-seconds", "0.1", "--threads", "1", "--density", "0.05"),
    ]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_language_model_from_end_to_end(
    here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    argv = arguments(tmp_path, kind, write_rows(tmp_path / "rows.jsonl"))
    assert finetune.main([*argv, "--task", "causal-lm", "--method", "sift"]) == 0
    printed = capsys.readouterr().out
    assert "test loss (perplexity)" in printed
    assert "predictions are identical" in printed
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    dense, sift = results["runs"]
    assert (dense["method"], sift["method"], dense["steps"], sift["steps"]) == ("dense", "sift", 2, 2)
    # An untrained model over 42 words cannot be far from guessing: the loss counts one next token, not padding.
    assert 3.0 < sift["test"]["value"] < 4.5
    # Per weight: gradient, two moments, master, position, original; per tensor: the step count.
    assert sift["trained_weights"] < 0.06 * dense["trained_weights"]
    per_weight = 4 + 8 + 4 + 4 + 4
    assert sift["bytes"]["trained"] == per_weight * sift["trained_weights"] + 4 * sift["tensors"]
    assert dense["bytes"]["gradients"] == 4 * dense["trained_weights"]
    plots = ["loss.png", "validation_loss.png", "cost.png", "gradient_share.png"]  # the loss of training is not lost
    assert f"written: {', '.join(str(tmp_path / 'out' / name) for name in ('results.json', *plots))}\n" in printed
    for plot in plots:
        assert (tmp_path / "out" / plot).stat().st_size > 5000


@pytest.mark.parametrize(
    ("kind", "methods", "seeds"),
    [
        ("bert", finetune.METHODS, 1),
        ("mean-pooled", finetune.METHODS, 1),
        ("bert", ("dense", "head", "random", "sift"), 2),
    ],
)
def test_classification(
    here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, methods: tuple[str, ...], seeds: int
) -> None:
    argv = arguments(tmp_path, kind, write_rows(tmp_path / "rows.csv"))
    argv += [part for method in methods for part in ("--method", method)]
    argv += [part for seed in range(seeds) for part in ("--seed", str(seed))]
    assert finetune.main(argv) == 0
    printed = capsys.readouterr().out
    assert printed.count("predictions are identical") == seeds * (len(methods) - 1)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    runs = {(run["method"], run["seed"]): run for run in results["runs"]}
    assert runs.keys() == {(method, seed) for method in methods for seed in range(seeds)}
    assert runs["random", 0]["trained_weights"] == runs["sift", 0]["trained_weights"]
    assert runs["head", 0]["trained_weights"] == runs["sift", 0]["head_weights"] > 0
    if "lora" in methods:  # the same head, in its own column
        assert runs["lora", 0]["bytes"]["head"] == runs["head", 0]["bytes"]["trained"]
        assert runs["lora", 0]["trained_weights"] > runs["lora", 0]["head_weights"]
    assert [row["seeds"] for row in results["table"]] == [seeds] * len(methods)


def test_a_mean_pooled_model_is_classified_by_the_mean_of_its_real_tokens(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "mean-pooled")
    model, _ = training.load_model(config.Config("dense", str(folder)), 3)
    ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    model.eval()
    found = model(input_ids=ids, attention_mask=mask, labels=torch.tensor([2, 0]))
    states = model.encoder(input_ids=ids[1:, :2]).last_hidden_state
    expected = model.classifier(states.mean(1))[0]
    assert torch.allclose(found.logits[1], expected, atol=1e-6)
    assert found.loss == torch.nn.functional.cross_entropy(found.logits, torch.tensor([2, 0]))
    assert not [name for name, _ in model.named_parameters() if "pooler" in name]


def test_predictions_that_differ_after_reloading_fail_the_program(
    here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.sk.Delta, "apply", lambda self, model: None)  # a delta that does nothing
    argv = arguments(tmp_path, "bert", write_rows(tmp_path / "rows.csv"))
    assert finetune.main([*argv, "--method", "sift"]) == 1
    assert "PREDICTIONS DIFFER" in capsys.readouterr().out


def test_the_accuracy_study_continues_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def fake_train(config: config.Config, task: text_task.TextTask, *, test: bool) -> dict:
        trained.append((config.method, config.lr))
        quality = -abs(config.lr - 0.09)  # best at 0.09, one step past the grid around 0.01
        result = {"validation": [{"value": quality}], "trained_weights": 1, "steps": 1}
        return {**result, "test": {"value": 0.5}} if test else result

    monkeypatch.setattr(trainings, "train", fake_train)
    task = text_task.load_task("classification", write_rows(tmp_path / "rows.jsonl"))
    base = config.Config("dense", "models/tiny/model", epochs=3)
    entries, origin = {"head": trainings.Entry("head", 1.0, 0.01)}, study.origin("accuracy", [])

    def start(base: config.Config) -> trainings.Trainings:
        return trainings.Trainings(tmp_path / "accuracy.json", task, base, entries, (0,), origin)

    assert start(base).search("head", 1.0) == 0.09
    assert [lr for _, lr in trained] == pytest.approx([0.01 / 3, 0.01, 0.03, 0.09, 0.27], rel=0.01)
    again = start(base)
    assert again.search("head", 1.0) == 0.09
    assert len(trained) == 5
    content = again.finish({"head": 0.09}, 1.0)
    assert json.loads((tmp_path / "accuracy.json").read_text()) == content
    assert {run["commit"] for run in content["runs"]} == {origin["commit"]}
    text = trainings.table(content, "accuracy")
    assert "| head | 1 | 0.09 (0.09) | 50.0%" in text
    assert f"commit: {origin['commit']}; `python -m benchmarks accuracy`" in text
    with pytest.raises(study.Refused, match="other settings"):
        start(config.Config("dense", "models/tiny/model", epochs=3, batch_size=4))


RESULTS = {
    "accuracy": lambda content: trainings.table(content, "accuracy"),
    "ird": lambda content: trainings.table(content, "ird"),
    "gates": gates.markdown,
    "laser": laser.markdown,
    "ks_lottery": ks_lottery.markdown,
}


@pytest.mark.parametrize("name", RESULTS)
def test_tables_are_made_from_results_that_are_older_than_their_origin(name: str) -> None:
    """The same tables as when they were measured; laser.json lacks the time of ranking, which is in no table."""
    content = json.loads((study.RESULTS / f"{name}.json").read_text())
    text = RESULTS[name](content)
    assert cells(text) == cells((study.RESULTS / f"{name}.md").read_text())
    assert content.get("commit") or "commit: not recorded" in text.splitlines()[-1]


def cells(text: str) -> list[list[str]]:
    """Those of all tables, without the rules below their heads."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|-")]
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def test_all_programs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmarks_main.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in benchmarks_main.PROGRAMS)
    assert benchmarks_main.main(["magic"]) == 2


# ---- errors


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--density", "0"], "must lie in (0, 1], got 0"),
        (["--density", "1.5"], "must lie in (0, 1], got 1.5"),
        (["--lr", "sifted=1e-3"], "knows no method 'sifted'"),
        (["--lr", "-1"], "must be above 0"),
        (["--steps", "0"], "must be at least 1"),
        (["--method", "magic"], "invalid choice: 'magic'"),
    ],
)
def test_arguments_that_make_no_sense(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        finetune.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "task", "message"),
    [
        ("missing.csv", None, "classification", "there is no file"),
        ("rows.txt", "a\n", "classification", "must end in .jsonl or .csv"),
        ("rows.csv", "text,topic\na b,c\n", "classification", "lacks 'label'; it has 'text', 'topic'"),
        ("rows.jsonl", '{"label": "a"}\n', "causal-lm", "row 1 of rows.jsonl lacks 'text'"),
        ("rows.jsonl", '{"text": "a"\n', "causal-lm", "line 1 of rows.jsonl is not JSON"),
        ("rows.jsonl", '["text"]\n', "causal-lm", "line 1 of rows.jsonl is not a JSON object"),
        ("rows.csv", "text,label\n" + "a b,c\n" * 9, "classification", "at least two different labels, found 1"),
        ("rows.csv", "text,label\na b,c\nb a,d\n", "classification", "2 rows are too few"),
    ],
)
def test_data_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | None, task: str, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    assert finetune.main(["--model", "some/model", "--data", str(tmp_path / name), "--task", task]) == 2
    assert message in capsys.readouterr().err


def test_models_that_cannot_be_used(here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--data", str(write_rows(tmp_path / "rows.jsonl")), "--out", str(tmp_path / "out"), "--task", "causal-lm"]
    assert finetune.main([*argv, "--model", str(tmp_path / "nowhere")]) == 2
    assert f"there is no folder {tmp_path / 'nowhere'}" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert finetune.main([*argv, "--model", str(tmp_path / "empty")]) == 2
    assert "holds no config.json" in capsys.readouterr().err
    assert finetune.main([*argv, "--model", str(save_model(tmp_path / "bert", "bert"))]) == 2
    assert "is no causal language model" in capsys.readouterr().err


def test_a_failed_write_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    study.write_json(path, {"kept": 1})
    with pytest.raises(TypeError):
        study.write_json(path, {"lost": object()})
    with pytest.raises(OSError, match="disk full"):
        study.write_atomically(path, fail_halfway)
    assert json.loads(path.read_text()) == {"kept": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def fail_halfway(path: Path) -> None:
    path.write_text('{"lo')
    raise OSError("disk full")


def test_what_is_given_replaces_what_small_stands_for() -> None:
    small = ["--seed", "0", "--epochs", "1", "--quick"]
    assert study.without(small, ["--seed", "3"]) == ["--epochs", "1", "--quick"]
    assert study.without(small, ["--epochs=2"]) == ["--seed", "0", "--quick"]
    assert study.without(small, []) == small
