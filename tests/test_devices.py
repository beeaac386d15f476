"""Models spread over several devices (``device_map="auto"``): see :mod:`two_devices`, which plays a second one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_cached_forward import ARCHITECTURES
from torch.utils import backend_registration

# What torch's stand-in for a device lacks: making a tensor of a list.
LACKING = ["gpt_neo", "falcon"]
# And products of stacked matrices in fp32, which mixtures of experts compute.
LACKING += [name for name, values in ARCHITECTURES.items() if "moe" in name or "experts" in values[2]]


@pytest.fixture(scope="module")
def found() -> dict[str, str | None]:
    """What went wrong with each architecture, if anything."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this version of torch cannot play a second device")
    pytest.importorskip("accelerate")
    script = Path(__file__).with_name("two_devices.py")
    command = [sys.executable, str(script), *(name for name in ARCHITECTURES if name not in LACKING)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    result: dict[str, str | None] = json.loads(run.stdout.splitlines()[-1])
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_edit_keeps_to_the_devices_that_blocks_are_on(found: dict[str, str | None], name: str) -> None:
    if name in LACKING:
        pytest.skip("torch's stand-in for a second device cannot compute what this model computes")
    assert found[name] is None
