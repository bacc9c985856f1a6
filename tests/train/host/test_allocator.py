"""Memory that the process keeps."""

import platform
import subprocess
import sys
from pathlib import Path

from train.host.allocator import keep_freed_memory

ROOT = Path(__file__).parents[3]


GLIBC = platform.libc_ver()[0] == "glibc"


def test_freed_memory_is_kept_where_the_c_library_is_glibc(monkeypatch):
    ask = "from train.host.allocator import keep_freed_memory; print(keep_freed_memory())"
    answer = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True, cwd=ROOT)
    assert answer.stdout.strip() == str(GLIBC)
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
