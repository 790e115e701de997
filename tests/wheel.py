"""Builds the package, and checks the sdist and the wheel as those have them who install them.

python -m tests.wheel

Each is installed into an environment of its own, in a path with spaces, without constraints and far from the sources.
Only torch is the one of constraints.txt, and comes first, as it does in .venv: which build of it a machine needs is no
matter of this package. The README's programs, tests/user.py and the example run there. What fails ends the script.
It needs no package of the tests' environment, and leaves what it built in dist/.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
VARIABLES = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
# Without extras: what is imported is what was installed, and its version is that of the metadata.
IMPORT = """
import importlib.metadata, sys, xent_metrics
assert xent_metrics.__file__.startswith(sys.prefix), xent_metrics.__file__
assert xent_metrics.__version__ == importlib.metadata.version("xent-metrics")
"""


def run(*command: str | Path, cwd: Path) -> None:
    """Say what is run, and run it; end with what it printed if it fails."""
    words = [str(word) for word in command]
    print("$", shlex.join(words), flush=True)
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(words, cwd=cwd, env=VARIABLES, text=True, check=False, **pipes)
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nThis ended with {done.returncode}.")


def files_of(folder: Path, *parts: str) -> set[str]:
    """Return the files of parts of a folder, without what Python makes of them."""
    paths = (path for part in parts for path in (folder / part).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in paths if "__pycache__" not in path.parts}


def check_contents(wheel: Path, sources: Path) -> None:
    """Raise AssertionError unless the sdist has what the examples and the tests need, and the wheel the library."""
    parts = ("xent_metrics", "examples", "configs", "docs", "tests", ".github")
    assert files_of(sources, *parts) == files_of(ROOT, *parts)
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == files_of(ROOT, "xent_metrics")


def check_installed(package: Path, sources: Path, folder: Path) -> Path:
    """Install a package into an environment, use it there, and return its interpreter."""
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, "--constraint", ROOT / "constraints.txt", "torch", cwd=folder)
    run(*pip, package, cwd=folder)
    run(python, "-c", IMPORT, cwd=folder)
    run(*pip, f"{package}[examples]", cwd=folder)
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", (sources / "README.md").read_text(), re.DOTALL)):
        (folder / f"readme_{number}.py").write_text(block)
        run(python, f"readme_{number}.py", cwd=folder)
    run(python, sources / "tests" / "user.py", cwd=folder)
    configs = [f"--config={sources / 'configs' / name}.yaml" for name in ("char_lm", "smoke")]
    run(python, sources / "examples" / "char_lm" / "main.py", "fit", *configs, cwd=folder)
    return python


def check_types(python: Path, sources: Path, folder: Path) -> None:
    """Check what a user writes, strictly, against the types of what is installed."""
    script = shutil.copy(sources / "tests" / "user.py", folder)
    (folder / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "strict"}))
    mypy = ("mypy", "--strict", "--cache-dir", os.devnull, "--python-executable", python)
    run(sys.executable, "-m", *mypy, script, cwd=folder)
    run(sys.executable, "-m", "basedpyright", "--pythonpath", python, script, cwd=folder)


def main() -> None:
    """Build, check the metadata, install and use each, and check types."""
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", DIST, ROOT, cwd=ROOT)
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist, cwd=ROOT)
    with tempfile.TemporaryDirectory(prefix="unpacked sdist ") as unpacked:
        shutil.unpack_archive(sdist, unpacked)
        (sources,) = Path(unpacked).iterdir()
        check_contents(wheel, sources)
        shutil.rmtree(sources / "xent_metrics")  # The examples use the one that is installed.
        for package in (sdist, wheel):
            with tempfile.TemporaryDirectory(prefix="with spaces ") as folder:
                python = check_installed(package, sources, Path(folder))
                if package is wheel:
                    check_types(python, sources, Path(folder))
    print(f"{sdist.name} and {wheel.name} are good.")


if __name__ == "__main__":
    main()
