"""The C source compiles without a warning and gives the codes of the NumPy integers."""

import re
import subprocess

import numpy as np
import pytest
from folded_networks import STRICT, flips, network, run_c

from qpde import Bits, deploy


@pytest.mark.parametrize(
    ("kind", "outer_bits", "settle", "flags"),
    [
        ("symmetric", None, False, ("-O1",)),
        ("symmetric", 8, True, ("-O3", "-ffast-math", "-march=native")),
        ("plain", 8, True, ("-O1",)),
        ("tied", None, False, ("-O1",)),
        ("precise", None, False, ("-O1",)),
        ("huber", None, False, ("-O1",)),
        ("isotropic", None, False, ("-O1",)),
        ("apot", None, False, ("-O1",)),
        ("stable", 8, True, ("-O1",)),
        ("inverted", 8, True, ("-O1",)),
        ("inverted symmetric", None, False, ("-O1",)),
        ("W8A8", None, False, ("-O1",)),
        ("W3A32", None, False, ("-O1",)),
    ],
)
def test_the_compiled_source_gives_the_codes_of_the_reference(tmp_path, kind, outer_bits, settle, flags):
    model, variables, images = network(kind)
    folded = deploy.fold(model, variables, outer_bits=outer_bits)
    folded = deploy.settle(folded) if settle else folded
    logits, codes = deploy.run_reference(folded, images)
    found, found_codes = run_c(folded, images, tmp_path, *flags)
    assert flips({name: code.reshape(-1) for name, code in codes.items()}, found_codes) == 0
    np.testing.assert_allclose(found, logits, atol=3e-6)


@pytest.mark.parametrize("kind", ["symmetric", "plain"])
@pytest.mark.parametrize("bits", [(2, 4), (3, 3), (4, 2)])
def test_2_to_4_bits_are_exact(tmp_path, kind, bits):
    model, variables, images = network(kind)
    folded = deploy.fold(model, variables, bits=Bits(*bits))
    _, codes = deploy.run_reference(folded, images)
    _, found = run_c(folded, images, tmp_path, "-O1")
    assert flips({name: code.reshape(-1) for name, code in codes.items()}, found) == 0


def test_the_source_states_its_memory_and_uses_no_heap(tmp_path):
    folded = deploy.fold(*network()[:2])
    path = deploy.save_c(tmp_path / "network.c", folded, image_size=(8, 8))
    subprocess.run(["gcc", *STRICT, "-O1", "-c", "network.c"], cwd=tmp_path, check=True)
    text = path.read_text()
    ram, rom = (int(re.search(rf"#define NETWORK_{k}_BYTES (\d+)", text).group(1)) for k in ("RAM", "ROM"))
    assert f"Static memory: {ram} bytes" in text
    assert "malloc" not in text
    size = subprocess.run(["size", "-A", "network.o"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    sections = {line.split()[0]: int(line.split()[1]) for line in size.splitlines() if line.startswith(".")}
    assert ram <= sections[".bss"] <= ram + 64
    assert rom <= sections[".rodata"] <= rom + 4096
    packed = sum(-(-k.values.size * k.bits // 8) for k in folded.kernels.values() if k.bits)
    assert packed < rom


def test_bad_arguments_are_refused():
    folded = deploy.fold(*network()[:2])
    with pytest.raises(ValueError, match="must be a C identifier"):
        deploy.c_source(folded, image_size=(8, 8), name="a b")
    with pytest.raises(ValueError, match="too small"):
        deploy.c_source(folded, image_size=(1, 8))
