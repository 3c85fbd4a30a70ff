"""What `import sparsekernels` imports: each of these takes as long as torch, and most programs need none of them."""

import subprocess
import sys


def test_an_import_is_quick() -> None:
    slow = {"torch._dynamo", "triton", "scipy.stats", "transformers"}
    code = f"import sys, sparsekernels; print(*{slow} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.split() == []
