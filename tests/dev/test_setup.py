"""`make setup` for users that are not a developer at a desk."""

import os
import subprocess
from pathlib import Path


def commands(home: Path, **more: str) -> str:
    """What `make setup` would run, everything done anew."""
    env = {"PATH": os.environ["PATH"], "HOME": str(home), **more}
    return subprocess.run(["make", "-nB", "setup"], env=env, capture_output=True, text=True, check=True).stdout


def test_a_user_without_a_home_is_set_up_without_a_cache_and_no_other_is(tmp_path: Path) -> None:
    nowhere = tmp_path / "nobody"
    assert "UV_NO_CACHE=1" in commands(nowhere)
    assert "UV_NO_CACHE" not in commands(tmp_path)
    assert "UV_NO_CACHE" not in commands(nowhere, UV_CACHE_DIR=str(tmp_path / "cache"))
    assert not nowhere.exists()
