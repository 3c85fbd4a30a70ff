"""The ladder native -> Triton -> reference: who serves, who says why not, and when."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from samples import all_samples

import sparsekernels
from sparsekernels.ops import OPS, backend

PACKAGE = Path(sparsekernels.__file__).parent
each_op = pytest.mark.parametrize("op", [op.name for op in OPS])


def python(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python on the copy of the package in `folder`."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env.update(PYTHONPATH=str(folder), CUDA_VISIBLE_DEVICES="", **environment)
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def without_native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as it is where no compiler was found."""
    folder = tmp_path_factory.mktemp("pure")
    ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    shutil.copytree(PACKAGE, folder / "sparsekernels", ignore=ignored)
    facts = {
        "cpu": {"built": False, "reason": "no C++ compiler was found"},
        "cuda": {"built": False, "reason": "no nvcc"},
    }
    (folder / "sparsekernels" / "_build.json").write_text(json.dumps(facts))
    return folder


STEPPING_DOWN = """
import warnings
with warnings.catch_warnings(record=True) as at_import:
    warnings.simplefilter("always")
    import torch, sparsekernels as sk
ours = lambda caught: [str(w.message) for w in caught if "sparsekernels" in str(w.message)]
print("import:", len(ours(at_import)))
index = sk.Index(torch.tensor([1, 3]), (4,))
with warnings.catch_warnings(record=True) as at_call:
    warnings.simplefilter("always")
    values = sk.ops.gather(torch.arange(4.0), index)
    assert values.tolist() == [1.0, 3.0]
    target = sk.ops.scatter_(torch.zeros(4), index, values)
    assert target.tolist() == [0.0, 1.0, 0.0, 3.0]
    assert [x.tolist() for x in sk.ops.topk([target], 1)] == [[3]]
    sk.ops.gather(torch.arange(4.0), index, backend="reference")
said = ours(at_call)
print("calls:", len(said), at_call[0].category.__name__)
print("said:", *said)
for asked in ("native", "triton"):
    try:
        sk.ops.gather(torch.arange(4.0), index, backend=asked)
    except RuntimeError as error:
        print(f"{asked}:", error)
model = torch.nn.Linear(4, 4)
original = model.weight.detach().clone()
tuned = sk.train_only(model, sk.Selection.random(model, 0.5))
optimizer = sk.SparseAdamW(tuned.parameters())
model(torch.ones(1, 4)).sum().backward()
optimizer.step()
print("trains:", not torch.equal(model.weight, original) and model.weight_values.grad is not None)
"""


def test_without_a_native_library(without_native: Path) -> None:
    """Said once, in plain words, at the first call and not at import; everything works."""
    done = python(without_native, "-c", STEPPING_DOWN)
    assert done.returncode == 0, done.stderr
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert said["import"] == "0"
    assert said["calls"] == "1 RuntimeWarning"
    for words in ("no native cpu library", "no C++ compiler was found", "reference", "python -m sparsekernels"):
        assert words in said["said"]
    assert "cannot serve gather on cpu: no C++ compiler was found" in said["native"]
    assert "cannot serve gather on cpu: " in said["triton"]
    assert re.search("triton is not installed|Triton runs on GPUs", said["triton"])
    assert said["trains"] == "True"


def test_the_warning_is_seen_by_default(without_native: Path) -> None:
    script = "import torch, sparsekernels as sk\nfor _ in range(3): sk.ops.topk([torch.ones(2)], 1)\n"
    done = python(without_native, "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no native cpu library") == 1


def test_overview_without_a_native_library(without_native: Path) -> None:
    done = python(without_native, "-m", "sparsekernels")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler was found" in done.stdout
    for op in OPS:
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"{op.name} ")]
        assert line.split()[1] == "reference"


def test_a_library_that_does_not_load(without_native: Path) -> None:
    path = without_native / "sparsekernels" / "_cpu.so"
    path.write_bytes(b"no library")
    try:
        script = "import torch, sparsekernels as sk\nsk.ops.topk([torch.ones(2)], 1, backend='native')\n"
        done = python(without_native, "-c", script)
    finally:
        path.unlink()
    assert "RuntimeError" in done.stderr
    assert "_cpu.so does not load" in done.stderr


def test_overview() -> None:
    done = python(PACKAGE.parent, "-m", "sparsekernels")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    for op in OPS:
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"{op.name} ")]
        assert line.split()[1] == backend.serving(op.name, "cpu")
        assert op.doc in line


@each_op
def test_an_unknown_backend(op: str, device: torch.device) -> None:
    case = all_samples()[op][0].case(device)
    with pytest.raises(ValueError, match=r'backend must be None, "reference", "triton" or "native", got \'nonsense\''):
        case.call(*case.args, **case.kwargs, backend="nonsense")


@each_op
def test_a_plain_call_goes_where_serving_says(op: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Native where there is a library: then the reference is not touched, and nothing is said."""
    called: list[str] = []
    served = backend.serving(op, device.type)
    row = backend.ROWS[op]
    monkeypatch.setattr(backend, "_say_once", lambda *_: called.append("fallback"))
    case = all_samples()[op][4].case(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case.call(*case.args, **case.kwargs)
    assert (called == ["fallback"]) == (served == "reference")
    assert row.name == op


@each_op
def test_why_not_agrees_with_what_happens(op: str, device: torch.device) -> None:
    for name in ("reference", "triton", "native"):
        case = all_samples()[op][4].case(device)
        reason = backend.why_not(op, name, device.type)
        if reason is None:
            case.call(*case.args, **case.kwargs, backend=name)
        else:
            with pytest.raises(RuntimeError, match=re.escape(reason)):
                case.call(*case.args, **case.kwargs, backend=name)
