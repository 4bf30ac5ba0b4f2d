"""Fixtures of the tests of backends."""

import pytest

from genft_kernels.backends.eager import cpu_pass


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Nothing loaded, and an empty cache."""
    monkeypatch.setenv("GENFT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    cpu_pass._compiled.cache_clear()
    yield tmp_path / "cache"
    cpu_pass._compiled.cache_clear()
