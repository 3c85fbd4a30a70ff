"""Fill the generated blocks of README.md from committed results.

python docs/readme.py            write README.md
python docs/readme.py --check    exit with 1 if it is not what the results give
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def caption() -> str:
    found = results("step_cost")
    sizes, machine = found["settings"], found["machine"]
    return (
        f"*One training step of a Llama of {found['weights'] / 1e6:.0f}M weights, {sizes['samples']} x "
        f"{sizes['length']} tokens, fp32, {machine['cores']} CPU cores, torch {machine['versions']['torch']}: "
        f"`{found['command']}`. Accuracy is compared below.*\n"
    )


def methods() -> str:
    accuracy = {row["name"]: row["test"] for row in results("accuracy")["summary"]}
    fisher = {row["name"]: row["test"] for row in results("ird")["summary"]}
    rows = [
        ("random mask", "`random_mask`", "always first: it needs no data", random_masks()),
        ("KS-Lottery", "`ks_lottery.select`", "only a few embedding rows may change or ship", lottery()),
        (
            "SIFT",
            "`sift`",
            "you want a mask from one backward; try a random mask first",
            f"1 %: {percent(accuracy['sift 1%'])}; a random 1 %: {percent(accuracy['random 1%'])}; a random 5 %: "
            f"{percent(accuracy['random 5%'])}; dense: {percent(accuracy['dense'])}; the language model, 5 %: "
            f"{language_loss('5% elements, sift')}. **Loses to random, but for rows of the language model**",
        ),
        (
            "FISH Mask",
            "`fish`",
            "you need the Fisher information anyway",
            f"0.5 %: {percent(fisher['FISH 0.5%, 1024 texts'])}; random: {percent(fisher['random mask 0.5%'])}; dense: "
            f"{percent(fisher['dense'])} (one epoch); the language model, 5 % of columns: "
            f"{language_loss('5% columns, fish')}. **Loses to random**",
        ),
        (
            "IRD",
            "`ird`",
            "as FISH Mask, with fewer samples",
            f"0.5 %: {percent(fisher['IRD 0.5%, 1024 texts'])}. **Level with FISH Mask**",
        ),
        ("LASER", "`laser.adapt`", "to reduce the rank of weights of a trained model, without training", laser()),
        ("FineGates", "`gates.attach`", "the tuned model must also be smaller and faster", gates()),
    ]
    head = ("method", "`sk.methods.`", "use it when", "measured (test accuracy unless stated otherwise)")
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ("---",) * 4, *rows))


def best_test(study: str, name: str, best: Callable[..., Any]) -> float:
    """The mean test score of a contender of a grains study, with the rate of its best validation score."""
    mine = [run for run in results(study)["runs"] if run["name"] == name]
    rate = best((run for run in mine if run["seed"] == 0), key=lambda run: run["validation"])["lr"]
    return mean(run["test"] for run in mine if run["lr"] == rate)


def language_loss(name: str) -> str:
    return f"{best_test('grains', name, min):.2f}"


def random_masks() -> str:
    names = {
        "dense": "dense",
        "LoRA r=16 (PEFT)": "LoRA r=16",
        "5% elements, random": "5 % of elements",
        "5% columns, random": "of columns",
        "5% rows, random": "of rows",
    }
    losses = "; ".join(f"{label}: {language_loss(name)}" for name, label in names.items())
    text = "; ".join(f"{label}: {percent(best_test('grains_text', name, max))}" for name, label in names.items())
    steps = results("grains_text")["settings"]["steps"]
    return (
        f"{steps} steps: {text}. A language model, en to de, loss: {losses}. **Columns better than LoRA and level with "
        "dense on text, behind both on the language model**"
    )


def lottery() -> str:
    def mean(name: str) -> float:
        runs = results("ks_lottery")["runs"]
        return statistics.mean(r["contenders"][name]["scores"]["chrf"] for r in runs if r["language"] == "de")

    names = {
        "untuned": "untuned",
        "partial tuning, ticket": "its rows (2 %)",
        "most frequent rows": "as many most frequent rows",
        "one row, that before the answer": "one row, of the token before the answer",
        "embed tuning": "all rows",
        "full": "dense",
    }
    scores = "; ".join(f"{label}: {mean(name):.1f}" for name, label in names.items())
    verdict = (
        "A few rows give most of the gain, one row nearly as much; no row was significant, and the ticket by size is "
        "no better than frequency"
    )
    return f"en to de, chrF: {scores}. **{verdict}**"


def laser() -> str:
    seeds = results("laser")["seeds"]
    found = [seed["found"]["adapt, accuracy"] for seed in seeds]
    before, after = mean(s["test_before"]["accuracy"] for s in seeds), mean(f["test"]["accuracy"] for f in found)
    texts = mean(s["found"]["search, accuracy"]["texts"] / s["found"]["adapt, accuracy"]["texts"] for s in seeds)
    return (
        f"{percent(before)} before, {percent(after)} after; {texts:.0f} times fewer texts than a full search. "
        "**No search method improved accuracy here**"
    )


def gates() -> str:
    content = results("gates")
    runs = content["runs"]
    name, asked = "gates on heads and neurons + low-rank + rows", 0.4
    dense = {run["seed"]: run["test"] for run in runs if run["name"] == "dense"}

    def of(name: str, asked: float) -> tuple[float, float]:
        mine = [run for run in runs if (run["name"], run["asked"]) == (name, asked)]
        return mean(run["test"] for run in mine), mean(run["test"] - dense[run["seed"]] for run in mine)

    (gated, lost), (_, without), (lora, lora_lost) = (
        of(*each) for each in ((name, asked), (name.removesuffix(" + rows"), asked), ("LoRA (PEFT)", 0.0))
    )
    faster = content["latency"][f"{name}, {asked:.0%}"]["speedup"]
    return (
        f"{100 * asked:.0f} % of the projections removed, forward {faster:.1f} times faster: {percent(gated)} ("
        f"{-100 * lost:.1f} points below dense); LoRA, which removes nothing: {percent(lora)} "
        f"({-100 * lora_lost:.1f}). **Works if low-rank factors and embedding rows train beside the gates; without the "
        f"rows {-100 * without:.1f} points below**"
    )


def mean(numbers: Iterable[float]) -> float:
    return statistics.mean(numbers)


def filled(text: str) -> str:
    blocks = {"caption": caption, "methods": methods}
    return BLOCK.sub(lambda found: found[1] + blocks[found[2]]() + found[4], text)


def main(arguments: list[str]) -> int:
    before = README.read_text(encoding="utf-8")
    after = filled(before)
    if arguments == ["--check"]:
        return int(before != after)
    README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
