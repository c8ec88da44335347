"""What the locked packages are known for: pip-audit where it can reach its data, else their versions and licences.

    python scripts/audit.py [requirements.lock]

Exit 1 when pip-audit knows of a vulnerability, or when what is installed is not what the lock says.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

OFFLINE = ("ConnectionError", "Max retries", "timed out", "Temporary failure", "SSLError", "ProxyError", "403", "502")
"""Parts of pip-audit's errors when it does not get its data: nothing is said about the packages then."""


def locked(path: Path) -> dict[str, str]:
    """Package to version of a lock file's lines ``name==version``."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(re.match(r"([\w.-]+)==([^\s;]+)", line).groups() for line in lines if re.match(r"[\w.-]+==", line))  # type: ignore[misc,union-attr]


def audited(path: Path) -> int | None:
    """pip-audit's exit code, or None where it is not installed or gets no data."""
    command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--no-deps", "--requirement", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    why = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")
    if "No module named pip_audit" in done.stderr or any(mark in done.stderr for mark in OFFLINE):
        print(f"pip-audit says nothing here ({why[:120]}); versions and licences instead:\n")
        return None
    print(done.stdout + done.stderr, end="")
    return done.returncode


def licence(found: Distribution) -> str:
    """A package's licence in a few words, from the fields that packages use for it."""
    about = found.metadata
    classified = [c.rpartition(":: ")[2] for c in about.get_all("Classifier") or [] if c.startswith("License ::")]
    texts = [about.get("License-Expression"), ", ".join(classified), about.get("License")]
    return next((text.strip().splitlines()[0][:60] for text in texts if text and text.strip()), "not said")


def table(path: Path) -> int:
    """The locked packages with what is installed of them; the number that differ from the lock."""
    differ = 0
    print(f"{'package':<32}{'locked':<16}{'installed':<20}licence")
    for name, version in sorted(locked(path).items(), key=lambda item: item[0].lower()):
        try:
            found = distribution(name)
        except PackageNotFoundError:
            print(f"{name:<32}{version:<16}{'-':<20}not installed")
            differ += 1
            continue
        same = found.version.partition("+")[0] == version.partition("+")[0]
        differ += not same
        print(f"{name:<32}{version:<16}{found.version + ('' if same else ' (differs)'):<20}{licence(found)}")
    print(f"\n{len(locked(path))} packages, {differ} not as locked")
    return differ


def main() -> int:
    """Audit the lock; returns the exit code."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "requirements.lock")
    code = audited(path)
    return code if code is not None else int(table(path) > 0)


if __name__ == "__main__":
    sys.exit(main())
