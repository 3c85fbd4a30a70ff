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
pytestmark = pytest.mark.xdist_group("backend")  # most of them read what one process said
each_op = pytest.mark.parametrize("op", [op.name for op in OPS])


# Runs each script on the package of its folder. Torch is imported once, for that takes most of the time: then it forks.
EACH_IN_A_FORK = """
import os, sys, torch, traceback
for path in sys.argv[1:]:
    if not os.fork():
        folder = os.path.dirname(path)
        for stream, end in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(path + end, os.O_WRONLY | os.O_CREAT), stream)
        os.chdir(folder)
        sys.path.insert(0, folder)
        try:
            exec(open(path).read(), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """Standard output and error of each of SCRIPTS."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
    paths = {}
    for name, (library, script) in SCRIPTS.items():
        folder = tmp_path_factory.mktemp("package")
        paths[name] = folder / "script"
        paths[name].write_text(script)
        if library is None:
            (folder / "sparsekernels").symlink_to(PACKAGE)
        else:
            without_native(folder / "sparsekernels", library)
    command = [sys.executable, "-c", EACH_IN_A_FORK, *map(str, paths.values())]
    subprocess.run(command, env=environment, check=True)
    return {name: tuple(Path(f"{path}{end}").read_text() for end in (".out", ".err")) for name, path in paths.items()}


def without_native(folder: Path, library: bytes) -> None:
    """The package as it is where no compiler was found; with a `library` that is none, if it is not empty."""
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("*.so", "_build.json"))
    facts = {
        "cpu": {"built": False, "reason": "no C++ compiler was found"},
        "cuda": {"built": False, "reason": "no nvcc"},
    }
    (folder / "_build.json").write_text(json.dumps(facts))
    if library:
        (folder / "_cpu.so").write_bytes(library)


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


OVERVIEW = "import runpy; runpy.run_module('sparsekernels', run_name='__main__')"
SLOW = {"torch._dynamo", "triton", "scipy.stats", "transformers"}
# Script -> (what lies there in place of the native library, if it is not the package as it is; what to run).
SCRIPTS: dict[str, tuple[bytes | None, str]] = {
    "stepping down": (b"", STEPPING_DOWN),
    "warning": (b"", "import torch, sparsekernels as sk\nfor _ in range(3): sk.ops.topk([torch.ones(2)], 1)"),
    "overview without": (b"", OVERVIEW),
    "no library": (
        b"no library",
        "import torch, sparsekernels as sk\nsk.ops.topk([torch.ones(2)], 1, backend='native')",
    ),
    "overview": (None, OVERVIEW),
    "import": (None, f"import sys, sparsekernels; print(*{SLOW} & set(sys.modules))"),
}
Said = dict[str, tuple[str, str]]


def test_without_a_native_library(said: Said) -> None:
    """Said once, in plain words, at the first call and not at import; everything works."""
    out, errors = said["stepping down"]
    assert not errors
    found = dict(line.split(": ", 1) for line in out.splitlines())
    assert found["import"] == "0"
    assert found["calls"] == "1 RuntimeWarning"
    for words in ("no native cpu library", "no C++ compiler was found", "reference", "python -m sparsekernels"):
        assert words in found["said"]
    assert "cannot serve gather on cpu: no C++ compiler was found" in found["native"]
    assert "cannot serve gather on cpu: " in found["triton"]
    assert re.search("triton is not installed|Triton runs on GPUs", found["triton"])
    assert found["trains"] == "True"


def test_the_warning_is_seen_by_default(said: Said) -> None:
    _, errors = said["warning"]
    assert errors.count("no native cpu library") == 1
    assert "Error" not in errors


def test_overview_without_a_native_library(said: Said) -> None:
    out, errors = said["overview without"]
    assert not errors
    assert "no C++ compiler was found" in out
    for op in OPS:
        (line,) = [line for line in out.splitlines() if line.startswith(f"{op.name} ")]
        assert line.split()[1] == "reference"


def test_a_library_that_does_not_load(said: Said) -> None:
    _, errors = said["no library"]
    assert "RuntimeError" in errors
    assert "_cpu.so does not load" in errors


def test_overview(said: Said) -> None:
    out, errors = said["overview"]
    assert not errors
    for op in OPS:
        (line,) = [line for line in out.splitlines() if line.startswith(f"{op.name} ")]
        assert line.split()[1] == backend.serving(op.name, "cpu")
        assert op.doc in line


def test_an_import_is_quick(said: Said) -> None:
    """Each of SLOW takes as long as torch, and most programs need none of them."""
    assert said["import"] == ("\n", "")


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
