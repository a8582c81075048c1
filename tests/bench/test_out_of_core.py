"""bench.out_of_core: what it says of memory is of the process that finalises and scores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import out_of_core
from tests import ROOT


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone can tell")
@pytest.mark.slow
def test_memory_is_not_that_of_the_process_that_wrote_the_features() -> None:
    held = np.ones(1 << 27)  # 1 GiB
    code = "from bench.out_of_core import peak_bytes; print(peak_bytes())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert 2**24 < int(done.stdout) < held.nbytes


@pytest.mark.parametrize("name", ["--samples", "--proj-dim", "--targets", "--repeats"])
def test_sizes_that_measure_nothing_are_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--samples", "8", "--proj-dim", "4", "--targets", "2", "--dir", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        out_of_core.main([*words, name, "0"])
    assert ended.value.code == 2
    assert f"argument {name}" in capsys.readouterr().err
